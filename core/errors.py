"""Errors that a user can cause and correct, and suggestions of the nearest valid name."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from core.screen import show_controls

MAX_REASON_LENGTH = 400  # characters of a library's message
MAX_NAMES_LISTED = 25  # if there are more names, refer to --help


class ConfigError(ValueError):
    """Invalid user input: one or several problems, each a self-contained sentence and a remedy.
    Control characters in quoted input are escaped."""

    def __init__(self, *problems: str):
        problems = tuple(show_controls(str(problem)) for problem in problems)
        self.problems = problems
        lines = problems if len(problems) < 2 else (f"{len(problems)} mistakes", *problems)
        super().__init__("\n  ".join(lines))


class RowError(ValueError):
    """An unusable row of data. The row is left out, and the reason is counted and logged."""


@contextlib.contextmanager
def as_config_error(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Convert exceptions of a `kind`, which are about the user's input, to a ConfigError that
    begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except kind as error:
        # Libraries often wrap the informative error in a general one.
        root = error.__cause__ or error
        reason = " ".join(str(root).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason[:MAX_REASON_LENGTH]}") from error


def nearest_name(name: str, valid: Iterable[str]) -> str | None:
    """The most similar valid name, if there is a similar one."""
    # For long names a cutoff of 0.6 finds unrelated words; for short ones it is one wrong letter.
    cutoff = 0.75 if len(str(name)) > 4 else 0.6
    nearest = difflib.get_close_matches(str(name), sorted(valid), n=1, cutoff=cutoff)
    return nearest[0] if nearest else None


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence on an unknown name, with the nearest valid one if there is a similar one."""
    candidates = sorted(valid)
    nearest = nearest_name(name, candidates)
    if nearest:
        return f"unknown {kind} {name!r}; did you mean {nearest!r}?"
    if len(candidates) > MAX_NAMES_LISTED:
        return f"unknown {kind} {name!r}; --help lists those there are"
    return f"unknown {kind} {name!r}; known: {', '.join(candidates)}"
