"""Load and split the data sets that the options of a stage name.

load_rows       the data sets of a config  ->  training rows, evaluation rows
read_rows       the same without a split
split_dataset   rows  ->  training rows, evaluation rows

core/data_files.py and core/tables.py read the files, core/columns.py decides what columns mean, and
core/rows.py counts unusable rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from core.columns import NO_OPTIONAL_COLUMNS
from core.config import DataConfig, FitConfig, StageConfig
from core.data_sources import DataSource
from core.data_stream import stream_rows
from core.errors import ConfigError
from core.rows import RowReader, json_key, prompt_key, usable_rows
from core.tables import read_table


def load_dataset_from_path(
    dataset_name_or_path: str, dataset_config_name: str | None = None
) -> list[dict]:
    """The rows of a file, a folder or a hub name (see `read_table`), each with all columns."""
    table = read_table(dataset_name_or_path, dataset_config_name)
    return usable_rows(table.records, dict, f"data {dataset_name_or_path}")


# -- training and evaluation rows --------------------------------------------------------------


def split_dataset(
    rows: Sequence, validation_split: float, seed: int = StageConfig.seed
) -> tuple[list, list]:
    """(training rows, evaluation rows), in an order that depends on `seed`.

    `validation_split` is the fraction of rows held out. Rows that share a prompt stay on one side,
    so that no evaluation prompt was trained on. The fraction is an upper limit, except that at
    least the rows of one prompt are held out.
    """
    training, evaluation = split_indices(rows, validation_split, seed)
    return [rows[index] for index in training], [rows[index] for index in evaluation]


def split_indices(
    rows: Sequence, validation_split: float, seed: int
) -> tuple[list[int], list[int]]:
    """The row indices of both sides of `split_dataset`."""
    groups = list(group_by_prompt(rows).values())
    most_held_out = math.ceil(len(rows) * validation_split)
    if most_held_out:
        smallest_group = min(len(group) for group in groups)
        most_held_out = max(most_held_out, smallest_group)

    # Hold out whole groups in random order, as long as they fit.
    training: list[int] = []
    evaluation: list[int] = []
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randperm(len(groups), generator=generator).tolist():
        group = groups[place]
        fits = len(evaluation) + len(group) <= most_held_out
        (evaluation if fits else training).extend(group)
    return training, evaluation


def group_by_prompt(rows: Sequence) -> dict[str, list[int]]:
    """Row indices grouped by prompt, or by content if all rows have the same prompt."""
    keys = [prompt_key(row) for row in rows]
    # Otherwise rows that all share one prompt, or an empty one, would all be on one side.
    if len(set(keys)) <= 1:
        keys = [json_key(row) for row in rows]
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def repeat_by_weight(training: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """The indices of training rows, repeated by weight: with 2.5 each row comes twice, and a random
    half of these rows, drawn with `seed`, once more."""
    copies = {index: math.floor(weights[index]) for index in training}
    generator = torch.Generator().manual_seed(seed)
    for weight in sorted(set(weights)):
        of_this_weight = [index for index in training if weights[index] == weight]
        num_more = round(len(of_this_weight) * (weight - math.floor(weight)))
        order = torch.randperm(len(of_this_weight), generator=generator).tolist()
        for place in order[:num_more]:
            copies[of_this_weight[place]] += 1
    repeated = []
    for index in training:
        repeated += [index] * copies[index]
    return repeated


# -- one source --------------------------------------------------------------------------------


@dataclass
class SourceRows:
    """The converted rows of a source and the name of its format."""

    rows: list
    format: str


def read_source(
    source: DataSource,
    formats: Mapping[str, Sequence[str]],
    convert: Callable,
    optional: Mapping[str, Sequence[str]] = NO_OPTIONAL_COLUMNS,
    passes_on: bool = False,
    what: str = "",
) -> SourceRows:
    """The rows of a source, converted by `convert(row, format)`; arguments as in `read_rows`."""
    table = read_table(source.path, source.config_name)
    reader = RowReader(source, table, formats, optional, passes_on)
    reader.log(table.length, table.written)

    def convert_row(row: dict):
        return convert(reader.prepare(row), reader.format)

    rows = usable_rows(table.records, convert_row, what or f"data {source.path}")
    return SourceRows(rows, reader.format)


# -- all sources -------------------------------------------------------------------------------


def load_rows(
    config,
    convert: Callable,
    optional: Mapping[str, Sequence[str]] = NO_OPTIONAL_COLUMNS,
    passes_on: bool = False,
) -> tuple[list, list, dict]:
    """(training rows, evaluation rows, lineage): `read_rows`, split by `validation_split`, with
    training rows repeated by the weights of their sources."""
    if isinstance(config, FitConfig) and config.streaming:
        training_rows, evaluation_rows, data_format = stream_rows(config, convert, optional)
        rows = [*training_rows, *evaluation_rows]
        lineage = make_lineage(config.data_sources(), [data_format], rows)
        return training_rows, evaluation_rows, lineage

    rows, weights, lineage = read_weighted_rows(config, convert, optional, passes_on)
    training, evaluation = split_indices(rows, config.validation_split, config.seed)
    if any(weight != 1 for weight in weights):
        training = repeat_by_weight(training, weights, config.seed)
    if not training:
        raise ConfigError(
            f"data {lineage['path']}: validation_split={config.validation_split} leaves no row to "
            "train on"
        )
    return [rows[index] for index in training], [rows[index] for index in evaluation], lineage


def read_rows(
    config: DataConfig,
    convert: Callable,
    optional: Mapping[str, Sequence[str]] = NO_OPTIONAL_COLUMNS,
    passes_on: bool = False,
) -> tuple[list, dict]:
    """(rows, lineage) of the configured data sets, each row converted by `convert(row, format)`.

    `optional` has, by format, the columns that are used besides the required ones. With
    `passes_on`, all others are used too, as arguments of reward functions. The lineage is {"path",
    "format", "rows", "sha256"}, as recorded in stage.json.
    """
    rows, _, lineage = read_weighted_rows(config, convert, optional, passes_on)
    return rows, lineage


def read_weighted_rows(
    config: DataConfig,
    convert: Callable,
    optional: Mapping[str, Sequence[str]],
    passes_on: bool,
) -> tuple[list, list[float], dict]:
    """(rows, their weights, lineage): see `read_rows`."""
    sources = config.data_sources()
    rows: list = []
    weights: list[float] = []
    used_formats: dict[str, None] = {}
    for source in sources:
        what = "data" if len(sources) == 1 else f"data {source.path}"
        part = read_source(source, config.formats, convert, optional, passes_on, what)
        check_same_kind(source, rows, part.rows)
        rows += part.rows
        weights += [source.weight] * len(part.rows)
        used_formats[part.format] = None
    if len(sources) > 1:
        share_columns(rows)
    return rows, weights, make_lineage(sources, used_formats, rows)


def make_lineage(sources: Sequence[DataSource], formats: Iterable[str], rows: list) -> dict:
    """What stage.json records about the data."""
    # The hash lets a later run detect changed data.
    digest = hashlib.sha256(json_key(rows).encode()).hexdigest()
    path = ", ".join(source.path for source in sources)
    return {"path": path, "format": ", ".join(formats), "rows": len(rows), "sha256": digest}


def check_same_kind(source: DataSource, rows: Sequence, more_rows: Sequence) -> None:
    """Raise ConfigError if the rows of a source differ in kind from those before, for example texts
    and conversations, or single answers and pairs."""

    def kind(row) -> Any:
        return set(row) if isinstance(row, dict) else type(row)

    if rows and kind(rows[0]) != kind(more_rows[0]):
        raise ConfigError(
            f"data {source.path}: its rows are of a different kind from those before it, such as "
            "texts beside conversations; train on one kind after the other, in two stages"
        )


def share_columns(rows: Sequence) -> None:
    """Give all rows the same further columns, with None for missing values: a reward function gets
    each column of a batch as one argument."""
    if not isinstance(rows[0], dict) or "columns" not in rows[0]:
        return
    names: dict[str, None] = {}
    for row in rows:
        names.update(dict.fromkeys(row["columns"]))
    for row in rows:
        row["columns"] = {**names, **row["columns"]}
