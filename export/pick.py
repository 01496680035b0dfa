"""Which students fit a size and a latency, from a table of `export.matrix`, and what they take on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.export.matrix import COMMITTED, read_matrix, try_student

Row = dict[str, Any]

# a table's machine and this one differ; what is measured here may be so much slower there
_SLACK = 4.0


def pick(
    *,
    size_mb: float | None = None,
    latency_ms: float | None = None,
    target: str | None = None,
    precision: str | None = None,
    tower: str = "image",
    table: str | Path | None = None,
    measure: bool = False,
    at_most: int = 3,
    progress: Callable[[str], None] | None = None,
) -> list[Row]:
    """Students, targets and precisions that fit, those with the most weights first.

    Args:
        size_mb: 1e6 bytes of the files of both towers, at most. latency_ms: of `tower` at batch 1 on one thread, at
            most, on the machine that made the table, or with `measure` on this one. By processor time, which on one
            thread is what the clock shows on a quiet machine. Core ML files have no times, and fit by size alone.
        target, precision: only these. tower: "image" or "text".
        table: a matrix.json; None: the committed one.
        measure: lower the first `at_most` candidates here with random weights and time them; minutes each for some.

    Returns:
        Rows of student, target, precision, mb, image_ms, text_ms, cosine (the worse tower's mean), weights and
        measured ("table" or "here").

    Raises:
        UsageError: nothing fits (the message names what comes nearest), a limit that is not positive.
        UnknownNameError: a target, precision or tower that the table does not have.
    """
    for what, limit in (("--size-mb", size_mb), ("--latency-ms", latency_ms), ("--at-most", at_most)):
        if limit is not None and not limit > 0:
            raise UsageError(
                f"{what} is {limit} and must be above 0; nothing would fit, so give what the app can spend"
            )
    if tower not in ("image", "text"):
        raise unknown_name("tower", tower, ("image", "text"))
    rows = read_matrix(table or COMMITTED)["rows"]
    for key, value in (("target", target), ("precision", precision)):
        known = {row[key] for row in rows}
        if value is not None and value not in known:
            raise unknown_name(f"{key} in the table", value, known)
    timed = [
        row
        for row in rows
        if row["status"] == "works"
        and (target is None or row["target"] == target)
        and (precision is None or row["precision"] == precision)
        and ("processor_ms" if latency_ms is not None else "cosine_mean") in row["towers"].get(tower, {})
    ]
    slack = _SLACK if measure else 1.0
    fitting = sorted(_fitting(timed, size_mb, latency_ms, tower, slack), key=_weights, reverse=True)
    here = False
    if measure and fitting:
        fitting = _fitting(_measured(fitting[:at_most], progress), size_mb, latency_ms, tower, 1.0)
        here = True
    if not fitting:
        raise _nothing(timed, size_mb, latency_ms, tower, here)
    return [_shown(row, here) for row in fitting]


def _fitting(
    rows: Sequence[Row], size_mb: float | None, latency_ms: float | None, tower: str, slack: float
) -> list[Row]:
    return [
        row
        for row in rows
        if row["status"] == "works"
        and (size_mb is None or row["mb"] <= size_mb)
        and (latency_ms is None or row["towers"][tower]["processor_ms"] <= slack * latency_ms)
    ]


def _measured(rows: Sequence[Row], progress: Callable[[str], None] | None) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        found += try_student(row["student"], [(row["target"], row["precision"])], progress=progress)
    return found


def _weights(row: Row) -> float:
    return float(row["mb"] / row["of_float"])


def _shown(row: Row, here: bool) -> Row:
    times = {f"{tower}_ms": (row["towers"].get(tower) or {}).get("processor_ms") for tower in ("image", "text")}
    return {
        "student": row["student"],
        "target": row["target"],
        "precision": row["precision"],
        "mb": row["mb"],
        **times,
        "cosine": min(found["cosine_mean"] for found in row["towers"].values() if "cosine_mean" in found),
        "weights": row["weights"],
        "measured": "here" if here else "table",
    }


def _nothing(
    rows: Sequence[Row], size_mb: float | None, latency_ms: float | None, tower: str, here: bool
) -> UsageError:
    limits = ((size_mb, "MB"), (latency_ms, "ms"))
    wanted = [f"{limit:g} {unit}" for limit, unit in limits if limit is not None]
    if not rows:
        return UsageError(
            "the table has no row of this target and precision that works; there is nothing to choose from, so leave "
            "one of them out or extend the table with 'pocketvlm matrix'"
        )

    def excess(row: Row) -> float:
        size = row["mb"] / size_mb if size_mb else 0.0
        return max(size, row["towers"][tower]["processor_ms"] / latency_ms if latency_ms else 0.0)

    nearest = min(rows, key=excess)
    ms = nearest["towers"][tower].get("processor_ms")
    time = "" if ms is None else f" and {ms:.2f} ms"
    return UsageError(
        f"no student fits {' and '.join(wanted)}{' on this machine' * here}; the nearest in the table is "
        f"{nearest['student']} as {nearest['target']} {nearest['precision']} with {nearest['mb']:.1f} MB{time}, "
        f"so allow that or prune a student ('pocketvlm prune')"
    )
