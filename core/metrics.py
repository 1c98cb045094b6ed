"""The meaning of each metric in a phrase, which direction is better, and number formatting.

report.py shows it. docs/metrics.md has full definitions; a test compares the names in both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    meaning: str
    better: Literal["higher", "lower", ""] = ""  # empty: no direction is better as such

    def __str__(self) -> str:
        return f"{self.meaning}; {self.better} is better" if self.better else self.meaning


# Placeholders in names: NAME is a reward, TASK a file or task in eval_reasoning_tasks, N a round, x
# another metric, and ... one of ASKED.
METRICS = {
    # every training
    "step": Metric("optimizer steps done; in RL, rollouts"),
    "epoch": Metric("passes over the data"),
    "loss": Metric("what training minimizes", "lower"),
    "learning_rate": Metric("size of a step"),
    "grad_norm": Metric("norm of the gradient before clipping"),
    "router_loss": Metric("how unequally experts are used", "lower"),
    "tokens_per_s": Metric("training speed in tokens per second", "higher"),
    "train_loss": Metric("mean loss over the whole training", "lower"),
    "steps": Metric("optimizer steps of the run"),
    "seconds": Metric("wall time of the stage", "lower"),
    "peak_gb": Metric("peak memory in GB", "lower"),
    # generation
    "token_accuracy": Metric("share of target tokens that were the most probable", "higher"),
    "exact_match": Metric("share of answers that are exactly the expected one", "higher"),
    "stopped": Metric("share of answers that ended by themselves", "higher"),
    "length": Metric("mean tokens of an answer"),
    # preferences
    "margin": Metric("how far chosen answers score above rejected ones", "higher"),
    "chosen_reward": Metric("reward of chosen answers", "higher"),
    "rejected_reward": Metric("reward of rejected answers"),
    "accuracy": Metric("share of pairs, labels or questions that come out right", "higher"),
    "ranking_accuracy": Metric("share of pairs whose chosen answer is more probable", "higher"),
    "chosen_logps": Metric("log-probability of chosen answers", "higher"),
    "rejected_logps": Metric("log-probability of rejected answers"),
    "chosen_fell": Metric("share of chosen answers less probable than at the reference", "lower"),
    "kl": Metric("distance from the reference model"),
    "z0": Metric("reference point of KTO"),
    "calibration_error": Metric("distance between confidence and accuracy", "lower"),
    # reinforcement learning
    "reward": Metric("mean reward of the answers", "higher"),
    "reward_std": Metric("spread of the rewards of a step"),
    "reward_NAME": Metric("mean of this reward, before its weight", "higher"),
    "kl_coef": Metric("weight of the KL penalty"),
    "entropy": Metric("how open the policy still is; near 0 it has stopped exploring"),
    "sampling_gap": Metric("rounding between sampling and training", "lower"),
    "zero_variance": Metric("share of prompts whose answers all have one reward", "lower"),
    "unscored": Metric("share of answers without a verdict", "lower"),
    "ratio": Metric("mean probability ratio to the policy that sampled; near 1 is healthy"),
    "clip_fraction": Metric("share of tokens whose gradient the clip stops"),
    "policy_kl": Metric("distance from the policy that sampled"),
    "policy_loss": Metric("surrogate loss, which need not fall"),
    "epochs": Metric("passes over the batch of a step"),
    "improvement": Metric("increase of the surrogate; 0 for a rejected step", "higher"),
    "line_search": Metric("how often the step was shortened; -1 for a rejected one"),
    "value_loss": Metric("half the squared error of the critic", "lower"),
    "explained_variance": Metric("share of the returns that the critic predicts", "higher"),
    "completions_per_s": Metric("speed in completions per second", "higher"),
    "seconds_rollout": Metric("time to sample and to score a step", "lower"),
    # judges and teachers
    "win_rate": Metric("share of prompts for which the judge prefers the new answer", "higher"),
    "win_rate_equal": Metric("share of pairs with identical answers"),
    "win_rate_ties": Metric("share of pairs without a preference"),
    "win_rate_agreement": Metric("share of pairs judged alike in both orders", "higher"),
    "win_rate_position_bias": Metric("pull of the place of an answer; 0 is fair"),
    "feedback_ties": Metric("share of training pairs without a preference"),
    "feedback_agreement": Metric("share of training pairs judged alike in both orders", "higher"),
    "feedback_position_bias": Metric("pull of the place of an answer; 0 is fair"),
    "round_N_x": Metric("in this round of judging"),
    "dpo_N_x": Metric("in this round of DPO"),
    "reward_x": Metric("of the reward model"),
    "preferences": Metric("labelled pairs to train on"),
    "rationales": Metric("chains of thought to train on"),
    "teacher_calls": Metric("new answers of the teacher"),
    "feedback_calls": Metric("new answers of the judge"),
    "..._calls_cached": Metric("answers taken from calls.jsonl"),
    "..._missing": Metric("answers that are missing or unreadable", "lower"),
    "..._cut": Metric("answers that the token limit ended", "lower"),
    "..._other_model": Metric("answers of another model than asked for", "lower"),
    "..._tokens_in": Metric("tokens sent"),
    "..._tokens_out": Metric("tokens received"),
    "..._cost": Metric("price of the calls in dollars", "lower"),
    # chain-of-thought distillation
    "TASK_accuracy": Metric("share of the questions of this file answered right", "higher"),
    "TASK_stopped": Metric("share of answers to this file that ended by themselves", "higher"),
    "TASK_METRIC": Metric("as the lm-eval harness defines it"),
    "divergence": Metric("distance from the teacher", "lower"),
    "nll": Metric("negative log-likelihood of the rationales", "lower"),
    # scorecard
    "perplexity": Metric("per token of the expected answers", "lower"),
    "numeric_match": Metric("share of answers with the expected number", "higher"),
    # custom tokenizer
    "vocab_size": Metric("tokens of the vocabulary"),
    "chars_per_token": Metric("characters of held-out texts per token", "higher"),
    "bits_per_char": Metric("bits per character of held-out texts", "lower"),
    "kept_tokens": Metric("share of the new tokens that the old vocabulary has too"),
}
ASKED = ("teacher", "feedback", "policy")  # what ... stands for
REWARDS_WITHOUT_OPTION = ("feedback", "reward_model")


def find_metric(name: str, options: Mapping[str, Any]) -> Metric | None:
    """The metric with this name, logged by a stage with these options; None if it is unknown."""
    if name in METRICS:
        return METRICS[name]
    if name.startswith("eval_"):
        return extended(find_metric(name.removeprefix("eval_"), options), "on held-out rows")
    of_contained_recipe = re.fullmatch(r"(dpo_\d+|reward)_(eval_.+)", name)
    if of_contained_recipe:
        recipe, own_name = of_contained_recipe.groups()
        whose = METRICS["reward_x" if recipe == "reward" else "dpo_N_x"]
        return extended(find_metric(own_name, {}), whose.meaning)
    of_round = re.fullmatch(r"round_\d+_(.+)", name)
    if of_round:
        return extended(find_metric(of_round.group(1), options), METRICS["round_N_x"].meaning)
    return METRICS.get(family_name(name, options))


def extended(metric: Metric | None, meaning: str) -> Metric | None:
    return metric and replace(metric, meaning=f"{metric.meaning}, {meaning}")


def family_name(name: str, options: Mapping[str, Any]) -> str:
    """The name in METRICS for a metric of a family, such as reward_NAME for reward_length; `name`
    itself if it belongs to none."""
    for word in ASKED:
        if name.startswith(f"{word}_"):
            return "..." + name.removeprefix(word)
    rewards = [PurePath(str(reward)).name for reward in options.get("reward") or ()]
    if name in [f"reward_{reward}" for reward in (*rewards, *REWARDS_WITHOUT_OPTION)]:
        return "reward_NAME"
    for path in options.get("eval_reasoning_tasks") or ():
        task = PurePath(str(path)).stem
        if name.startswith(f"{task}_"):
            of_task = "TASK" + name.removeprefix(task)
            return of_task if of_task in METRICS else "TASK_METRIC"
    return name


# -- better and worse ------------------------------------------------------------------------------


def is_change(old: float, new: float) -> bool:
    """Whether two values differ by more than the rounding of sums."""
    return not math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-12)


def judge_change(metric: Metric | None, old: float, new: float) -> str:
    """Whether a change is "better" or "worse"; empty without a change or a direction."""
    if metric is None or not metric.better or not is_change(old, new):
        return ""
    # A comparison with NaN is false in both directions.
    if new > old:
        return "better" if metric.better == "higher" else "worse"
    if new < old:
        return "better" if metric.better == "lower" else "worse"
    return ""


def find_best(metric: Metric | None, values: Sequence[float | None]) -> list[int]:
    """The indices of the best values; none if no direction is better, or if all are equal."""
    if metric is None or not metric.better:
        return []
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or not is_change(min(known), max(known)):
        return []
    best = max(known) if metric.better == "higher" else min(known)
    indices = []
    for index, value in enumerate(values):
        if value is not None and not is_change(best, value):
            indices.append(index)
    return indices


# -- figures ---------------------------------------------------------------------------------------


def format_number(value: float | None) -> str:
    """Format with three significant digits. All digits before the point are kept, and counts are
    exact."""
    if value is None:
        return "–"
    size = abs(value)
    is_count = isinstance(value, int) and size < 1e15
    if is_count or size == 0:
        text = f"{int(value):,}"
    elif 99.95 <= size < 1e15:  # from here on three digits need no decimals
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}"
    return text.replace("-", "−")
