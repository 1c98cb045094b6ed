"""Undo accelerate's preparation of a model for several processes."""

from __future__ import annotations

import contextlib
import copy
import importlib
from typing import Any

import torch


def undo_preparation(model) -> None:
    """Remove the attributes that accelerate has set on `model`."""
    # Otherwise accelerate's autocast would stay active, and its mark would prevent it from being
    # set again.
    for name in {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys():
        delattr(model, name)


def copy_without_weights(model):
    """A copy of `model` with its weights on the meta device, except quantized ones, which are not
    floats and not sharded: the copy shares them."""
    # The memo of `deepcopy`: {id of an object: its replacement}.
    replacements: dict[int, Any] = {}
    for weight in model.parameters():
        replacement = weight
        if weight.is_floating_point():
            empty = torch.empty_like(weight, device="meta")
            replacement = torch.nn.Parameter(empty, weight.requires_grad)
        replacements[id(weight)] = replacement
    return copy.deepcopy(model, replacements)


def gather_sharded_weights(model, shell) -> None:
    """Undo in place what FSDP2 or ZeRO-3 did to `model`; `shell` is its copy without weights from
    before. Afterwards every process has all weights and no module is wrapped, so that saving,
    merging and sampling need not know about sharding."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # or the next model would be sharded while it is loaded
    for shard, target in zip(model.parameters(), shell.parameters(), strict=True):
        with gathered(shard):
            whole = shard.full_tensor() if hasattr(shard, "full_tensor") else shard.data.clone()
        if target.is_meta:
            weight = torch.nn.Parameter(whole.detach(), target.requires_grad)
            torch.utils.swap_tensors(target, weight)
        else:
            target.data = whole
    # FSDP2 has changed the model's class and added hooks.
    model.__class__ = type(shell)
    model.__dict__ = vars(shell)


def gathered(shard):
    """A context in which a parameter split by ZeRO-3 is whole; no effect on other parameters."""
    if not hasattr(shard, "ds_id"):
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(shard)
