"""Read and write YAML 1.2, where 2e-4 is a number and `no` a word, without building objects."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, SafeConstructor, SafeRepresenter
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from core.errors import ConfigError, as_config_error

# Maximum size of a file with its aliases expanded, in characters plus ten for each value. Ten lines
# of aliases of aliases can expand to terabytes.
MAX_EXPANDED_SIZE = 1_000_000
MAX_DEPTH = 100  # of nested values


class Constructor(SafeConstructor):
    """Refuses documents that would be huge or infinite with their aliases expanded."""

    def construct_document(self, node: Node) -> Any:
        has_anchors = bool(self.composer.anchors)
        if has_anchors and expanded_size(node, {}) > MAX_EXPANDED_SIZE:
            raise MarkedYAMLError(
                problem="its aliases (*name) expand to too much; write the values out",
                problem_mark=node.start_mark,
            )
        return super().construct_document(node)


def expanded_size(node: Node, sizes: dict[int, float]) -> float:
    """The size of a node with its aliases expanded. `sizes` caches the sizes of nodes by id."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = math.inf  # for a node that contains itself
    size = 10.0
    if isinstance(node, ScalarNode):
        size += len(node.value)
    else:
        is_mapping = isinstance(node, MappingNode)
        children = itertools.chain(*node.value) if is_mapping else node.value
        size += sum(expanded_size(child, sizes) for child in children)
    sizes[id(node)] = size
    return size


class Representer(SafeRepresenter):
    """Writes floats so that YAML 1.1 readers, such as PyYAML, read them as numbers too."""

    def represent_float(self, data: float) -> Any:
        node = super().represent_float(data)
        # In YAML 1.1, 5e-05 is a text and 5.0e-05 a number.
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


Representer.add_representer(float, Representer.represent_float)


def make_yaml() -> Any:
    # `safe` builds only plain types; only the pure Python reader supports YAML 1.2.
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Constructor = Constructor
    yaml.max_depth = MAX_DEPTH
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    return yaml


def describe_yaml_error(error: YAMLError) -> str:
    """What is wrong, without the values around it, which may be secrets."""
    # Character errors have a `reason`, all others a `problem`.
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "invalid syntax"
    # The message continues with both values of a duplicate key, or with the text after * or !.
    return re.split(r" with value | '|, if necessary", problem)[0]


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
    """Parse YAML text; a value that is not text is returned unchanged. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return make_yaml().load(value)
    except YAMLError as error:
        raise ValueError(f"not valid YAML: {describe_yaml_error(error)}") from None


def dump_yaml(values: Mapping[str, Any]) -> str:
    """A mapping as YAML text, with its keys in order."""
    stream = io.StringIO()
    make_yaml().dump(dict(values), stream)
    return stream.getvalue()


def inline_yaml(text: str) -> str:
    """A text as it must be written inside {...} and [...], quoted unless it is plain."""
    is_plain = re.fullmatch(r"[^\W\d][\w .-]*(?<! )", text)
    if is_plain and parse_yaml(text) == text:
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
