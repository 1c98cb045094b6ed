"""Functions called in a separate process, which is killed if they take too long."""

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
ANSWER_SECONDS = 5.0  # to compare one answer, which takes milliseconds unless it hangs
# Not run as a script, which would put core/ on the path, where statistics.py shadows the standard
# library's; nor with -m, which would need a working directory other than the user's.
SERVE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    f"from {function_server.__name__} import serve; serve(*sys.argv[2:])"
)


class ProcessDied(RuntimeError):
    """The process of a function has ended without an answer."""


class Subprocess:
    """`path/to/file.py:function`, called in a separate process.

    The process is killed if a call takes more than `timeout` seconds: verifiers hang on unexpected
    answers. Arguments and results are sent as JSON; core/reward_calls.py passes them to the
    function. A call raises TimeoutError, or RuntimeError with the function's own error; the next
    call starts a new process if this one has ended."""

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
            # It was killed between calls, perhaps for lack of memory: retry in a new process.
            return self.request("call", self.timeout, prompts, completions, columns)

    def missing_arguments(self, prompt: list, columns: dict[str, Any]) -> list[str]:
        """The function's parameters for which a row with these columns has no value."""
        lists = {name: [value] for name, value in columns.items()}
        return self.request("missing", START_SECONDS, [prompt], [""], lists)

    def request(self, method: str, timeout: float, *arguments) -> Any:
        """Call a method of the process (core/function_server.py) and return its result."""
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
        # In a session of its own, so that Ctrl-C in the terminal reaches only the trainer, which
        # then stops this process.
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
        # "" means the end of the stream.
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
        """The function's result for one text; None, with a warning, if it fails or times out."""
        try:
            verdicts = self([None], [text], **columns)
            return verdicts[0]
        except (TimeoutError, RuntimeError) as error:
            logger.warning("%r cannot be compared: %s", text[-80:], error)
            return None

    def stop(self) -> None:
        """Kill the process and its children; the next call starts a new one."""
        if self.process is None:
            return
        # The process leads its session, and so its process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.process = None


class AnswerChecker(Subprocess):
    """A built-in verifier that compares answers one at a time: an answer that takes more than
    `timeout` seconds has no verdict, without affecting the rest of the batch."""

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
