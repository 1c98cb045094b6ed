"""YAML 1.2, where 2e-4 is a number and `no` a word: read without building objects, and written."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, SafeRepresenter
from ruamel.yaml.error import YAMLError

from core.errors import ConfigError, as_config_error


class Representer(SafeRepresenter):
    """Writes floats so that readers of YAML 1.1, such as PyYAML, take them for numbers too."""

    def represent_float(self, data: float) -> Any:
        node = super().represent_float(data)
        # YAML 1.1 takes 5e-05 for a text, and 5.0e-05 for a number.
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


Representer.add_representer(float, Representer.represent_float)


def make_yaml() -> Any:
    # `safe` builds no objects of other types; only the pure Python reader knows YAML 1.2.
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def describe_yaml_error(error: YAMLError) -> str:
    """What is wrong, without the values around it: they may be secrets."""
    # Errors of the characters have a reason, all others a problem.
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "invalid syntax"
    # The message goes on with both values of a duplicate key, and with the text after * or !.
    return re.split(r" with value | '", problem)[0]


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError naming the line."""
    with as_config_error(f"{path} cannot be read as YAML"):
        try:
            values = make_yaml().load(Path(path))
        except YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = f"{path}, line {mark.line + 1}" if mark else str(path)
            raise ConfigError(f"{place}: {describe_yaml_error(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of the form key: value")
    return values


def parse_yaml(value: Any) -> Any:
    """A value written as YAML text; anything but text is returned as it is. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return make_yaml().load(value)
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {describe_yaml_error(error)}") from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """The text of a YAML file, keys in the order of the mapping."""
    stream = io.StringIO()
    make_yaml().dump(dict(values), stream)
    return stream.getvalue()


def inline_yaml(text: str) -> str:
    """A text as it has to be written inside {...} and [...]; quoted where it is not plain."""
    is_plain = re.fullmatch(r"[^\W\d][\w .-]*(?<! )", text)
    if is_plain and parse_yaml(text) == text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
