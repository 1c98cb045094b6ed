"""Read the folder of a run, finished or in progress: its stages, their records, and alarms.

Files that are missing, damaged, or half written by a run in progress are treated as empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from core.yaml_files import parse_yaml

UNFINISHED = ("running", "interrupted", "failed")
NEVER = "9"  # sorts after every time: everything in the folder is from an older run


@dataclass
class LogEntry:
    time: str  # 2026-11-28 13:05:09, local
    level: str
    logger: str
    message: str


@dataclass
class Stage:
    """The contents of a stage's folder."""

    name: str
    state: str  # done, running, interrupted, failed, waiting or skipped
    since: str  # when it began; older files are from an earlier run
    metrics: dict[str, float]
    config: dict[str, Any]
    curves: list[dict[str, Any]]  # rows of metrics.jsonl
    samples: list[dict[str, Any]]  # rows of samples.jsonl and win_rate.jsonl
    lineage: dict[str, Any]  # stage.json without its metrics


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def read_text(path: Path) -> str:
    """The text of a file, with marks for invalid UTF-8; empty if there is no file."""
    return path.read_text("utf-8", "replace") if path.is_file() else ""


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a .json or .yaml file; empty if the file is missing or damaged."""
    text = read_text(path)
    try:
        value = parse_yaml(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The mappings in a .jsonl file. Damaged lines, such as the last one of a run in progress, are
    skipped."""
    rows = []
    for line in read_text(path).split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def read_log(path: Path) -> list[LogEntry]:
    """The entries of our own loggers; a message may have several lines."""
    head = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([\w.]+):\s"
    # re.split gives the text before the first entry, then time, level, logger and message of each.
    parts = re.split(head, read_text(path), flags=re.MULTILINE)[1:]
    entries = []
    for n in range(0, len(parts), 4):
        time, level, logger, message = parts[n : n + 4]
        if logger.startswith("recipes"):
            entries.append(LogEntry(time, level, logger, message.strip()))
    return entries


def read_stage(
    folder: Path,
    name: str,
    state: str = "running",
    config: dict[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    since: str = "",
) -> Stage:
    """Read a stage's folder, ignoring files from before `since`, when the stage began."""
    record = read_mapping(folder / "stage.json")
    # Times are compared as text: the log has 2026-11-28 13:05:09, stage.json
    # 2026-11-28T13:05:09+0000.
    finished = str(record.get("finished", "")).replace("T", " ")
    if finished < since:
        record = {}
    metrics = record.get("metrics") or metrics or {}
    numbers = {name: value for name, value in metrics.items() if is_number(value)}
    # A stage outside a chain has no log entry with its start time.
    if record and finished and not since:
        took = timedelta(seconds=2 + numbers.get("seconds", 0))
        since = str(datetime.fromisoformat(finished[:19]) - took)

    def rows_of(file_name: str) -> list[dict[str, Any]]:
        path = folder / file_name
        # With a valid stage.json all files are from the same run; else the file's date decides.
        if not record and path.exists():
            changed = datetime.fromtimestamp(path.stat().st_mtime)
            if str(changed) < since:
                return []
        return read_rows(path)

    curves = rows_of("metrics.jsonl")
    lineage = dict(record)
    for key in ("stage", "success", "metrics", "fingerprint", "files", "evaluation"):
        lineage.pop(key, None)
    return Stage(
        name=name,
        state="done" if record else state,
        since=since,
        metrics=numbers or metrics_so_far(curves),
        config=config or read_mapping(folder / "stage_config.yaml"),
        curves=curves,
        samples=rows_of("samples.jsonl") + rows_of("win_rate.jsonl"),
        lineage=lineage,
    )


def metrics_so_far(curves: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The first and the last evaluation of a stage in progress, as x_before and x."""
    metrics: dict[str, float] = {}
    for row in curves:
        for name, value in row.items():
            if name.startswith("eval_") and is_number(value):
                before = f"{name}_before"
                metrics[name if before in metrics else before] = value
    return metrics


def read_run(folder: Path) -> tuple[list[Stage], list[LogEntry], str]:
    """(stages, alarms, command) of the run in a folder. Raises ValueError if there is none.

    A stage's lineage keeps its own command only if it differs from that of the run.
    """
    chain = read_mapping(folder / "pipeline.json")
    of_a_stage = ("stage.json", "metrics.jsonl", "training.log")
    # The log is enough: a run that has just started has no other file.
    if not chain and not any((folder / name).exists() for name in of_a_stage):
        raise ValueError(
            f"{folder} is not the folder of a run: it has neither pipeline.json nor "
            f"{', '.join(of_a_stage)}"
        )
    log = read_log(folder / ("pipeline_training.log" if chain else "training.log"))
    # The folder of a single stage is read like a chain of one unnamed stage.
    failed = bool(log) and log[-1].level == "ERROR"
    default_state = {"failed" if failed else "running": ""}
    states = {name: state for state, name in chain.get("state", default_state).items()}
    plan = chain.get("plan", {"": {}})
    results = iter(chain.get("results", ()))
    begun = start_times(log)

    stages = []
    for name, config in plan.items():
        # pipeline.json has the results of the enabled stages only, in order.
        result = next(results, None) if config.get("enabled") else None
        since = begun.get(name, "")
        if result:
            state = "done" if result["success"] else "failed"
        elif name in states:
            state = states[name]
        else:
            state = "waiting" if config["enabled"] else "skipped"
            since = NEVER
        metrics = (result or {}).get("metrics")
        label = name or folder.resolve().name
        stage = read_stage(folder / name, label, state, config, metrics, since)
        stages.append(stage)
        stages += read_contained_stages(folder / name, stage, log)
    # The log is appended to by all runs in a folder; older alarms belong to earlier runs.
    first = min(stage.since for stage in stages)
    alarms = [entry for entry in log if entry.level in ("WARNING", "ERROR") and entry.time >= first]
    made_by = chain or stages[0].lineage
    command = str(made_by.get("command") or "")
    for stage in stages:
        if stage.lineage.get("command") in ("", command):
            del stage.lineage["command"]
    return stages, alarms, command


def start_times(log: Sequence[LogEntry]) -> dict[str, str]:
    """{folder of a stage: its last start time}, from entries such as `2/4 02_dpo`."""
    times = {}
    for entry in log:
        begins = re.fullmatch(r"\d+/\d+ (\S+)", entry.message)
        if begins:
            times[begins[1]] = entry.time
    return times


def read_contained_stages(folder: Path, stage: Stage, log: Sequence[LogEntry]) -> list[Stage]:
    """The recipes that ran as parts of a stage, as in rlaif, each in a subfolder of the stage's
    folder."""
    parts = []
    for path in sorted(folder.glob("*/metrics.jsonl")):
        name = path.parent.name
        if name.startswith("previous."):  # results of earlier runs
            continue
        reused = any(f"{name} is finished already" in entry.message for entry in log)
        # A part that an earlier attempt finished is older than the stage, but belongs to it.
        since = "" if reused else stage.since
        part = read_stage(path.parent, f"{stage.name}/{name}", stage.state, since=since)
        if part.lineage or stage.state in UNFINISHED:
            parts.append(part)
    return parts
