"""From a model's hidden states to scores of tokens, without the logits of all tokens in memory.

Shapes: B sequences of T positions, of which N are scored, n at a time; V tokens in the vocabulary,
hidden states of size H.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# How many logits may be in memory at a time. A GPU needs larger products to be busy.
MAX_LOGITS = {"cpu": 2**24, "gpu": 2**27}


# -- the layer -------------------------------------------------------------------------------------


def unwrap_model(model):
    """The model inside DDP or DeepSpeed. (accelerate's extract_model_from_parallel searches every
    module too.)"""
    children = dict(model.named_children())
    return children.get("module", model)


def output_layer(model) -> torch.nn.Module:
    """The projection of hidden states (..., H) to logits (..., V)."""
    return unwrap_model(model).get_output_embeddings()


@contextlib.contextmanager
def output_layer_computing(model, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model with `forward` in place of what its output layer computes.

    The layer stays, with the hooks in which FSDP and DeepSpeed gather its weights.
    """
    layer = output_layer(model)
    other = vars(layer).get("forward")  # where a library has replaced it already
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if other:
            layer.forward = other


# Whether the logits of a model are what its output layer computes, by that layer.
known_layers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@torch.no_grad()
def computes_final_logits(model, input_ids: Tensor) -> bool:
    """Whether `model` returns what its output layer computes: Gemma 2 caps it, Cohere and Granite
    scale it. Known by a try on one of the `input_ids` (B, T), which every process makes."""
    layer = output_layer(model)
    if layer not in known_layers:
        project = layer.forward

        def all_are_100(hidden: Tensor) -> Tensor:
            return torch.full_like(project(hidden), 100.0)

        # Random numbers are left as they were: those of dropout depend on them.
        with torch.random.fork_rng(), output_layer_computing(model, all_are_100):
            logits = model(input_ids=input_ids[:1, :1], use_cache=False).logits
        known_layers[layer] = bool((logits == 100).all()) and logits.shape[-1] == vocabulary(model)
    return known_layers[layer]


# -- hidden states and logits ----------------------------------------------------------------------


def hidden_states_at(model, mask: Tensor, **inputs) -> Tensor:
    """The last hidden states (N, H) of the N positions where `mask` (B, T) is true."""
    selected = []

    def select(hidden: Tensor) -> Tensor:
        selected.append(hidden[mask])
        return selected[0]

    with output_layer_computing(model, select):
        model(**inputs, use_cache=False)
    return selected[0]


def logits_at(model, mask: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    """The logits (N, V) and last hidden states (N, H) of the N positions where `mask` (B, T) is
    true. The others skip the output layer: all logits would take most of the memory."""
    project = output_layer(model).forward
    selected = []

    def project_selected(hidden: Tensor) -> Tensor:
        selected.append(hidden[mask])
        return project(selected[0])

    with output_layer_computing(model, project_selected):
        logits = model(**inputs, use_cache=False).logits
    return logits, selected[0]


@torch.no_grad()
def projected_later(model, mask: Tensor, **inputs) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(states (N, ...) at the N positions where `mask` is true, the function that makes logits
    (n, V) of any n of them), without gradient. States are smaller than logits."""
    if not computes_final_logits(model, inputs["input_ids"]):
        logits, _ = logits_at(model, mask, **inputs)
        return logits, torch.nn.Identity()
    layer = output_layer(model)

    @torch.no_grad()
    def project(hidden: Tensor) -> Tensor:
        # Autocast, if it is on, is that of another model.
        with torch.autocast(hidden.device.type, enabled=False):
            return layer(hidden)

    return hidden_states_at(model, mask, **inputs), project


# -- scores ----------------------------------------------------------------------------------------


def scores_at(
    model, mask: Tensor, score: Callable[..., Sequence[Tensor]], *columns: Tensor, **inputs
) -> tuple[Sequence[Tensor], Tensor]:
    """(scores, hidden states (N, H)) of the N positions where `mask` (B, T) is true.

    score(logits (n, V), *columns (n, ...)) returns tensors, the first of which is (n,),
    depends on each position alone, and may have a gradient. It is called for as many positions at
    a time as MAX_LOGITS allows, so that memory does not grow with the vocabulary, and the scores
    are concatenated. Models that change their logits after the output layer take all at once.
    """
    if not computes_final_logits(model, inputs["input_ids"]):
        logits, hidden = logits_at(model, mask, **inputs)
        return score(logits, *columns), hidden

    layer = output_layer(model)
    project = layer.forward
    at_once = positions_at_once(model)
    layer_trains = any(weight.requires_grad for weight in layer.parameters())
    selected = []
    scores = []

    def score_chunk(hidden: Tensor, *columns: Tensor) -> Sequence[Tensor]:
        return score(project(hidden), *columns)

    def score_selected(all_hidden: Tensor) -> Tensor:
        hidden = all_hidden[mask]  # (N, H)
        selected.append(hidden)
        chunks = list(zip(*[tensor.split(at_once) for tensor in (hidden, *columns)], strict=True))
        if len(chunks) == 1:
            parts = [score_chunk(*chunks[0])]
        elif layer_trains:
            # The gradient of the weights needs the logits again, in the backward pass (Chen et al.
            # 2016, "Training Deep Nets with Sublinear Memory Cost").
            parts = [checkpoint(score_chunk, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [with_known_gradient(score_chunk, *chunk) for chunk in chunks]
        scores.extend(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return scores[0]

    with output_layer_computing(model, score_selected):
        # The first scores go through the model's own hooks: DeepSpeed's backward pass needs them.
        first = model(**inputs, use_cache=False).logits
    return [first, *scores[1:]], selected[0]


def vocabulary(model) -> int:
    """V, the number of logits of a token."""
    return unwrap_model(model).config.get_text_config().vocab_size


def positions_at_once(model) -> int:
    """How many positions may have their logits in memory together."""
    device_type = "cpu" if unwrap_model(model).device.type == "cpu" else "gpu"
    return max(1, MAX_LOGITS[device_type] // vocabulary(model))


def with_known_gradient(score: Callable, hidden: Tensor, *columns: Tensor) -> Sequence[Tensor]:
    """score(hidden (n, H), *columns), where the gradient of the first scores is computed at once.

    So no logits are kept for the backward pass, nor computed again in it.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return score(hidden, *columns)
    leaf = hidden.detach().requires_grad_()
    first, *others = score(leaf, *columns)
    with torch.autocast(hidden.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(first.sum(), leaf)  # (n, H)
    return [KnownGradient.apply(hidden, first.detach(), gradient), *others]


class KnownGradient(torch.autograd.Function):
    """Scores (n,) of hidden states (n, H), with their gradient (n, H)."""

    @staticmethod
    def forward(ctx, hidden, scores, gradient):
        ctx.save_for_backward(gradient)
        return scores.clone()

    @staticmethod
    def backward(ctx, grads):
        (gradient,) = ctx.saved_tensors
        return (grads[:, None] * gradient).to(gradient.dtype), None, None


def rows_at_once(logits: Tensor) -> int:
    """How many rows of logits (N, V) to turn into probabilities at a time. On a CPU they have to
    fit the cache."""
    most = 2**20 if logits.device.type == "cpu" else 2**26
    return max(1, most // logits.shape[-1])


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] for logits (N, V) and targets (N,): (N,) in float32.

    It works in chunks, and the gradient overwrites the logits, which are not needed after it: a
    second tensor (N, V), the largest of a training step, is never allocated."""

    @staticmethod
    def forward(ctx, logits, targets):
        rows = rows_at_once(logits)
        # Allocated before the chunks: small tensors between large ones leave holes in memory.
        log_norms = logits.new_empty(len(logits), dtype=torch.float32)  # (N,)
        for chunk, log_norm in zip(logits.split(rows), log_norms.split(rows), strict=True):
            torch.logsumexp(chunk.float(), -1, out=log_norm)
        ctx.save_for_backward(logits, targets, log_norms)
        target_logits = logits.gather(-1, targets[:, None])[:, 0]
        return target_logits.float() - log_norms

    @staticmethod
    def backward(ctx, grads):
        logits, targets, log_norms = ctx.saved_tensors
        rows = rows_at_once(logits)
        columns = [tensor.split(rows) for tensor in (logits, targets, log_norms, grads)]
        # d log p(target) / d logits = onehot(target) - softmax(logits)
        for chunk, target, log_norm, grad in zip(*columns, strict=True):
            grad = grad[:, None]
            log_probabilities = chunk.float() - log_norm[:, None]
            chunk.copy_(log_probabilities.exp_().mul_(-grad))
            chunk.scatter_add_(-1, target[:, None], grad.to(chunk.dtype))
        return logits, None
