"""Texts of models side by side on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from core.screen import show_controls


def print_side_by_side(headings: Sequence[str], texts: Sequence[str]) -> None:
    """Print texts in columns that together span the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for heading in headings:
        table.add_column(Text(show_controls(heading)), ratio=1, overflow="fold")
    # `Text` is shown verbatim, while a plain string may contain rich markup.
    table.add_row(*(Text(show_controls(text.strip("\n"))) for text in texts))
    Console().print(table)
