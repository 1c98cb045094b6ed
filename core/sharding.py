"""A model that accelerate has prepared for several processes, and that same model as it was."""

from __future__ import annotations

import contextlib
import copy
import importlib
from typing import Any

import torch


def undo_preparation(model) -> None:
    """Take away what accelerate has set on `model`."""
    # accelerate's autocast would stay in effect, and its mark would keep it from coming again.
    for name in {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys():
        delattr(model, name)


def copy_without_weights(model):
    """A copy of `model` whose weights are on the meta device, but for quantized ones: these are no
    floats, are shared with the copy, and are not sharded."""
    # `deepcopy` takes from this what it finds under the id of an object.
    replacements: dict[int, Any] = {}
    for weight in model.parameters():
        replacement = weight
        if weight.is_floating_point():
            empty = torch.empty_like(weight, device="meta")
            replacement = torch.nn.Parameter(empty, weight.requires_grad)
        replacements[id(weight)] = replacement
    return copy.deepcopy(model, replacements)


def gather_sharded_weights(model, shell) -> None:
    """Undo in place what FSDP2 or ZeRO-3 made of `model` since `shell`, its copy without weights:
    every process has all weights, no module is wrapped, and what saves, merges or samples need not
    know that they were sharded."""
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
    # FSDP2 has given the model a class and hooks of its own.
    model.__class__ = type(shell)
    model.__dict__ = vars(shell)


def gathered(shard):
    """A context in which a parameter that ZeRO-3 has split is whole; it leaves others alone."""
    if not hasattr(shard, "ds_id"):
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(shard)
