"""Token log-probabilities, and batches of answers that share a prompt."""

from __future__ import annotations

import contextlib
from typing import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from core.chat import IGNORE
from core.runtime import logger


def unwrap_model(model):
    """The model that DDP or DeepSpeed hides. (accelerate's extract_model_from_parallel searches every module too.)"""
    return dict(model.named_children()).get("module", model)


@contextlib.contextmanager
def without_adapter(model):
    """As peft's disable_adapter(), which takes stock of all layers besides."""
    (tuner := unwrap_model(model).base_model).disable_adapter_layers()
    try:
        yield
    finally:
        tuner.enable_adapter_layers()


def logits_at(model, mask: torch.Tensor, **inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (N, V) and last hidden states (N, H) of the N positions where `mask` (B, T) is true, by a forward pass
    of `model` (DDP and FSDP included) whose vocabulary projection sees no other position."""
    head, hidden = unwrap_model(model).get_output_embeddings(), []

    def select(_, args) -> tuple:
        hidden.append(args[0][mask])
        return tuple(hidden)

    hook = head.register_forward_pre_hook(select)
    try:
        return model(**inputs, use_cache=False).logits, hidden[0]
    finally:
        hook.remove()


def collate_answers(rows: Sequence[dict], share_prompt: bool = True) -> dict[str, torch.Tensor]:
    """A batch of B rows, each a "prompt" with G "answers" (token ids, with their "labels"), (B, T): the prompt, then
    the answers side by side, all continuing the prompt's positions; or (G B, T) if `share_prompt` is false: the prompt
    before each of them.

    "branch" is 0 in a prompt, 1 ... G in the answers, -1 in padding. "targets" has at each position the token to
    predict there, "sequence" which of the G B answers it belongs to. A branch begins with the prompt's last token,
    since that predicts the answer's first."""
    sequences, number = [], 0
    for row in rows:
        *prompt, last = row["prompt"]
        start = len(prompt)
        trunk = torch.tensor(
            [prompt, range(start), [0] * start, [0] * start, [IGNORE] * start], dtype=torch.long
        )
        branches = [
            torch.tensor(
                [
                    [last, *ids[:-1]],
                    range(start, start + len(ids)),
                    [branch] * len(ids),
                    [number + branch - 1] * len(ids),
                    labels,
                ]
            )
            for branch, (ids, labels) in enumerate(zip(row["answers"], row["labels"]), 1)
        ]
        number += len(branches)
        groups = [[trunk, *branches]] if share_prompt else [[trunk, branch] for branch in branches]
        sequences += [torch.cat(group, 1) for group in groups]
    names, padding = (
        ("input_ids", "position_ids", "branch", "sequence", "targets"),
        (0, 0, -1, 0, IGNORE),
    )
    columns = zip(*sequences)
    batch = {
        name: pad_sequence(list(tensors), True, pad)
        for name, tensors, pad in zip(names, columns, padding)
    }
    batch |= {"num_tokens": (batch["branch"] >= 0).sum(), "num_items": torch.tensor(len(rows))}
    return batch if share_prompt else batch | {"attention_mask": (batch["branch"] >= 0).long()}


def additive_attention_mask(model, seen: torch.Tensor) -> torch.Tensor:
    """What is added to attention's scores: 0 where `seen` says that a position may look, else -inf. Of a dtype that
    attention need not convert once more in every layer."""
    kind, dtype = seen.device.type, next(model.parameters()).dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def answer_logits(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_at` the N positions of a batch of `collate_answers` that have a target."""
    inputs = {
        name: batch[name]
        for name in ("input_ids", "position_ids", "attention_mask")
        if name in batch
    }
    if (
        "attention_mask" not in inputs
    ):  # a position sees what lies before it in its prompt and in its own branch
        query, key = batch["branch"][:, :, None], batch["branch"][:, None, :]
        inputs["attention_mask"] = additive_attention_mask(
            model, ((query == key) | (key == 0)).tril()[:, None]
        )  # (B, 1, T, T)
    return logits_at(model, batch["targets"] != IGNORE, **inputs)


@torch.no_grad()
def sharing_is_exact(model, row: dict) -> bool:
    """Whether one pass over the prompt of `row` gives the answers the logits that a pass for each of them gives."""
    if model.config._attn_implementation in (
        "sdpa",
        "eager",
    ):  # others do not take a mask of our own
        batches = [collate_answers([row], share) for share in (True, False)]
        batches = [
            {name: value.to(model.device) for name, value in batch.items()} for batch in batches
        ]
        together, apart = (answer_logits(model, batch)[0].float() for batch in batches)
        if (together - apart).std(-1).mean() < (
            1e-4 if model.dtype == torch.float32 else 0.1
        ) * apart.std(-1).mean():
            return True
    logger.info(
        "prompts are encoded once an answer: once for all its answers is not exact with this model's attention"
    )
    return False


class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] of logits (N, V) and targets (N,): (N,) in float32. It works in chunks, and the
    gradient takes the place of the logits, which are spent by then: a second (N, V) tensor is never made."""

    at_once = staticmethod(
        lambda logits: 32 if logits.device.type == "cpu" else 1024
    )  # rows; fewer fit a CPU's cache

    @staticmethod
    def forward(ctx, logits, targets):
        norms = torch.cat(
            [chunk.float().logsumexp(-1) for chunk in logits.split(TokenLogps.at_once(logits))]
        )
        ctx.save_for_backward(logits, targets, norms)
        return logits.gather(-1, targets[:, None])[:, 0].float() - norms

    @staticmethod
    def backward(ctx, grads):
        logits, *rest = ctx.saved_tensors
        parts = (tensor.split(TokenLogps.at_once(logits)) for tensor in (logits, *rest, grads))
        for chunk, target, norm, grad in zip(*parts):
            chunk.copy_((chunk.float() - norm[:, None]).exp_().mul_(-grad[:, None]))
            chunk.scatter_add_(-1, target[:, None], grad[:, None].to(chunk.dtype))
        return logits, None
