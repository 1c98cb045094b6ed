"""core/files.py: files that are written line by line, and atomically."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import core.files
import core.run_log


def test_a_line_is_ended_by_a_line_feed_alone(tmp_path):
    rows = [{"step": n, "text": "a\u2028b\x85c"} for n in (1, 2, 3)]
    path = tmp_path / "samples.jsonl"
    assert core.files.rows_from_main_process(path, lambda: rows) == rows
    with open(path, "a") as file:
        file.write('{"step": 1, "te')
    assert core.run_log.count_lines(tmp_path) == {"metrics.jsonl": 0, "samples.jsonl": 3}
    core.run_log.truncate_logs(tmp_path, {"samples.jsonl": 2})
    assert [json.loads(line) for line in path.read_text().split("\n")[:-1]] == rows[:2]
    core.run_log.truncate_logs(tmp_path, {})
    assert path.read_text() == (tmp_path / "metrics.jsonl").read_text() == ""


BUILDER = """
import sys, time
from pathlib import Path
from core.files import cached_folder

source, log = map(Path, sys.argv[1:])

def build(folder):
    with open(log, "a") as file:
        file.write("built\\n")
    time.sleep(1)
    (folder / "result").write_text("whole")

folder = cached_folder("converting", [source], build)
assert (folder / "result").read_text() == "whole"
print(folder)
"""


def test_two_programs_build_a_cached_folder_once(tmp_path):
    source, log = tmp_path / "model.gguf", tmp_path / "log"
    source.write_text("weights")
    environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILDER, str(source), str(log)]
    programs = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = [program.communicate()[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0]
    assert folders[0] == folders[1] and log.read_text() == "built\n"


def test_numbers_of_other_libraries_stay_numbers(tmp_path):
    values = {
        "count": np.int64(3),
        "mean": torch.tensor(0.5),
        "many": np.arange(2),
        "where": tmp_path,
    }
    core.files.write_jsonl(tmp_path / "a.jsonl", [values])
    assert core.files.read_jsonl(tmp_path / "a.jsonl") == [
        {"count": 3, "mean": 0.5, "many": "[0 1]", "where": str(tmp_path)}
    ]


def test_what_is_half_written_replaces_nothing(tmp_path):
    """Neither while it is written nor where the writing fails: the older file stays whole."""
    file, folder = tmp_path / "a.json", tmp_path / "folder"
    core.files.write_json(file, "old")
    with core.files.atomic_folder(folder) as aside:
        core.files.write_json(aside / "a.json", "old")

    def check():
        assert json.loads(file.read_text()) == "old"
        assert json.loads((folder / "a.json").read_text()) == "old"
        assert [path.name for path in folder.iterdir()] == ["a.json"]

    with pytest.raises(ZeroDivisionError), core.files.atomic_writer(file) as writer:
        writer.write("new")
        writer.flush()
        check()
        raise ZeroDivisionError
    check()
    with pytest.raises(ZeroDivisionError), core.files.atomic_folder(folder) as aside:
        core.files.write_json(aside / "b.json", "new")
        check()
        raise ZeroDivisionError
    check()
    core.files.write_json(file, "new")
    assert json.loads(file.read_text()) == "new"
    # A folder that is there is not replaced: there may be files of others in it.
    with pytest.raises(OSError), core.files.atomic_folder(folder) as aside:
        core.files.write_json(aside / "b.json", "new")
    assert [path.name for path in folder.iterdir()] == ["a.json"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
