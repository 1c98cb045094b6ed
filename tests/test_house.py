"""The rules of the house that a machine can check: imports, sizes, options, unsafe calls."""

import ast
import graphlib
import importlib
import inspect
import re
from dataclasses import fields

import pytest
from conftest import ROOT, read_help

from common import BaseStage
from core.cli import option_help
from core.pipeline_config import PipelineConfig

CORE = sorted((ROOT / "core").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SOURCES = [ROOT / "common.py", ROOT / "chain.py", ROOT / "report.py", *RECIPES, *CORE]
MAX_LINES = 600

# Every file imports from those right of it: chain -> recipes -> common -> core.
ALLOWED_IMPORTS = {
    "chain": {"common", "core", "report"},
    "common": {"core"},
    "report": {"core"},
    "recipes": {"common", "core"},
    "core": {"core"},
}
# Recipes that are a part of another: its algorithm contains theirs.
CONTAINED_RECIPES = {
    "cot_distillation": {"sft"},
    "evaluate": {"dpo", "sft"},
    "rl": {"a2c", "grpo", "ppo", "trpo"},
    "rlaif": {"a2c", "dpo", "grpo", "ppo", "reward", "rl", "trpo"},
}
SLOW_LIBRARIES = {"accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl"}
# The sections of a page: every recipe has its own. Any other function that two recipes hold under
# one name is the same in both.
SECTIONS = {
    "collate",
    "compute_advantages",
    "convert",
    "encode",
    "encode_rows",
    "execute",
    "load_data",
    "loss",
    "prepare_model_and_tokenizer",
    "token_losses",
    "train",
    "update",
    "validate",
}

every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(nodes):
    """The dotted names of all modules that the import statements among `nodes` can mean."""
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def nodes_run_on_import(tree):
    """The nodes of a module outside its functions."""
    nodes = list(tree.body)
    for node in nodes:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes.extend(ast.iter_child_nodes(node))
    return nodes


def project_files(modules):
    """The files of the project among imported modules."""
    by_module = {}
    for file in SOURCES:
        room = file.parent.name
        by_module[f"{room}.{file.stem}" if room in ("core", "recipes") else file.stem] = file
        if room == "recipes":
            by_module[file.stem] = file
    return {by_module[module] for module in modules if module in by_module}


def imported_files(path):
    """The files of the project that a file imports, anywhere in it."""
    return project_files(imported_modules(ast.walk(parse(path))))


def room_of(path):
    """core, recipes, or the name of a file beside them."""
    return path.parent.name if path.parent != ROOT else path.stem


# -- imports --------------------------------------------------------------------------------------


@every_source
def test_imports_go_one_way(path):
    allowed = ALLOWED_IMPORTS[room_of(path)]
    siblings = CONTAINED_RECIPES.get(path.stem, set())
    for imported in imported_files(path):
        if room_of(path) == room_of(imported) == "recipes":
            assert imported.stem in siblings
        else:
            assert room_of(imported) in allowed


def test_no_file_imports_itself_in_a_circle():
    imports = {path: imported_files(path) for path in SOURCES}
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert set(order) == set(SOURCES)


def loaded_files(path, loaded):
    """Add to `loaded` the files that importing `path` imports in turn, outside functions."""
    if path in loaded:
        return
    loaded.add(path)
    modules = imported_modules(nodes_run_on_import(parse(path)))
    for imported in project_files(modules):
        loaded_files(imported, loaded)


def test_help_and_a_typo_wait_for_no_slow_library():
    loaded = set()
    for path in [ROOT / "chain.py", *RECIPES]:
        loaded_files(path, loaded)
    for path in loaded:
        modules = imported_modules(nodes_run_on_import(parse(path)))
        assert not {module.split(".")[0] for module in modules} & SLOW_LIBRARIES, path


# -- sizes and calls ------------------------------------------------------------------------------


@every_source
def test_files_are_short_enough_to_be_read(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


UNSAFE_NAMES = {"eval", "exec"}
UNSAFE_ATTRIBUTES = {"os.system", "torch.load", "yaml.load", "yaml.unsafe_load"}
UNSAFE_MODULES = {"dill", "marshal", "pickle", "shelve"}


@every_source
def test_no_unsafe_calls(path):
    tree = parse(path)
    assert not imported_modules(ast.walk(tree)) & UNSAFE_MODULES
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in UNSAFE_NAMES | UNSAFE_ATTRIBUTES
            for keyword in node.keywords:
                assert keyword.arg != "shell"


# -- siblings -------------------------------------------------------------------------------------


def test_siblings_that_share_a_name_share_the_code():
    versions = {}
    for path in RECIPES:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name not in SECTIONS:
                versions.setdefault(node.name, {})[path.stem] = ast.dump(node)
    shared = {name for name, trees in versions.items() if len(trees) > 1}
    assert shared, "no two recipes share a function: does this test look in the right place?"
    different = {
        name: list(versions[name]) for name in shared if len({*versions[name].values()}) > 1
    }
    assert not different


# -- options --------------------------------------------------------------------------------------


def config_classes():
    """The config classes of all stages in recipes/, and that of a chain."""
    found = {PipelineConfig}
    for path in RECIPES:
        module = importlib.import_module(path.stem)
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, BaseStage) and value is not BaseStage:
                found.add(value.config_class)
    return sorted(found, key=lambda config_class: config_class.__name__)


every_config = pytest.mark.parametrize("config_class", config_classes())


@every_config
def test_every_option_is_explained(config_class):
    entries = read_help(option_help(config_class))
    for option in fields(config_class):
        _, explanation = entries[option.name]
        comment = re.sub(r"\((default|one of|any of|from|above|required).*\)$", "", explanation)
        assert comment.strip(), f"{option.name} has no comment"


@every_config
def test_the_everyday_options_exist(config_class):
    names = {option.name for option in fields(config_class)}
    everyday = {config_class.aliases.get(name, name) for name in config_class.everyday}
    assert len(everyday & names) >= 5


def test_every_option_is_read():
    read = options_of_the_trainer()
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Constant):
                read.add(node.value)
    for config_class in config_classes():
        assert not {option.name for option in fields(config_class)} - read


def options_of_the_trainer():
    """Names that the training loop may hand to transformers' TrainingArguments unseen."""
    from transformers import TrainingArguments

    return {option.name for option in fields(TrainingArguments)}
