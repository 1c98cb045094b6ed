"""report.py: pages of folders, however far a run has come; the folders are written by hand here."""

import html
import json
import re
import subprocess
import sys
import time

import markupsafe
import pytest
from conftest import ROOT

import report

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


def page(*folders):
    text = report.write(*folders).read_text(encoding="utf-8")
    assert "not shown" not in text
    return text


def cells(text, name):
    """The texts in the row of a table that begins with `name`; those below each other parted by a
    bar."""
    row = re.search(rf"<tr><th>{name}</th>(.*?)</tr>", text)[1]
    return [
        html.unescape(cell.replace("<small>", "|").replace("</small>", ""))
        for cell in re.findall("<td>(.*?)</td>", row)
    ]


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
    assert cells(text, "eval_loss") == ["2", "0.4", "−1.6"]  # stage.json has the last word
    assert cells(text, "accuracy") == [
        "0.016|0.003 to 0.083, n 64",
        "0.906|0.81 to 0.956, n 64",
        "+0.89",
    ]
    assert re.findall("<tr><th>([^<]*)</th><td>", text) == [
        "eval_loss",
        "accuracy",
    ]  # no rows for the ends, and one value is no row
    assert "<small>seconds 60, train_loss 1.25, tokens_per_s 29,164</small>" in text


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
    assert "state running" in text and cells(text, "eval_reward") == ["0.1", "0.3", "+0.2"]
    assert "reward 0.4<" in text and " more<" not in text and "two</div><small>reward 1<" in text
    rows(tmp_path / "metrics.jsonl", lines[0])
    assert cells(page(tmp_path), "eval_reward") == ["0.1", "–", "–"]
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
    assert "state done" in text and '<th colspan="4">01_note <small>length 5</small></th>' in text


def test_recipes_inside_a_stage_show_too(tmp_path):
    for run in ("a", "b"):
        (
            stage(tmp_path / run, {"win_rate": 0.6}),
            stage(tmp_path / run / "dpo_1", {"margin": 7.0}, ended=-30),
            stage(tmp_path / run / "dpo_2", {"margin": 9.0}, ended=-9000),
        )
    (tmp_path / "a/training.log").write_text(f"{stamp(-40)},000 INFO recipes: dpo_2 begins\n")
    text = page(tmp_path / "a")
    assert "seconds 60, margin 7<" in text and "<h3>a/dpo_1</h3>" in text and "dpo_2" not in text
    (tmp_path / "b/training.log").write_text(
        f"{stamp(-40)},000 INFO recipes: x/dpo_2 is finished already\n"
    )  # by an earlier try
    assert "<h3>b/dpo_2</h3>" in page(tmp_path / "b")
    assert cells(page(tmp_path / "a", tmp_path / "b"), "margin") == ["–", "7", "–", "7", "0"]
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
        ("02_rl step 9", "two", "reward 1"),
        ("03_cot after", "1 + 1 = 2", "right 1"),
        ("04_rlaif new", "It is 2.", "win 0.5"),
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
    points = re.search('<polyline class="c0" points="(.*?)"', loss)[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert (
        100 < len(points) <= 200 and min(heights) == 10 and heights.count(10) == 1
    )  # the spike is still there
    assert "nan" not in text and "inf" not in text.replace("info", "")
    assert (
        re.findall(">([0-9]+)</text>", loss) == ["0", "500", "1000"] + ["2000", "4000"]
        and "step</text>" in loss
    )
    assert (
        "loss 0.0002<" in loss
        and 'circle class="c1 dashed"' in loss
        and "chosen_logps" in logps
        and "rejected_logps" in logps
    )
    assert loss.count("<circle") == 1  # evaluations alone


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
    assert report.round_numbers(low, high)[0] <= low and report.round_numbers(low, high)[-1] >= high
    assert report.round_numbers(low, high) == pytest.approx(wanted)


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
    assert re.findall("<th>((?:slow|fast) .*?)</th>", text) == [
        "slow before",
        "slow after",
        "fast before",
        "fast after",
    ]
    assert cells(text, "accuracy") == ["–", "0.5", "–", "0.75", "+0.25"] and cells(
        text, "extra"
    ) == ["–", "–", "–", "1", "–"]
    assert cells(text, "learning_rate") == ["0.0001", "0.0005"] and not re.search(
        "<th>(seed|output_dir)</th>", text
    )
    loss = re.search("<figure.*?</figure>", text, re.S)[0]
    looks = re.findall('<span class="(.*?)">. (.*?) [0-9.]+</span>', loss)
    assert looks == [
        ("c0", "slow loss"),
        ("c0 dashed", "slow eval_loss"),
        ("c1", "fast loss"),
        ("c1 dashed", "fast eval_loss"),
    ]
    assert loss.count("<polyline") == 4 and "┅ fast eval_loss" in loss and "━ fast loss" in loss
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
    assert (
        re.findall("<tr><th>accuracy</th>(.*?)</tr>", text)[0]
        == "<td>–</td><td>0.25</td><td>–</td><td>0.5</td><td>+0.25</td>"
    )
    assert cells(text, "seed") == ['"a"', '"b"']
    again = page(
        tmp_path / "x/a/01_sft", tmp_path / "x/b/01_sft"
    )  # folders of one name are told apart by their paths
    assert f"<th>{tmp_path}/x/a/01_sft after</th>" in again


def test_one_odd_file_does_not_cost_the_page(tmp_path, monkeypatch):
    stage(tmp_path)
    rows(tmp_path / "samples.jsonl", {"prompt": 5, "before": "a", "after": "b"})
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert (
        text.count("not shown: ") == 1
        and cells(text, "eval_loss") == ["2", "0.5", "−1.5"]
        and "<figure" in text
    )

    def broken(*_):
        raise ValueError(EVIL)

    monkeypatch.setattr(report, "build_answers", broken)
    text = report.write(tmp_path).read_text(encoding="utf-8")
    assert "not shown: ValueError" in text and "<script" not in text


def test_the_page_is_renamed_into_place(tmp_path, monkeypatch):
    first = page(stage(tmp_path))
    stage(tmp_path, {"eval_loss": 0.1})
    monkeypatch.setattr(report.Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first


def command(*arguments):
    return subprocess.run(
        [sys.executable, "report.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_the_command_line(tmp_path):
    done = command(str(stage(tmp_path / "a")))
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/a/report.html\n" and not done.stderr
    done = command(str(tmp_path / "a"), str(stage(tmp_path / "b")))
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/b/compare.html\n"
    assert command("--help").stdout == report.__doc__.strip() + "\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give the folder of a run"),
        (["a", "b", "c"], "give the folder of a run"),
        (["/no/such"], "/no/such: no run here"),
        (["recipes"], "recipes: no run here"),
        (["recipes", "/no"], "no run here"),
    ],
)
def test_mistakes_exit_with_status_2(arguments, words):
    done = command(*arguments)
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
        report.format_number(1.014e304) == "1.014e+304"
        and report.format_number(123456.0) == "123,456"
    )
    assert (
        len(report.round_numbers(0.0, 1e200)) < 8 and report.round_numbers(0.0, 1e200)[-1] >= 1e200
    )


def test_folders_that_are_named_like_the_beginning_of_a_stage_are_compared(tmp_path):
    for name in ("01", "02"):
        (tmp_path / name).mkdir()
        stage(tmp_path / name / "01_sft")
        chain(
            tmp_path / name, {"finished": True}, [{"success": True}], {"01_sft": {"enabled": True}}
        )
    text = report.write(tmp_path / "01", tmp_path / "02").read_text()
    assert "01 / 02_sft" not in text and "01_sft" in text
