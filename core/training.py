"""The training loop: transformers' Trainer behind one function."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import statistics
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import torch

from core.checkpoints import find_checkpoint, seal_checkpoint
from core.config import FitConfig
from core.errors import ConfigError
from core.files import atomic_writer
from core.runtime import compute_dtype, default_device, deferred_signals, is_main_process, logger


def truncate_metrics(path: Path, step: int) -> None:
    """Keep of a .jsonl what came up to `step`: what an interrupted run wrote after its checkpoint comes once more."""
    old = re.findall(r".*\n", path.read_text(encoding="utf-8")) if step and path.exists() else []
    with atomic_writer(path) as file:
        file.writelines(line for line in old if json.loads(line)["step"] <= step)


def log_step(
    folder: Path, step: int, steps: int, logs: Mapping[str, float], left_to_the_file: str
) -> None:
    """A line in metrics.jsonl, and on the screen one without the figures that `left_to_the_file` names."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **logs}) + "\n")
    words = {"learning_rate": "lr {:.2g}", "tokens_per_s": "{:,.0f} tokens/s"}
    shown = [
        words.get(name, f"{name} {{:.4g}}").format(value)
        for name, value in logs.items()
        if not re.fullmatch(left_to_the_file, name)
    ]
    logger.info("step %*d/%d  %s", len(str(steps)), step, steps, "  ".join(shown))


def gather_sharded_weights(model, shell) -> None:
    """Undo in place what FSDP2 or ZeRO-3 made of `model` since `shell`, its copy without weights: every process has all
    weights, no module is wrapped, and what saves, merges or samples need not know that they were in parts."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else the next model would be taken apart as it is loaded
    for part, place in zip(model.parameters(), shell.parameters(), strict=True):
        zero3 = hasattr(part, "ds_id")
        with (
            importlib.import_module("deepspeed").zero.GatheredParameters(part)
            if zero3
            else contextlib.nullcontext()
        ):
            whole = part.full_tensor() if hasattr(part, "full_tensor") else part.data.clone()
        if place.is_meta:
            torch.utils.swap_tensors(place, torch.nn.Parameter(whole.detach(), place.requires_grad))
        else:
            place.data = whole
    model.__class__, model.__dict__ = type(shell), vars(shell)


def fit(
    config: FitConfig,
    model,
    tokenizer,
    train_rows: Sequence[dict],
    eval_rows: Sequence[dict],
    collate: Callable[[list], dict],
    loss: Callable[[Any, dict], tuple[torch.Tensor, dict]],
) -> dict[str, float]:
    """Train `model` in place by transformers' Trainer; returns the figures after training, and as x_before those from
    before it.

    A row has "input_ids". `collate(rows)` returns a batch of tensors, among them "num_tokens", for the speed, and
    "num_items": over how many items (tokens, pairs, ...) `loss(model, batch) -> (loss, metrics)` takes its means. So
    the loss of a step is the mean over all its items, however they fall into micro-batches and processes. A loss or a
    gradient that is not finite stops the run before it reaches the weights.
    """
    from peft.helpers import disable_input_dtype_casting
    from transformers import (
        EarlyStoppingCallback,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.trainer_pt_utils import LengthGroupedSampler
    from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

    folder, device, dtype = (
        Path(config.output_dir),
        default_device(),
        compute_dtype(config.torch_dtype),
    )
    world = int(os.environ.get("WORLD_SIZE", 1))
    together = world * config.per_device_train_batch_size  # rows of a micro-batch
    sums: Counter[str] = (
        Counter()
    )  # since the last logged step: metrics times items, items, tokens, seconds

    def require_finite(what: str, value, state) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {float(value)} at step {state.global_step + 1}; the weights are "
                "as before it. Lower learning_rate, or look for a broken row"
            )

    class ByLength(LengthGroupedSampler):
        """Steps of rows of about the same length, so with little padding, also where the rows are few. The longest come
        first: if memory is short, it shows at once."""

        def __len__(
            self,
        ):  # the last step is filled up with nothing, else processes would be given rows twice
            return (
                math.ceil(len(self.lengths) / together) * together
                if world > 1
                else len(self.lengths)
            )

        def __iter__(self):
            # A function of seed and epoch alone: a resumed run sees the batches the interrupted one would have seen.
            # (set_epoch would not do: accelerate hands it to no sampler that is split and resumed within an epoch.)
            self.generator.manual_seed(config.seed + int(trainer.state.epoch))
            rows = len(self.lengths)
            chance = 0.9 + 0.2 * torch.rand(
                rows, generator=self.generator
            )  # so that batches mix anew
            longest, *others = (
                (torch.tensor(self.lengths) * chance)
                .argsort(descending=True)
                .split(self.batch_size)
            )
            rest = [others.pop()] if others and len(others[-1]) < self.batch_size else []
            order = torch.randperm(len(others), generator=self.generator).tolist()
            order = torch.cat([longest, *(others[index] for index in order), *rest]).tolist()
            return iter(order + [rows] * (len(self) - rows))

    def filled(rows: list) -> dict:
        """A batch; of no rows one that weighs nothing, so that every process has one."""
        there = [row for row in rows if row is not None]
        return collate(there or [train_rows[0]]) | {"weight": torch.tensor(bool(there))}

    class FitTrainer(Trainer):
        loss_is_scaled_for_ga = True
        floating_point_ops = lambda self, inputs: (
            0
        )  # their sum is not read, and each takes a count of all weights

        def _run_epoch(self, **kwargs):
            if (
                self.state.global_step < self.state.max_steps
            ):  # from its last step on a run would take one more
                super()._run_epoch(**kwargs)

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
            items = torch.tensor(
                sum(int(batch["num_items"] * batch["weight"]) for batch in batches), device=device
            )
            return batches, self.accelerator.reduce(items, "sum")

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            value, metrics = loss(model, inputs)
            require_finite("loss", value.detach(), self.state)
            items, tokens = (
                int(inputs[name] * inputs["weight"]) for name in ("num_items", "num_tokens")
            )
            sums.update({name: float(metric) * items for name, metric in metrics.items()})
            sums.update(items=items, tokens=tokens)
            # gradients are averaged over processes, not summed: hence the last factor
            return value * items / num_items_in_batch * self.accelerator.num_processes

        def _get_grad_norm(self, model, grad_norm=None):
            norm = super()._get_grad_norm(model, grad_norm)
            if (
                norm is not None and self.accelerator.scaler is None
            ):  # float16's scaler skips such steps itself
                require_finite("gradient's norm", norm, self.state)
            return norm

        def _get_train_sampler(self, train_dataset=None):
            size = (
                self.args.train_batch_size
                * self.args.gradient_accumulation_steps
                * self.args.world_size
            )
            return ByLength(
                size,
                lengths=[len(row["input_ids"]) for row in train_rows],
                generator=torch.Generator(),
            )

        def evaluation_loop(
            self,
            dataloader,
            description,
            prediction_loss_only=None,
            ignore_keys=None,
            metric_key_prefix="eval",
        ):
            self.model_wrapped.eval()
            totals: Counter[str] = Counter()
            rows, size, world = self.eval_dataset, self.args.eval_batch_size, self.args.world_size
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
            # As many rounds for every process, else they would wait for each other; what comes twice weighs nothing.
            for number in range(
                self.args.process_index, math.ceil(len(batches) / world) * world, world
            ):
                batch = self._prepare_inputs(collate(batches[number % len(batches)]))
                with torch.no_grad(), self.compute_loss_context_manager():
                    value, metrics = loss(self.model_wrapped, batch)
                items = int(batch["num_items"]) * (number < len(batches))
                totals.update(
                    {k: float(v) * items for k, v in {"loss": value, **metrics}.items()},
                    items=items,
                )
            *found, items = self.accelerator.reduce(
                torch.tensor([*totals.values()], device=device), "sum"
            ).tolist()
            means = {
                f"{metric_key_prefix}_{name}": total / items for name, total in zip(totals, found)
            }
            if not {name := config.metric_for_best_model, f"eval_{name}"} & {*means}:
                raise ConfigError(
                    f"metric_for_best_model={name}: there are {', '.join(sorted(means))}"
                )
            return EvalLoopOutput(None, None, means, len(eval_rows))

        def log(self, logs, start_time=None):
            if "loss" in logs:
                of_all = self.accelerator.reduce(
                    torch.tensor([*sums.values()], device=self.args.device), "sum"
                )
                totals = dict(zip(sums, of_all.tolist()))
                seconds, tokens, items = (
                    totals.pop(name) for name in ("seconds", "tokens", "items")
                )
                logs |= {name: total / items for name, total in totals.items()}
                logs["tokens_per_s"] = round(tokens * self.accelerator.num_processes / seconds, 1)
                sums.clear()
            super().log(
                {k: v for k, v in logs.items() if not k.endswith(("_runtime", "_per_second"))},
                start_time,
            )

        def _determine_best_metric(self, metrics, trial):
            best = super()._determine_best_metric(metrics, trial)
            self.control.should_save |= (
                best and config.load_best_model_at_end
            )  # whatever save_steps says
            return best

        def _save_checkpoint(self, model, trial):
            """Aside, then sealed, then renamed: a crash leaves the older ones as they are."""
            home, aside = Path(self.args.output_dir), Path(self.args.output_dir, ".saving")
            name, best = f"checkpoint-{self.state.global_step}", self.state.best_global_step
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self.args.output_dir = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = str(home)
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = str(home / f"checkpoint-{best}") if best else None
            if self.args.should_save:
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
                seal_checkpoint(aside / name, config)
                shutil.rmtree(home / name, ignore_errors=True)
                (aside / name).rename(home / name)
                aside.rmdir()
                rotate_checkpoints(
                    str(home), self.args.save_total_limit, self.state.best_model_checkpoint
                )
            self.accelerator.wait_for_everyone()

        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                Path(output_dir, "training_args.bin").unlink()  # a pickle that nothing reads

    class Progress(TrainerCallback):
        """metrics.jsonl, the lines on the screen, and the clock."""

        def on_train_begin(self, args, state, control, **_):
            if state.is_world_process_zero:
                truncate_metrics(folder / "metrics.jsonl", state.global_step)

        def on_step_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            sums["seconds"] += time.perf_counter() - self.began
            if trainer.accelerator.reduce(torch.tensor(len(signals), device=device), "sum"):
                signals or signals.append(
                    signal.SIGTERM
                )  # to one process or to all: they save and end together
                control.should_save = control.should_training_stop = True
                return
            if state.global_step >= state.max_steps:
                control.should_log = (
                    True  # the last step shows, also where logging_steps passes it over
                )
                if state.global_step % (config.save_steps or 1):
                    control.should_save = False  # the stage saves the finished model itself

        def on_log(self, args, state, control, logs=None, **_):
            if state.is_world_process_zero and "train_loss" not in logs:
                log_step(
                    folder,
                    state.global_step,
                    state.max_steps,
                    logs,
                    "epoch|grad_norm|.*_(logps|reward)",
                )

    checkpoint = find_checkpoint(config)
    os.environ |= {"TENSORBOARD_LOGGING_DIR": str(folder / "runs"), "WANDB_DIR": str(folder)}
    os.environ |= {"WANDB_PROJECT": config.wandb_project} if config.wandb_project else {}
    names = {f.name for f in fields(TrainingArguments)} & {f.name for f in fields(FitConfig)}
    same = {name: getattr(config, name) for name in names - {"resume_from_checkpoint", "log_level"}}
    args = TrainingArguments(
        **same
        | {
            "output_dir": str(folder / "checkpoints"),
            "run_name": config.wandb_run_name or config.output_dir,
            "max_steps": config.max_steps or -1,
            "warmup_steps": config.warmup_ratio,  # below 1 it is a share
            "activation_checkpointing": bool(config.gradient_checkpointing),
            "report_to": config.report_to or "none",
            "activation_checkpointing_kwargs": {
                "use_reentrant": False,
                "every_n_layers": config.gradient_checkpointing,
            },
            "eval_strategy": "steps" if eval_rows and config.eval_steps else "no",
            "eval_steps": config.eval_steps or None,
            "eval_on_start": bool(eval_rows and not checkpoint),
            "save_strategy": "steps" if config.save_steps else "no",
            "save_steps": config.save_steps or 500,
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "ddp_find_unused_parameters": False,  # what trains has a part in every loss
            "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
            "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16,
            "use_cpu": device.type == "cpu",
            "dataloader_pin_memory": device.type == "cuda",
            "remove_unused_columns": False,
            "gradient_checkpointing": None,
        }
    )
    args._n_gpu = min(
        args.n_gpu, 1
    )  # several GPUs are for `accelerate launch`, never for DataParallel
    counts = [model.num_parameters(only_trainable=only) for only in (True, False)]
    if not counts[0]:
        raise RuntimeError("no parameter of the model trains: everything is frozen")
    callbacks = [
        Progress(),
        *(EarlyStoppingCallback(count) for count in [config.early_stopping_patience] if count),
    ]
    evaluated = (
        sorted(eval_rows, key=lambda row: len(row["input_ids"])) or None
    )  # by length: little padding
    trainer = FitTrainer(
        model, args, filled, [*train_rows, None], evaluated, tokenizer, callbacks=callbacks
    )
    trainer.remove_callback(PrinterCallback)
    logger.info(
        "training %s of %s parameters on %s rows, on %s in %s",
        *(f"{n:,}" for n in (*counts, len(train_rows))),
        device.type,
        str(dtype).removeprefix("torch."),
    )
    # FSDP2 and ZeRO-3 change the model itself; DDP wraps it. Quantized weights, no floats, are passed over by them.
    empty = lambda w: torch.nn.Parameter(torch.empty_like(w, device="meta"), w.requires_grad)
    copies = lambda: {id(w): empty(w) if w.is_floating_point() else w for w in model.parameters()}
    shell = (
        copy.deepcopy(model, copies())
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        else None
    )
    with (
        deferred_signals() as signals,
        disable_input_dtype_casting(model),
    ):  # autocast does it, with fewer copies
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.config.use_cache = True  # the Trainer's False would be saved with the model
    if is_main_process():
        with contextlib.suppress(OSError):
            Path(args.output_dir).rmdir()  # stays unless no checkpoint was saved
    history = trainer.state.log_history
    before = next((logs for logs in history if "eval_loss" in logs), {})
    after = trainer.evaluate() if eval_rows else {}
    for name in {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys():
        delattr(
            model, name
        )  # accelerate's autocast, else it stays, and the mark that would keep it from coming again
    if shell is not None:
        gather_sharded_weights(model, shell)
    if "wandb" in config.report_to and is_main_process():
        importlib.import_module(
            "wandb"
        ).finish()  # else the next stage's steps would go into this stage's run
    figures = {
        name: value
        for name, value in after.items()
        if not name.endswith(("_runtime", "_per_second", "epoch"))
    }
    speeds = [logs["tokens_per_s"] for logs in history if "tokens_per_s" in logs]
    losses = [
        logs["loss"] for logs in history if "loss" in logs
    ]  # also of the part before a run was interrupted
    figures |= {"train_loss": statistics.fmean(losses), "steps": trainer.state.global_step}
    figures |= {"tokens_per_s": statistics.median(speeds)} if speeds else {}
    return figures | {f"{name}_before": before[name] for name in figures if name in before}
