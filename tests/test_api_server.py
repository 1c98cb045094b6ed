"""Requests to a server: what is refused, adapted, waited for, and never written down."""
# ruff: noqa: F811 (fixtures are imported, and then arguments)

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
import urllib.parse

import pytest
from conftest import ROOT
from test_client import (  # noqa: F401
    CANARY,
    GREEDY,
    answers_to,
    ask,
    client,
    numbered,
    server,
    short_delays,
)

import core.api_server
import core.runtime
from core.llm_client import LLMClientError


def error(status, message, headers=None, **fields):
    return status, json.dumps({"error": {"message": message, **fields}}).encode(), headers or {}


def kept_lines(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


# -- what a server refuses -------------------------------------------------------------------------

REFUSALS = [
    error(400, "content filtered", code="content_filter"),
    error(400, "The response was filtered due to Azure OpenAI's content management policy"),
    error(403, "Your input was flagged by moderation"),
    error(400, "This model's maximum context length is 100 tokens"),
    error(400, "'max_tokens' is too large: 64. This model's maximum context length is 100"),
    error(413, "prompt is too long: 210000 tokens > 200000 maximum"),
    error(422, "Input validation error: `inputs` must have less than 1024, too many tokens"),
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refused_question_is_one_missing_answer_named_and_not_sent_again(
    server,
    tmp_path,
    caplog,
    refusal,
):
    """Even if it is the first of all."""
    server.respond = lambda question, body: refusal if question == "q0" else None
    expected = [None, *answers_to(numbered(12)[1:])]
    for _ in range(2):
        one = client(server, tmp_path, concurrency=1, max_calls=11)
        assert ask(one, numbered(12)) == expected
    assert server.asked["q0"] == 1 and server.asked.total() == 12
    assert f"refuses the question 'q0': {refusal[0]}: " in caplog.text
    (line,) = [line for line in kept_lines(tmp_path) if "refused" in line]
    assert line["question"] == "q0" and line["text"] is None
    assert one.log.num_calls == 11, "a refusal costs nothing"


def test_too_many_refusals_stop_the_run_and_say_what_helps(server, tmp_path):
    server.respond = lambda question, body: REFUSALS[0] if question < "q3" else None
    for _ in range(2):
        with pytest.raises(LLMClientError, match="refused, 400: .*content filtered"):
            ask(client(server, tmp_path, concurrency=1), numbered(9))
    with pytest.raises(LLMClientError, match="raise max_missing, or remove their lines from"):
        ask(client(server, tmp_path, concurrency=1), numbered(2))
    assert ask(client(server, tmp_path, max_missing=0.5), numbered(9))[:4] == [
        None,
        None,
        None,
        "answer to q3",
    ]
    assert max(server.asked.values()) == 1


def test_a_status_400_is_about_one_question_where_others_are_answered(
    server,
    tmp_path,
):
    """Whatever its words. Where nothing was answered yet, it may be about all of them."""
    odd = error(400, "the flux compensator objects")
    server.respond = lambda question, body: odd if question == "q5" else None
    expected = answers_to(numbered(12))
    expected[5] = None
    assert ask(client(server, tmp_path, concurrency=1), numbered(12)) == expected

    server.respond = lambda question, body: odd
    (tmp_path / "new").mkdir()
    with pytest.raises(LLMClientError, match="refuses: 400: .*flux compensator"):
        ask(client(server, tmp_path / "new", concurrency=1), ["a", "b"])
    assert server.asked["a"] + server.asked["b"] == 1


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_is_refused_for_all_stops_at_once(server, tmp_path, status):
    ask(client(server, tmp_path), ["known"])
    server.respond = lambda question, body: error(status, "no")
    with pytest.raises(LLMClientError, match=f"refuses: {status}"):
        ask(client(server, tmp_path, concurrency=1), numbered(9))
    assert server.asked.total() == 2


# -- parameters ------------------------------------------------------------------------------------

SAMPLING = GREEDY | {"temperature": 0.5, "top_p": 0.9}


@pytest.mark.parametrize(
    "refused, refusal, sent",
    [
        (
            "temperature",
            error(400, "Unsupported parameter: temperature is not supported", param="temperature"),
            {"max_tokens": 64, "top_p": 0.9},
        ),
        (
            "temperature",
            error(400, "Unsupported value: 'temperature' does not support 0.5 with this model."),
            {"max_tokens": 64, "top_p": 0.9},
        ),
        (
            "max_tokens",
            error(400, "Unsupported parameter: max_tokens; use max_completion_tokens"),
            {"temperature": 0.5, "top_p": 0.9, "max_completion_tokens": 64},
        ),
        (
            "top_p",
            error(400, "`temperature` and `top_p` cannot both be specified for this model"),
            {"temperature": 0.5, "max_tokens": 64},
        ),
        ("top_p", error(422, "extra fields not permitted: top_p"), None),
    ],
)
def test_a_refused_parameter_is_adapted_once_and_said(
    server,
    tmp_path,
    caplog,
    refused,
    refusal,
    sent,
):
    accepted = []

    def respond(question, body):
        if refused in body:
            return refusal
        accepted.append({name: body[name] for name in body if name not in ("messages", "model")})
        return None

    server.respond = respond
    one = client(server, tmp_path, concurrency=1)
    assert ask(one, numbered(6), sampling=SAMPLING) == answers_to(numbered(6))
    assert server.asked.total() == 7
    assert ask(one, ["later"], sampling=SAMPLING) == ["answer to later"]
    assert server.asked.total() == 8
    if sent:
        assert accepted == [sent] * 7
    (message,) = [record.message for record in caplog.records if "does not take" in record.message]
    assert f"big does not take {refused}; asking with" in message
    assert one.log.num_calls == 7, "a refusal costs nothing"


def test_all_parameters_may_be_refused(server, tmp_path):
    """Requests that are under way at the same time meet each refusal together."""
    names = ("temperature", "max_tokens", "top_p", "max_completion_tokens")

    def respond(question, body):
        time.sleep(0.02)
        for name in names:
            if name in body:
                return error(400, f"Unsupported parameter: {name}", param=name)
        return None

    server.respond = respond
    one = client(server, tmp_path)
    assert ask(one, numbered(16), sampling=SAMPLING) == answers_to(numbered(16))
    assert server.asked.total() <= 16 + 4 * 8


# -- time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["headers", "body"])
def test_an_answer_has_a_deadline_however_often_a_byte_comes(
    server,
    tmp_path,
    monkeypatch,
    part,
):
    monkeypatch.setattr(core.api_server, "MAX_ATTEMPTS", 2)
    began = []

    class Dripping(server.RequestHandlerClass):
        def answer(self, status, body, headers=None):
            began.append(time.monotonic())
            text = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            if part == "body":
                text += b"Content-Length: %d\r\n\r\n" % len(body)
            for byte in text + body:
                try:
                    self.wfile.write(bytes([byte]))
                except OSError:
                    return False
                if text.endswith(b"\r\n\r\n") or part == "headers":
                    time.sleep(0.02)
            return True

    server.RequestHandlerClass = Dripping
    start = time.monotonic()
    with pytest.raises(LLMClientError, match="no complete answer within 0.5 s"):
        ask(client(server, tmp_path, call_timeout=0.5, concurrency=1), ["q0"])
    assert len(began) == 2
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": "3600"}, 3600),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "soon"}, 0),
        ({"retry-after": "-5"}, 0),
        ({"retry-after": "nan"}, 0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({}, 0),
    ],
)
def test_what_a_server_asks_to_wait(headers, seconds):
    assert core.api_server.retry_after(headers) == seconds


def test_a_date_to_wait_for():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    assert core.api_server.retry_after({"retry-after": date}) == pytest.approx(90, abs=2)


def test_all_questions_wait_as_long_as_the_server_asks(server, tmp_path):
    times = []

    def respond(question, body):
        times.append(time.monotonic())
        return error(429, "slow down", {"Retry-After": "1"}) if len(times) == 1 else None

    server.respond = respond
    assert ask(client(server, tmp_path, concurrency=2), numbered(5)) == answers_to(numbered(5))
    # The second request was under way already.
    pauses = [second - times[0] for second in times[2:]]
    assert min(pauses) > 0.95


def test_an_hour_is_waited_and_more_is_not(server, tmp_path, caplog, monkeypatch):
    """The clock goes on by an hour as soon as somebody looks."""
    asked_to_wait = iter(["3600", "3601"])

    def respond(question, body):
        wait = next(asked_to_wait, None)
        return error(429, "quota exceeded", {"Retry-After": wait}) if wait else None

    clock = iter(range(10**9))
    times = types.SimpleNamespace(monotonic=lambda: 600.0 * next(clock), time=time.time)
    monkeypatch.setattr(core.api_server, "time", times)
    monkeypatch.setattr(core.api_server, "POLL_SECONDS", 0.001)
    server.respond = respond
    with pytest.raises(LLMClientError, match="asks to wait 3601 seconds: 429"):
        ask(client(server, tmp_path, concurrency=1), ["q0"])
    assert server.asked["q0"] == 2
    assert "asks to wait 3600 seconds: 429" in caplog.text


def test_a_quota_that_is_used_up_stops_at_once(server, tmp_path):
    refusal = error(429, "You exceeded your current quota", code="insufficient_quota")
    server.respond = lambda question, body: refusal
    with pytest.raises(LLMClientError, match="refuses: 429: .*exceeded your current quota"):
        ask(client(server, tmp_path, concurrency=1), numbered(5))
    assert server.asked.total() == 1


# -- odd answers -----------------------------------------------------------------------------------


def test_reasoning_is_no_part_of_the_answer(server, tmp_path):
    server.reply = lambda question, body: {"content": "7", "reasoning_content": "6 or 8?"}
    assert ask(client(server, tmp_path), ["q0"]) == ["7"]
    assert kept_lines(tmp_path)[0]["reasoning"] == "6 or 8?"


def test_an_answer_of_another_model_is_used_marked_and_said(
    server,
    tmp_path,
    caplog,
):
    server.instead = {"model": "small"}
    for _ in range(2):
        one = client(server, tmp_path)
        assert ask(one, numbered(3)) == answers_to(numbered(3))
        assert one.report()["teacher_other_model"] == 3
    assert caplog.text.count("asked for big, but small answers") == 1
    assert {line["model"] for line in kept_lines(tmp_path)} == {"small"}


def test_answers_that_the_token_limit_ended_are_counted_and_said(
    server,
    tmp_path,
    caplog,
):
    choice = {"index": 0, "finish_reason": "length", "message": {"content": "We begin"}}
    server.instead = {"choices": [choice]}
    one = client(server, tmp_path)
    assert ask(one, numbered(2)) == ["We begin"] * 2
    assert "the token limit ended 2 of 2 answers; raise max_new_tokens" in caplog.text
    assert one.report()["teacher_cut"] == 2


def test_a_refusal_by_the_model_is_said(server, tmp_path):
    server.reply = lambda question, body: {"content": None, "refusal": "I can not help."}
    with pytest.raises(LLMClientError, match="the model declines: I can not help"):
        ask(client(server, tmp_path), ["q0"])


# -- signals ---------------------------------------------------------------------------------------

SIGNALLED_CLIENT = """
import sys; sys.path.insert(0, {root!r})
from core.llm_client import LLMClient, LLMClientConfig
from core.runtime import exit_on_signals
from core.sampling import SAMPLING_DEFAULTS
exit_on_signals()
config = LLMClientConfig(output_dir={folder!r}, concurrency=4)
client = LLMClient(config, "teacher", "big", "api", {url!r})
requests = [([{{"role": "user", "content": f"q{{n}}"}}], 0) for n in range(40)]
client.ask("x", requests, SAMPLING_DEFAULTS, "1", str)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_answers_under_way_and_keeps_them(
    server,
    tmp_path,
    number,
):
    def slow_reply(question, body):
        time.sleep(1.0)
        return f"answer to {question}"

    server.reply = slow_reply
    script = SIGNALLED_CLIENT.format(root=str(ROOT), folder=str(tmp_path), url=server.url)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    while server.asked.total() < 6:  # the first four have an answer
        time.sleep(0.01)
    process.send_signal(number)
    _, messages = process.communicate(timeout=30)
    assert process.returncode == 128 + number, messages
    kept = {line["text"] for line in kept_lines(tmp_path)}
    assert kept == {f"answer to {question}" for question in server.completed}
    assert len(kept) == server.asked.total() < 30


def test_a_signal_during_a_long_wait_ends_the_run_soon(server, tmp_path):
    server.respond = lambda question, body: error(429, "later", {"Retry-After": "3000"})
    script = SIGNALLED_CLIENT.format(root=str(ROOT), folder=str(tmp_path), url=server.url)
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while server.asked.total() < 4:
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    assert process.wait(timeout=10) == 143
    assert server.asked.total() == 4


def test_inside_a_loop_that_defers_signals_the_questions_of_the_step_are_all_asked(
    server,
    tmp_path,
):
    """An RL step ends with all of its rewards; then the loop saves and exits."""

    def reply(question, body):
        if question == "q1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return "answer"

    server.reply = reply
    answers = []
    with pytest.raises(SystemExit) as stop, core.runtime.deferred_signals() as signals:
        answers += ask(client(server, tmp_path, concurrency=1), numbered(4))
    assert answers == ["answer"] * 4
    assert signals == [signal.SIGTERM]
    assert stop.value.code == 143


# -- keys ------------------------------------------------------------------------------------------

ODD_KEY = 'sk-"ca/na\\ry<0123>&456'


def escaped(key):
    """What a server may make of a key."""
    hexadecimal = "".join(f"\\u{ord(character):04X}" for character in key)
    return [
        key,
        json.dumps(key)[1:-1],
        json.dumps(json.dumps(key)[1:-1])[1:-1],
        json.dumps(key)[1:-1].replace("/", "\\/"),
        hexadecimal,
        json.dumps(hexadecimal)[1:-1],
        "".join(f"\\x{ord(character):02x}" for character in key),
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
        "".join(f"%{ord(character):02x}" for character in key),
        html.escape(key),
        "".join(f"&#{ord(character)};" for character in key),
        "".join(f"&#x{ord(character):x};" for character in key),
        key.upper(),
        key.replace("-", "\\u002d"),
    ]


@pytest.mark.parametrize("key", [CANARY, ODD_KEY])
def test_a_key_is_hidden_in_whatever_form(key):
    pattern = core.api_server.escaped_forms(key)
    for form in escaped(key):
        assert pattern.sub("***", f"key: {form}.") == "key: ***.", form
    assert not pattern.search("An ordinary text about sk-canaries, 0123456789abcdef & others.")


@pytest.mark.parametrize("key", [CANARY, ODD_KEY])
def test_no_file_has_the_key_wherever_a_server_writes_it(
    server,
    tmp_path,
    monkeypatch,
    key,
):
    monkeypatch.setenv("MY_KEY", key)
    forms = escaped(key)

    def respond(question, body):
        form = forms[int(question[1:]) % len(forms)]
        kind = int(question[1:]) // len(forms)
        message = {"content": f"see {form}", "reasoning": form, "refusal": form}
        choice = {"index": 0, "message": message, "finish_reason": form}
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        answer = {"model": form, "choices": [choice], "usage": usage}
        if kind == 0:
            return 200, json.dumps(answer).encode()
        if kind == 1:
            return error(400, form, code="content_filter")
        return error(401 if kind == 2 else 200, form)

    server.respond = respond
    with core.runtime.start_logging("debug", tmp_path / "training.log"):
        one = client(server, tmp_path, "MY_KEY", max_missing=0.99)
        for kind in range(4):
            first = kind * len(forms)
            try:
                ask(one, [f"q{number}" for number in range(first, first + len(forms))])
            except LLMClientError as refusal:
                assert not one.server.secret_pattern.search(str(refusal))
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) == 3
    for text in texts:
        assert not one.server.secret_pattern.search(text)
        for form in forms:
            assert form.lower() not in text.lower()
    assert re.search(r"see \*\*\*", "".join(texts))


def test_requests_are_written_down_before_they_are_sent(server, tmp_path):
    """What was under way when a run was killed counts as paid."""
    sent = []

    def respond(question, body):
        sent.append((tmp_path / "requests.jsonl").read_text().count("\n"))
        return None

    server.respond = respond
    ask(client(server, tmp_path, concurrency=1), numbered(3))
    assert sent == [1, 2, 3]
    lines = (tmp_path / "calls.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "calls.jsonl").write_text("".join(lines[:2]))  # the third was lost
    with pytest.raises(LLMClientError, match="max_calls=4 is reached"):
        ask(client(server, tmp_path, max_calls=4), numbered(9))
    assert server.asked.total() == 4
    # Without the file, as in folders of older versions, answers are counted.
    (tmp_path / "requests.jsonl").unlink()
    one = client(server, tmp_path)
    ask(one, numbered(2))
    assert one.log.num_calls == 3
