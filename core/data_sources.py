"""Where the rows of a stage come from: one path, or several with weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from core.errors import ConfigError, unknown_name
from core.yaml_files import parse_yaml


def read_columns(value: Any) -> Any:
    """{name of a format's column: the data's column} from a YAML mapping, or from a=b,c=d."""
    if not isinstance(value, str):
        return value or {}
    if not re.match(r"\s*\w+\s*=", value):
        return parse_yaml(value) or {}
    columns: dict[str, str | None] = {}
    for part in value.split(","):
        name, equals, column = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is not name=column; write {{name: column, ...}}")
        column = column.strip()
        columns[name.strip()] = None if column in ("null", "none", "None") else column
    return columns


def read_data_option(value: Any) -> Any:
    """Parse text such as [a.jsonl, b.jsonl] as a list; return a path unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("[") and not Path(value).exists():
        return parse_yaml(value)
    return value


# A file, a folder or a hub name; or several, separated by commas or in a list, whose entries may be
# {path: ..., weight: 2, columns: {...}, format: ..., config_name: ...}.
DataPath = Annotated[str | list[str | dict[str, Any]], BeforeValidator(read_data_option)]
ColumnNames = Annotated[dict[str, str | None], BeforeValidator(read_columns)]


@dataclass(frozen=True)
class DataSource:
    """One data set that a stage reads."""

    path: str  # file, folder or hub name
    weight: float = 1.0  # how often each training row is used per epoch
    columns: Mapping[str, str | None] = field(default_factory=dict)  # see core/columns.py
    format: str = "auto"
    config_name: str | None = None  # configuration of a hub data set


def split_paths(text: str) -> list[str]:
    """The comma-separated paths in a text; an existing path with a comma in it is not split."""
    if "," not in text or Path(text).expanduser().exists():
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def list_sources(
    value: str | Sequence[str | Mapping[str, Any]],
    columns: Mapping[str, str | None],
    data_format: str,
    config_name: str | None,
) -> list[DataSource]:
    """The sources that a data option names; the other arguments are defaults for its entries.
    Raises ConfigError."""
    entries = split_paths(value) if isinstance(value, str) else value
    sources = []
    for entry in entries:
        options = {"path": entry} if isinstance(entry, str) else dict(entry)
        defaults = {"columns": columns, "format": data_format, "config_name": config_name}
        source = make_source(defaults | options)
        sources.append(source)
    return sources


def make_source(options: Mapping[str, Any]) -> DataSource:
    """The source for an entry {path, weight, columns, format, config_name}; raises ConfigError."""
    known = [option.name for option in fields(DataSource)]
    for name in options:
        if name not in known:
            raise ConfigError(f"data: {unknown_name('key', name, known)}")
    path = options.get("path")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"data: an entry has no path: {dict(options)}")
    weight = options.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise ConfigError(f"data {path}: weight={weight} is not a number above 0")
    try:
        columns = read_columns(options["columns"])
    except ValueError as error:
        raise ConfigError(f"data {path}: columns: {error}") from None
    if not isinstance(columns, Mapping):
        raise ConfigError(f"data {path}: columns must be a mapping, {{name: column, ...}}")
    return DataSource(
        path=path,
        weight=float(weight),
        columns=columns,
        format=options["format"],
        config_name=options["config_name"],
    )
