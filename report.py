"""A run's folder as one page: alarms, figures before and after, curves, answers side by side, lineage, options.

    python report.py outputs/quickstart               # writes outputs/quickstart/report.html
    python report.py outputs/lr1e-4 outputs/lr5e-4    # writes outputs/lr5e-4/compare.html: the second against the first

A folder is that of a chain or of one stage, however far it has come. A page loads nothing and runs no script.
"""

import json
import math
import os
import re
import sys
from contextlib import suppress
from datetime import datetime, timedelta
from html import escape
from pathlib import Path
from types import SimpleNamespace as Stage

import yaml

MAIN = (
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
ANSWERS = (
    "before",
    "old",
    "baseline",
    "completion",
    "answer",
    "after",
    "new",
)  # what recipes call them in their rows
STYLE = """:root { color-scheme: light dark; --page: #fbfbfa; --card: #fff; --ink: #222; --soft: #667; --line: #e2e4e8;
--c0: #2c6cb5; --c1: #b9581a; --c2: #27795a; --c3: #8659ad } @media (prefers-color-scheme: dark) { :root { --page:
#121316; --card: #1a1d22; --ink: #ddd; --soft: #99a; --line: #333; --c0: #72abea; --c1: #f0a15f; --c2: #6fc799; --c3:
#c5a3e8 } } svg { width: 100%; font-size: 10px; overflow: visible } h1, p { margin: 4px 0 } h2 { margin-top: 44px }
small, .soft, thead { color: var(--soft); font-size: .9em; font-weight: 400 } a, summary { color: var(--c0) }
.state::before { content: "\\25CF\\A0"; color: var(--soft) } .done::before, .c2 { color: var(--c2) } .running::before,
.c0 { color: var(--c0) } .failed::before, .c1 { color: var(--c1) } .c3 { color: var(--c3) } .box { border: 1px solid
var(--line); border-radius: 8px; background: var(--card); overflow-x: auto; margin: 0 0 1em } table { border-collapse:
collapse; width: 100%; overflow-wrap: normal } td, th { padding: 6px 8px; text-align: right; vertical-align: top;
font-weight: 400 } tbody tr { border-top: 1px solid var(--line) } th:first-child { text-align: left; position: sticky;
left: 0; background: var(--card); min-width: 7em; overflow-wrap: anywhere } th[colspan] { font-weight: 600; padding-top:
1em } td small { display: block } .grid { display: grid; gap: 0 20px; grid-template-columns: repeat(auto-fill,
minmax(min(300px, 100%), 1fr)) } figure, article { padding: 12px } a, figcaption span { display: inline-block;
margin-right: 1em } body { margin: auto; max-width: 70em; padding: 1.5em; background: var(--page); color: var(--ink);
font: 15px/1.55 system-ui; font-variant-numeric: tabular-nums; overflow-wrap: anywhere } text { fill: var(--soft) }
polyline, circle { fill: none; stroke: currentColor; stroke-width: 1.8 } polyline.dashed { stroke-dasharray: 5 4 } path
{ stroke: var(--line) } .grid > div, .alarm { border-left: 2px solid var(--line); padding-left: 1em } .alarm {
border-color: var(--c1) } .text { max-height: 17em; overflow-y: auto } .text, pre, .alarm { margin: 0 0 8px;
white-space: pre-wrap } @media (max-width: 30em) { body { padding: 1em; font-size: 13px } td, th { padding: 5px } }"""


def read(path: Path) -> list:
    """Of a .jsonl, .json or .yaml the mappings, if whole; of a .log our own entries: (time, level, logger, message)."""
    text, found = path.read_text("utf-8", "replace") if path.is_file() else "", []
    if path.suffix == ".log":
        parts = re.split(
            r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([\w.]+):\s", text, flags=re.M
        )[1:]
        return [
            (*e, text.strip())
            for *e, text in zip(*(parts[n::4] for n in range(4)))
            if e[2][:7] == "recipes"
        ]
    for piece in text.split("\n") if path.suffix == ".jsonl" else [text]:
        with suppress(ValueError, RecursionError, yaml.YAMLError):
            found.append(yaml.safe_load(piece) if path.suffix == ".yaml" else json.loads(piece))
    return [value for value in found if isinstance(value, dict)] or [{}] * (path.suffix != ".jsonl")


def read_stage(
    folder: Path, name: str, state="running", config=None, metrics=None, since=""
) -> Stage:
    """What a stage's folder says. What it has from before `since`, when the stage began, is of an older run."""
    (record,) = read(folder / "stage.json")
    record = record if record.get("finished", "").replace("T", " ") >= since else {}
    metrics = {
        k: v
        for k, v in (record.get("metrics") or metrics or {}).items()
        if isinstance(v, int | float)
    }
    if "finished" in record and not since:
        since = str(
            datetime.fromisoformat(record["finished"][:19])
            - timedelta(seconds=2 + metrics.get("seconds", 0))
        )
    rows = [
        read(path)
        if record or path.exists() and str(datetime.fromtimestamp(path.stat().st_mtime)) >= since
        else []
        for path in map(folder.joinpath, ("metrics.jsonl", "samples.jsonl", "win_rate.jsonl"))
    ]
    for key, value in (
        []
        if metrics
        else [item for row in rows[0] for item in row.items() if item[0][:5] == "eval_"]
    ):
        metrics[key if f"{key}_before" in metrics else f"{key}_before"] = (
            value  # so far: the first and the last
        )
    return Stage(
        name=name,
        state="done" if record else state,
        since=since,
        metrics=metrics,
        config=config or read(folder / "stage_config.yaml")[0],
        curves=rows[0],
        samples=rows[1] + rows[2],
        lineage={
            k: v
            for k, v in record.items()
            if k not in ("stage", "success", "metrics", "fingerprint")
        },
    )


def read_run(folder: Path) -> tuple[list[Stage], list[tuple]]:
    """(stages, alarms) of the run in a folder. Raises ValueError if there is none."""
    (chain,), stages = read(folder / "pipeline.json"), []
    if not (
        chain
        or any((folder / file).exists() for file in ("stage.json", "metrics.jsonl", "training.log"))
    ):
        raise ValueError(
            f"{folder}: no run here, neither pipeline.json nor stage.json, metrics.jsonl, training.log"
        )
    log, results = (
        read(folder / ("pipeline_" * bool(chain) + "training.log")),
        iter(chain.get("results", ())),
    )
    begun = {text.split()[1]: time for time, *_, text in log if re.fullmatch(r"\d+/\d+ \S+", text)}
    alone = "failed" if log and log[-1][1] == "ERROR" else "running"
    marked = {
        at: state for state, at in chain.get("state", {alone: ""}).items()
    }  # running, interrupted or failed
    for name, config in chain.get("plan", {"": {}}).items():
        result = next(results, None) if config.get("enabled") else None
        state = ("done" if result["success"] else "failed") if result else marked.get(name)
        if not state:
            state, begun[name] = (
                "waiting" if config["enabled"] else "skipped",
                "9",
            )  # what lies there is older
        stages.append(
            stage := read_stage(
                folder / name,
                name or folder.resolve().name,
                state,
                config,
                (result or {}).get("metrics"),
                begun.get(name, ""),
            )
        )
        for file in sorted((folder / name).glob("*/metrics.jsonl")):  # rlaif contains other recipes
            since = (
                ""
                if any(f"{file.parent.name} is finished already" in text for *_, text in log)
                else stage.since
            )
            part = read_stage(
                file.parent, f"{stage.name}/{file.parent.name}", stage.state, since=since
            )
            stages += [part] * (
                bool(part.lineage) or stage.state in ("running", "interrupted", "failed")
            )
    return stages, [
        e
        for e in log
        if e[1] in ("WARNING", "ERROR") and e[0] >= min(stage.since for stage in stages)
    ]


def shown(value: float | None) -> str:
    return (
        "–"
        if value is None
        else f"{value:{',.0f' if 1e4 <= abs(value) < 1e15 else '.4g'}}".replace("-", "−")
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of ready cells in a box that scrolls by itself. A row of one cell heads those after it."""
    cells = lambda tag, texts: "".join(f"<{tag}>{text}</{tag}>" for text in texts)
    body = "".join(
        f"<tr><th{' colspan=9' * (not rest)}>{first}</th>{cells('td', rest)}</tr>"
        for first, *rest in rows
    )
    return (
        f"<div class=box><table><thead><tr>{cells('th', map(escape, head))}<tbody>{body}</table></div>"
        * bool(rows)
    )


def ticks(low: float, top: float) -> list[float]:
    """Round numbers from below `low` to above `top`, 1, 2 or 5 times a power of ten apart."""
    step = next(
        m * 10**e
        for e in range(-99, 308)
        for m in (1, 2, 5)
        if 4.1 * m * 10**e > (top - low or abs(low) or 1)
    )
    first = math.floor(low / step + 1e-6)
    return [step * n for n in range(first, max(first + 1, math.ceil(top / step - 1e-6)) + 1)]


def chart(title: str, lines: list[tuple[str, str, list]]) -> str:
    """An inline SVG of lines (name, look, points); the legend has the last value of each."""
    xs, ys = zip(*(point for *_, points in lines for point in points))
    left, right, up, legend = min(xs), max(xs), ticks(min(ys), max(ys)), ""
    x_at = lambda x: f"{44 + 276 * (x - left) / (right - left or 1):.1f}"
    y_at = lambda y: f"{146 - 136 * (y - up[0]) / (up[-1] - up[0]):.1f}"
    label = lambda x, y, text, at: f"<text x={x} y={y} dy=3.5 text-anchor={at}>{text}</text>"
    svg = "".join(
        f"<path d=M44,{y_at(y)}H320 />" + label(38, y_at(y), f"{y:.6g}", "end") for y in up
    )
    svg += label(38, 161, "step", "end") + "".join(
        label(x_at(x), 161, f"{x:g}", "middle")
        for x in ticks(left, right)
        if left <= x <= right and x == int(x)
    )
    for name, look, points in lines:
        size = math.ceil(
            len(points) / 100
        )  # of a long run the lowest and the highest of every few points
        groups = [
            sorted(points[n : n + size], key=lambda point: point[1])
            for n in range(0, len(points), size)
        ]
        some = [(x_at(x), y_at(y)) for near in groups for x, y in sorted({near[0], near[-1]})]
        svg += f'<polyline class="{look}" points="{" ".join(map(",".join, some))}" />'
        svg += "".join(
            f'<circle class="{look}" r=2.6 cx={x} cy={y} />' for x, y in some if "dashed" in look
        )
        legend += f"<span class='{look}'>{'━┅'['dashed' in look]} {escape(name)} {shown(points[-1][1])}</span>"
    return (
        f"<figure class=box><figcaption><b>{escape(title)}</b><br><small>{legend}</small></figcaption>"
        f'<svg viewBox="0 0 340 170" role=img aria-label="{escape(title)} by step">{svg}</svg></figure>'
    )


def curves(title: str, group: dict[str, Stage]) -> str:
    """Charts of a stage, or of the same stage in two runs: x and eval_x in one, and chosen_x with rejected_x."""
    charts: dict[str, list] = {}
    for run, (label, stage) in enumerate(group.items()):
        for name in sorted(
            set().union(*stage.curves) - {"step", "epoch"}, key=lambda k: (k[:5] == "eval_", k)
        ):
            lines = charts.setdefault(re.sub("^(eval_)?(chosen_|rejected_)?", "", name), [])
            look = f"c{run + 2 * ('rejected_' in name) if len(group) > 1 else len(lines) % 4}"
            points = [
                (row["step"], row[name])
                for row in stage.curves
                if isinstance(row.get(name), int | float) and math.isfinite(row[name])
            ]
            lines += [(f"{label} {name}", look + " dashed" * (name[:5] == "eval_"), points)] * bool(
                points
            )
    drawn = {
        title: chart(title, lines)
        for title, lines in charts.items()
        if any(len(line[2]) > 1 for line in lines)
    }
    first = "".join(drawn.pop(title) for title in MAIN if title in drawn)
    more = f"<details><summary>{len(drawn)} more</summary><div class=grid>{''.join(drawn.values())}</div></details>"
    return f"<h3>{escape(title)}</h3><div class=grid>{first}</div>{more * bool(drawn)}" * bool(
        first or drawn
    )


def figures(title: str, group: dict[str, Stage], labels: list[str]) -> list[list[str]]:
    """Rows of a stage's figures before and after, or of two runs, and how they differ; beside its name those alone."""
    known = [group[label].metrics if label in group else {} for label in labels]
    ends, rows = (
        {f"{name}_{end}" for one in known for name in one for end in ("low", "high", "n")},
        [],
    )
    names = dict.fromkeys(
        key.removesuffix("_before") for one in known for key in one if key not in ends
    )
    twice = [n for n in names if len(known) == 2 or {f"{n}_before", f"{n}_low"} & {*known[0]}]
    once = ", ".join(
        f"{escape(name)} {shown(known[0][name])}" for name in names if name not in twice
    )
    for name in twice:
        cells, keys = [], [(one, key) for one in known for key in (f"{name}_before", name)]
        for one, key in keys:
            low, high, n = (shown(one.get(f"{key}_{end}")) for end in ("low", "high", "n"))
            cells.append(
                shown(one.get(key))
                + f"<small>{low} to {high}, n {n}</small>" * (f"{key}_low" in one)
            )
        a, b = (one.get(key) for one, key in (keys if len(keys) == 2 else keys[1::2]))
        rows.append([escape(name), *cells, "–" if None in (a, b) else "+" * (b > a) + shown(b - a)])
    return [[f"{escape(title)} <small>{once}</small>"], *rows] if names else []


def answers(stages: dict[str, Stage]) -> str:
    """The same held-out prompts answered by each stage, side by side: 12 of those that a stage was first to answer."""
    cards, page, cut = (
        {},
        "",
        lambda text: escape(str(text or "–")[:4000]) + " …" * (len(str(text)) > 4000),
    )
    for name, stage in stages.items():
        steps = sorted(row["step"] for row in stage.samples if "step" in row) or [0]
        for row in (
            row for row in stage.samples if row.get("step", steps[0]) in (steps[0], steps[-1])
        ):
            turns, expected = (
                row.get("prompt", row.get("question", "")),
                row.get("expected", row.get("answer")),
            )
            turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
            asked = "\n\n".join(
                f"{turn['role']}: " * (len(turns) > 1) + turn["content"] for turn in turns
            )
            last = turns[-1][
                "content"
            ].strip()  # a system turn before it may be a stage's own; chats may end alike
            known = len(turns) == 1 or cards.get(last, ("", asked))[1] in (asked, last)
            texts = cards.setdefault(last if known else asked, (name, asked, expected, {}))[3]
            said = ", ".join(
                f"{k} {shown(x)}"
                for k, x in row.items()
                if isinstance(x, int | float) and k != "step"
            )
            for key in (
                key for key in ANSWERS if key in row and (key != "answer" or "expected" in row)
            ):
                when = row.get("when", f"step {row['step']}" if key == "completion" else key)
                text = row[key]["answer"] if key == "baseline" else row[key]
                if when not in ("before", "old", "step 0") or text not in [
                    old for old, _ in texts.values()
                ]:
                    texts[f"{name} {when}"] = text, said * (key not in ANSWERS[:3])
    chosen = [
        card
        for name in stages
        for card in [card for card in cards.values() if card[0] == name][:12]
    ]
    for _, asked, expected, texts in chosen:
        page += (
            (
                f"<article class=box><div class=text><b>{cut(asked)}</b></div><p class=soft>expected: {cut(expected)}"
                "<div class=grid>"
            )
            + "".join(
                f"<div><small>{escape(when)}</small><div class=text>{cut(text)}</div>"
                f"<small>{escape(said)}</small></div>"
                for when, (text, said) in texts.items()
            )
            + "</div></article>"
        )
    return f"<p class=soft>{len(chosen)} of {len(cards)} prompts</p>{page}" * bool(page)


def options(
    labels: list[str], groups: dict[str, dict[str, Stage]], stages: dict[str, Stage]
) -> str:
    """What two runs do not have in common, then each stage's lineage and its options, resolved."""
    rows, page, dump = (
        [],
        "",
        lambda values: escape(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)),
    )
    for title, group in groups.items():
        each = [
            {k: escape(json.dumps(v)) for k, v in (s.config | s.lineage).items()}
            for s in group.values()
        ]
        differ = [
            k for k in each[0] | each[-1] if each[0].get(k) != each[-1].get(k) and k != "output_dir"
        ]
        rows += [
            [escape(title)],
            *([escape(k), *(one.get(k, "–") for one in each)] for k in differ),
        ] * bool(differ)
    for name, stage in stages.items():
        page += (
            f"<article class=box><b>{escape(name)}</b><pre>{dump({'state': stage.state} | stage.lineage)}</pre>"
            f"<details><summary>options</summary><pre>{dump(stage.config)}</pre></details></article>"
        )
    return table(["differs", *labels], rows) + f"<div class=grid>{page}</div>"


def write(*folders: str | Path) -> Path:
    """Write OUT/report.html, or of two runs OUT2/compare.html; returns its path. Raises ValueError if one is no run."""
    paths, groups, stages, alarms, page, bar, top = [*map(Path, folders)], {}, {}, "", "", "", ""
    names = [path.resolve().name for path in paths]
    labels = [""] if len(paths) == 1 else names if len({*names}) == 2 else [*map(str, paths)]
    title, columns = (
        " / ".join(names),
        [f"{label} {when}" for label in labels for when in ("before", "after")],
    )
    for label, name, (run, said) in zip(labels, names, map(read_run, paths)):
        start = (
            run[0]
            .lineage.get("parent", {})
            .get("model", run[0].config.get("model_name_or_path", ""))
        )
        top += f"<p><b>{escape(label)}</b> <bdi class=soft>{escape(str(start))}</bdi>"
        for stage in run:  # stages of one name go together, and two runs of one stage
            groups.setdefault(
                stage.name.replace(name, title, stage.name.split("/")[0] == name), {}
            )[label] = stage
            stages[label if label == stage.name else f"{label} {stage.name}".strip()] = stage
            top += f" → <span class='state {stage.state}'>{escape(stage.name)} {stage.state}</span>"
        alarms += "".join(
            f"<p class=alarm>{escape(' '.join((*e, label)))}\n{escape(text)}" for *e, text in said
        )
    parts = {
        "Alarms": lambda: alarms,
        "Figures": lambda: table(
            ["", *columns, "change"],
            [row for item in groups.items() for row in figures(*item, labels)],
        ),
        "Curves": lambda: "".join(curves(*item) for item in groups.items()),
        "Answers": lambda: answers(stages),
        "Lineage and options": lambda: options(labels, groups, stages),
    }
    for name, make in parts.items():
        try:
            body = make()
        except Exception as error:  # one odd file must not cost the page
            body = f"<p class=alarm>not shown: {escape(f'{type(error).__name__}: {error}')}</p>"
        page += f"<h2 id={name[:3]}>{name}</h2>{body}" * bool(body)
        bar += f"<a href=#{name[:3]}>{name}</a>" * bool(body)
    path = paths[-1] / ("report.html" if len(paths) == 1 else "compare.html")
    aside, title = path.with_name(f".{path.name}.{os.getpid()}"), escape(title)
    aside.write_bytes(
        f"""<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>
<meta name=viewport content="width=device-width"><meta http-equiv=Content-Security-Policy content="default-src 'none';
style-src 'unsafe-inline'"><h1>{title}</h1>{top}<p class=soft>written {datetime.now():%Y-%m-%d %H:%M}<p>{bar}{page}
""".encode("utf-8", "replace")
    )
    return aside.replace(path)


def main() -> None:
    """The command line. Exit status 2: the input has to be mended."""
    if {"-h", "--help"} & {*sys.argv}:
        return print(__doc__.strip())
    try:
        if len(sys.argv) not in (2, 3):
            raise ValueError(
                f"give the folder of a run, or two to compare; got {len(sys.argv) - 1}"
            )
        print(write(*sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)


if __name__ == "__main__":
    main()
