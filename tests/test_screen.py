"""core/screen.py: what is shown while something takes long, on a terminal and in a file."""

import io
import json
import logging
import time

import pytest
import sft

import chat
import common
import core.chat
import core.checks
import core.screen
from core.run_log import log_step
from core.runtime import start_logging
from core.screen import Pace, ScreenHandler, busy, clock, show_count


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    with start_logging("info"):
        yield core.screen.find_terminal().stream


def rows_on_screen(text):
    """What a terminal shows of `text`: a cleared line is gone."""
    return [line.split(core.screen.CLEAR_LINE)[-1] for line in text.split("\n")]


def test_in_a_file_steps_come_every_few_seconds_and_the_ends_always(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(core.screen.time, "monotonic", lambda: now)
    with start_logging("info"):
        for step in range(1, 21):
            now += 1.0
            figures = {"eval_loss": 0.4} if step == 7 else {"loss": 0.5}
            log_step(tmp_path, step, 20, figures, "")
    shown = [line.split("/")[0].split()[1] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["1", "6", "7", "11", "16", "20"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))


def test_on_a_terminal_a_step_takes_the_place_of_the_one_before(tmp_path, terminal):
    logger = logging.getLogger("recipes")
    for step in (1, 2):
        log_step(tmp_path, step, 4, {"loss": 0.5}, "")
    logger.warning("a warning")
    show_count("answers", 3, 8)
    log_step(tmp_path, 3, 4, {"eval_loss": 0.25}, "")
    log_step(tmp_path, 4, 4, {"loss": 0.125}, "")
    text = terminal.getvalue()
    assert "step 1/4  loss 0.5" in text and "answers  3/8" in text
    assert rows_on_screen(text) == [
        "a warning",
        "step 3/4  eval_loss 0.25",
        "step 4/4  loss 0.125",
        "",
    ]


def test_a_line_that_will_be_replaced_never_wraps(tmp_path, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    log_step(tmp_path, 1, 4, {"a_long_name_of_a_metric": 0.5}, "")
    assert rows_on_screen(terminal.getvalue()) == ["step 1/4  a_long_na"]


def test_the_last_line_ends_where_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    with start_logging("info"):
        stream = core.screen.find_terminal().stream
        log_step(tmp_path, 1, 4, {"loss": 0.5}, "")
    assert rows_on_screen(stream.getvalue()) == ["step 1/4  loss 0.5", ""]


def test_what_is_printed_after_a_signal_begins_a_line(tmp_path, terminal):
    log_step(tmp_path, 1, 4, {"loss": 0.5}, "")
    core.screen.clear_open_line()
    terminal.write("stopped")
    assert rows_on_screen(terminal.getvalue()) == ["stopped"]


def test_what_says_nothing_itself_shows_for_how_long_it_has_gone_on(terminal):
    with busy("loading"):
        time.sleep(1.3)
    text = terminal.getvalue()
    assert "loading  0:01" in text and rows_on_screen(text) == [""]


def test_without_a_terminal_nothing_is_counted(capsys):
    with start_logging("info"):
        show_count("answers", 3, 8)
        with busy("loading"):
            pass
    assert capsys.readouterr().out == ""


def test_a_pace_counts_the_steps_of_this_process(monkeypatch):
    now = 100.0
    monkeypatch.setattr(core.screen.time, "monotonic", lambda: now)
    pace = Pace(steps_done=10)
    assert pace.describe(10, 40) == ""
    now += 20
    assert pace.describe(20, 40) == "0:20 elapsed, 0:40 left"
    assert pace.describe(40, 40) == "0:20 elapsed"
    assert [clock(seconds) for seconds in (59.6, 61, 3723)] == ["1:00", "1:01", "1:02:03"]


def test_the_handler_of_a_file_is_no_terminal():
    assert not ScreenHandler(io.StringIO()).is_terminal


def test_control_characters_are_shown_and_not_sent(tmp_path, monkeypatch):
    """What a model wrote clears no screen and moves no cursor."""
    monkeypatch.setattr("sys.stdout", Terminal())
    written = (
        "red \x1b[31m\x1b[2J, \x9b2K, a\rb, \x07, \u202eback; tab\tand\nline stay, \u00e9\U0001f600"
    )
    with start_logging("info", tmp_path / "training.log"):
        stream = core.screen.find_terminal().stream
        logging.getLogger("recipes").info("%s", written)
    shown = (
        r"red \x1b[31m\x1b[2J, \x9b2K, a\rb, \x07, \u202eback; tab"
        "\tand\nline stay, \u00e9\U0001f600\n"
    )
    assert stream.getvalue() == shown
    log = (tmp_path / "training.log").read_text(encoding="utf-8")
    assert log.endswith(f"INFO recipes: {shown}") and "\x1b" not in log


def test_messages_of_errors_send_no_control_characters(tmp_path, capsys, monkeypatch):
    """Names of columns and options come from files that somebody else wrote."""
    row = {"a\x1b[2J": 1, "b\u202e": 2}
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr("sys.argv", ["sft.py", "--model=x", f"--data={data}", "--output_dir=x\x1b"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        common.main(sft.SFTStage, "")
    shown = capsys.readouterr()
    assert "a\\x1b[2J" in shown.err and "b\\u202e" in shown.err
    assert "\x1b" not in shown.err + shown.out and "\u202e" not in shown.err + shown.out


def test_a_dry_run_marks_the_targets_on_a_terminal_too(tokenizer, monkeypatch):
    """Colours would be control characters, which are written out."""
    monkeypatch.setattr("sys.stdout", Terminal())
    ids = tokenizer("ab").input_ids
    shown = core.checks.highlight_targets(tokenizer, ids, [core.chat.IGNORE, *ids[1:]])
    assert core.screen.show_controls(shown) == shown and shown.endswith("⟧")


def test_what_chat_says_sends_no_control_characters(capsys):
    chat.say("(model \x1b[31m: cut)")
    assert capsys.readouterr().err == "(model \\x1b[31m: cut)\n"
