"""The rules of the house that a machine can check: imports, sizes, options, unsafe calls."""

import ast
import graphlib
import importlib
import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import rl
from conftest import ROOT, read_help

from common import BaseStage
from core.cli import option_help
from core.config import FitConfig
from core.pipeline_config import SHARED_OPTIONS, PipelineConfig
from core.rewards import REWARD_OPTIONS, ScoringConfig

CORE = sorted((ROOT / "core").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BESIDE = [ROOT / f"{name}.py" for name in ("common", "chain", "chat", "report")]
SOURCES = [*BESIDE, *RECIPES, *CORE]
MAX_LINES = 600

# Every file imports from those right of it: chain -> recipes -> common -> core.
ALLOWED_IMPORTS = {
    "chain": {"common", "core", "report"},
    "chat": {"common", "core"},
    "common": {"core"},
    "report": {"core"},
    "recipes": {"common", "core"},
    "core": {"core"},
}
# Recipes that are a part of another: its algorithm contains theirs.
CONTAINED_RECIPES = {
    "cot_distillation": {"sft"},
    "custom_tokenizer": {"sft"},
    "evaluate": {"sft"},
    "rl": {"a2c", "grpo", "ppo", "trpo"},
    "rlaif": {"a2c", "dpo", "grpo", "ppo", "reward", "trpo"},
}
SLOW_LIBRARIES = {"accelerate", "bitsandbytes", "datasets", "peft", "transformers", "trl"}
# What report.py needs besides the standard library.
IMPORTS_OF_THE_REPORT = {
    "core.charts",
    "core.metrics",
    "core.run_folder",
    "core.screen",
    "core.yaml_files",
    "jinja2",
    "markupsafe",
}
# The sections of a page: every recipe has its own. Any other function that two recipes hold under
# one name is the same in both.
SECTIONS = {
    "collate",
    "convert",
    "encode",
    "encode_rows",
    "loss",
    "token_losses",
    "train",
    "update",
}
# Functions of one recipe that differ from those of its siblings, though they share the name.
OWN_FUNCTIONS = {("grpo", "compute_advantages")}
SHARED_FUNCTIONS = {
    "clipped_policy_loss": {"grpo", "ppo"},
    "compute_advantages": {"a2c", "ppo", "trpo"},
    "gae": {"a2c", "ppo", "trpo"},
    "is_clipped": {"grpo", "ppo"},
    "score_at_end": {"a2c", "ppo", "trpo"},
    "value_loss": {"a2c", "trpo"},
    "whiten": {"a2c", "ppo", "trpo"},
}
RL_PAGES = ("a2c", "ppo", "trpo", "grpo")
# Methods that the stage classes of these share, and those that each has its own version of.
SHARED_METHODS = {"load_data", "sequences", "train", "work"}
OWN_METHODS: set[str] = set()

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
def test_imports_name_their_module_in_full(path):
    """The tests below do not follow relative imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)


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


def test_the_report_needs_little():
    """It is copied and started beside runs of other machines."""
    modules = set()
    for node in ast.walk(parse(ROOT / "report.py")):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    needed = {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names}
    assert needed == IMPORTS_OF_THE_REPORT


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
    for path in [ROOT / "chain.py", ROOT / "chat.py", *RECIPES]:
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
        # Also where it is not called here, but handed on.
        if isinstance(node, ast.Name | ast.Attribute):
            assert ast.unparse(node) not in UNSAFE_NAMES | UNSAFE_ATTRIBUTES
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                assert keyword.arg != "shell"


# -- siblings -------------------------------------------------------------------------------------


def function_versions():
    """{function: {recipe: its code}} of the functions of all recipes."""
    versions = {}
    for path in RECIPES:
        for node in parse(path).body:
            if isinstance(node, ast.FunctionDef):
                versions.setdefault(node.name, {})[path.stem] = ast.dump(node)
    return versions


def method_versions(recipes):
    """{method: {recipe: its code}} of the stage classes of these recipes."""
    versions = {}
    for recipe in recipes:
        for node in parse(ROOT / f"recipes/{recipe}.py").body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Stage"):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        versions.setdefault(method.name, {})[recipe] = ast.dump(method)
    return versions


def test_siblings_that_share_a_name_share_the_code():
    for name, versions in function_versions().items():
        if name not in SECTIONS:
            siblings = {
                recipe: code
                for recipe, code in versions.items()
                if (recipe, name) not in OWN_FUNCTIONS
            }
            assert len({*siblings.values()}) <= 1, (name, [*siblings])


@pytest.mark.parametrize("name", SHARED_FUNCTIONS)
def test_siblings_share_these_functions(name):
    versions = function_versions()[name]
    shared = {versions[recipe] for recipe in SHARED_FUNCTIONS[name]}
    assert len(shared) == 1


def test_what_differs_between_siblings_is_listed_for_a_reason():
    versions = function_versions()
    for name in SECTIONS:
        assert len({*versions[name].values()}) > 1, f"{name} is in no two versions"
    for recipe, name in OWN_FUNCTIONS:
        others = {code for other, code in versions[name].items() if other != recipe}
        assert others and versions[name][recipe] not in others, (recipe, name)


def test_the_stages_of_rl_share_their_methods():
    versions = method_versions(RL_PAGES)
    common_methods = {name for name, codes in versions.items() if len(codes) > 1}
    assert common_methods == SHARED_METHODS | OWN_METHODS
    for name in SHARED_METHODS:
        assert set(versions[name]) == set(RL_PAGES), name
        assert len({*versions[name].values()}) == 1, name


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
        assert len(comment.strip()) > 5, f"{option.name} has no comment"


@every_config
def test_the_everyday_options_exist(config_class):
    names = {option.name for option in fields(config_class)}
    everyday = {config_class.aliases.get(name, name) for name in config_class.everyday}
    assert len(everyday & names) >= 5


@every_config
def test_every_option_is_read(config_class):
    """By the file that the class is in, or by one that this file imports in turn."""
    start = ROOT / "chain.py" if config_class is PipelineConfig else source_of(config_class)
    read = options_read_by_name(config_class)
    for path in files_behind(start):
        read |= options_read_in(parse(path))
    assert not {option.name for option in fields(config_class)} - read


def source_of(config_class):
    """The file of a config class."""
    return Path(inspect.getfile(config_class)).resolve()


def files_behind(path):
    """A file, and those of the project that it imports in turn, anywhere in them."""
    found, todo = set(), [path]
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += imported_files(file)
    return found


def options_read_in(node, class_name=""):
    """Attributes that are read of a config: of `config`, of `stage.config` and the like, or of
    `self` inside a config class."""
    read = set()
    for child in ast.iter_child_nodes(node):
        inner_class = child.name if isinstance(child, ast.ClassDef) else class_name
        is_read = isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load)
        if is_read and is_config(child.value, class_name):
            read.add(child.attr)
        read |= options_read_in(child, inner_class)
    return read


def is_config(node, class_name):
    if isinstance(node, ast.Attribute):
        return node.attr == "config"
    if not isinstance(node, ast.Name):
        return False
    return node.id == "config" or (node.id == "self" and class_name.endswith("Config"))


def options_read_by_name(config_class):
    """Options that are read by getattr, or handed on, with names from a list."""
    if config_class is PipelineConfig:
        return set(SHARED_OPTIONS)
    names = {config_class.aliases["data"]}
    if issubclass(config_class, FitConfig):
        names |= training_arguments()
    if issubclass(config_class, ScoringConfig):
        names |= set(REWARD_OPTIONS)
    if config_class is rl.RLChoiceConfig:
        names.add("algorithm")  # rl.py takes it out of the options before there is a config
    return names


def training_arguments():
    """Options that the training loop hands to transformers' TrainingArguments by their names."""
    from transformers import TrainingArguments

    names = {option.name for option in fields(TrainingArguments)}
    return names & {option.name for option in fields(FitConfig)}
