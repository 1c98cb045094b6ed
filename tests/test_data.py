"""core/data.py: files become rows."""

import json

import datasets
import pytest
import sft

import core.data
from core.errors import ConfigError

READING = {
    "a.csv": (
        "code,said\n019,None\n7,\n",
        [{"code": "019", "said": "None"}, {"code": "7", "said": ""}],
    ),
    "b.jsonl": (
        '{"a": "2024-05-20T10:00:00", "b": 1}\n{"a": "x\u2028y", "c": "z"}\n',
        [{"a": "2024-05-20T10:00:00", "b": 1, "c": None}, {"a": "x\u2028y", "b": None, "c": "z"}],
    ),
    "d.jsonl": ('\n{"a": 1} \r\n\n\t\n{"a": 2}\n \n{"a": 3}', [{"a": 1}, {"a": 2}, {"a": 3}]),
    "c.json": ('\ufeff[{"a": [1, "x"]}, {"a": "t"}]', [{"a": [1, "x"]}, {"a": "t"}]),
}


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize("folder", [False, True])
def test_texts_are_read_as_they_stand(tmp_path, name, folder):
    text, rows = READING[name]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_text(text, encoding="utf-8")
    assert [
        *core.data.load_dataset_from_path(
            str(tmp_path / "data" if folder else tmp_path / "data" / name)
        )
    ] == rows


def test_what_is_not_read_of_a_folder_is_said(tmp_path, caplog):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "latest.jsonl").write_text('{"text": "z"}\n')
    (tmp_path / "dev").mkdir()
    for name in ("my_test.jsonl", "dev/b.jsonl"):
        (tmp_path / name).write_text('{"text": "b"}\n')
    assert [*core.data.load_dataset_from_path(str(tmp_path))] == [{"text": "z"}, {"text": "a"}]
    assert "not for training: b.jsonl, my_test.jsonl" in caplog.text
    (tmp_path / "more.csv").write_text("text\nc\n")
    with pytest.raises(ConfigError, match=r"files of several types \(csv, json\)"):
        core.data.load_dataset_from_path(str(tmp_path))


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": 1}\n{"a": ', "Expecting value: line 2 column"),
        ('\n{"a": 1}\n\n \n{"a": ', "Expecting value: line 5 column"),
        ("[1, 2]", "has to be an object"),
        ("", "has no rows"),
        ("\udce4", "can't decode"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, text, words):
    (tmp_path / "a.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        core.data.load_dataset_from_path(str(tmp_path / "a.jsonl"))


def test_a_configuration_of_a_data_file_is_refused(data):
    with pytest.raises(
        ConfigError, match="dataset_config_name=main: data .* has no configurations"
    ):
        core.data.load_dataset_from_path(data, "main")


CALLS = [
    [{"role": "user", "content": "a", "tools": [{"name": "f"}]}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"y": 2}}}]},
    ],
]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_objects_keep_their_own_keys(tmp_path, ending):
    """Arrow gives each object the keys of all others too, with None: a call would get arguments
    that nobody wrote."""
    path = tmp_path / f"rows.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in CALLS))
    else:
        datasets.Dataset.from_dict({"messages": CALLS}).to_parquet(str(path))
    config = sft.SFTConfig(model_name_or_path="m", dataset_name_or_path=str(path))
    rows, _ = core.data.read_rows(config, lambda row, form: row["messages"])
    assert rows == CALLS
