"""A run's folder as one page: alarms, lineage, figures before and after, curves, answers, time, versions, options.

    python report.py outputs/quickstart               # writes outputs/quickstart/report.html
    python report.py outputs/lr1e-4 outputs/lr5e-4    # writes outputs/lr5e-4/compare.html: the second against the first

The folder is that of a chain or of one stage, finished, failed or still running. Nothing of the project is imported: a
page shows what the files say. It loads nothing and runs no script, so it can be read offline and sent as it is.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import Counter
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Sequence

import yaml

MAIN = ("loss", "reward", "kl", "accuracy", "token_accuracy", "ranking_accuracy", "margin", "entropy", "learning_rate")
TOOK = re.compile("steps|seconds|.*_(runtime|per_s|per_second|calls|cached|missing|tokens_in|tokens_out|cost)|.*memory.*")
RECORD = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([\w.]+): ", re.M)  # one in a log
VERDICTS = {"right": ("wrong", "right"), "exact_match": ("not exact", "exact"), "win": ("loses", "tie", "wins"),
            "numeric_match": ("wrong number", "right number")}  # of an answer, from 0 to 1
STYLE = """:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #20242a; --soft: #626b77; --line: #e2e4e8;
--warm: #fff5e0; --c0: #2c6cb5; --c1: #b9581a; --c2: #27795a; --c3: #8659ad; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --page: #131519; --card: #1a1d22; --ink: #e3e6ea; --soft: #9aa3af;
--line: #2e333b; --warm: #2d2617; --c0: #72abea; --c1: #f0a15f; --c2: #6fc799; --c3: #c5a3e8; --bad: #f28b82 } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 1120px; padding: 28px 20px 80px; background: var(--page);
color: var(--ink); font: 15px/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1, p { margin: 2px 0 } h1 { font-size: 1.6rem; line-height: 1.3 } h2 { margin: 44px 0 14px; font-size: 1.2rem }
h3 { margin: 26px 0 10px; font-size: 1rem } small, .soft { color: var(--soft); font-size: .87rem } nav { display: flex;
flex-wrap: wrap; gap: 2px 20px; margin-top: 14px; padding: 8px 0; border: solid var(--line); border-width: 1px 0 }
a, summary { color: var(--c0); text-decoration: none; font-size: .9rem } summary { cursor: pointer; margin: 14px 0 8px }
.done, .good { color: var(--c2) } .running { color: var(--c0) } .failed { color: var(--bad) }
.alarm { margin: 8px 0; padding: 9px 14px; border-left: 3px solid var(--c1); background: var(--warm); white-space: pre-line }
ol { list-style: none; margin: 0 0 0 6px; padding: 0 } li { position: relative; padding: 0 0 18px 24px; border-left: 2px solid
var(--line) } li:last-child { border-color: transparent } li::before { content: ""; position: absolute; left: -7px; top: 6px;
width: 12px; height: 12px; border-radius: 50%; background: currentColor } li > * { color: var(--ink) }
.box, figure, article { border: 1px solid var(--line); border-radius: 8px; background: var(--card) } .box { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; overflow-wrap: normal } td, th { padding: 6px 14px;
text-align: right; vertical-align: top; font-weight: 400; border-top: 1px solid var(--line); white-space: nowrap }
thead th { border: 0; color: var(--soft) } th:first-child { text-align: left; position: sticky; left: 0;
background: var(--card) } th[colspan] { font-weight: 600; padding-top: 16px } td small { display: block }
.words td { text-align: left; white-space: normal; min-width: 9rem; overflow-wrap: anywhere } figure { margin: 0; padding: 12px 14px 6px }
.charts, .answers { display: grid; gap: 14px 20px; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)) }
figcaption b { display: block } figcaption span { margin-right: 12px; white-space: nowrap } i { display: inline-block;
width: 16px; margin-right: 5px; border-top: 2.5px solid; vertical-align: 4px } i.dashed { border-top-style: dashed }
svg { display: block; width: 100%; margin-top: 6px; font-size: 10.5px; overflow: visible } polyline { fill: none;
stroke: currentColor; stroke-width: 1.8 } polyline.dashed { stroke-dasharray: 5 4 } circle { fill: currentColor }
text { fill: var(--soft) } line { stroke: var(--line) } .c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 {
color: var(--c2) } .c3 { color: var(--c3) } article { margin: 12px 0; padding: 14px 16px } .answers { margin-top: 12px }
.answers > div { border-left: 2px solid var(--line); padding-left: 12px } .text { white-space: pre-wrap; overflow-y: auto;
unicode-bidi: isolate; max-height: 17em } pre { margin: 0; padding: 12px 16px; font-size: .82rem; white-space: pre-wrap }"""


# ---- Reading: what a folder says, however far the run has come -------------------------------------------------------
def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_mapping(text: str, parse: Callable = json.loads) -> dict:
    """The mapping that a text holds; empty where there is none, as in a line that is not yet whole."""
    try:
        value = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def read_answers(rows: list[dict]) -> Iterable[tuple]:
    """(prompt, expected, when, text, verdict) of the rows of samples.jsonl and win_rate.jsonl, whichever recipe's."""
    steps = [row["step"] for row in rows if "step" in row]
    for row in rows:
        said = [words[round(row[key] * (len(words) - 1))] for key, words in VERDICTS.items() if row.get(key) is not None]
        said = ", ".join(said + [f"reward {number(row['reward'])}"] * ("reward" in row))
        expected, after = row.get("expected", row.get("answer")), row.get("after", row.get("new"))
        if "completion" in row:  # rl: of its evaluations the first and the last
            texts = [(f"step {row['step']}" if row["step"] else "before", row["completion"], said)]
            texts = texts if row["step"] in (min(steps), max(steps)) else []
        elif "when" in row:  # cot_distillation
            texts = [(row["when"], row["answer"], said)]
        elif after is None:  # evaluate
            texts = [("baseline", row.get("baseline", {}).get("answer"), ""), ("answer", row.get("answer"), said)]
        else:  # sft, rlaif
            texts = [("before", row.get("before", row.get("old")), ""),
                     ("after", after, said or "as expected" * (after == expected))]
        prompt = row.get("prompt", row.get("question"))
        yield from ((prompt, expected, when, text, verdict) for when, text, verdict in texts if text is not None)


def read_stage(folder: Path, name: str, state: str = "", config: dict | None = None, result: dict | None = None,
               since: str = "") -> SimpleNamespace:
    """What a stage's folder says. Of a chain's, `state`, `config`, `result` and `since`, when it began, are the chain's
    words; what the folder has from before is of an older run."""
    record, result = read_mapping(read_text(folder / "stage.json")) if state in ("", "done") else {}, result or {}
    metrics = {**(record.get("metrics") or result.get("metrics") or {})}
    if record and not since:
        began = datetime.fromisoformat(record["finished"][:19]) - timedelta(seconds=2 + metrics.get("seconds", 0))
        since = f"{began:%Y-%m-%d %H:%M:%S}"
    new = lambda path: record or f"{datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M:%S}" >= since
    rows = {path.stem: [row for row in map(read_mapping, read_text(path).split("\n")) if row]
            for path in folder.glob("*.jsonl") if path.stem in ("metrics", "samples", "win_rate") and new(path)}
    curves = rows.pop("metrics", [])
    for key, value in [item for row in curves for item in row.items()] if not metrics or state == "running" else ():
        if key.startswith("eval_"):  # not yet at its end: the first and the last evaluation
            metrics[key if f"{key}_before" in metrics else f"{key}_before"] = value
    parts = RECORD.split(read_text(folder / "training.log"))[1:]
    log = [(time, level, text.strip()) for time, level, logger, text in zip(*(parts[n::4] for n in range(4)))
           if logger.split(".")[0] == "recipes" and time >= since]
    alarms, error = [entry for entry in log if entry[1] in ("WARNING", "ERROR")], result.get("error_message")
    alarms += [("", "ERROR", error)] if error and not any(error in text for *_, text in alarms) else []
    state = state or ("done" if record else "failed" if log and log[-1][1] == "ERROR" else "running")
    if state == "running" and since:
        metrics["seconds"] = (datetime.now() - datetime.fromisoformat(since)).total_seconds()
    config = config or read_mapping(read_text(folder / "stage_config.yaml"), yaml.safe_load)
    return SimpleNamespace(name=name, state=state, config=config, record=record, metrics=metrics, curves=curves, since=since,
                           alarms=alarms, answers=[*read_answers([row for some in rows.values() for row in some])])


def read_run(folder: Path) -> SimpleNamespace:
    """The run in a folder. Raises ValueError if there is none."""
    chain, stages = read_mapping(read_text(folder / "pipeline.json")), []
    if not (chain or any((folder / file).exists() for file in ("stage.json", "metrics.jsonl", "training.log"))):
        raise ValueError(f"{folder}: no run here, neither pipeline.json nor stage.json, metrics.jsonl, training.log")
    log, results = read_text(folder / "pipeline_training.log"), iter(chain.get("results", ()))
    begun = {name: at for at, name in re.findall(r"^(\S+ \S+),\d+ INFO recipes: \n\d+/\d+ (\S+)$", log, re.M)}
    for name, config in chain.get("plan", {"": {}}).items():
        result = next(results, None) if config.get("enabled") else None
        state = "done" if result and result["success"] else "failed" if result else "running"
        if chain and not result and chain["state"].get("running") != name:
            state, begun[name] = "waiting" if config["enabled"] else "skipped", "9"  # its folder is of an older run
        stages.append(stage := read_stage(folder / name, name or folder.resolve().name, state if chain else "", config,
                                          result, begun.get(name, "")))
        for file in sorted((folder / name).glob("*/metrics.jsonl")):  # rlaif contains other recipes
            part = read_stage(file.parent, f"{stage.name}/{file.parent.name}")
            part.alarms, ended = [], part.record.get("finished", "")[:19].replace("T", " ")  # the stage has the alarms
            stages += [part] if (ended >= stage.since if ended else stage.state in ("running", "failed")) else []
    state = next(iter(chain["state"]), "") if chain else stages[0].state
    return SimpleNamespace(folder=folder, stages=stages, state=state.replace("finished", "done"), options=chain.get("config"))


# ---- Showing: whatever comes from a file passes `escape` -------------------------------------------------------------
def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else escape(str(value))
    size = abs(value)
    places = ",.0f" if size == value // 1 and size >= 10 or 1e4 < size < 1e9 else ".3f" if 0.01 <= size < 1e9 or not size else ".2e"
    return f"{value:{places}}".replace("-", "−")


def duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes > 59 else f"{minutes} min {seconds % 60:.0f} s"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], look: str = "") -> str:
    """A table of ready cells in a box that scrolls by itself. A row of one cell heads those after it."""
    head = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th{' colspan=9' * (not cells)}>{first}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
                   for first, *cells in rows)
    return f'<div class=box tabindex=0><table class="{look}"><thead><tr>{head}</tr></thead>{body}</table></div>' if body else ""


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, 1, 2 or 5 times a power of ten apart."""
    low, high = (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * times for times in (1, 2, 5, 10) if power * times * 4.001 >= high - low)
    return [step * n for n in range(math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6) + 1)]


def chart(title: str, lines: list[tuple[str, str, list]]) -> str:
    """An inline SVG of lines (name, look, points); the legend has the last value of each."""
    xs, ys = zip(*(point for *_, points in lines for point in points))
    left, right, up, legend = min(xs), max(xs), ticks(min(ys), max(ys)), ""
    x_at = lambda x: f"{44 + 284 * (x - left) / (right - left or 1):.1f}"
    y_at = lambda y: f"{146 - 136 * (y - up[0]) / (up[-1] - up[0]):.1f}"
    svg = "".join(f"<line x1=44 x2=328 y1={y_at(y)} y2={y_at(y)} /><text x=38 y={y_at(y)} dy=3.5 text-anchor=end>"
                  f"{f'{y:.6g}'.replace('-', '−')}</text>" for y in up)
    across = [x for x in ticks(left, right) if left <= x <= right and x == int(x)]
    svg += "".join(f"<text x={x_at(x)} y=164 text-anchor=middle>{'step ' * (x == left)}{x:g}</text>" for x in across)
    for name, look, points in lines:
        size = math.ceil(len(points) / 100)  # of a long run the lowest and the highest of every few points
        some = [sorted(points[n : n + size], key=lambda point: point[1]) for n in range(0, len(points), size)]
        some = [point for group in some for point in sorted({group[0], group[-1]})]
        svg += f'<polyline class="{look}" points="{" ".join(f"{x_at(x)},{y_at(y)}" for x, y in some)}" />'
        svg += "".join(f'<circle class="{look}" r=2.6 cx={x_at(x)} cy={y_at(y)} />' for x, y in some if "dashed" in look)
        legend += f'<span class=soft><i class="{look}"></i>{escape(name)} {number(points[-1][1])}</span>'
    return (f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>"
            f'<svg viewBox="0 0 340 170" role=img aria-label="{escape(title)} by step">{svg}</svg></figure>')


def curves(group: list[tuple[str, SimpleNamespace]]) -> str:
    """Charts of a stage, or of the same stage in two runs: x and eval_x in one, and chosen_x with rejected_x."""
    charts: dict[str, list] = {}
    for run, (label, stage) in enumerate(group):
        for name in sorted({*().union(*stage.curves)} - {"step", "epoch"}, key=lambda name: (name[:5] == "eval_", name)):
            lines = charts.setdefault(re.sub("^(eval_)?(chosen_|rejected_)?", "", name), [])
            points = [(row["step"], row[name]) for row in stage.curves if isinstance(row.get(name), int | float)
                      and math.isfinite(row[name])]
            colour = run + 2 * ("rejected_" in name) if len(group) > 1 else len(lines) % 4
            lines += [(f"{label} {name}", f"c{colour}" + " dashed" * (name[:5] == "eval_"), points)] if points else []
    charts = {title: chart(title, lines) for title, lines in charts.items() if any(len(line[2]) > 1 for line in lines)}
    shown = "".join(charts.pop(title) for title in MAIN if title in charts)
    more = f"<details><summary>{len(charts)} more</summary><div class=charts>{''.join(charts.values())}</div></details>"
    return f"<h3>{escape(group[0][1].name)}</h3><div class=charts>{shown}</div>{more * bool(charts)}" if shown else ""


def figures(group: list[tuple[str, SimpleNamespace]]) -> list[list[str]]:
    """Rows of what a stage measured before and after, or of the same in two runs, and the difference."""
    known = [{k: v for k, v in stage.metrics.items() if isinstance(v, int | float)} for _, stage in group]
    ends = {f"{name}_{end}" for one in known for name in one for end in ("low", "high", "n")}
    rows = [[escape(group[-1][1].name)]]
    for name in dict.fromkeys(key.removesuffix("_before") for one in known for key in one if key not in ends):
        found = [[one.get(f"{key}{end}") for end in ("", "_low", "_high", "_n")]
                 for one in known for key in (f"{name}_before", name) if not TOOK.fullmatch(name)]
        cells = [number(value) + f"<small>{number(low)} to {number(high)}, n {number(n)}</small>" * (low is not None)
                 for value, low, high, n in found]
        (a, a_low, a_high, _), (b, b_low, b_high, _) = found[1 - len(found) % 4 // 2 :: 2][-2:] or [[None] * 4] * 2
        change = "–" if None in (a, b) else f"{b - a:+.3f}"
        if None not in (a, b, a_low, b_low):  # as of independent samples (Newcombe 1998, method 10)
            low, high = b - a - math.hypot(b - b_low, a_high - a), b - a + math.hypot(b_high - b, a - a_low)
            change += f"<small>{number(low)} to {number(high)}</small>"
        rows += [[escape(name), *cells, change.replace("-", "−")]] if found else []
    return rows[:: len(rows) > 1 or 2] if len(rows) > 1 else []
