"""Checkpoints of a training: what a run needs to go on exactly, as safetensors and JSON.

OUT/checkpoints/checkpoint-N has

    weights.safetensors     all that trains; with LoRA this is the adapter alone
    optimizer.safetensors   the optimizer's state
    random-R.safetensors    the random numbers of process R
    state.json              what else the caller keeps
    options.json, circumstances.json, manifest.json    see core/checkpoints.py

Where weights are sharded, each process R above 0 writes its part to weights-R and optimizer-R.
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
    and that of the best step. All processes call it. At the end of a training the optimizer's state
    is left out.
    """
    with new_checkpoint(config, step) as folder:
        # Whole weights are the same in every process: one of them writes.
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
        # The end of a training comes on top: it is there only until the stage is recorded.
        limit = config.save_total_limit + is_end
        remove_old_checkpoints(config, limit, step, best_step)


def remove_old_checkpoints(config: TrainingConfig, limit: int, step: int, best_step: int) -> None:
    """Delete all but the newest `limit` checkpoints up to `step`, that of the best step, and the
    one that the options name.

    Those of later steps are damaged ones that were skipped, or of the time before a run went on
    from the middle: they stay until their step is saved anew, and do not count as newest.
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
    """Yield a folder into which all processes write. After the block it is sealed and renamed to
    checkpoint-STEP: a crash leaves the older checkpoints as they are."""
    checkpoints = Path(config.output_dir, "checkpoints")
    name = f"checkpoint-{step}"
    aside = checkpoints / ".saving"
    if is_main_process():
        # What an earlier crash has left.
        shutil.rmtree(aside, ignore_errors=True)
        (aside / name).mkdir(parents=True)
    wait_for_everyone()  # the folder is there
    yield aside / name
    wait_for_everyone()  # all files are written
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
    """The file of this process: its own part where weights are sharded, else that of all."""
    suffix = f"-{rank()}" if is_sharded() and rank() else ""
    return folder / f"{name}{suffix}.safetensors"


def random_file(folder: Path) -> Path:
    return folder / f"random-{rank()}.safetensors"


def write_tensors(path: Path, entries: Mapping[str, Any]) -> None:
    """Write tensors, and numbers beside them, to a safetensors file."""
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
    """What `write_tensors` wrote."""
    from safetensors import safe_open

    entries = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no dictionary)
            entries[name] = file.get_tensor(name)
        numbers = json.loads(file.metadata()["numbers"])
    return entries | numbers


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP2 has sharded; others are whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def by_number(parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{n}": parameter for n, parameter in enumerate(parameters)}


def flat_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"<parameter>.<name>": tensor or number}.

    8-bit optimizers nest dictionaries in their states: nested entries are lifted one level.
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
    """The states of torch's generators, on the CPU and on this process's GPU."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


# -- loading ---------------------------------------------------------------------------------------


def load_checkpoint(
    folder: Path, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, steps: int
) -> dict[str, Any]:
    """Set weights, optimizer and random numbers in place; returns what state.json has.

    Raises ConfigError if `steps` go on beyond the end of the training that it was written at.
    """
    load_weights(folder, parameters, optimizer)
    if shard_file(folder, "optimizer").exists():
        load_optimizer(folder, optimizer)
    elif step_of(folder) < steps:
        raise ConfigError(
            f"{folder} is the end of a training, without its optimizer; give an earlier checkpoint"
        )
    # Last of all: loading may have drawn random numbers.
    states = read_tensors(random_file(folder))
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return read_json(folder / "state.json")


@torch.no_grad()
def load_weights(
    folder: Path, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Set all that trains, in place."""
    weights = read_tensors(shard_file(folder, "weights"))
    zero3 = zero3_optimizer(optimizer)
    if zero3:
        load_zero3(zero3, weights)
        return
    for n, parameter in enumerate(parameters):
        local_part(parameter).copy_(weights[f"{n}"])


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Set the state of the optimizer, which comes from the same parameters in the same order."""
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
    # Learning rates and weight decay are those of the present options, not of the checkpoint.
    param_groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": param_groups})


def as_shard_of(parameter: Any, value: Any) -> Any:
    """A local part as the sharded tensor that it is a part of, if `parameter` is sharded so."""
    # Numbers, such as the count of steps, are whole everywhere.
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
