"""A run's folder as one page: alarms, metrics, curves, answers side by side, lineage, options.

    python report.py outputs/quickstart               # writes outputs/quickstart/report.html
    python report.py outputs/lr1e-4 outputs/lr5e-4    # writes outputs/lr5e-4/compare.html

The folder is that of a chain or of one stage, finished or not; of two folders, the second is
compared with the first. The page loads nothing and runs no script. This file reads and computes;
report.html.j2 lays out.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core.run_folder import LogEntry, Stage, is_number, read_run
from core.yaml_files import dump_yaml

MAIN_CURVES = (  # shown at once, in this order; the others unfold
    "loss",
    "reward",
    "kl",
    "accuracy",
    "token_accuracy",
    "ranking_accuracy",
    "margin",
    "entropy",
    "learning_rate",
)
# What recipes call the answers in the rows of samples.jsonl and win_rate.jsonl: of an earlier
# model, of the trained one.
EARLIER_ANSWERS = ("before", "old", "baseline")
LATER_ANSWERS = ("completion", "answer", "after", "new")
MAX_ANSWER_LENGTH = 4000  # characters
MAX_PROMPTS = 12  # of those that a stage was the first to answer
MAX_POINTS = 100  # groups of neighbouring points in a curve


# -- figures ---------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row of a table: cells of (text, note below it), or a heading with a note beside it if there
    are no cells."""

    name: str
    cells: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def format_number(value: float | None) -> str:
    if value is None:
        return "–"
    size = abs(value)
    text = f"{value:,.0f}" if 1e4 <= size < 1e15 else f"{value:.4g}"
    return text.replace("-", "−")


def build_figures(
    groups: Mapping[str, dict[str, Stage]], labels: Sequence[str]
) -> tuple[list[str], list[Row]] | None:
    """(head, rows) of the metrics before and after each stage, of one run or of two, and the
    change."""
    head = [""]
    for label in labels:
        head += [f"{label} before".strip(), f"{label} after".strip()]
    head.append("change")
    rows: list[Row] = []
    for title, group in groups.items():
        metrics = []
        for label in labels:
            metrics.append(group[label].metrics if label in group else {})
        rows += figure_rows(title, metrics)
    return (head, rows) if rows else None


def figure_rows(title: str, runs: Sequence[Mapping[str, float]]) -> list[Row]:
    """Rows of the metrics of one stage in one run or in two. A metric of one run that has neither a
    value before nor an interval is named beside the title."""
    interval_ends = set()
    for metrics in runs:
        for name in metrics:
            interval_ends |= {f"{name}_low", f"{name}_high", f"{name}_n"}
    names: dict[str, None] = {}  # in order
    for metrics in runs:
        for key in metrics:
            if key not in interval_ends:
                names[key.removesuffix("_before")] = None

    first, last = runs[0], runs[-1]
    comparing = len(runs) == 2
    beside, rows = [], []
    for name in names:
        two_values = {f"{name}_before", f"{name}_low"} & first.keys()
        if not comparing and not two_values:
            value = format_number(first[name])
            beside.append(f"{name} {value}")
            continue
        cells = []
        for metrics in runs:
            cells += [metric_cell(metrics, f"{name}_before"), metric_cell(metrics, name)]
        old = first.get(name if comparing else f"{name}_before")
        change = format_change(old, last.get(name))
        cells.append((change, ""))
        rows.append(Row(name, cells))
    heading = Row(title, note=", ".join(beside))
    return [heading, *rows] if names else []


def metric_cell(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    """(value, its 95% interval and number of samples if they are known)."""
    note = ""
    if f"{name}_low" in metrics:
        low = format_number(metrics.get(f"{name}_low"))
        high = format_number(metrics.get(f"{name}_high"))
        n = format_number(metrics.get(f"{name}_n"))
        note = f"{low} to {high}, n {n}"
    return format_number(metrics.get(name)), note


def format_change(old: float | None, new: float | None) -> str:
    if old is None or new is None:
        return "–"
    change = format_number(new - old)
    return f"+{change}" if new > old else change


# -- curves ----------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 44, 320, 10, 146  # the plot inside a chart of 340 by 170


@dataclass
class Line:
    name: str
    look: str  # classes of the style sheet: a colour, and `dashed` for evaluations
    points: list[tuple[float, float]]  # (step, value)
    last: str = ""
    positions: list[tuple[str, str]] = field(default_factory=list)  # (x, y) in the chart

    @property
    def is_evaluation(self) -> bool:
        return "dashed" in self.look


@dataclass
class Chart:
    title: str
    lines: list[Line]
    x_ticks: list[tuple[str, str]]  # (position, label)
    y_ticks: list[tuple[str, str]]


@dataclass
class CurveGroup:
    """The charts of a stage: those shown at once, and those that unfold."""

    title: str
    main: list[Chart]
    more: list[Chart]


def build_curves(groups: Mapping[str, dict[str, Stage]]) -> list[CurveGroup]:
    """The charts of each stage, or of the same stage in two runs."""
    curve_groups = []
    for title, group in groups.items():
        charts = {}
        for name, lines in collect_lines(group).items():
            if any(len(line.points) > 1 for line in lines):
                charts[name] = build_chart(name, lines)
        main = [charts.pop(name) for name in MAIN_CURVES if name in charts]
        if main or charts:
            curve_groups.append(CurveGroup(title, main, list(charts.values())))
    return curve_groups


def collect_lines(group: Mapping[str, Stage]) -> dict[str, list[Line]]:
    """{title of a chart: its lines}: x and eval_x are in one chart, and so are chosen_x and
    rejected_x."""
    charts: dict[str, list[Line]] = {}
    comparing = len(group) > 1
    for run, (label, stage) in enumerate(group.items()):
        names = set().union(*stage.curves) - {"step", "epoch"}
        for name in sorted(names, key=evaluations_last):
            lines = charts.setdefault(re.sub("^(eval_)?(chosen_|rejected_)?", "", name), [])
            # Of two runs each has its colours; otherwise the lines of a chart take turns.
            colour = len(lines) % 4
            if comparing:
                colour = run + 2 if "rejected_" in name else run
            look = f"c{colour} dashed" if name.startswith("eval_") else f"c{colour}"
            points = points_of(stage, name)
            if points:
                line_name = f"{label} {name}".strip()
                lines.append(Line(line_name, look, points))
    return charts


def points_of(stage: Stage, name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, where it is a finite number."""
    points = []
    for row in stage.curves:
        value = row.get(name)
        if is_number(value) and math.isfinite(value):
            points.append((row["step"], value))
    return points


def evaluations_last(name: str) -> tuple[bool, str]:
    return name.startswith("eval_"), name


def build_chart(title: str, lines: list[Line]) -> Chart:
    """Lines with their positions in the chart, and round numbers at the axes."""
    steps, values = [], []
    for line in lines:
        steps += [step for step, _ in line.points]
        values += [value for _, value in line.points]
    first, last = min(steps), max(steps)
    y_numbers = round_numbers(min(values), max(values))
    bottom, top = y_numbers[0], y_numbers[-1]
    width = (last - first) or 1  # in steps
    height = top - bottom

    def x_of(step: float) -> str:
        x = LEFT + (RIGHT - LEFT) * (step - first) / width
        return f"{x:.1f}"

    def y_of(value: float) -> str:
        y = BOTTOM - (BOTTOM - TOP) * (value - bottom) / height
        return f"{y:.1f}"

    for line in lines:
        _, last_value = line.points[-1]
        line.last = format_number(last_value)
        for step, value in thin_out(line.points):
            line.positions.append((x_of(step), y_of(value)))
    x_ticks = []
    for step in round_numbers(first, last):
        if first <= step <= last and step == int(step):
            x_ticks.append((x_of(step), f"{step:g}"))
    y_ticks = [(y_of(value), f"{value:.6g}") for value in y_numbers]
    return Chart(title, lines, x_ticks, y_ticks)


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of a long curve the lowest and the highest of every few neighbours, so that no spike is
    lost."""
    size = math.ceil(len(points) / MAX_POINTS)
    visible: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        neighbours = points[start : start + size]
        lowest = min(neighbours, key=value_of)
        highest = max(reversed(neighbours), key=value_of)
        visible += sorted({lowest, highest})  # by step
    return visible


def value_of(point: tuple[float, float]) -> float:
    return point[1]


def round_numbers(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`, 1, 2 or 5 times a power of ten apart, at most
    about five."""
    span = (high - low) or abs(low) or 1
    smallest = span / 4.1
    power = 10.0 ** math.floor(math.log10(smallest))
    step = power
    for factor in (2, 5, 10):
        if step <= smallest:
            step = factor * power
    tolerance = 1e-6  # of a step, against rounding
    first = math.floor(low / step + tolerance)
    last = math.ceil(high / step - tolerance)
    last = max(last, first + 1)
    return [step * n for n in range(first, last + 1)]


# -- answers ---------------------------------------------------------------------------------------


@dataclass
class Answer:
    title: str  # stage, and when: 02_rl step 100
    text: str
    note: str  # its reward and other scores


@dataclass
class Card:
    """A prompt and all answers to it, of all stages."""

    first_stage: str
    prompt: str
    expected: str | None
    answers: dict[str, Answer] = field(default_factory=dict)


def build_answers(stages: Mapping[str, Stage]) -> tuple[list[Card], int] | None:
    """(cards, number of all prompts): the same held-out prompts answered by each stage, side by
    side."""
    cards: dict[str, Card] = {}
    for name, stage in stages.items():
        for row in first_and_last(stage.samples):
            card = find_card(cards, name, row)
            add_answers(card, name, row)
    chosen = []
    for name in stages:
        own = [card for card in cards.values() if card.first_stage == name]
        chosen += own[:MAX_PROMPTS]
    return (chosen, len(cards)) if cards else None


def first_and_last(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first and of the last evaluation, and those that belong to no step."""
    steps = [row["step"] for row in rows if "step" in row]
    if not steps:
        return list(rows)
    ends = (min(steps), max(steps))
    return [row for row in rows if "step" not in row or row["step"] in ends]


def find_card(cards: dict[str, Card], stage_name: str, row: Mapping[str, Any]) -> Card:
    """The card of a row's prompt, a new one for the first row that has it."""
    turns = row.get("prompt", row.get("question", ""))
    if not isinstance(turns, list):
        turns = [{"role": "user", "content": turns}]
    last_text = turns[-1]["content"]
    last_turn = last_text.strip()
    prompt = last_text
    if len(turns) > 1:
        texts = [f"{turn['role']}: {turn['content']}" for turn in turns]
        prompt = "\n\n".join(texts)
    # A chat is known by its last turn, since a stage may put a system turn of its own before it.
    # But two chats may end alike: then the second is known by all its turns.
    key = last_turn
    if len(turns) > 1 and last_turn in cards and cards[last_turn].prompt not in (prompt, last_turn):
        key = prompt
    if key not in cards:
        expected = row.get("expected", row.get("answer"))
        cards[key] = Card(stage_name, prompt, expected)
    return cards[key]


def add_answers(card: Card, stage_name: str, row: Mapping[str, Any]) -> None:
    """Add what a row has of answers, but no answer of the stage's input that the stage before gave
    already."""
    scores = []
    for name, value in row.items():
        if is_number(value) and name != "step":
            score = format_number(value)
            scores.append(f"{name} {score}")
    for key in (*EARLIER_ANSWERS, *LATER_ANSWERS):
        if key not in row or (key == "answer" and "expected" not in row):
            continue  # in a row without `expected`, `answer` is what is expected
        when = f"step {row['step']}" if key == "completion" else key
        when = row.get("when", when)
        text = row[key]["answer"] if key == "baseline" else row[key]
        known_texts = [answer.text for answer in card.answers.values()]
        if when in ("before", "old", "step 0") and text in known_texts:
            continue
        title = f"{stage_name} {when}"
        note = "" if key in EARLIER_ANSWERS else ", ".join(scores)
        card.answers[title] = Answer(title, text, note)


def cut(text: Any) -> str:
    """A text that is not too long for the page; a dash for none."""
    text = str(text or "–")
    if len(text) > MAX_ANSWER_LENGTH:
        return text[:MAX_ANSWER_LENGTH] + " …"
    return text


# -- lineage and options ---------------------------------------------------------------------------


def build_options(
    groups: Mapping[str, dict[str, Stage]], stages: Mapping[str, Stage]
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """(options in which two runs differ, (name, lineage, options) of each stage as YAML)."""
    rows: list[Row] = []
    for title, group in groups.items():
        runs = list(group.values())
        if len(runs) == 2:
            rows += differing_rows(title, *runs)
    texts = []
    for name, stage in stages.items():
        lineage = {"state": stage.state, **stage.lineage}
        texts.append((name, dump_yaml(lineage), dump_yaml(stage.config)))
    return rows, texts


def differing_rows(title: str, first: Stage, second: Stage) -> list[Row]:
    """Rows of the options, and of the lineage, that two runs of a stage do not have in common."""
    old_values = first.config | first.lineage
    new_values = second.config | second.lineage
    rows = []
    for name in old_values | new_values:
        old = format_option(old_values, name)
        new = format_option(new_values, name)
        if old != new and name != "output_dir":
            rows.append(Row(name, [(old, ""), (new, "")]))
    return [Row(title), *rows] if rows else []


def format_option(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], default=str) if name in values else "–"


# -- page ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One folder of the page."""

    label: str  # empty if the page is of one run
    name: str
    stages: list[Stage]
    alarms: list[LogEntry]

    @property
    def start(self) -> str:
        """The model that the first stage started from."""
        first = self.stages[0]
        parent = first.lineage.get("parent", {})
        named = first.config.get("model_name_or_path", "")
        return str(parent.get("model", named))


@dataclass
class Section:
    title: str
    content: Any = None
    error: str = ""  # why it cannot be shown


def write(*folders: str | Path) -> Path:
    """Write OUT/report.html, or of two runs OUT2/compare.html; returns its path. Raises ValueError
    if one is no run."""
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    labels = names
    if len(paths) == 1:
        labels = [""]
    elif names[0] == names[1]:
        labels = [str(path) for path in paths]
    runs = []
    for label, name, path in zip(labels, names, paths, strict=True):
        stages, alarms = read_run(path)
        runs.append(Run(label, name, stages, alarms))
    page = render(" / ".join(names), runs)
    file_name = "report.html" if len(paths) == 1 else "compare.html"
    path = paths[-1] / file_name
    # A reader, or a crash, meets the old page or the new one, never half of one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    return temporary.replace(path)


def render(title: str, runs: Sequence[Run]) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cut"] = cut
    return environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        labels=[run.label for run in runs],
        sections=build_sections(title, runs),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        plot={"left": LEFT, "right": RIGHT, "bottom": BOTTOM},
    )


def build_sections(title: str, runs: Sequence[Run]) -> list[Section]:
    """The parts of the page that have something to show. One odd file costs its section, not the
    page."""
    labels = [run.label for run in runs]
    groups = group_stages(title, runs)
    stages = {}
    for run in runs:
        for stage in run.stages:
            name = f"{run.label} {stage.name}".strip()
            stages[run.label if stage.name == run.label else name] = stage
    sections = [
        build_section("Alarms", build_alarms, runs),
        build_section("Figures", build_figures, groups, labels),
        build_section("Curves", build_curves, groups),
        build_section("Answers", build_answers, stages),
        build_section("Lineage and options", build_options, groups, stages),
    ]
    return [section for section in sections if section.content or section.error]


def build_section(title: str, build: Callable[..., Any], *arguments: Any) -> Section:
    try:
        return Section(title, build(*arguments))
    except Exception as error:
        return Section(title, error=f"{type(error).__name__}: {error}")


def group_stages(title: str, runs: Sequence[Run]) -> dict[str, dict[str, Stage]]:
    """{name of a stage: {label of a run: the stage in that run}}."""
    groups: dict[str, dict[str, Stage]] = {}
    for run in runs:
        for stage in run.stages:
            name = stage.name
            # The folders of two single stages may have two names: they are compared all the same.
            if name.split("/")[0] == run.name:
                name = title + name.removeprefix(run.name)
            groups.setdefault(name, {})[run.label] = stage
    return groups


def build_alarms(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(when and where, message) of the warnings and errors."""
    alarms = []
    for run in runs:
        for entry in run.alarms:
            heading = f"{entry.time} {entry.level} {entry.logger} {run.label}".strip()
            alarms.append((heading, entry.message))
    return alarms


# -- command line ----------------------------------------------------------------------------------


def main() -> None:
    """The command line. Exit status 2: invalid user input."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        return
    try:
        if len(arguments) not in (1, 2):
            raise ValueError(f"give the folder of a run, or two to compare; got {len(arguments)}")
        print(write(*arguments))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
