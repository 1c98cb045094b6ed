"""A log of calls to other models, written line by line: OUT/calls.jsonl has the answers, and
OUT/requests.jsonl the requests sent to servers, so that limits include what a killed run paid."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.runtime import is_main_process, logger


class CallLog:
    """The calls of one role ("teacher", "feedback" or "policy") by all runs in one folder.

    A request is recorded before it is sent. Later it has an answer, or is returned (refused by a
    status, which costs nothing), or stays open: its response was broken or too late, or the run was
    killed meanwhile. An open request counts as a call at the highest possible cost."""

    def __init__(self, config: Any, role: str, charges: bool):
        self.config = config
        self.role = role
        self.charges = charges  # true for a server; a local model costs nothing
        folder = Path(config.output_dir)
        # Every process writes its own files.
        suffix = "" if is_main_process() else f"-{os.environ['RANK']}"
        self.calls_file = folder / f"calls{suffix}.jsonl"
        self.requests_file = folder / f"requests{suffix}.jsonl"
        self.answers: dict[str, dict] = {}  # by key
        self.open: Counter = Counter()  # {key: requests without an answer}
        self.bounds: dict[str, tuple[int, int]] = {}  # {key: maximum tokens (in, out) of a request}
        self.num_calls = 0
        # Integers, so that adding and subtracting is exact.
        self.charged_in = 0
        self.charged_out = 0

    # -- reading -----------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the files of all processes."""
        self.answers = {}
        self.open = Counter()
        self.bounds = {}
        for line in self.read_lines("requests*.jsonl", self.requests_file):
            key = line["key"]
            if line.get("returned"):
                self.open[key] -= 1
            else:
                self.open[key] += 1
                self.bounds[key] = (line["most_tokens_in"], line["most_tokens_out"])
        for line in self.read_lines("calls*.jsonl", self.calls_file):
            key = line.pop("key")
            self.answers[key] = line
            # Older versions recorded only answers.
            if self.open[key] > 0 and not is_refused(line):
                self.open[key] -= 1

        self.num_calls = self.charged_in = self.charged_out = 0
        for key, answer in self.answers.items():
            if not is_refused(answer):
                self.count(1, self.charged_tokens(key, answer))
        for key, requests in self.open.items():
            if requests > 0:
                most_in, most_out = self.bounds[key]
                self.count(requests, (requests * most_in, requests * most_out))

    def read_lines(self, pattern: str, own_file: Path) -> list[dict]:
        """The lines of this role.

        If a crash cut off the last line of our own file, it is removed. In the files of other
        processes it may still be being written."""
        lines = []
        num_damaged = 0
        for file in own_file.parent.glob(pattern):
            content = file.read_bytes()
            end = content.rfind(b"\n") + 1
            if file == own_file and end < len(content):
                os.truncate(file, end)
            for text in content[:end].splitlines():
                try:
                    line = json.loads(text)
                    is_ours = line["role"] == self.role and line["key"]
                except (ValueError, LookupError, TypeError):
                    num_damaged += 1
                    continue
                if is_ours:
                    lines.append(line)
        if num_damaged:
            logger.warning("%s: %d damaged lines are left out", own_file.name, num_damaged)
        return lines

    # -- costs and limits --------------------------------------------------------------------------

    def count(self, calls: int, tokens: tuple[int, int]) -> None:
        """Charge calls and their tokens (in, out)."""
        self.num_calls += calls
        self.charged_in += tokens[0]
        self.charged_out += tokens[1]

    def charged_tokens(self, key: str, answer: Mapping) -> tuple[int, int]:
        """The tokens (in, out) charged for an answer; without usage, the maximum."""
        tokens_in, tokens_out = answer["tokens_in"], answer["tokens_out"]
        if answer.get("usage_missing") and key in self.bounds:
            most_in, most_out = self.bounds[key]
            return max(tokens_in, most_in), max(tokens_out, most_out)
        return tokens_in, tokens_out

    def dollars(self, tokens_in: int, tokens_out: int) -> float:
        if not self.charges:
            return 0.0
        input_cost = tokens_in * self.config.input_price
        output_cost = tokens_out * self.config.output_price
        return (input_cost + output_cost) / 1e6

    @property
    def cost(self) -> float:
        """Cost of all calls, in dollars."""
        return self.dollars(self.charged_in, self.charged_out)

    def reached_limit(self, most_in: int, most_out: int) -> str:
        """The limit that forbids a request with these maximum token counts; "" if there is none."""
        config = self.config
        if config.max_calls and self.num_calls >= config.max_calls:
            return f"max_calls={config.max_calls} is reached"
        total = self.dollars(self.charged_in + most_in, self.charged_out + most_out)
        if config.max_cost and total > config.max_cost:
            next_cost = self.dollars(most_in, most_out)
            return (
                f"max_cost={config.max_cost:g} is reached: {self.cost:.2f} dollars, "
                f"and the next call can cost {next_cost:.2g}"
            )
        return ""

    # -- writing -----------------------------------------------------------------------------------

    def note_sent(self, key: str, most_in: int, most_out: int) -> None:
        """Call this before a request is sent, with the maximum tokens that it can cost."""
        line = {"most_tokens_in": most_in, "most_tokens_out": most_out}
        self.append(self.requests_file, key, line)
        self.open[key] += 1
        self.bounds[key] = (most_in, most_out)
        self.count(1, (most_in, most_out))

    def note_returned(self, key: str) -> None:
        """Call this when a request was not accepted, which costs nothing."""
        self.append(self.requests_file, key, {"returned": True})
        self.close(key)

    def close(self, key: str) -> None:
        """Stop charging an open request."""
        most_in, most_out = self.bounds[key]
        self.open[key] -= 1
        self.count(-1, (-most_in, -most_out))

    def keep(self, key: str, answer: dict) -> None:
        """Record an answer as soon as it has arrived."""
        self.append(self.calls_file, key, answer)
        self.answers[key] = answer
        if is_refused(answer):
            return
        if self.open[key] > 0:
            self.close(key)
        self.count(1, self.charged_tokens(key, answer))

    def append(self, path: Path, key: str, line: Mapping) -> None:
        text = json.dumps({"key": key, "role": self.role, **line}, ensure_ascii=False)
        # Close the file after each line, so that paid answers survive a crash.
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")


def is_refused(answer: Mapping) -> bool:
    """Whether the server refused the question; then it is not sent again."""
    return "refused" in answer
