"""Rows that a command prints, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def emit(rows: Sequence[dict[str, Any]], as_json: bool, *, title: str) -> None:
    """Print rows of equal keys as JSON or as a table."""
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

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
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, int) and value >= 100_000:
        return f"{value / 1e6:,.1f} M"
    return f"{value:,}" if isinstance(value, int) else str(value)
