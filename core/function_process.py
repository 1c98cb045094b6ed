"""Functions called in a process of their own, which is killed when they take too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

from core.errors import as_config_error
from core.runtime import logger


class Subprocess:
    """`path/to/file.py:function`, called in a process of its own, which is killed when a call takes more than `timeout`
    seconds: verifiers hang on answers that nobody thought of. Arguments and results travel as JSON. A call raises
    TimeoutError, or RuntimeError with the function's own words; the next call starts anew."""

    def __init__(self, spec: str, timeout: float):
        self.spec, self.timeout = spec, timeout
        self.process: Any = None  # a Popen while it runs
        self.reader = ThreadPoolExecutor(1)

    def __call__(self, /, *args, **kwargs) -> Any:  # a column may be named self
        self.start()
        self.process.stdin.write(json.dumps([args, kwargs], default=str) + "\n")
        self.process.stdin.flush()
        return self.read(self.timeout)

    def start(self) -> None:
        """Start the process, unless it runs; raises ConfigError if the file or the function is not there."""
        if self.process is None:
            path, _, name = self.spec.rpartition(":")
            code = "import sys; sys.path.insert(0, sys.argv[1]); from core.function_server import serve; serve(*sys.argv[2:])"
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    code,
                    str(Path(__file__).parents[1]),
                    os.path.expanduser(path),
                    name,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            with as_config_error(f"{self.spec} cannot be called"):
                self.read(300)

    def read(self, timeout: float) -> Any:
        try:
            line = self.reader.submit(self.process.stdout.readline).result(timeout)
        except FutureTimeout:
            line = None
        if not line:
            self.stop()
            raise (
                TimeoutError(f"no answer within {timeout:g} s")
                if line is None
                else RuntimeError("the process died")
            )
        if "error" in (answer := json.loads(line)):
            raise RuntimeError(answer["error"])
        return answer["result"]

    def verdict(self, text: str, **columns) -> Any:
        """What the function says of one text; None where it fails or takes too long: some formulas take for ever."""
        try:
            return self([None], [text], **columns)[0]
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%r cannot be compared: %s", text[-80:], error)
            return None

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None
