"""The variants of a written bundle as rows and as a table of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketvlm.edge.bundle import Bundle
from pocketvlm.export.delegation import delegation_lines


@dataclass(frozen=True)
class VariantRow:
    """One line of the summary. mb: 1e6 bytes of its files. ratio: to fp32 of the same target (to four bytes per
    parameter where that was not written). latency_ms: tower -> batch 1, one thread, on the exporting machine.
    same_label: of a classifier, the share of held-out calibration pictures that get the float model's label.
    taken_over: of ExecuTorch, by method what its backend holds (`export.delegation`)."""

    target: str
    precision: str
    files: tuple[str, ...]
    mb: float
    ratio: float
    latency_ms: dict[str, float]
    meets_floor: bool | None
    same_label: float | None = None
    taken_over: dict[str, Any] = field(default_factory=dict)


def summarize(bundle_folder: str | Path) -> list[VariantRow]:
    """The variants of a written bundle, for a table.

    Raises:
        UsageError, IntegrityError, VersionError: as `edge.bundle.Bundle.load`.
    """
    bundle = Bundle.load(bundle_folder, verify=False)
    rows = []
    for variant in bundle.variants:
        notes = variant.notes
        floors = [notes[t]["meets_floor"] for t in ("image", "text") if "meets_floor" in (notes.get(t) or {})]
        rows.append(
            VariantRow(
                variant.target,
                variant.precision,
                tuple(dict.fromkeys(variant.files.values())),
                float(notes["bytes"]) / 1e6,
                float(notes["ratio_to_fp32"]),
                dict(notes.get("latency_ms_batch1_1thread") or {}),
                all(floors) if floors else None,
                (notes.get("same_label") or {}).get("share"),
                dict(notes.get("delegation") or {}),
            )
        )
    return rows


def format_table(rows: Sequence[VariantRow]) -> str:
    """`summarize` as lines of text: target, precision, file, MB, ratio to fp32, milliseconds of both towers, and of a
    classifier how many pictures keep their label. Below it, what a backend took over and what it left."""
    labelled = any(row.same_label is not None for row in rows)
    head = ("target", "precision", "file", "MB", "of fp32", "image ms", "text ms", *["same label"] * labelled, "")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        times = [f"{row.latency_ms[t]:.2f}" if t in row.latency_ms else "-" for t in ("image", "text")]
        warning = f"below the {row.precision} floor" if row.meets_floor is False else ""
        if labelled:
            times.append("-" if row.same_label is None else f"{100 * row.same_label:.1f} %")
        lines.append(
            (row.target, row.precision, ", ".join(row.files), f"{row.mb:.2f}", f"{row.ratio:.3f}", *times, warning)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    for row in rows:
        shown += delegation_lines(f"{row.target} {row.precision}", row.taken_over)
    return "\n".join(shown)
