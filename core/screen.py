"""Progress on the screen.

On a terminal and in a notebook, the line of a step replaces the previous one. In a file or a pipe,
lines of steps are written at most every few seconds; metrics.jsonl has all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
CLEAR_LINE = "\r\x1b[2K"
# Text of a model may contain control characters, which move the cursor, clear or recolour the
# screen, and marks that reverse the order of letters. Tabs and line feeds are harmless.
CONTROL_CODES = (
    *range(0x00, 0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)
CONTROL_SIGNS = {code: chr(code).encode("unicode_escape").decode() for code in CONTROL_CODES}


def show_controls(text: str) -> str:
    """The text with control characters escaped, such as \\x1b."""
    return text.translate(CONTROL_SIGNS)


def shorten(text: str, length: int = 160) -> str:
    """The text on one line, cut to `length` characters."""
    one_line = " ".join(text.split())
    return one_line[:length]


class SafeFormatter(logging.Formatter):
    """Escapes control characters, so that logged text cannot control a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return show_controls(super().format(record))


class ScreenHandler(logging.StreamHandler):
    """Records of steps have a true attribute `is_step`; `stays` marks those that are always shown,
    such as the last one and evaluations."""

    has_open_line = False  # whether the cursor is after a line that will be replaced
    last_shown = -math.inf  # time.monotonic() of the last line of a step

    @property
    def is_terminal(self) -> bool:
        return self.stream.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        passes = getattr(record, "is_step", False) and not getattr(record, "stays", False)
        # A step that passes is replaced by the next one, or may be skipped.
        if passes and self.is_terminal:
            self.show_line(self.format(record))
        elif not passes:
            self.clear_line()
            super().emit(record)
        elif time.monotonic() - self.last_shown >= SECONDS_BETWEEN_LINES:
            self.last_shown = time.monotonic()
            super().emit(record)

    def show_line(self, text: str) -> None:
        """Show a line until the next one replaces it."""
        # A wrapped line could not be cleared completely.
        width = shutil.get_terminal_size().columns
        self.stream.write(CLEAR_LINE + text[: width - 1])
        self.flush()
        self.has_open_line = True

    def close(self) -> None:
        # Start a new line for what comes next, such as a shell prompt.
        if self.has_open_line:
            self.stream.write("\n")
            self.has_open_line = False
        super().close()

    def clear_line(self) -> None:
        if self.has_open_line:
            self.stream.write(CLEAR_LINE)
            self.has_open_line = False


class NotebookHandler(logging.StreamHandler):
    """The screen in a notebook. After any other line, lines of steps start a new output."""

    step_output: Any = None  # IPython's handle of the output that shows the last step
    last_shown = -math.inf  # time.monotonic() of the last update
    waiting: logging.LogRecord | None = None  # the newest step, if not shown yet

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "is_step", False):
            if self.waiting is not None:
                self.show(self.waiting)
            self.step_output = None
            super().emit(record)
            return
        # Each update is a message to the browser, and a step may take only a millisecond.
        is_due = time.monotonic() - self.last_shown >= 1.0
        if is_due or getattr(record, "stays", False):
            self.show(record)
        else:
            self.waiting = record

    def show(self, record: logging.LogRecord) -> None:
        from IPython.display import display

        self.last_shown, self.waiting = time.monotonic(), None
        content = {"text/plain": self.format(record)}
        if self.step_output is None:
            self.step_output = display(content, raw=True, display_id=True)
        else:
            self.step_output.update(content, raw=True)


def in_notebook() -> bool:
    """Whether this process is the kernel of a Jupyter or Colab notebook."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


def new_screen_handler() -> logging.Handler:
    handler = NotebookHandler(sys.stdout) if in_notebook() else ScreenHandler(sys.stdout)
    handler.setFormatter(SafeFormatter())
    return handler


# -- progress without log records ------------------------------------------------------------------


def find_terminal() -> ScreenHandler | None:
    """The handler that shows this project's log on a terminal, if there is one."""
    for handler in logging.getLogger("recipes").handlers:
        if isinstance(handler, ScreenHandler) and handler.is_terminal:
            return handler
    return None


def clear_open_line() -> None:
    """Call this before printing anything else."""
    terminal = find_terminal()
    if terminal is not None:
        terminal.clear_line()
        terminal.flush()


def show_count(what: str, done: int, total: int) -> None:
    """On a terminal, show a progress count."""
    terminal = find_terminal()
    if terminal is not None:
        terminal.show_line(f"{what}  {done}/{total}")


@contextlib.contextmanager
def busy(what: str) -> Iterator[None]:
    """On a terminal, show how long the block has been running. Also a decorator."""
    terminal = find_terminal()
    if terminal is None:
        yield
        return
    began, has_ended = time.monotonic(), threading.Event()

    def show() -> None:
        # Nothing is shown in the first second.
        while not has_ended.wait(1.0):
            terminal.show_line(f"{what}  {clock(time.monotonic() - began)}")

    # A daemon thread, so that it never keeps an exiting program alive.
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        terminal.clear_line()


class Pace:
    """The elapsed and the remaining time of a loop."""

    def __init__(self, steps_done: int = 0):
        self.began = time.monotonic()
        self.steps_before = steps_done

    def describe(self, step: int, steps: int) -> str:
        """Such as "0:12 elapsed, 1:03 left"; empty before the first step of this process."""
        elapsed = time.monotonic() - self.began
        done = step - self.steps_before
        if not done:
            return ""
        if step == steps:
            return f"{clock(elapsed)} elapsed"
        # Only steps of this process count, not those before an interruption.
        left = elapsed / done * (steps - step)
        return f"{clock(elapsed)} elapsed, {clock(left)} left"


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes}:{seconds:02}"


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A text table with aligned columns, a head and a rule."""
    columns = zip(head, *rows, strict=True)
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * width for width in widths]
    lines = []
    for row in (head, rule, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
