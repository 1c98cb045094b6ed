"""The training loop of sft, dpo, reward and cot_distillation: `fit`, based on accelerate.

A step takes R rows. They are split into micro-batches of per_device_train_batch_size rows; each of
W processes takes every W-th micro-batch.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.accelerator import finish_trackers, start_accelerator
from core.checkpoints import find_checkpoint
from core.config import FitConfig
from core.errors import ConfigError
from core.files import write_jsonl
from core.optimizers import decay_groups, new_optimizer, schedule_factor, set_learning_rates
from core.router_loss import recorded_router_losses, router_loss_weight
from core.run_log import log_step
from core.runtime import (
    any_process_stopped,
    compute_dtype,
    default_device,
    deferred_signals,
    is_main_process,
    is_sharded,
    logger,
    suggest_bfloat16,
    to_device,
)
from core.screen import Pace, show_count
from core.sharding import copy_without_weights, gather_sharded_weights, undo_preparation
from core.train_state import load_checkpoint, load_weights, save_checkpoint

Batch = dict[str, Tensor]

MIXED_PRECISION = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}
NOT_ON_SCREEN = "epoch|grad_norm|.*_(logps|reward|fell)"


@dataclass
class Progress:
    """What a checkpoint stores besides weights, optimizer and random state."""

    step: int = 0  # completed optimizer steps
    history: list[dict[str, float]] = field(default_factory=list)  # the lines of metrics.jsonl
    best_metric: float | None = None
    best_step: int = 0
    without_improvement: int = 0  # evaluations since the best one


class ItemMeans:
    """Means of metrics over the items of all batches and processes, without device syncs."""

    def __init__(self):
        self.sums: dict[str, Any] = {}
        self.num_items = 0

    def add(self, metrics: dict[str, Tensor], num_items: int) -> None:
        """Add metrics that are means over `num_items` items."""
        self.num_items += num_items
        for name, value in metrics.items():
            total = torch.as_tensor(value).detach().double() * num_items
            self.sums[name] = self.sums.get(name, 0) + total

    def over_processes(self, accelerator) -> dict[str, float]:
        values = [*self.sums.values(), torch.tensor(self.num_items, dtype=torch.float64)]
        totals = torch.stack([value.double().to(accelerator.device) for value in values])
        *sums, num_items = accelerator.reduce(totals, "sum").tolist()
        return {name: total / num_items for name, total in zip(self.sums, sums, strict=True)}


@dataclass
class Window:
    """Measurements of this process since the last logged step."""

    means: ItemMeans = field(default_factory=ItemMeans)
    losses: list[Tensor] = field(default_factory=list)  # this process's part of each step's loss
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass
class FitRun:
    """The state of a `fit` run."""

    config: FitConfig
    model: Any  # prepared by accelerate: wrapped by DDP, sharded by FSDP2 or ZeRO-3, or unchanged
    accelerator: Any
    optimizer: Any
    parameters: list[Tensor]  # the trainable ones
    rows: Sequence[dict]
    eval_batches: list[list[dict]]
    collate: Callable[[list], Batch]
    loss: Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]]
    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)  # since the last logged step
    signals: list[int] = field(default_factory=list)  # signals received during the current step
    was_stopped: bool = False  # by a signal to any of the processes
    pace: Pace | None = None  # speed since the first step of this process

    @property
    def rows_per_step(self) -> int:
        config = self.config
        per_process = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return per_process * self.accelerator.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.rows) / self.rows_per_step)

    @property
    def num_steps(self) -> int:
        epochs = self.config.num_train_epochs
        return self.config.max_steps or math.ceil(self.steps_per_epoch * epochs)

    @property
    def has_ended(self) -> bool:
        patience = self.config.early_stopping_patience
        is_patient = not patience or self.progress.without_improvement < patience
        return self.was_stopped or not is_patient or self.progress.step >= self.num_steps

    def sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, "sum")

    def log(self, metrics: dict[str, float]) -> None:
        """Write metrics to metrics.jsonl, the screen and the trackers, and add them to history."""
        step = self.progress.step
        self.progress.history.append({"step": step, **metrics})
        if is_main_process():
            folder = Path(self.config.output_dir)
            log_step(folder, step, self.num_steps, metrics, NOT_ON_SCREEN, self.pace)
        if self.config.report_to:
            self.accelerator.log(metrics, step=step)


def fit(
    config: FitConfig,
    model,
    train_rows: Sequence[dict],
    eval_rows: Sequence[dict],
    collate: Callable[[list], Batch],
    loss: Callable[[Any, Batch], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, float]:
    """Train `model` in place; returns the metrics after training and, as x_before, before it.

    A row has "input_ids". `collate(rows)` returns a batch of tensors, including "num_tokens", for
    the speed, and "num_items": the number of items (tokens, pairs, ...) over which
    `loss(model, batch) -> (loss, metrics)` averages. The loss of a step is then the mean over all
    its items, however they are split into micro-batches and processes.

    Raises FloatingPointError for a loss or gradient that is not finite, before it changes the
    weights.
    """
    from peft.helpers import disable_input_dtype_casting

    checkpoint = find_checkpoint(config)
    log_start(config, model, len(train_rows))
    # FSDP2 and ZeRO-3 modify the model itself (DDP wraps it), so keep a copy without weights.
    shell = copy_without_weights(model) if is_sharded() else None
    run = start_run(config, model, train_rows, eval_rows, collate, loss)
    if checkpoint:
        resume(run, checkpoint)
    if is_main_process():  # drop what was logged after the checkpoint
        write_jsonl(Path(config.output_dir, "metrics.jsonl"), run.progress.history)

    # Autocast already casts the inputs of adapters, with fewer copies than PEFT.
    with deferred_signals() as run.signals, disable_input_dtype_casting(model):
        if eval_rows and not checkpoint:
            run.log(evaluate(run))
        run.pace = Pace(run.progress.step)
        for rows in steps_left(run):  # (R,)
            began = time.perf_counter()
            factor = schedule_factor(config, run.progress.step, run.num_steps)
            rate = set_learning_rates(run.optimizer, factor)

            # 1. The gradient of the mean loss over all items of the step.
            step_loss = accumulate_gradients(run, rows)

            # 2. The optimizer step, if loss and gradient are finite.
            norm = clip_gradients(run)
            require_finite(run, step_loss, norm)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.progress.step += 1
            run.window.seconds += time.perf_counter() - began

            # 3. What is due: a line in the log, an evaluation, a checkpoint.
            end_step(run, {"learning_rate": rate, "grad_norm": norm})

    metrics = final_evaluation(run) if eval_rows else {}
    undo_preparation(model)
    if shell is not None:
        gather_sharded_weights(model, shell)
    finish_trackers(run.accelerator)
    return collect_metrics(run.progress, metrics)


# -- setting up ------------------------------------------------------------------------------------


def start_run(config: FitConfig, model, train_rows, eval_rows, collate, loss) -> FitRun:
    """Create optimizer and evaluation batches, and prepare the model for processes and devices."""
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False}, every_n_layers=config.gradient_checkpointing
        )
    precision = MIXED_PRECISION[compute_dtype(config.torch_dtype)]
    accelerator = start_accelerator(config, precision, shards=True)
    configure_deepspeed(accelerator, config)
    # FSDP2 replaces the weights in model and optimizer, so it needs both.
    optimizer = new_optimizer(config, model, decay_groups(config, model))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()  # a loaded model is in eval mode, even inside a new adapter in train mode
    by_length = sorted(eval_rows, key=lambda row: len(row["input_ids"]))  # little padding
    size = config.per_device_eval_batch_size
    return FitRun(
        config=config,
        model=prepared,
        accelerator=accelerator,
        optimizer=optimizer,
        parameters=[p for p in prepared.parameters() if p.requires_grad],
        rows=train_rows,
        eval_batches=[by_length[start : start + size] for start in range(0, len(by_length), size)],
        collate=collate,
        loss=loss,
    )


def configure_deepspeed(accelerator, config: FitConfig) -> None:
    """Configure what DeepSpeed does by itself, if the launch file chose it."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    options = plugin.deepspeed_config
    options["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
    options["gradient_clipping"] = config.max_grad_norm
    options["zero_allow_untested_optimizer"] = True


def log_start(config: FitConfig, model, rows: int) -> None:
    """Log the number of trained parameters and rows, device and precision.

    Raises RuntimeError if no parameter trains.
    """
    trainable = model.num_parameters(only_trainable=True)
    total = model.num_parameters()
    if not trainable:
        raise RuntimeError("no parameter of the model is trainable: everything is frozen")
    logger.info(
        "training %s of %s parameters on %s rows, on %s in %s",
        f"{trainable:,}",
        f"{total:,}",
        f"{rows:,}",
        default_device().type,
        str(compute_dtype(config.torch_dtype)).removeprefix("torch."),
    )
    suggest_bfloat16(config.torch_dtype)


def resume(run: FitRun, checkpoint: Path) -> None:
    """Continue from a checkpoint."""
    state = load_checkpoint(checkpoint, run.parameters, run.optimizer, run.num_steps)
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])


# -- batches ---------------------------------------------------------------------------------------


def steps_left(run: FitRun) -> Iterator[Tensor]:
    """Yield the row indices (R,) of each remaining step."""
    lengths = torch.tensor([len(row["input_ids"]) for row in run.rows])
    while not run.has_ended:
        epoch, place = divmod(run.progress.step, run.steps_per_epoch)
        for rows in steps_of_epoch(lengths, run.rows_per_step, run.config.seed + epoch)[place:]:
            yield rows
            if run.has_ended:
                return


def steps_of_epoch(lengths: Tensor, rows_per_step: int, seed: int) -> list[Tensor]:
    """The row indices of each step of an epoch, grouped by similar length for little padding.

    The longest step comes first, so that a lack of memory shows at once. The result depends only on
    the seed, so that a resumed run sees the batches that the interrupted run would have seen.
    """
    generator = torch.Generator().manual_seed(seed)
    # Random factors of up to 10% on the lengths give each epoch different batches.
    blur = 0.9 + 0.2 * torch.rand(len(lengths), generator=generator)  # (rows,)
    by_length = (lengths * blur).argsort(descending=True)
    longest, *others = by_length.split(rows_per_step)
    incomplete = []
    if others and len(others[-1]) < rows_per_step:
        incomplete = [others.pop()]
    permutation = torch.randperm(len(others), generator=generator).tolist()
    return [longest, *(others[index] for index in permutation), *incomplete]


def own_micro_batches(run: FitRun, rows: Tensor) -> list[list[dict]]:
    """The rows of this process's micro-batches of a step.

    All processes get the same number, or they would wait for each other; the last may be empty.
    """
    parts = [part.tolist() for part in rows.split(run.config.per_device_train_batch_size)]
    num_processes = run.accelerator.num_processes
    missing = -len(parts) % num_processes
    parts += [[]] * missing
    own = parts[run.accelerator.process_index :: num_processes]
    return [[run.rows[number] for number in part] for part in own]


# -- a step ----------------------------------------------------------------------------------------


def accumulate_gradients(run: FitRun, rows: Tensor) -> Tensor:
    """Accumulate the gradients of the step's micro-batches; returns this process's share of the
    loss."""
    device, window = run.accelerator.device, run.window
    micro_batches = own_micro_batches(run, rows)
    # An empty micro-batch computes another row with weight 0.
    batches = [run.collate(part or [run.rows[0]]) for part in micro_batches]
    items = []
    for batch, part in zip(batches, micro_batches, strict=True):
        items.append(int(batch["num_items"]) if part else 0)
        window.num_tokens += int(batch["num_tokens"]) if part else 0
    all_items = run.sum_over_processes(torch.tensor(sum(items), device=device))

    # train() visits all modules, which takes a tenth of a small model's step.
    if not run.model.training:
        run.model.train()
    step_loss = torch.zeros((), device=device)
    for number, (batch, num_items) in enumerate(zip(batches, items, strict=True)):
        is_last = number == len(batches) - 1
        with gradients_stay_here(run, until_next=not is_last):
            loss, metrics = loss_with_router(run, to_device(batch, device))
            share = loss * num_items / all_items
            # Gradients are averaged over processes, not summed: hence the last factor.
            backward(run, share * run.accelerator.num_processes)
        step_loss += share.detach()
        window.means.add(metrics, num_items)
    window.losses.append(step_loss)
    return step_loss


def loss_with_router(run: FitRun, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a batch, including the router loss of a mixture of experts, if any."""
    weight = router_loss_weight(run.model)
    if not weight:
        return run.loss(run.model, batch)
    with recorded_router_losses(run.model) as losses:
        loss, metrics = run.loss(run.model, batch)
    router_loss = torch.stack(losses).mean()
    return loss + weight * router_loss, metrics | {"router_loss": router_loss.detach()}


@contextlib.contextmanager
def gradients_stay_here(run: FitRun, until_next: bool) -> Iterator[None]:
    """With `until_next`, do not reduce gradients over processes yet: they are still incomplete."""
    run.accelerator.sync_gradients = not until_next
    with run.accelerator.no_sync(run.model) if until_next else contextlib.nullcontext():
        yield


def backward(run: FitRun, loss: Tensor) -> None:
    if not is_deepspeed(run):
        run.accelerator.backward(loss)
        return
    # DeepSpeed takes the optimizer step in its backward pass, so check the loss now.
    require_finite(run, loss, 0.0)
    run.accelerator.backward(loss, scale_wrt_gas=False)


def is_deepspeed(run: FitRun) -> bool:
    return run.accelerator.state.deepspeed_plugin is not None


def clip_gradients(run: FitRun) -> float:
    """Clip the gradient norm to `max_grad_norm`; returns the norm before clipping."""
    max_norm = run.config.max_grad_norm or math.inf
    return float(run.accelerator.clip_grad_norm_(run.parameters, max_norm))


def require_finite(run: FitRun, loss: Tensor, norm: float) -> None:
    """Raise FloatingPointError for NaN or infinity, before it changes the weights."""
    figures = {"loss": float(loss), "gradient's norm": norm}
    # The float16 scaler skips steps with infinite gradients by itself.
    if run.accelerator.scaler is not None:
        del figures["gradient's norm"]
    for what, value in figures.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at step {run.progress.step + 1}; the weights are "
                "those from before it. Lower learning_rate, or look for a broken row"
            )


# -- after a step ----------------------------------------------------------------------------------


def end_step(run: FitRun, figures: dict[str, float]) -> None:
    """Log, evaluate and save if it is due, after the last step, and before stopping."""
    config, progress = run.config, run.progress
    step = progress.step
    if step % config.logging_steps == 0 or step == run.num_steps:
        epoch = {"epoch": step / run.steps_per_epoch}
        run.log(mean_metrics(run, figures) | epoch)
    else:
        show_count("step", step, run.num_steps)
    is_best = False
    if run.eval_batches and config.eval_steps and step % config.eval_steps == 0:
        metrics = evaluate(run)
        run.log(metrics)
        is_best = compare_with_best(run, metrics)
    run.was_stopped = any_process_stopped(run.accelerator, run.signals)
    is_due = config.save_steps and step % config.save_steps == 0
    is_needed_later = is_best and config.load_best_model_at_end
    if is_due or is_needed_later or run.was_stopped:
        save(run)
    elif run.has_ended and config.save_steps:
        # A safeguard until the stage has recorded its result; then it is removed.
        save(run, is_end=True)


def save(run: FitRun, is_end: bool = False) -> None:
    progress, scaler = run.progress, run.accelerator.scaler
    state = {
        "progress": vars(progress),
        "scaler": scaler.state_dict() if scaler is not None else {},
    }
    save_checkpoint(
        run.config,
        progress.step,
        run.parameters,
        run.optimizer,
        state,
        best_step=progress.best_step,
        is_end=is_end,
    )


def mean_metrics(run: FitRun, figures: dict[str, float]) -> dict[str, float]:
    """The loss, the `figures` of the step, metrics and speed, over all processes since the last
    logged step. Starts a new window."""
    window, run.window = run.window, Window()
    device = run.accelerator.device
    # In float64, so that large token counts stay exact.
    tokens = torch.tensor(window.num_tokens, dtype=torch.float64, device=device)
    totals = torch.stack([torch.stack(window.losses).double().mean(), tokens])
    loss, num_tokens = run.sum_over_processes(totals).tolist()
    metrics = window.means.over_processes(run.accelerator)
    speed = round(num_tokens / window.seconds, 1)
    return {"loss": loss, **figures, **metrics, "tokens_per_s": speed}


# -- evaluation ------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(run: FitRun) -> dict[str, float]:
    """{"eval_loss", ...}: the means of loss and metrics over all items of the evaluation rows."""
    accelerator = run.accelerator
    run.model.eval()
    batches = run.eval_batches
    processes = accelerator.num_processes
    # All processes do the same number of rounds, or they would wait for each other.
    rounds = math.ceil(len(batches) / processes) * processes
    means = ItemMeans()
    for number in range(accelerator.process_index, rounds, processes):
        batch = run.collate(batches[number % len(batches)])
        num_items = int(batch["num_items"]) if number < len(batches) else 0
        loss, metrics = run.loss(run.model, to_device(batch, accelerator.device))
        means.add({"loss": loss, **metrics}, num_items)
    figures = means.over_processes(accelerator)
    figures = {f"eval_{name}": value for name, value in figures.items()}
    check_best_metric(run.config, figures)
    return figures


def check_best_metric(config: FitConfig, metrics: dict[str, float]) -> None:
    name = config.metric_for_best_model
    if f"eval_{name.removeprefix('eval_')}" not in metrics:
        known = ", ".join(sorted(metrics))
        raise ConfigError(f"metric_for_best_model={name} is unknown, one of: {known}")


def compare_with_best(run: FitRun, metrics: dict[str, float]) -> bool:
    """Whether an evaluation is the best so far; counts those that are not."""
    config, progress = run.config, run.progress
    value = metrics["eval_" + config.metric_for_best_model.removeprefix("eval_")]
    # Of equal evaluations, the first is the best.
    sign = 1 if config.greater_is_better else -1
    best = progress.best_metric
    is_best = best is None or sign * value > sign * best
    progress.without_improvement += 1
    if is_best:
        progress.best_metric, progress.best_step = value, progress.step
        progress.without_improvement = 0
    return is_best


def final_evaluation(run: FitRun) -> dict[str, float]:
    """The metrics of the trained model, or, with load_best_model_at_end, of the best one after
    loading its weights."""
    progress = run.progress
    best_step = progress.best_step
    if run.config.load_best_model_at_end and best_step not in (0, progress.step):
        folder = Path(run.config.output_dir, "checkpoints", f"checkpoint-{best_step}")
        load_weights(folder, run.parameters, run.optimizer)
        logger.info("the best model is that of step %d", best_step)
    else:
        last = progress.history[-1] if progress.history else {}
        if "eval_loss" in last and last["step"] == progress.step:
            return {name: value for name, value in last.items() if name != "step"}
    metrics = evaluate(run)
    run.log(metrics)
    return metrics


def collect_metrics(progress: Progress, metrics_after: dict[str, float]) -> dict[str, float]:
    """The metrics of a finished training and, as x_before, of the evaluation before it."""
    history = progress.history
    losses = [line["loss"] for line in history if "loss" in line]
    metrics = dict(metrics_after)
    metrics["train_loss"] = statistics.fmean(losses)
    metrics["steps"] = progress.step
    speeds = [line["tokens_per_s"] for line in history if "tokens_per_s" in line]
    metrics["tokens_per_s"] = statistics.median(speeds)
    # The first evaluation was made before the first step.
    before = next((line for line in history if "eval_loss" in line), {})
    metrics_before = {f"{name}_before": before[name] for name in metrics if name in before}
    return metrics | metrics_before
