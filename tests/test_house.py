"""The house rules that a machine can check: budgets, directions of imports, options that are read."""

import ast
import re
from dataclasses import fields

import cot_distillation
import dpo
import evaluate
import pytest
import reward
import rl
import rlaif
import sft
from conftest import ROOT

import chain
import common
import core.cli
import core.config

BUDGETS = {
    "chain.py": 422,
    "common.py": 2496,
    "report.py": 255,
    "recipes/sft.py": 231,
    "recipes/dpo.py": 442,
    "recipes/reward.py": 226,
    "recipes/rl.py": 1045,
    "recipes/rlaif.py": 407,
    "recipes/cot_distillation.py": 438,
    "recipes/evaluate.py": 257,
}
CONFIGS = (
    sft.SFTConfig,
    dpo.DPOConfig,
    reward.RewardConfig,
    rl.RLConfig,
    rlaif.RLAIFConfig,
    cot_distillation.CoTConfig,
    evaluate.EvaluateConfig,
    chain.PipelineConfig,
)
CONTAINS = {
    "evaluate": {"dpo", "recipes", "rl", "rlaif", "sft"},
    "rlaif": {"dpo", "recipes", "reward", "rl"},
    "cot_distillation": {"recipes", "sft"},
}  # as a part of itself
# What every recipe has, each its own; any other function that two recipes hold under one name is the same in both.
SECTIONS = {
    "encode",
    "encode_rows",
    "collate",
    "loss",
    "train",
    "validate",
    "load_data",
    "convert",
    "prepare_model_and_tokenizer",
    "execute",
}
SOURCES = [
    ROOT / "common.py",
    ROOT / "chain.py",
    ROOT / "report.py",
    *sorted((ROOT / "recipes").glob("*.py")),
]


@pytest.mark.parametrize("name", BUDGETS)
def test_pages_stay_inside_their_budgets(name):
    assert len((ROOT / name).read_text().splitlines()) <= BUDGETS[name]


def test_every_option_is_read_and_has_a_comment():
    source = "".join(path.read_text() for path in SOURCES)
    for config_class in CONFIGS:
        shown = core.cli.option_help(config_class)
        assert all(re.search(rf"  --{field.name}=.*  \S", shown) for field in fields(config_class))
    same_name = set(re.findall(r"\w+", " ".join(common_training_arguments())))
    for name in {field.name for cls in CONFIGS for field in fields(cls)}:
        assert (
            re.search(rf"(config|self)\.{name}\b", source)
            or name in same_name
            or f'"{name}"' in source
        ), name


def common_training_arguments():
    """Options that fit() hands to TrainingArguments under their own name."""
    from transformers import TrainingArguments

    return {field.name for field in fields(TrainingArguments)} & {
        field.name for field in fields(core.config.FitConfig)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_go_one_way_and_the_slow_ones_wait(path):
    allowed = {"chain.py": {"common", "report"}, "common.py": set()}.get(
        path.name, {"common"}
    ) | CONTAINS.get(path.stem, set())
    top = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {
        name.split(".")[0]
        for node in top
        for name in [getattr(node, "module", None), *(n.name for n in node.names)]
        if name
    }
    ours = {
        "chain",
        "common",
        "recipes",
        "report",
        *(recipe.stem for recipe in (ROOT / "recipes").glob("*.py")),
    }
    assert names & ours <= allowed
    assert not names & {"transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}


def test_no_unsafe_calls():
    for path in SOURCES:
        source = path.read_text()
        assert not re.search(
            r"(?<![.\w])(eval|exec)\(|import pickle|yaml\.load\(|torch\.load|shell=True", source
        ), path


def test_siblings_that_share_a_name_share_the_code():
    found = {}
    for path in (ROOT / "recipes").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name not in SECTIONS:
                found.setdefault(node.name, set()).add(ast.dump(node))
    assert not [name for name, versions in found.items() if len(versions) > 1]
