"""YAML 1.2, where 2e-4 is a number: mappings from files and texts, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from core.errors import ConfigError, as_config_error


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML 1.2 file, where 2e-4 is a number. Builds no objects. Raises ConfigError
    naming the line."""
    with as_config_error(f"{path} cannot be read as YAML"):
        try:
            values = YAML(typ="safe", pure=True).load(Path(path))
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1
            raise ConfigError(f"{path}, line {line}: {error.problem}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of the form key: value")
    return values
