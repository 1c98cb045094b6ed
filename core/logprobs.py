"""Token log-probabilities, and batches of answers that share a prompt.

Shapes: B sequences of T positions, N of which have targets; V vocabulary size, H hidden size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from core.chat import IGNORE
from core.errors import ConfigError
from core.output_layer import hidden_states_at, logits_at, scores_at, unwrap_model
from core.runtime import logger, to_device

# The tensors in a batch of answers, and their padding values.
PADDING = {"input_ids": 0, "position_ids": 0, "branch": -1, "sequence": 0, "targets": IGNORE}


# -- models ----------------------------------------------------------------------------------------


def disable_dropout(model) -> None:
    """Turn off the model's own dropout; lora_dropout of an adapter is the user's choice."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


@contextlib.contextmanager
def without_adapter(model) -> Iterator[None]:
    """Disable the LoRA adapter; cheaper than peft's disable_adapter(), which first inspects all
    layers."""
    tuner = unwrap_model(model).base_model
    tuner.disable_adapter_layers()
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


def additive_attention_mask(model, visible: torch.Tensor) -> torch.Tensor:
    """The mask to add to attention scores: 0 where `visible` (bool), -inf elsewhere.

    It has the compute dtype of attention, which would otherwise convert it again in every layer."""
    device_type = visible.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = next(model.parameters()).dtype
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, -torch.inf)


# Models whose attention ignores position_ids, and models without attention.
ALIBI_TYPES = {"bloom", "mpt"}
RECURRENT_TYPES = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}

# -- answers that share a prompt -------------------------------------------------------------------


def collate_answers(rows: Sequence[dict], share_prompt: bool = True) -> dict[str, torch.Tensor]:
    """A batch of rows, each a "prompt" with G "answers" (token ids) and their "labels".

    With `share_prompt` there is one sequence per row: the prompt, then its answers side by side,
    each continuing the positions of the prompt. Without it there is one sequence per answer, each
    beginning with the prompt.

    All tensors are (B, T). "branch" is 0 in a prompt, 1 ... G in the answers, -1 in padding;
    "targets" has the token to predict at each position; "sequence" counts the answers of the whole
    batch. A branch begins with the last token of the prompt, because that token predicts the
    answer's first one."""
    sequences = []
    num_answers = 0
    for row in rows:
        *prompt, last = row["prompt"]
        start = len(prompt)
        trunk = make_columns(prompt, 0, branch=0, sequence=0, targets=[IGNORE] * start)
        branches = []
        for branch, (ids, labels) in enumerate(zip(row["answers"], row["labels"], strict=True), 1):
            inputs = [last, *ids[:-1]]
            branches.append(make_columns(inputs, start, branch, num_answers, labels))
            num_answers += 1
        if share_prompt:
            sequences.append(torch.cat([trunk, *branches], 1))
        else:
            sequences += [torch.cat([trunk, branch], 1) for branch in branches]

    batch = {}
    columns = zip(*sequences, strict=True)
    for (name, padding), tensors in zip(PADDING.items(), columns, strict=True):
        batch[name] = pad_sequence(list(tensors), batch_first=True, padding_value=padding)
    is_token = batch["branch"] >= 0
    batch["num_tokens"] = is_token.sum()
    batch["num_items"] = torch.tensor(len(rows))
    if not share_prompt:
        batch["attention_mask"] = is_token.long()
    return batch


def make_columns(
    ids: Sequence[int], start: int, branch: int, sequence: int, targets: Sequence[int]
) -> torch.Tensor:
    """The tensors named in PADDING, (5, T), for a piece of a sequence that begins at position
    `start`."""
    size = len(ids)
    positions = range(start, start + size)
    branches = [branch] * size
    sequences = [sequence] * size
    return torch.tensor([ids, positions, branches, sequences, targets], dtype=torch.long)


def answer_inputs(model, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of `model` for a batch of `collate_answers`, and "mask" (B, T): which positions
    have a target."""
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if "attention_mask" in batch:
        inputs["attention_mask"] = batch["attention_mask"]
    else:
        # A position sees the earlier positions of the prompt and of its own branch.
        query = batch["branch"][:, :, None]  # (B, T, 1)
        key = batch["branch"][:, None, :]  # (B, 1, T)
        same_text = (query == key) | (key == 0)
        visible = same_text.tril()[:, None]  # (B, 1, T, T)
        inputs["attention_mask"] = additive_attention_mask(model, visible)
    inputs["mask"] = batch["targets"] != IGNORE
    return inputs


def answer_logits(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_at` the N positions of a batch of `collate_answers` that have a target: (N, V) and
    (N, H)."""
    return logits_at(model, **answer_inputs(model, batch))


def answer_scores(
    model, batch: dict[str, torch.Tensor], score: Callable, *columns: torch.Tensor
) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    """`scores_at` the N positions of a batch of `collate_answers` that have a target.

    The function is called as score(logits (n, V), targets (n,), *columns)."""
    inputs = answer_inputs(model, batch)
    mask = inputs.pop("mask")
    return scores_at(model, mask, score, batch["targets"][mask], *columns, **inputs)


@torch.no_grad()
def check_causal(model, name: str) -> None:
    """Raise ConfigError for a model whose tokens see later ones, such as an encoder or a diffusion
    model: it would learn to predict a token from that token itself."""
    ids = torch.arange(8, device=model.device).repeat(2, 1)  # (2, 8)
    ids[1, 4:] = ids[1, :4]  # the first four tokens of both rows are the same
    first, second = model(input_ids=ids).logits[:, :4].float()  # (4, V) each
    if not states_agree(first, second, model.dtype):
        raise ConfigError(
            f"model {name} ({model.config.model_type}) is not causal: its tokens see those after "
            "them; give a decoder-only language model"
        )


@torch.no_grad()
def sharing_is_exact(model, row: dict) -> bool:
    """Whether the answers of `row` get the same hidden states from a shared prompt as from separate
    prompts. `row` should be as long as possible: a sliding window matters only beyond its size."""

    def hidden_states(share_prompt: bool) -> torch.Tensor:
        batch = collate_answers([row], share_prompt)
        batch = to_device(batch, model.device)
        return hidden_states_at(model, **answer_inputs(model, batch)).float()

    with failing_without_harm():  # some models cannot compute a shared prompt at all
        if takes_our_mask(model):
            shared, separate = hidden_states(True), hidden_states(False)  # (N, H)
            if states_agree(shared, separate, model.dtype):
                return True
    logger.info(
        "each answer re-encodes its prompt: "
        "sharing one encoded prompt is not exact with this model's attention"
    )
    return False


@contextlib.contextmanager
def failing_without_harm() -> Iterator[None]:
    """Ignore errors of a model that cannot compute what is tried in the block. A lack of memory
    says nothing about the model, and is raised."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        logger.debug("the model cannot compute this", exc_info=True)


def takes_our_mask(model) -> bool:
    """Whether the model's attention uses the mask (B, 1, T, T) and positions passed to it: no
    recurrent state, no ALiBi, no kernel of its own."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = model.config.get_text_config()
    has_alibi = getattr(config, "alibi", False) or config.model_type in ALIBI_TYPES
    layers = DynamicCache(config=model.config).layers
    has_states = any(not isinstance(layer, DynamicLayer) for layer in layers)
    is_recurrent = config.model_type in RECURRENT_TYPES or has_states
    takes_masks = model.config._attn_implementation in ("sdpa", "eager")
    return takes_masks and not has_alibi and not is_recurrent


def states_agree(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways to compute hidden states (N, H) or logits in `dtype` agree."""
    # The largest difference, because a convolution leaks only into a document's first tokens.
    difference = (first - second).std(-1).max()
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    return bool(difference < tolerance * second.std(-1).mean())


# -- log-probabilities -----------------------------------------------------------------------------


def rows_at_once(logits: torch.Tensor) -> int:
    """How many rows of logits (N, V) to convert to probabilities at a time. On a CPU they have to
    fit into the cache."""
    most = 2**20 if logits.device.type == "cpu" else 2**26
    return max(1, most // logits.shape[-1])


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] for logits (N, V) and targets (N,): (N,) in float32.

    It works in chunks, and the gradient overwrites the logits, which are not needed afterwards. So
    a second (N, V) tensor, the largest of a training step, is never allocated."""

    @staticmethod
    def forward(ctx, logits, targets):
        rows = rows_at_once(logits)
        # Allocate before the chunks: small tensors between large ones fragment memory.
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
