"""The state of DeepSpeed's ZeRO-3 as plain tensors: its own checkpoints are pickles.

The weights that train are in flat groups, of which each process has a part in float32; the
optimizer's state belongs to these parts.
"""

from __future__ import annotations

from typing import Any

import torch


def zero3_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's optimizer inside accelerate's; None for any other."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "fp32_partitioned_groups_flat") else None


def flat_weights(zero: Any) -> dict[str, torch.Tensor]:
    """{number of a group: this process's part of it}."""
    return {f"{n}": part for n, part in enumerate(zero.fp32_partitioned_groups_flat)}


def optimizer_states(zero: Any) -> dict[int, dict[str, Any]]:
    """{number of a group: {name: tensor or number}}."""
    return zero.state_dict()["optimizer_state_dict"]["state"]


def load_zero3(
    zero: Any, weights: dict[str, torch.Tensor], states: dict[int, dict[str, Any]] | None = None
) -> None:
    """Set the weights and, if given, the state of the optimizer."""
    # What is no tensor, such as the loss scaler, is that of the present run.
    state = zero.state_dict()
    state["fp32_flat_groups"] = [weights[f"{n}"] for n in range(len(weights))]
    if states is not None:
        state["optimizer_state_dict"]["state"] = states
    by_process = [state] * torch.distributed.get_world_size()
    zero.load_state_dict(by_process, load_optimizer_states=states is not None)
    # Small weights are whole in every process; these copies are made anew from the parts.
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
