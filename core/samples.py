"""Answers to held-out prompts before and after training: samples.jsonl and metrics."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from core.config import Count, FitConfig, Natural
from core.files import write_jsonl
from core.runtime import is_main_process, logger
from core.screen import shorten

Answers = Sequence[tuple[str, bool]]  # (text, whether it ended in a stop token), from `generate`


@dataclass
class SamplesConfig(FitConfig):
    """Options of a recipe that answers held-out prompts before and after training."""

    everyday: ClassVar[tuple[str, ...]] = (*FitConfig.everyday, "num_eval_samples")

    # answers to held-out prompts
    num_eval_samples: Natural = 0  # held-out prompts to answer before and after training
    max_new_tokens: Count = 128  # maximum length of the answers of num_eval_samples, in tokens

    def validate(self) -> None:
        super().validate()
        why = "with validation_split=0: it needs held-out rows"
        self.note_unread(not self.validation_split, "num_eval_samples", why)
        self.note_unread(not self.num_eval_samples, "max_new_tokens", "without num_eval_samples")


def compare_answers(
    config: SamplesConfig, samples: list[dict[str, str]], before: Answers, after: Answers
) -> dict[str, float]:
    """Write samples.jsonl, log the first samples, and return metrics before and after training.

    A sample is {"prompt"} with the answers in the data: {"expected"}, or {"chosen", "rejected"}.
    The metrics are the fraction of answers that equal the expected or chosen one, if there is one,
    and the fraction of answers that ended in a stop token.
    """
    if not samples or not is_main_process():
        return {}
    rows = []
    for sample, (answer_before, _), (answer_after, _) in zip(samples, before, after, strict=True):
        row = {**sample, "before": answer_before, "after": answer_after}
        rows.append({name: text.strip() for name, text in row.items()})

    write_jsonl(Path(config.output_dir, "samples.jsonl"), rows)
    for row in rows[:3]:
        lines = [f"  {name:9} {shorten(text)}" for name, text in row.items()]
        logger.info("\n%s", "\n".join(lines))

    metrics = {}
    expected = [row.get("expected", row.get("chosen")) for row in rows]
    for suffix, when, answers in (("_before", "before", before), ("", "after", after)):
        matches = []
        for row, text in zip(rows, expected, strict=True):
            if text is not None:
                matches.append(row[when] == text)
        if matches:
            metrics[f"exact_match{suffix}"] = statistics.fmean(matches)
        metrics[f"stopped{suffix}"] = statistics.fmean(stopped for _, stopped in answers)
    return metrics
