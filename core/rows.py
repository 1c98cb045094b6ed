"""Rows of a data set: convert them, count unusable ones, identify their prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from core.columns import check_unused, detect_format, known_columns, rename_columns
from core.data_files import Record
from core.data_sources import DataSource
from core.errors import ConfigError, RowError
from core.runtime import logger
from core.tables import Table, without_padding

MAX_PLACES = 3  # rows that a message names for each reason


# -- usable rows -------------------------------------------------------------------------------


@dataclass
class RowCount:
    """The number of usable rows, and the unusable ones by reason."""

    num_usable: int = 0
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> places of the rows

    def leave_out(self, reason: str, place: str = "") -> None:
        self.places.setdefault(reason, []).append(place)

    @property
    def num_left_out(self) -> int:
        return sum(map(len, self.places.values()))

    def summary(self) -> str:
        """The reasons, for example: 2 broken JSON (lines 7, 19); 1 without an answer (line 3)."""
        by_count = sorted(self.places.items(), key=lambda item: -len(item[1]))
        return "; ".join(
            f"{len(places)} {reason}{describe_places(places)}" for reason, places in by_count
        )


def describe_places(places: Sequence[str]) -> str:
    """The places in brackets: (lines 7, 19, 30, ...); "" if none is known."""
    known = [place for place in places if place]
    if not known:
        return ""
    first = known[:MAX_PLACES]
    words = [place.split(" ", 1) for place in first]
    units = {unit for unit, _ in words}
    if len(first) > 1 and len(units) == 1:
        numbers = ", ".join(number for _, number in words)
        shown = f"{units.pop()}s {numbers}"
    else:
        shown = ", ".join(first)
    more = ", ..." if len(known) > MAX_PLACES else ""
    return f" ({shown}{more})"


def usable_rows(rows: Iterable, convert: Callable, what: str, warn: bool = True) -> list:
    """`[convert(row) for row in rows]`, without the rows for which it raises RowError.

    A row may be a Record, which knows its place in a file. The reasons are counted, and with `warn`
    logged as "`what`: 3 of 40 rows left out: ...". Raises ConfigError if no row is usable, or fewer
    than are left out.
    """
    count = RowCount()
    usable = list(convert_rows(rows, convert, count))
    report_left_out(count, what, warn)
    return usable


def convert_rows(rows: Iterable, convert: Callable, count: RowCount) -> Iterator:
    """Yield the converted rows; counts them and those that raise RowError in `count`."""
    for row in rows:
        place, problem = "", ""
        if isinstance(row, Record):
            place, problem, row = row.place, row.problem, row.row
        if problem:
            count.leave_out(problem, place)
            continue
        try:
            converted = convert(row)
        except RowError as error:
            count.leave_out(str(error), place)
            continue
        count.num_usable += 1
        yield converted


def report_left_out(count: RowCount, what: str, warn: bool = True) -> None:
    """Log the rows left out; raises ConfigError if they outnumber the usable ones, or are all."""
    summary = count.summary()
    usable, left_out = count.num_usable, count.num_left_out
    if usable < max(1, left_out):
        raise ConfigError(f"{what}: {usable or 'no'} usable rows ({summary or 'it is empty'})")
    if left_out and warn:
        total = usable + left_out
        logger.warning("%s: %d of %d rows left out: %s", what, left_out, total, summary)


# -- columns to rows ---------------------------------------------------------------------------


class RowReader:
    """Renames the columns of a table's rows to those of its format.

    Raises ConfigError if the meaning of the columns is unclear.
    """

    def __init__(
        self,
        source: DataSource,
        table: Table,
        formats: Mapping[str, Sequence[str]],
        optional: Mapping[str, Sequence[str]],
        passes_on: bool,
    ):
        self.source = source
        self.passes_on = passes_on
        known = known_columns(formats, optional)
        if passes_on:
            known.add("answer")  # read by built-in rewards
        try:
            self.names = rename_columns(table.columns, source.columns, known, passes_on)
            names_in_order = [self.names[column] for column in table.columns]
            self.columns = [name for name in names_in_order if name is not None]
            self.format = detect_format(
                self.columns, formats, source.format, optional, list(source.columns)
            )
        except ConfigError as error:
            raise ConfigError(f"data {source.path}: {error}") from None
        self.renamed = any(name != column for column, name in self.names.items())
        by_name = {name: column for column, name in self.names.items()}

        def has_values(name: str) -> bool:
            return table.has_values(by_name[name])

        self.unused = check_unused(
            source.path, self.columns, self.format, formats, optional, has_values, passes_on
        )
        self.padded = {self.names[column] for column in table.padded} & known
        self.dropped = [column for column, name in self.names.items() if name is None]

    def prepare(self, row: dict) -> dict:
        """The row with the names of its format, without dropped columns."""
        # Rows of a stream may lack columns of the first rows, or have others.
        if len(row) < len(self.names):
            row = {**dict.fromkeys(self.names), **row}
        if self.renamed:
            named = [(self.names.get(column, column), row[column]) for column in row]
            row = {name: value for name, value in named if name is not None}
        if not self.padded:
            return row
        return row | {name: without_padding(row[name]) for name in self.padded if name in row}

    def log(self, length: int | None, written: str) -> None:
        """Log how the data is read, and which columns are not used."""
        ignored = self.dropped if self.passes_on else [*self.unused, *self.dropped]
        used = [name for name in self.columns if self.passes_on or name not in self.unused]
        how = f" ({written})" if written else ""
        size = "" if length is None else f", {length} rows"
        summary = f"data {self.source.path}{how}: {self.format}{size}: {', '.join(used)}"
        if ignored:
            summary += f" (not used: {', '.join(ignored)})"
        log = logger.warning if ignored else logger.info
        log("%s", summary)


# -- prompts of rows ----------------------------------------------------------------------------


def prompt_key(row) -> str:
    """A text that is equal for rows with the same prompt, ignoring white space around texts, which
    chat templates trim."""
    return json_key(stripped(prompt_of(row)))


def stripped(value):
    """The value with all texts in it stripped."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return [stripped(inner) for inner in value]
    if isinstance(value, dict):
        return {key: stripped(inner) for key, inner in value.items()}
    return value


def prompt_of(row):
    """The prompt of a converted row: a chat without its last message, a prompt, a question, or else
    the whole row."""
    if isinstance(row, list):
        return row[:-1]
    if isinstance(row, dict):
        return row.get("prompt", row.get("question", row))
    return row


def json_key(value) -> str:
    """A text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
