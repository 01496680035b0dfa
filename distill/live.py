"""A run as people see it while it trains: a table on a terminal, one line elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pocketvlm.distill.meter import Meter


def duration(seconds: float) -> str:
    """Seconds as a person says them: "48 s", "12:05 min", "3:20 h", "2 d 4 h"."""
    if not math.isfinite(seconds):
        return "–"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = round(whole / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    hours = round(whole / 3600)
    return f"{hours // 24} d {hours % 24} h"


def memory(row: Mapping[str, Any]) -> str:
    """The memory of a row: "1.2 GB", with the device's beside it on CUDA."""
    parts = [f"{row['rss_mb'] / 1000:.1f} GB"] if "rss_mb" in row else []
    parts += [f"{row['cuda_max_mb'] / 1000:.1f} GB on the device"] if "cuda_max_mb" in row else []
    return ", ".join(parts) or "–"


def note_of(meter: Meter, row: Mapping[str, Any]) -> str:
    """The plain line of a step, behind "training: 420/3500"."""
    shown = f"loss {row['loss']:.4f}" if "loss" in row else f"skipped: {row['skipped_because']}"
    return (
        f"{shown}  lr {row['lr']:.2e}  {meter.samples_per_s:.0f}/s  "
        f"data wait {100 * meter.data_wait_share:.0f} %  ETA {duration(meter.left_s)}"
    )


def table_of(meter: Meter, row: Mapping[str, Any]) -> Any:
    """A rich renderable: progress and what a step costs, above every loss with its mean and trend. A skipped step has a
    row without losses."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True)
    share = meter.step / max(meter.total, 1)
    head.add_row(
        Text(f"training {meter.step:,}/{meter.total:,}", style="bold"),
        ProgressBar(total=meter.total, completed=meter.step),
        Text(f"{100 * share:.0f} %  ETA {duration(meter.left_s)}"),
    )
    facts = {
        "phase": meter.phase,
        "samples/s": f"{meter.samples_per_s:,.0f}",
        "data wait": f"{100 * meter.data_wait_share:.0f} %",
        "memory": memory(row),
        "lr": f"{row['lr']:.2e}",
        "grad norm": f"{row['grad_norm']:.3g}" if "grad_norm" in row else "–",
    }
    if row.get("skipped"):
        facts["steps skipped"] = f"{row['skipped']:,}"
    said = Text()
    for name, value in facts.items():
        said.append(f"{name} ", style="dim").append(f"{value}   ")
    losses = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    losses.add_column("weighted loss", no_wrap=True)
    for column in ("mean", "trend", "now"):
        losses.add_column(column, justify="right", no_wrap=True)
    for place, term in enumerate(meter.terms()):
        name = "total" if place == 0 else term.name
        losses.add_row(Text(name), f"{term.mean:.4f}", _trend(term.change), f"{term.last:.4f}", end_section=place == 0)
    return Group(head, said, Padding(losses, (1, 0, 0, 0)))


def _trend(change: float | None) -> Any:
    from rich.text import Text

    if change is None:
        return Text("·", style="dim")
    return Text(f"{'↓' if change < 0 else '↑'} {100 * abs(change):.1f} %", style="green" if change < 0 else "yellow")
