"""core/data.py, core/data_sources.py, core/data_stream.py: data sets become training rows."""

import json
from collections import Counter

import datasets
import dpo
import grpo
import pytest
import sft

import common
import core.data
import core.data_stream
from core.data_sources import split_paths
from core.errors import ConfigError
from core.fingerprints import identify_named_files
from core.other_names import translate

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
        ('{"a": 1}\n{"a": \n\n {"b', r"1 usable rows \(2 broken JSON \(lines 2, 4\)\)"),
        ('{"a": \n\n1', "broken JSON: Expecting ',' delimiter: line 3 column 2"),
        ("[1, 2]", r"no usable rows \(2 that are not a JSON object \(rows 1, 2\)\)"),
        ("", "has no rows"),
        ("\udce4", "broken JSON: Expecting value: line 1 column 1"),
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


def test_a_stage_of_ones_own_reads_data_by_the_names_of_older_versions(tmp_path):
    path = write(tmp_path, "a.jsonl", questions("a", 40))
    rows = common.load_dataset_from_path(dataset_name_or_path=path, dataset_config_name=None)
    assert rows == questions("a", 40)
    training, evaluation = common.split_dataset(rows, 0.1)
    assert len(evaluation) == 4 and sorted(map(str, rows)) == sorted(
        map(str, training + evaluation)
    )
    assert (training, evaluation) == core.data.split_dataset(rows, 0.1, seed=42)


# -- the split -------------------------------------------------------------------------------------


def test_prompts_that_are_the_same_to_a_template_stay_on_one_side():
    rows = []
    for number in range(30):
        for blanks in ("", " ", "\n"):
            messages = [{"role": "user", "content": f"{blanks}What is {number}?{blanks}"}]
            rows.append([*messages, {"role": "assistant", "content": f"{number}{blanks}"}])
    training, evaluation = core.data.split_dataset(rows, 0.3, seed=0)
    prompts = [{row[0]["content"].strip() for row in side} for side in (training, evaluation)]
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_rows_without_an_answer_are_dropped_before_the_split(tmp_path, caplog):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "user", "content": "a"}]}
    silent = {"messages": [*bad["messages"], good["messages"][1] | {"weight": 0}]}
    rows, _ = load(write(tmp_path, "a.jsonl", [good, bad, good, silent, good]))
    assert len(rows) == 3
    assert "2 of 5 rows left out: 2 without an answer (lines 2, 4)" in caplog.text


# -- several data sets -----------------------------------------------------------------------------


def write(tmp_path, name, rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(data, config_class=sft.SFTConfig, stage_class=sft.SFTStage, **options):
    """(training rows, evaluation rows) of a stage on `data`."""
    given = {"model_name_or_path": "m", config_class.aliases["data"]: data, "validation_split": 0}
    config = config_class(**given | options)
    config.validate()
    return stage_class(config).load_data()


def questions(name, count):
    return [{"question": f"{name} {number}?", "answer": name} for number in range(count)]


def test_weights_repeat_training_rows(tmp_path):
    first = write(tmp_path, "a.jsonl", questions("a", 20))
    second = write(
        tmp_path,
        "b.jsonl",
        [{"q": f"b {n}?", "r": "b", "context": "c"} for n in range(20)],
    )
    third = write(
        tmp_path, "c.jsonl", [{"prompt": f"c {n}?", "completion": "c"} for n in range(20)]
    )
    data = [
        {"path": first, "weight": 2},
        {"path": second, "weight": 0.5, "columns": "question=q,answer=r,context=null"},
        third,
    ]
    training, evaluation = load(data, validation_split=0.2)
    assert Counter(row[1]["content"] for row in evaluation).total() == 12
    held_out = {row[0]["content"] for row in evaluation}
    counts = Counter(row[0]["content"] for row in training)
    assert not held_out & set(counts)
    by_source = Counter()
    for prompt, count in counts.items():
        name = prompt[0]
        by_source[name] += count
        assert count == {"a": 2, "b": 1, "c": 1}[name]
    rows_left = {name: 20 - sum(text[0] == name for text in held_out) for name in "abc"}
    assert by_source["a"] == 2 * rows_left["a"] and by_source["c"] == rows_left["c"]
    assert by_source["b"] == round(rows_left["b"] / 2)
    assert load(data, validation_split=0.2) == (training, evaluation)
    assert load(data, validation_split=0.2, seed=1)[0] != training


@pytest.mark.parametrize("as_text", [False, True])
def test_data_sets_with_weights_are_listed_in_yaml(tmp_path, as_text):
    paths = [write(tmp_path, f"{n}.jsonl", questions(str(n), 4)) for n in range(2)]
    entries = [{"path": paths[0], "weight": 2}, paths[1]]
    file = tmp_path / "options.yaml"
    options = {"model": "m", "data": json.dumps(entries) if as_text else entries}
    file.write_text(json.dumps({**options, "validation_split": 0}))
    stage, _ = common.build_stage(sft.SFTStage, [f"--config={file}"])
    assert len(stage.load_data()[0]) == 12


@pytest.mark.parametrize(
    "given, columns",
    [
        ({"dataset_text_field": "body"}, {"text": "body"}),
        ({"dataset_text_field": "text"}, {}),
        ({"dataset_text_field": None}, {}),
    ],
)
def test_the_name_of_the_text_column_in_trl(tmp_path, given, columns):
    names, problems, _ = translate(sft.SFTConfig, given)
    assert names.get("columns", {}) == columns and not problems
    name = columns.get("text", "text")
    path = write(tmp_path, "a.jsonl", [{name: "a", "more": "b"}])
    assert load(path, **names)[0] == ["a"]
    path = write(tmp_path, "b.jsonl", [{name: "a", **questions("a", 1)[0]}])
    assert isinstance(load(path, **names)[0][0], str if columns else list)


def test_paths_may_stand_in_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "a.jsonl", questions("a", 2))
    write(tmp_path, "b,c.jsonl", questions("b", 2))
    assert len(load("b,c.jsonl")[0]) == 2
    assert split_paths("a.jsonl, b,c.jsonl") == ["a.jsonl", "b", "c.jsonl"]
    assert len(load("[a.jsonl, {path: 'b,c.jsonl', weight: 3}]")[0]) == 8
    write(tmp_path, "d.jsonl", questions("d", 2))
    assert len(load("a.jsonl,d.jsonl")[0]) == 4
    (tmp_path / "a.jsonl,d.jsonl").write_text("")
    assert split_paths("a.jsonl,d.jsonl") == ["a.jsonl,d.jsonl"]


def test_a_prompt_of_two_data_sets_stays_on_one_side(tmp_path):
    rows = questions("a", 10)
    paths = [write(tmp_path, f"{n}.jsonl", rows[n:]) for n in range(3)]
    training, evaluation = load(paths, validation_split=0.5)
    sides = [{row[0]["content"] for row in side} for side in (training, evaluation)]
    assert all(sides) and not sides[0] & sides[1]


def test_columns_for_rewards_are_shared_by_data_sets(tmp_path):
    first = write(tmp_path, "a.jsonl", [{"question": "a", "answer": "1", "level": 2}])
    second = write(tmp_path, "b.jsonl", [{"prompt": "b", "answer": "2"}])
    rows, _ = load([first, second], grpo.GRPOConfig, grpo.GRPOStage, reward="numeric")
    columns = sorted((row["columns"] for row in rows), key=str)
    assert columns == [{"answer": "1", "level": 2}, {"answer": "2", "level": None}]


def test_rows_of_different_kinds_are_not_mixed(tmp_path):
    chats = write(tmp_path, "a.jsonl", questions("a", 2))
    texts = write(tmp_path, "b.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="b.jsonl: its rows are of a different kind"):
        load([chats, texts])
    pairs = write(tmp_path, "c.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    single = write(tmp_path, "d.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    with pytest.raises(ConfigError, match="d.jsonl: its rows are of a different kind"):
        load([pairs, single], dpo.DPOConfig, dpo.DPOStage)


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"path": "a", "wieght": 2}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"path": "a", "weight": 0}, "weight=0 is not a number above 0"),
        ({"path": "a", "weight": "2"}, "weight=2 is not a number above 0"),
        ({"weight": 2}, "an entry has no path"),
        ({"path": "a", "format": "alpacca"}, "dataset_format=alpacca is unknown"),
        ({"path": "a", "columns": "{a"}, "data a: columns: not valid YAML"),
        ({"path": "a", "columns": ["b"]}, "columns must be a mapping"),
    ],
)
def test_an_entry_that_says_nothing_is_refused(entry, words):
    config = sft.SFTConfig(model_name_or_path="m", dataset_name_or_path=[entry])
    with pytest.raises(ConfigError, match=words):
        config.validate()


def test_the_fingerprint_sees_every_file(tmp_path):
    paths = [write(tmp_path, f"{n}.jsonl", questions(str(n), 1)) for n in range(2)]
    for value in (paths, [{"path": path, "weight": 2.0} for path in paths], ",".join(paths)):
        assert set(identify_named_files({"dataset_name_or_path": value})) == set(paths)


# -- streaming -------------------------------------------------------------------------------------

STREAMING = dict(streaming=True, max_steps=5, per_device_train_batch_size=4)


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "folder"])
def test_a_stream_is_read_as_far_as_the_steps_need(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(core.data_stream, "BUFFER_ROWS", 30)
    monkeypatch.setattr(core.data_stream, "FIRST_ROWS", 10)
    rows = questions("a", 2000)
    if ending == "jsonl":
        path = write(tmp_path, "rows.jsonl", rows)
    elif ending == "parquet":
        path = str(tmp_path / "rows.parquet")
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path = str(tmp_path / "saved")
        datasets.Dataset.from_list(rows).save_to_disk(path)
    training, evaluation = load(path, validation_split=0.1, **STREAMING)
    numbers = [int(row[0]["content"][2:-1]) for row in training]
    assert len(training) == 20 and len(evaluation) == 2 and len(set(numbers)) == 20
    assert [row[0]["content"] for row in evaluation] == ["a 0?", "a 1?"]
    # Out of order, and from no further than the buffer reaches.
    assert numbers != sorted(numbers) and min(numbers) >= 2 and max(numbers) < 52
    assert load(path, validation_split=0.1, **STREAMING) == (training, evaluation)
    assert load(path, validation_split=0.1, seed=1, **STREAMING)[0] != training


def test_a_stream_counts_bad_rows_and_keeps_prompts_apart(tmp_path, caplog):
    rows = [*questions("a", 2), *questions("b", 30), *questions("a", 1)]
    path = write(tmp_path, "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"question": "c?", "answer": ""}\n{"question"')
    training, evaluation = load(path, validation_split=0.1, **STREAMING | {"max_steps": 9})
    assert len(training) == 28 and [row[0]["content"] for row in evaluation][0] == "a 0?"
    held_out = {row[0]["content"] for row in evaluation}
    assert not held_out & {row[0]["content"] for row in training}
    assert "3 of 35 rows left out: 1 with a prompt that is held out; 1 with" in caplog.text
    assert "1 with an empty or missing text (line 34); 1 broken JSON (line 35)" in caplog.text
    assert "has 28 rows to train on, and max_steps=9 takes 36" in caplog.text


def test_a_buffer_of_good_rows_outweighs_the_bad_ones_in_it(tmp_path, caplog):
    rows = questions("a", 300)
    rows[10::10] = [{"question": "b"}] * 29
    path = write(tmp_path, "rows.jsonl", rows)
    training, _ = load(path, **STREAMING | {"max_steps": 1})
    assert len(training) == 4 and "29 of 300 rows left out" in caplog.text


def test_a_stream_of_bad_rows_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(core.data_stream, "FIRST_ROWS", 10)
    path = write(tmp_path, "rows.jsonl", questions("a", 5) + [{"question": "b"}] * 10_000)
    with pytest.raises(ConfigError, match="5 usable rows .11 with an empty or missing text"):
        load(path, **STREAMING)


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("rows.jsonl", {"max_steps": 0}, "streaming=true reads as many rows as max_steps takes"),
        ("rows.csv", {}, "streaming=true reads .jsonl, .ndjson, .parquet files"),
        ("rows.json", {}, "streaming=true reads .jsonl, .ndjson, .parquet files"),
        ("rows.jsonl,rows.csv", {}, "streaming=true reads one data set"),
        ("rows.jsonl", {"packing": True}, "packing=true puts an unknown number"),
        ("gone.jsonl", {}, "no such file"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, monkeypatch, name, options, words):
    monkeypatch.chdir(tmp_path)
    for existing in ("rows.jsonl", "rows.csv", "rows.json"):
        write(tmp_path, existing, questions("a", 3))
    with pytest.raises(ConfigError, match=words):
        load(name, **STREAMING | options)


def test_a_streamed_training_runs_in_one_pass(tmp_path, model_dir):
    path = write(tmp_path, "rows.jsonl", questions("a", 100))
    config = sft.SFTConfig(
        model_name_or_path=model_dir,
        dataset_name_or_path=path,
        output_dir=str(tmp_path / "out"),
        **STREAMING | {"max_steps": 2},
    )
    result = sft.SFTStage(config).execute()
    assert result.success
    record = json.loads((tmp_path / "out/stage.json").read_text())
    assert record["data"]["rows"] == 9
