"""Judge a written parity.json by other budgets: from the numbers that it holds, without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketvlm.edge.errors import PocketvlmError, UsageError, VersionError
from pocketvlm.export.budgets import Budgets, Check, PrecisionBudgets, load_budgets
from pocketvlm.export.compare import PairedChange
from pocketvlm.export.parity import SCHEMA_VERSION, ParityReport, VariantReport, borrow_full_precision, explain_by_depth
from pocketvlm.export.parity_depth import TapDrift
from pocketvlm.export.parity_stages import JUDGED_AT, StageResult, judged
from pocketvlm.export.parity_worst import Result, Worst

# stages whose checks are held against budgets; S0, S1 and what comes before them are exact
_BUDGETED = ("S2", "S3", "S4", "S5")
_AGAIN = "run 'pocketvlm parity BUNDLE --reference DIR' again"


def rethreshold(report: str | Path | Mapping[str, Any], budgets: str | Path | None = None) -> ParityReport:
    """The same measurements under other budgets.

    What failed for another reason than a budget (an error, another model, different pixels) stays failed. Pictures are
    not in a parity.json, so the HTML of the result shows the worst cases without them.

    Args:
        report: a parity.json, or what it holds.
        budgets: a budgets file of your own; None takes the shipped one.

    Raises:
        UsageError: no such file, no parity report, or one that lacks what these budgets ask for (another tie width, a
            metric that was not measured). VersionError: a report of another schema.
    """
    value = _read(report)
    limits = load_budgets(budgets)
    measured = str(value["budgets"].get("measured") or value["date"])
    found = ParityReport(
        model=value["model"],
        bundle=value["bundle"],
        reference=value["reference"],
        budgets={
            "file": limits.path, "version": limits.version, "sha256": limits.sha256,
            "whose": "shipped" if limits.shipped else "your own", "measured": measured,
        },
        preflight=[_stage(entry) for entry in value["preflight"]],
        variants=[],
        queries=value["queries"],
        date=value["date"],
    )  # fmt: skip
    noise = value["reference"].get("noise", {})
    found.variants = [_variant(entry, limits, noise) for entry in value["variants"]]
    borrow_full_precision(found)
    return found


def _read(report: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(report, Mapping):
        value: Any = report
    else:
        try:
            value = json.loads(Path(report).read_text("utf-8"))
        except OSError as error:
            raise UsageError(
                f"report {str(report)!r} cannot be read ({error.strerror}); nothing was judged, so give the "
                "parity.json that 'pocketvlm parity --out' wrote"
            ) from error
        except ValueError as error:
            raise UsageError(f"report {str(report)!r} is not JSON; nothing was judged, so {_AGAIN}") from error
    if not isinstance(value, Mapping) or not {"schema_version", "variants", "preflight", "queries"} <= set(value):
        raise UsageError(f"the report given is no parity.json; nothing was judged, so {_AGAIN}")
    if str(value["schema_version"]).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise VersionError(
            f"the report has schema {value['schema_version']} and this release reads {SCHEMA_VERSION}; its numbers "
            f"could be misread, so {_AGAIN}"
        )
    return value


def _stage(entry: Mapping[str, Any]) -> StageResult:
    checks = [Check(**check) for check in entry["checks"]]
    return StageResult(entry["stage"], entry["status"], entry["message"], checks, dict(entry["details"]))


def _variant(entry: Mapping[str, Any], limits: Budgets, noise: Mapping[str, Any]) -> VariantReport:
    own = "S2" if entry["precision"] == "fp32" else "S3"
    # the row of the full-precision twin is put in anew, when that is judged
    stages = [_stage(stage) for stage in entry["stages"] if own == "S2" or stage["stage"] != "S2"]
    report = VariantReport(
        entry["target"], entry["precision"], stages, dict(entry["files"]), entry["seconds"],
        [_worst(case) for case in entry["worst"]],
        {tower: [TapDrift(**tap) for tap in taps] for tower, taps in entry.get("depth", {}).items()},
        entry.get("depth_note", ""),
    )  # fmt: skip
    try:
        budgets = limits.for_precision(entry["precision"])
    except PocketvlmError as error:
        report.stages = [s for s in stages if s.stage in ("S0", "S1")] + [StageResult(own, "fail", str(error))]
        return report
    report.stages = [_judged_again(stage, report.name, budgets, noise) for stage in stages]
    explain_by_depth(report)
    return report


def _worst(entry: Mapping[str, Any]) -> Worst:
    lists = {side: [Result(**result) for result in entry[side]] for side in ("reference", "candidate")}
    return Worst(**{**entry, **lists}, pixels=None)


def _judged_again(stage: StageResult, name: str, budgets: PrecisionBudgets, noise: Mapping[str, Any]) -> StageResult:
    if stage.stage not in _BUDGETED or not stage.checks:
        # nothing was held against a budget there: an error, or a runtime that is not here
        return stage
    if stage.stage == "S5":
        width = budgets.tie_width(noise)
        if abs(width - float(stage.details["tie_width"])) > 1e-12:
            raise UsageError(
                f"{name} was measured with near ties of {stage.details['tie_width']:.3g} and these budgets ask for "
                f"{width:.3g}; the report does not hold the scores that this needs, so {_AGAIN}"
            )
    missing = _unmeasured(stage, budgets)
    if missing:
        raise UsageError(
            f"these budgets limit {', '.join(missing)} of {name}, which {stage.stage} did not judge when the report "
            f"was written; it would pass unseen, so {_AGAIN} with these budgets"
        )
    checks = [_check(check, stage, budgets, noise) for check in stage.checks]
    return judged(stage.stage, checks, stage.details, stage.message if stage.status == "pass" else "")


def _unmeasured(stage: StageResult, budgets: PrecisionBudgets) -> list[str]:
    task = ("hard_changes", "top1_agreement", "top10_overlap", "task_loss")
    asked = [m for m in budgets.metrics if (m in task) == (stage.stage == "S5")]
    if stage.stage == "S4":
        # headroom belongs to the graph
        asked = [m for m in asked if m != "fp16_headroom"]
    return [m for m in asked if m not in {check.metric for check in stage.checks}]


def _check(check: Check, stage: StageResult, budgets: PrecisionBudgets, noise: Mapping[str, Any]) -> Check:
    if check.metric not in budgets.metrics:
        return check  # a fixed limit of this kit, in no budgets file
    if check.metric == "task_loss":
        direction = check.where.rsplit(" ", 1)[0]
        change = stage.details[direction]["changes"][str(JUDGED_AT[direction])]
        return budgets.judge_task(PairedChange(**{**change, "interval": tuple(change["interval"])}), check.where)
    floor = noise.get(budgets.noise, {}).get(check.where) if budgets.noise else None
    again = budgets.judge(check.metric, check.value, check.where, floor)
    # which case it was is still so
    return replace(again, note=check.note) if again.status == check.status == "fail" else again
