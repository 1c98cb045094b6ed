"""The parts of transformers' Trainer that `core.training.fit` replaces.

Only `fit` imports this file, and late: transformers takes seconds to import, and --help shall not.
"""

from __future__ import annotations

import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from core.checkpoints import seal_checkpoint
from core.config import FitConfig
from core.errors import ConfigError
from core.run_log import log_step, truncate_metrics

NOT_ON_SCREEN = "epoch|grad_norm|.*_(logps|reward)"
TIMINGS = ("_runtime", "_per_second")  # figures of the Trainer that are not ours to log


def require_finite(what: str, value, step: int) -> None:
    """Raise FloatingPointError for a NaN or an infinity, before it reaches the weights."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {float(value)} at step {step}; the weights are as before it. "
            "Lower learning_rate, or look for a broken row"
        )


class LengthSampler(torch.utils.data.Sampler):
    """The order of the rows in an epoch: steps of rows of about the same length, so with little
    padding, also where the rows are few. The longest step comes first: if memory is short, it
    shows at once."""

    def __init__(self, trainer: FitTrainer, lengths: Sequence[int]):
        args = trainer.args
        rows_per_micro_batch = args.world_size * args.train_batch_size
        self.trainer = trainer
        self.lengths = lengths
        self.rows_per_step = rows_per_micro_batch * args.gradient_accumulation_steps
        # accelerate gives the processes one order by sharing the attribute of this name.
        self.generator = torch.Generator()
        # The last micro-batch of several processes is filled up with the index `len(lengths)`,
        # which stands for no row: accelerate would give some processes a row twice.
        self.size = len(lengths)
        if args.world_size > 1:
            micro_batches = math.ceil(len(lengths) / rows_per_micro_batch)
            self.size = micro_batches * rows_per_micro_batch

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        # The order is a function of seed and epoch alone, so that a resumed run sees the batches
        # that the interrupted one would have seen. (A method set_epoch would not do: accelerate
        # calls it on no sampler that is split and resumed within an epoch.)
        epoch = int(self.trainer.state.epoch)
        self.generator.manual_seed(self.trainer.fit_config.seed + epoch)
        rows = len(self.lengths)
        # Lengths are blurred by 10%, so that every epoch mixes the batches anew.
        blur = 0.9 + 0.2 * torch.rand(rows, generator=self.generator)  # (rows,)
        blurred_lengths = torch.tensor(self.lengths) * blur
        by_length = blurred_lengths.argsort(descending=True)
        longest, *others = by_length.split(self.rows_per_step)
        incomplete = []
        if others and len(others[-1]) < self.rows_per_step:
            incomplete = [others.pop()]
        permutation = torch.randperm(len(others), generator=self.generator).tolist()
        shuffled = [others[index] for index in permutation]
        order = torch.cat([longest, *shuffled, *incomplete]).tolist()
        padding = [rows] * (self.size - rows)
        return iter(order + padding)


class FitTrainer(Trainer):
    """transformers' Trainer with the loss, the order of rows, the evaluation and the checkpoints of
    `fit`, which says what `collate` and `loss` are."""

    # Ours is: compute_loss divides by the items of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        config: FitConfig,
        model,
        tokenizer,
        args: TrainingArguments,
        train_rows: Sequence[dict],
        eval_rows: Sequence[dict],
        collate: Callable[[list], dict],
        loss: Callable[[Any, dict], tuple[torch.Tensor, dict]],
    ):
        self.fit_config = config
        self.train_rows = train_rows
        self.collate = collate
        self.loss = loss
        # Since the last logged step: metrics times items, items, tokens, seconds.
        self.sums: Counter[str] = Counter()
        self.signals: list[int] = []  # those that came; `fit` sets it
        callbacks: list[TrainerCallback] = [Progress(self)]
        if config.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
        by_length = sorted(eval_rows, key=lambda row: len(row["input_ids"]))  # little padding
        super().__init__(
            model,
            args,
            data_collator=self.collate_or_pad,
            train_dataset=[*train_rows, None],  # None: what the sampler's padding stands for
            eval_dataset=by_length or None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    # -- training --

    def collate_or_pad(self, rows: list) -> dict:
        """A batch with its weight: 1, or 0 for one that stands for no rows, so that every process
        has one."""
        present = [row for row in rows if row is not None]
        batch = self.collate(present or [self.train_rows[0]])
        return batch | {"weight": torch.tensor(bool(present))}

    def floating_point_ops(self, inputs) -> int:
        return 0  # nothing reads their sum, and each takes a count of all weights

    def _run_epoch(self, **kwargs):
        # Resumed from the checkpoint of its last step, the Trainer would take one more.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """(micro-batches of a step, items in them over all processes)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = 0
        for batch in batches:
            items += int(batch["num_items"] * batch["weight"])
        items_of_process = torch.tensor(items, device=device)
        return batches, self.accelerator.reduce(items_of_process, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The part of a micro-batch in the mean over all items of the step."""
        value, metrics = self.loss(model, inputs)
        require_finite("loss", value.detach(), self.state.global_step + 1)
        items = int(inputs["num_items"] * inputs["weight"])
        tokens = int(inputs["num_tokens"] * inputs["weight"])
        for name, metric in metrics.items():
            self.sums[name] += float(metric) * items
        self.sums["items"] += items
        self.sums["tokens"] += tokens
        # Gradients are averaged over processes, not summed: hence the last factor.
        return value * items / num_items_in_batch * self.accelerator.num_processes

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # The scaler of float16 skips steps with infinite gradients by itself.
        if norm is not None and self.accelerator.scaler is None:
            require_finite("gradient's norm", norm, self.state.global_step + 1)
        return norm

    def _get_train_sampler(self, train_dataset=None):
        return LengthSampler(self, [len(row["input_ids"]) for row in self.train_rows])

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= self.mean_metrics()
        logs = {name: value for name, value in logs.items() if not name.endswith(TIMINGS)}
        super().log(logs, start_time)

    def mean_metrics(self) -> dict[str, float]:
        """The metrics and the speed since the last logged step, over all processes; starts anew."""
        sums = self.reduce_over_processes(self.sums)
        self.sums.clear()
        seconds, tokens, items = (sums.pop(name) for name in ("seconds", "tokens", "items"))
        metrics = {name: value / items for name, value in sums.items()}
        # `seconds` is the sum over processes, which run side by side.
        speed = tokens * self.accelerator.num_processes / seconds
        return metrics | {"tokens_per_s": round(speed, 1)}

    def reduce_over_processes(self, sums: Counter[str]) -> dict[str, float]:
        values = torch.tensor([*sums.values()], device=self.args.device)
        totals = self.accelerator.reduce(values, "sum").tolist()
        return dict(zip(sums, totals, strict=True))

    # -- evaluation --

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        """The means of loss and metrics over all items of the evaluation rows."""
        self.model_wrapped.eval()
        sums: Counter[str] = Counter()
        rows = self.eval_dataset
        batch_size = self.args.eval_batch_size
        processes = self.args.world_size
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        # Every process has as many rounds, or they would wait for each other; padding batches have
        # weight 0.
        rounds = math.ceil(len(batches) / processes) * processes
        for number in range(self.args.process_index, rounds, processes):
            batch = self.collate(batches[number % len(batches)])
            batch = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                value, metrics = self.loss(self.model_wrapped, batch)
            is_padding = number >= len(batches)
            items = 0 if is_padding else int(batch["num_items"])
            for name, figure in {"loss": value, **metrics}.items():
                sums[name] += float(figure) * items
            sums["items"] += items
        totals = self.reduce_over_processes(sums)
        items = totals.pop("items")
        means = {f"{metric_key_prefix}_{name}": total / items for name, total in totals.items()}
        self.check_best_metric(means)
        return EvalLoopOutput(None, None, means, len(rows))

    def check_best_metric(self, means: dict[str, float]) -> None:
        name = self.fit_config.metric_for_best_model
        if name not in means and f"eval_{name}" not in means:
            known = ", ".join(sorted(means))
            raise ConfigError(f"metric_for_best_model={name}: there are {known}")

    # -- checkpoints --

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics, trial)
        # The best state is needed at the end, also between two of the checkpoints of save_steps.
        if is_best and self.fit_config.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint aside, seal it, rename it: a crash leaves the older ones intact."""
        checkpoints = Path(self.args.output_dir)
        unfinished = checkpoints / ".saving"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(checkpoints)
        self.accelerator.wait_for_everyone()
        # The Trainer took its temporary folder for that of the best one.
        best_step = self.state.best_global_step
        best = str(checkpoints / f"checkpoint-{best_step}") if best_step else None
        self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / "trainer_state.json"))
            seal_checkpoint(unfinished / name, self.fit_config)
            shutil.rmtree(checkpoints / name, ignore_errors=True)
            (unfinished / name).rename(checkpoints / name)
            unfinished.rmdir()
            rotate_checkpoints(str(checkpoints), self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir, "training_args.bin").unlink()  # a pickle that nothing reads


class Progress(TrainerCallback):
    """metrics.jsonl, the lines on the screen, the clock, and the end after a signal."""

    def __init__(self, trainer: FitTrainer):
        self.trainer = trainer
        self.folder = Path(trainer.fit_config.output_dir)

    def on_train_begin(self, args, state, control, **_):
        if state.is_world_process_zero:
            truncate_metrics(self.folder / "metrics.jsonl", state.global_step)

    def on_step_begin(self, args, state, control, **_):
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.trainer.sums["seconds"] += time.perf_counter() - self.step_began
        if self.signal_came(args.device):
            control.should_save = True
            control.should_training_stop = True
            return
        if state.global_step >= state.max_steps:
            # The last step shows, also where logging_steps passes over it; the stage saves the
            # finished model itself.
            control.should_log = True
            if state.global_step % (self.trainer.fit_config.save_steps or 1):
                control.should_save = False

    def signal_came(self, device) -> bool:
        """Whether any process got a signal: all of them save and end together."""
        signals = self.trainer.signals
        count = torch.tensor(len(signals), device=device)
        if not self.trainer.accelerator.reduce(count, "sum"):
            return False
        if not signals:
            signals.append(signal.SIGTERM)
        return True

    def on_log(self, args, state, control, logs=None, **_):
        if state.is_world_process_zero and "train_loss" not in logs:
            step, steps = state.global_step, state.max_steps
            log_step(self.folder, step, steps, logs, NOT_ON_SCREEN)
