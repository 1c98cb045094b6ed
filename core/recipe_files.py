"""From the file of a recipe, and the options given for it, to a stage class and its config."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from core.config import StageConfig, replace_aliases, resolve_names
from core.errors import ConfigError, as_config_error
from core.files import file_digest

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
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, base_class)
        and value.__module__ == spec.name
    ]
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
) -> tuple[Any, dict[str, Any]]:
    """(stage class, options by field name) of options from several sources, of which later ones
    win.

    A recipe such as `rl` chooses another stage by one of the options: its `resolve` takes that one
    out. Raises ConfigError for an unknown option, or one that a source has under two names.
    """
    given: dict[str, Any] = {}
    for options in sources:
        # Per source: an alias in one and the name in another are not a mistake, the later one wins.
        given |= replace_aliases(get_config_class(stage_class), options)
    stage_class, given = stage_class.resolve(given)
    return stage_class, resolve_names(get_config_class(stage_class), given)


def is_default(config_class: Any, option: str, value) -> bool:
    """Whether a value, which may be text, is the default. Raises ConfigError for an invalid one."""
    name = config_class.aliases.get(option, option)
    given = config_class(**{name: value})
    return getattr(given, name) == getattr(config_class(), name)


def find_links(config: StageConfig) -> dict[str, str]:
    """{option: stage} of the options that are written as stage:NAME."""
    return {
        option: value.removeprefix(LINK)
        for option, value in vars(config).items()
        if isinstance(value, str) and value.startswith(LINK)
    }
