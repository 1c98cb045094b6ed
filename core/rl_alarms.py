"""Alarms of an RL run: problems in its rollouts, each logged once with a remedy.

No alarm depends on a single completion. It looks at the newest completions, from one rollout or
from as many as needed, and is raised if their mean is beyond a threshold by more than chance: if
the whole 95% interval is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from core.kl import completion_kl
from core.rollout import Rollout
from core.runtime import logger
from core.statistics import Z_95, normal_interval, wilson_interval

MIN_VALUES = 32  # with fewer values, a normal interval would be too narrow
MAX_KL = 2.0  # nats per completion, used if target_kl is not set
MAX_KL_FACTOR = 10  # alarm above this multiple of target_kl, or of MAX_KL
MIN_ENTROPY_SHARE = 0.1  # of the entropy of the first rollout
NEARLY_ALL = 0.85  # share of completions, or of prompts, that counts as all of them


class Alarms:
    """The alarms raised in this process, and the newest values for them."""

    def __init__(self):
        self.raised: set[str] = set()
        self.values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, Sequence[float]]) -> None:
        """Keep the newest values of each name: those of a rollout, but at least MIN_VALUES."""
        for name, new in values.items():
            count = max(len(new), MIN_VALUES)
            self.values[name] = [*self.values.get(name, []), *new][-count:]

    def warn(self, name: str, message: str) -> None:
        """Log the alarm with this name, but only once."""
        if name not in self.raised:
            self.raised.add(name)
            logger.warning(message)


def raise_alarms(run: Any, values: Mapping[str, Sequence[float]]) -> None:
    """Add the `values` of a new rollout, and warn of problems in the Run (core/rl_run.py)."""
    run.alarms.add(values)
    newest = run.alarms.values
    warn_of_kl(run, newest.get("kl", []))
    warn_of_entropy(run, newest.get("entropy", []))
    warn_of_equal_rewards(run, newest.get("equal", []))
    warn_of_cut_answers(run, newest.get("cut", []))


def rollout_values(run: Any, rollout: Rollout) -> dict[str, list[float]]:
    """Values for the alarms, over all processes: "cut", "entropy" (nats per token) and "kl" (nats)
    for each completion, "equal" for each prompt. Without a verdict there is only "cut"."""
    gather = run.accelerator.gather
    num_tokens = rollout.used.sum(1)  # (B,), 0 without a verdict
    columns = {
        "cut": (~rollout.stopped).float(),
        "entropy": (rollout.entropy * rollout.used).sum(1) / num_tokens,
    }
    if rollout.ref_logps is not None:
        columns["kl"] = torch.where(num_tokens > 0, completion_kl(rollout), torch.nan)
    values = {name: gather(column) for name, column in columns.items()}  # (B of all processes,)
    num_generations = run.config.num_generations
    if num_generations > 1:
        groups = gather(rollout.scores).view(-1, num_generations)  # (P, G)
        has_verdict = ~groups.isnan().all(1)  # (P,)
        values["equal"] = equal_rewards(groups)[has_verdict].float()
    return {name: column[~column.isnan()].tolist() for name, column in values.items()}


def equal_rewards(groups: torch.Tensor) -> torch.Tensor:
    """(P, G) -> (P,): whether all completions of a prompt have the same reward. They carry no
    signal for GRPO and RLOO."""
    deviations = (groups - groups.nanmean(1, keepdim=True)).nan_to_num()
    return deviations.abs().amax(1) < 1e-6


def warn_of_kl(run: Any, values: Sequence[float]) -> None:
    limit = MAX_KL_FACTOR * (run.config.target_kl or MAX_KL)
    # Outliers raise the mean, but widen the interval as well.
    if interval_of_mean(values)[0] > limit:
        run.alarms.warn(
            "kl",
            f"the policy is leaving the reference: KL {statistics.fmean(values):.1f} nats per "
            "completion. Raise init_kl_coef, set target_kl, or lower learning_rate",
        )


def warn_of_entropy(run: Any, values: Sequence[float]) -> None:
    if interval_of_mean(values)[1] < MIN_ENTROPY_SHARE * run.before.get("entropy", 0.0):
        run.alarms.warn(
            "entropy",
            f"entropy has collapsed: {statistics.fmean(values):.3f} nats per token. "
            "Lower learning_rate, raise init_kl_coef or entropy_coef",
        )


def warn_of_equal_rewards(run: Any, values: Sequence[float]) -> None:
    if is_nearly_all(values):
        run.alarms.warn(
            "zero_variance",
            f"{count_of(values)} prompts have completions of equal reward: nothing to learn from. "
            "Choose prompts neither too easy nor too hard, or raise num_generations",
        )


def warn_of_cut_answers(run: Any, values: Sequence[float]) -> None:
    if is_nearly_all(values):
        limit = run.config.sampling["max_new_tokens"]
        run.alarms.warn(
            "cut",
            f"{count_of(values)} answers were cut at max_new_tokens={limit}; nothing is learned "
            f"about stopping: raise it (generation_kwargs={{max_new_tokens: {2 * limit}}}), or "
            "start from a model that answers briefly",
        )


# -- statistics ------------------------------------------------------------------------------------


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean; infinite if there are too few values.

    Not Wilson's, which is too wide for values close to 0 that are not fractions.
    """
    if len(values) < MIN_VALUES:
        return -math.inf, math.inf
    return normal_interval(values, Z_95)


def is_nearly_all(values: Sequence[float]) -> bool:
    """Whether significantly more than NEARLY_ALL of the values, 0 and 1, are 1: all of 22, say."""
    if not values:
        return False
    low, _ = wilson_interval(statistics.fmean(values), len(values), Z_95)
    return low > NEARLY_ALL


def count_of(values: Sequence[float]) -> str:
    """Text such as "all of the last 64" or "62 of the last 64", for values of 0 and 1."""
    count = round(sum(values))
    share = "all" if count == len(values) else str(count)
    return f"{share} of the last {len(values)}"
