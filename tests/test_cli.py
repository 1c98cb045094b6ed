"""core/cli.py and common.main: options, mistakes, --help, and a whole run from the command line."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import sft
from conftest import ROOT


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--learning_rat=1"], "did you mean 'learning_rate'"),
        (["--model=12", "--data=x.jsonl", "--seed=x"], "seed='x'"),
        (["train"], "unexpected word 'train'"),
        (["--save_intermediate=false"], "are for the stages of a chain"),
        (["--model=./nowhere", "--data=./none.jsonl"], "./none.jsonl: no such file"),
        (
            ["--model=./nowhere", "--data=examples/sample_data.jsonl", "--dry_run=perhaps"],
            "dry_run",
        ),
        (["--seed=1", "--seed=2"], "--seed stands 2 times"),
        (
            ["--dry_run=1", "--model=./nowhere", "--data=examples/sample_data.jsonl"],
            "./nowhere: no such file",
        ),
    ],
)
def test_a_mistake_exits_with_status_2_and_one_sentence(tmp_path, arguments, words):
    done = run("recipes/sft.py", f"--output_dir={tmp_path}", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, data):
    done = run("recipes/sft.py", f"--output_dir={data}", "--model=./nowhere", f"--data={data}")
    assert (
        done.returncode == 2
        and "cannot be written to" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_help_has_every_option_with_its_comment():
    done = run("recipes/sft.py", "--help")
    assert done.returncode == 0 and "log pi_theta" in done.stdout
    for name in (option.name for option in fields(sft.SFTConfig)):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"  --{name}=")]
        assert len(line.split("  ")[-1]) > 5, f"{name} has no comment"


def test_the_recipe_from_the_command_line_leaves_a_whole_folder(model_dir, data, tmp_path):
    out = tmp_path / "out"
    done = run(
        "recipes/sft.py",
        f"--model={model_dir}",
        f"--data={data}",
        f"--output_dir={out}",
        "--max_steps=3",
        "--validation_split=0.2",
        "--num_eval_samples=2",
        "--max_new_tokens=4",
        "--report_to=tensorboard",
        "--learning_rate=1e-2",
        env={**os.environ, "HF_TOKEN": "hf_canary"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "question-answer, 24 rows: question, answer" in done.stdout and "tokens/s" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert (
        model.config.use_cache
        and model.generation_config.eos_token_id == [0, 2]
        and tokenizer.chat_template
    )
    stage = json.loads((out / "stage.json").read_text())
    assert (
        stage["success"] and stage["parent"]["model"] == model_dir and stage["data"]["rows"] == 24
    )
    assert stage["metrics"]["eval_loss"] < stage["metrics"]["eval_loss_before"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "token_accuracy"} <= set(lines[1])
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2
    assert (
        list(out.glob("runs/events.out.tfevents*"))
        and (out / "adapter/adapter_model.safetensors").exists()
    )
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert b"hf_canary" not in written and not list(out.rglob("*.bin"))
