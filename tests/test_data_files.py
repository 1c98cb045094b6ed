"""core/data_files.py: files of all kinds become records, and unreadable rows are reported."""

import gzip
import json
import time

import pytest

import core.data
from core.data_files import BROKEN_QUOTES, read_csv_text, read_json_text, read_records
from core.errors import ConfigError

ROW = {"question": "Wie groß?", "answer": "4,5 cm"}


def read(path):
    return core.data.load_dataset_from_path(str(path))


def rows_of(records):
    return [record.row for record in records if not record.problem]


def problems_of(records):
    return [(record.place, record.problem) for record in records if record.problem]


# -- CSV -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter, name", [(",", "comma"), (";", "semicolon"), ("\t", "tab")])
@pytest.mark.parametrize(
    "encoding, shown",
    [
        ("utf-8", "UTF-8"),
        ("utf-8-sig", "UTF-8"),
        ("utf-16", "UTF-16"),
        ("cp1252", "Windows-1252"),
    ],
)
def test_delimiter_and_encoding_are_found(tmp_path, delimiter, name, encoding, shown):
    lines = [["question", "answer"], ["Wie groß?", '"4,5 cm"'], ["ß", '"a\r\nb"']]
    path = tmp_path / "rows.csv"
    path.write_bytes("\r\n".join(map(delimiter.join, lines)).encode(encoding))
    records, written = read_records(path)
    assert rows_of(records)[0] == ROW and rows_of(records)[1]["answer"] == "a\r\nb"
    assert written == f"{name}-separated, {shown}" and len(records) == 2


def test_the_first_line_of_excel_and_its_empty_cells_are_no_rows():
    text = "sep=;\r\nfrage;antwort;\r\na;b;\r\n;;\r\n\r\nc;d\r\n"
    records, delimiter = read_csv_text(text)
    assert rows_of(records) == [{"frage": "a", "antwort": "b"}, {"frage": "c", "antwort": "d"}]
    assert delimiter == "semicolon" and [record.number for record in records] == [3, 6]


def test_an_index_without_a_name_keeps_its_place():
    records, _ = read_csv_text(",question,answer\n0,a,b\n1,c,d\n")
    assert rows_of(records)[1] == {"column 1": "1", "question": "c", "answer": "d"}


def test_columns_of_one_name_are_numbered():
    records, _ = read_csv_text("Summary,Comment,Comment\na,b,\n")
    assert rows_of(records) == [{"Summary": "a", "Comment 1": "b", "Comment 2": ""}]
    with pytest.raises(ConfigError, match="several columns have the same name: a, a, a 2"):
        read_csv_text("a,a,a 2\n1,2,3\n")


def test_a_single_column_needs_no_delimiter():
    records, _ = read_csv_text('text\nHello; you|all\n"a, b"\n')
    assert rows_of(records) == [{"text": "Hello; you|all"}, {"text": "a, b"}]


def test_blanks_behind_delimiters_are_no_text_where_the_header_has_them():
    text = 'question, answer\n"a, b", "c, d"\ne,  f\n'
    records, _ = read_csv_text(text)
    assert rows_of(records) == [
        {"question": "a, b", "answer": "c, d"},
        {"question": "e", "answer": "f"},
    ]
    records, _ = read_csv_text(text.replace("question, ", "question,").replace('"', ""))
    assert rows_of(records) == [{"question": "e", "answer": "  f"}]


def test_a_row_with_too_many_cells_is_named_by_its_line():
    text = 'question,answer\n"a\n\na",b\nHello, you,there\nc\nd,e,,\n'
    records, _ = read_csv_text(text)
    assert rows_of(records) == [
        {"question": "a\n\na", "answer": "b"},
        {"question": "c", "answer": None},
        {"question": "d", "answer": "e"},
    ]
    ((place, problem),) = problems_of(records)
    assert place == "line 5" and problem.startswith("with more cells than the header")


def test_quotes_that_leave_open_where_cells_end_are_refused():
    with pytest.raises(ConfigError, match='line 3: a quoted cell continues .* ""hi""'):
        read_csv_text('q,a\n1,2\n"He said "hi" to me\nthen, left",b\nc,d\n')
    with pytest.raises(ConfigError, match="line 2: a quote is not closed"):
        read_csv_text('q,a\n"1,2\n3,4\n5,6\n')
    records, _ = read_csv_text('q,a\n1,2\n3,"half a sen')
    assert rows_of(records) == [{"q": "1", "a": "2"}]
    assert problems_of(records) == [("line 3", BROKEN_QUOTES)]


def test_a_row_whose_quotes_pair_up_stops_no_other():
    text = 'q,a\n1,2\n"He said "hi" to me","b"\n"c\nc","d"\n'
    records, _ = read_csv_text(text)
    assert rows_of(records) == [{"q": "1", "a": "2"}, {"q": "c\nc", "a": "d"}]
    assert problems_of(records) == [("line 3", BROKEN_QUOTES)]


# -- JSON ------------------------------------------------------------------------------------------

PAIR = [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": 2}',
        '{"a": 1},\r\n{"a": 2},\r\n',
        '{"a": 1}\r{"a": 2}\r',
        "[\n" + '{"a": 1},\n{"a": 2}\n]',
        json.dumps(PAIR, indent=2),
        json.dumps({"rows": PAIR, "version": 3, "tags": ["x"]}),
        json.dumps({"version": 3, "examples": PAIR}, indent=1),
        json.dumps({"c17": PAIR[0], "c18": PAIR[1]}),
    ],
)
def test_json_in_all_its_forms_gives_the_same_rows(text):
    assert rows_of(read_json_text(text)) == PAIR


def test_an_object_of_messages_is_a_row():
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tools = {"tools": [{"name": "f", "parameters": {}}], **chat}
    for row in (chat, tools, {"question": "a", "answer": "b"}):
        for indent in (None, 2):
            assert rows_of(read_json_text(json.dumps(row, indent=indent))) == [row]


@pytest.mark.parametrize(
    "document, words",
    [
        ({"train": PAIR, "test": PAIR}, r"several lists of rows \(train, test\)"),
        ({"q": {"0": "a", "1": "b"}, "r": {"0": "c", "1": "d"}}, "columns, not rows.*orient="),
        ({"q": ["a", "b"], "r": ["c", "d"]}, "columns, not rows"),
    ],
)
def test_an_object_that_leaves_open_what_its_rows_are_is_refused(document, words):
    with pytest.raises(ConfigError, match=words):
        read_json_text(json.dumps(document))


def test_each_bad_line_is_named_and_stops_no_other():
    good = '{"a": "\\ud83d\\ude00 8", "n": 123456789012345678901234567890}'
    bad = {
        2: ('{"a": "\\ud83d"}', "with a broken character"),
        4: ('{"a": 1', "broken JSON"),
        5: ("[1, 2]", "that are not a JSON object"),
        6: ('{"a": 1, "a": 2}', "with a repeated key"),
        8: ("[" * 100_000, "broken JSON"),
        9: ('{"a": "\udce4"}', "with bytes that are not UTF-8"),
    }
    lines = [bad[number][0] if number in bad else good for number in range(1, 12)]
    lines[2] = " "
    records = read_json_text("\n".join(lines))
    assert rows_of(records) == [json.loads(good)] * 4
    assert problems_of(records) == [(f"line {n}", problem) for n, (_, problem) in bad.items()]


def test_bad_rows_are_counted_with_their_places_and_most_of_them_refuse_the_file(tmp_path, caplog):
    lines = [json.dumps({"a": n}) for n in range(12)]
    for number in (3, 5, 7, 9):
        lines[number - 1] = "{"
    lines.append('{"a": "cut he')
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    assert [row["a"] for row in read(path)] == [0, 1, 3, 5, 7, 9, 10, 11]
    assert "5 of 13 rows left out: 5 broken JSON (lines 3, 5, 7, ...)" in caplog.text
    path.write_text("\n".join(lines[:3] + ["{"] * 3))
    with pytest.raises(ConfigError, match=r"2 usable rows \(4 broken JSON \(lines 3, 4, 5"):
        read(path)


def test_a_list_with_a_row_a_line_loses_only_the_broken_one():
    records = read_json_text('[\n{"a": 1},\n{"a": 2,\n{"a": 3}\n]')
    assert rows_of(records) == [{"a": 1}, {"a": 3}]
    assert problems_of(records) == [("line 3", "broken JSON")]


def test_a_character_that_is_cut_at_the_end_or_broken_does_not_change_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "x"}\n{"a": "\xe2\x82')
    assert read(path) == [{"a": "x"}]
    umlauts = '{"a": "äöü"}\n'.encode()
    path.write_bytes(umlauts + b'{"a": "\xe4"}\n' + umlauts)
    assert read(path) == [{"a": "äöü"}] * 2


def test_blank_lines_cost_no_time():
    text = '{"a": 1}' + "\n" * 1_000_000 + '{"a": 2}\n'
    began = time.perf_counter()
    assert rows_of(read_json_text(text)) == PAIR
    assert rows_of(read_csv_text("a,b\n" + "\n" * 1_000_000 + "1,2\n")[0]) == [{"a": "1", "b": "2"}]
    assert time.perf_counter() - began < 10


# -- files and folders -----------------------------------------------------------------------------


def test_suffixes_in_capitals_and_compressed_files(tmp_path):
    line = json.dumps(ROW, ensure_ascii=False) + "\n"
    table = "question\tanswer\nWie groß?\t4,5 cm\n"
    for name, text in {
        "a.JSONL": line,
        "b.ndjson": line,
        "c.Json": f"[{line}]",
        "d.tsv": table,
        "e.jsonl.gz": line,
        "f.JSON.GZ": line,
        "g.csv.gz": table,
    }.items():
        path = tmp_path / name
        opener = gzip.open if name.lower().endswith(".gz") else open
        with opener(path, "wb") as file:
            file.write(text.encode())
        assert read(path) == [ROW], name


def test_a_folder_mixes_capitals_and_names_the_file_of_a_bad_row(tmp_path, caplog):
    line = json.dumps(ROW) + "\n"
    (tmp_path / "A.JSONL").write_text(line)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "c.ndjson").write_text("{\n" + line)
    (tmp_path / "TEST.JSONL").write_text(line)
    assert read(tmp_path) == [ROW] * 3
    assert "not for training: TEST.JSONL" in caplog.text
    assert "1 broken JSON (line 1 of c.ndjson)" in caplog.text


@pytest.mark.parametrize(
    "name, words",
    [
        ("rows.xlsx", "save the sheet as CSV UTF-8"),
        ("rows.arrow", "give the folder that save_to_disk wrote"),
        ("rows.txt", 'one JSON object per line to a .jsonl file: {"text"'),
        ("rows.PKL", "reading it could run code"),
        ("rows.zip", "unpack it first"),
        ("rows.parquet.gz", "expected a file of type .json"),
        ("rows.dat", "expected a file of type .json"),
    ],
)
def test_other_files_are_refused_with_the_way_out(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / name)
    if ".parquet" not in name and ".dat" not in name:
        with pytest.raises(ConfigError, match=words):
            read(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("q,a\nä,b\n".encode("utf-16-le"))
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        read(path)
    path.write_bytes(b"q,a\n\x81\x8d,b\n")
    with pytest.raises(ConfigError, match="neither UTF-8 nor Windows-1252"):
        read(path)
    for missing in ("gone.tsv", "gone.JSONL", "gone.xlsx", "gone.csv.gz"):
        with pytest.raises(ConfigError, match="no such file or folder$"):
            read(tmp_path / missing)
