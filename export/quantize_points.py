"""Points between size, speed and accuracy: real files, measured on pictures that calibration has not seen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.errors import PocketvlmError, UsageError
from pocketvlm.export.bench_worker import times
from pocketvlm.export.compare import ONE_SIDED_95, PairedChange, drift, tango_bound
from pocketvlm.export.mixed import Plan
from pocketvlm.export.targets import Calibration, Target, Towers, Variant
from pocketvlm.export.validation import KS, Validation, changes, margins, ranks

FORMS = (
    '"r@5 -0.5" (points of R@1, R@5 or R@10 that may be lost), "cosine 0.995" (mean cosine to float, of the worse '
    'tower), "size 0.3" (share of the float files\' bytes)'
)
TOWERS = ("image", "text")
Verdict = Literal["auto", "bound", "estimate"]
_ROUNDS, _RUNS = 5, 8


@dataclass(frozen=True)
class Goal:
    """A budget. kind: "recall" (limit: the share of queries that may be lost at k), "cosine" or "size"."""

    text: str
    kind: Literal["recall", "cosine", "size"]
    limit: float
    k: int = 0


def parse_goal(text: str) -> Goal:
    """Read a budget.

    Raises:
        UsageError: not of one of the forms, which the message lists.
    """
    number = r"(-?\d+(?:\.\d+)?|-?\.\d+)"
    plain = " ".join(text.lower().split())
    if found := re.fullmatch(rf"r@(\d+) {number}(?: ?(?:points?|pt))?", plain):
        k, limit = int(found[1]), -float(found[2]) / 100
        if k in KS and 0 < limit < 1:
            return Goal(plain, "recall", limit, k)
    elif (found := re.fullmatch(rf"(cosine|size) {number}", plain)) and 0 < float(found[2]) < 1:
        return Goal(plain, "cosine" if found[1] == "cosine" else "size", float(found[2]))
    raise UsageError(
        f"budget {text!r} cannot be read, so nothing could be held to it; the forms are {FORMS}, with a number of "
        "points below zero and shares between 0 and 1"
    )


@dataclass(frozen=True)
class Point:
    """One way to quantize, on its files. keep: tower -> blocks in float ("mixed" only). cosine, margin_noise, recall,
    changes: against the float files on the validation pictures, both directions together. ms: tower -> processor time
    for one input on one thread. failed: why there are no numbers."""

    name: str
    precision: str
    keep: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mb: float = math.nan
    ratio: float = math.nan
    cosine: Mapping[str, float] = field(default_factory=dict)
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    margin_noise: float = math.nan
    recall: Mapping[int, float] = field(default_factory=dict)
    changes: Mapping[int, PairedChange] = field(default_factory=dict)
    ms: Mapping[str, float] = field(default_factory=dict)
    failed: str = ""

    @property
    def total_ms(self) -> float:
        """One picture and one text."""
        return sum(self.ms.values()) if self.ms else math.nan

    @property
    def kept(self) -> int:
        """How many blocks stay in float."""
        return sum(map(len, self.keep.values()))


@dataclass(frozen=True)
class Judge:
    """Whether points meet a goal. proof: a loss counts by its one-sided 95 % bound; else as it was measured. why: how
    that was decided, for people."""

    goal: Goal
    proof: bool
    why: str

    def value(self, point: Point) -> float:
        """How far a point is inside the goal, in its own units; below 0 it does not meet it."""
        if point.failed:
            return -math.inf
        if self.goal.kind == "recall":
            change = point.changes[self.goal.k]
            # not a number of queries more or less: a loss of exactly the budget is within it
            return self.goal.limit - (change.bound if self.proof else change.loss) + 1e-12
        if self.goal.kind == "cosine":
            return min(point.cosine.values()) - self.goal.limit
        return self.goal.limit - point.ratio

    def meets(self, point: Point) -> bool:
        """Whether a point is within the goal."""
        return self.value(point) >= 0

    def proved(self, point: Point) -> bool:
        """Whether a point meets the goal, and under a budget of recall the bound of its loss does too."""
        return self.meets(point) and (self.goal.kind != "recall" or point.changes[self.goal.k].bound <= self.goal.limit)

    def sentence(self, point: Point) -> str:
        """What was found of a point, in the goal's units."""
        if point.failed:
            return point.failed
        if self.goal.kind == "recall":
            change, k = point.changes[self.goal.k], self.goal.k
            return f"R@{k} {points(-change.loss)} points, at worst {points(-change.bound)} (95 %)"
        if self.goal.kind == "cosine":
            return f"cosine {min(point.cosine.values()):.5f}"
        return f"size {point.ratio:.3f}"


def points(share: float) -> str:
    """A share as points with a sign; nothing is +0.00."""
    return f"{round(100 * share, 2) + 0.0:+.2f}"


def make_judge(goal: Goal, plain: Point, verdict: Verdict) -> Judge:
    """By bound where the validation sample can prove the budget, else by the measured loss.

    It can, where as many results as int8 (`plain`) changes, half of them for the better, would leave the bound of the
    loss within the budget.
    """
    if goal.kind != "recall":
        return Judge(goal, False, "as measured")
    if verdict != "auto":
        how = "the one-sided 95 % bound" if verdict == "bound" else "the measured loss"
        return Judge(goal, verdict == "bound", f"by {how}, as was asked for")
    change = plain.changes[goal.k]
    moved = change.lost + change.gained
    best = tango_bound(moved // 2 + moved % 2, moved // 2 + moved % 2, change.queries)
    if best <= goal.limit:
        return Judge(goal, True, f"by the one-sided 95 % bound: {change.queries} queries can prove this budget")
    share = max(moved, 1) / change.queries
    needed = max(math.ceil(share * (ONE_SIDED_95 / goal.limit) ** 2), change.queries + 1)
    return Judge(
        goal, False,
        f"by the measured loss: {change.queries} queries, of which int8 changes {moved}, are too few to prove a loss "
        f"of at most {100 * goal.limit:g} points as a rule (about {needed:,} would be needed): what meets it by "
        "estimate may lose more, and only points marked as proved do not",
    )  # fmt: skip


class Lab:
    """Writes and measures points of one model, each tower's file once.

    folder: where the files go; they are needed until `timed` was called.
    """

    def __init__(
        self,
        towers: Towers,
        target: Target,
        calibration: Calibration,
        validation: Validation,
        folder: Path,
        progress: Callable[[str], None],
    ) -> None:
        self._towers, self._target, self._calibration = towers, target, calibration
        self._validation, self._folder, self._say = validation, folder, progress
        self._files: dict[tuple[str, str, tuple[str, ...]], tuple[Path, Variant, int, NDArray[Any]]] = {}
        self._points: list[Point] = []
        self.full = self.measure("fp32", "fp32")
        if self.full.failed:
            raise UsageError(f"the float files cannot be written ({self.full.failed}), so nothing can be compared")

    @property
    def points(self) -> list[Point]:
        """All that was measured, in the order of time."""
        return list(self._points)

    def measure(self, name: str, precision: str, keep: Mapping[str, Sequence[str]] | None = None) -> Point:
        """Write the files of a precision, or find them, and hold them to the float ones."""
        blocks = {tower: tuple(sorted((keep or {}).get(tower, ()))) for tower in TOWERS} if keep is not None else {}
        for known in self._points:
            if (known.precision, known.keep) == (precision, blocks):
                return known
        same = sum(known.name.split(", ")[0] == name for known in self._points)
        name = f"{name}, {same + 1}" if same else name
        self._say(f"measuring {name}")
        point = Point(name, precision, blocks)
        try:
            found = {tower: self._file(*_key(tower, point)) for tower in TOWERS}
        except PocketvlmError as error:
            point = replace(point, failed=str(error))
        except Exception as error:  # converters raise whatever they like
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            point = replace(point, failed=f"{type(error).__name__}: {reason}")
        else:
            point = self._compared(point, found)
        self._points.append(point)
        return point

    def timed(self, points: Sequence[Point]) -> list[Point]:
        """The points with `ms`: median processor time over rounds in which every file has its turn."""
        keys = [_key(tower, point) for point in points if not point.failed for tower in TOWERS]
        runs: dict[Any, tuple[Callable[[], object], list[float]]] = {}
        self._say("timing the files")
        for key in dict.fromkeys(keys):
            folder, variant, _, _ = self._files[key]
            one = self._validation.rows(key[0])[:1]
            runs[key] = (partial(_runner(self._target, folder, variant, key[0]), one), [])
        for _ in range(_ROUNDS):
            for run, spent in runs.values():
                spent.append(float(np.median(times(run, _RUNS)[1])))
        found = []
        for point in points:
            if not point.failed:
                own = {tower: runs[_key(tower, point)][1] for tower in TOWERS}
                point = replace(point, ms={tower: float(np.median(values)) for tower, values in own.items()})
            found.append(point)
        return found

    def _file(
        self, tower: str, precision: str, blocks: tuple[str, ...]
    ) -> tuple[Path, Variant, int, NDArray[np.float32]]:
        key = (tower, precision, blocks)
        if key not in self._files:
            folder = self._folder / str(len(self._files))
            folder.mkdir(parents=True)
            given = self._towers
            only = Towers(
                given.image if tower == "image" else None, given.text if tower == "text" else None, given.contract
            )
            how: Any = {"precision": precision, "folder": folder, "calibration": self._calibration}
            plan = Plan({tower: blocks}) if precision == "mixed" else None
            variant = self._target.lower(only, plan=plan, **how)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            rows = self._validation.rows(tower)
            run = _runner(self._target, folder, variant, tower)
            found = np.concatenate([run(rows[start : start + 32]) for start in range(0, len(rows), 32)])
            if not np.isfinite(found).all():
                raise UsageError(f"the {tower} file gives values that are not finite")
            self._files[key] = (folder, variant, size, found)
        return self._files[key]

    def _compared(self, point: Point, found: dict[str, tuple[Path, Variant, int, NDArray[Any]]]) -> Point:
        exact = {tower: self._file(tower, "fp32", ()) for tower in TOWERS}
        before, after = ({tower: entry[3] for tower, entry in files.items()} for files in (exact, found))
        told = {tower: drift(before[tower], after[tower]) for tower in TOWERS}
        was, now = (ranks(rows["image"], rows["text"], self._validation) for rows in (before, after))
        moved = margins(before["image"], before["text"], self._validation)
        moved = moved - margins(after["image"], after["text"], self._validation)
        size = sum(entry[2] for entry in found.values())
        return replace(
            point,
            mb=size / 1e6,
            ratio=size / sum(entry[2] for entry in exact.values()),
            cosine={tower: one.cosine_mean for tower, one in told.items()},
            sqnr_db={tower: one.sqnr_db for tower, one in told.items()},
            margin_noise=float(np.sqrt(np.square(moved).mean())),
            recall={k: float((now <= k).mean()) for k in KS},
            changes=changes(was, now),
        )


def _key(tower: str, point: Point) -> tuple[str, str, tuple[str, ...]]:
    """What tells one file from another; a tower with nothing in float is that of int8."""
    blocks = tuple(point.keep.get(tower, ()))
    return tower, "int8" if point.precision == "mixed" and not blocks else point.precision, blocks


def _runner(target: Target, folder: Path, variant: Variant, tower: str) -> Callable[[Any], NDArray[np.float32]]:
    backend = open_backend(target.name, folder, variant, threads=1)
    return backend.run_image if tower == "image" else backend.run_text
