"""accelerate's Accelerator for a run: processes, precision, experiment trackers."""

from __future__ import annotations

import os
from typing import Any

from core.attention import train_short_sequences_in_float32
from core.config import TrainingConfig
from core.runtime import default_device


def start_accelerator(config: TrainingConfig, mixed_precision: str, shards: bool) -> Any:
    """A new Accelerator, independent of the previous stage's.

    With `shards` it shards the model over the processes if the launch file says so; without, every
    process holds the whole model with any launch file.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # The state is global, with precision and distributed type of the previous stage.
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = default_device().type == "cpu"
    if on_cpu:
        train_short_sequences_in_float32()
    PartialState(cpu=on_cpu)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        # cpu=True would prevent accelerate from sharding on a CPU.
        cpu=on_cpu and not shards,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    if config.report_to:
        # TensorBoard writes to OUT/runs.
        os.environ["WANDB_DIR"] = config.output_dir
        run_name = config.wandb_run_name or config.output_dir
        wandb = {"wandb": {"name": run_name}}
        accelerator.init_trackers(config.wandb_project or "runs", init_kwargs=wandb)
    return accelerator


def finish_trackers(accelerator: Any) -> None:
    """Finish the trackers, so that the next stage does not log into this stage's run."""
    # accelerator.end_training() would also destroy the process group.
    for tracker in accelerator.trackers:
        tracker.finish()
