"""The errors that a user can cause and resolve, and how messages name the nearest valid option."""

from __future__ import annotations

import contextlib
import difflib
from typing import Iterable


class ConfigError(ValueError):
    """Input that the user has to mend: one sentence that says what is wrong and what to write instead."""


class RowError(ValueError):
    """A row that cannot be used. The reason is counted and said, and the row left out."""


@contextlib.contextmanager
def as_config_error(what: str):
    """Turn whatever a library raises about the user's input into a ConfigError that begins with `what`."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ConfigError(f"{what}: {reason[:400]}") from error


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """One sentence on an unknown name, with the nearest valid one."""
    near = difflib.get_close_matches(str(name), valid := sorted(valid), n=1)
    return f"unknown {kind} {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"known: {', '.join(valid)}"
    )
