"""From files to rows to splits: read a data set, detect its format, convert and split its rows.

load_dataset_from_path   file, folder or hub name  ->  a datasets.Dataset
detect_format            its column names          ->  "alpaca", "messages", ...
usable_rows              its rows                  ->  converted rows; unusable ones are counted
split_dataset            rows                      ->  training rows, evaluation rows
load_rows                all of it, as the options of a stage say
"""

from __future__ import annotations

import csv
import glob
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from core.config import DataConfig
from core.errors import ConfigError, RowError, as_config_error
from core.hub import hub_is_reachable
from core.runtime import logger

FILE_TYPES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# In a folder of several files, those named like this are not for training: test.jsonl, dev/a.csv.
EVALUATION_NAME = re.compile(
    r"(^|[\W_])(test|testing|valid|validation|val|dev|eval|evaluation)([\W_]|$)"
)

NO_OPTIONAL_COLUMNS: Mapping[str, Sequence[str]] = MappingProxyType({})


# -- files to rows -----------------------------------------------------------------------------


def load_dataset_from_path(path: str, config_name: str | None = None):
    """The `datasets.Dataset` at `path`, which is one of

    - a .json, .jsonl, .csv or .parquet file, or a folder of files of one of these types,
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

        if (local / "state.json").exists():
            dataset = datasets.load_from_disk(str(local))
        else:
            file_type = common_file_type(path, [*training_files, *evaluation_files])
            if file_type in ("json", "csv") and not config_name:
                # Read here, since `datasets` would make dates and numbers of some texts.
                read_file = read_csv_file if file_type == "csv" else read_json_file
                rows: list[dict] = []
                for file in training_files:
                    rows.extend(read_file(file))
                dataset = dataset_from_rows(rows)
            elif file_type == "parquet" and not config_name:
                patterns = [glob.escape(str(file)) for file in training_files]
                dataset = datasets.load_dataset("parquet", data_files=patterns, split="train")
            elif local.is_dir():
                dataset = datasets.load_dataset(str(local), config_name, split="train")
            elif hub_is_reachable("data", path):
                dataset = datasets.load_dataset(path, config_name, split="train")
            else:
                raise ConfigError(
                    f"data {path}: no such file or folder here, and the hub cannot be reached"
                )

        if evaluation_files:
            names = ", ".join(file.name for file in evaluation_files)
            logger.warning("data %s: not read, by name not for training: %s", path, names)
    if not len(dataset):
        raise ConfigError(f"data {path} has no rows")
    return dataset


def check_local_path(path: str, local: Path, config_name: str | None) -> None:
    """Raise ConfigError for local data that cannot be one data set."""
    is_single_data_set = local.is_file() or (local / "state.json").exists()
    if config_name and is_single_data_set:
        raise ConfigError(
            f"dataset_config_name={config_name}: data {path} has no configurations; remove it"
        )
    if local.is_file() and local.suffix not in FILE_TYPES:
        raise ConfigError(f"data {path}: expected a file of type {', '.join(FILE_TYPES)}")
    if (local / "dataset_dict.json").exists():
        raise ConfigError(
            f"data {path} holds several data sets; give the folder of one, such as "
            f"{local / 'train'}"
        )


def find_data_files(path: str, local: Path) -> tuple[list[Path], list[Path]]:
    """(files to train on, files that are for evaluation by their names); none for a hub name.

    Raises ConfigError for a folder of evaluation files alone.
    """
    if local.is_file():
        return [local], []

    files = []
    for file in sorted(local.rglob("[!.]*")):
        folders = file.relative_to(local).parts
        is_hidden = any(part.startswith(".") for part in folders)  # such as .ipynb_checkpoints
        is_description = file.stem.startswith("dataset_info")
        if file.suffix in FILE_TYPES and not is_hidden and not is_description:
            files.append(file)
    # The name of a single file decides nothing: it may be the only data there is.
    if len(files) < 2:
        return files, []

    training_files, evaluation_files = [], []
    for file in files:
        is_evaluation = EVALUATION_NAME.search(str(file.relative_to(local)))
        (evaluation_files if is_evaluation else training_files).append(file)
    if not training_files:
        raise ConfigError(
            f"data {path}: by their names none of its files is for training; give one of them"
        )
    return training_files, evaluation_files


def common_file_type(path: str, files: Sequence[Path]) -> str | None:
    """The type that all files have, None without files. Raises ConfigError for several types."""
    types = sorted({FILE_TYPES[file.suffix] for file in files})
    if len(types) > 1:
        raise ConfigError(
            f"data {path} has files of several types ({', '.join(types)}); keep one of them"
        )
    return types[0] if types else None


def read_csv_file(file: Path) -> list[dict]:
    """The rows of a comma-separated file with a header, all values as text, a missing cell as None.

    Raises ConfigError for a column name that comes twice, and for a row that is longer than the
    header, where pandas would rename the column, or take the first one for an index.
    """
    # An answer may be longer than the default of 128 KB.
    csv.field_size_limit(2**31 - 1)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        from_header = itertools.dropwhile(is_blank, lines)
        table = csv.DictReader(from_header, strict=True)
        rows = list(table)
        column_names = table.fieldnames or []

    for number, row in enumerate(rows, start=1):
        # DictReader puts the cells that have no column under None.
        if None in row:
            raise ConfigError(
                f"data {file}: row {number} has more cells than the header; quote its commas"
            )
    for name, count in Counter(column_names).items():
        if count > 1:
            raise ConfigError(f"data {file}: several columns are named {name}")
    return rows


def is_blank(line: str) -> bool:
    return not line.strip()


def read_json_file(file: Path) -> list[dict]:
    """The rows of a file that is one JSON list, or has one JSON object a line (.jsonl)."""
    text = file.read_text(encoding="utf-8-sig")
    is_list = text.lstrip().startswith("[")
    if not is_list:
        # Put a comma after each line and parse all as one list, so an error names the right line.
        text = "[" + re.sub(r"(?<=\S)(?=\s*\n\s*\S)", ",", text) + "]"
    rows = json.loads(text, parse_constant=missing_value)
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f'data {file}: a row has to be an object, {{"column": value, ...}}')
    return rows


def missing_value(constant: str) -> None:
    """None for NaN and Infinity: pandas writes NaN for a missing text."""
    return None


def dataset_from_rows(rows: Sequence[Mapping]):
    """A `datasets.Dataset` with the columns of all rows; missing values are None."""
    import datasets

    names: dict[str, None] = {}  # a set that keeps the order of the files
    for row in rows:
        names.update(dict.fromkeys(row))
    columns = {}
    for name in names:
        columns[name] = [row.get(name) for row in rows]
    dataset = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")

    # Where integers and decimals are mixed, each keeps its type: 7 would become 7.0 beside 7.5. And
    # each object its own keys: Arrow would give all of them those of the others, with None.
    json_features = {}
    for name, values in columns.items():
        types = {type(value) for value in values}
        if {int, float} <= types or types & {dict, list}:
            json_features[name] = datasets.Json()
    if json_features:
        features = datasets.Features(dataset.features | json_features)
        dataset = datasets.Dataset.from_dict(columns, features)
    return dataset


# -- what the columns mean ---------------------------------------------------------------------


def detect_format(
    columns: Sequence[str], formats: Mapping[str, Sequence[str]], wanted: str = "auto"
) -> str:
    """The name of the one format in `formats` (name -> required columns) that the columns fit.

    A format that requires all columns of another and more is preferred to it. Raises ConfigError
    with the columns and the known formats if none fits, or several do: it never guesses.
    """
    if wanted != "auto":
        if not set(formats[wanted]) <= set(columns):
            raise ConfigError(
                f"dataset_format={wanted} needs {', '.join(formats[wanted])}; "
                f"found {', '.join(columns)}"
            )
        return wanted

    # Every format whose columns are all there, then those that no other one contains.
    fitting = {name: set(needs) for name, needs in formats.items() if set(needs) <= set(columns)}
    candidates = []
    for name, needs in fitting.items():
        has_wider_format = any(needs < other_needs for other_needs in fitting.values())
        if not has_wider_format:
            candidates.append(name)
    if len(candidates) > 1 and "text" in candidates:
        # Beside other columns, `text` is usually the same row once more, already rendered.
        candidates.remove("text")

    if len(candidates) > 1:
        raise ConfigError(
            f"the columns {', '.join(columns)} fit {' and '.join(candidates)}; "
            "choose by dataset_format"
        )
    if not candidates:
        known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in formats.items())
        raise ConfigError(
            f"unknown data format: the columns are {', '.join(columns)}. Known: {known}"
        )
    return candidates[0]


# -- rows that can be used ---------------------------------------------------------------------


def usable_rows(rows: Iterable, convert: Callable, what: str, warn: bool = True) -> list:
    """`[convert(row) for row in rows]`, without the rows for which it raises RowError.

    The reasons are counted, and with `warn` logged as "`what`: 3 of 40 rows left out: ...". Raises
    ConfigError if no row is usable, or fewer than are left out.
    """
    usable = []
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            usable.append(convert(row))
        except RowError as error:
            reasons[str(error)] += 1

    left_out = reasons.total()
    summary = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if len(usable) < max(1, left_out):
        raise ConfigError(f"{what}: {len(usable) or 'no'} usable rows ({summary or 'it is empty'})")
    if left_out and warn:
        total = left_out + len(usable)
        logger.warning("%s: %d of %d rows left out: %s", what, left_out, total, summary)
    return usable


# -- training and evaluation rows --------------------------------------------------------------


def split_dataset(rows: Sequence, validation_split: float, seed: int) -> tuple[list, list]:
    """(training rows, evaluation rows), in an order that `seed` decides.

    `validation_split` is the fraction of rows held out. Rows that share a prompt stay on one side,
    so that no evaluation prompt was trained on; the fraction is met from below, except that at
    least the rows of one prompt are held out.
    """
    groups = list(group_by_prompt(rows).values())
    most_held_out = math.ceil(len(rows) * validation_split)
    if most_held_out:
        smallest_group = min(len(group) for group in groups)
        most_held_out = max(most_held_out, smallest_group)

    # Hold out whole groups in random order, as long as they fit.
    training: list = []
    evaluation: list = []
    generator = torch.Generator().manual_seed(seed)
    for index in torch.randperm(len(groups), generator=generator).tolist():
        group = groups[index]
        fits = len(evaluation) + len(group) <= most_held_out
        (evaluation if fits else training).extend(group)
    return training, evaluation


def group_by_prompt(rows: Sequence) -> dict[str, list]:
    """The rows by what they ask; by their whole content if all of them ask the same."""
    keys = [json_key(prompt_of(row)) for row in rows]
    # Rows that all share one prompt, or begin empty, would otherwise all be on one side.
    if len(set(keys)) <= 1:
        keys = [json_key(row) for row in rows]
    groups: dict[str, list] = {}
    for key, row in zip(keys, rows, strict=True):
        groups.setdefault(key, []).append(row)
    return groups


def prompt_of(row):
    """What a converted row asks: a chat without its end, a prompt, a question, or the whole row."""
    if isinstance(row, list):
        return row[:-1]
    if isinstance(row, dict):
        return row.get("prompt", row.get("question", row))
    return row


def json_key(value) -> str:
    """A text that is the same for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


# -- all of it ---------------------------------------------------------------------------------


def load_rows(
    config,
    convert: Callable,
    optional: Mapping[str, Sequence[str]] | None = NO_OPTIONAL_COLUMNS,
) -> tuple[list, list, dict]:
    """(training rows, evaluation rows, lineage): `read_rows`, split by `validation_split`."""
    rows, lineage = read_rows(config, convert, optional)
    training, evaluation = split_dataset(rows, config.validation_split, config.seed)
    if not training:
        raise ConfigError(
            f"data {lineage['path']}: validation_split={config.validation_split} leaves no row to "
            "train on"
        )
    return training, evaluation, lineage


def read_rows(
    config: DataConfig,
    convert: Callable,
    optional: Mapping[str, Sequence[str]] | None = NO_OPTIONAL_COLUMNS,
) -> tuple[list, dict]:
    """(rows, lineage) of the configured data set, each row as `convert(row, format)` makes it.

    `optional` names, by format, the columns that are used beside the required ones; None uses all.
    The lineage is {"path", "format", "rows", "sha256"}, as stage.json records it.
    """
    path = getattr(config, config.aliases["data"])
    dataset = load_dataset_from_path(path, config.dataset_config_name)
    data_format = detect_format(dataset.column_names, config.formats, config.dataset_format)
    log_columns(path, dataset, data_format, config.formats, optional)

    padded_columns = [
        name
        for name in (*config.formats[data_format], "tools")
        if not is_plain_column(dataset.features.get(name))
    ]

    def convert_row(row):
        cleaned = {name: without_padding(row[name]) for name in padded_columns}
        return convert(row | cleaned, data_format)

    rows = usable_rows(dataset, convert_row, "data")
    # The hash lets a later run see that the data has changed.
    digest = hashlib.sha256(json_key(rows).encode()).hexdigest()
    return rows, {"path": path, "format": data_format, "rows": len(rows), "sha256": digest}


def is_plain_column(feature) -> bool:
    """Whether the values of a column are stored as they were given, or the column is missing."""
    import datasets

    return feature is None or isinstance(feature, datasets.Value | datasets.Json)


def without_padding(value):
    """A value of an Arrow table, whose objects have the keys of all others too, with None: without
    these keys."""
    if isinstance(value, dict):
        return {key: without_padding(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_padding(inner) for inner in value]
    return value


def log_columns(
    path: str,
    dataset,
    data_format: str,
    formats: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None,
) -> None:
    """Log which columns are used; a column that is not used is worth a warning."""
    used = list(dataset.column_names)
    ignored = []
    if optional is not None:
        known = {*formats[data_format], *optional.get(data_format, ())}
        used = [name for name in dataset.column_names if name in known]
        ignored = [name for name in dataset.column_names if name not in known]

    summary = f"data {path}: {data_format}, {len(dataset)} rows: {', '.join(used)}"
    if ignored:
        logger.warning("%s (not used: %s)", summary, ", ".join(ignored))
    else:
        logger.info("%s", summary)
