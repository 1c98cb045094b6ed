"""The errors that a user can cause and resolve, and how messages name the nearest valid option."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MAX_REASON_LENGTH = 400  # characters of a library's message


class ConfigError(ValueError):
    """Invalid user input. The message is one sentence that stands alone, then the remedy."""


class RowError(ValueError):
    """A row of data that cannot be used. The row is left out; its reason is counted and logged."""


@contextlib.contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """Turn any exception about the user's input into a ConfigError that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # Libraries often wrap the informative error in a general one.
        root = error.__cause__ or error
        reason = " ".join(str(root).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason[:MAX_REASON_LENGTH]}") from error


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence on an unknown name, with the nearest valid one."""
    candidates = sorted(valid)
    # difflib's default cutoff of 0.6 finds slips of the finger, not other words.
    nearest = difflib.get_close_matches(str(name), candidates, n=1)
    if nearest:
        return f"unknown {kind} {name!r}; did you mean {nearest[0]!r}?"
    return f"unknown {kind} {name!r}; known: {', '.join(candidates)}"
