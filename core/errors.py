"""The errors that a user can cause and resolve, and how messages name the nearest valid option."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from core.screen import show_controls

MAX_REASON_LENGTH = 400  # characters of a library's message
MAX_NAMES_LISTED = 25  # more names than this are for --help to list


class ConfigError(ValueError):
    """Invalid user input: one problem or several. Each is a sentence that stands alone, then the
    remedy. What they quote of the input, a terminal shows and does nothing else."""

    def __init__(self, *problems: str):
        problems = tuple(show_controls(str(problem)) for problem in problems)
        self.problems = problems
        lines = problems if len(problems) < 2 else (f"{len(problems)} mistakes", *problems)
        super().__init__("\n  ".join(lines))


class RowError(ValueError):
    """A row of data that cannot be used. The row is left out; its reason is counted and logged."""


@contextlib.contextmanager
def as_config_error(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Turn any exception of a `kind`, which is about the user's input, into a ConfigError that
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
    """The valid name that is really near, if there is one."""
    # In a long name a cutoff of 0.6 finds other words; in a short one it is one wrong letter.
    cutoff = 0.75 if len(str(name)) > 4 else 0.6
    nearest = difflib.get_close_matches(str(name), sorted(valid), n=1, cutoff=cutoff)
    return nearest[0] if nearest else None


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence on an unknown name, with the nearest valid one if one is really near."""
    candidates = sorted(valid)
    nearest = nearest_name(name, candidates)
    if nearest:
        return f"unknown {kind} {name!r}; did you mean {nearest!r}?"
    if len(candidates) > MAX_NAMES_LISTED:
        return f"unknown {kind} {name!r}; --help lists those there are"
    return f"unknown {kind} {name!r}; known: {', '.join(candidates)}"
