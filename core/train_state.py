"""Training checkpoints: what a run needs to continue exactly, as safetensors and JSON.

OUT/checkpoints/checkpoint-N has

    weights.safetensors     trained weights; with LoRA only the adapter
    optimizer.safetensors   optimizer state
    random-R.safetensors    random state of process R
    state.json              further state of the caller
    options.json, circumstances.json, manifest.json    see core/checkpoints.py

If weights are sharded, each process R above 0 writes its part to weights-R and optimizer-R.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from core.checkpoints import (
    newest_first,
    read_json,
    remove_checkpoint,
    seal_checkpoint,
    step_of,
)
from core.config import TrainingConfig
from core.errors import ConfigError
from core.files import CHECKPOINT_FORMAT, write_json
from core.ownership import set_aside
from core.runtime import is_main_process, is_sharded, wait_for_everyone
from core.zero3 import flat_weights, load_zero3, optimizer_states, zero3_optimizer

# -- saving ----------------------------------------------------------------------------------------


def save_checkpoint(
    config: TrainingConfig,
    step: int,
    parameters: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    best_step: int = 0,
    is_end: bool = False,
) -> None:
    """Write checkpoint-STEP; keep the newest `save_total_limit` checkpoints, or all if it is None,
    and that of the best step. All processes must call this. With `is_end`, at the end of training,
    the optimizer state is left out.
    """
    with new_checkpoint(config, step) as folder:
        # Unsharded weights are the same in all processes, so one of them writes.
        if is_main_process() or is_sharded():
            zero3 = zero3_optimizer(optimizer)
            weights = flat_weights(zero3) if zero3 else by_number(parameters)
            write_tensors(shard_file(folder, "weights"), weights)
            if not is_end:
                write_tensors(shard_file(folder, "optimizer"), flat_optimizer_state(optimizer))
        write_tensors(random_file(folder), random_states())
        if is_main_process():
            write_json(folder / "state.json", {"format": CHECKPOINT_FORMAT, **state})
    if is_main_process() and config.save_total_limit is not None:
        # The last checkpoint does not count: it is kept only until the stage is recorded.
        limit = config.save_total_limit + is_end
        remove_old_checkpoints(config, limit, step, best_step)


def remove_old_checkpoints(config: TrainingConfig, limit: int, step: int, best_step: int) -> None:
    """Delete all but the newest `limit` checkpoints up to `step`, the one of the best step, and the
    one named in the options.

    Checkpoints of later steps are damaged and were skipped, or are from before the run was resumed
    at an earlier step. They stay until their step is saved again, and do not count as newest.
    """
    folders = newest_first(Path(config.output_dir, "checkpoints"))
    named = config.resume_from_checkpoint
    up_to_now = [folder for folder in folders if step_of(folder) <= step]
    for old in up_to_now[limit:]:
        is_named = isinstance(named, str) and Path(named).resolve() == old.resolve()
        if step_of(old) != best_step and not is_named:
            remove_checkpoint(old)


@contextlib.contextmanager
def new_checkpoint(config: TrainingConfig, step: int) -> Iterator[Path]:
    """Yield a folder for all processes to write to. After the block it is sealed and renamed to
    checkpoint-STEP, so that a crash leaves older checkpoints intact."""
    checkpoints = Path(config.output_dir, "checkpoints")
    name = f"checkpoint-{step}"
    aside = checkpoints / ".saving"
    if is_main_process():
        # Left by an earlier crash.
        shutil.rmtree(aside, ignore_errors=True)
        (aside / name).mkdir(parents=True)
    wait_for_everyone()  # until the folder exists
    yield aside / name
    wait_for_everyone()  # until all files are written
    if is_main_process():
        seal_checkpoint(aside / name, config)
        if os.path.lexists(checkpoints / name):
            set_aside(checkpoints / name, f"an earlier {name}", "this step is saved anew")
        (aside / name).rename(checkpoints / name)
        aside.rmdir()
    wait_for_everyone()


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def shard_file(folder: Path, name: str) -> Path:
    """The file of this process: its own part if weights are sharded, else the common file."""
    suffix = f"-{rank()}" if is_sharded() and rank() else ""
    return folder / f"{name}{suffix}.safetensors"


def random_file(folder: Path) -> Path:
    return folder / f"random-{rank()}.safetensors"


def write_tensors(path: Path, entries: Mapping[str, Any]) -> None:
    """Write tensors and numbers to a safetensors file."""
    from safetensors.torch import save_file

    tensors, numbers = {}, {}
    for name, value in entries.items():
        if torch.is_tensor(value):
            # A copy, because two entries may share memory, which safetensors refuses.
            tensors[name] = local_part(value).detach().cpu().clone().contiguous()
        else:
            numbers[name] = value
    save_file(tensors, path, metadata={"numbers": json.dumps(numbers)})


def read_tensors(path: Path) -> dict[str, Any]:
    """Read what `write_tensors` wrote."""
    from safetensors import safe_open

    entries = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            entries[name] = file.get_tensor(name)
        numbers = json.loads(file.metadata()["numbers"])
    return entries | numbers


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor sharded by FSDP2; other tensors unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def by_number(parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{n}": parameter for n, parameter in enumerate(parameters)}


def flat_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"<parameter>.<name>": tensor or number}.

    8-bit optimizers have nested dictionaries in their states; these are flattened by one level.
    """
    zero3 = zero3_optimizer(optimizer)
    states = optimizer_states(zero3) if zero3 else optimizer.state_dict()["state"]
    entries = {}
    for n, state in states.items():
        for name, value in state.items():
            if not isinstance(value, dict):
                entries[f"{n}.{name}"] = value
                continue
            for inner_name, inner_value in value.items():
                entries[f"{n}.{inner_name}"] = inner_value
    return entries


def random_states() -> dict[str, torch.Tensor]:
    """The states of torch's random generators on the CPU and on this process's GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# -- loading ---------------------------------------------------------------------------------------


def load_checkpoint(
    folder: Path, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> dict[str, Any]:
    """Restore weights, optimizer and random state in place; returns the content of state.json.

    Raises ConfigError if the checkpoint is from the end of a training and `steps` is larger.
    """
    load_weights(folder, parameters, optimizer)
    if shard_file(folder, "optimizer").exists():
        load_optimizer(folder, optimizer)
    elif step_of(folder) < steps:
        raise ConfigError(
            f"{folder} is the end of a training run, without its optimizer; give an earlier "
            "checkpoint"
        )
    # Last, because loading may have drawn random numbers.
    states = read_tensors(random_file(folder))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return read_json(folder / "state.json")


@torch.no_grad()
def load_weights(
    folder: Path, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Restore all trained weights in place."""
    weights = read_tensors(shard_file(folder, "weights"))
    zero3 = zero3_optimizer(optimizer)
    if zero3:
        load_zero3(zero3, weights)
        return
    for n, parameter in enumerate(parameters):
        local_part(parameter).copy_(weights[f"{n}"])


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer state, which was saved for the same parameters in the same order."""
    states: dict[int, dict[str, Any]] = {}
    for key, value in read_tensors(shard_file(folder, "optimizer")).items():
        number, name = key.split(".", 1)
        states.setdefault(int(number), {})[name] = value
    zero3 = zero3_optimizer(optimizer)
    if zero3:
        load_zero3(zero3, flat_weights(zero3), states)
        return
    parameters: list[Any] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    for n, state in states.items():
        for name, value in state.items():
            state[name] = as_shard_of(parameters[n], value)
    # Learning rates and weight decay come from the current options, not from the checkpoint.
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": param_groups})


def as_shard_of(parameter: Any, value: Any) -> Any:
    """Wrap a local part as a sharded tensor like `parameter`, if that is sharded."""
    # Numbers, such as the step count, are not sharded.
    is_number = not torch.is_tensor(value) or not value.dim()
    if is_number or not hasattr(parameter, "to_local"):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        value.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
