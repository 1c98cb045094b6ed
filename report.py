"""A report of a run on one page: alarms, metrics, curves, answers side by side, lineage, options.

    python report.py OUT                     # writes OUT/report.html
    python report.py OUT1 OUT2 OUT3          # compares them, writes OUT3/compare.html
    python report.py OUT1 OUT2 --output=FILE

A folder is that of a chain or a single stage, finished or not; any number can be compared. The page
loads nothing and runs no scripts. This file reads and computes; report.html.j2 does the layout.
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

MAIN_CURVES = (  # always visible, in this order; the others unfold
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
# Keys of answers in samples.jsonl and win_rate.jsonl: by an earlier model, by the trained one.
EARLIER_ANSWERS = ("before", "old", "baseline")
LATER_ANSWERS = ("completion", "answer", "after", "new")
SAMPLED = ("best", "worst")  # kinds of RL rows that are not answers to held-out prompts
MAX_ANSWER_LENGTH = 4000  # characters
MAX_PROMPTS = 12  # of the prompts that a stage was the first to answer
REFERENCE_ANSWERS = ("expected", "chosen", "rejected")  # keys of answers from the data
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
    """(head, rows) of the metrics of each stage: for one run, before, after and the change; for
    several runs, the final ones side by side."""
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
    """The metrics in order, without x_before and interval bounds. Those measured only once, such as
    the speed, come last."""
    parts = set()
    for metrics in runs:
        for name in metrics:
            parts |= {f"{name}_low", f"{name}_high", f"{name}_n"}
    names: dict[str, bool] = {}  # name -> whether it is a result
    for metrics in runs:
        for key in metrics:
            if key not in parts:
                name = key.removesuffix("_before")
                is_result = f"{name}_before" in metrics or f"{name}_low" in metrics
                names[name] = names.get(name, False) or is_result
    return [name for name in names if names[name]] + [name for name in names if not names[name]]


def change_rows(title: str, stage: Stage) -> list[Row]:
    """Rows of a stage's metrics before and after training."""
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
    """Rows of a stage's final metrics in several runs; None for runs without the stage."""
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
    """The charts of a stage: those always visible, and those that unfold."""

    title: str
    main: list[Chart]
    more: list[Chart]


def build_curves(groups: Mapping[str, dict[str, Stage]], labels: Sequence[str]) -> list[CurveGroup]:
    """The charts of each stage; curves of several runs share a chart."""
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
    """{chart title: its lines}. Each of several runs has its own colour and dashes."""
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
            # With several runs, the chart's title names the metric and the legend the run.
            line_name = name
            if comparing:
                line_name = f"{label} held out" if is_evaluation else label
            lines.append(Line(line_name, number, is_evaluation, points))
    return charts


def chart_of(name: str, comparing: bool) -> str:
    """x and eval_x share a chart; for a single run, so do chosen_x and rejected_x."""
    prefixes = "^(eval_)?" if comparing else "^(eval_)?(chosen_|rejected_)?"
    return re.sub(prefixes, "", name)


def explain_curves(title: str, group: Mapping[str, Stage]) -> list[tuple[str, str]]:
    """What the curves of a chart mean: (name, meaning), with an empty name if it is the title."""
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
    """(step, value) of a metric wherever it is a finite number."""
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
    title: str  # stage and time, for example 02_rl step 100
    text: str
    note: str  # its reward and other scores


@dataclass
class Card:
    """A prompt and the answers to it by all stages."""

    first_stage: str
    prompt: str
    references: dict[str, str] = field(default_factory=dict)  # answers in the data: {"chosen": ...}
    answers: dict[str, Answer] = field(default_factory=dict)


def build_answers(stages: Mapping[str, Stage]) -> tuple[list[Card], int] | None:
    """(cards, total number of prompts): answers of all stages to the same held-out prompts."""
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
    """The rows of the first and the last evaluation, and those without a step. Completions that RL
    sampled during training are used only if there is nothing else."""
    held_out = [row for row in rows if row.get("kind") not in SAMPLED]
    rows = held_out or rows
    steps = [row["step"] for row in rows if "step" in row]
    if not steps:
        return list(rows)
    ends = (min(steps), max(steps))
    return [row for row in rows if "step" not in row or row["step"] in ends]


def find_card(cards: dict[str, Card], stage_name: str, row: Mapping[str, Any]) -> Card:
    """The card of a row's prompt, created for the first row that has it."""
    turns = row.get("prompt", row.get("question", ""))
    if not isinstance(turns, list):
        turns = [{"role": "user", "content": turns}]
    last_text = turns[-1]["content"]
    last_turn = last_text.strip()
    prompt = last_text
    if len(turns) > 1:
        texts = [f"{turn['role']}: {turn['content']}" for turn in turns]
        prompt = "\n\n".join(texts)
    # A chat is identified by its last turn, because a stage may add its own system turn. If two
    # chats have the same last turn, the second is identified by all its turns.
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
    """Add the answers of a row, without those of the stage's input model that the previous stage
    already shows."""
    scores = []
    for name, value in row.items():
        if is_number(value) and name != "step":
            score = format_number(value)
            scores.append(f"{name} {score}")
    for key in (*EARLIER_ANSWERS, *LATER_ANSWERS):
        if key not in row or (key == "answer" and "expected" not in row):
            continue  # in a row without `expected`, `answer` is the expected one
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
    """A text truncated for the page; a dash if there is none."""
    text = str(text or "–")
    if len(text) > MAX_ANSWER_LENGTH:
        return text[:MAX_ANSWER_LENGTH] + " …"
    return text


# -- lineage and options ---------------------------------------------------------------------------


def build_options(
    groups: Mapping[str, dict[str, Stage]], stages: Mapping[str, Stage], labels: Sequence[str]
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """(options that differ between runs, (name, lineage, options) of each stage as YAML)."""
    rows: list[Row] = []
    for title, group in groups.items():
        rows += differing_rows(title, [group.get(label) for label in labels])
    texts = []
    for name, stage in stages.items():
        lineage = {"state": stage.state, **stage.lineage}
        texts.append((name, dump_yaml(lineage), dump_yaml(stage.config)))
    return rows, texts


def differing_rows(title: str, stages: Sequence[Stage | None]) -> list[Row]:
    """Rows of the options and the lineage in which the runs of a stage differ."""
    values_of_runs = [stage.config | stage.lineage if stage else None for stage in stages]
    names: dict[str, None] = {}  # in order
    for values in values_of_runs:
        names |= dict.fromkeys(values or ())
    rows = []
    for name in names:
        texts = [format_option(values or {}, name) for values in values_of_runs]
        # A run without the stage is not a difference.
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
    """One folder on the page."""

    label: str  # empty if the page shows only one run
    name: str
    stages: list[Stage]
    alarms: list[LogEntry]
    command: str  # the command that started the run, if known

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
    returns its path. Raises ValueError if a folder is not a run."""
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
    # Write atomically: neither a reader nor a crash gets half a page.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    temporary.write_bytes(page.encode("utf-8", "replace"))
    return temporary.replace(path)


def choose_labels(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Labels of the runs: names of their folders, or paths if names repeat; empty for one run."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("the same folder is given twice; give each run once")
    if len(paths) == 1:
        return [""]
    if len(set(names)) < len(names):
        return [str(path) for path in paths]
    return list(names)


def render(title: str, runs: Sequence[Run]) -> str:
    """The page as HTML; all text is escaped, and control characters are made visible."""
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
    """A name with a possible line break after each underscore, to fit tables on narrow screens."""
    return escape(name).replace("_", Markup("_<wbr>"))


def build_sections(title: str, runs: Sequence[Run]) -> list[Section]:
    """The sections of the page that have content. A broken file loses its section, not the page."""
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
    """{stage name: {run label: the stage in that run}}."""
    groups: dict[str, dict[str, Stage]] = {}
    for run in runs:
        for stage in run.stages:
            name = stage.name
            # Folders of single stages are compared even if their names differ.
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
    """(folders, output file) from a command line. Raises ValueError."""
    folders, output = [], None
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not argument.startswith("-"):
            folders.append(argument)
        elif name == "--output" and value:
            output = value
        else:
            raise ValueError(f"unknown option {argument}; the only one is --output=FILE")
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
