"""Load a recipe's stage class from its file, and make its config from options."""

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

LINK = "stage:"  # an option value stage:NAME stands for the result of the stage NAME


def load_recipe(path: Path, base_class: type) -> Any:
    """The one subclass of `base_class` that the file defines. Raises ConfigError if there is none
    or several."""
    # With a digest in its name, a changed file, or another file of the same name, becomes a
    # separate module.
    identity = f"{path.resolve()} {file_digest(path)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}_{digest[:12]}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    with as_config_error(f"stage {path} cannot be imported"):
        spec.loader.exec_module(module)
    # Ignore classes that the recipe imports, such as BaseStage or another recipe's stage.
    classes = []
    for value in vars(module).values():
        is_stage = isinstance(value, type) and issubclass(value, base_class)
        if is_stage and value.__module__ == spec.name:
            classes.append(value)
    if len(classes) != 1:
        raise ConfigError(
            f"stage {path}: the file must define one subclass of {base_class.__name__}, "
            f"but it defines {len(classes)}"
        )
    return classes[0]


def get_config_class(stage_class: Any) -> Any:
    """`config_class` of a stage, or else the annotation of `config` in its `__init__`."""
    if stage_class.config_class is not StageConfig:
        return stage_class.config_class
    return get_type_hints(stage_class.__init__).get("config", StageConfig)


def resolve_options(
    stage_class: Any, sources: Sequence[Mapping[str, Any]]
) -> tuple[Any, dict[str, Any], list[str]]:
    """Merge options from several sources, later ones winning: (stage class, options by field name,
    notes on options without effect).

    A recipe such as `rl` chooses another stage by one of the options, which its `resolve` removes.
    Raises one ConfigError for all unknown options, wrong values, and options given under two names
    in one source.
    """
    given, problems, notes = merge_sources(get_config_class(stage_class), sources)
    stage_class, given, without_effect = stage_class.resolve(given)
    # The chosen class may have more names.
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
    """(the options without those that only recipes other than the `chosen` one read, notes on
    these).

    `config_classes` has the configs of all recipes by name. Older files may list the options of all
    of them, so default values are dropped silently; a note on any other value says `why` it has no
    effect. Unknown options are kept, to be refused as typos later.
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
    """Whether an option's value has the form stage:NAME."""
    return isinstance(value, str) and value.startswith(LINK)


def find_links(config: StageConfig) -> dict[str, str]:
    """{option: stage} for the options with values of the form stage:NAME."""
    options = vars(config).items()
    return {name: value.removeprefix(LINK) for name, value in options if is_link(value)}
