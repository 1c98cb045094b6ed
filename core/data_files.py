"""Read files as records: one row each, or what is wrong with it and where it is.

    read_text           bytes, perhaps compressed  ->  text, the name of its encoding
    read_json_text      JSON, or JSON lines        ->  records
    read_csv_text       a table with a header      ->  records, the name of its delimiter

An unreadable row becomes a record with a `problem`; it never stops the others. If it is unclear
where rows end, as with an unclosed quote, ConfigError is raised with the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import ConfigError

FILE_TYPES = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
# Other common files, and how to convert them to one of FILE_TYPES.
SPREADSHEET = "save the sheet as CSV UTF-8"
ARROW = (
    "give the folder that save_to_disk wrote, or convert it: "
    "datasets.Dataset.from_file(path).to_parquet('rows.parquet')"
)
LINES_OF_TEXT = 'write one JSON object per line to a .jsonl file: {"text": "..."}'
PICKLE = "reading it could run code; save it as .jsonl or .parquet where you made it"
ARCHIVE = "unpack it first; the only compressed files read are .gz"
REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), SPREADSHEET),
    **dict.fromkeys((".arrow", ".feather"), ARROW),
    **dict.fromkeys((".txt", ".md"), LINES_OF_TEXT),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz", ".joblib"), PICKLE),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".bz2", ".xz", ".7z"), ARCHIVE),
}

# In a folder with several files, these names are not for training: test.jsonl, dev/a.csv.
EVALUATION_NAME = re.compile(
    r"(^|[\W_])(test|testing|valid|validation|val|dev|eval|evaluation)([\W_]|$)", re.IGNORECASE
)

BROKEN_JSON = "broken JSON"
NO_OBJECT = "that are not a JSON object"
KEY_TWICE = "with a repeated key"
BROKEN_CHARACTER = "with a broken character"
NOT_UTF8 = "with bytes that are not UTF-8"
TOO_MANY_CELLS = "with more cells than the header; quote texts that contain the delimiter"
BROKEN_QUOTES = "with a quote that is not closed, or not doubled inside a cell"


class Record(NamedTuple):
    """A row of a file, or what is wrong with it."""

    row: dict | None
    number: int  # of the line or row in its file, from 1
    unit: str = "row"  # or "line"
    file: str = ""  # name of the file, if there are several
    problem: str = ""  # completes "3 rows ..."

    @property
    def place(self) -> str:
        of_file = f" of {self.file}" if self.file else ""
        return f"{self.unit} {self.number}{of_file}"


# -- finding files ---------------------------------------------------------------------------------


def file_suffix(file: Path) -> str:
    """The suffix in lower case, ignoring .gz: .jsonl for rows.JSONL.gz."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def file_type(file: Path) -> str | None:
    """json, csv or parquet; None for any other file. .parquet.gz is not a type: Parquet is
    compressed inside."""
    known = FILE_TYPES.get(file_suffix(file))
    if known == "parquet" and file.suffix.lower() == ".gz":
        return None
    return known


def check_file_type(path: str, file: Path) -> None:
    """Raise ConfigError, with the remedy, for a file of unknown type."""
    if file_type(file):
        return
    suffix = file.suffix.lower()
    types = f"{', '.join(FILE_TYPES)}, or one of the first five followed by .gz"
    remedy = REMEDIES.get(suffix, f"expected a file of type {types}")
    kind = f"{suffix} files cannot be read here; " if suffix in REMEDIES else ""
    raise ConfigError(f"data {path}: {kind}{remedy}")


def find_data_files(path: str, local: Path) -> tuple[list[Path], list[Path]]:
    """(training files, evaluation files, by their names); both empty for a hub name.

    Raises ConfigError for a folder with only evaluation files, or only unreadable files.
    """
    if local.is_file():
        return [local], []

    files, others = [], []
    for file in sorted(local.rglob("[!.]*")):
        folders = file.relative_to(local).parts
        is_hidden = any(part.startswith(".") for part in folders)  # such as .ipynb_checkpoints
        is_description = file.stem.startswith("dataset_info")
        if is_hidden or is_description or not file.is_file():
            continue
        if file_type(file):
            files.append(file)
        elif file.suffix.lower() in REMEDIES and file.stem.lower() != "readme":
            others.append(file)
    if others and not files:
        check_file_type(str(others[0]), others[0])
    # The name of a single file does not matter: it may be the only data there is.
    if len(files) < 2:
        return files, []

    training_files, evaluation_files = [], []
    for file in files:
        is_evaluation = EVALUATION_NAME.search(str(file.relative_to(local)))
        (evaluation_files if is_evaluation else training_files).append(file)
    if not training_files:
        raise ConfigError(
            f"data {path}: judging by their names, none of its files is for training; give one"
            " of them"
        )
    return training_files, evaluation_files


def common_file_type(path: str, files: Sequence[Path]) -> str | None:
    """The type of all files, None without files. Raises ConfigError for several types."""
    types = sorted({str(file_type(file)) for file in files})
    if len(types) > 1:
        raise ConfigError(
            f"data {path} has files of several types ({', '.join(types)}); keep one of them"
        )
    return types[0] if types else None


def read_records(file: Path) -> tuple[list[Record], str]:
    """(records, how the file is written, such as "semicolon-separated, Windows-1252") of a JSON or
    CSV file. Raises ConfigError if it is unclear what its rows are."""
    text, encoding = read_text(file)
    if file_type(file) == "csv":
        records, delimiter = read_csv_text(text)
        return records, f"{delimiter}-separated, {encoding}"
    records = read_json_text(text)
    return records, "" if encoding == "UTF-8" else encoding


# -- bytes to text ---------------------------------------------------------------------------------


def read_text(file: Path) -> tuple[str, str]:
    """(text, name of the encoding): UTF-8, UTF-16 with a byte order mark, or Windows-1252.

    In UTF-8 with a few broken bytes, these become lone surrogates, so that rows with them can be
    left out. Raises ConfigError for any other encoding.
    """
    is_compressed = file.suffix.lower() == ".gz"
    data = gzip.decompress(file.read_bytes()) if is_compressed else file.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16"), "UTF-16"
    if data.count(0) > len(data) / 10:
        raise ConfigError("it is not UTF-8 text; save it as UTF-8")

    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    broken_bytes = len(re.findall("[\udc80-\udcff]", text))
    if not broken_bytes:
        return text, "UTF-8"
    # Umlauts in Windows-1252 are hardly ever valid UTF-8, while those in UTF-8 always are. A file
    # cut off inside its only non-ASCII character has broken bytes only at its end.
    valid_characters = len(re.findall("[^\x00-\x7f\udc80-\udcff]", text))
    is_cut = broken_bytes <= 3 and text[:-broken_bytes].isascii()
    if valid_characters > broken_bytes or is_cut:
        return text, "UTF-8"
    try:
        return data.decode("cp1252"), "Windows-1252"
    except UnicodeDecodeError:
        raise ConfigError("its text is neither UTF-8 nor Windows-1252; save it as UTF-8") from None


def has_broken_bytes(text: str) -> bool:
    return bool(re.search("[\udc80-\udcff]", text))


# -- JSON ------------------------------------------------------------------------------------------


def read_json_text(text: str) -> list[Record]:
    """The records in JSON lines, a list, an object around one list, or a single object.

    Raises ConfigError, with the line, for broken JSON over several lines.
    """
    lines = text.split("\n" if "\n" in text else "\r")
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        return []

    # If the first line is complete JSON, the file is JSON lines.
    _, first_line = numbered[0]
    document_error = None
    if len(numbered) == 1 or read_json_line(first_line, 1).problem == BROKEN_JSON:
        try:
            return records_of_document(parse_json(text), may_be_broken=may_be_broken(text))
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            document_error = error

    # A list with one row per line has its brackets on separate lines.
    rows = [(number, line) for number, line in numbered if line.strip() not in ("[", "]")]
    records = [read_json_line(line, number) for number, line in rows]
    if document_error and all(record.problem for record in records):
        raise ConfigError(f"{BROKEN_JSON}: {document_error}")
    return records


def read_json_line(line: str, number: int) -> Record:
    """The record in one line of JSON, which may end in a comma."""
    try:
        value = parse_json(line.rstrip().removesuffix(","))
    except DuplicateKeyError:
        return Record(None, number, "line", problem=KEY_TWICE)
    except ValueError:
        problem = NOT_UTF8 if has_broken_bytes(line) else BROKEN_JSON
        return Record(None, number, "line", problem=problem)
    return check_record(Record(value, number, "line"), may_be_broken(line))


class DuplicateKeyError(ValueError):
    """An object has a key twice, so it is unclear which value is meant."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=missing_value, object_pairs_hook=unique_keys)
    except RecursionError:
        raise ValueError("too many nested brackets") from None


def missing_value(constant: str) -> None:
    """None for NaN and Infinity: pandas writes NaN for a missing text."""
    return None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise DuplicateKeyError(f"the key {counts.most_common(1)[0][0]!r} appears twice")
    return values


def may_be_broken(text: str) -> bool:
    """Whether a JSON text may have half a character, escaped as in \\ud83d, or a broken byte."""
    return bool(re.search(r"\\u[dD][89a-fA-F]", text)) or has_broken_bytes(text)


def check_record(record: Record, may_be_broken: bool) -> Record:
    """The record, with a problem if its row is not an object, or has half a character."""
    if not isinstance(record.row, dict):
        return record._replace(row=None, problem=NO_OBJECT)
    if may_be_broken:
        text = json.dumps(record.row, ensure_ascii=False)
        if has_broken_bytes(text):
            return record._replace(row=None, problem=NOT_UTF8)
        if re.search("[\ud800-\udfff]", text):
            return record._replace(row=None, problem=BROKEN_CHARACTER)
    return record


def records_of_document(document: Any, may_be_broken: bool) -> list[Record]:
    """The records of a list of rows, of an object around such a list, or of a single row."""
    rows = document
    if isinstance(document, dict):
        rows = rows_of_object(document)
    if not isinstance(rows, list):
        rows = [rows]
    records = []
    for number, row in enumerate(rows, start=1):
        records.append(check_record(Record(row, number), may_be_broken))
    return records


def rows_of_object(document: dict) -> list:
    """The rows in an object: its one list of rows, as in {"data": [...]}, its values if they are
    rows, or the object itself as the only row.

    Raises ConfigError for several lists, and for an object of columns.
    """
    names = [name for name, value in document.items() if is_list_of_rows(value)]
    if len(names) > 1:
        raise ConfigError(
            f"it holds several lists of rows ({', '.join(names)}); save one of them as a file of "
            "its own"
        )
    if names:
        return document[names[0]]
    # pandas writes a table by columns: {"question": {"0": "3 pm?", "1": ...}, "answer": ...}
    values = list(document.values())
    are_mappings = all(isinstance(value, dict) and "0" in value for value in values)
    are_lists = all(isinstance(value, list) for value in values)
    are_texts = are_lists and all(isinstance(text, str) for text in itertools.chain(*values))
    if values and (are_mappings or are_texts):
        raise ConfigError(
            "it holds columns, not rows; write it with pandas: "
            "to_json('rows.jsonl', orient='records', lines=True)"
        )
    # Databases write rows by key: {"c17": {"question": "3 pm?", "answer": ...}, "c18": ...}
    if len(values) > 1 and is_list_of_rows(values):
        return values
    return [document]


def is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of objects that are neither messages nor functions."""
    if not isinstance(value, list) or not value:
        return False
    parts = ("role", "from", "function", "parameters")
    for entry in value:
        if not isinstance(entry, dict) or any(part in entry for part in parts):
            return False
    return True


# -- CSV -------------------------------------------------------------------------------------------

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
SNIFFED_ROWS = 200


def read_csv_text(text: str) -> tuple[list[Record], str]:
    """(records, name of the delimiter) of a table with a header; all values are texts, and missing
    cells are None.

    Raises ConfigError for ambiguous column names, and for quotes that make it unclear where cells
    end.
    """
    # An answer may be longer than the default of 128 KB.
    csv.field_size_limit(2**31 - 1)
    # Excel may write a first line sep=;.
    declared = re.match(r'\s*"?sep=([,;\t|])"?[ ,;\t]*(\r\n|\r|\n)', text, re.IGNORECASE)
    start = declared.end() if declared else 0
    delimiter = declared.group(1) if declared else find_delimiter(text)

    lines = io.StringIO(text[start:], newline="").readlines()
    first_line = len(io.StringIO(text[:start], newline="").readlines()) + 1
    cells_of_rows = split_cells(lines, delimiter, first_line)
    header: list[str] = []
    records = []
    for number, cells in cells_of_rows:
        if not header:
            header = name_columns(cells or [])
            continue
        records.append(record_of_cells(header, cells, number))
    drop_unnamed_columns(records)
    return records, DELIMITERS[delimiter]


def find_delimiter(text: str) -> str:
    """The delimiter that splits the header, and most rows into the same number of cells; a comma if
    none splits the header, which then names a single column."""
    best_score = (0.0, 0)
    best = ","
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = list(itertools.islice(filter(None, reader), SNIFFED_ROWS))
        width = len(rows[0]) if rows else 0
        if width < 2:
            continue
        share_of_this_width = sum(len(row) == width for row in rows) / len(rows)
        if (share_of_this_width, width) > best_score:
            best_score = (share_of_this_width, width)
            best = delimiter
    return best


def split_cells(
    lines: Sequence[str], delimiter: str, first_line: int
) -> Iterator[tuple[int, list[str] | None]]:
    """Yield (line, cells) of each row that is not blank; the cells are None if the row's quotes are
    broken. Raises ConfigError if it is unclear where such a row ends."""
    # A header like `question, answer` shows that the blank is not part of a cell.
    header = next(filter(str.strip, lines), "")
    is_spaced = header.count(f"{delimiter} ") == header.count(delimiter) > 0
    reader = csv.reader(iter(lines), delimiter=delimiter, skipinitialspace=is_spaced, strict=True)
    width = 0
    while True:
        begin = reader.line_num
        number = begin + first_line
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            check_end_of_row(lines[begin : reader.line_num], delimiter, width, number, str(error))
            yield number, None
            continue
        if any(cell.strip() for cell in cells):
            width = width or len(cells)
            yield number, cells


def check_end_of_row(
    lines: Sequence[str], delimiter: str, width: int, number: int, error: str
) -> None:
    """Raise ConfigError if a row with broken quotes, which begins on line `number`, may not end on
    the last of `lines`."""
    if "end of data" in error:
        # With whole rows inside it, the quote was opened by mistake. Else the file was cut off.
        if any(line.count(delimiter) >= max(1, width - 1) for line in lines[1:]):
            raise ConfigError(f"line {number}: a quote is not closed; close it")
        return
    text = "".join(lines)
    if text.count('"') % 2 or text.count(delimiter) < width - 1:
        raise ConfigError(
            f"line {number}: a quoted cell continues after its closing quote; double the quotes "
            'inside a cell, as in "He said ""hi"""'
        )


def name_columns(cells: Sequence[str]) -> list[str]:
    """The names of the columns. Unnamed ones are named by position, because pandas leaves the name
    of its index empty. Repeated names are numbered, because issue trackers export a column Comment
    for each comment. Raises ConfigError if numbered names still repeat."""
    names = [cell.strip() or f"column {place}" for place, cell in enumerate(cells, start=1)]
    counts = Counter(names)
    numbers: Counter[str] = Counter()
    numbered = []
    for name in names:
        numbers[name] += 1
        numbered.append(f"{name} {numbers[name]}" if counts[name] > 1 else name)
    if len(set(numbered)) < len(numbered):
        raise ConfigError(f"several columns have the same name: {', '.join(names)}")
    return numbered


def record_of_cells(header: Sequence[str], cells: list[str] | None, number: int) -> Record:
    """The record of a row's cells; missing cells at the end are None."""
    if cells is None:
        return Record(None, number, "line", problem=BROKEN_QUOTES)
    # Spreadsheets pad all lines with delimiters to the longest one.
    if any(cell.strip() for cell in cells[len(header) :]):
        return Record(None, number, "line", problem=TOO_MANY_CELLS)
    row = dict(itertools.zip_longest(header, cells[: len(header)]))
    if has_broken_bytes("".join(cells)):
        return Record(None, number, "line", problem=NOT_UTF8)
    return Record(row, number, "line")


def drop_unnamed_columns(records: Sequence[Record]) -> None:
    """Remove columns with neither a name nor any text."""
    rows = [record.row for record in records if record.row is not None]
    for name in list(rows[0]) if rows else []:
        is_unnamed = re.fullmatch(r"column \d+", name)
        if is_unnamed and not any(row[name] for row in rows):
            for row in rows:
                del row[name]
