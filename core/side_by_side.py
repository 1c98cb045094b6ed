"""What models write, in columns on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from core.screen import show_controls


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
