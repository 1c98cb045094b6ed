"""core/run_end.py: what a run says at its end. The commands are run as they are printed."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TWO_STEPS

import chain
import common
from core import run_end
from core.columns import detect_format
from core.errors import ConfigError
from recipes import cot_distillation, dpo, evaluate, grpo, reward, rlaif, sft

NAMES = "model|reward model|report|talk to it|evaluate it|use it|answers"


def run_end_lines(text):
    """{name: content} of the aligned lines."""
    return dict(re.findall(rf"^({NAMES})  +(\S.*)$", text, re.MULTILINE))


def run_command(command, *more):
    words = shlex.split(command)
    assert words[0] == "python"
    return subprocess.run(
        [sys.executable, *words[1:], *more], cwd=ROOT, capture_output=True, text=True
    )


def options_of(command):
    return dict(word[2:].split("=", 1) for word in shlex.split(command) if word.startswith("--"))


@pytest.fixture
def home(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_recipe_ends_with_commands_that_run(model_dir, data, tmp_path, home):
    out = tmp_path / "my run"
    options = dict(model=model_dir, data=data, output_dir=str(out), **TWO_STEPS)
    arguments = [f"--{name}={value}" for name, value in options.items()]
    command = shlex.join(["python", "recipes/sft.py", *arguments])
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert f"done: {out}\n" in done.stdout
    assert re.search(r"^eval_loss +[\d.]+ -> [\d.]+$", done.stdout, re.MULTILINE)
    lines = run_end_lines(done.stdout)
    assert list(lines) == ["model", "report", "talk to it", "evaluate it"]
    assert lines["model"] == f"'{out}'"
    assert lines["talk to it"] == f"python chat.py '{out}'"

    assert run_command(lines["report"]).returncode == 0
    assert (out / "report.html").exists()
    evaluated = run_command(lines["evaluate it"])
    assert evaluated.returncode == 0, evaluated.stderr
    lines = run_end_lines(evaluated.stdout)
    assert lines["answers"] == f"'{out}-evaluation/samples.jsonl'"
    record = json.loads((tmp_path / "my run-evaluation/stage.json").read_text())
    assert {"perplexity", "perplexity_before"} <= record["metrics"].keys()


def test_a_failed_recipe_says_where_the_log_is_and_what_the_same_command_does(
    model_dir, tmp_path, home
):
    """It says nothing of a model."""
    function = tmp_path / "reward.py"
    function.write_text(
        "calls = []\n"
        "def late(prompts, completions, **columns):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3:\n"
        "        raise ValueError('broken')\n"
        "    return [1.0] * len(completions)\n"
    )
    options = dict(
        model=model_dir,
        data=str(ROOT / "examples/questions.jsonl"),
        output_dir=str(tmp_path / "out"),
        reward=f"{function}:late",
        num_training_steps=4,
        batch_size=2,
        num_generations=2,
        generation_kwargs="{max_new_tokens: 4}",
        validation_split=0,
        save_freq=2,
    )
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = run_command(shlex.join(["python", "recipes/grpo.py", *arguments]))
    assert done.returncode == 1
    assert f"The traceback is in {tmp_path}/out/training.log" in done.stdout
    assert "done:" not in done.stdout and "talk to it" not in done.stdout
    checkpoint = tmp_path / "out/checkpoints/checkpoint-2"
    assert f"run the same command again to go on from {checkpoint}\n" in done.stderr


def test_without_a_checkpoint_the_same_command_starts_over(tmp_path):
    config = sft.SFTConfig(output_dir=str(tmp_path))
    says = run_end.describe_resumption(config)
    assert says == "run the same command again to start this stage over"
    (tmp_path / "checkpoints/checkpoint-2").mkdir(parents=True)
    assert "go on from" in run_end.describe_resumption(config)
    (tmp_path / "checkpoints").rename(tmp_path / "kept")
    for name in ("previous.1/checkpoints/checkpoint-2", "checkpoints/checkpoint-2 copy"):
        (tmp_path / name).mkdir(parents=True)
    assert run_end.describe_resumption(config) == says
    (tmp_path / "policy/checkpoints/checkpoint-4").mkdir(parents=True)
    assert run_end.describe_resumption(config).endswith("policy/checkpoints/checkpoint-4")
    config.resume_from_checkpoint = False
    assert run_end.describe_resumption(config) == says


def stage_in(stage_class, config_class, folder, **options):
    """A stage with weights in its folder, and its result."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").touch()
    config = config_class(model_name_or_path="start", output_dir=str(folder), **options)
    return stage_class(config), common.StageResult("stage", True, str(folder))


def test_the_evaluation_of_rl_has_its_reward_and_length(tmp_path, home):
    stage, result = stage_in(
        grpo.GRPOStage,
        grpo.GRPOConfig,
        tmp_path / "out",
        prompt_dataset_path="x y.jsonl",
        reward=["regex", "my.py:f"],
        reward_weights=[1.0, 0.5],
        reward_pattern="a | b'",
        trust_remote_code=True,
        use_4bit=True,
        auto_detect_format=False,
        seed=1,
        learning_rate=1.0,
        generation_kwargs={"max_new_tokens": 24},
    )
    lines = run_end_lines(run_end.describe_end(stage, result))
    assert options_of(lines["evaluate it"]) == {
        "model": str(tmp_path / "out"),
        "data": "x y.jsonl",
        "baseline": "start",
        "output_dir": str(tmp_path / "out-evaluation"),
        "num_eval_samples": "100",
        "trust_remote_code": "true",
        "auto_detect_format": "false",
        "reward": "regex,my.py:f",
        "reward_weights": "1.0,0.5",
        "reward_pattern": "a | b'",
        "max_new_tokens": "24",
    }


def test_what_plain_text_taught_is_not_evaluated(tmp_path, home):
    stage, result = stage_in(
        sft.SFTStage, sft.SFTConfig, tmp_path / "out", dataset_name_or_path="text.jsonl"
    )
    stage.lineage["data"] = {"format": "text"}
    assert "evaluate" not in run_end.describe_end(stage, result)
    stage.lineage["data"] = {"format": "question-answer"}
    assert "evaluate" in run_end.describe_end(stage, result)


def test_a_reward_model_is_used_in_rl(tmp_path, home):
    stage, _ = stage_in(
        reward.RewardStage,
        reward.RewardConfig,
        tmp_path / "rm",
        preference_dataset_path="pairs.jsonl",
    )
    result = common.StageResult("reward", True)
    for data_format, data, extra in (
        ("prompt-chosen-rejected", "pairs.jsonl", {"dataset_format": "prompt"}),
        ("chosen-rejected", "PROMPTS.jsonl", {}),
    ):
        stage.lineage["data"] = {"format": data_format}
        lines = run_end_lines(run_end.describe_end(stage, result))
        assert list(lines) == ["reward model", "report", "use it"]
        assert (
            options_of(lines["use it"])
            == {
                "model": "start",
                "data": data,
                "reward_model_path": str(tmp_path / "rm"),
                "output_dir": str(tmp_path / "rm-grpo"),
            }
            | extra
        )


def test_outside_the_repository_commands_name_the_scripts_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_end.script_command("chat.py", "out") == f"python {ROOT}/chat.py out"


@pytest.mark.parametrize(
    "config_class", [sft.SFTConfig, dpo.DPOConfig, grpo.GRPOConfig, cot_distillation.CoTConfig]
)
def test_a_format_is_evaluated_if_evaluate_reads_its_columns(config_class):
    for name, columns in config_class.formats.items():
        if name in run_end.NOT_EVALUATED:
            with pytest.raises(ConfigError, match="unknown data format"):
                detect_format(columns, evaluate.FORMATS)
        else:
            assert detect_format(columns, evaluate.FORMATS)


def test_the_judge_of_a_stage_judges_its_evaluation_without_showing_a_password():
    config = rlaif.RLAIFConfig(
        model_name_or_path="start",
        feedback_model_type="api",
        feedback_base_url="http://me:secret@localhost/v1",
        constitution=["Be brief, and kind."],
    )
    options = run_end.options_taken_over(config)
    command = run_end.recipe_command("evaluate", options)
    assert options_of(command) == {
        "feedback_model_type": "api",
        "feedback_base_url": "http://***@localhost/v1",
        "constitution": '["Be brief, and kind."]',
    }


def chain_of(model_dir, data, tmp_path, stages, **options):
    config = {
        "model_name_or_path": model_dir,
        "output_dir": str(tmp_path / "chain"),
        "stages": stages,
        "stage_configs": {"sft": {"data": data, **TWO_STEPS}},
    }
    return chain.Pipeline.from_dict(config | options)


def test_a_chain_ends_with_its_final_model(model_dir, data, tmp_path, home, capsys):
    pipeline = chain_of(model_dir, data, tmp_path, ["sft"])
    pipeline.run()
    out = tmp_path / "chain"
    lines = run_end_lines(capsys.readouterr().out)
    assert lines["model"] == str(out / "final")
    assert lines["report"] == str(out / "report.html")
    assert lines["talk to it"] == f"python chat.py {out}/final"
    assert options_of(lines["evaluate it"]) == {
        "model": str(out / "final"),
        "data": data,
        "baseline": model_dir,
        "output_dir": f"{out}-evaluation",
        "num_eval_samples": "100",
        "max_new_tokens": "128",
    }
    assert lines["model"] in (out / "pipeline_training.log").read_text()


def test_a_chain_without_a_final_model_names_that_of_its_last_stage(
    model_dir, data, tmp_path, home, capsys
):
    chain_of(model_dir, data, tmp_path, ["sft"], save_final_model=False).run()
    lines = run_end_lines(capsys.readouterr().out)
    assert lines["model"] == str(tmp_path / "chain/01_sft")


def test_a_chain_that_ends_early_names_the_model_of_its_last_stage(
    model_dir, data, tmp_path, home, capsys
):
    chain_of(model_dir, data, tmp_path, ["sft", "sft"]).run()
    assert (tmp_path / "chain/final").exists()
    chain_of(model_dir, data, tmp_path, ["sft", "sft"], until="01_sft").run()
    _, _, last = capsys.readouterr().out.rpartition("before -> after")
    assert run_end_lines(last)["model"] == str(tmp_path / "chain/01_sft")


def test_a_finished_chain_gives_the_path_of_its_reward_model(model_dir, tmp_path, home, capsys):
    of_reward = {"data": str(ROOT / "examples/preferences.jsonl"), **TWO_STEPS}
    of_rl = {
        "data": str(ROOT / "examples/questions.jsonl"),
        "reward_model_path": "stage:reward",
        "generation_kwargs": {"max_new_tokens": 4},
        "num_training_steps": 1,
        "batch_size": 2,
        "num_generations": 2,
        "num_eval_prompts": 1,
    }
    options = {"stage_configs": {"reward": of_reward, "grpo": of_rl}}
    for _ in ("trained", "reused"):
        chain_of(model_dir, "", tmp_path, ["reward", "grpo"], **options).run()
        lines = run_end_lines(capsys.readouterr().out)
        command = options_of(lines["evaluate it"])
        assert command["reward_model_path"] == str(tmp_path / "chain/01_reward")


def test_a_failed_chain_goes_on_with_the_same_command(
    model_dir, data, tmp_path, home, capsys, monkeypatch
):
    pipeline = chain_of(model_dir, data, tmp_path, ["sft"])
    monkeypatch.setattr(pipeline.stages[0], "train", lambda *_: 1 / 0)
    results = pipeline.run()
    assert not results[-1].success
    screen = capsys.readouterr().out
    assert f"stage 01_sft failed; the log is {tmp_path}/chain/pipeline_training.log" in screen
    assert "run the same command again to start this stage over" in screen
    assert "talk to it" not in screen


def test_a_failed_chain_that_began_anew_goes_on_without_the_switch(
    model_dir, data, tmp_path, home, capsys, monkeypatch
):
    pipeline = chain_of(model_dir, data, tmp_path, ["sft"], force_restart=True, auto_resume=False)
    monkeypatch.setattr(pipeline.stages[0], "train", lambda *_: 1 / 0)
    pipeline.run()
    advice = "run the same command without force_restart and auto_resume=false to go on with 01_sft"
    assert f"{advice}\n" in capsys.readouterr().out
