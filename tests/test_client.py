"""The client of other models, against a server that fails as servers do. Kills and worse servers
are in test_hostile_server.py."""

import http.server
import json
import random
import shutil
import threading
import time
from collections import Counter

import cot_distillation
import pytest
import rlaif
import torch

import common
import core.api_server
import core.chat
import core.config
import core.llm_client
import core.runtime
import core.sampling
from core.errors import ConfigError

CANARY = "sk-canary-0123456789abcdef"
GREEDY = core.sampling.SAMPLING_DEFAULTS | {"temperature": 0.0}
FAILURES = ["429", "500", "slow", "half", "page"]


# -- a server that fails as servers do -------------------------------------------------------------


class Scripted(http.server.BaseHTTPRequestHandler):
    """A server with OpenAI's protocol. The fraction `trouble` of the requests fails, in one of five
    ways."""

    def do_GET(self):
        self.answer(404, b"{}")

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        server.key = self.headers["Authorization"]
        failure = ""
        with server.lock:
            server.asked[question] += 1
            if server.random.random() < server.trouble:
                failure = server.random.choice(FAILURES)

        if server.respond and (response := server.respond(question, body)):
            self.answer(*response)
        elif server.status:
            message = json.dumps({"error": {"message": f"no, {server.key}"}})
            self.answer(server.status, message.encode())
        elif failure in ("429", "500"):
            message = b'{"error": {"message": "later"}}'
            self.answer(int(failure), message, {"Retry-After": "0.05"})
        elif failure == "slow":
            time.sleep(1.5)
        elif failure == "page":
            self.answer(200, b"<html>Bad gateway</html>")
        else:
            completion = self.completion(server.reply(question, body), body["model"])
            if failure == "half":
                self.answer(200, completion[: len(completion) // 2])
            elif self.answer(200, completion):
                with server.lock:
                    server.completed[question] += 1

    def completion(self, text, model):
        message = {"role": "assistant", "content": text}
        if isinstance(text, dict):
            message = {"role": "assistant", **text}
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
        return json.dumps(answer | self.server.instead).encode()

    def answer(self, status, body, headers=None):
        """Send an answer; returns whether the client was still there."""
        lengths = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        try:
            self.send_response(status)
            for name, value in {**lengths, **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            return True
        except OSError:
            return False

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.lock = threading.Lock()
    server.random = random.Random(0)
    server.asked = Counter()  # {question: requests}
    server.completed = Counter()  # {question: answers that arrived}
    server.trouble = 0.0  # fraction of requests that fail
    server.status = None  # the status of every answer
    server.instead = {}  # what replaces parts of an answer
    server.respond = None  # (question, body) -> (status, bytes, headers), or None for an answer
    server.reply = lambda question, body: f"answer to {question}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(core.api_server, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(core.api_server, "LONGEST_DELAY", 0.05)


def client(server, tmp_path, variable=None, **options):
    config = core.llm_client.LLMClientConfig(output_dir=str(tmp_path), **options)
    return core.llm_client.LLMClient(config, "teacher", "big", "api", server.url, variable)


def asked(*questions):
    """Requests for `ask`: (messages, number)."""
    return [([{"role": "user", "content": question}], 0) for question in questions]


def numbered(count):
    return [f"q{n}" for n in range(count)]


def answers_to(questions):
    return [f"answer to {question}" for question in questions]


def ask(client, questions, parse=str, version="1", sampling=GREEDY):
    return client.ask("x", asked(*questions), sampling, version, parse)


# -- answers are kept ------------------------------------------------------------------------------


def test_a_call_is_made_once(server, tmp_path):
    """By model, messages, number, parameters and version; answers come back in the order of the
    requests."""
    questions = numbered(12)
    for order in (questions, questions[::-1]):
        answers = ask(client(server, tmp_path), order, str.upper)
        assert answers == [f"ANSWER TO {question.upper()}" for question in order]
        assert server.asked.total() == 12

    ask(client(server, tmp_path), ["q0"], version="2")
    ask(client(server, tmp_path), ["q0"], sampling=GREEDY | {"temperature": 0.5})
    another_answer = [(asked("q0")[0][0], 1)]
    client(server, tmp_path).ask("x", another_answer, GREEDY, "1", str)
    assert server.asked["q0"] == 4
    ask(client(server, tmp_path), ["q1", "q1", "q1"])
    assert server.asked["q1"] == 1

    one = client(server, tmp_path)
    ask(one, ["q0", "new"])
    assert one.report() == {
        "teacher_calls": 1,
        "teacher_calls_cached": 1,
        "teacher_missing": 0,
        "teacher_tokens_in": 10,
        "teacher_tokens_out": 5,
    }


def test_a_line_that_a_crash_cut_off_is_asked_again(server, tmp_path):
    ask(client(server, tmp_path), ["q0", "q1"])
    calls = tmp_path / "calls.jsonl"
    calls.write_bytes(calls.read_bytes()[:-9])
    assert ask(client(server, tmp_path), ["q0", "q1"]) == answers_to(["q0", "q1"])
    assert server.asked.total() == 3
    assert len([json.loads(line) for line in calls.read_text().splitlines()]) == 2


def test_answers_of_other_processes_count_and_are_known(server, tmp_path):
    ask(client(server, tmp_path), ["q0", "q1"])
    other_process = tmp_path / "calls-1.jsonl"
    (tmp_path / "calls.jsonl").rename(other_process)
    with open(other_process, "a") as file:
        file.write('{"half": ')  # it may be writing right now
    with pytest.raises(RuntimeError, match="max_calls=3 is reached"):
        ask(client(server, tmp_path, max_calls=3), numbered(4))
    assert server.asked.total() == 3
    assert other_process.read_text().endswith('{"half": ')


# -- answers that fail -----------------------------------------------------------------------------


def test_troubles_are_tried_again(server, tmp_path):
    server.trouble = 0.3
    questions = numbered(40)
    one = client(server, tmp_path, call_timeout=1.0, concurrency=8, max_missing=0.0)
    assert ask(one, questions) == answers_to(questions)
    assert server.asked.total() > 45


def test_an_answer_without_text_is_missing_and_never_a_value(server, tmp_path, caplog):
    texts = {"q0": None, "q1": "what?"}

    def parse(text):
        return float(text) if text == "7" else None

    server.reply = lambda question, body: texts.get(question, "7")
    one = client(server, tmp_path, max_missing=0.25)
    assert ask(one, numbered(8), parse) == [None, None] + [7.0] * 6
    assert "2 of 8 missing: 1 without an answer" in caplog.text
    assert "'what?'" in caplog.text

    server.reply = lambda question, body: "what?"
    with pytest.raises(RuntimeError, match="3 of 9.*more than max_missing=0.25"):
        ask(client(server, tmp_path, max_missing=0.25), numbered(9), parse)


def test_other_errors_stop_at_once_with_the_server_s_words(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", CANARY)
    server.status = 401
    with pytest.raises(RuntimeError, match=r"refuses: 401: .*no, Bearer \*\*\*"):
        ask(client(server, tmp_path, "MY_KEY", concurrency=1), numbered(20))
    assert server.asked.total() == 1
    assert server.key == f"Bearer {CANARY}"


def test_an_outage_is_missing_answers_and_stops_early(server, tmp_path):
    server.status = 503
    with pytest.raises(RuntimeError, match="100 of 100 missing.*503"):
        ask(client(server, tmp_path, concurrency=1), numbered(100))
    assert len(server.asked) < 20  # a tenth may be missing: then it is over


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
def test_odd_answers_are_missing_or_text_and_break_nothing(server, tmp_path, answer):
    server.instead = answer
    texts = (answers_to(["q0", "q1"]), ["?", "?"], ["a", "a"])
    for _ in range(2):  # also when they are read again
        try:
            assert ask(client(server, tmp_path, concurrency=1), ["q0", "q1"]) in texts
        except core.llm_client.LLMClientError as error:
            assert "not an answer" in str(error)


# -- limits ----------------------------------------------------------------------------------------


def test_limits_hold_over_all_runs(server, tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="max_calls=10 is reached"):
            ask(client(server, tmp_path, max_calls=10), numbered(20))
        assert server.asked.total() == 10

    prices = {"input_price": 1e5, "output_price": 1e5, "concurrency": 1}  # 1.5 dollars a call
    assert client(server, tmp_path, **prices).report()["teacher_cost"] == 15.0
    # The next call could cost 9.80: 2 bytes, 32 tokens of the template, and 64 new tokens.
    with pytest.raises(RuntimeError, match="max_cost=28 is reached: 19.50 dollars"):
        ask(client(server, tmp_path, max_cost=28, **prices), numbered(20))
    assert server.asked.total() == 13
    # In rlaif the policy's own answers are kept like those of a server, which alone has a price.
    config = core.llm_client.LLMClientConfig(output_dir=str(tmp_path), **prices)
    policy = core.llm_client.LLMClient(config, "policy", "small", "local")
    policy.log.keep("key", {"text": "x", "tokens_in": 10**6, "tokens_out": 10**6})
    policy.log.read()
    assert policy.log.num_calls == 1 and policy.log.cost == 0


def test_a_cost_limit_holds_over_all_runs_and_what_is_known_is_free(server, tmp_path):
    prices = {"input_price": 1e5, "output_price": 1e5, "concurrency": 1}
    ask(client(server, tmp_path, **prices), numbered(2))  # 3 dollars
    for _ in range(2):
        with pytest.raises(RuntimeError, match="max_cost=2 is reached: 3.00 dollars"):
            ask(client(server, tmp_path, max_cost=2, **prices), numbered(4))
    assert server.asked.total() == 2
    limited = client(server, tmp_path, max_cost=2, **prices)
    assert ask(limited, numbered(2)) == answers_to(numbered(2))


def test_limits_are_of_one_role(server, tmp_path):
    other_role = {"role": "policy", "text": "x", "tokens_in": 10**9, "tokens_out": 1}
    lines = [json.dumps({"key": str(n), **other_role}) for n in range(9)]
    (tmp_path / "calls.jsonl").write_text("\n".join(lines) + "\n")
    limits = {"max_calls": 2, "max_cost": 5, "input_price": 1, "output_price": 1}
    assert len(ask(client(server, tmp_path, **limits), ["one", "two"])) == 2


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
        ask(one, numbered(20))
    assert server.asked.total() == 4
    assert one.report()["teacher_tokens_in"] == 40


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": -(10**9), "completion_tokens": 5},
        {"prompt_tokens": 10, "completion_tokens": -5},
        {"prompt_tokens": 10, "completion_tokens": 0},
        {"prompt_tokens": 0, "completion_tokens": 5},
        {"prompt_tokens": "10", "completion_tokens": True},
    ],
)
def test_usage_that_is_missing_or_false_defeats_no_limit(server, tmp_path, usage, caplog):
    """Such a call counts with the most that it can cost, here 9.80 dollars, over all runs."""
    server.instead = {"usage": usage}
    prices = {"input_price": 1e5, "output_price": 1e5}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="max_cost=30 is reached: 29.40 dollars"):
            ask(client(server, tmp_path, max_cost=30, **prices), numbered(9))
        assert server.asked.total() == 3
    assert "reports no usable token counts" in caplog.text
    assert client(server, tmp_path, **prices).report()["teacher_cost"] == pytest.approx(29.4)
    ask(client(server, tmp_path), numbered(20))


def test_calls_under_way_leave_room_for_what_they_can_cost(server, tmp_path):
    """Eight at once would exceed the limit before the first has answered."""
    prices = {"input_price": 1e5, "output_price": 1e5, "concurrency": 8}
    server.reply = lambda question, body: time.sleep(0.05) or "answer"
    with pytest.raises(RuntimeError, match="max_cost=20 is reached: 1[0-9.]+ dollars"):
        ask(client(server, tmp_path, max_cost=20, **prices), numbered(30))
    assert client(server, tmp_path, **prices).report()["teacher_cost"] <= 20
    assert server.asked.total() == 7


@pytest.mark.parametrize("broken", [b"<html>", b'{"choices": [', b'{"error": {"message": "no"}}'])
def test_broken_answers_count_towards_the_limits(server, tmp_path, broken):
    server.respond = lambda question, body: (200, broken)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="max_calls=5 is reached"):
            ask(client(server, tmp_path, max_calls=5, max_missing=0.99), numbered(3))
        assert server.asked.total() == 5
    with pytest.raises(RuntimeError, match="max_cost=60 is reached: 58.80 dollars"):
        prices = {"input_price": 1e5, "output_price": 1e5}
        ask(client(server, tmp_path, max_cost=60, max_missing=0.99, **prices), numbered(3))
    assert server.asked.total() == 6


def test_what_a_server_returns_with_a_status_costs_nothing(server, tmp_path):
    """Also where it takes a place that another call waits for."""
    statuses = iter([429, 503, 500, 408] * 3)
    server.respond = lambda question, body: (
        (status, b"{}") if (status := next(statuses, 0)) else None
    )
    one = client(server, tmp_path, max_calls=6)
    assert ask(one, numbered(6)) == answers_to(numbered(6))
    assert server.asked.total() == 18
    assert one.log.num_calls == 6


# -- what is refused before ------------------------------------------------------------------------

URL, KEY = "teacher_base_url", "teacher_api_key"


@pytest.mark.parametrize(
    "kind, url, variable, words",
    [
        ("api", None, None, f"{URL} is the address of the server"),
        ("api", "http://127.0.0.1:9/v1?api_key=sk-secret", None, f"{URL} has a query in it"),
        ("api", "http://127.0.0.1:9/v1", None, f"{URL}=http://127.0.0.1:9/v1 does not answer"),
        ("api", "http://me:secret@127.0.0.1:9/v1", None, f"{URL} has a password in it"),
        ("api", "http://127.0.0.1:9/v1", CANARY, f"{KEY} names the environment variable"),
        (
            "api",
            "http://127.0.0.1:9/v1",
            "LINE",
            f"{KEY} names .*, but has a space, a line break or a non-ASCII character in it",
        ),
        ("api", "http://127.0.0.1:PORT/v1", None, f"{URL}=.* does not answer: nonnumeric port"),
        ("openai", None, None, f"{KEY} names .*, but OPENAI_API_KEY is not set"),
        ("anthropic", None, None, f"{KEY} names .*, but ANTHROPIC_API_KEY is not set"),
    ],
)
def test_what_cannot_be_asked_is_refused_before(tmp_path, monkeypatch, kind, url, variable, words):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LINE", f"{CANARY}\r")
    config = core.llm_client.LLMClientConfig(output_dir=str(tmp_path))
    one = core.llm_client.LLMClient(config, "teacher", "big", kind, url, variable)
    with pytest.raises(ConfigError, match=words) as refusal:
        one.check()
    assert CANARY not in str(refusal.value)
    assert "secret" not in str(refusal.value)


LOCAL = "with teacher_model_type=local"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"teacher_api_key": CANARY}, "teacher_api_key names the environment variable"),
        ({"max_cost": 1.0}, "max_cost needs input_price"),
    ],
)
def test_options_of_servers_are_refused_for_a_model_run_here_even_if_it_is_not_asked(
    options, words
):
    """A key given by mistake would be in stage.json and in the report, even if all rows are
    ready."""
    config = cot_distillation.CoTConfig(
        model_name_or_path="x", reasoning_dataset_path="y", **options
    )
    with pytest.raises(ConfigError, match=words) as refusal:
        config.validate()
    assert CANARY not in str(refusal.value)

    with pytest.raises(ConfigError, match=words.replace("teacher_", "feedback_")):
        judging_config(options).validate()


def judging_config(options):
    """The config of rlaif with the options of a judge that are these of a teacher."""
    options = {name.replace("teacher_", "feedback_"): value for name, value in options.items()}
    return rlaif.RLAIFConfig(
        model_name_or_path="x", prompt_dataset_path="y", feedback_model_path="z", **options
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_calls": 3}, f"max_calls has no effect {LOCAL}: it is for servers"),
        ({"teacher_base_url": "http://x/v1"}, f"teacher_base_url has no effect {LOCAL}"),
    ],
)
def test_options_of_servers_without_effect_for_a_model_run_here_are_noted(options, words):
    config = cot_distillation.CoTConfig(
        model_name_or_path="x", reasoning_dataset_path="y", **options
    )
    config.validate()
    assert [note for note in config.notes if note.startswith(words)]

    config = judging_config(options)
    config.validate()
    words = words.replace("teacher_", "feedback_")
    assert [note for note in config.notes if note.startswith(words)]


def test_the_key_is_in_no_file(server, tmp_path, monkeypatch):
    """The server sends it back in its answers, too."""
    monkeypatch.setenv("MY_KEY", CANARY)
    server.reply = lambda question, body: f"your key is {CANARY}"
    with core.runtime.start_logging("debug", tmp_path / "training.log"):
        assert ask(client(server, tmp_path, "MY_KEY"), ["q"]) == ["your key is ***"]
        server.status = 400
        with pytest.raises(RuntimeError):
            ask(client(server, tmp_path, "MY_KEY"), ["r"])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


# -- a model run here ------------------------------------------------------------------------------


def local_client(folder, model, config_class=core.llm_client.LLMClientConfig, **options):
    folder.mkdir(exist_ok=True)
    config = config_class(output_dir=str(folder), **options)
    load = common.load_model_and_tokenizer
    return core.llm_client.LLMClient(config, "teacher", model, "local", load_model=load)


def test_other_options_of_a_model_run_here_make_other_answers(tmp_path):
    def key(**options):
        return local_client(tmp_path, "x", cot_distillation.CoTConfig, **options).key(["a"])

    keys = {
        key(),
        key(seed=1),
        key(torch_dtype="bfloat16"),
        key(instruction_template="{instruction}"),
    }
    assert len(keys) == 4
    assert key() == key(learning_rate=1)


def test_a_model_run_here_answers_by_its_own_random_numbers(model_dir, tmp_path):
    """The same answers in whatever batches; a greedy one is what generate() writes; choices are
    probabilities."""
    requests = [*asked("one", "a longer question"), (asked("one")[0][0], 1)]
    chats = [chat for chat, _ in requests]

    def answers(folder, size, sampling, choices=()):
        one = local_client(tmp_path / folder, model_dir, concurrency=size)
        return one.ask("x", requests, sampling, "1", str, choices)

    sampling = core.sampling.SAMPLING_DEFAULTS | {"max_new_tokens": 12}
    texts = answers("a", 1, sampling)
    assert texts == answers("b", 3, sampling)
    assert texts[0] != texts[2]

    config = core.config.TrainingConfig(model_name_or_path=model_dir)
    model, tokenizer = common.load_model_and_tokenizer(config)
    greedy = [text for text, _ in core.sampling.generate(model, tokenizer, chats, 12)]
    assert answers("c", 2, sampling | {"temperature": 0.0}) == greedy

    choice_ids = tokenizer.convert_tokens_to_ids(["A", "B"])
    rows = answers("d", 2, GREEDY, choices=("A", "B"))
    for chat, row in zip(chats, rows, strict=True):
        ids = core.chat.prompt_ids(tokenizer, chat)
        logits = model(torch.tensor([ids])).logits[0, -1, choice_ids]
        assert json.loads(row) == pytest.approx(logits.softmax(-1).tolist(), abs=1e-5)


def test_a_conversation_that_a_local_model_cannot_take_is_said_in_a_sentence(model_dir, tmp_path):
    strict = shutil.copytree(model_dir, tmp_path / "strict")
    template = (strict / "chat_template.jinja").read_text()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(refusal + template)
    client = local_client(tmp_path / "calls", str(strict))
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ConfigError, match="strict: its chat template cannot take a prompt: no"):
        client.ask("x", [(chat, 0)], GREEDY, "1", str)
