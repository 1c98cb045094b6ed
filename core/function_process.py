"""Functions called in a process of their own, which is killed when they take too long."""

from __future__ import annotations

import contextlib
import json
import os
import signal
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
ANSWER_SECONDS = 5.0  # to compare one answer, which takes milliseconds unless it takes forever
# Not run as a script or by -m: the first would put core/ on the path, where statistics.py hides the
# standard library's, the second would need another working directory than the user's.
SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    f"from {function_server.__name__} import serve; serve(*sys.argv[2:])"
)


class ProcessDied(RuntimeError):
    """The process of a function has ended without an answer."""


class Subprocess:
    """`path/to/file.py:function`, called in a process of its own.

    The process is killed when a call takes more than `timeout` seconds: verifiers hang on answers
    that nobody expected. Arguments and results travel as JSON; core/reward_calls.py says how the
    function gets them. A call raises TimeoutError, or RuntimeError with the function's own error;
    the next call starts a new process."""

    def __init__(self, spec: str, timeout: float):
        self.spec = spec
        self.timeout = timeout
        self.process: Any = None  # a Popen while it runs
        self.reader = ThreadPoolExecutor(1)  # reads a line, so that the caller can stop waiting

    # `/`: a column of the data may have any of these names
    def __call__(self, prompts: list, completions: list[str], /, **columns) -> Any:
        try:
            return self.request("call", self.timeout, prompts, completions, columns)
        except ProcessDied:
            # Killed between two calls, perhaps for want of memory: a new one gets the same call.
            return self.request("call", self.timeout, prompts, completions, columns)

    def missing_arguments(self, prompt: list, columns: dict[str, Any]) -> list[str]:
        """The parameters of the function that a row with these columns has no value for."""
        lists = {name: [value] for name, value in columns.items()}
        return self.request("missing", START_SECONDS, [prompt], [""], lists)

    def request(self, method: str, timeout: float, *arguments) -> Any:
        """The result of a method of the process (core/function_server.py)."""
        self.start()
        line = json.dumps([method, *arguments], default=str) + "\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.death() from None
        return self.read(timeout)

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
            raise self.death()
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def death(self) -> ProcessDied:
        """The error to raise after the process has died; cleans up after it."""
        process = self.process
        self.stop()
        return ProcessDied(f"the process died (exit code {process.returncode})")

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
        """End the process and what it has started; the next call starts another."""
        if self.process is None:
            return
        # Its session is its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.process = None


class AnswerChecker(Subprocess):
    """A verifier of ours that compares answers, one at a time: one that it does not decide within
    `timeout` seconds has no verdict, and the others of its batch have theirs."""

    def __init__(self, spec: str, timeout: float = ANSWER_SECONDS):
        super().__init__(spec, timeout)
        self.num_slow = 0  # answers without a verdict

    def __call__(self, prompts: list, completions: list[str], /, **columns) -> list:
        verdicts = []
        for n, text in enumerate(completions):
            own_columns = {name: values[n : n + 1] for name, values in columns.items()}
            try:
                verdicts += super().__call__([None], [text], **own_columns)
            except TimeoutError:
                self.num_slow += 1
                logger.warning(
                    "no verdict on %r within %g s (%d so far)",
                    text[-80:],
                    self.timeout,
                    self.num_slow,
                )
                verdicts.append(None)
        return verdicts

    def start(self) -> None:
        if self.process is not None:
            return
        super().start()
        # The first comparison imports SymPy, which may take longer than an answer may.
        self.request("call", START_SECONDS, [None], ["1"], {"answer": ["1"]})
