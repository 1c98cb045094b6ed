"""Log a step, with a line in metrics.jsonl and a shorter one on the screen, and truncate logs when
a run is resumed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

from core.files import atomic_writer
from core.runtime import logger
from core.screen import Pace

# Files of a run that grow line by line.
LOG_FILES = ("metrics.jsonl", "samples.jsonl")
# Formats of metrics on the screen; the others are shown as "name value" with four digits.
SCREEN_FORMATS = {"learning_rate": "lr {:.2g}", "tokens_per_s": "{:,.0f} tokens/s"}


def count_lines(folder: Path) -> dict[str, int]:
    """The number of lines in each of LOG_FILES."""
    return {name: len(complete_lines(folder / name)) for name in LOG_FILES}


def truncate_logs(folder: Path, counts: Mapping[str, int]) -> None:
    """Truncate each of LOG_FILES to its number of lines in `counts`, or 0 if it is not there.

    A resumed run writes again what the interrupted run wrote after its last checkpoint.
    """
    for name in LOG_FILES:
        lines = complete_lines(folder / name)
        with atomic_writer(folder / name) as file:
            file.writelines(lines[: counts.get(name, 0)])


def complete_lines(path: Path) -> list[str]:
    """The lines of a file, without a half-written last line that has no line break."""
    if not path.exists():
        return []
    return re.findall(r".*\n", path.read_text(encoding="utf-8"))


def log_step(
    folder: Path,
    step: int,
    steps: int,
    logs: Mapping[str, float],
    not_on_screen: str,
    pace: Pace | None = None,
) -> None:
    """Append `logs` to metrics.jsonl, except NaN, which is not JSON, and show them, except names
    that match the regular expression `not_on_screen`."""
    known = {name: value for name, value in logs.items() if not math.isnan(value)}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, **known}) + "\n")
    shown = []
    for name, value in logs.items():
        if re.fullmatch(not_on_screen, name):
            continue
        template = SCREEN_FORMATS.get(name, f"{name} {{:.4g}}")
        shown.append(template.format(value))
    if pace is not None:
        shown.append(pace.describe(step, steps))
    width = len(str(steps))
    is_evaluation = any(name.startswith("eval_") for name in logs)
    # core/screen.py decides by these what to show.
    how = {"is_step": True, "stays": is_evaluation or step == steps}
    line = "  ".join(part for part in shown if part)
    logger.info(
        "step %*d/%d  %s",
        width,
        step,
        steps,
        line,
        extra=how,
    )
