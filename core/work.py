"""The work of a stage in passes, tokens and answers, as input of a dry run's estimates
(core/estimates.py). Every stage returns it from its method `work`.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

PADDING = 1.1  # tokens, with padding, in a batch of similar rows per token of its rows


@dataclass
class Answers:
    """Answers that the model writes: `times` batches of `prompts`, with `repeats` answers each."""

    times: float
    prompts: int
    repeats: int
    prompt_length: float
    max_new_tokens: int

    @property
    def at_once(self) -> int:
        return self.prompts * self.repeats


@dataclass
class Work:
    """The work of one process in a stage."""

    steps: int  # of training
    passes: float  # forward and backward passes, each over a micro-batch
    tokens: float  # in all these passes
    forward_tokens: float  # in passes without gradients, of evaluations and references
    rows: int  # sequences in the largest micro-batch
    length: int  # tokens in each of them
    share_scored: float  # fraction of these tokens that go through the output layer
    answers: list[Answers] = field(default_factory=list)
    updates: float = 1.0  # optimizer steps per step
    share_fixed: float = 1.0  # fraction of the tokens that does not depend on answer lengths
    accumulates: bool = False  # whether gradients of several passes are summed
    copies: int = 0  # frozen models besides the one that trains
    all_logits: bool = False  # whether all logits of a pass are in memory at once
    differentiates_twice: bool = False  # the memory for that is not estimated


def estimate_fit(
    config: Any, data: Sequence[Sized], lengths: Sequence[int], answer_share: float
) -> Work:
    """The work of training by `fit` on `data`, (training rows, evaluation rows). `lengths`, in
    tokens, may be of a sample of the rows; a fraction `answer_share` of the tokens are targets."""
    num_rows, num_eval_rows = len(data[0]), len(data[1])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch_size = min(config.per_device_train_batch_size, num_rows)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    rows_per_step = min(per_step, num_rows)
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    steps = config.max_steps or math.ceil(steps_per_epoch * config.num_train_epochs)
    passes_per_step = math.ceil(rows_per_step / batch_size / processes)

    # An epoch begins with its longest rows.
    mean = statistics.fmean(lengths)
    longest = statistics.fmean(sorted(lengths)[-rows_per_step:])
    epochs, rest = divmod(steps, steps_per_epoch)
    tokens = epochs * num_rows * mean
    if rest:
        others = (num_rows * mean - rows_per_step * longest) / (steps_per_epoch - 1)
        tokens += rows_per_step * longest + (rest - 1) * others

    evaluations = 2 if num_eval_rows else 0
    if num_eval_rows and config.eval_steps:
        evaluations += (steps - 1) // config.eval_steps
    answers = []
    num_answers = min(vars(config).get("num_eval_samples", 0), num_eval_rows)
    if num_answers:  # before and after training
        at_once = min(num_answers, 16)
        prompt_length = (1 - answer_share) * mean
        times = 2 * num_answers / at_once
        answers = [Answers(times, at_once, 1, prompt_length, vars(config)["max_new_tokens"])]
    return Work(
        steps=steps,
        passes=steps * passes_per_step,
        tokens=PADDING * tokens / processes,
        forward_tokens=PADDING * evaluations * num_eval_rows * mean / processes,
        rows=batch_size,
        length=max(lengths),
        share_scored=answer_share,
        answers=answers,
        accumulates=passes_per_step > 1,
    )


def estimate_rl(config: Any, num_eval_rows: int, prompt_lengths: Sequence[int]) -> Work:
    """The work of RL training (an RLConfig), if all completions have the maximum length."""
    size, mini_size = config.batch_size, config.mini_batch_size
    num_generations = config.num_generations
    new_tokens = config.sampling["max_new_tokens"]
    mean, longest = statistics.fmean(prompt_lengths), max(prompt_lengths)
    # A shared prompt is read once for all its completions, in one sequence with them.
    shares = num_generations if config.share_prompt else 1
    rows = mini_size // shares
    length = longest + shares * new_tokens
    prompt_tokens = size // shares * mean
    tokens = prompt_tokens + size * new_tokens

    steps, epochs = config.num_training_steps, getattr(config, "ppo_epochs", 1)
    passes = epochs * size / mini_size
    # TRPO's conjugate gradient uses one mini-batch: each product takes about as long as a forward
    # and backward pass.
    products = vars(config).get("cg_iterations", 0)
    if products:
        epochs += (products + 3) * mini_size / size
    has_reference_pass = bool(config.init_kl_coef) or (config.has_critic and config.lora_r > 0)
    reads_distributions = config.kl_penalty == "full" or vars(config).get("entropy_coef", 0) > 0
    answers = [Answers(steps, size // num_generations, num_generations, mean, new_tokens)]
    num_held_out = min(num_eval_rows, config.num_eval_prompts)
    if num_held_out:
        evaluations = 2
        if config.eval_freq:
            evaluations += (steps - 1) // config.eval_freq
        at_once = min(num_held_out, size)
        times = evaluations * num_held_out / at_once
        answers.append(Answers(times, at_once, 1, mean, new_tokens))
    return Work(
        steps=steps,
        passes=steps * passes,
        tokens=steps * epochs * tokens,
        forward_tokens=steps * (1 + has_reference_pass) * tokens,
        rows=rows,
        length=length,
        share_scored=mini_size * new_tokens / (rows * length),
        answers=answers,
        updates=passes / config.gradient_accumulation_steps,
        share_fixed=prompt_tokens / tokens,
        accumulates=config.gradient_accumulation_steps > 1,
        copies=int(bool(config.init_kl_coef) and not config.lora_r),
        all_logits=reads_distributions or not config.optimizes_policy,
        differentiates_twice=products > 0,
    )
