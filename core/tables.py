"""Data sets as tables: records with column names, from a file, a folder, or the hub."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data_files import (
    REMEDIES,
    Record,
    check_file_type,
    common_file_type,
    file_type,
    find_data_files,
    read_records,
)
from core.errors import ConfigError, as_config_error
from core.hub import hub_is_reachable
from core.runtime import logger


@dataclass
class Table:
    """The records of a data set, all its columns, and the form of its files."""

    records: Iterable[Record]
    columns: list[str]
    length: int
    written: str = ""  # such as "semicolon-separated, Windows-1252"
    padded: frozenset[str] = frozenset()  # columns whose objects all have the same keys, by padding

    def has_values(self, column: str) -> bool:
        """Whether any row has content in the column, by `has_content`."""
        return any(
            record.row is not None and has_content(record.row.get(column))
            for record in self.records
        )


class ArrowRecords:
    """The rows of a `datasets.Dataset` as records, read from disk on demand."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Record]:
        for number, row in enumerate(self.dataset, start=1):
            yield Record(row, number)


def has_content(value: Any) -> bool:
    """Whether a value is a non-empty text, list or object; numbers do not count."""
    if isinstance(value, str):
        return bool(value.strip(" \t\r\n[]{}")) and not value.strip().isdigit()
    return isinstance(value, list | dict) and bool(value)


def read_table(path: str, config_name: str | None = None) -> Table:
    """The data set at `path`, which is one of

    - a file of a type in FILE_TYPES (core/data_files.py), or a folder of files of one type,
    - a folder written by `Dataset.save_to_disk`,
    - the name of a data set on the Hugging Face hub, with `config_name`.

    Raises ConfigError, with the remedy, if there is no such data or it cannot be read.
    """
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    with as_config_error(f"data {path} cannot be read"):
        check_local_path(path, local, config_name)
        training_files, evaluation_files = find_data_files(path, local)
        kind = common_file_type(path, [*training_files, *evaluation_files])
        if (local / "state.json").exists():
            table = table_of_dataset(datasets.load_from_disk(str(local)))
        elif kind in ("json", "csv") and not config_name:
            # Read here, since `datasets` would make dates and numbers of some texts.
            table = table_of_files(path, training_files)
        elif kind == "parquet" and not config_name:
            patterns = [glob.escape(str(file)) for file in training_files]
            dataset = datasets.load_dataset("parquet", data_files=patterns, split="train")
            table = table_of_dataset(dataset)
        elif local.is_dir():
            table = table_of_dataset(datasets.load_dataset(str(local), config_name, split="train"))
        else:
            check_hub_name(path, local)
            table = table_of_dataset(datasets.load_dataset(path, config_name, split="train"))
        warn_of_evaluation_files(path, evaluation_files)
    if not table.length:
        raise ConfigError(f"data {path} has no rows")
    return table


def check_local_path(path: str, local: Path, config_name: str | None) -> None:
    """Raise ConfigError for local data that cannot be one data set."""
    is_single_data_set = local.is_file() or (local / "state.json").exists()
    if config_name and is_single_data_set:
        raise ConfigError(
            f"dataset_config_name={config_name}: data {path} has no configurations; remove it"
        )
    if local.is_file():
        check_file_type(path, local)
    if (local / "dataset_dict.json").exists():
        raise ConfigError(
            f"data {path} holds several data sets; give the folder of one, such as "
            f"{local / 'train'}"
        )


def check_hub_name(path: str, local: Path) -> None:
    """Raise ConfigError if `path` cannot be a data set on the hub, or the hub is unreachable."""
    is_file_name = file_type(local) or local.suffix.lower() in (*REMEDIES, ".gz")
    if is_file_name:
        raise ConfigError(f"data {path}: no such file or folder")
    if not hub_is_reachable("data", path):
        raise ConfigError(
            f"data {path}: no such file or folder here, and the hub cannot be reached"
        )


def warn_of_evaluation_files(path: str, files: Sequence[Path]) -> None:
    """Warn of files in a folder that are not read."""
    if files:
        names = ", ".join(file.name for file in files)
        logger.warning("data %s: not read, since their names are not for training: %s", path, names)


def table_of_files(path: str, files: Sequence[Path]) -> Table:
    """The rows of JSON or CSV files, with the columns of all files; missing values are None.

    Raises ConfigError if it is unclear what the rows of a file are.
    """
    records: list[Record] = []
    written: dict[str, None] = {}  # a set that keeps the order of the files
    for file in files:
        try:
            records_of_file, how = read_records(file)
        except ConfigError as error:
            raise ConfigError(f"data {file} cannot be read: {error}") from None
        if len(files) > 1:
            records_of_file = [record._replace(file=file.name) for record in records_of_file]
        records += records_of_file
        if how:
            written[how] = None

    columns: dict[str, None] = {}
    for record in records:
        if record.row is not None:
            columns.update(dict.fromkeys(record.row))
    complete = [with_columns(record, columns) for record in records]
    return Table(complete, list(columns), len(records), " and ".join(written))


def with_columns(record: Record, columns: Mapping[str, None]) -> Record:
    """The record, with None for columns that its row does not have."""
    if record.row is None or len(record.row) == len(columns):
        return record
    return record._replace(row={**columns, **record.row})


def table_of_dataset(dataset) -> Table:
    """The rows of a `datasets.Dataset`."""
    padded = frozenset(
        name for name, feature in dataset.features.items() if not is_plain_column(feature)
    )
    return Table(ArrowRecords(dataset), dataset.column_names, len(dataset), padded=padded)


def is_plain_column(feature) -> bool:
    """Whether the values of an Arrow column are stored unchanged."""
    import datasets

    return isinstance(feature, datasets.Value | datasets.Json)


def without_padding(value):
    """A value from an Arrow table, without the keys with None that Arrow adds to objects."""
    if isinstance(value, dict):
        return {key: without_padding(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_padding(inner) for inner in value]
    return value
