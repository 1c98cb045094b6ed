"""Alarms of an RL run: what goes wrong in its rollouts, logged once each with a remedy.

No alarm goes by a single completion. It looks at the newest completions, those of one rollout or of
as many as it takes, and is raised where their mean is beyond its threshold by more than chance:
where the whole 95% interval is.
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

MIN_VALUES = 32  # on fewer, a normal interval would be too narrow
MAX_KL = 2.0  # nats per completion, where target_kl is not set
MAX_KL_FACTOR = 10  # a KL of so many times target_kl, or of MAX_KL, is an alarm
MIN_ENTROPY_SHARE = 0.1  # of the entropy of the first rollout
NEARLY_ALL = 0.85  # share of completions, or of prompts, that counts as all of them


class Alarms:
    """The alarms raised in this process, and the newest values that they look at."""

    def __init__(self):
        self.raised: set[str] = set()
        self.values: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, Sequence[float]]) -> None:
        """Keep the newest values of each name: those of a rollout, or MIN_VALUES if it has less."""
        for name, new in values.items():
            count = max(len(new), MIN_VALUES)
            self.values[name] = [*self.values.get(name, []), *new][-count:]

    def warn(self, name: str, message: str) -> None:
        """Log the alarm of that name, once."""
        if name not in self.raised:
            self.raised.add(name)
            logger.warning(message)


def raise_alarms(run: Any, values: Mapping[str, Sequence[float]]) -> None:
    """Warn of what goes wrong in a Run (core/rl_run.py), whose next rollout has these `values`."""
    run.alarms.add(values)
    newest = run.alarms.values
    warn_of_kl(run, newest.get("kl", []))
    warn_of_entropy(run, newest.get("entropy", []))
    warn_of_equal_rewards(run, newest.get("equal", []))
    warn_of_cut_answers(run, newest.get("cut", []))


def rollout_values(run: Any, rollout: Rollout) -> dict[str, list[float]]:
    """What the alarms look at, over all processes: "cut", "entropy" (nats per token) and "kl"
    (nats) of each completion, "equal" of each prompt. Without a verdict only "cut" is known."""
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
    """(P, G) -> (P,): whether all completions of a prompt did equally well, or badly. They carry no
    signal for GRPO and RLOO."""
    deviations = (groups - groups.nanmean(1, keepdim=True)).nan_to_num()
    return deviations.abs().amax(1) < 1e-6


def warn_of_kl(run: Any, values: Sequence[float]) -> None:
    limit = MAX_KL_FACTOR * (run.config.target_kl or MAX_KL)
    # A few completions far out have a high mean, and an interval that is as wide.
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
    """The 95% interval of the mean; without bounds while the values are too few to tell.

    Not Wilson's, which is too wide for values close to 0 that are not shares.
    """
    if len(values) < MIN_VALUES:
        return -math.inf, math.inf
    return normal_interval(values, Z_95)


def is_nearly_all(values: Sequence[float]) -> bool:
    """Whether so many of the values, 0 and 1, are 1 that it is no chance: of 22 all."""
    if not values:
        return False
    low, _ = wilson_interval(statistics.fmean(values), len(values), Z_95)
    return low > NEARLY_ALL


def count_of(values: Sequence[float]) -> str:
    """Such as "all of the last 64", or "62 of the last 64", for values of 0 and 1."""
    count = round(sum(values))
    share = "all" if count == len(values) else str(count)
    return f"{share} of the last {len(values)}"
