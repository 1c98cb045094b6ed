"""The training loop: transformers' Trainer behind one function."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from core.checkpoints import find_checkpoint
from core.config import FitConfig
from core.runtime import compute_dtype, default_device, deferred_signals, is_main_process, logger


def fit(
    config: FitConfig,
    model,
    tokenizer,
    train_rows: Sequence[dict],
    eval_rows: Sequence[dict],
    collate: Callable[[list], dict],
    loss: Callable[[Any, dict], tuple[torch.Tensor, dict]],
) -> dict[str, float]:
    """Train `model` in place; returns the metrics after training, and as x_before those from before
    it.

    A row has "input_ids". `collate(rows)` returns a batch of tensors, among them "num_tokens", for
    the speed, and "num_items": the number of items (tokens, pairs, ...) over which
    `loss(model, batch) -> (loss, metrics)` takes its means. So the loss of a step is the mean over
    all its items, however they fall into micro-batches and processes.

    Raises FloatingPointError for a loss or a gradient that is not finite, before it reaches the
    weights.
    """
    from peft.helpers import disable_input_dtype_casting

    from core.trainer import FitTrainer

    checkpoint = find_checkpoint(config)
    name_tracker_folders(config)
    args = build_training_arguments(config, bool(eval_rows), bool(checkpoint))
    log_start(config, model, len(train_rows))
    trainer = FitTrainer(config, model, tokenizer, args, train_rows, eval_rows, collate, loss)

    # FSDP2 and ZeRO-3 change the model itself, where DDP wraps it: what it was is kept as a shell.
    shell = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        shell = copy_without_weights(model)
    # Autocast casts the inputs of an adapter already, with fewer copies than PEFT would make.
    with deferred_signals() as signals, disable_input_dtype_casting(model):
        trainer.signals = signals
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics_after = trainer.evaluate() if eval_rows else {}

    undo_preparation(model)
    if shell is not None:
        gather_sharded_weights(model, shell)
    if is_main_process():
        with contextlib.suppress(OSError):
            Path(args.output_dir).rmdir()  # it stays if there are checkpoints in it
        if "wandb" in config.report_to:
            # Or the steps of the next stage would go into the run of this one.
            importlib.import_module("wandb").finish()
    return collect_metrics(trainer.state, metrics_after)


def name_tracker_folders(config: FitConfig) -> None:
    """Tell TensorBoard and Weights & Biases where to write; both read it from the environment."""
    folder = Path(config.output_dir)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "runs")
    os.environ["WANDB_DIR"] = str(folder)
    if config.wandb_project:
        os.environ["WANDB_PROJECT"] = config.wandb_project


def every_few_steps(wanted: int | bool) -> str:
    return "steps" if wanted else "no"


def build_training_arguments(config: FitConfig, evaluates: bool, resumes: bool):
    """The TrainingArguments of a config: options of the same name, and those that differ."""
    from transformers import TrainingArguments

    device = default_device()
    dtype = compute_dtype(config.torch_dtype)
    names = {field.name for field in fields(TrainingArguments)}
    names &= {field.name for field in fields(FitConfig)}
    names -= {"resume_from_checkpoint", "log_level"}
    options = {name: getattr(config, name) for name in names}
    options |= {
        "output_dir": str(Path(config.output_dir, "checkpoints")),
        "run_name": config.wandb_run_name or config.output_dir,
        "report_to": config.report_to or "none",
        "max_steps": config.max_steps or -1,
        "warmup_steps": config.warmup_ratio,  # below 1 it is a fraction of the steps
        # evaluation
        "eval_strategy": every_few_steps(evaluates and config.eval_steps),
        "eval_steps": config.eval_steps or None,
        "eval_on_start": evaluates and not resumes,
        # checkpoints
        "save_strategy": every_few_steps(config.save_steps),
        "save_steps": config.save_steps or 500,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
        # recomputation of activations, which newer versions call activation checkpointing
        "gradient_checkpointing": None,
        "activation_checkpointing": bool(config.gradient_checkpointing),
        "activation_checkpointing_kwargs": {
            "use_reentrant": False,
            "every_n_layers": config.gradient_checkpointing,
        },
        # device and precision
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "dataloader_pin_memory": device.type == "cuda",
        "ddp_find_unused_parameters": False,  # every trainable weight is part of every loss
        # what the Trainer would do by itself
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    args = TrainingArguments(**options)
    # Several GPUs are for `accelerate launch`, never for DataParallel.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def log_start(config: FitConfig, model, rows: int) -> None:
    """Log how much trains, on how many rows, where; RuntimeError if nothing would train."""
    trainable = model.num_parameters(only_trainable=True)
    total = model.num_parameters()
    if not trainable:
        raise RuntimeError("no parameter of the model trains: everything is frozen")
    logger.info(
        "training %s of %s parameters on %s rows, on %s in %s",
        f"{trainable:,}",
        f"{total:,}",
        f"{rows:,}",
        default_device().type,
        str(compute_dtype(config.torch_dtype)).removeprefix("torch."),
    )


def collect_metrics(state, metrics_after: dict[str, float]) -> dict[str, float]:
    """The metrics of a finished training. The log history in the Trainer's `state` has also what
    was logged before an interruption."""
    history = state.log_history
    not_metrics = ("_runtime", "_per_second", "epoch")
    metrics = {}
    for name, value in metrics_after.items():
        if not name.endswith(not_metrics):
            metrics[name] = value
    losses = [logs["loss"] for logs in history if "loss" in logs]
    metrics["train_loss"] = statistics.fmean(losses)
    metrics["steps"] = state.global_step
    speeds = [logs["tokens_per_s"] for logs in history if "tokens_per_s" in logs]
    if speeds:
        metrics["tokens_per_s"] = statistics.median(speeds)

    # The first evaluation was made before the first step.
    evaluations = [logs for logs in history if "eval_loss" in logs]
    before = evaluations[0] if evaluations else {}
    metrics_before = {f"{name}_before": before[name] for name in metrics if name in before}
    return metrics | metrics_before


# -- the model that the Trainer prepared ----------------------------------------------------------


def undo_preparation(model) -> None:
    """Take away what Trainer and accelerate have set on `model`."""
    model.config.use_cache = True  # the Trainer's False would be saved with the model
    # accelerate's autocast would stay in effect, and its mark would keep it from coming again.
    for name in {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys():
        delattr(model, name)


def copy_without_weights(model):
    """A copy of `model` whose weights are on the meta device, but for quantized ones: these are no
    floats, are shared with the copy, and are not sharded."""
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
    model.__class__ = type(shell)
    model.__dict__ = vars(shell)


def gathered(shard):
    """A context in which a parameter that ZeRO-3 has split is whole; it leaves others alone."""
    if not hasattr(shard, "ds_id"):
        return contextlib.nullcontext()
    return importlib.import_module("deepspeed").zero.GatheredParameters(shard)
