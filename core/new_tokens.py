"""New tokens of a tokenizer, and their rows in the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from core.config import ModelConfig, TrainingConfig
from core.runtime import logger


def add_new_tokens(tokenizer, config: ModelConfig) -> list[int]:
    """Add the tokens in `new_tokens` and `new_special_tokens` to the tokenizer, in place; returns
    the ids of those that it did not have."""
    if not isinstance(config, TrainingConfig):
        return []
    known = len(tokenizer)
    tokenizer.add_tokens(config.new_tokens)
    tokenizer.add_tokens(config.new_special_tokens, special_tokens=True)
    return list(range(known, len(tokenizer)))


def rows_to_start(model, tokenizer) -> list[int]:
    """The ids of new tokens, and of other tokens that have no row in the embeddings."""
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    return sorted({*tokenizer.new_ids, *range(num_embeddings, len(tokenizer))})


@torch.no_grad()
def start_new_rows(model, ids: Sequence[int]) -> None:
    """Initialize the rows of new tokens in embeddings and output layer, in place, to the mean of
    all rows before theirs. Some models have spare rows; others are resized."""
    if not ids:
        return
    needed = ids[-1] + 1
    if needed > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is None:  # a reward model has no output layer
            continue
        for rows in (layer.weight, getattr(layer, "bias", None)):
            if rows is not None:
                rows[list(ids)] = rows[: ids[0]].mean(0)
    logger.info("%d new tokens, which start at the mean of the others", len(ids))


def trainable_rows(model, ids: Sequence[int]) -> dict[str, Any]:
    """LoraConfig options that make the rows `ids` train together with an adapter."""
    if not ids:
        return {}
    embeddings, output_layer = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embeddings]
    if output_layer is not None and output_layer.weight is not embeddings.weight:
        layers.append(output_layer)  # else PEFT trains both as one
    rows = {}
    for name, module in model.named_modules():
        if any(module is layer for layer in layers):
            rows[name] = list(ids)
    return {"trainable_token_indices": rows}
