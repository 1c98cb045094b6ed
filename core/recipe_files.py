"""From the file of a recipe, and the options given for it, to a stage class and its config."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from core.config import StageConfig
from core.errors import ConfigError, as_config_error
from core.files import file_digest
from core.options import check_options, merge_sources

LINK = "stage:"  # an option written as stage:NAME stands for what the stage NAME leaves


def load_recipe(path: Path, base_class: type) -> Any:
    """The one subclass of `base_class` that the file defines. Raises ConfigError if there is none
    or several."""
    # The digest in the module's name makes a changed file, and a second file of the same name,
    # another module.
    identity = f"{path.resolve()} {file_digest(path)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}_{digest[:12]}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    with as_config_error(f"stage {path} cannot be imported"):
        spec.loader.exec_module(module)
    # Classes that the recipe imports, such as BaseStage itself or a sibling's stage, do not count.
    classes = []
    for value in vars(module).values():
        is_stage = isinstance(value, type) and issubclass(value, base_class)
        if is_stage and value.__module__ == spec.name:
            classes.append(value)
    if len(classes) != 1:
        raise ConfigError(
            f"stage {path}: the file must define one subclass of {base_class.__name__}, "
            f"and defines {len(classes)}"
        )
    return classes[0]


def get_config_class(stage_class: Any) -> Any:
    """`config_class` of a stage, or else the annotation of `config` on its `__init__`."""
    if stage_class.config_class is not StageConfig:
        return stage_class.config_class
    return get_type_hints(stage_class.__init__).get("config", StageConfig)


def resolve_options(
    stage_class: Any, sources: Sequence[Mapping[str, Any]]
) -> tuple[Any, dict[str, Any], list[str]]:
    """(stage class, options by field name, notes on what has no effect) of options from several
    sources, of which later ones win.

    A recipe such as `rl` chooses another stage by one of the options: its `resolve` takes that one
    out. Raises one ConfigError for all unknown options, wrong values, and options that a source has
    under two names.
    """
    given, problems, notes = merge_sources(get_config_class(stage_class), sources)
    stage_class, given, without_effect = stage_class.resolve(given)
    # The class that was chosen may know more names.
    config_class = get_config_class(stage_class)
    given, *more = merge_sources(config_class, [given])
    values, mistakes = check_options(config_class, given)
    problems += more[0] + mistakes
    notes += without_effect + more[1]
    if problems:
        raise ConfigError(*problems)
    return stage_class, values, notes


def make_config(config_class: Any, options: Mapping[str, Any], notes: Sequence[str]) -> Any:
    """The config of checked `options`; `notes` are on options that have no effect."""
    config = config_class(**options)
    config.notes_on_names = list(notes)
    return config


def option_names(config_class: Any) -> set[str]:
    """Names and short names of the options of a config class."""
    names = {option.name for option in fields(config_class)}
    names.update(config_class.aliases)
    return names


def select_options(
    options: Mapping[str, Any], config_classes: Mapping[str, Any], chosen: str | None, why: str
) -> tuple[dict[str, Any], list[str]]:
    """(the options without those that only other recipes than the `chosen` one read, notes on
    these).

    `config_classes` has the configs of the recipes that there are, by name. Older files may list
    the options of all of them, so a default is left out without a word; a note on another value
    says `why` it has no effect. What no recipe knows is kept: it is refused as a typo later.
    """
    selected = {}
    notes = []
    for name, value in options.items():
        owners = []
        for recipe, config_class in config_classes.items():
            if name in option_names(config_class):
                owners.append(recipe)
        if not owners or chosen in owners:
            selected[name] = value
            continue
        defaults = [is_default(config_classes[owner], name, value) for owner in owners]
        if not any(defaults):
            notes.append(f"{name} has no effect {why}; it belongs to {', '.join(owners)}")
    return selected, notes


def is_default(config_class: Any, option: str, value) -> bool:
    """Whether a value, which may be text, is the default. Raises ConfigError for an invalid one."""
    name = config_class.aliases.get(option, option)
    given = config_class(**{name: value})
    return getattr(given, name) == getattr(config_class(), name)


def is_link(value: Any) -> bool:
    """Whether the value of an option is written as stage:NAME."""
    return isinstance(value, str) and value.startswith(LINK)


def find_links(config: StageConfig) -> dict[str, str]:
    """{option: stage} of the options that are written as stage:NAME."""
    options = vars(config).items()
    return {name: value.removeprefix(LINK) for name, value in options if is_link(value)}
