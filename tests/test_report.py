"""report.py: pages of folders, however far a run has come; the folders are written by hand here."""

import html
import json
import re
import subprocess
import sys
import time
import types

import markupsafe
import pytest
from conftest import ROOT

import report
from core import charts, command, metrics

EVIL = "</pre></style><script>alert(1)</script><img src=http://x.y onerror=alert(1)>\"'&amp; \ud800"


def rows(path, *entries, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, entries)) + end, encoding="utf-8")


def stamp(seconds, form="%Y-%m-%d %H:%M:%S"):
    return time.strftime(form, time.localtime(time.time() + seconds))


def stage(folder, metrics=None, options=None, ended=-10, **record):
    """A finished stage."""
    lines = [
        {"step": 0, "eval_loss": 2.0},
        *({"step": n, "loss": 2 / n, "kl": n / 10, "grad_norm": n} for n in (1, 2, 3)),
        {"step": 3, "eval_loss": 0.5},
    ]
    rows(folder / "metrics.jsonl", *lines)
    metrics = {"eval_loss_before": 2.0, "eval_loss": 0.5, "seconds": 60.0} | (metrics or {})
    record = {
        "stage": "sft",
        "success": True,
        "finished": stamp(ended, "%Y-%m-%dT%H:%M:%S%z"),
        "metrics": metrics,
        "versions": {"torch": "2.13.0"},
        "fingerprint": {"options": {}},
    } | record
    rows(folder / "stage.json", {"parent": {"model": "the/start", "revision": None}} | record)
    (folder / "stage_config.yaml").write_text(
        "".join(f"{k}: {v}\n" for k, v in ({"seed": 42} | (options or {})).items())
    )
    return folder


def chain(folder, state, results, plan, log=""):
    options = {
        name: {"enabled": True, "model_name_or_path": "the/start"} | more
        for name, more in plan.items()
    }
    rows(
        folder / "pipeline.json",
        {"state": state, "results": results, "config": {}, "plan": options},
    )
    (folder / "pipeline_training.log").write_text(log, encoding="utf-8")
    return folder


def page(*folders, **options):
    """The page, without the places where a long name may be broken."""
    text = report.write(*folders, **options).read_text(encoding="utf-8")
    assert "not shown" not in text
    return text.replace("<wbr>", "")


def commands(text):
    found = re.findall('<pre class="command">(.*?)</pre>', text, re.S)
    return [html.unescape(command) for command in found]


def row_of(text, name):
    return re.search(rf"<tr><th>{name}(?:<small>.*?</small>)?</th>(.*?)</tr>", text)[1]


def cells(text, name):
    """The texts in the row of a table that begins with `name`; those below each other parted by a
    bar."""
    texts = []
    for cell in re.findall("<td>(.*?)</td>", row_of(text, name)):
        parts = re.split(r" ?<(?:small|b class=.*?)>", cell)
        texts.append(html.unescape("|".join(re.sub("<.*?>", "", part) for part in parts)))
    return texts


def test_figures_before_and_after_with_their_intervals(tmp_path):
    done = {
        "accuracy": 0.906,
        "accuracy_low": 0.81,
        "accuracy_high": 0.956,
        "accuracy_n": 64,
        "accuracy_before": 0.016,
        "accuracy_before_low": 0.003,
        "accuracy_before_high": 0.083,
        "accuracy_before_n": 64,
        "train_loss": 1.25,
        "eval_loss": 0.4,
        "tokens_per_s": 29164.3,
        "note": "text",
    }
    text = page(stage(tmp_path, done))
    # stage.json has the last word
    assert cells(text, "eval_loss") == ["2.00", "0.400", "−1.60|better"]
    assert cells(text, "accuracy") == [
        "0.0160|0.00300 to 0.0830, n 64",
        "0.906|0.810 to 0.956, n 64",
        "+0.890|better",
    ]
    # No rows for the ends of intervals. What is measured once comes last.
    assert re.findall("<tr><th>([^<]*)<small>", text) == [
        "eval_loss",
        "accuracy",
        "seconds",
        "train_loss",
        "tokens_per_s",
    ]
    assert cells(text, "tokens_per_s") == ["–", "29,164", "–"]


def test_texts_from_files_are_escaped_wherever_they_show(tmp_path):
    stage(tmp_path / "01_sft", {EVIL: 1.0}, data={"path": EVIL}, parent={"model": EVIL})
    rows(tmp_path / "01_sft/metrics.jsonl", {"step": 1, EVIL: 1}, {"step": 2, EVIL: 2})
    rows(
        tmp_path / "01_sft/samples.jsonl",
        {
            "prompt": EVIL,
            "expected": EVIL,
            "before": EVIL,
            "after": EVIL + "!",
            "when": EVIL,
            EVIL: 7,
        },
    )
    log = f"{stamp(-5)},123 WARNING recipes.sft: {EVIL.encode('ascii', 'ignore').decode()}\n"
    chain(tmp_path, {"finished": True}, [{"success": True}], {"01_sft": {"note": EVIL}}, log)
    with open(tmp_path / "pipeline_training.log", "ab") as file:
        file.write(b"\xff\xfe\n")
    text = page(tmp_path)
    assert (
        text.count(str(markupsafe.escape(EVIL[:-1]))) >= 8
    )  # figure, chart, answers, alarm, lineage, options
    assert "<script" not in text and "<img" not in text and text.count("</style>") == 1
    other = stage(
        tmp_path / f"b{EVIL[:-1].replace('/', '')}", options={EVIL[:-1].replace(":", ""): 7}
    )
    text = page(tmp_path / "01_sft", other)
    assert "<script" not in text and "<img" not in text and text.count("</style>") == 1


def test_a_page_loads_nothing(tmp_path):
    for text in (page(stage(tmp_path / "a")), page(tmp_path / "a", stage(tmp_path / "b"))):
        assert not re.search(r"(src|href)\s*=\s*(?![\"']?#)|url\(|@import|<script|<link", text)
        assert (
            "default-src 'none'" in text
            and "prefers-color-scheme: dark" in text
            and "width=device-width" in text
            and text.startswith("<!doctype html>")
        )


def test_a_stage_that_runs_shows_what_it_has_so_far(tmp_path):
    lines = [
        {"step": 0, "eval_reward": 0.1},
        {"step": 1, "reward": 0.2},
        {"step": 2, "reward": 0.4},
        {"step": 2, "eval_reward": 0.3},
    ]
    rows(tmp_path / "metrics.jsonl", *lines, end='\n{"step": 3, "rew')
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 0, "prompt": "1 + 1?", "completion": "two", "reward": 1.0}\n{"step": 2, "pro'
    )
    text = page(tmp_path)
    assert "state running" in text
    assert cells(text, "eval_reward") == ["0.100", "0.300", "+0.200|better"]
    assert "reward 0.400<" in text and " more<" not in text
    assert "two</div><small>reward 1.00<" in text
    rows(tmp_path / "metrics.jsonl", lines[0])
    assert cells(page(tmp_path), "eval_reward") == ["0.100", "–", "–"]
    (tmp_path / "training.log").write_text(
        f"{stamp(0)},000 ERROR recipes.rl: rl failed: RuntimeError: no memory\n"
        "The traceback is in x\n"
    )
    assert "state failed" in (text := page(tmp_path)) and "no memory\nThe traceback" in text


def test_a_chain_shows_every_stage_in_its_state_and_nothing_of_an_older_run(tmp_path):
    stage(tmp_path / "01_sft", ended=-90)
    for name in ("02_dpo", "03_rl", "04_sft"):
        stage(tmp_path / name, {"accuracy": 0.123}, ended=-9000)
    rows(tmp_path / "03_rl/samples.jsonl", {"prompt": "an old prompt", "before": "a", "after": "b"})
    started = "".join(
        f"{stamp(when)},000 INFO recipes: \n{n}/4 {name}\n"
        for when, n, name in ((-9999, 2, "02_dpo"), (-200, 1, "01_sft"), (3, 2, "02_dpo"))
    )
    old = f"{stamp(-9998)},000 WARNING recipes: an old alarm\n"
    new = (
        f"{stamp(-100)},000 WARNING recipes.sft: 3 rows left out\n"
        f"{stamp(-99)},000 WARNING py.warnings: not ours\n  warn(\n"
    )
    plan = {"01_sft": {}, "02_dpo": {}, "03_rl": {"enabled": False}, "04_sft": {}}
    text = page(
        chain(tmp_path, {"running": "02_dpo"}, [{"success": True}], plan, old + started + new)
    )
    assert re.findall('<span class="state (.*?)">(.*?) ', text) == [
        ("done", "01_sft"),
        ("running", "02_dpo"),
        ("skipped", "03_rl"),
        ("waiting", "04_sft"),
    ]
    assert (
        "3 rows left out" in text
        and "an old alarm" not in text
        and "not ours" not in text
        and "warn(" not in text
    )
    assert (
        "0.123" not in text and "an old prompt" not in text and text.count("<figure") == 3
    )  # those of 01_sft alone
    assert (
        "the/start" in text
        and "torch: 2.13.0" in text
        and "metrics:" not in text
        and "fingerprint" not in text
        and 'colspan="4">04_sft' not in text
    )
    text = page(
        chain(
            tmp_path,
            {"failed": "02_dpo"},
            [{"success": True}, {"success": False}],
            plan,
            started + f"{stamp(4)},000 ERROR recipes: dpo failed",
        )
    )
    assert 'state failed">02_dpo' in text and "dpo failed" in text and "0.123" not in text
    rows(tmp_path / "02_dpo/metrics.jsonl", {"step": 1, "loss": 7.0}, {"step": 2, "loss": 6.5})
    text = page(
        chain(
            tmp_path,
            {"interrupted": "02_dpo"},
            [{"success": True}],
            plan,
            started.replace(stamp(3)[:10], stamp(-9)[:10]),
        )
    )
    assert 'state interrupted">02_dpo' in text and 'state waiting">04_sft' in text
    plan = {"00_note": {"enabled": False}, "01_sft": {}}
    text = page(
        chain(tmp_path, {"finished": True}, [{"success": True, "metrics": {"length": 5}}], plan)
    )
    assert 'state skipped">00_note' in text and 'state done">01_sft' in text


def test_a_stage_without_stage_json_has_the_figures_of_the_chain(tmp_path):
    (tmp_path / "01_note").mkdir()
    text = page(
        chain(
            tmp_path,
            {"finished": True},
            [{"success": True, "metrics": {"length": 5}}],
            {"01_note": {}},
        )
    )
    assert "state done" in text and '<th colspan="4">01_note</th>' in text
    assert cells(text, "length") == ["–", "5", "–"]


def test_recipes_inside_a_stage_show_too(tmp_path):
    for run in ("a", "b"):
        (
            stage(tmp_path / run, {"win_rate": 0.6}),
            stage(tmp_path / run / "dpo_1", {"margin": 7.0}, ended=-30),
            stage(tmp_path / run / "dpo_2", {"margin": 9.0}, ended=-9000),
        )
    (tmp_path / "a/training.log").write_text(f"{stamp(-40)},000 INFO recipes: dpo_2 begins\n")
    text = page(tmp_path / "a")
    assert cells(text, "margin") == ["–", "7.00", "–"]
    assert "<h3>a/dpo_1</h3>" in text and "dpo_2" not in text
    (tmp_path / "b/training.log").write_text(
        f"{stamp(-40)},000 INFO recipes: x/dpo_2 is finished already\n"
    )  # by an earlier try
    assert "<h3>b/dpo_2</h3>" in page(tmp_path / "b")
    assert cells(page(tmp_path / "a", tmp_path / "b"), "margin") == ["7.00", "7.00"]
    (tmp_path / "a/stage.json").unlink(), (tmp_path / "a/dpo_1/stage.json").unlink()
    text = page(tmp_path / "a")
    assert re.findall('<span class="state (.*?)">(.*?) ', text)[:2] == [
        ("running", "a"),
        ("running", "a/dpo_1"),
    ]
    (tmp_path / "a/training.log").write_text(f"{stamp(0)},000 ERROR recipes: rlaif failed\n")
    assert 'state failed">a/dpo_1' in page(tmp_path / "a")


def test_the_same_prompt_is_answered_side_by_side(tmp_path):
    ask = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    (
        stage(tmp_path / "01_sft"),
        stage(tmp_path / "02_rl"),
        stage(tmp_path / "03_cot"),
        stage(tmp_path / "04_rlaif"),
        stage(tmp_path / "05_evaluate"),
    )
    rows(
        tmp_path / "01_sft/samples.jsonl",
        {"prompt": "What is 1 + 1?", "expected": "2", "before": "eleven", "after": "three"},
        *(
            {
                "prompt": f"other {n}",
                "expected": "x",
                "before": "same",
                "after": "same" if n else "z" * 5000,
            }
            for n in range(30)
        ),
    )
    rows(
        tmp_path / "02_rl/samples.jsonl",
        *(
            {"step": step, "prompt": ask, "completion": text, "reward": reward, "answer": "2"}
            for step, text, reward in ((5, "hm", 0.0), (0, "three", 0.0), (9, "two", 1.0))
        ),
    )
    rows(
        tmp_path / "03_cot/samples.jsonl",
        *(
            {
                "when": when,
                "task": "",
                "question": "What is 1 + 1?",
                "expected": "2",
                "answer": text,
                "right": right,
            }
            for when, text, right in (("before", "two", 0.0), ("after", "1 + 1 = 2", 1.0))
        ),
    )
    rows(
        tmp_path / "04_rlaif/win_rate.jsonl",
        {"prompt": ask[1:], "new": "It is 2.", "old": "1 + 1 = 2", "win": 0.5},
        {"prompt": "its own", "new": "a", "old": "b", "win": 1.0},
    )
    rows(
        tmp_path / "05_evaluate/samples.jsonl",
        {
            "prompt": ask[1:],
            "expected": "2",
            "answer": "Two!",
            "exact_match": 0.0,
            "baseline": {"answer": "Zwei", "stopped": True},
        },
    )
    plan = {path.name: {} for path in sorted(tmp_path.iterdir())}
    text = page(chain(tmp_path, {"finished": True}, [{"success": True}] * 5, plan))
    cards = re.findall('<article class="box">\n<div class="text">(.*?)</article>', text, re.S)
    boxes = re.findall(
        '<small>(.*?)</small><div class="text">(.*?)</div><small>(.*?)</small>', cards[0], re.S
    )
    assert boxes == [
        ("01_sft before", "eleven", ""),
        ("01_sft after", "three", ""),
        ("02_rl step 9", "two", "reward 1.00"),
        ("03_cot after", "1 + 1 = 2", "right 1.00"),
        ("04_rlaif new", "It is 2.", "win 0.500"),
        ("05_evaluate baseline", "Zwei", ""),
        ("05_evaluate answer", "Two!", "exact_match 0"),
    ]  # an answer that the stage before gave already, and the evaluation at step 5, are left out
    assert (
        cards[2].count(">same<") == 2
        and f">{'z' * 4000} …<" in cards[1]
        and "user: " not in cards[0]
    )
    assert (
        "expected: 2<" in cards[0] and len(cards) == 13 and "its own" in cards[-1]
    )  # 12 of the first stage's 31
    assert "system: Be brief.\n\nuser: What" in page(tmp_path / "02_rl")


def test_curves_have_axes_a_legend_and_no_more_points_than_can_be_seen(tmp_path):
    stage(tmp_path)
    lines = [
        {
            "step": n,
            "loss": 1000.0 if n == 777 else 1 / n,
            "reward": float("nan"),
            "kl": 3.0,
            "chosen_logps": -n,
            "rejected_logps": -2.0 * n,
        }
        for n in range(1, 5001)
    ]
    rows(
        tmp_path / "metrics.jsonl",
        *lines,
        {"step": 5000, "eval_loss": 0.5, "epoch": 1.0},
        {"step": 5000, "kl": float("inf")},
    )
    text = page(tmp_path)
    assert f"<h3>{tmp_path.name}</h3>" in text
    titles = re.findall("<figcaption>\n<b>(.*?)</b>", text)
    assert (
        titles == ["loss", "kl", "logps"] and "1 more" in text
    )  # of reward there is no number to draw
    loss, kl, logps = re.findall("<figure.*?</figure>", text, re.S)
    points = re.search('<polyline points="(.*?)"', loss)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert (
        100 < len(points) <= 200 and min(heights) == 10 and heights.count(10) == 1
    )  # the spike is still there
    assert "nan" not in text and "inf" not in text.replace("info", "")
    assert re.findall(">([0-9,]+)</text>", loss) == ["0", "500", "1,000", "2,000", "4,000"]
    assert "step</text>" in loss
    assert "loss 0.000200<" in loss
    assert "chosen_logps" in logps and "rejected_logps" in logps
    assert loss.count("<circle") == 2  # of the evaluation alone: in the legend, and its point


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0, 1, [0, 0.5, 1]),
        (0.02, 2.3, [0, 1, 2, 3]),
        (-3, 40, [-20, 0, 20, 40]),
        (5, 5, [4, 6]),
        (0, 0, [0, 0.5]),
        (1e-5, 5e-4, [0, 2e-4, 4e-4, 6e-4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, wanted):
    assert charts.round_numbers(low, high)[0] <= low and charts.round_numbers(low, high)[-1] >= high
    assert charts.round_numbers(low, high) == pytest.approx(wanted)


def legend(figure):
    """(look of the line, its text) of each line of a chart."""
    return re.findall('<span class="(c. d.)"><svg.*?</svg> (.*?)</span>', figure)


def test_two_runs_are_compared(tmp_path):
    one = stage(
        tmp_path / "slow",
        {"accuracy": 0.5},
        {"learning_rate": 1e-4, "output_dir": "slow", "seed": 1},
    )
    two = stage(
        tmp_path / "fast",
        {"accuracy": 0.75, "extra": 1.0},
        {"learning_rate": 5e-4, "output_dir": "fast", "seed": 1},
    )
    for folder, answer in ((one, "no"), (two, "yes")):
        rows(
            folder / "samples.jsonl",
            {"prompt": "well?", "expected": "yes", "before": "hm", "after": answer},
        )
    text = page(one, two)
    assert (
        (two / "compare.html").exists()
        and not (one / "compare.html").exists()
        and not (two / "report.html").exists()
    )
    assert re.search("<thead><tr>(.*?)</tr>", text)[1] == "<th></th><th>slow</th><th>fast</th>"
    assert cells(text, "accuracy") == ["0.500", "0.750|best"]
    assert cells(text, "extra") == ["–", "1.00"]
    assert cells(text, "eval_loss") == ["0.500|before 2.00", "0.500|before 2.00"]
    assert cells(text, "learning_rate") == ["0.0001", "0.0005"] and not re.search(
        "<th>(seed|output_dir)</th>", text
    )
    loss = re.search("<figure.*?</figure>", text, re.S)[0]
    assert legend(loss) == [
        ("c0 d0", "slow 0.667"),
        ("c0 d0", "slow held out 0.500"),
        ("c1 d1", "fast 0.667"),
        ("c1 d1", "fast held out 0.500"),
    ]
    assert loss.count("<polyline") == 4
    assert re.findall('<div><small>(.*?)</small><div class="text">(.*?)<', text) == [
        ("slow before", "hm"),
        ("slow after", "no"),
        ("fast after", "yes"),
    ]


def test_stages_of_one_name_are_compared_with_each_other(tmp_path):
    for run, last in (("a", "02_dpo"), ("b", "02_rl")):
        for name in ("01_sft", last):
            stage(tmp_path / "x" / run / name, {"accuracy": 0.25 if run == "a" else 0.5})
        chain(
            tmp_path / "x" / run,
            {"finished": True},
            [{"success": True}] * 2,
            {"01_sft": {"seed": run}, last: {}},
        )
    text = page(tmp_path / "x/a", tmp_path / "x/b")
    assert (
        re.findall("<h3>(.*?)</h3>", text) == ["01_sft", "02_dpo", "02_rl"]
        and " more</summary>" in text
        and ">0 more" not in text
    )
    assert cells(text, "accuracy") == ["0.250", "0.500|best"]
    assert cells(text, "seed") == ['"a"', '"b"']
    again = page(
        tmp_path / "x/a/01_sft", tmp_path / "x/b/01_sft"
    )  # folders of one name are told apart by their paths
    assert f"<th>{tmp_path}/x/a/01_sft</th>" in again


def test_one_odd_file_does_not_cost_the_page(tmp_path, monkeypatch):
    stage(tmp_path)
    rows(tmp_path / "samples.jsonl", {"prompt": 5, "before": "a", "after": "b"})
    text = report.write(tmp_path).read_text(encoding="utf-8").replace("<wbr>", "")
    assert (
        text.count("not shown: ") == 1
        and cells(text, "eval_loss") == ["2.00", "0.500", "−1.50|better"]
        and "<figure" in text
    )

    def broken(*_):
        raise ValueError(EVIL)

    monkeypatch.setattr(report, "build_answers", broken)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "not shown: ValueError" in text and "<script" not in text


def test_the_page_is_renamed_into_place(tmp_path, monkeypatch):
    first = report.write(stage(tmp_path)).read_text(encoding="utf-8")
    stage(tmp_path, {"eval_loss": 0.1})
    monkeypatch.setattr(report.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "report.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_line(tmp_path):
    done = run_command(str(stage(tmp_path / "a")))
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/a/report.html\n" and not done.stderr
    done = run_command(str(tmp_path / "a"), str(stage(tmp_path / "b")))
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/b/compare.html\n"
    assert run_command("--help").stdout == report.__doc__.strip() + "\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give the folder of a run"),
        (["a", "--out=b"], "unknown option --out=b"),
        (["a", "--output"], "unknown option --output"),
        (["recipes", "core/../recipes"], "given twice"),
        (["/no/such"], "/no/such is not the folder of a run"),
        (["recipes"], "recipes is not the folder of a run"),
        (["recipes", "/no"], "is not the folder of a run"),
    ],
)
def test_mistakes_exit_with_status_2(arguments, words):
    done = run_command(*arguments)
    assert (
        done.returncode == 2
        and words in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not done.stdout
    )


def test_a_report_needs_neither_torch_nor_a_recipe():
    code = "import report, sys; print(*{'torch', 'pydantic', 'common'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "\n", done.stderr


def test_other_chats_that_end_in_the_same_words_are_other_prompts(tmp_path):

    def ask(system):
        return [
            {"role": "system", "content": system},
            {"role": "user", "content": "Hello!"},
        ]

    stage(tmp_path)
    rows(
        tmp_path / "samples.jsonl",
        *(
            {"prompt": ask(f"In {place}."), "expected": place, "answer": f"from {place}"}
            for place in ("Rome", "Oslo")
        ),
    )
    cards = re.findall(
        '<article class="box">\n<div class="text">(.*?)</article>', page(tmp_path), re.S
    )
    assert (
        len(cards) == 2
        and "In Rome." in cards[0]
        and "from Rome" in cards[0]
        and "from Oslo" in cards[1]
        and "Rome" not in cards[1]
    )


def test_huge_figures_and_curves_are_shown_short():
    assert (
        metrics.format_number(1.014e304) == "1.01e+304"
        and metrics.format_number(123456.0) == "123,456"
    )
    assert (
        len(charts.round_numbers(0.0, 1e200)) < 8 and charts.round_numbers(0.0, 1e200)[-1] >= 1e200
    )


def test_folders_that_are_named_like_the_beginning_of_a_stage_are_compared(tmp_path):
    for name in ("01", "02"):
        (tmp_path / name).mkdir()
        stage(tmp_path / name / "01_sft")
        chain(
            tmp_path / name, {"finished": True}, [{"success": True}], {"01_sft": {"enabled": True}}
        )
    text = page(tmp_path / "01", tmp_path / "02")
    assert "01 / 02_sft" not in text and "01_sft" in text


# -- figures and what they mean --------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0004, "0.000400"),
        (1.0, "1.00"),
        (0.0, "0"),
        (-0.0, "0"),
        (-0.12345, "−0.123"),
        (99.96, "100"),
        (999.7, "1,000"),
        (9.999, "10.0"),
        (1234567.8, "1,234,568"),
        (29164, "29,164"),
        (3, "3"),
        (2e-5, "2.00e−05"),
        (float("inf"), "inf"),
        (None, "–"),
    ],
)
def test_figures_have_three_significant_digits(value, text):
    assert metrics.format_number(value) == text


@pytest.mark.parametrize(
    "name, old, new, mark",
    [
        ("eval_loss", 2.0, 1.0, "better"),
        ("eval_loss", 1.0, 2.0, "worse"),
        ("accuracy", 0.5, 0.75, "better"),
        ("accuracy", 0.75, 0.5, "worse"),
        ("accuracy", 0.5, 0.5, ""),
        ("accuracy", 0.1 + 0.2, 0.3, ""),  # the rounding of a sum is no change
        ("accuracy", 0.5, float("nan"), ""),
        ("entropy", 2.0, 1.0, ""),  # neither direction is good as such
        ("my_score", 1.0, 2.0, ""),  # unknown
    ],
)
def test_a_change_is_better_or_worse_where_the_direction_is_known(name, old, new, mark):
    assert metrics.judge_change(metrics.find_metric(name, {}), old, new) == mark


def test_marks_are_words_and_an_unknown_metric_has_neither_mark_nor_meaning(tmp_path):
    text = page(stage(tmp_path, {"mine": 2.0, "mine_before": 1.0, "reward": 1, "reward_before": 3}))
    assert cells(text, "mine") == ["1.00", "2.00", "+1.00"]
    assert cells(text, "reward") == ["3", "1", "−2|worse"]
    assert "<tr><th>mine</th>" in text
    meaning = "what training minimizes, on held-out rows; lower is better"
    assert f"<tr><th>eval_loss<small>{meaning}</small></th>" in text
    loss = re.search("<figure.*?</figure>", text, re.S)[0]
    assert '<small class="meaning">what training minimizes; lower is better</small>' in loss


def test_curves_of_chosen_and_rejected_answers_are_explained_by_name(tmp_path):
    stage(tmp_path)
    rows(
        tmp_path / "metrics.jsonl",
        *({"step": n, "chosen_logps": -n, "rejected_logps": -2 * n} for n in (1, 2)),
    )
    assert "chosen_logps: log-probability of chosen answers; higher is better</small>" in page(
        tmp_path
    )
    assert "rejected_logps: log-probability of rejected answers</small>" in page(tmp_path)


def names_in_the_documentation():
    """The names in the first columns of docs/metrics.md, below the affixes."""
    names = []
    text = (ROOT / "docs/metrics.md").read_text()
    for line in text.partition("\n## ")[2].splitlines():
        if line.startswith("| `"):
            names += re.findall(r"`([\w.]+)`", line.split(" | ")[0])
    return names


def test_every_documented_metric_has_a_meaning_and_the_other_way_round():
    documented = {name.removeprefix("eval_") for name in names_in_the_documentation()}
    assert len(documented) >= 69
    assert documented == set(metrics.METRICS)


@pytest.mark.parametrize(
    "name, family",
    [
        ("reward_length", "reward_NAME"),
        ("reward_my.py:score", "reward_NAME"),
        ("reward_feedback", "reward_NAME"),
        ("sums_accuracy", "TASK_accuracy"),
        ("gsm8k_strict", "TASK_METRIC"),
        ("teacher_calls_cached", "..._calls_cached"),
        ("policy_missing", "..._missing"),
    ],
)
def test_a_metric_of_a_family_is_found_by_the_options_of_its_stage(name, family):
    options = {
        "reward": ["length", "research/my.py:score"],
        "eval_reasoning_tasks": ["data/sums.jsonl", "gsm8k"],
    }
    assert metrics.find_metric(name, options) == metrics.METRICS[family]


@pytest.mark.parametrize(
    "name", ["my_accuracy", "my_cost", "reward_what", "dpo_margin", "dpo_1_what", "eval_"]
)
def test_a_metric_that_nobody_defined_is_unknown(name):
    assert metrics.find_metric(name, {"reward": ["length"]}) is None


def test_metrics_of_contained_recipes_say_whose_they_are():
    accuracy = metrics.METRICS["accuracy"]
    reward = metrics.find_metric("reward_eval_accuracy", {})
    assert reward.better == "higher"
    assert str(reward) == (
        f"{accuracy.meaning}, on held-out rows, of the reward model; higher is better"
    )
    assert "in this round of DPO" in str(metrics.find_metric("dpo_2_eval_margin", {}))


# -- several runs ----------------------------------------------------------------------------------


def test_any_number_of_runs_are_compared(tmp_path):
    rates = [1e-4, 2e-4, 3e-4, 4e-4]
    folders = []
    for number, rate in enumerate(rates):
        accuracy = [0.5, 0.9, 0.9, 0.1][number]
        results = {"accuracy": accuracy, "entropy": accuracy}
        folders.append(stage(tmp_path / f"run{number}", results, {"learning_rate": rate}))
    output = tmp_path / "all.html"
    text = page(*folders, output=output)
    assert output.exists() and not list(tmp_path.glob("run*/*.html"))
    head = re.search("<thead><tr>(.*?)</tr>", text)[1]
    assert re.findall("<th>(.*?)</th>", head) == ["", "run0", "run1", "run2", "run3"]
    assert cells(text, "accuracy") == ["0.500", "0.900|best", "0.900|best", "0.100"]
    assert cells(text, "entropy") == ["0.500", "0.900", "0.900", "0.100"]
    assert cells(text, "learning_rate") == ["0.0001", "0.0002", "0.0003", "0.0004"]
    loss = re.search("<figure.*?</figure>", text, re.S)[0]
    assert loss.count("<polyline") == 8
    looks = [look for look, _ in legend(loss)]
    assert looks == ["c0 d0"] * 2 + ["c1 d1"] * 2 + ["c2 d2"] * 2 + ["c3 d3"] * 2


def test_thirty_lines_of_a_chart_all_differ():
    looks = {charts.Line("loss", number, False, []).look for number in range(30)}
    assert len(looks) == 30
    style = (ROOT / "report.html.j2").read_text()
    for number in range(charts.NUM_COLOURS):
        assert f".c{number} {{ color: var(--c{number}); }}" in style or number < 3
        assert style.count(f"--c{number}: #") == 2  # light and dark
    for number in range(1, charts.NUM_DASHES):
        assert f".d{number} polyline {{ stroke-dasharray" in style


def test_a_stage_that_only_some_runs_have_is_compared_among_them(tmp_path):
    for run, stages in (
        ("a", ["01_sft"]),
        ("b", ["01_sft", "02_dpo"]),
        ("c", ["01_sft", "02_dpo"]),
    ):
        for name in stages:
            stage(tmp_path / run / name, {"accuracy": 0.5}, {"seed": run if "dpo" in name else 1})
        plan = {name: {"seed": run if "dpo" in name else 1} for name in stages}
        chain(tmp_path / run, {"finished": True}, [{"success": True}] * len(stages), plan)
    text = page(tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert cells(text, "seed") == ["–", '"b"', '"c"']
    assert cells(text.partition(">02_dpo</th>")[2], "accuracy") == ["–", "0.500", "0.500"]


# -- what is shown as it is ------------------------------------------------------------------------


def test_long_names_may_break_after_an_underscore(tmp_path):
    text = report.write(stage(tmp_path, {"a_very_long_name": 1.0, "b_<i>": 2.0})).read_text()
    assert "<th>a_<wbr>very_<wbr>long_<wbr>name</th>" in text
    assert "<th>b_<wbr>&lt;i&gt;</th>" in text


def test_control_characters_are_shown_and_do_nothing(tmp_path):
    evil = "\x1b[31mred\x07\x00\x9b2J\u202egnp.exe\x7f\r"
    harmless = r"\x1b[31mred\x07\x00\x9b2J\u202egnp.exe\x7f\r"
    stage(tmp_path, {evil: 1.0}, data={"path": evil}, command=f"python {evil}")
    sample = {"prompt": f"a\n\tb{evil}", "expected": evil, "before": evil, "after": "x"}
    rows(tmp_path / "samples.jsonl", sample)
    text = page(tmp_path)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    assert text.count(harmless) >= 5
    assert f"a\n\tb{harmless}" in text


def test_sampled_completions_of_rl_are_shown_only_without_held_out_answers(tmp_path):
    stage(tmp_path)
    sampled = [
        {"step": 10, "kind": kind, "prompt": "1 + 1?", "completion": text, "reward": reward}
        for kind, text, reward in (("best", "right", 1.0), ("worst", "wrong", 0.0))
    ]
    rows(tmp_path / "samples.jsonl", *sampled)
    boxes = re.findall('<small>([^<]*)</small><div class="text">(.*?)</div>', page(tmp_path))
    assert [(title.split()[1:4], text) for title, text in boxes] == [
        (["step", "10", "best"], "right"),
        (["step", "10", "worst"], "wrong"),
    ]
    held_out = {"step": 9, "kind": "held_out", "prompt": "2 + 2?", "completion": "four"}
    rows(tmp_path / "samples.jsonl", held_out, *sampled)
    text = page(tmp_path)
    assert ">four<" in text and ">wrong<" not in text


def test_chosen_and_rejected_answers_stand_beside_those_of_the_model(tmp_path):
    (stage(tmp_path / "01_sft"), stage(tmp_path / "02_dpo"))
    sample = {"prompt": "3 pm?", "expected": "15:00", "before": "hm", "after": "three"}
    rows(tmp_path / "01_sft/samples.jsonl", sample)
    rows(
        tmp_path / "02_dpo/samples.jsonl",
        {"prompt": "3 pm?", "chosen": "15:00", "rejected": "3", "before": "three", "after": "15"},
        {"prompt": "4 pm?", "rejected": "4", "before": "four", "after": "16"},
    )
    plan = {"01_sft": {}, "02_dpo": {}}
    text = page(chain(tmp_path, {"finished": True}, [{"success": True}] * 2, plan))
    boxes = re.findall('<small>([^<]*)</small><div class="text">(.*?)</div>', text)
    assert boxes == [
        ("chosen in the data", "15:00"),
        ("rejected in the data", "3"),
        ("01_sft before", "hm"),
        ("01_sft after", "three"),
        ("02_dpo after", "15"),
        ("rejected in the data", "4"),
        ("02_dpo before", "four"),
        ("02_dpo after", "16"),
    ]
    assert text.count("expected: 15:00<") == 1 and text.count("expected:") == 1


# -- the command -----------------------------------------------------------------------------------


def test_the_command_that_made_a_run_is_at_its_top(tmp_path):
    made = "python recipes/sft.py --model='a b' --note='<i>'"
    text = page(stage(tmp_path / "01_sft", command=made))
    assert commands(text) == [made] and "<i>" not in text
    assert text.count("recipes/sft.py") == 1  # not among the lineage too
    other = "python chain.py x.yaml --from_stage=dpo"
    stage(tmp_path / "02_dpo", command=other)
    plan = {"01_sft": {}, "02_dpo": {}}
    chain(tmp_path, {"finished": True}, [{"success": True}] * 2, plan)
    record = json.loads((tmp_path / "pipeline.json").read_text())
    rows(tmp_path / "pipeline.json", record | {"command": other})
    text = page(tmp_path)
    assert commands(text) == [other]
    assert "command: python recipes/sft.py" in text  # that stage is of another command
    assert text.count("from_stage") == 1
    text = page(tmp_path / "01_sft", tmp_path / "02_dpo")
    assert commands(text) == [made, other] and "<th>command</th>" not in text


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (["--model=a", "--beta", "0.1"], "--model=a --beta 0.1"),
        (["--note=a b", "it's"], "'--note=a b' 'it'\"'\"'s'"),
        (["--api_key=sk-123", "--max_new_tokens=4"], "'--api_key=***' --max_new_tokens=4"),
        (["--api-key", "sk-123", "--sft.hub_token", "-x"], "--api-key '***' --sft.hub_token '***'"),
        (["--use_auth_token", "--seed=1"], "--use_auth_token --seed=1"),
        (["--Password=x"], "'--Password=***'"),
        (["--kwargs={api_key: x, n: 1}"], "'--kwargs=***'"),
        (["--kwargs", '{"password": "x"}'], "--kwargs '***'"),
        (["--kwargs={max_new_tokens: 4}"], "'--kwargs={max_new_tokens: 4}'"),
        (["--url=https://me:pw@host/v1"], "'--url=https://***@host/v1'"),
    ],
)
def test_a_command_is_quoted_and_its_secrets_are_masked(arguments, shown, monkeypatch):
    # Under pytest-xdist the main module has no file, as in a notebook.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "dpo.py", raising=False)
    monkeypatch.setattr(sys, "argv", ["recipes/dpo.py", *arguments])
    assert command.started_by() == f"python recipes/dpo.py {shown}"


def test_in_a_notebook_there_is_no_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    assert command.started_by() == ""


def test_a_command_of_several_processes_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "dpo.py", raising=False)
    monkeypatch.setattr(sys, "argv", ["recipes/dpo.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.started_by().startswith("python recipes/dpo.py  # in each of 2 processes")
