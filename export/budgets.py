"""Budgets: what a difference may cost, where each number came from, and the verdict on one measured value.

The shipped numbers are in `budgets.json`. A file of your own may tighten any of them; a looser one is refused
unless it carries a `reason`, which the report then prints beside the number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pocketvlm.edge.errors import UsageError, VersionError, unknown_name
from pocketvlm.export.compare import PairedChange, plain, queries_needed

Status = Literal["pass", "undecided", "fail", "not-run", "structure-only"]
SCHEMA = "1.0"
# the most that a noise floor may widen a budget, in error units
WIDEST = 2.0


@dataclass(frozen=True)
class Budget:
    """One limit. better: which direction is good. k, noise_metric: how the reference's noise floor may widen it."""

    metric: str
    value: float
    better: Literal["lower", "higher"]
    source: str
    start: float
    k: float = 0.0
    noise_metric: str | None = None
    reason: str = ""

    def error(self, value: float) -> float:
        """`value` in error units: as it is where lower is better; a share's complement (0.96 agreement is 0.04
        error); a ratio of amplitudes for decibels (80 dB is 1e-4); the reciprocal for headroom."""
        if self.better == "lower":
            return value
        if self.metric == "sqnr_db":
            return 10.0 ** (-value / 20.0)
        return 1.0 / value if self.metric == "fp16_headroom" else 1.0 - value

    def from_error(self, error: float) -> float:
        """Inverse of `error`."""
        if self.better == "lower":
            return error
        if self.metric == "sqnr_db":
            return -20.0 * math.log10(error)
        return 1.0 / error if self.metric == "fp16_headroom" else 1.0 - error

    def limit(self, noise: Mapping[str, Any] | None) -> float:
        """max(value, k x noise floor), at most 2 x value, in error units; returned in the metric's own units."""
        base = self.error(self.value)
        measured = (noise or {}).get(self.noise_metric) if self.noise_metric else None
        if measured is None or not self.k:
            return self.value
        return self.from_error(min(max(base, self.k * self.error(float(measured))), WIDEST * base))


@dataclass(frozen=True)
class Check:
    """One judged number. where: tower or retrieval direction it belongs to. limit: what it was held against."""

    metric: str
    where: str
    value: float | None
    limit: float
    better: str
    status: Status
    source: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: plain(value) for key, value in asdict(self).items()}


@dataclass(frozen=True)
class PrecisionBudgets:
    """All limits of one precision. noise: key of the same-precision noise floor in the reference's noise.json, or
    None. rows: "all" judges every case, "real" judges real pictures and texts only (generated ones are shown)."""

    precision: str
    title: str
    noise: str | None
    rows: Literal["all", "real"]
    tie: Mapping[str, Any]
    metrics: Mapping[str, Budget]

    def tie_width(self, noise: Mapping[str, Any]) -> float:
        """Score difference that counts as a tie under this precision (units of the cosine)."""
        floor = noise.get(self.tie["noise"], {}).get("scores", {}).get(self.tie["statistic"])
        return max(float(self.tie["floor"]), float(self.tie["k"]) * float(floor or 0.0))

    def judge(self, metric: str, value: float | None, where: str, noise: Mapping[str, Any] | None = None) -> Check:
        """Verdict on one value. None or NaN fails: what could not be measured has not passed."""
        budget = self.metrics[metric]
        limit = budget.limit(noise)
        known = value is not None and math.isfinite(value)
        # written so that NaN falls through to "fail"
        good = known and (value <= limit if budget.better == "lower" else value >= limit)  # type: ignore[operator]
        note = budget.reason if known else "not a finite number"
        return Check(
            metric, where, value if known else None, limit, budget.better, "pass" if good else "fail",
            budget.source, note,
        )  # fmt: skip

    def judge_task(self, change: PairedChange, where: str, name: str = "task_loss") -> Check:
        """Verdict on a paired task change (see docs/parity.md, "When a task result counts").

        pass: the one-sided 95 % bound of the loss is within the budget. fail: the lower bound is beyond it, or the
        measured loss is beyond it and there are enough queries to decide. undecided: anything else.
        """
        limit = self.metrics["task_loss"].value
        needed = queries_needed(limit)
        text = f"loss {100 * change.loss:+.2f} points, 95 % bound {100 * change.bound:+.2f}, {change.queries} queries"
        status: Status
        if change.bound <= limit:
            status = "pass"
        elif change.floor > limit or (change.loss > limit and change.queries >= needed):
            status = "fail"
        else:
            status = "undecided"
            text += (
                f"; fewer than the {needed} queries that this budget needs"
                if change.queries < needed
                else "; the measured loss is within the budget and its bound is not"
            )
        return Check(
            name, where, change.loss, limit, "lower", status, self.metrics["task_loss"].source, text
        )  # fmt: skip


@dataclass(frozen=True)
class Budgets:
    """A budgets file. path is its name only, never a machine's folder."""

    version: str
    path: str
    precisions: Mapping[str, PrecisionBudgets]

    def for_precision(self, precision: str) -> PrecisionBudgets:
        """The limits of one precision; a precision without limits cannot be judged and is refused."""
        if precision not in self.precisions:
            raise unknown_name("precision in the budgets", precision, self.precisions)
        return self.precisions[precision]


def load_budgets(path: str | Path | None = None) -> Budgets:
    """Read the shipped budgets, or a file of the same form.

    Raises:
        UsageError: the file is absent, not JSON, incomplete, or loosens a number without saying why.
        VersionError: it was written under a newer schema.
    """
    shipped = _parse(resources.files(__package__).joinpath("budgets.json").read_text("utf-8"), "budgets.json", None)
    if path is None:
        return shipped
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise UsageError(f"budgets file {file} cannot be read ({error.strerror}); parity was not judged") from error
    return _parse(text, file.name, shipped)


def _parse(text: str, name: str, shipped: Budgets | None) -> Budgets:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"budgets file {name} is not JSON (line {error.lineno}); parity was not judged") from error
    if not isinstance(value, dict) or "schema" not in value or not value.get("precisions"):
        raise UsageError(f"budgets file {name} has no 'schema' or no 'precisions', so it limits nothing")
    if str(value["schema"]).split(".")[0] != SCHEMA.split(".")[0]:
        raise VersionError(f"budgets file {name} has schema {value['schema']}, this release reads {SCHEMA}; upgrade")
    precisions = {}
    for precision, entry in value["precisions"].items():
        try:
            metrics = {metric: Budget(metric=metric, **fields) for metric, fields in entry["metrics"].items()}
            precisions[precision] = PrecisionBudgets(
                precision, entry["title"], entry["noise"], entry["rows"], entry["tie"], metrics
            )
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"budgets file {name}, precision {precision!r} is incomplete or has a stray field ({error})"
            ) from error
        base = shipped.precisions.get(precision) if shipped else None
        _refuse_silent_loosening(name, precisions[precision], base)
    return Budgets(str(value.get("version", "unnamed")), name, precisions)


def _refuse_silent_loosening(name: str, new: PrecisionBudgets, base: PrecisionBudgets | None) -> None:
    for metric, budget in new.metrics.items():
        origin = base.metrics[metric].value if base and metric in base.metrics else budget.start
        if budget.error(budget.value) > budget.error(origin) * (1 + 1e-12) and not budget.reason.strip():
            raise UsageError(
                f"budgets file {name} loosens {new.precision} {metric} from {origin:g} to {budget.value:g} without a "
                "'reason'; a limit nobody can explain protects nothing, so add the reason or restore the number"
            )
    if base and not str(new.tie.get("reason", "")).strip() and any(new.tie[k] > base.tie[k] for k in ("k", "floor")):
        raise UsageError(
            f"budgets file {name} widens what counts as a tie under {new.precision} without a 'reason', which would "
            "excuse real flips; add the reason to its 'tie' entry or restore the numbers"
        )
    dropped = sorted(set(base.metrics) - set(new.metrics)) if base else []
    if dropped:
        raise UsageError(
            f"budgets file {name} leaves out {new.precision} {', '.join(dropped)}, which would then pass unseen; "
            "copy the missing limits from the shipped budgets.json"
        )
