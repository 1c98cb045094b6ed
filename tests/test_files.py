"""core/files.py: files that are written line by line."""

import json

import core.files
import core.run_log


def test_a_line_is_ended_by_a_line_feed_alone(tmp_path):
    rows = [{"step": n, "text": "a\u2028b\x85c"} for n in (1, 2, 3)]
    assert core.files.rows_from_main_process(tmp_path / "a.jsonl", lambda: rows) == rows
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"step": 1, "te')
    core.run_log.truncate_metrics(tmp_path / "a.jsonl", 2)
    assert [
        json.loads(line) for line in (tmp_path / "a.jsonl").read_text().split("\n")[:-1]
    ] == rows[:2]
