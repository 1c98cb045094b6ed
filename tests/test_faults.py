"""A four-stage chain with faults at every write, rename, flush and step: see faults.py.

FAULTS=200 python -m pytest tests/test_faults.py    # more of them, in about half an hour
"""

import json
import os
import subprocess
import sys

from conftest import ROOT
from faults import EXPECTED_STATUS
from test_resume import pipeline  # noqa: F401 (a fixture)

FAULTS = int(os.environ.get("FAULTS", 20))


def test_after_any_fault_the_same_command_ends_with_the_same_weights(pipeline, tmp_path):  # noqa: F811
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/faults.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, pipeline(), str(tmp_path / "runs"), str(FAULTS)],
        capture_output=True,
        text=True,
        env=environment,
    )
    undisturbed, *trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert undisturbed["status"] == 0, done.stderr + undisturbed["printed"]
    assert undisturbed["moments"] > 200
    assert len(trials) == FAULTS, done.stderr
    for trial in trials:
        assert trial["status"] in EXPECTED_STATUS[trial["kind"]], trial
        assert trial["status_again"] == 0, trial
        assert trial["is_equal"], trial
        assert trial["lost"] == [], trial
