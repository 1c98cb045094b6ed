"""The notebooks: each .ipynb is its .py with the outputs of one run, and runs on the tiny model."""

import inspect
import json
import operator
import re
import shutil
import subprocess
import sys
import types

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

import common
from core import judge, kl, rationales
from notebooks import build
from recipes import a2c, cot_distillation, dpo, grpo, ppo, reward, rlaif, sft, trpo

SOURCES = build.find_sources(ROOT / "notebooks")
# What the notebooks call the modules whose functions they show.
HOMES = {
    "BaseStage": common.BaseStage,
    "a2c": a2c,
    "cot": cot_distillation,
    "dpo": dpo,
    "grpo": grpo,
    "judge": judge,
    "kl": kl,
    "ppo": ppo,
    "rationales": rationales,
    "reward": reward,
    "rlaif": rlaif,
    "sft": sft,
    "trpo": trpo,
}


def name_of(source):
    return source.stem


def source_of(name):
    """The source of a function, by the name that a notebook gives it: "ppo.gae"."""
    home, _, function = name.partition(".")
    return inspect.getsource(operator.attrgetter(function)(HOMES[home]))


def shown_functions(cell):
    return re.findall(r"^source\(([\w.]+)\)$", cell.source, re.MULTILINE)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_notebook_is_its_source_with_the_outputs_of_one_run(source):
    written = build.read_notebook(source)
    shown = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in shown.cells] == [
        (cell.cell_type, cell.source) for cell in written.cells
    ]
    code = [cell for cell in shown.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no curve"
    text = nbformat.writes(shown)
    for path in ("/home/", "/root/", "/Users/", str(ROOT)):
        assert path not in text
    assert len(text) < 10**6


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_functions_it_shows_are_as_they_are_now(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    for cell in notebook.cells:
        names = shown_functions(cell)
        if cell.cell_type == "code" and names:
            printed = "".join(output.text for output in cell.outputs)
            now = "".join(source_of(name) + "\n" for name in names)
            assert printed == now, names


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_notebook_runs(source, model_dir, tmp_path, monkeypatch):
    for name, value in {"MODEL": model_dir, "STEPS": "2", "OUT": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = build.read_notebook(source)
    resources = {"metadata": {"path": str(source.parent)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        for name in shown_functions(cell):
            assert source_of(name) in "".join(output.text for output in cell.outputs)


def test_every_recipe_has_a_notebook():
    names = {source.stem.partition("_")[2] for source in SOURCES}
    assert names >= {
        "quickstart",
        "sft",
        "dpo",
        "reward_model",
        "rl",
        "rlaif",
        "cot_distillation",
        "chain_and_custom_stage",
    }


def set_up_cell(notebook):
    (cell,) = [cell for cell in notebook.cells if "google.colab" in cell.source]
    return cell.source


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_set_up_cell_is_live_in_the_notebook(source):
    """Its commands run in Colab, and nothing of it elsewhere; the .py stays valid Python."""
    from IPython.core.inputtransformer2 import TransformerManager

    compile(source.read_text(), source, "exec")
    code = TransformerManager().transform_cell(set_up_cell(build.read_notebook(source)))
    commands = []

    class Shell:
        def system(self, command):
            commands.append(command)

        def run_line_magic(self, name, line):
            commands.append(f"{name} {line}")

    variables = {"get_ipython": Shell}
    exec(code, variables)
    assert commands == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        exec(code, variables)
    clone, enter, *installations = commands
    assert "git clone" in clone and "{REPOSITORY}" in clone  # IPython fills in the variable
    assert enter == "cd /content/recipes"
    assert "pip install -q -r requirements.txt" in installations
    # What the Makefile installs beside the requirements.
    extra = re.search(r"--no-deps (\S+)", (ROOT / "Makefile").read_text())[1]
    assert f"pip install -q --no-deps {extra}" in installations


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_one_place_names_the_repository(source):
    repository = (ROOT / "notebooks/REPOSITORY").read_text().strip()
    notebook = build.read_notebook(source)
    badge = notebook.cells[0].source
    colab = "https://colab.research.google.com/github"
    assert f"]({colab}/{repository}/blob/main/notebooks/{source.stem}.ipynb)" in badge
    assert f'REPOSITORY = "https://github.com/{repository}"' in set_up_cell(notebook)


def copy_notebooks(folder):
    """The notebooks as sources and, with an output, as .ipynb."""
    for source in SOURCES:
        shutil.copy(source, folder)
        notebook = build.read_notebook(source)
        output = nbformat.v4.new_output("stream", text="https://github.com/some/link\n")
        notebook.cells[2].outputs = [output]  # the set-up cell
        nbformat.write(notebook, folder / f"{source.stem}.ipynb")
    shutil.copy(ROOT / "notebooks/REPOSITORY", folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_colab_fills_in_the_repository(tmp_path):
    copy_notebooks(tmp_path)
    build.fill_repository(tmp_path, "octo-cat/my.recipes_2")
    assert (tmp_path / "REPOSITORY").read_text() == "octo-cat/my.recipes_2\n"
    for source in SOURCES:
        before = source.read_text().splitlines()
        after = (tmp_path / source.name).read_text().splitlines()
        changed = [new for old, new in zip(before, after, strict=True) if old != new]
        assert len(changed) == 2  # badge and set-up cell
        assert all("/octo-cat/my.recipes_2" in line for line in changed)
        notebook = nbformat.read(tmp_path / f"{source.stem}.ipynb", as_version=4)
        assert notebook.cells[2].outputs[0].text == "https://github.com/some/link\n"
        filled = build.read_notebook(tmp_path / source.name)
        assert [cell.source for cell in notebook.cells] == [cell.source for cell in filled.cells]

    first = contents(tmp_path)
    build.fill_repository(tmp_path, "octo-cat/my.recipes_2")
    assert contents(tmp_path) == first
    build.fill_repository(tmp_path, (ROOT / "notebooks/REPOSITORY").read_text().strip())
    assert (tmp_path / SOURCES[0].name).read_text() == SOURCES[0].read_text()


@pytest.mark.parametrize(
    "name",
    ["", "recipes", "a/b/c", "/recipes", "owner/", "https://github.com/a/b", 'a/b"', "a b/c"],
)
def test_colab_refuses_what_names_no_repository(name, tmp_path):
    copy_notebooks(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        build.fill_repository(tmp_path, name)
    assert contents(tmp_path) == before


def test_make_colab_needs_no_environment(tmp_path):
    """The command of the Makefile, by an interpreter without packages."""
    for name in ("Makefile", "notebooks/build.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    copy_notebooks(tmp_path / "notebooks")
    make = ["make", "-C", str(tmp_path), "colab", f"PYTHON={sys.executable} -S"]
    subprocess.run([*make, "REPO=octo/cat"], check=True)
    assert "github.com/octo/cat" in (tmp_path / "notebooks/01_sft.py").read_text()
    refused = subprocess.run([*make, "REPO=octo"], capture_output=True, text=True)
    assert refused.returncode != 0 and "OWNER/NAME" in refused.stderr
    subprocess.run(make, check=True)  # as notebooks/REPOSITORY says
    assert (tmp_path / "notebooks/REPOSITORY").read_text() == "octo/cat\n"


STEPS_IN_A_NOTEBOOK = """
import sys

sys.path.insert(0, {root!r})
from pathlib import Path

from core.run_log import log_step
from core.runtime import logger, start_logging

with start_logging("info", Path({out!r}, "training.log")):
    logger.info("the start")
    for step in range(1, 101):
        log_step(Path({out!r}), step, 100, {{"loss": 1 / step}}, "")
        if step == 50:
            logger.warning("half-way")
    logger.info("the end")
"""


def test_the_lines_of_steps_take_one_place_in_a_notebook(tmp_path):
    code = STEPS_IN_A_NOTEBOOK.format(root=str(ROOT), out=str(tmp_path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    texts = []
    for output in notebook.cells[0].outputs:
        texts.append(output.get("text") or output.data["text/plain"])
    assert [text.strip() for text in texts] == [
        "the start",
        "step  50/100  loss 0.02",
        "half-way",
        "step 100/100  loss 0.01",
        "the end",
    ]
    log = (tmp_path / "training.log").read_text()
    assert log.count("step ") == 100
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))
