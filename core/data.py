"""Files to rows to splits: reading data sets, detecting their format, counting what cannot be used."""

from __future__ import annotations

import csv
import functools
import glob
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Callable, Iterable, Mapping, Sequence

import torch

from core.config import DataConfig
from core.errors import ConfigError, RowError, as_config_error
from core.hub import hub_is_reachable
from core.runtime import logger

FILE_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_text_file(file: Path) -> list[dict]:
    """The rows of a .json, .jsonl or .csv file, texts as they stand: `datasets` would make dates of some."""
    if file.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)  # an answer may be long
        with open(file, encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(
                itertools.dropwhile(lambda line: not line.strip(), lines), strict=True
            )
            for number, row in enumerate(rows := [*table], 1):
                if None in row:
                    raise ConfigError(
                        f"data {file}: row {number} has more cells than the header; quote its commas"
                    )
            if twice := [name for name, count in Counter(table.fieldnames).items() if count > 1]:
                raise ConfigError(f"data {file}: several columns are named {twice[0]}")
            return rows
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] != "[":  # lines; so joined, an error names the right one
        text = "[" + re.sub(r"(?<=\S)(?=\s*\n\s*\S)", ",", text) + "]"
    rows = json.loads(text, parse_constant=lambda name: None)  # NaN is no text
    if not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f'data {file}: a row has to be an object, {{"column": value, ...}}')
    return rows


def load_dataset_from_path(path: str, config_name: str | None = None, split: str = "train"):
    """A `datasets.Dataset` from a .json, .jsonl, .csv or .parquet file, a folder of such files (or one written by
    `save_to_disk`), or a hub name. Raises ConfigError with the remedy."""
    import datasets

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    with as_config_error(f"data {path} cannot be read"):
        if config_name and (local.is_file() or (local / "state.json").exists()):
            raise ConfigError(
                f"dataset_config_name={config_name}: data {path} has no configurations; remove it"
            )
        if local.is_file() and local.suffix not in FILE_READERS:
            raise ConfigError(f"data {path}: expected a file of type {', '.join(FILE_READERS)}")
        files = (
            [local]
            if local.is_file()
            else sorted(  # without .ipynb_checkpoints and the like
                file
                for file in local.rglob("[!.]*")
                if file.suffix in FILE_READERS
                and not file.stem.startswith("dataset_info")
                and not any(part.startswith(".") for part in file.relative_to(local).parts)
            )
        )
        name = re.compile(
            r"(^|[\W_])(test|testing|valid|validation|val|dev|eval|evaluation)([\W_]|$)"
        )
        later = [
            file for file in files if len(files) > 1 and name.search(str(file.relative_to(local)))
        ]
        if files and len(later) == len(files):
            raise ConfigError(
                f"data {path}: by their names none of its files is for training; give one of them"
            )
        if (local / "dataset_dict.json").exists():
            raise ConfigError(
                f"data {path} holds several data sets; give one's folder, such as {local / 'train'}"
            )
        if (local / "state.json").exists():
            dataset = datasets.load_from_disk(str(local))
        elif len(kinds := {FILE_READERS[file.suffix] for file in files}) > 1:
            raise ConfigError(
                f"data {path} has files of several types ({', '.join(sorted(kinds))}); keep one of them"
            )
        elif files and "parquet" not in kinds and not config_name:
            rows = [row for file in files if file not in later for row in read_text_file(file)]
            names = dict.fromkeys(name for row in rows for name in row)
            columns = {name: [row.get(name) for row in rows] for name in names}
            dataset = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
            mixed = {
                name: datasets.Json()
                for name in names
                if {int, float} <= {*map(type, columns[name])}
            }
            if mixed:  # 7 stays 7 beside 7.5
                dataset = datasets.Dataset.from_dict(
                    columns, datasets.Features(dataset.features | mixed)
                )
        elif files and not config_name and split == "train":
            read = [glob.escape(str(file)) for file in files if file not in later]
            dataset = datasets.load_dataset("parquet", data_files=read, split="train")
        elif local.is_dir() or hub_is_reachable("data", path):
            dataset = datasets.load_dataset(
                str(local) if local.is_dir() else path, config_name, split=split
            )
        else:
            raise ConfigError(
                f"data {path}: no such file or folder here, and the hub cannot be reached"
            )
        if later:
            logger.warning(
                "data %s: not read, by name not for training: %s",
                path,
                ", ".join(f.name for f in later),
            )
    if not len(dataset):
        raise ConfigError(f"data {path} has no rows")
    return dataset


def detect_format(
    columns: Sequence[str], formats: Mapping[str, Sequence[str]], wanted: str = "auto"
) -> str:
    """The name of the one format among `formats` (name -> required columns) whose columns are all there; of several,
    one that contains the others. Raises ConfigError with the columns found and the formats known, never guesses."""
    if wanted != "auto" and not set(formats[wanted]) <= set(columns):
        raise ConfigError(
            f"dataset_format={wanted} needs {', '.join(formats[wanted])}; found {', '.join(columns)}"
        )
    fitting = [
        name
        for name, needs in formats.items()
        if set(needs) <= set(columns) and wanted in ("auto", name)
    ]
    fitting = [a for a in fitting if not any(set(formats[a]) < set(formats[b]) for b in fitting)]
    # A column `text` beside others is the same row once more, already rendered.
    fitting = [name for name in fitting if name != "text"] or fitting
    if len(fitting) > 1:
        raise ConfigError(
            f"the columns {', '.join(columns)} fit {' and '.join(fitting)}; choose by dataset_format"
        )
    if not fitting:
        known = "; ".join(f"{name} ({', '.join(needs)})" for name, needs in formats.items())
        raise ConfigError(
            f"unknown data format: the columns are {', '.join(columns)}. Known: {known}"
        )
    return fitting[0]


def usable_rows(rows: Iterable, convert: Callable, what: str, say: bool = True) -> list:
    """`[convert(row) for row in rows]` without the rows for which it raises RowError: those are counted, and the
    counts said if `say`. Raises ConfigError when they are the majority, or nothing is there."""
    kept, reasons = [], Counter()
    for row in rows:
        try:
            kept.append(convert(row))
        except RowError as error:
            reasons[str(error)] += 1
    said = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if len(kept) < max(1, reasons.total()):
        raise ConfigError(f"{what}: {len(kept) or 'no'} usable rows ({said or 'it is empty'})")
    if reasons and say:
        logger.warning(
            "%s: %d of %d rows left out: %s",
            what,
            reasons.total(),
            reasons.total() + len(kept),
            said,
        )
    return kept


def split_dataset(rows: Sequence, validation_split: float, seed: int) -> tuple[list, list]:
    """(training rows, evaluation rows), shuffled by `seed`; `validation_split` is the share held out, at most, and at
    least the rows of one prompt. Those that ask the same (a "prompt", a "question", a conversation up to its end) stay
    on one side; if all do, equal rows."""
    dump, groups = functools.partial(json.dumps, sort_keys=True, default=str), {}
    asked = lambda row: (
        row.get("prompt", row.get("question", row)) if isinstance(row, dict) else row
    )
    keys = [dump(row[:-1] if isinstance(row, list) else asked(row)) for row in rows]
    for key, row in zip(keys if len({*keys}) > 1 else map(dump, rows), rows):
        groups.setdefault(key, []).append(row)
    members = list(groups.values())
    training, evaluation, wanted = [], [], math.ceil(len(rows) * validation_split)
    wanted = wanted and max(wanted, min(map(len, members)))
    for group in torch.randperm(
        len(members), generator=torch.Generator().manual_seed(seed)
    ).tolist():
        fits = len(evaluation) + len(members[group]) <= wanted
        (evaluation if fits else training).extend(members[group])
    return training, evaluation


def read_rows(
    config: DataConfig, convert: Callable, optional: Mapping[str, Sequence[str]] | None = {}
) -> tuple:
    """(rows, what was found) of the configured data set, each as `convert(row, format)` makes it. Columns are reported;
    besides the format's own, only its `optional` ones are used, or all if that is None."""
    dataset = load_dataset_from_path(
        path := getattr(config, config.aliases["data"]), config.dataset_config_name
    )
    form = detect_format(dataset.column_names, config.formats, config.dataset_format)
    known = (
        dataset.column_names
        if optional is None
        else [*config.formats[form], *optional.get(form, ())]
    )
    used, ignored = (
        ", ".join(c for c in dataset.column_names if (c in known) is use) for use in (True, False)
    )
    note, say = (f" (not used: {ignored})", logger.warning) if ignored else ("", logger.info)
    say("data %s: %s, %d rows: %s%s", path, form, len(dataset), used, note)
    rows = usable_rows(dataset, lambda row: convert(row, form), "data")
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()
    return rows, {"path": path, "format": form, "rows": len(rows), "sha256": digest}


def load_rows(
    config, convert: Callable, optional: Mapping[str, Sequence[str]] | None = {}
) -> tuple:
    """(training rows, evaluation rows, what was found): `read_rows`, split as `validation_split` says."""
    rows, found = read_rows(config, convert, optional)
    training, evaluation = split_dataset(rows, config.validation_split, config.seed)
    if not training:
        raise ConfigError(
            f"data {found['path']}: validation_split={config.validation_split} leaves no row to train on"
        )
    return training, evaluation, found
