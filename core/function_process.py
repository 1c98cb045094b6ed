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

from core import function_server
from core.errors import as_config_error
from core.runtime import logger

ROOT = str(Path(__file__).parents[1])
START_SECONDS = 300  # a function's file may import torch on a slow disk
# Not run as a script or by -m: the first would put core/ on the path, where statistics.py hides the
# standard library's, the second would need another working directory than the user's.
SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    f"from {function_server.__name__} import serve; serve(*sys.argv[2:])"
)


class Subprocess:
    """`path/to/file.py:function`, called in a process of its own.

    The process is killed when a call takes more than `timeout` seconds: verifiers hang on answers
    that nobody expected. Arguments and results travel as JSON. A call raises TimeoutError, or
    RuntimeError with the function's own error; the next call starts a new process."""

    def __init__(self, spec: str, timeout: float):
        self.spec = spec
        self.timeout = timeout
        self.process: Any = None  # a Popen while it runs
        self.reader = ThreadPoolExecutor(1)  # reads a line, so that the caller can stop waiting

    def __call__(self, /, *args, **kwargs) -> Any:  # `/`: a column of the data may be named self
        self.start()
        self.process.stdin.write(json.dumps([args, kwargs], default=str) + "\n")
        self.process.stdin.flush()
        return self.read(self.timeout)

    def start(self) -> None:
        """Start the process unless it runs; raises ConfigError if the file or the function does not
        exist."""
        if self.process is not None:
            return
        path, _, name = self.spec.rpartition(":")
        # A session of its own: Ctrl-C in the terminal is for the trainer alone, which stops this
        # process.
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, ROOT, os.path.expanduser(path), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        with as_config_error(f"{self.spec} cannot be called"):
            self.read(START_SECONDS)

    def read(self, timeout: float) -> Any:
        """The next result of the process; kills it if there is none within `timeout` seconds."""
        try:
            line = self.reader.submit(self.process.stdout.readline).result(timeout)
        except FutureTimeout:
            self.stop()
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        # An empty line is the end of the stream.
        if not line:
            self.stop()
            raise RuntimeError("the process died")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def verdict(self, text: str, **columns) -> Any:
        """What the function returns for one text; None, with a warning, if it fails or takes too
        long."""
        try:
            verdicts = self([None], [text], **columns)
            return verdicts[0]
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%r cannot be compared: %s", text[-80:], error)
            return None

    def stop(self) -> None:
        """End the process; the next call starts another."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None
