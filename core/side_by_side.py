"""What models write, on a terminal: without effect on it, and in columns."""

from __future__ import annotations

import re
from collections.abc import Sequence

# All that moves the cursor, changes colors or reorders text, except tabs and line breaks.
CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def show_controls(text: str) -> str:
    r"""`text` with its control characters written out, such as \x1b."""
    return CONTROL_CHARACTER.sub(lambda match: ascii(match[0])[1:-1], text)


def print_side_by_side(headings: Sequence[str], texts: Sequence[str]) -> None:
    """Print each text in a column of its own; together they are as wide as the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for heading in headings:
        table.add_column(Text(show_controls(heading)), ratio=1, overflow="fold")
    # `Text` is shown as it is, where a plain string may have marks of rich in it.
    table.add_row(*(Text(show_controls(text.strip("\n"))) for text in texts))
    Console().print(table)
