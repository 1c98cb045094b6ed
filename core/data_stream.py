"""Data sets that do not fit into memory: read as many rows as training needs, in one pass.

The rows go through a shuffle buffer of fixed size, so that memory is bounded by the length of
training. The same seed gives the same rows: a resumed run reads them again.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from core.config import FitConfig
from core.data_files import (
    Record,
    common_file_type,
    file_suffix,
    find_data_files,
    read_json_line,
)
from core.data_sources import DataSource
from core.errors import ConfigError, as_config_error
from core.rows import RowCount, RowReader, convert_rows, prompt_key, report_left_out
from core.runtime import logger
from core.tables import (
    ArrowRecords,
    Table,
    check_hub_name,
    check_local_path,
    table_of_dataset,
    warn_of_evaluation_files,
)

BUFFER_ROWS = 10_000  # size of the shuffle buffer
FIRST_ROWS = 1_000  # rows whose columns decide the format
STREAMED_SUFFIXES = (".jsonl", ".ndjson", ".parquet")


def stream_rows(
    config: FitConfig, convert: Callable, optional: Mapping[str, Sequence[str]]
) -> tuple[list, list, str]:
    """(training rows, evaluation rows, their format) from the first rows of the configured data
    set, each converted by `convert(row, format)`.

    There are as many training rows as `max_steps` takes, drawn from the shuffle buffer. The rows
    before them are held out, a fraction `validation_split` of their number; rows with one of these
    prompts are not trained on. Raises ConfigError for data that cannot be read row by row.
    """
    (source, *others) = config.data_sources()
    if others:
        raise ConfigError("streaming=true reads one data set; join them, or set streaming=false")
    num_training = rows_needed(config)
    num_evaluation = math.ceil(num_training * config.validation_split)

    with as_config_error(f"data {source.path} cannot be read"):
        table = open_stream(source)
        records = iter(table.records)
        first_records = list(itertools.islice(records, FIRST_ROWS))
        reader = read_first_columns(source, table, first_records, config, optional)

        def convert_row(row: dict):
            return convert(reader.prepare(row), reader.format)

        count = RowCount()
        what = f"data {source.path}"
        all_records = itertools.chain(first_records, records)
        checked = stop_where_most_are_left_out(all_records, count, what)
        usable = convert_rows(checked, convert_row, count)
        evaluation = list(itertools.islice(usable, num_evaluation))
        candidates = without_prompts_of(evaluation, usable, count)
        drawn = shuffled(candidates, BUFFER_ROWS, config.seed)
        training = list(itertools.islice(drawn, num_training))

    report_left_out(count, what)
    if not training:
        raise ConfigError(f"{what}: all of its rows are held out; lower validation_split")
    if len(training) < num_training:
        logger.warning(
            "%s has %d rows to train on, and max_steps=%d takes %d: they are repeated",
            what,
            len(training),
            config.max_steps,
            num_training,
        )
    return training, evaluation, reader.format


def rows_needed(config: FitConfig) -> int:
    """The number of rows that `max_steps` steps take, over all processes."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return config.max_steps * rows_per_step * processes


def read_first_columns(
    source: DataSource,
    table: Table,
    first_records: list[Record],
    config: FitConfig,
    optional: Mapping[str, Sequence[str]],
) -> RowReader:
    """The reader for the columns of the first rows; raises ConfigError if there are no rows."""
    if not first_records:
        raise ConfigError(f"data {source.path} has no rows")
    columns = dict.fromkeys(table.columns)
    for record in first_records:
        columns.update(dict.fromkeys(record.row or ()))
    first = Table(first_records, list(columns), len(first_records), padded=table.padded)
    reader = RowReader(source, first, config.formats, optional, passes_on=False)
    reader.log(None, "streamed")
    return reader


def stop_where_most_are_left_out(
    records: Iterable[Record], count: RowCount, what: str
) -> Iterator[Record]:
    """Yield the records; raise ConfigError once most of them have been unusable."""
    for record in records:
        if count.num_left_out > max(FIRST_ROWS, count.num_usable):
            report_left_out(count, what)
        yield record


def without_prompts_of(evaluation: list, rows: Iterable, count: RowCount) -> Iterator:
    """Yield the rows without those that share a prompt with an evaluation row."""
    held_out = {prompt_key(row) for row in evaluation}
    for row in rows:
        if prompt_key(row) in held_out:
            count.num_usable -= 1
            count.leave_out("with a prompt that is held out")
        else:
            yield row


def shuffled(rows: Iterable, size: int, seed: int) -> Iterator:
    """Yield the rows, each drawn from `size` rows held in memory."""
    generator = random.Random(seed)
    buffer: list = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        index = generator.randrange(size)
        yield buffer[index]
        buffer[index] = row
    generator.shuffle(buffer)
    yield from buffer


# -- streams ---------------------------------------------------------------------------------------


def open_stream(source: DataSource) -> Table:
    """The records of a data set, read from its files on demand; `columns` has those known before
    reading a row. Raises ConfigError for files that cannot be read row by row."""
    import datasets

    datasets.disable_progress_bars()
    path, local = source.path, Path(source.path).expanduser()
    check_local_path(path, local, source.config_name)
    if (local / "state.json").exists():
        return table_of_dataset(datasets.load_from_disk(str(local)))  # from the disk, as needed
    files, evaluation_files = find_data_files(path, local)
    kind = common_file_type(path, [*files, *evaluation_files])
    for file in files:
        if file_suffix(file) not in STREAMED_SUFFIXES:
            raise ConfigError(
                f"data {path}: streaming=true reads {', '.join(STREAMED_SUFFIXES)} files and data "
                "sets of the hub; convert it, or set streaming=false"
            )
    warn_of_evaluation_files(path, evaluation_files)
    if kind == "json":
        return Table(JsonLines(files), [], 0)
    if kind == "parquet":
        patterns = [glob.escape(str(file)) for file in files]
        dataset = datasets.load_dataset(
            "parquet", data_files=patterns, split="train", streaming=True
        )
    else:
        check_hub_name(path, local)
        dataset = datasets.load_dataset(path, source.config_name, split="train", streaming=True)
    columns = dataset.column_names or []
    # Which columns are padded is not always known before reading a row.
    return Table(ArrowRecords(dataset), columns, 0, padded=frozenset(columns))


class JsonLines:
    """The records of .jsonl files, one line at a time."""

    def __init__(self, files: Sequence[Path]):
        self.files = files

    def __iter__(self) -> Iterator[Record]:
        for file in self.files:
            name = file.name if len(self.files) > 1 else ""
            for record in records_of_lines(file):
                yield record._replace(file=name)


def records_of_lines(file: Path) -> Iterator[Record]:
    """The records of a .jsonl file, perhaps compressed. Raises ConfigError for UTF-16."""
    is_compressed = file.suffix.lower() == ".gz"
    opener = gzip.open if is_compressed else open
    with opener(file, "rb") as start:
        if start.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ConfigError(
                f"data {file} is UTF-16, but streaming=true reads UTF-8; save it as UTF-8"
            )
    with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield read_json_line(line, number)
