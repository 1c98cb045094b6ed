"""The run of an RL recipe: optimizer, schedule, checkpoints and metrics around its loop.

run = start_run(config, model, tokenizer, train_rows, eval_rows, reward_functions)
with run.interruptible():
    for _ in run.steps():
        ...                      # rollout, rewards, advantages, update: the recipe's own lines
        run.end_step(rollout, metrics)
return run.finish()
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from core.accelerator import finish_trackers, start_accelerator
from core.checkpoints import find_checkpoint
from core.kl import completion_kl, loss_needs_log_probs, next_kl_coef
from core.logprobs import disable_dropout
from core.model_config import context_length
from core.optimizers import new_optimizer, schedule_factor, set_learning_rates
from core.rewards import stop_without_verdicts
from core.rl_alarms import Alarms, equal_rewards, raise_alarms, rollout_values
from core.rl_samples import (
    STEPS_BETWEEN_SAMPLES,
    evaluate,
    reward_columns,
    write_best_and_worst,
)
from core.rollout import (
    Policy,
    RLConfig,
    Rollout,
    TokenOutputs,
    can_share_prompts,
    check_can_sample,
    check_sampled_logps,
    check_sampling_gap,
    completion_outputs,
    encode_prompts,
    rollout_outputs,
    sampling_gaps,
)
from core.router_loss import router_loss_weight
from core.run_log import count_lines, log_step, truncate_logs
from core.runtime import (
    any_process_stopped,
    compute_dtype,
    deferred_signals,
    is_main_process,
    logger,
    suggest_bfloat16,
)
from core.sampling import uniform_numbers
from core.screen import Pace
from core.train_state import load_checkpoint, save_checkpoint

# Metrics that are only in metrics.jsonl; with them, the lines on the screen would be too long.
NOT_ON_SCREEN = (
    "reward_.*|ratio|.*_loss|epochs|kl_coef|policy_kl|improvement|zero_variance|"
    "unscored|clip_fraction|line_search|entropy|seconds_.*"
)


@dataclass
class Run(Policy):
    """A policy in training. `value_head` is the critic's: V(s) = value_head(hidden state)."""

    training_rows: list[dict]  # prompts by `encode_prompt`
    evaluation_rows: list[dict]
    value_head: torch.nn.Linear | None
    accelerator: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    kl_coef: float  # beta, adapted if target_kl is set
    step: int = 0
    # Metrics of the first evaluation and the first step, and of each step since the start.
    before: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    evaluated_step: int = -1  # the last step with an evaluation
    skipped_steps: int = 0  # optimizer steps of this process for which no completion had a score
    alarms: Alarms = field(default_factory=Alarms)
    signals: list[int] = field(default_factory=list)  # signals received during the current step
    step_began: float = 0.0  # time.perf_counter() at the start of the current step
    pace: Pace | None = None  # speed since the first step of this process

    def sum_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "sum")

    # -- the loop

    @contextlib.contextmanager
    def interruptible(self):
        """On SIGINT and SIGTERM, finish the step and save a checkpoint before exiting."""
        from peft.helpers import disable_input_dtype_casting

        # autocast already casts the inputs of adapters, with fewer copies than PEFT
        with deferred_signals() as self.signals, disable_input_dtype_casting(self.model):
            yield

    def steps(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps; evaluates and saves between them."""
        config = self.config
        # A resumed run has this evaluation in its checkpoint.
        if self.evaluation_rows and not self.before:
            self.before |= self.evaluate()
        elif self.evaluation_is_due:  # the interrupted run was stopped before it
            self.evaluate()
        self.pace = Pace(self.step)
        # After a signal during a step or an evaluation, no further step begins.
        while not self.stop_requested():
            if self.step == config.num_training_steps:
                return  # `finish` evaluates
            self.step_began = time.perf_counter()
            set_learning_rates(self.optimizer, self.schedule_factor)
            yield self.step
            if self.stop_requested():
                continue
            if self.evaluation_is_due:
                self.evaluate()
            is_last = self.step == config.num_training_steps
            if config.save_freq and self.step % config.save_freq == 0:
                self.save()
            elif config.save_freq and is_last:
                # A safeguard until the stage has recorded its result; then it is removed.
                self.save(is_end=True)
        self.save()

    @property
    def evaluation_is_due(self) -> bool:
        """Whether an evaluation by eval_freq is due at this step. Those before and after training
        are separate."""
        every, step = self.config.eval_freq, self.step
        if not self.evaluation_rows or not every or step == self.config.num_training_steps:
            return False
        return step % every == 0 and step > self.evaluated_step

    def evaluate(self) -> dict[str, float]:
        """Log and return the metrics of greedy answers to the held-out prompts."""
        self.evaluated_step = self.step
        return self.report(evaluate(self))

    @property
    def schedule_factor(self) -> float:
        """Factor of the learning rates at the current step."""
        return schedule_factor(self.config, self.step, self.config.num_training_steps)

    def save(self, is_end: bool = False) -> None:
        """Write a checkpoint. It needs no random state: sampling and shuffling are functions of
        seed and step."""
        state = {"step": self.step, "kl_coef": self.kl_coef, "before": self.before}
        state["scaler"] = self.scaler.state_dict()
        state["evaluated_step"] = self.evaluated_step
        state["log_lines"] = count_lines(Path(self.config.output_dir))
        save_checkpoint(
            self.config, self.step, self.trained_tensors, self.optimizer, state, is_end=is_end
        )

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint."""
        steps = self.config.num_training_steps
        state = load_checkpoint(checkpoint, self.trained_tensors, self.optimizer, steps)
        self.step, self.kl_coef, self.before = state["step"], state["kl_coef"], state["before"]
        self.scaler.load_state_dict(state["scaler"])
        self.evaluated_step = state["evaluated_step"]
        if is_main_process():
            truncate_logs(Path(self.config.output_dir), state["log_lines"])

    @property
    def trained_tensors(self) -> list[torch.Tensor]:
        """The trained weights of the policy and of the critic's head."""
        head = [] if self.value_head is None else list(self.value_head.parameters())
        return [*self.parameters, *head]

    def stop_requested(self) -> bool:
        return any_process_stopped(self.accelerator, self.signals)

    def next_prompts(self) -> list[dict]:
        """This process's prompts for the step (P,)."""
        config, accelerator = self.config, self.accelerator
        per_process = config.batch_size // config.num_generations
        rank = accelerator.process_index
        of_all = prompts_of_step(
            config.seed, self.training_rows, self.step, per_process * accelerator.num_processes
        )
        return of_all[rank * per_process : (rank + 1) * per_process]

    def next_uniforms(self) -> torch.Tensor:
        """(B, max_new_tokens): this process's random numbers for the step.

        Each completion has its own numbers, which do not depend on the number of processes.
        """
        config, accelerator = self.config, self.accelerator
        count, rank = config.batch_size, accelerator.process_index
        seed = config.seed * 1_000_003 + self.step
        of_all = uniform_numbers(count * accelerator.num_processes, config.sampling, seed)
        return of_all[rank * count : (rank + 1) * count].to(self.model.device)

    # -- the update

    def accumulation_groups(
        self, rollout: Rollout, shuffle: torch.Generator, accumulate: int
    ) -> Iterator[tuple[list[Rollout], torch.Tensor]]:
        """Yield (mini-batches, weight) for each optimizer step of an epoch over the rollout.

        The weight is the sum of `rollout.weights` over these mini-batches and all processes, to
        divide summed losses by. Steps in which no completion has a verdict are skipped.
        """
        # A rollout that is one mini-batch keeps its order: nothing depends on it.
        order = None
        if self.config.mini_batch_size < self.config.batch_size:
            order = torch.randperm(len(rollout.groups), generator=shuffle)
        batches = list(rollout.mini_batches(self.config.mini_batch_size, order))
        for start in range(0, len(batches), accumulate):
            step_batches = batches[start : start + accumulate]
            own_weight = torch.stack([batch.weights.sum() for batch in step_batches]).sum()
            weight = self.sum_over_processes(own_weight)
            if weight:
                yield step_batches, weight
            else:
                self.warn_without_verdicts()

    def warn_without_verdicts(self) -> None:
        """Count an optimizer step that is skipped; `finish` logs how many there were."""
        self.skipped_steps += 1
        self.alarms.warn(
            "no_verdict",
            f"step {self.step + 1} skipped: no completion was scored. If there are more such "
            "steps, look at the reward, or at the rows that it leaves out",
        )

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def optimizer_step(self) -> None:
        """Take one step with the gradients summed over the processes.

        Raises FloatingPointError before the step if a gradient is not finite.
        """
        # DDP would reduce in every backward pass; here it is done once per step.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                parameter.grad = self.sum_over_processes(parameter.grad)
        # Unscale after the sum, so that an overflow in one process skips the step in all of them.
        self.scaler.unscale_(self.optimizer)
        max_norm = self.config.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        if not self.scaler.is_enabled() and not torch.isfinite(norm):  # float16's scaler skips it
            raise FloatingPointError(
                f"the gradient norm is {float(norm)} at step {self.step + 1}; the weights are "
                "those from before it. Lower learning_rate"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    # -- after the update

    def end_step(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Log the step and some completions, adapt beta, and warn of problems."""
        config = self.config
        metrics = rollout_metrics(self, rollout) | metrics
        completions = config.batch_size * self.accelerator.num_processes
        if config.target_kl and "kl" in metrics:
            share = completions / config.kl_horizon
            self.kl_coef = next_kl_coef(self.kl_coef, metrics["kl"], config.target_kl, share)
        # The first rollout gives the metrics before training.
        names = ("reward", "length", "stopped", "entropy")
        first = {name: metrics[name] for name in names if name in metrics}
        self.before = first | self.before
        check_sampling_gap(self, metrics.get("sampling_gap", 0.0))
        self.step += 1
        seconds = time.perf_counter() - self.step_began
        speed = {"completions_per_s": round(completions / seconds, 3)}
        self.report(metrics | speed | {"seconds_rollout": round(rollout.seconds, 2)})
        self.history.append(metrics)
        never_scored = self.step == config.num_training_steps and "reward" not in self.before
        stop_without_verdicts(self.reward_functions, self.history, never_scored)
        raise_alarms(self, rollout_values(self, rollout))
        is_last = self.step == config.num_training_steps
        if is_last or self.evaluation_is_due or self.step % STEPS_BETWEEN_SAMPLES == 0:
            write_best_and_worst(self, rollout)

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Write metrics to metrics.jsonl, the screen and the trackers; returns them."""
        config = self.config
        if is_main_process():
            folder = Path(config.output_dir)
            steps = config.num_training_steps
            log_step(folder, self.step, steps, metrics, NOT_ON_SCREEN, self.pace)
        if config.report_to:
            self.accelerator.log(metrics, step=self.step)
        return metrics

    def finish(self) -> dict[str, float]:
        """Evaluate once more; returns the metrics after training and, as x_before, before it."""
        after = {}
        if self.evaluation_rows:
            after = self.evaluate()
        if self.skipped_steps:
            logger.warning(
                "optimizer steps skipped because no completion was scored: %d", self.skipped_steps
            )
        finish_trackers(self.accelerator)
        # A single batch is a worse estimate of reward and length than the held-out prompts.
        names = ("kl",) if self.evaluation_rows else ("kl", "reward", "length")
        last = self.history[-1] if self.history else {}
        after |= {name: last[name] for name in names if name in last}
        before = {f"{name}_before": self.before[name] for name in after if name in self.before}
        return after | before | {"steps": self.step}


@torch.no_grad()
def record_old_policy(run: Run, rollout: Rollout) -> None:
    """Set the rollout's tensors that are computed before the update, all (B, T).

    These are "old_logps" and "entropy" of the policy, "ref_logps", and the critic's "values".

    The critic reads the last hidden states of the backbone without its adapter, which never change,
    or, if all weights train, those of the policy itself.
    """
    policy_extras, reference_extras = ["entropy"], []
    if run.has_adapter:
        reference_extras.append("hidden")
    else:
        policy_extras.append("hidden")
    old = rollout_outputs(run, rollout, *policy_extras)
    rollout.old_logps, rollout.entropy, rollout.hidden = old.logps, old.entropy, old.hidden
    if run.config.init_kl_coef or run.has_adapter:
        reference = rollout_outputs(run, rollout, *reference_extras, reference=True)
        rollout.ref_logps = reference.logps
        if run.has_adapter:
            rollout.hidden = reference.hidden
    rollout.values = run.value_head(rollout.hidden)[..., 0] * rollout.mask
    if run.step == 0:
        check_sampled_logps(run, rollout)


def policy_outputs(run: Run, batch: Rollout, *more: str) -> TokenOutputs:
    """The policy's outputs that its loss needs, with gradients, and those named in `more`."""
    extras = list(more)
    if loss_needs_log_probs(run.config):
        extras.append("log_probs")
    if run.config.entropy_coef:
        extras.append("entropy")
    if run.config.has_critic and not run.has_adapter:
        extras.append("hidden")
    return completion_outputs(run, batch, *extras)


class WeightedMeans:
    """Weighted means of metrics over the mini-batches of an epoch and over the processes."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}
        self.weight: Any = 0.0

    def add(self, metrics: dict[str, torch.Tensor], weights: torch.Tensor) -> None:
        """Add metrics and weights of a mini-batch, both (b, T) or (b, 1)."""
        self.weight = self.weight + weights.sum()
        for name, values in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + (values * weights).sum()

    def over_processes(self, run: Run) -> dict[str, float]:
        """{name: mean}; {} if nothing was added, which holds in all processes or in none."""
        if not self.sums:
            return {}
        sums = torch.stack([*self.sums.values(), self.weight])
        *totals, weight = run.sum_over_processes(sums).tolist()
        return {name: total / weight for name, total in zip(self.sums, totals, strict=True)}


# -- setting up ------------------------------------------------------------------------------------


def start_run(
    config: RLConfig, model, tokenizer, train_rows: list, eval_rows: list, reward_functions: dict
) -> Run:
    """Set up the run of an RL recipe on rows by `to_prompt`, resumed from a checkpoint if any."""
    limit = min(config.max_seq_length, context_length(model.config))
    training = encode_prompts(config, train_rows, tokenizer, limit, "training data")
    evaluation = encode_prompts(config, eval_rows, tokenizer, limit, "evaluation data")
    if len(evaluation) > config.num_eval_prompts:
        logger.info(
            "%d held-out prompts, of which the first %d are answered in each evaluation "
            "(num_eval_prompts)",
            len(evaluation),
            config.num_eval_prompts,
        )
        evaluation = evaluation[: config.num_eval_prompts]
    longest = max(training, key=lambda row: len(row["ids"]))
    run = build_run(config, model, tokenizer, reward_functions, longest, training, evaluation)
    checkpoint = find_checkpoint(config)
    if checkpoint:
        run.resume(checkpoint)
    elif is_main_process():
        truncate_logs(Path(config.output_dir), {})  # remove those of an earlier run
    logger.info(
        "training %s of %s parameters on %d prompts, on %s in %s",
        f"{sum(parameter.numel() for parameter in run.parameters):,}",
        f"{model.num_parameters():,}",
        len(training),
        model.device.type,
        str(compute_dtype(config.torch_dtype)).removeprefix("torch."),
    )
    suggest_bfloat16(config.torch_dtype)
    return run


def build_run(
    config: RLConfig,
    model,
    tokenizer,
    reward_functions: dict,
    probe_row: dict,
    training=(),
    evaluation=(),
) -> Run:
    """Add reference, critic, optimizer and scaler to a model.

    `probe_row` is a prompt for testing whether one pass can serve several answers.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    disable_dropout(model)  # with dropout, probability ratios are noise (Huang et al. 2024)
    model.train(config.gradient_checkpointing > 0)
    if config.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.activation_checkpointing_enable(options, every_n_layers=config.gradient_checkpointing)
        model.enable_input_require_grads()
    # With an adapter, the reference is the model without it and costs no memory. Trained biases
    # stay active when the adapter is disabled, so then the reference is a copy.
    has_adapter = hasattr(model, "peft_config") and config.lora_bias == "none"
    reference = None
    if config.init_kl_coef and not has_adapter:
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    value_head = new_value_head(model) if config.has_critic else None
    optimizer = new_optimizer(config, model, parameter_groups(config, model, value_head))
    # Mixed precision comes from `Policy.autocast`; accelerate prepares no model here.
    accelerator = start_accelerator(config, mixed_precision="no", shards=False)
    # Even under DeepSpeed, each process holds the whole policy and every model loaded later.
    unset_hf_deepspeed_config()
    # float16 gradients underflow without a scaler; bfloat16 and float32 need none.
    float16 = compute_dtype(config.torch_dtype) == torch.float16
    run = Run(
        config=config,
        model=model,
        tokenizer=tokenizer,
        reward_functions=reward_functions,
        reference=reference,
        has_adapter=has_adapter,
        shares_prompts=can_share_prompts(config, model, probe_row),
        training_rows=list(training),
        evaluation_rows=list(evaluation),
        value_head=value_head,
        accelerator=accelerator,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(model.device.type, enabled=float16),
        kl_coef=config.init_kl_coef,
    )
    check_can_sample(run, probe_row["ids"])
    if not run.parameters:
        raise RuntimeError("no parameter of the model is trainable: everything is frozen")
    if router_loss_weight(model):
        logger.warning("the model's router loss (output_router_logits) is not part of RL's loss")
    return run


def new_value_head(model) -> torch.nn.Linear:
    """A value head that starts with V(s) = 0."""
    hidden_size = model.get_output_embeddings().weight.shape[1]
    head = torch.nn.Linear(hidden_size, 1, device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head


def parameter_groups(config, model, value_head) -> list[dict[str, Any]]:
    """The policy's weights, unless TRPO updates them itself, and those of the critic's head."""
    groups = []
    if config.optimizes_policy:
        policy = [p for p in model.parameters() if p.requires_grad]
        groups.append(
            {"params": policy, "lr": config.learning_rate, "weight_decay": config.weight_decay}
        )
    if value_head is not None:
        head = list(value_head.parameters())
        groups.append({"params": head, "lr": config.value_learning_rate, "weight_decay": 0.0})
    return groups


def prompts_of_step(seed: int, rows: list[dict], step: int, count: int) -> list[dict]:
    """The prompts of a step, from repeated passes over the rows, each in a new order.

    They depend only on seed and step, so that a resumed run sees the prompts that the interrupted
    run would have seen.
    """
    orders: dict[int, list[int]] = {}
    prompts = []
    # Prompts are numbered across epochs; a step takes the next `count` numbers.
    for n in range(step * count, (step + 1) * count):
        epoch, place = divmod(n, len(rows))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed + epoch)
            orders[epoch] = torch.randperm(len(rows), generator=generator).tolist()
        prompts.append(rows[orders[epoch][place]])
    return prompts


# -- metrics ---------------------------------------------------------------------------------------


def rollout_metrics(run: Run, rollout: Rollout) -> dict[str, float]:
    """Metrics of a rollout over all processes; docs/metrics.md defines them."""
    metrics = scored_metrics(run, rollout)
    gather = run.accelerator.gather
    metrics["length"] = gather(rollout.lengths).float().mean()
    metrics["stopped"] = gather(rollout.stopped).float().mean()
    metrics["unscored"] = gather(rollout.scores.isnan()).float().mean()
    return {name: float(value) for name, value in metrics.items()} | {"kl_coef": run.kl_coef}


def scored_metrics(run: Run, rollout: Rollout) -> dict[str, torch.Tensor]:
    """The metrics over the completions with a verdict; {} if none has one."""
    gather, used = run.accelerator.gather, rollout.used
    scores = gather(rollout.scores)  # (B of all processes,)
    num_tokens = gather(used.sum(1)).sum()
    judged = scores[~scores.isnan()]
    if not len(judged):
        return {}
    metrics = {"reward": judged.mean(), "reward_std": judged.std(correction=0)}
    columns = reward_columns(run)
    if columns:
        metrics |= dict(zip(columns, gather(rollout.rewards).nanmean(0), strict=True))
    if rollout.ref_logps is not None:
        metrics["kl"] = gather(completion_kl(rollout)).sum() / len(judged)
    entropy = run.sum_over_processes((rollout.entropy * used).sum())
    metrics["entropy"] = entropy / num_tokens
    gap = run.sum_over_processes((sampling_gaps(rollout) * used).sum())
    metrics["sampling_gap"] = gap / num_tokens
    if rollout.values is not None:
        metrics["explained_variance"] = explained_variance(run, rollout)
    if run.config.num_generations > 1:
        groups = scores.view(-1, run.config.num_generations)  # (P, G)
        metrics["zero_variance"] = equal_rewards(groups).float().mean()
    return metrics


def explained_variance(run: Run, rollout: Rollout) -> torch.Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens of all processes."""
    used, returns = rollout.used, rollout.returns
    errors = returns - rollout.values
    ones = torch.ones_like(used)
    sums = [(x * used).sum() for x in (ones, errors, errors**2, returns, returns**2)]
    totals = run.sum_over_processes(torch.stack(sums))
    count, error_sum, error_squares, return_sum, return_squares = totals
    error_variance = error_squares - error_sum * error_sum / count
    return_variance = return_squares - return_sum * return_sum / count
    return 1 - error_variance / return_variance.clamp(min=1e-8)
