"""The notebooks: each .ipynb is its .py with the outputs of a whole run, and runs on the tiny model."""

import inspect
import operator
import re

import cot_distillation
import dpo
import jupytext
import nbformat
import pytest
import reward
import rl
import rlaif
import sft
from conftest import ROOT
from nbclient import NotebookClient

import common
from core import rationales

SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
HOMES = {
    "common": common,
    "cot": cot_distillation,
    "dpo": dpo,
    "rationales": rationales,
    "reward": reward,
    "rl": rl,
    "rlaif": rlaif,
    "sft": sft,
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_notebook_is_its_source_with_the_outputs_of_one_run(source):
    written, shown = (
        jupytext.read(source),
        nbformat.read(source.with_suffix(".ipynb"), as_version=4),
    )
    assert [(c.cell_type, c.source) for c in shown.cells] == [
        (c.cell_type, c.source) for c in written.cells
    ]
    code = [cell for cell in shown.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no curve"
    said = nbformat.writes(shown)
    assert (
        not any(path in said for path in ("/home/", "/root/", "/Users/", str(ROOT)))
        and len(said) < 10**6
    )


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_functions_it_shows_are_as_they_are_now(source):
    for cell in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells:
        if cell.cell_type == "code" and (
            names := re.findall(r"^source\(([\w.]+)\)$", cell.source, re.MULTILINE)
        ):
            now = "".join(
                inspect.getsource(
                    operator.attrgetter(name.partition(".")[2])(HOMES[name.partition(".")[0]])
                )
                + "\n"
                for name in names
            )
            assert "".join(output.text for output in cell.outputs) == now, names


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_notebook_runs(source, model_dir, tmp_path, monkeypatch):
    for name, value in {"MODEL": model_dir, "STEPS": "2", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = jupytext.read(source)
    NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(source.parent)}},
    ).execute()


def test_every_recipe_has_a_notebook():
    named = {source.stem.partition("_")[2] for source in SOURCES}
    assert named >= {
        "quickstart",
        "sft",
        "dpo",
        "reward_model",
        "rl",
        "rlaif",
        "cot_distillation",
        "chain_and_custom_stage",
    }
