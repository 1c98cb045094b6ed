"""The client of other models, against a server that fails as servers do, and against one that is killed with its asker."""

import http.server
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter

import cot_distillation
import pytest
import rlaif
from conftest import ROOT

import common
import core.chat
import core.config
import core.llm_client
import core.runtime
import core.sampling
from core.errors import ConfigError

CANARY = "sk-canary-0123456789abcdef"
GREEDY = core.sampling.SAMPLING_DEFAULTS | {"temperature": 0.0}


class Scripted(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible server. Of the requests, `trouble` share goes wrong, each in one of five ways."""

    def do_GET(self):
        self.answer(404, b"{}")

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        with server.lock:
            server.asked[question] += 1
            fate = (
                server.random.choice(["429", "500", "slow", "half", "page"])
                if server.random.random() < server.trouble
                else ""
            )
        server.key = self.headers["Authorization"]
        if server.status:
            return self.answer(
                server.status,
                json.dumps({"error": {"message": f"no, {self.headers['Authorization']}"}}).encode(),
            )
        if fate in ("429", "500"):
            return self.answer(
                int(fate), b'{"error": {"message": "later"}}', {"Retry-After": "0.05"}
            )
        if fate == "slow":
            return time.sleep(1.5)
        text = server.reply(question, body)
        answer = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": text},
                    }
                ],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            }
            | server.instead
        ).encode()
        if fate == "half":
            answer = answer[: len(answer) // 2]
        if fate == "page":
            answer = b"<html>Bad gateway</html>"
        if self.answer(200, answer) and not fate:
            with server.lock:
                server.completed[question] += 1

    def answer(self, status, body, headers={}):
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            return True
        except OSError:  # the asker is gone
            return False

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.asked, server.completed, server.lock, server.random = (
        Counter(),
        Counter(),
        threading.Lock(),
        random.Random(0),
    )
    server.instead = {}
    server.trouble, server.status, server.reply = (
        0.0,
        None,
        lambda question, body: f"answer to {question}",
    )
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def client(server, tmp_path, variable=None, **options):
    config = core.llm_client.LLMClientConfig(output_dir=str(tmp_path), **options)
    return core.llm_client.LLMClient(config, "teacher", "big", "api", server.url, variable)


def asked(*questions):
    return [([{"role": "user", "content": question}], 0) for question in questions]


def test_a_call_is_made_once(server, tmp_path):
    """By model, messages, number, parameters and version; answers come back in the order of the requests."""
    questions = [f"q{n}" for n in range(12)]
    ask = lambda *requests, version="1", sampling=GREEDY: client(server, tmp_path).ask(
        "x", requests, sampling, version, str.upper
    )
    assert (
        ask(*asked(*questions)) == [f"ANSWER TO {q.upper()}" for q in questions]
        and server.asked.total() == 12
    )
    assert (
        ask(*asked(*reversed(questions))) == [f"ANSWER TO {q.upper()}" for q in reversed(questions)]
        and server.asked.total() == 12
    )
    ask(*asked("q0"), version="2")
    ask(*asked("q0"), sampling=GREEDY | {"temperature": 0.5})
    ask((asked("q0")[0][0], 1))
    assert server.asked["q0"] == 4
    ask(*asked("q1", "q1", "q1"))
    assert server.asked["q1"] == 1
    one = client(server, tmp_path)
    one.ask("x", asked("q0", "new"), GREEDY, "1", str)
    assert one.report() == {
        "teacher_calls": 1,
        "teacher_calls_cached": 1,
        "teacher_missing": 0,
        "teacher_tokens_in": 10,
        "teacher_tokens_out": 5,
    }


def test_troubles_are_tried_again(server, tmp_path):
    server.trouble = 0.3
    questions = [f"q{n}" for n in range(40)]
    found = client(server, tmp_path, call_timeout=1.0, concurrency=8, max_missing=0.0).ask(
        "x", asked(*questions), GREEDY, "1", str
    )
    assert found == [f"answer to {q}" for q in questions] and server.asked.total() > 45


def test_an_answer_without_text_is_missing_and_never_a_value(server, tmp_path, caplog):
    server.reply = lambda question, body: (
        None if question == "q0" else "what?" if question == "q1" else "7"
    )
    parse = lambda text: float(text) if text == "7" else None
    one = client(server, tmp_path, max_missing=0.25)
    assert (
        one.ask("x", asked(*(f"q{n}" for n in range(8))), GREEDY, "1", parse)
        == [None, None] + [7.0] * 6
    )
    assert "2 of 8 missing: 1 without an answer" in caplog.text and "'what?'" in caplog.text
    with pytest.raises(RuntimeError, match="3 of 9.*more than max_missing=0.25"):
        server.reply = lambda question, body: "what?"
        client(server, tmp_path, max_missing=0.25).ask(
            "x", asked(*(f"q{n}" for n in range(9))), GREEDY, "1", parse
        )


def test_other_errors_stop_at_once_with_the_server_s_words(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", CANARY)
    server.status = 401
    with pytest.raises(RuntimeError, match=r"refuses: 401: .*no, Bearer \*\*\*"):
        client(server, tmp_path, "MY_KEY", concurrency=1).ask(
            "x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str
        )
    assert server.asked.total() == 1 and server.key == f"Bearer {CANARY}"


def test_an_outage_is_missing_answers_and_stops_early(server, tmp_path, monkeypatch):
    import openai

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    server.status = 503
    with pytest.raises(RuntimeError, match="100 of 100 missing.*503"):
        client(server, tmp_path, concurrency=1).ask(
            "x", asked(*(f"q{n}" for n in range(100))), GREEDY, "1", str
        )
    assert len(server.asked) < 20  # a tenth may be missing: then it is over


def test_limits_hold_over_all_runs(server, tmp_path):
    with pytest.raises(RuntimeError, match="max_calls=10 is reached"):
        client(server, tmp_path, max_calls=10).ask(
            "x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str
        )
    assert server.asked.total() == 10
    with pytest.raises(RuntimeError, match="max_calls=10"):
        client(server, tmp_path, max_calls=10).ask(
            "x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str
        )
    assert server.asked.total() == 10
    prices = {"input_price": 1e5, "output_price": 1e5, "concurrency": 1}  # 1.5 dollars a call
    assert client(server, tmp_path, **prices).report()["teacher_cost"] == 15.0
    with pytest.raises(
        RuntimeError, match=r"max_cost=18 is reached: (19.50|21.00) dollars"
    ):  # one may be under way
        client(server, tmp_path, max_cost=18, **prices).ask(
            "x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str
        )
    assert server.asked.total() <= 14


@pytest.mark.parametrize(
    "answer",
    [
        {"usage": {"prompt_tokens": None, "completion_tokens": None}},
        {"usage": [1]},
        {"choices": [{"message": {"content": [{"text": "a"}]}}]},
        {"choices": [{"message": {"content": "\ud800"}}]},
        {"choices": "none"},
        {"error": {"message": "overloaded, not an answer"}},
    ],
)
def test_odd_answers_are_missing_or_text_and_break_nothing(server, tmp_path, monkeypatch, answer):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.instead = answer
    for _ in range(2):  # also of those that are kept
        try:
            found = client(server, tmp_path, concurrency=1).ask(
                "x", asked("q0", "q1"), GREEDY, "1", str
            )
            assert found in (["answer to q0", "answer to q1"], ["?", "?"], ["a", "a"])
        except core.llm_client.LLMClientError as error:
            assert "not an answer" in str(error)


@pytest.mark.parametrize(
    "choices",
    [
        [],
        [{"message": {"role": "assistant"}}],
        [{"message": {"content": ["a", {"type": "image"}]}}],
        [{"message": {"content": 7}}],
    ],
)
def test_what_a_server_charges_without_a_text_counts(server, tmp_path, choices):
    server.instead = {"choices": choices}
    one = client(server, tmp_path, max_calls=4, concurrency=1)
    with pytest.raises(RuntimeError, match="max_calls=4 is reached"):
        one.ask("x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str)
    assert server.asked.total() == 4 and one.report()["teacher_tokens_in"] == 40


def test_a_cost_that_nobody_can_tell_stops_the_asking(server, tmp_path):
    server.instead, prices = (
        {"usage": None},
        {"input_price": 1, "output_price": 1, "concurrency": 1},
    )
    with pytest.raises(
        RuntimeError, match="does not report token usage; set the prices to 0"
    ):
        client(server, tmp_path, max_cost=0.01, **prices).ask(
            "x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str
        )
    assert server.asked.total() <= 2
    client(server, tmp_path).ask("x", asked(*(f"q{n}" for n in range(20))), GREEDY, "1", str)


def test_limits_are_of_one_role(server, tmp_path):
    others = [
        {"key": str(n), "role": "policy", "text": "x", "tokens_in": 10**9, "tokens_out": 1}
        for n in range(9)
    ]
    (tmp_path / "calls.jsonl").write_text("".join(json.dumps(line) + "\n" for line in others))
    limits = {"max_calls": 2, "max_cost": 5, "input_price": 1, "output_price": 1}
    assert (
        len(client(server, tmp_path, **limits).ask("x", asked("one", "two"), GREEDY, "1", str)) == 2
    )


def test_killed_ten_times_nothing_is_lost_doubled_or_asked_again(server, tmp_path):
    """A server with 30% troubles; the asker is killed ten times, then let finish."""
    server.trouble = 0.3
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from core.llm_client import LLMClient, LLMClientConfig\n"
        "from core.sampling import SAMPLING_DEFAULTS\n"
        f"config = LLMClientConfig(output_dir={str(tmp_path)!r}, call_timeout=1.0, concurrency=4, max_missing=0.0)\n"
        f"client = LLMClient(config, 'teacher', 'big', 'api', {server.url!r})\n"
        "requests = [([{'role': 'user', 'content': f'q{n}'}], 0) for n in range(400)]\n"
        "found = client.ask('x', requests, SAMPLING_DEFAULTS, '1', str)\n"
        "assert found == [f'answer to q{n}' for n in range(400)]\n"
    )
    repeated, chance = 0, random.Random(1)
    slow = server.reply
    server.reply = lambda question, body: time.sleep(0.02) or slow(question, body)
    calls = tmp_path / "calls.jsonl"
    for _ in range(10):
        before = len(calls.read_bytes().splitlines()) if calls.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not calls.exists() or len(calls.read_bytes().splitlines()) < before + 8
        ):
            time.sleep(0.01)  # it is at work: now
        time.sleep(chance.random() * 0.2)
        process.kill()
        assert process.wait() == -9, "it was to be killed, and has finished before"
        time.sleep(0.3)
        kept = [json.loads(line) for line in calls.read_bytes().split(b"\n")[:-1]]
        known = {line["text"].removeprefix("answer to ") for line in kept}
        done, server.asked = server.asked, Counter({question: 10_000 for question in known})
        repeated += sum(done[question] > 10_000 for question in known)
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    repeated += sum(10_000 < count for count in server.asked.values())
    kept = Counter(json.loads(line)["text"] for line in calls.read_text().splitlines())
    assert len(kept) == 400 and set(kept.values()) == {1} and repeated == 0


def test_a_line_that_a_crash_cut_off_is_asked_again(server, tmp_path):
    client(server, tmp_path).ask("x", asked("q0", "q1"), GREEDY, "1", str)
    calls = tmp_path / "calls.jsonl"
    calls.write_bytes(calls.read_bytes()[:-9])
    assert client(server, tmp_path).ask("x", asked("q0", "q1"), GREEDY, "1", str) == [
        "answer to q0",
        "answer to q1",
    ]
    assert (
        server.asked.total() == 3
        and len([json.loads(line) for line in calls.read_text().splitlines()]) == 2
    )


@pytest.mark.parametrize(
    "kind, url, variable, words",
    [
        ("api", None, None, "teacher_base_url is the address of the server"),
        ("api", "http://127.0.0.1:9/v1?api_key=sk-secret", None, "has a query in it"),
        (
            "api",
            "http://127.0.0.1:9/v1",
            None,
            "teacher_base_url=http://127.0.0.1:9/v1 does not answer",
        ),
        ("api", "http://me:secret@127.0.0.1:9/v1", None, "has a password in it"),
        ("api", "http://127.0.0.1:9/v1", CANARY, "names the environment variable"),
        ("api", "http://127.0.0.1:9/v1", "LINE", "a line break or a letter beyond ASCII"),
        ("api", "http://127.0.0.1:PORT/v1", None, "does not answer: nonnumeric port"),
        ("openai", None, None, "OPENAI_API_KEY is not set"),
        ("anthropic", None, None, "ANTHROPIC_API_KEY is not set"),
    ],
)
def test_what_cannot_be_asked_is_refused_before(tmp_path, monkeypatch, kind, url, variable, words):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LINE", f"{CANARY}\r")
    with pytest.raises(ConfigError, match=words) as refusal:
        core.llm_client.LLMClient(
            core.llm_client.LLMClientConfig(output_dir=str(tmp_path)),
            "teacher",
            "big",
            kind,
            url,
            variable,
        ).check()
    assert CANARY not in str(refusal.value) and "secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"max_calls": 3},
            "max_calls has no effect with teacher_model_type=local: it is for servers",
        ),
        (
            {"teacher_base_url": "http://127.0.0.1:9/v1"},
            "teacher_base_url has no effect with teacher_model_type=local",
        ),
        ({"teacher_api_key": CANARY}, "names the environment variable"),
        ({"max_cost": 1.0}, "max_cost needs input_price"),
    ],
)
def test_options_of_servers_are_refused_for_a_model_run_here_even_if_it_is_not_asked(
    options, words
):
    """A key that was given by mistake would stand in stage.json and in the report of a run whose rows are all ready."""
    with pytest.raises(ConfigError, match=words) as refusal:
        cot_distillation.CoTConfig(
            model_name_or_path="x", reasoning_dataset_path="y", **options
        ).validate()
    assert CANARY not in str(refusal.value)
    with pytest.raises(ConfigError, match=words.replace("teacher_", "feedback_")):
        options = {name.replace("teacher_", "feedback_"): value for name, value in options.items()}
        rlaif.RLAIFConfig(
            model_name_or_path="x", prompt_dataset_path="y", feedback_model_path="z", **options
        ).validate()


def test_a_cost_limit_holds_over_all_runs_and_what_is_known_is_free(server, tmp_path):
    requests, prices = (
        asked(*(f"q{n}" for n in range(4))),
        {"input_price": 1e5, "output_price": 1e5, "concurrency": 1},
    )
    ask = lambda some, **more: client(server, tmp_path, **prices, **more).ask(
        "x", some, GREEDY, "1", str
    )
    ask(requests[:2])  # 3 dollars
    for _ in range(2):
        with pytest.raises(RuntimeError, match="max_cost=2 is reached: 3.00 dollars"):
            ask(requests, max_cost=2)
    assert server.asked.total() == 2 and ask(requests[:2], max_cost=2) == [
        "answer to q0",
        "answer to q1",
    ]


def test_answers_of_other_processes_count_and_are_known(server, tmp_path):
    client(server, tmp_path).ask("x", asked("q0", "q1"), GREEDY, "1", str)
    (tmp_path / "calls.jsonl").rename(tmp_path / "calls-1.jsonl")
    with open(tmp_path / "calls-1.jsonl", "a") as file:
        file.write('{"half": ')  # it may be writing right now
    with pytest.raises(RuntimeError, match="max_calls=3 is reached"):
        client(server, tmp_path, max_calls=3).ask(
            "x", asked("q0", "q1", "q2", "q3"), GREEDY, "1", str
        )
    assert server.asked.total() == 3 and (tmp_path / "calls-1.jsonl").read_text().endswith(
        '{"half": '
    )


def test_other_options_of_a_model_run_here_make_other_answers(tmp_path):
    key = lambda **options: core.llm_client.LLMClient(
        cot_distillation.CoTConfig(output_dir=str(tmp_path), **options), "teacher", "x", "local"
    ).key(["a"])
    assert len(
        {key(), key(seed=1), key(torch_dtype="bfloat16"), key(instruction_template="{instruction}")}
    ) == 4 and key() == key(learning_rate=1)


def test_a_model_run_here_answers_by_its_own_random_numbers(model_dir, tmp_path):
    """The same answers in whatever batches; a greedy one is what generate() writes; choices are probabilities."""
    ask = lambda folder, size, sampling, **more: core.llm_client.LLMClient(
        core.llm_client.LLMClientConfig(output_dir=str(tmp_path / folder), concurrency=size),
        "teacher",
        model_dir,
        "local",
        load_model=common.load_model_and_tokenizer,
    ).ask(
        "x",
        [*asked("one", "a longer question"), (asked("one")[0][0], 1)],
        sampling,
        "1",
        str,
        **more,
    )
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    free = core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 12}
    texts = ask("a", 1, free)
    assert texts == ask("b", 3, free) and texts[0] != texts[2]
    model, tokenizer = common.load_model_and_tokenizer(
        core.config.TrainingConfig(model_name_or_path=model_dir)
    )
    wanted = core.sampling.generate(
        model, tokenizer, [chat for chat, _ in asked("one", "a longer question", "one")], 12
    )
    assert ask("c", 2, free | {"temperature": 0.0}) == [text for text, _ in wanted]
    import torch

    chances = [json.loads(text) for text in ask("d", 2, GREEDY, choices=("A", "B"))]
    for (chat, _), found in zip(asked("one", "a longer question", "one"), chances):
        ids, choices = (
            core.chat.prompt_ids(tokenizer, chat),
            tokenizer.convert_tokens_to_ids(["A", "B"]),
        )
        assert found == pytest.approx(
            model(torch.tensor([ids])).logits[0, -1, choices].softmax(-1).tolist(), abs=1e-5
        )


def test_the_key_is_in_no_file(server, tmp_path, monkeypatch):
    """The server sends it back in its answers, too."""
    monkeypatch.setenv("MY_KEY", CANARY)
    server.reply = lambda question, body: f"your key is {CANARY}"
    with core.runtime.start_logging("debug", tmp_path / "training.log"):
        assert client(server, tmp_path, "MY_KEY").ask("x", asked("q"), GREEDY, "1", str) == [
            "your key is ***"
        ]
        server.status = 400
        with pytest.raises(RuntimeError):
            client(server, tmp_path, "MY_KEY").ask("x", asked("r"), GREEDY, "1", str)
    assert os.listdir(tmp_path) and not any(
        CANARY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
