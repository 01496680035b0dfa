"""Budgets: what a difference may cost, where each number came from, and the verdict on one measured value.

The shipped numbers are in `budgets.json`. A file of your own may tighten any of them; a looser one is refused
unless it carries a `reason`, which the report then prints beside the number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pocketvlm.edge.errors import UsageError, VersionError, unknown_name
from pocketvlm.export.compare import PairedChange, plain, queries_needed

Status = Literal["pass", "undecided", "fail", "not-run", "not-compared"]
SCHEMA = "1.0"
_TIE = ("noise", "statistic", "k", "floor")
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
        """`task_verdict` on a paired task change, by this precision's budget."""
        limit = self.metrics["task_loss"].value
        status, text = task_verdict(change, limit)
        return Check(
            name, where, change.loss, limit, "lower", status, self.metrics["task_loss"].source, text
        )  # fmt: skip


def task_verdict(
    change: PairedChange, limit: float, *, of: str = "queries", more: str = "pool folds"
) -> tuple[Status, str]:
    """Verdict on a paired task change and its numbers (see docs/parity.md, "When a task result counts").

    pass: the one-sided 95 % upper bound of the loss is within the budget `limit`, a fraction. fail: the lower bound is
    beyond it. undecided: anything else, also a measured loss beyond the budget that so few may show by chance.
    of: what was asked. more: how to decide what is not.
    """
    needed = queries_needed(limit)
    text = f"loss {100 * change.loss:+.2f} points, 95 % bound {100 * change.bound:+.2f}, {change.queries} {of}"
    if change.bound <= limit:
        return "pass", text
    if change.floor > limit:
        return "fail", text
    if change.queries < needed:
        return "undecided", f"{text}; fewer than the {needed} {of} that this budget needs"
    if change.loss > limit:
        lower = f"its lower bound {100 * change.floor:+.2f} is not beyond the budget"
        return "undecided", f"{text}; {lower}, so {more} to decide"
    return "undecided", f"{text}; the measured loss is within the budget and its bound is not, so {more} to decide"


@dataclass(frozen=True)
class Budgets:
    """A budgets file. path: its name only, never a machine's folder. sha256: of the file. shipped: it is this kit's."""

    version: str
    path: str
    precisions: Mapping[str, PrecisionBudgets]
    sha256: str = ""
    shipped: bool = True

    def for_precision(self, precision: str) -> PrecisionBudgets:
        """The limits of one precision; a precision without limits cannot be judged and is refused."""
        if precision not in self.precisions:
            raise unknown_name("precision in the budgets", precision, self.precisions)
        return self.precisions[precision]


def load_budgets(path: str | Path | None = None) -> Budgets:
    """Read the shipped budgets, or a file of the same form.

    Raises:
        UsageError: the file is absent, not JSON, incomplete, or loosens a number without saying why.
        UnknownNameError: a key, precision or metric that the shipped file does not have.
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
    if not isinstance(value, dict) or "schema" not in value or not isinstance(value.get("precisions"), dict):
        raise UsageError(f"budgets file {name} has no 'schema' or no 'precisions', so it limits nothing")
    if str(value["schema"]).split(".")[0] != SCHEMA.split(".")[0]:
        raise VersionError(f"budgets file {name} has schema {value['schema']}, this release reads {SCHEMA}; upgrade")
    if not value["precisions"]:
        raise UsageError(f"budgets file {name} has no precision, so it limits nothing; copy the shipped budgets.json")
    _known_keys(name, "key", value, ("schema", "version", "rule", "precisions"))
    if shipped:
        _known_keys(name, "precision", value["precisions"], shipped.precisions)
    precisions = {}
    for precision, entry in value["precisions"].items():
        base = shipped.precisions[precision] if shipped else None
        precisions[precision] = _precision(name, precision, entry, base)
        _refuse_silent_loosening(name, precisions[precision], base)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Budgets(str(value.get("version", "unnamed")), name, precisions, digest, shipped is None)


def _precision(name: str, precision: str, entry: Any, base: PrecisionBudgets | None) -> PrecisionBudgets:
    _known_keys(name, f"{precision} key", entry, ("title", "noise", "rows", "tie", "metrics"))
    try:
        if base:
            _known_keys(name, f"{precision} metric", entry["metrics"], base.metrics)
        fields = {field.name for field in dataclass_fields(Budget)} - {"metric"}
        for metric, limits in entry["metrics"].items():
            _known_keys(name, f"{precision} {metric} key", limits, fields)
            _refuse_no_number(name, f"{precision} {metric}", limits, ("value", "start", "k"))
        _known_keys(name, f"{precision} tie key", entry["tie"], (*_TIE, "source", "reason"))
        _refuse_no_number(name, f"{precision} tie", entry["tie"], ("k", "floor"))
        missing = sorted(set(_TIE) - set(entry["tie"]))
        if missing:
            raise KeyError(missing[0])
        metrics = {metric: Budget(metric=metric, **limits) for metric, limits in entry["metrics"].items()}
        return PrecisionBudgets(precision, entry["title"], entry["noise"], entry["rows"], entry["tie"], metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"budgets file {name}, precision {precision!r} is incomplete ({error}), so it would judge less than it "
            "seems to; copy what is missing from the shipped budgets.json"
        ) from error


def _known_keys(name: str, what: str, given: Any, known: Iterable[str]) -> None:
    """A misspelt key would leave the shipped number, or none, in force without a word."""
    if not isinstance(given, Mapping):
        raise UsageError(f"budgets file {name} has a {type(given).__name__} where keys are expected ({what})")
    for key in given:
        if key not in known:
            raise unknown_name(f"{what} in budgets file {name}", key, known)


def _refuse_no_number(name: str, where: str, given: Mapping[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        value = given.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UsageError(
                f"budgets file {name} gives {where} the {key} {value!r}, which is no finite number, so nothing could "
                "be held to it; write a number"
            )


def _refuse_silent_loosening(name: str, new: PrecisionBudgets, base: PrecisionBudgets | None) -> None:
    for key in ("noise", "rows"):
        if base and getattr(new, key) != getattr(base, key):
            raise UsageError(
                f"budgets file {name} changes {key!r} of {new.precision} to {getattr(new, key)!r}, so that other "
                f"values would be judged than the limits are for; restore {getattr(base, key)!r}"
            )
    for metric, budget in new.metrics.items():
        own = base.metrics.get(metric) if base else None
        if own and (budget.better, budget.noise_metric) != (own.better, own.noise_metric):
            raise UsageError(
                f"budgets file {name} changes 'better' or 'noise_metric' of {new.precision} {metric}, which say how it "
                "is measured and not how much is allowed; copy them from the shipped budgets.json"
            )
        # the shipped reason explains the shipped number, and no other
        explained = bool(budget.reason.strip()) and (own is None or budget.reason.strip() != own.reason.strip())
        if own and budget.k > own.k and not explained:
            raise UsageError(
                f"budgets file {name} raises k of {new.precision} {metric} from {own.k:g} to {budget.k:g} without a "
                "'reason' of its own, which would let more noise widen the limit; add the reason or restore the number"
            )
        origin = base.metrics[metric].value if base and metric in base.metrics else budget.start
        if budget.error(budget.value) > budget.error(origin) * (1 + 1e-12) and not explained:
            raise UsageError(
                f"budgets file {name} loosens {new.precision} {metric} from {origin:g} to {budget.value:g} without a "
                "'reason' of its own; a limit nobody can explain protects nothing, so give one or restore the number"
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
