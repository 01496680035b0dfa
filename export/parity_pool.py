"""Task losses pooled over folds and seeds, where a single fold has too few queries to decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.edge.errors import UsageError
from pocketvlm.export.budgets import Budgets, Status, load_budgets
from pocketvlm.export.compare import PairedChange, paired_change
from pocketvlm.export.parity_stages import RUNTIMES

if TYPE_CHECKING:
    from pocketvlm.export.parity import ParityReport


@dataclass(frozen=True)
class PooledTask:
    """The task loss of one variant over several reports. distinct: different queries among `change.queries`.

    method: "tango" (all queries differ) or "cluster bootstrap" (several seeds answered the same query).
    status: "pass", "fail" or "undecided" against the budget.
    """

    target: str
    precision: str
    direction: str
    k: int
    change: PairedChange
    distinct: int
    reports: int
    method: str
    limit: float
    status: Status
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pooled_task_bound(
    reports: Sequence[ParityReport | Mapping[str, Any]], *, budgets: str | Path | None = None
) -> list[PooledTask]:
    """One-sided 95 % bound of the task loss over all queries of several reports, per variant and direction.

    Args:
        reports: `ParityReport`s or their parsed parity.json, one per fold (and seed). The same query may occur in
            several of them; such repeats are resampled together and are not counted as further evidence.

    Returns:
        One row per variant, direction and k; `status` judges the k of the budget (R@5, top-1 for zero-shot) and the
        others alike. Precisions without a task budget (fp32, where nothing but ties may change) take the verdict of
        their S5 stages.

    Raises:
        UsageError: no report, or one without task results (it failed earlier and would silently drop out).
    """
    if not reports:
        raise UsageError("no parity report was given, so there is nothing to pool")
    limits = load_budgets(budgets)
    pool: dict[tuple[str, str, str, int], list[tuple[str, int]]] = {}
    seen: dict[tuple[str, str, str, int], list[Status]] = {}
    for report in reports:
        value = report if isinstance(report, Mapping) else report.to_dict()
        for variant in value["variants"]:
            name = f"{variant['target']} {variant['precision']}"
            stage = next((s for s in variant["stages"] if s["stage"] == "S5"), None)
            if variant["target"] not in RUNTIMES:
                continue
            if stage is None or not stage["details"]:
                raise UsageError(
                    f"the report of {name} has no task result ({variant['message']}); pooling the others would hide "
                    "it, so repair that run first"
                )
            for direction, keys in value["queries"].items():
                for k, outcomes in stage["details"][direction]["outcomes"].items():
                    key = (variant["target"], variant["precision"], direction, int(k))
                    pool.setdefault(key, []).extend(zip(keys, ({"-": 1, "+": -1, ".": 0}[c] for c in outcomes)))
                    seen.setdefault(key, []).append(stage["status"])
    short = sorted({f"{t} {p}" for (t, p, _, _), found in seen.items() if len(found) != len(reports)})
    if short:
        raise UsageError(f"{', '.join(short)} is not in all {len(reports)} reports, so the pool would be lopsided")
    return [_pooled(*key, rows, seen[key], limits) for key, rows in pool.items()]


def _pooled(
    target: str,
    precision: str,
    direction: str,
    k: int,
    rows: list[tuple[str, int]],
    found: list[Status],
    limits: Budgets,
) -> PooledTask:
    outcome = np.array([value for _, value in rows])
    distinct = len({key for key, _ in rows})
    change = paired_change(int((outcome > 0).sum()), int((outcome < 0).sum()), len(rows))
    method = "tango"
    if distinct < len(rows):
        method = "cluster bootstrap"
        interval = paired_bootstrap(outcome, np.zeros(len(rows)), clusters=[key for key, _ in rows])
        # with hardly any change a bootstrap has no width; Tango's bound over the distinct queries is its floor
        lowest = paired_change(0, 0, distinct)
        change = PairedChange(
            change.queries, change.lost, change.gained, change.loss,
            max(interval.upper_bound, change.loss + (lowest.bound if not outcome.any() else 0.0)),
            min(interval.lower_bound, change.loss), (interval.low, interval.high), math.nan,
        )  # fmt: skip
    precise = limits.for_precision(precision)
    if "task_loss" in precise.metrics:
        check = precise.judge_task(change, direction)
        return PooledTask(
            target, precision, direction, k, change, distinct, len(found), method, check.limit, check.status, check.note
        )
    status: Status = "pass" if set(found) == {"pass"} else "fail"
    note = (
        f"{change.lost} lost, {change.gained} gained of {change.queries}; only near ties may change at full precision"
    )
    return PooledTask(target, precision, direction, k, change, distinct, len(found), method, 0.0, status, note)
