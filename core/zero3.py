"""The state of DeepSpeed's ZeRO-3 as plain tensors: its own checkpoints are pickles.

Trained weights are in flat groups; each process has a part of each group in float32, and the
optimizer state for this part.
"""

from __future__ import annotations

from typing import Any

import torch


def zero3_optimizer(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO-3 optimizer inside accelerate's; None for any other optimizer."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if hasattr(inner, "fp32_partitioned_groups_flat") else None


def flat_weights(zero: Any) -> dict[str, torch.Tensor]:
    """{group number: this process's part of the group}."""
    return {f"{n}": part for n, part in enumerate(zero.fp32_partitioned_groups_flat)}


def optimizer_states(zero: Any) -> dict[int, dict[str, Any]]:
    """{group number: {name: tensor or number}}."""
    return zero.state_dict()["optimizer_state_dict"]["state"]


def load_zero3(
    zero: Any, weights: dict[str, torch.Tensor], states: dict[int, dict[str, Any]] | None = None
) -> None:
    """Restore the weights and, if given, the optimizer state."""
    # Everything else, such as the loss scaler, is kept from the current run.
    state = zero.state_dict()
    state["fp32_flat_groups"] = [weights[f"{n}"] for n in range(len(weights))]
    if states is not None:
        state["optimizer_state_dict"]["state"] = states
    by_process = [state] * torch.distributed.get_world_size()
    zero.load_state_dict(by_process, load_optimizer_states=states is not None)
    # Small weights are whole in every process; rebuild these copies from the parts.
    persistent = zero.persistent_parameters
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
