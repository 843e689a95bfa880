"""Tables on the terminal: the one printer, rich's, for all commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Rows = Sequence[Sequence[str]]


def table_lines(rows: Rows, justify: Literal["left", "right"] = "right") -> list[str]:
    """Rows as lines of even columns; the first row is the heading, the first column to the left.

    `justify` is for the other columns. Nothing is wrapped or cut, whatever the terminal's width.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        table.add_column(justify=justify if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def print_table(rows: Rows, justify: Literal["left", "right"] = "right") -> None:
    """Print `table_lines`."""
    print("\n".join(table_lines(rows, justify)))
