"""Rows that a command prints, as a table or as JSON."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from typing import Any

_PIPED = 10_000


def emit(rows: Sequence[dict[str, Any]], as_json: bool, *, title: str, below: Sequence[str] = ()) -> None:
    """Print rows of equal keys as JSON or as a table.

    below: keys whose values are too long for a column; they stand under their row, as wide as the terminal.
    """
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    from rich.console import Console

    console = Console()
    if below:
        for line in _entries(rows, console.width, title, below):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not console.is_terminal and "COLUMNS" not in os.environ:
        # nobody's screen: a path stays in one piece for whatever reads the pipe
        console = Console(width=_PIPED)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for position, (key, value) in enumerate(rows[0].items() if rows else ()):
        number = isinstance(value, int | float)
        # names and numbers stay whole, so that they can be copied; the rest is folded, never cut
        table.add_column(
            key.replace("_", " "),
            justify="right" if number else "left",
            no_wrap=number or position == 0,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(table)


def emit_record(record: dict[str, Any], *, title: str) -> None:
    """Print one thing as lines "name  value"; values that hold several are spelled out."""
    from rich.console import Console

    console, names = Console(), [key.replace("_", " ") for key in record]
    width = max(map(len, names))
    console.print(title, highlight=False, markup=False)
    for name, value in zip(names, record.values()):
        told = textwrap.wrap(
            _told(value), max(20, console.width - width - 4), break_long_words=False, break_on_hyphens=False
        ) or ["none"]
        for place, part in enumerate(told):
            console.print(
                f"  {name if not place else '':<{width}}  {part}", highlight=False, markup=False, soft_wrap=True
            )
    console.print()


def _entries(rows: Sequence[dict[str, Any]], width: int, title: str, below: Sequence[str]) -> list[str]:
    heads = [key for key in (rows[0] if rows else ()) if key not in below]
    # the widest column last, where it pushes no other away
    heads[1:] = sorted(heads[1:], key=lambda key: max(len(_cell(row[key])) for row in rows) > width // 4)
    cells = [[key.replace("_", " ") for key in heads], *([_cell(row[key]) for key in heads] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(heads))]
    numbers = [bool(rows) and isinstance(rows[0][key], int | float) for key in heads]
    lines = [title]
    for place, row in enumerate(cells):
        padded = [cell.rjust(wide) if number else cell.ljust(wide) for cell, wide, number in zip(row, widths, numbers)]
        lines += [
            "",
            *textwrap.wrap("  ".join(padded).rstrip(), width, subsequent_indent=" " * 8, break_on_hyphens=False),
        ]
        if place:
            for key in below:
                lines += textwrap.wrap(
                    _cell(rows[place - 1][key]), width, initial_indent=" " * 4, subsequent_indent=" " * 4
                )
    return lines


def _told(value: Any) -> str:
    if isinstance(value, dict):
        inner = {
            key: f"({_told(part)})" if isinstance(part, list | tuple) else _told(part) for key, part in value.items()
        }
        return ", ".join(f"{key.replace('_', ' ')} {part}" for key, part in inner.items())
    if isinstance(value, list | tuple):
        return ("; " if value and isinstance(value[0], list | tuple) else ", ").join(_told(part) for part in value)
    return "none" if value is None else _cell(value)


def _cell(value: Any) -> str:
    if isinstance(value, int) and value >= 100_000:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def printable(text: str) -> str:
    """Without control characters: a file's name may hold some, which a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)
