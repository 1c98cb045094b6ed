"""Several processes: what two make of a step is what one makes of it, and they stop and go on together. With DeepSpeed
(`pip install deepspeed`; it compiles) its launch file is tried too."""

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
    return (
        [sys.executable]
        if kind == "one"
        else [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            f"--config_file=yaml/accelerate/{kind}.yaml",
            "--num_processes=2",
        ]
    )


def run(kind, *words):
    done = subprocess.run(
        [*launch(kind), *words], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def chain(kind, model_dir, data, out):
    """A chain of every recipe that trains; 18 rows in steps of 4, so that the second process has none in the last."""
    each = 4 if kind == "one" else 2
    short = dict(max_steps=2, per_device_train_batch_size=each, validation_split=0.03, lora_r=4)
    stages = {
        "sft": short
        | dict(
            dataset_name_or_path=data,
            max_steps=0,
            num_train_epochs=1,
            validation_split=0.25,
            learning_rate=1e-2,
            lora_r=0,
        ),
        "dpo": short
        | dict(preference_dataset_path="examples/preferences.jsonl", learning_rate=1e-2),
        "reward": short
        | dict(preference_dataset_path="examples/preferences.jsonl", learning_rate=1e-2),
        "rl": dict(
            prompt_dataset_path="examples/questions.jsonl",
            reward="length",
            reward_length=2,
            batch_size=each,
            num_generations=2,
            num_training_steps=2,
            generation_kwargs={"max_new_tokens": 4},
            num_eval_prompts=4,
            algorithm="grpo",
            lora_r=4,
        ),
        "cot_distillation": short
        | dict(
            reasoning_dataset_path="examples/reasoning.jsonl", num_eval_samples=2, max_new_tokens=4
        ),
    }
    (out.parent / f"{kind}.yaml").write_text(
        json.dumps(  # which is YAML too
            dict(
                model_name_or_path=model_dir,
                output_dir=str(out),
                stages=[*stages],
                stage_configs=stages,
                cleanup_intermediate=True,
            )
        )
    )
    return run(kind, "chain.py", str(out.parent / f"{kind}.yaml"))


def curves(folder):
    return {
        path.parent.name: [
            {key: value for key, value in json.loads(line).items() if not SPEEDS.fullmatch(key)}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("metrics.jsonl"))
    }


def test_a_chain_in_two_processes_gives_the_curves_and_weights_of_one(model_dir, data, tmp_path):
    for kind in (
        "one",
        "ddp",
        "fsdp2",
        *(["zero3"] if importlib.util.find_spec("deepspeed") else []),
    ):
        said = chain(kind, model_dir, data, tmp_path / kind)
        assert said.count("5/5 05_cot_distillation") == 1  # one process speaks
        found, weights = (
            curves(tmp_path / kind),
            load_file(tmp_path / kind / "final/model.safetensors"),
        )
        if kind == "one":
            expected, trained = found, weights
            assert len(found["01_sft"]) == 7 and len(found) == 5
        for stage, steps in expected.items():
            for one, two in zip(steps, found[stage], strict=True):
                assert two == pytest.approx(one, abs=1e-4), (kind, stage)
        assert weights.keys() == trained.keys()
        assert all(torch.allclose(weights[name], trained[name], atol=1e-4) for name in trained), (
            kind
        )
        assert [path.parent.name for path in (tmp_path / kind).glob("0*/*.safetensors")] == [
            "03_reward"
        ]  # which is nobody's start


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_that_are_stopped_save_together_and_go_on(kind, model_dir, data, tmp_path):
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
        if line.startswith("step  3/"):
            process.send_signal(signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode and "a checkpoint is saved" in rest, rest
    assert "resuming from" in run(kind, *again)
    assert curves(tmp_path / "stopped")["stopped"] == curves(tmp_path / "whole")["whole"]
    whole, stopped = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_words_of_a_process_that_fails_alone_are_seen(model_dir, data, tmp_path):
    (tmp_path / "broken.py").write_text(
        (ROOT / "recipes/sft.py")
        .read_text()
        .replace(
            "    metrics = fit(",
            "    import os; assert os.environ['RANK'] == '0', 'the second one fails'\n    metrics = fit(",
        )
    )
    done = subprocess.run(
        [
            *launch("ddp"),
            str(tmp_path / "broken.py"),
            f"--model={model_dir}",
            f"--data={data}",
            "--max_steps=2",
            f"--output_dir={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode and "AssertionError: the second one fails" in done.stderr
