"""Checkpoints of the RL recipes.

OUT/checkpoints/step-N holds what trains, the optimizer's state and the KL controller, as
safetensors and JSON. Sampling and shuffling are functions of seed and step, so nothing else is
needed to resume exactly.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from core.checkpoints import seal_checkpoint
from core.files import atomic_folder, write_json
from core.runtime import is_main_process


def save_checkpoint(run) -> None:
    """Save the state of a `Run`; keep the newest `save_total_limit` checkpoints."""
    from safetensors.torch import save_file

    if not is_main_process():
        return
    folder = Path(run.config.output_dir, "checkpoints")
    # With LoRA this is the adapter alone; the base is the folder that the run started from.
    tensors = {f"policy.{n}": parameter for n, parameter in enumerate(run.parameters)}
    if run.value_head is not None:
        tensors |= {f"head.{name}": value for name, value in run.value_head.state_dict().items()}
    optimizer_values = {}
    for name, value in flat_optimizer_state(run.optimizer).items():
        if torch.is_tensor(value):
            tensors[name] = value
        else:
            optimizer_values[name] = value
    # Written beside its place and renamed: a crash leaves the older checkpoints as they are.
    with atomic_folder(folder / f"step-{run.step:06d}") as aside:
        on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(on_cpu, aside / "state.safetensors")
        state = {
            "step": run.step,
            "kl_coef": run.kl_coef,
            "before": run.before,
            "scaler": run.scaler.state_dict(),
            "optimizer": optimizer_values,
        }
        write_json(aside / "state.json", state)
        seal_checkpoint(aside, run.config)
    for old in sorted(folder.glob("step-*"))[: -run.config.save_total_limit]:
        shutil.rmtree(old)


def flat_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"optimizer.<parameter>.<name>": tensor or number}.

    8-bit optimizers nest dictionaries in their states and share tensors between parameters, which
    safetensors refuses: nested entries are lifted one level, as copies.
    """
    entries = {}
    for n, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if not isinstance(value, dict):
                entries[f"optimizer.{n}.{name}"] = value
                continue
            for inner_name, inner_value in value.items():
                entries[f"optimizer.{n}.{inner_name}"] = inner_value.clone()
    return entries


def load_checkpoint(run, folder: Path) -> None:
    """Continue in place from a checkpoint of `save_checkpoint`."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "state.safetensors")
    values = json.loads((folder / "state.json").read_text())
    with torch.no_grad():
        for n, parameter in enumerate(run.parameters):
            parameter.copy_(tensors[f"policy.{n}"])
    if run.value_head is not None:
        head = {name: tensors[f"head.{name}"] for name in run.value_head.state_dict()}
        run.value_head.load_state_dict(head)
    states: dict[int, dict[str, Any]] = {}
    for key, value in (tensors | values["optimizer"]).items():
        if key.startswith("optimizer."):
            _, n, name = key.split(".", 2)
            states.setdefault(int(n), {})[name] = value
    # Learning rates and weight decay are those of the present options, not of the checkpoint.
    param_groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": states, "param_groups": param_groups})
    run.scaler.load_state_dict(values["scaler"])
    run.step, run.kl_coef, run.before = values["step"], values["kl_coef"], values["before"]
    # The schedule is a function of the number of steps alone.
    for _ in range(run.step):
        run.schedule.step()
