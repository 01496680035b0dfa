"""Two recordings side by side: is it the same model, asked the same, and does it answer the same?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pocketvlm.export.budgets import load_budgets
from pocketvlm.export.compare import drift
from pocketvlm.export.reference_run import STATISTICS, ReferenceRun

_MACHINE = ("device_name", "torch", "cuda", "kit", "commit")


@dataclass
class ReferenceDiff:
    """model, inputs: what differs there, in words. answers: tower -> `compare.drift` of the rows asked alike.

    taps: tower -> (first tap whose statistics differ by more than a thousandth, or None; the largest relative
    difference and its tap). same: one model, asked the same, answering within fp32's budget.
    """

    model: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    taps: dict[str, dict[str, Any]] = field(default_factory=dict)
    limit: float = 0.0

    @property
    def same(self) -> bool:
        worst = [entry["one_minus_cosine_max"] for entry in self.answers.values()]
        answered = bool(worst) and all(value is not None and value <= self.limit for value in worst)
        return not self.model and not self.inputs and answered

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "same": self.same}

    def lines(self) -> list[str]:
        """For a terminal."""
        found = [f"model: {line}" for line in self.model or ["the same"]]
        found += [f"inputs: {line}" for line in self.inputs or ["the same"]]
        found += [f"made: {line}" for line in self.made or ["alike"]]
        for tower, entry in self.answers.items():
            found.append(
                f"{tower}: 1 - cosine {entry['one_minus_cosine_max']:.2e} at most over {entry['rows']} rows, SQNR "
                f"{entry['sqnr_db']:.1f} dB (limit {self.limit:.0e})"
            )
        for tower, entry in self.taps.items():
            first = f"; first to differ: {entry['first']}" if entry["first"] else ""
            found.append(f"{tower} taps: by up to {entry['largest']:.1e}, at {entry['at']}{first}")
        return [*found, "same" if self.same else "DIFFERENT"]


def diff_references(a: ReferenceRun, b: ReferenceRun) -> ReferenceDiff:
    """What differs between two recordings; rows are matched by case name and by task uid or text."""
    diff = ReferenceDiff()
    diff.limit = load_budgets().for_precision("fp32").metrics["one_minus_cosine_max"].value
    for key, one, other in changed_values(a.manifest["sha256"], b.manifest["sha256"]):
        diff.model.append(f"sha256 of {key} is {_short(one)} and {_short(other)}")
    for key, one, other in changed_values(a.contract.to_dict(), b.contract.to_dict()):
        diff.model.append(f"{key} of the contract is {one!r} and {other!r}")
    facts = ({**m["numerics"], **{k: m["environment"].get(k) for k in _MACHINE}} for m in (a.manifest, b.manifest))
    diff.made = [f"{key} {one!r} and {other!r}" for key, one, other in changed_values(*facts)]
    for tower in ("image", "text"):
        left, right = _rows(a, tower), _rows(b, tower)
        alone = sorted(set(left) ^ set(right))
        if alone:
            diff.inputs.append(f"{len(alone)} {tower} cases are in one only, first {alone[0]!r}")
        shared = [name for name in left if name in right]
        changed = [name for name in shared if not np.array_equal(left[name][0], right[name][0])]
        if changed:
            diff.inputs.append(f"{len(changed)} {tower} cases have other inputs, first {changed[0]!r}")
        alike = [name for name in shared if name not in changed]
        if alike and a.contract.embed_dim == b.contract.embed_dim:
            rows = (np.stack([side[name][1] for name in alike]) for side in (left, right))
            diff.answers[tower] = drift(*rows).to_dict()
        _taps(a, b, tower, diff)
    return diff


def _rows(run: ReferenceRun, tower: str) -> dict[str, tuple[Any, Any]]:
    """name -> (input, unit embedding) of the cases and of the task."""
    task, inputs = run.task, run.arrays["pixels" if tower == "image" else "ids"]
    records: Any = run.images if tower == "image" else run.texts
    found = {f"case {r.name}": (inputs[r.row], run.arrays[tower][r.row]) for r in records if r.row is not None}
    names, rows, units = (task.uids, task.pixels, task.image) if tower == "image" else (task.texts, task.ids, task.text)
    return found | {f"task {name}": (row, unit) for name, row, unit in zip(names, rows, units)}


def _taps(a: ReferenceRun, b: ReferenceRun, tower: str, diff: ReferenceDiff) -> None:
    (names, left), (others, right) = a.taps[tower], b.taps[tower]
    if names != others or left.shape != right.shape:
        diff.made.append(f"the {tower} towers have other taps or cases, which were not compared")
        return
    rms, absmax = STATISTICS.index("rms"), STATISTICS.index("absmax")
    scale = np.maximum(left[:, :, absmax], 1e-30)
    gap = np.abs(left - right)[:, :, : rms + 2].max(axis=2) / scale
    each = gap.max(axis=0)
    first = next((name for name, value in zip(names, each) if value > 1e-3), None)
    diff.taps[tower] = {"first": first, "largest": float(each.max()), "at": names[int(each.argmax())]}


def changed_values(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) wherever the two differ."""
    keys = [*a, *(key for key in b if key not in a)]
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _short(digest: Any) -> str:
    return f"{digest[:12]}…" if isinstance(digest, str) else "absent"
