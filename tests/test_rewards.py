"""Reward functions as people write them: how they are called, what they may return, how they fail;
and runs in which completions have no verdict."""

import asyncio
import contextlib
import copy
import json
import math
import os
import signal
import time

import evaluate
import grpo
import psutil
import pytest
import rlaif

import core.rewards
from core.errors import ConfigError
from core.function_process import AnswerChecker, Subprocess
from core.reward_calls import RewardCall, to_plain
from core.rewards import ScoringConfig, score_completions, start_reward_functions

TEXTS = ["a", "", "ccc"]
ANSWERS = ["x", "y", "z"]


def rows_of(columns, count=3):
    """`count` rows with a question each, and these columns' values."""
    rows = []
    for n in range(count):
        values = {name: column[n] for name, column in columns.items()}
        rows.append({"prompt": [{"role": "user", "content": f"ask {n}"}], "columns": values})
    return rows


def score_by_file(tmp_path, source, name="reward", columns=None, texts=TEXTS, ids=None, **options):
    """What the function of a file gives for texts."""
    path = tmp_path / "mine.py"
    path.write_text(source)
    config = ScoringConfig(reward=[f"{path}:{name}"], **options)
    functions = start_reward_functions(config)
    rows = rows_of(columns or {}, len(texts))
    with core.rewards.stopping_functions(functions):
        return score_completions(config, functions, rows, texts, ids)[:, 0].tolist()


# -- how a function is called ----------------------------------------------------------------------

CALLED = {
    "TRL, texts": (
        "def reward(completions, answer, **kwargs):\n"
        "    return [len(text) + (a == 'x') for text, a in zip(completions, answer)]"
    ),
    "TRL, messages": (
        "def reward(completions, answer, **kwargs):\n"
        "    contents = [completion[0]['content'] for completion in completions]\n"
        "    return [len(text) + (a == 'x') for text, a in zip(contents, answer)]"
    ),
    "TRL, prompts as messages": (
        "def reward(prompts, completions, **kwargs):\n"
        "    asked = [prompt[-1]['content'] for prompt in prompts]\n"
        "    answered = [completion[-1].get('content') for completion in completions]\n"
        "    return [len(text) + (p == 'ask 0') for text, p in zip(answered, asked)]"
    ),
    "TRL, prompts as texts": (
        "import re\n"
        "def reward(prompts, completions, **kwargs):\n"
        "    asked = [re.sub('ask ', '', prompt) for prompt in prompts]\n"
        "    return [len(text) + (n == '0') for text, n in zip(completions, asked)]"
    ),
    "either form": (
        "def reward(completions, answer, **kwargs):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    return [len(text) + (a == 'x') for text, a in zip(texts, answer)]"
    ),
    "completion_ids": (
        "def reward(completion_ids, answer):\n"
        "    return [len(ids) + (a == 'x') for ids, a in zip(completion_ids, answer)]"
    ),
    "only what it names": (
        "def reward(*, answer, completions):\n"
        "    return [len(text) + (a == 'x') for text, a in zip(completions, answer)]"
    ),
    "names of its own": (
        "def reward(questions, replies, answer=None, **columns):\n"
        "    return [len(text) + (a == 'x') for text, a in zip(replies, answer)]"
    ),
    "by position": (
        "def reward(p, c, /, answer):\n"
        "    return [len(text) + (a == 'x') for text, a in zip(c, answer)]"
    ),
    "a decorator without a signature": (
        "def decorated(function):\n"
        "    def wrapper(*args, **kwargs):\n"
        "        return function(*args, **kwargs)\n"
        "    return wrapper\n"
        "@decorated\n"
        "def reward(completions, answer, **kwargs):\n"
        "    return [len(text) + (a == 'x') for text, a in zip(completions, answer)]"
    ),
    "an object": (
        "class Reward:\n"
        "    def __call__(self, completions, answer, **kwargs):\n"
        "        return [len(text) + (a == 'x') for text, a in zip(completions, answer)]\n"
        "reward = Reward()"
    ),
    "async": (
        "import asyncio\n"
        "async def reward(completions, answer, **kwargs):\n"
        "    await asyncio.sleep(0.01)\n"
        "    return [len(text) + (a == 'x') for text, a in zip(completions, answer)]"
    ),
    "any arguments": (
        "def reward(*args):\n    return [len(text) + (n == 0) for n, text in enumerate(args[1])]"
    ),
    "a column named self": (
        "def reward(completions, answer, **columns):\n"
        "    return [len(t) + (n == 1) for t, n in zip(completions, columns['self'])]"
    ),
    "verl": (
        "def reward(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return len(solution_str) + (ground_truth == 'x')"
    ),
    "verl, a dictionary": (
        "def reward(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    return {'score': len(solution_str) + (ground_truth == 'x'), 'acc': 1}"
    ),
    "verl, async": (
        "async def reward(data_source, solution_str, ground_truth, extra_info):\n"
        "    return len(solution_str) + (ground_truth == 'x')"
    ),
    "verl, a batch": (
        "def reward(data_sources, solution_strs, ground_truths, extra_infos, **kwargs):\n"
        "    return [len(s) + (g == 'x') for s, g in zip(solution_strs, ground_truths)]"
    ),
    "one completion": (
        "def reward(prompt, completion, answer):\n    return len(completion) + (answer == 'x')"
    ),
    "one completion, messages": (
        "def reward(completion, answer, **kwargs):\n"
        "    return len(completion[0]['content']) + (answer == 'x')"
    ),
}


@pytest.mark.parametrize("source", CALLED.values(), ids=CALLED.keys())
def test_a_function_gets_the_arguments_that_it_names(tmp_path, source):
    ids = [[7], [], [1, 2, 3]]
    columns = {"answer": ANSWERS, "other": [None] * 3}
    if "self" in source and "class" not in source:
        columns["self"] = [1, 2, 3]
    assert score_by_file(tmp_path, source, columns=columns, ids=ids) == [2, 0, 3]


def test_the_ground_truth_of_a_data_set_of_verl():
    def score(data_source, solution_str, ground_truth, extra_info):
        return (data_source, solution_str, ground_truth, extra_info)

    columns = {
        "data_source": ["gsm8k"],
        "reward_model": [{"style": "rule", "ground_truth": "7"}],
        "extra_info": [{"index": 3}],
        "answer": ["not this one"],
    }
    assert RewardCall(score)([None], ["It is 7"], columns) == [
        ("gsm8k", "It is 7", "7", {"index": 3})
    ]


def test_a_column_never_replaces_the_completions():
    def show(prompts, completions, **columns):
        return prompts, completions, columns

    columns = {"completions": ["wrong"], "prompts": ["wrong"], "level": [3]}
    assert RewardCall(show)(["p"], ["right"], columns) == (["p"], ["right"], {"level": [3]})


def test_an_error_of_the_function_is_not_hidden_by_another_form(tmp_path):
    source = (
        "def reward(completions, **kwargs):\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    return [1.0 / len(text) for text in texts]"
    )
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: .*; the row: .*ask 1"):
        score_by_file(tmp_path, source)


def test_async_functions_of_one_completion_wait_together_in_one_loop():
    loops = []

    async def wait(completion):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(1)
        return 1.0

    call = RewardCall(wait)
    began = time.monotonic()
    assert call([None] * 8, [""] * 8, {}) == [1.0] * 8
    assert time.monotonic() - began < 4  # one after the other they would take 8 s
    call([None], [""], {})
    assert len(set(map(id, loops))) == 1


@pytest.mark.parametrize(
    "source, missing",
    [
        ("def reward(completions, solution): pass", "solution"),
        ("def reward(queries, prompts, labels): pass", "queries, labels"),
        ("def reward(solution_str, ground_truth, *, level): pass", "level"),
    ],
)
def test_a_column_that_the_data_does_not_have_is_said_before_loading(tmp_path, source, missing):
    (tmp_path / "mine.py").write_text(source)
    write_prompts(tmp_path, [f"q{n}" for n in range(8)])
    stage = grpo.GRPOStage(run_config(tmp_path, "no such model"))
    with pytest.raises(ConfigError, match=f"needs {missing}, but the data has no such column"):
        stage.check()
    assert stage.functions[f"{tmp_path}/mine.py:reward"].process is None


# -- what it may return ----------------------------------------------------------------------------

RETURNS = {
    "list": "[1, 0.5, None]",
    "tuple": "(1, 0.5, None)",
    "array": "np.array([1, 0.5, np.nan], dtype=np.float32)",
    "array of objects": "np.array([1, 0.5, None])",
    "tensor": "torch.tensor([1, 0.5, torch.nan], requires_grad=True)",
    "bfloat16": "torch.tensor([1, 0.5, torch.nan], dtype=torch.bfloat16)",
    "tensors": "[torch.tensor(1), torch.tensor(0.5), None]",
    "numbers of libraries": "[np.int64(1), Decimal('0.5'), np.float16(np.nan)]",
    "booleans": "[True, Fraction(1, 2), float('nan')]",
    "series": "pd.Series([1, 0.5, None])",
}
IMPORTS = (
    "import numpy as np, pandas as pd, torch\n"
    "from decimal import Decimal\nfrom fractions import Fraction\n"
)


def test_lists_tuples_arrays_and_tensors_are_taken(tmp_path):
    for name, value in RETURNS.items():
        names = {}
        exec(f"{IMPORTS}def reward(completions): return {value}", names)
        scores = score_completions(ScoringConfig(), {name: names["reward"]}, rows_of({}), TEXTS)[
            :, 0
        ].tolist()
        assert scores[:2] == [1, 0.5] and math.isnan(scores[2]), name


@pytest.mark.parametrize("name", ("tuple", "array", "booleans"))
def test_they_are_taken_from_another_process_too(tmp_path, name):
    imports = "import numpy as np\nfrom fractions import Fraction\n"
    scores = score_by_file(tmp_path, f"{imports}def reward(completions): return {RETURNS[name]}")
    assert scores[:2] == [1, 0.5] and math.isnan(scores[2])


@pytest.mark.parametrize(
    "returned, shown",
    [
        ("None", "None"),
        ("1.0", "1.0"),
        ("[1.0]", "a list of 1"),
        ("[]", "a list of 0"),
        ("{'a': 1.0}", "{'a': 1.0}"),
        ("['1', '0', '1']", "a list with '1'"),
        ("[[1.0], [0.0], [1.0]]", r"a list with '\[1.0\]'"),
        ("[1.0, {'score': 1.0}, 0.0]", r"a list with \"{'score': 1.0}\""),
        ("(1.0 for _ in completions)", "<generator>"),
        ("{1.0, 2.0, 3.0}", "<set>"),
        ("[1.0, 2j, object()]", "a list with '<complex>'"),
        ("[1.0, print, 0.0]", "a list with '<builtin_function_or_method>'"),
    ],
)
@pytest.mark.parametrize("on_reward_error", ("stop", "skip"))
def test_a_wrong_return_is_one_sentence(tmp_path, returned, shown, on_reward_error):
    """No conversion is tried, and no row is skipped: it is no mistake of a row."""
    message = f"must return a list of 3 numbers or None, not {shown}$"
    with pytest.raises(RuntimeError, match=message) as stopped:
        score_by_file(
            tmp_path,
            f"def reward(completions): return {returned}",
            on_reward_error=on_reward_error,
        )
    assert "\n" not in str(stopped.value) and "on_reward_error" not in str(stopped.value)


def test_what_is_no_number_is_named_by_its_type():
    assert to_plain([1, "a", None, {"b": 2}, 2j]) == [1, "a", None, {"b": 2}, "<complex>"]


# -- its process -----------------------------------------------------------------------------------


def test_modules_beside_the_file_are_found(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "helper.py").write_text("def score(text): return len(text)\n")
    # A module of the same name as one of ours is theirs.
    (tmp_path / "common.py").write_text("bonus = 1\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = (
        "import helper, common, statistics\n"
        "def reward(completions):\n"
        "    return [helper.score(text) + common.bonus for text in completions]"
    )
    assert score_by_file(tmp_path, source) == [2, 1, 4]


def make_process(tmp_path, source, timeout=20):
    path = tmp_path / "mine.py"
    path.write_text(source)
    return Subprocess(f"{path}:reward", timeout)


def test_a_process_that_dies_between_two_calls_is_started_anew(tmp_path):
    function = make_process(
        tmp_path, "import os\ndef reward(completions): return [os.getpid()] * len(completions)"
    )
    pids = []
    # At once, and after its death is known.
    for pause in (0, 0.5, 0):
        pids.append(function([None], ["a"])[0])
        os.kill(function.process.pid, signal.SIGKILL)
        time.sleep(pause)
    pids.append(function([None], ["a"])[0])
    function.stop()
    assert len(set(pids)) == 4


def test_a_function_that_kills_its_process_is_an_error_of_the_row(tmp_path):
    source = (
        "import os, sys\n"
        "def reward(completions):\n"
        "    if 'crash' in completions: os._exit(3)\n"
        "    if 'exit' in completions: sys.exit('no')\n"
        "    return [1.0] * len(completions)"
    )
    scores = score_by_file(
        tmp_path, source, texts=["a", "crash", "exit", "b"], on_reward_error="skip"
    )
    assert [scores[0], scores[3]] == [1, 1] and all(map(math.isnan, scores[1:3]))
    with pytest.raises(RuntimeError, match=r"the process died \(exit code 3\); the row:"):
        score_by_file(tmp_path, source, texts=["crash"])
    with pytest.raises(RuntimeError, match=r"SystemExit: no; the row:"):
        score_by_file(tmp_path, source, texts=["exit"])


def assert_ends(pid, seconds=20):
    """A killed process ends soon: it is gone, or a zombie that nobody has waited for. (A kill
    returns before the process is gone.)"""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.05)


def test_a_function_that_reads_its_input_or_starts_programs(tmp_path):
    """Neither takes our requests, nor stays behind."""
    function = make_process(
        tmp_path,
        "import pathlib, subprocess, sys\n"
        "def reward(completions):\n"
        "    if 'hang' in completions:\n"
        "        child = subprocess.Popen(['sleep', '60'])\n"
        "        pathlib.Path(completions[0]).write_text(str(child.pid))\n"
        "        child.wait()\n"
        "    subprocess.run(['cat'], check=True)\n"
        "    return [len(sys.stdin.read()) + 1.0] * len(completions)",
    )
    assert function([None], ["a"]) == [1.0] and function([None], ["b"]) == [1.0]
    function.timeout = 1
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        function([None] * 2, [str(tmp_path / "pid"), "hang"])
    assert time.monotonic() - began < 20
    assert_ends(int((tmp_path / "pid").read_text()))


def test_a_slow_answer_has_no_verdict_and_is_counted(tmp_path, caplog):
    config = ScoringConfig(reward=["numeric"], reward_timeout=3.0)
    functions = start_reward_functions(config)
    rows = rows_of({"answer": ["7", "7", "7", "8"]}, 4)
    texts = ["7", "$9^{9^{9^{9}}}$", "8", "\\boxed{8}"]
    with core.rewards.stopping_functions(functions):
        scores = score_completions(config, functions, rows, texts)[:, 0].tolist()
        assert functions["numeric"].num_slow == 1
    assert scores[0] == 1 and math.isnan(scores[1]) and scores[2:] == [0, 1]
    assert "no verdict on '$9^{9^{9^{9}}}$' within 3 s (1 so far)" in caplog.text
    assert "numeric: 1 answers without a verdict in time" in caplog.text


def test_the_time_for_an_answer_is_short_and_excludes_starting(tmp_path):
    path = tmp_path / "slow_start.py"
    path.write_text(
        "import time\nfirst = [True]\n"
        "def check(prompts, completions, answer):\n"
        "    time.sleep(2 * bool(first and first.pop()))\n"
        "    return [1.0]\n"
    )
    function = start_reward_functions(ScoringConfig(reward=["numeric"]))["numeric"]
    function.stop()
    assert isinstance(function, AnswerChecker) and function.timeout <= 5
    check = AnswerChecker(f"{path}:check", 1.0)
    assert check([None] * 2, ["1", "2"], answer=["1", "2"]) == [1.0, 1.0]
    check.stop()


# -- runs ------------------------------------------------------------------------------------------


def write_prompts(tmp_path, prompts):
    rows = [json.dumps({"prompt": prompt, "answer": "7"}) for prompt in prompts]
    (tmp_path / "data.jsonl").write_text("\n".join(rows) + "\n")


def run_config(tmp_path, model, **options):
    values = dict(
        model_name_or_path=model,
        prompt_dataset_path=str(tmp_path / "data.jsonl"),
        output_dir=str(tmp_path / "out"),
        reward=[f"{tmp_path}/mine.py:reward"],
        batch_size=4,
        num_generations=2,
        num_training_steps=2,
        generation_kwargs={"max_new_tokens": 4},
        validation_split=0.25,
        lora_r=0,
        save_freq=0,
        log_level="error",
    )
    return grpo.GRPOConfig(**values | options)


def run_grpo(tmp_path, model, source, **options):
    """(result of the run, lines of its metrics.jsonl)"""
    (tmp_path / "mine.py").write_text(source)
    write_prompts(tmp_path, [f"q{n}" for n in range(8)])
    result = grpo.GRPOStage(run_config(tmp_path, model, **options)).execute()
    for file in (tmp_path / "out").glob("*.json*"):
        assert "NaN" not in file.read_text()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    return result, [json.loads(line) for line in lines]


# None for all completions of the calls whose numbers, from 1, are given; call 1 is the evaluation.
SILENT = (
    "calls = []\n"
    "def reward(completions):\n"
    "    calls.append(1)\n"
    "    silent = len(calls) in {silent}\n"
    "    return [None if silent else float(n) for n in range(len(completions))]"
)


def test_a_run_without_any_verdict_fails_however_short(model_dir, tmp_path):
    source = "def reward(completions): return [None] * len(completions)"
    result, lines = run_grpo(tmp_path, model_dir, source)
    assert not result.success and not (tmp_path / "out" / "stage.json").exists()
    assert "no completion of the last 2 steps has a verdict" in result.error_message
    assert [line.get("unscored") for line in lines] == [None, 1.0, 1.0]
    samples = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in samples] == [None, None]


def test_a_function_that_always_fails_ends_the_run_in_spite_of_skip(model_dir, tmp_path):
    source = "def reward(completions): raise ValueError('no')"
    options = {"on_reward_error": "skip", "num_training_steps": 9}
    result, lines = run_grpo(tmp_path, model_dir, source, **options)
    assert not result.success and lines[-1]["step"] == 3
    assert "no completion of the last 3 steps has a verdict" in result.error_message


def test_three_steps_without_a_verdict_end_a_run_two_do_not(model_dir, tmp_path):
    (tmp_path / "two").mkdir()
    source = SILENT.replace("{silent}", "{2, 3, 5, 6, 8}")
    result, lines = run_grpo(tmp_path / "two", model_dir, source, num_training_steps=6)
    assert result.success, result.error_message
    assert [line["unscored"] for line in lines[1:-1]] == [1, 1, 0, 1, 1, 0]
    # The last evaluation has no verdict: no figure, rather than NaN.
    assert "eval_reward" not in lines[-1] and "eval_reward" not in result.metrics
    assert not any(math.isnan(value) for value in result.metrics.values())

    (tmp_path / "three").mkdir()
    source = SILENT.replace("{silent}", "{3, 4, 5}")
    result, lines = run_grpo(tmp_path / "three", model_dir, source, num_training_steps=6)
    assert not result.success and lines[-1]["step"] == 4


def test_a_run_hands_over_the_tokens_of_completions(model_dir, tmp_path):
    source = "def reward(completion_ids): return [float(len(ids)) for ids in completion_ids]"
    result, lines = run_grpo(tmp_path, model_dir, source)
    assert result.success, result.error_message
    assert lines[1]["reward"] == lines[1]["length"]
    assert lines[0]["eval_reward"] == lines[0]["eval_length"]


def test_nan_is_in_no_line_of_the_metrics(tmp_path):
    from core.run_log import log_step

    log_step(tmp_path, 1, 2, {"loss": 1.0, "other": math.nan}, "none")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.0}


# -- thinking that the chat template begins --------------------------------------------------------


def test_an_answer_cut_in_thinking_that_the_template_began_is_no_answer(tokenizer):
    from core.rollout import encode_prompt

    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"
    )
    config = ScoringConfig(reward=["numeric"])
    functions = start_reward_functions(config)
    texts = ["So it is 7", "It is 3</think>It is 7", "It is 7</think>It is 3"]
    with core.rewards.stopping_functions(functions):
        for of_template, scores in ((thinking, [0, 1, 0]), (tokenizer, [1, 1, 0])):
            rows = [encode_prompt(row, of_template, 99) for row in rows_of({"answer": ["7"] * 3})]
            assert score_completions(config, functions, rows, texts)[:, 0].tolist() == scores


# -- reward models ---------------------------------------------------------------------------------


def test_a_reward_model_without_a_system_role_is_named_before_loading(tokenizer, tmp_path):
    """In every recipe that asks one: there is no model to load."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    judge = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, num_key_value_heads=1, **sizes)
    )
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + strict.chat_template
    )
    folder = str(tmp_path / "judge")
    judge.save_pretrained(folder)
    strict.save_pretrained(folder)
    kind = {"role": "system", "content": "Be kind."}
    prompts = [[kind, {"role": "user", "content": f"q{n}"}] for n in range(8)]
    write_prompts(tmp_path, prompts)
    data, out = str(tmp_path / "data.jsonl"), str(tmp_path / "out")
    asks = dict(feedback_model_type="reward_model", feedback_model_path=folder)
    named = dict(model_name_or_path="no such model", output_dir=out)
    stages = {
        "reward_model_path": [
            grpo.GRPOStage(
                run_config(tmp_path, "no such model", reward=[], reward_model_path=folder)
            ),
            evaluate.EvaluateStage(
                evaluate.EvaluateConfig(
                    dataset_name_or_path=data, reward_model_path=folder, **named
                )
            ),
        ],
        "feedback_model_path": [
            rlaif.RLAIFStage(rlaif.RLAIFConfig(prompt_dataset_path=data, **asks, **named)),
            evaluate.EvaluateStage(
                evaluate.EvaluateConfig(dataset_name_or_path=data, baseline=folder, **asks, **named)
            ),
        ],
    }
    for option, of_option in stages.items():
        for stage in of_option:
            with pytest.raises(ConfigError, match=f"{option}=.*template refuses: no system role"):
                stage.check()
