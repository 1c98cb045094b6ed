"""Several processes: two give what one gives, and they stop and resume together.

With DeepSpeed (`pip install deepspeed`; it compiles) its launch file is tried too.
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

SPEEDS = re.compile("seconds.*|peak_gb|.*_per_s|epoch")


def launch(kind):
    """The beginning of a command: one process, or two by the launch file of a kind."""
    if kind == "one":
        return [sys.executable]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*accelerate, f"--config_file=yaml/accelerate/{kind}.yaml", "--num_processes=2"]


def run(kind, *arguments):
    done = subprocess.run(
        [*launch(kind), *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chain(kind, model_dir, data, out):
    """A chain of every recipe that trains.

    The 18 rows of sft come in steps of 4, so that the second process has none in the last one.
    """
    batch_size = 4 if kind == "one" else 2
    short = {
        "max_steps": 2,
        "per_device_train_batch_size": batch_size,
        "validation_split": 0.03,
        "lora_r": 4,
    }
    one_epoch = {
        "max_steps": 0,
        "num_train_epochs": 1,
        "validation_split": 0.25,
        "learning_rate": 1e-2,
        "lora_r": 0,
    }
    pairs = {"preference_dataset_path": "examples/preferences.jsonl", "learning_rate": 5e-3}
    reinforcement = {
        "prompt_dataset_path": "examples/questions.jsonl",
        "reward": "length",
        "reward_length": 2,
        "batch_size": batch_size,
        "num_generations": 2,
        "num_training_steps": 2,
        "generation_kwargs": {"max_new_tokens": 4},
        "num_eval_prompts": 4,
        "algorithm": "grpo",
        "lora_r": 4,
    }
    reasoning = {
        "reasoning_dataset_path": "examples/reasoning.jsonl",
        "num_eval_samples": 2,
        "max_new_tokens": 4,
    }
    stages = {
        "sft": {**short, **one_epoch, "dataset_name_or_path": data},
        "dpo": {**short, **pairs},
        "reward": {**short, **pairs},
        "rl": reinforcement,
        "cot_distillation": {**short, **reasoning},
    }
    pipeline = {
        "model_name_or_path": model_dir,
        "output_dir": str(out),
        "stages": [*stages],
        "stage_configs": stages,
        "cleanup_intermediate": True,
    }
    path = out.parent / f"{kind}.yaml"
    path.write_text(json.dumps(pipeline))  # JSON is YAML too
    return run(kind, "chain.py", str(path))


def read_curve(path):
    """The lines of a metrics.jsonl, without what is measured in seconds."""
    curve = []
    for line in path.read_text().splitlines():
        figures = json.loads(line).items()
        curve.append({name: value for name, value in figures if not SPEEDS.fullmatch(name)})
    return curve


def curves(folder):
    """{stage folder: curve} of every metrics.jsonl in a folder."""
    paths = sorted(folder.rglob("metrics.jsonl"))
    return {path.parent.name: read_curve(path) for path in paths}


def test_a_chain_in_two_processes_gives_the_curves_and_weights_of_one(model_dir, data, tmp_path):
    kinds = ["one", "ddp", "fsdp2"]
    if importlib.util.find_spec("deepspeed"):
        kinds.append("zero3")
    for kind in kinds:
        out = tmp_path / kind
        screen = chain(kind, model_dir, data, out)
        assert screen.count("5/5 05_cot_distillation") == 1  # only one process logs
        steps, weights = curves(out), load_file(out / "final/model.safetensors")
        if kind == "one":
            expected_steps, expected_weights = steps, weights
            assert len(steps) == 5
            assert len(steps["01_sft"]) == 7
        for stage, expected in expected_steps.items():
            for one, two in zip(expected, steps[stage], strict=True):
                assert two == pytest.approx(one, abs=1e-4), (kind, stage)
        assert weights.keys() == expected_weights.keys()
        for name, expected in expected_weights.items():
            assert torch.allclose(weights[name], expected, atol=1e-4), (kind, name)
        # No stage starts from the reward model, so the cleanup leaves it.
        left = [path.parent.name for path in out.glob("0*/*.safetensors")]
        assert left == ["03_reward"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_that_are_stopped_save_together_and_resume(kind, model_dir, data, tmp_path):
    command = [
        "recipes/sft.py",
        f"--model={model_dir}",
        f"--data={data}",
        "--max_steps=12",
        "--learning_rate=1e-2",
        "--lora_r=0",
        "--per_device_train_batch_size=2",
        "--save_steps=100",
    ]
    run(kind, *command, f"--output_dir={tmp_path / 'whole'}")
    again = [*command, f"--output_dir={tmp_path / 'stopped'}"]
    process = subprocess.Popen(
        [*launch(kind), *again],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step  1/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode, rest
    assert "saving a checkpoint after this step" in rest

    assert "resuming from" in run(kind, *again)
    assert curves(tmp_path / "stopped")["stopped"] == curves(tmp_path / "whole")["whole"]
    whole = load_file(tmp_path / "whole/model.safetensors")
    stopped = load_file(tmp_path / "stopped/model.safetensors")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_traceback_of_a_process_that_fails_alone_is_shown(model_dir, data, tmp_path):
    source = (ROOT / "recipes/sft.py").read_text()
    call = "    metrics = fit("
    assert call in source
    failure = "    import os; assert os.environ['RANK'] == '0', 'the second one fails'\n"
    (tmp_path / "broken.py").write_text(source.replace(call, failure + call))
    options = [f"--model={model_dir}", f"--data={data}", "--max_steps=2"]
    done = subprocess.run(
        [*launch("ddp"), tmp_path / "broken.py", *options, f"--output_dir={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode
    assert "AssertionError: the second one fails" in done.stderr
