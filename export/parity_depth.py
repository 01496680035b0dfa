"""Drift over depth: which block of an ONNX tower departs from the reference, and whether the error is its own.

Teacher-forced replay: each block is run on the full-precision value of the tap before it, so that what it then gets
wrong is its own error; the rest of the error at its output came from earlier blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.export.compare import plain, row_error
from pocketvlm.export.onnx_blocks import OnnxBlocks, Rows, find_by_likeness, find_by_statistics
from pocketvlm.export.reference_run import ReferenceRun

CASES = 4
# statistics of a float32 tap agree to about 1e-6 with float64's; a tap beyond this departs
DEPARTS = 1e-4
# an own error this many times the tower's median is an outlier
OUTLIER = 5.0


@dataclass
class TapDrift:
    """One tap. deviation: of the full-precision file's statistics from the recorded ones, as a share of the peak.

    total: 1 - cosine at this tap. own: the same when the block is fed the full-precision value of the tap before it.
    Both are mean over the cases and None in full precision, or where the tap was folded into another or not found.
    outlier: `own` is more than `OUTLIER` times the tower's median, or in full precision the first tap that departs.
    """

    tap: str
    deviation: float
    total: float | None = None
    own: float | None = None
    outlier: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {key: plain(value) for key, value in vars(self).items()}


@dataclass
class Cuts:
    """Taps at which a tower can be cut. full, other: the value's name in the two files. truth: its values per case."""

    taps: list[str]
    full: list[str]
    other: list[str]
    truth: list[list[Rows]]


def tower_inputs(reference: ReferenceRun, tower: str) -> list[Rows]:
    """The first `CASES` golden inputs, one row each; taps were recorded in the same order."""
    rows = reference.arrays["pixels" if tower == "image" else "ids"]
    return [rows[index : index + 1] for index in range(min(CASES, len(rows)))]


def depth(
    bundle: Bundle, variant: BundleVariant, full: BundleVariant, reference: ReferenceRun
) -> dict[str, list[TapDrift]]:
    """tower -> taps in order. full: the fp32 variant of the same target (`variant` itself if that is it)."""
    found: dict[str, list[TapDrift]] = {}
    for tower in ("image", "text"):
        names, statistics = reference.taps[tower]
        rows = tower_inputs(reference, tower)
        exact = OnnxBlocks(bundle.path(full.files[tower]))
        matched = find_by_statistics(exact, rows, statistics)
        taps = [TapDrift(name, gap) for name, (_, gap) in zip(names, matched)]
        found[tower] = taps
        if variant == full:
            departed = _departed(taps)
            if departed:
                departed.outlier = True
            continue
        other = OnnxBlocks(bundle.path(variant.files[tower]))
        cuts = _cuts(exact, other, rows, names, [name for name, _ in matched])
        _replay(other, rows, cuts, {tap.tap: tap for tap in taps})
    return found


def first_departure(found: dict[str, list[TapDrift]]) -> str:
    """ "text tower at blocks.1" where a full-precision file leaves the recorded statistics; empty if it does not."""
    for tower, taps in found.items():
        departed = _departed(taps)
        if departed is not None:
            return f"{tower} tower at {departed.tap}"
    return ""


def _departed(taps: list[TapDrift]) -> TapDrift | None:
    """The first tap after which none is as recorded; one that is missing before good ones was folded into another."""
    good = [index for index, tap in enumerate(taps) if tap.deviation <= DEPARTS]
    rest = taps[good[-1] + 1 :] if good else taps
    return rest[0] if rest else None


def cut_tower(exact: OnnxBlocks, other: OnnxBlocks, reference: ReferenceRun, tower: str) -> Cuts:
    """The taps of a tower at which both files can be cut, in order."""
    names, statistics = reference.taps[tower]
    rows = tower_inputs(reference, tower)
    matched = find_by_statistics(exact, rows, statistics)
    cuts = _cuts(exact, other, rows, names, [name for name, _ in matched])
    kept: list[int] = []
    for index in range(len(cuts.taps)):
        ends = [(cuts.full[index], exact), (cuts.other[index], other)]
        if all(blocks.is_cut(value, blocks.output) for value, blocks in ends):
            kept.append(index)
    return Cuts(*([column[i] for i in kept] for column in (cuts.taps, cuts.full, cuts.other, cuts.truth)))  # type: ignore[arg-type]


def _cuts(exact: OnnxBlocks, other: OnnxBlocks, rows: list[Rows], names: list[str], full: list[str | None]) -> Cuts:
    known = [(tap, name) for tap, name in zip(names, full) if name is not None]
    values = [exact.values(row) for row in rows]
    truth = [[value[name] for value in values] for _, name in known]
    likeness = find_by_likeness(other, rows, truth)
    kept = [i for i, name in enumerate(likeness) if name is not None]
    return Cuts(
        [known[i][0] for i in kept], [known[i][1] for i in kept], [str(likeness[i]) for i in kept],
        [truth[i] for i in kept],
    )  # fmt: skip


def _replay(other: OnnxBlocks, rows: list[Rows], cuts: Cuts, taps: dict[str, TapDrift]) -> None:
    before: int | None = None
    for index, tap in enumerate(cuts.taps):
        end = cuts.other[index]
        whole = other.segment(None, end)
        taps[tap].total = _error(cuts.truth[index], [whole(row, None) for row in rows])
        if before is None or cuts.other[before] == end or not other.is_cut(cuts.other[before], end):
            # no value before it, or another way leads around that one: its own error is not told apart
            taps[tap].own = taps[tap].total if before is None else None
        else:
            block = other.segment(cuts.other[before], end)
            answers = [block(row, value) for row, value in zip(rows, cuts.truth[before])]
            taps[tap].own = _error(cuts.truth[index], answers)
        before = index
    own = [tap.own for tap in taps.values() if tap.own is not None]
    limit = OUTLIER * float(np.median(own)) if own else 0.0
    for entry in taps.values():
        entry.outlier = entry.own is not None and len(own) > 2 and entry.own > max(limit, 1e-9)


def _error(expected: list[Rows], actual: list[Rows]) -> float:
    pairs = zip(expected, actual, strict=True)
    return float(np.mean([row_error(a.reshape(1, -1), b.reshape(1, -1))[0] for a, b in pairs]))
