"""Scores of tokens from hidden states, without keeping the logits of all tokens in memory.

Shapes: B sequences of T positions, N of which are scored, n at a time; V vocabulary size, H hidden
size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# How many logits may be in memory at a time. A GPU needs larger products to be fully used.
MAX_LOGITS = {"cpu": 2**24, "gpu": 2**27}


# -- the layer -------------------------------------------------------------------------------------


def unwrap_model(model):
    """The model inside DDP or DeepSpeed. (accelerate's extract_model_from_parallel would also
    search all submodules.)"""
    children = dict(model.named_children())
    return children.get("module", model)


def output_layer(model) -> torch.nn.Module:
    """The projection of hidden states (..., H) to logits (..., V)."""
    return unwrap_model(model).get_output_embeddings()


@contextlib.contextmanager
def output_layer_computing(model, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what the model's output layer computes by `forward` during the block.

    The layer itself stays, with the hooks in which FSDP and DeepSpeed gather its weights.
    """
    layer = output_layer(model)
    other = vars(layer).get("forward")  # set if a library has replaced it already
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if other:
            layer.forward = other


def run_with_output_layer(
    model, mask: Tensor, forward: Callable[[Tensor], Tensor], **inputs
) -> tuple[Tensor, Tensor]:
    """Run `model` with an output layer that computes `forward` of the last hidden states (N, H) at
    the N positions where `mask` (B, T) is true; returns the model's output and these states.

    The pass goes through `model` itself, so DDP, FSDP and DeepSpeed work. The other positions skip
    the output layer, because their logits would take most of the memory.
    """
    selected = []

    def forward_selected(hidden: Tensor) -> Tensor:
        selected.append(hidden[mask])
        return forward(selected[0])

    with output_layer_computing(model, forward_selected):
        output = model(**inputs, use_cache=False).logits
    return output, selected[0]


def hidden_states_at(model, mask: Tensor, **inputs) -> Tensor:
    """The last hidden states (N, H) at the N positions where `mask` (B, T) is true."""
    _, hidden = run_with_output_layer(model, mask, torch.nn.Identity(), **inputs)
    return hidden


def logits_at(model, mask: Tensor, **inputs) -> tuple[Tensor, Tensor]:
    """The logits (N, V) and last hidden states (N, H) at the N positions where `mask` (B, T) is
    true."""
    return run_with_output_layer(model, mask, output_layer(model).forward, **inputs)


def vocabulary_size(model) -> int:
    """V, the number of logits of a token."""
    return unwrap_model(model).config.get_text_config().vocab_size


# {output layer: whether the model returns what it computes}, for the models tested so far.
TRIED_LAYERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@torch.no_grad()
def returns_its_logits(model, input_ids: Tensor) -> bool:
    """Whether `model` returns what its output layer computes: Gemma 2 caps it, Cohere and Granite
    scale it. Tested on one of the `input_ids` (B, T); all processes must call this together."""
    layer = output_layer(model)
    if layer not in TRIED_LAYERS:
        project = layer.forward

        def all_are_100(hidden: Tensor) -> Tensor:
            return torch.full_like(project(hidden), 100.0)

        # Restore the random state, on which dropout depends.
        device = unwrap_model(model).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), output_layer_computing(model, all_are_100):
            logits = model(input_ids=input_ids[:1, :1], use_cache=False).logits
        is_whole = logits.shape[-1] == vocabulary_size(model)
        TRIED_LAYERS[layer] = is_whole and bool((logits == 100).all())
    return TRIED_LAYERS[layer]


@torch.no_grad()
def deferred_logits(model, mask: Tensor, **inputs) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(states (N, ...) at the N positions where `mask` is true, a function that computes logits
    (n, V) from any n of them), without gradient. States take less memory than logits."""
    if not returns_its_logits(model, inputs["input_ids"]):
        logits, _ = logits_at(model, mask, **inputs)
        return logits, torch.nn.Identity()
    layer = output_layer(model)

    @torch.no_grad()
    def project(hidden: Tensor) -> Tensor:
        # If autocast is on, it is meant for another model.
        with torch.autocast(hidden.device.type, enabled=False):
            return layer(hidden)

    return hidden_states_at(model, mask, **inputs), project


# -- scores ----------------------------------------------------------------------------------------


def scores_at(
    model, mask: Tensor, score: Callable[..., Sequence[Tensor]], *columns: Tensor, **inputs
) -> tuple[Sequence[Tensor], Tensor]:
    """(scores, last hidden states (N, H)) at the N positions where `mask` (B, T) is true.

    score(logits (n, V), *columns (n, ...)) returns tensors. The first one is (n,), each of its
    elements depends on one position only, and it may have a gradient. `score` is called for as many
    positions at a time as MAX_LOGITS allows, so that memory does not grow with the vocabulary, and
    its results are concatenated. If a model changes its logits after the output layer, `score` gets
    all logits at once.
    """
    if not returns_its_logits(model, inputs["input_ids"]):
        logits, hidden = logits_at(model, mask, **inputs)
        return score(logits, *columns), hidden

    layer = output_layer(model)
    project = layer.forward
    at_once = positions_at_once(model)
    layer_trains = any(weight.requires_grad for weight in layer.parameters())
    scores = []

    def project_and_score(hidden: Tensor, *columns: Tensor) -> Sequence[Tensor]:
        return score(project(hidden), *columns)

    def score_in_chunks(hidden: Tensor) -> Tensor:
        if len(hidden) <= at_once:
            score_chunk = project_and_score
        elif layer_trains:
            # Recompute the logits in the backward pass, for the gradient of the weights (Chen et
            # al. 2016, "Training Deep Nets with Sublinear Memory Cost").
            score_chunk = partial(checkpoint, project_and_score, use_reentrant=False)
        else:
            score_chunk = partial(with_known_gradient, project_and_score)
        chunks = [tensor.split(at_once) for tensor in (hidden, *columns)]
        by_chunk = [score_chunk(*chunk) for chunk in zip(*chunks, strict=True)]
        scores.extend(torch.cat(parts) for parts in zip(*by_chunk, strict=True))
        return scores[0]

    # Take the first scores from the model's output: DeepSpeed starts its backward pass there.
    first, hidden = run_with_output_layer(model, mask, score_in_chunks, **inputs)
    return [first, *scores[1:]], hidden


def positions_at_once(model) -> int:
    """How many positions may have their logits in memory at once."""
    device_type = "cpu" if unwrap_model(model).device.type == "cpu" else "gpu"
    return max(1, MAX_LOGITS[device_type] // vocabulary_size(model))


def with_known_gradient(score: Callable, hidden: Tensor, *columns: Tensor) -> Sequence[Tensor]:
    """score(hidden (n, H), *columns), computing the gradient of the first scores immediately.

    Logits are then neither kept for the backward pass nor recomputed in it.
    """
    if not (torch.is_grad_enabled() and hidden.requires_grad):
        return score(hidden, *columns)
    leaf = hidden.detach().requires_grad_()
    first, *others = score(leaf, *columns)
    with torch.autocast(hidden.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(first.sum(), leaf)  # (n, H)
    return [KnownGradient.apply(hidden, first.detach(), gradient), *others]


class KnownGradient(torch.autograd.Function):
    """Scores (n,) of hidden states (n, H) with a precomputed gradient (n, H)."""

    @staticmethod
    def forward(ctx, hidden, scores, gradient):
        ctx.save_for_backward(gradient)
        return scores.clone()

    @staticmethod
    def backward(ctx, grads):
        (gradient,) = ctx.saved_tensors
        return (grads[:, None] * gradient).to(gradient.dtype), None, None
