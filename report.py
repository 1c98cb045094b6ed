"""A run's folder as one page: alarms, metrics, curves, answers side by side, lineage, options.

    python report.py OUT                     # writes OUT/report.html
    python report.py OUT1 OUT2 OUT3          # compares them, writes OUT3/compare.html
    python report.py OUT1 OUT2 --output=FILE

A folder is that of a chain or of one stage, finished or not; any number of them are compared. The
page loads nothing and runs no script. This file reads and computes; report.html.j2 lays out.
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
from markupsafe import Markup, escape

from core.charts import BOTTOM, LEFT, RIGHT, Chart, Line, Point, build_chart
from core.metrics import Metric, find_best, find_metric, format_number, is_change, judge_change
from core.run_folder import LogEntry, Stage, is_number, read_run
from core.screen import show_controls
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
SAMPLED = ("best", "worst")  # kinds of rows of RL that are no answers to held-out prompts
MAX_ANSWER_LENGTH = 4000  # characters
MAX_PROMPTS = 12  # of those that a stage was the first to answer
REFERENCE_ANSWERS = ("expected", "chosen", "rejected")  # what the data has to a prompt
# Options and records that differ between any two runs.
NOT_COMPARED = ("output_dir", "command", "finished", "model_path", "artifacts")


# -- figures ---------------------------------------------------------------------------------------


@dataclass
class Cell:
    text: str
    mark: str = ""  # better, worse or best
    notes: list[str] = field(default_factory=list)  # below the text


@dataclass
class Row:
    """A row of a table, or a heading if there are no cells."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    meaning: str = ""


def build_figures(
    groups: Mapping[str, dict[str, Stage]], labels: Sequence[str]
) -> tuple[list[str], list[Row]] | None:
    """(head, rows) of the metrics of each stage: of one run those before and after it and the
    change, of several runs the final ones side by side."""
    rows: list[Row] = []
    for title, group in groups.items():
        if len(labels) == 1:
            rows += change_rows(title, group[labels[0]])
        else:
            stages = [group.get(label) for label in labels]
            rows += comparison_rows(title, stages)
    head = ["", "before", "after", "change"]
    if len(labels) > 1:
        head = ["", *labels]
    return (head, rows) if rows else None


def metric_names(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """The metrics in order, without those before training and the ends of intervals. What is
    measured once, such as the speed, comes last."""
    parts = set()
    for metrics in runs:
        for name in metrics:
            parts |= {f"{name}_low", f"{name}_high", f"{name}_n"}
    names: dict[str, bool] = {}  # to whether it is a result
    for metrics in runs:
        for key in metrics:
            if key not in parts:
                name = key.removesuffix("_before")
                is_result = f"{name}_before" in metrics or f"{name}_low" in metrics
                names[name] = names.get(name, False) or is_result
    return [name for name in names if names[name]] + [name for name in names if not names[name]]


def change_rows(title: str, stage: Stage) -> list[Row]:
    """Rows of the metrics of a stage before and after it."""
    rows = []
    for name in metric_names([stage.metrics]):
        metric = find_metric(name, stage.config)
        old = stage.metrics.get(f"{name}_before")
        new = stage.metrics.get(name)
        cells = [
            metric_cell(stage.metrics, f"{name}_before"),
            metric_cell(stage.metrics, name),
            change_cell(metric, old, new),
        ]
        rows.append(Row(name, cells, str(metric or "")))
    return [Row(title), *rows] if rows else []


def comparison_rows(title: str, stages: Sequence[Stage | None]) -> list[Row]:
    """Rows of the final metrics of a stage in several runs, some of which may not have it."""
    runs = [stage.metrics if stage else {} for stage in stages]
    options: dict[str, Any] = {}
    for stage in stages:
        options |= stage.config if stage else {}
    rows = []
    for name in metric_names(runs):
        metric = find_metric(name, options)
        best = find_best(metric, [metrics.get(name) for metrics in runs])
        cells = []
        for number, metrics in enumerate(runs):
            cell = metric_cell(metrics, name)
            if f"{name}_before" in metrics:
                before = format_number(metrics[f"{name}_before"])
                cell.notes.append(f"before {before}")
            if number in best:
                cell.mark = "best"
            cells.append(cell)
        rows.append(Row(name, cells, str(metric or "")))
    return [Row(title), *rows] if rows else []


def metric_cell(metrics: Mapping[str, float], name: str) -> Cell:
    """A value, with its 95% interval and number of samples if they are known."""
    cell = Cell(format_number(metrics.get(name)))
    if f"{name}_low" in metrics:
        low = format_number(metrics.get(f"{name}_low"))
        high = format_number(metrics.get(f"{name}_high"))
        n = format_number(metrics.get(f"{name}_n"))
        cell.notes.append(f"{low} to {high}, n {n}")
    return cell


def change_cell(metric: Metric | None, old: float | None, new: float | None) -> Cell:
    if old is None or new is None:
        return Cell(format_number(None))
    if not is_change(old, new):
        return Cell("0")
    change = format_number(new - old)
    sign = "+" if new > old else ""
    return Cell(sign + change, judge_change(metric, old, new))


# -- curves ----------------------------------------------------------------------------------------


@dataclass
class CurveGroup:
    """The charts of a stage: those shown at once, and those that unfold."""

    title: str
    main: list[Chart]
    more: list[Chart]


def build_curves(groups: Mapping[str, dict[str, Stage]], labels: Sequence[str]) -> list[CurveGroup]:
    """The charts of each stage, in which the curves of several runs lie over each other."""
    curve_groups = []
    for title, group in groups.items():
        charts = {}
        for name, lines in collect_lines(group, labels).items():
            if any(len(line.points) > 1 for line in lines):
                notes = explain_curves(name, group)
                charts[name] = build_chart(name, notes, lines)
        main = [charts.pop(name) for name in MAIN_CURVES if name in charts]
        if main or charts:
            curve_groups.append(CurveGroup(title, main, list(charts.values())))
    return curve_groups


def collect_lines(group: Mapping[str, Stage], labels: Sequence[str]) -> dict[str, list[Line]]:
    """{title of a chart: its lines}. Of several runs, each has its colour and its dashes."""
    charts: dict[str, list[Line]] = {}
    comparing = len(labels) > 1
    for label, stage in group.items():
        names = set().union(*stage.curves) - {"step", "epoch"}
        for name in sorted(names, key=evaluations_last):
            points = points_of(stage, name)
            if not points:
                continue
            lines = charts.setdefault(chart_of(name, comparing), [])
            number = labels.index(label) if comparing else len(lines)
            is_evaluation = name.startswith("eval_")
            # Of several runs the chart's title names the metric, and the legend the run.
            line_name = name
            if comparing:
                line_name = f"{label} held out" if is_evaluation else label
            lines.append(Line(line_name, number, is_evaluation, points))
    return charts


def chart_of(name: str, comparing: bool) -> str:
    """x and eval_x are in one chart; of a single run chosen_x and rejected_x are too."""
    prefixes = "^(eval_)?" if comparing else "^(eval_)?(chosen_|rejected_)?"
    return re.sub(prefixes, "", name)


def explain_curves(title: str, group: Mapping[str, Stage]) -> list[tuple[str, str]]:
    """What the curves of a chart mean: (name, meaning), without a name where it is the title."""
    notes = []
    for name in (title, f"chosen_{title}", f"rejected_{title}"):
        for stage in group.values():
            metric = find_metric(name, stage.config)
            if metric and any(name in row or f"eval_{name}" in row for row in stage.curves):
                note = ("" if name == title else name, str(metric))
                if note not in notes:
                    notes.append(note)
    return notes


def points_of(stage: Stage, name: str) -> list[Point]:
    """(step, value) of a metric, where it is a finite number."""
    points = []
    for row in stage.curves:
        value = row.get(name)
        if is_number(value) and math.isfinite(value):
            points.append((row["step"], value))
    return points


def evaluations_last(name: str) -> tuple[bool, str]:
    return name.startswith("eval_"), name


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
    references: dict[str, str] = field(default_factory=dict)  # answers in the data: {"chosen": ...}
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
    """The rows of the first and of the last evaluation, and those that belong to no step. What RL
    sampled in training is shown only where nothing else is."""
    held_out = [row for row in rows if row.get("kind") not in SAMPLED]
    rows = held_out or rows
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
    card = cards.setdefault(key, Card(stage_name, prompt))
    references = {name: row[name] for name in REFERENCE_ANSWERS if row.get(name)}
    if "expected" not in row and row.get("answer"):
        references["expected"] = row["answer"]
    card.references = references | card.references
    return card


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
        if row.get("kind") in SAMPLED:
            when = f"{when} {row['kind']}"
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
    groups: Mapping[str, dict[str, Stage]], stages: Mapping[str, Stage], labels: Sequence[str]
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """(options in which runs differ, (name, lineage, options) of each stage as YAML)."""
    rows: list[Row] = []
    for title, group in groups.items():
        rows += differing_rows(title, [group.get(label) for label in labels])
    texts = []
    for name, stage in stages.items():
        lineage = {"state": stage.state, **stage.lineage}
        texts.append((name, dump_yaml(lineage), dump_yaml(stage.config)))
    return rows, texts


def differing_rows(title: str, stages: Sequence[Stage | None]) -> list[Row]:
    """Rows of the options, and of the lineage, that the runs of a stage do not have in common."""
    values_of_runs = [stage.config | stage.lineage if stage else None for stage in stages]
    names: dict[str, None] = {}  # in order
    for values in values_of_runs:
        names |= dict.fromkeys(values or ())
    rows = []
    for name in names:
        texts = [format_option(values or {}, name) for values in values_of_runs]
        # A run without the stage differs in nothing.
        with_stage = {
            text for text, values in zip(texts, values_of_runs, strict=True) if values is not None
        }
        if len(with_stage) > 1 and name not in NOT_COMPARED:
            rows.append(Row(name, [Cell(text) for text in texts]))
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
    command: str  # that made it, if it was one

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


def write(*folders: str | Path, output: str | Path | None = None) -> Path:
    """Write `output`, by default OUT/report.html, or compare.html in the last of several folders;
    returns its path. Raises ValueError if a folder is no run."""
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    runs = []
    for label, name, path in zip(choose_labels(paths, names), names, paths, strict=True):
        stages, alarms, command = read_run(path)
        runs.append(Run(label, name, stages, alarms, command))
    title = " / ".join(names) if len(names) <= 3 else f"{len(names)} runs"
    page = render(title, runs)
    file_name = "report.html" if len(paths) == 1 else "compare.html"
    path = Path(output) if output else paths[-1] / file_name
    # A reader, or a crash, meets the old page or the new one, never half of one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    return temporary.replace(path)


def choose_labels(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """What tells the runs apart: their folders' names, or paths; nothing if there is only one."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("the same folder is given twice; give each run once")
    if len(paths) == 1:
        return [""]
    if len(set(names)) < len(names):
        return [str(path) for path in paths]
    return list(names)


def render(title: str, runs: Sequence[Run]) -> str:
    """The page as HTML; every text in it is escaped, and its control characters are shown."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        finalize=show_control_characters,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cut": cut, "breakable": breakable, "number": format_number}
    return environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        labels=[run.label for run in runs],
        sections=build_sections(title, runs),
        written=f"{datetime.now():%Y-%m-%d %H:%M}",
        plot={"left": LEFT, "right": RIGHT, "bottom": BOTTOM},
    )


def show_control_characters(value: Any) -> Any:
    return show_controls(value) if isinstance(value, str) else value


def breakable(name: str) -> Markup:
    """A name that may be broken after each underscore, so that a table fits a narrow screen."""
    return escape(name).replace("_", Markup("_<wbr>"))


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
        build_section("Curves", build_curves, groups, labels),
        build_section("Answers", build_answers, stages),
        build_section("Lineage and options", build_options, groups, stages, labels),
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


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """(folders, output file) of a command line. Raises ValueError."""
    folders, output = [], None
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not argument.startswith("-"):
            folders.append(argument)
        elif name == "--output" and value:
            output = value
        else:
            raise ValueError(f"unknown option {argument}; there is --output=FILE")
    if not folders:
        raise ValueError("give the folder of a run, or of several to compare")
    return folders, output


def main() -> None:
    """The command line. Exit status 2: invalid user input."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.strip())
        return
    try:
        folders, output = read_arguments(arguments)
        print(write(*folders, output=output))
    except (ValueError, OSError) as error:
        print(show_controls(f"error: {error}"), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
