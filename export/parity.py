"""Hold an exported bundle to a recorded reference run: `check_parity`.

Every file is read back from disk and runs on its real runtime. Whatever cannot be checked fails: a missing reference,
a changed file, an empty case set, a value that is not finite, a variant without a runtime.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pocketvlm
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import PocketvlmError, UsageError, unknown_name
from pocketvlm.export.budgets import Budgets, PrecisionBudgets, Status, load_budgets
from pocketvlm.export.compare import finite
from pocketvlm.export.mil import NAME as MIL
from pocketvlm.export.mil import NOT_MODELLED
from pocketvlm.export.onnx_weights import NOT_QUANTIZED, PER_TENSOR
from pocketvlm.export.parity_coreml import stage_evaluated
from pocketvlm.export.parity_depth import TapDrift, depth, first_departure
from pocketvlm.export.parity_pool import PooledTask, pooled_task_bound
from pocketvlm.export.parity_predictions import read_predictions, stage_predictions
from pocketvlm.export.parity_stages import (
    RUNTIMES,
    Outputs,
    StageResult,
    guarded,
    kept_to,
    open_runtime,
    query_keys,
    run_towers,
    stage_end_to_end,
    stage_ids,
    stage_pixels,
    stage_task,
    stage_towers,
)
from pocketvlm.export.parity_summary import parity_summary, write_parity_summary
from pocketvlm.export.parity_worst import Worst, worst_cases
from pocketvlm.export.reference_run import ReferenceRun, load_reference

__all__ = [
    "ParityReport",
    "PooledTask",
    "VariantReport",
    "check_parity",
    "parity_summary",
    "pooled_task_bound",
    "write_parity_summary",
]

SCHEMA_VERSION = "1.0"


@dataclass
class VariantReport:
    """One target at one precision. stages: in order. worst: the cases to look at first. depth: tower -> drift at each
    tap, or why there is none (`depth_note`). runtime: what ran its files; "coreml-mil" is this kit's evaluator of Core
    ML programs, and `not_modelled` says what that leaves open.

    status: "fail" if any stage failed, else "undecided" if one could not be decided, else "pass". failed_stage: the
    first stage that failed. A stage that is "not-compared" counts for nothing and is named in `message`.
    """

    target: str
    precision: str
    stages: list[StageResult]
    files: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    worst: list[Worst] = field(default_factory=list)
    depth: dict[str, list[TapDrift]] = field(default_factory=dict)
    depth_note: str = ""
    runtime: str = ""

    @property
    def not_modelled(self) -> str:
        """What the runtime leaves open, for people; empty for a real one."""
        return NOT_MODELLED if self.runtime == MIL else ""

    @property
    def name(self) -> str:
        return f"{self.target} {self.precision}"

    @property
    def status(self) -> Status:
        found = {stage.status for stage in self.stages}
        for status in ("fail", "undecided"):
            if status in found:
                return status  # type: ignore[return-value]
        return "pass" if found & {"pass"} else "fail"

    @property
    def failed_stage(self) -> str | None:
        return next((stage.stage for stage in self.stages if stage.status == "fail"), None)

    @property
    def message(self) -> str:
        """One sentence: the first failure, or what is open, or that all stages are within budget."""
        for status in ("fail", "undecided"):
            for stage in self.stages:
                if stage.status == status:
                    return f"{stage.stage} ({stage.title}): {stage.message}"
        open_ = self.not_compared
        return f"every compared stage is within its budget; {open_}" if open_ else "every stage is within its budget"

    @property
    def not_compared(self) -> str:
        """The stages that could not be compared, for people; empty where there is none."""
        names = [f"{stage.stage} ({stage.title})" for stage in self.stages if stage.status == "not-compared"]
        return f"not compared: {', '.join(names)}" if names else ""

    def stage(self, name: str) -> StageResult:
        """The stage called "S0" ... "S5"."""
        for stage in self.stages:
            if stage.stage == name:
                return stage
        raise unknown_name("stage of this report", name, [stage.stage for stage in self.stages])

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "precision": self.precision,
            "runtime": self.runtime,
            "not_modelled": self.not_modelled,
            "status": self.status,
            "failed_stage": self.failed_stage,
            "message": self.message,
            "seconds": round(self.seconds, 2),
            "files": self.files,
            "stages": [stage.to_dict() for stage in self.stages],
            "worst": [worst.to_dict() for worst in self.worst],
            "depth": {tower: [tap.to_dict() for tap in taps] for tower, taps in self.depth.items()},
            "depth_note": self.depth_note,
        }


@dataclass
class ParityReport:
    """Result of `check_parity`. preflight: the checks before any graph runs; a failure there leaves no variants.

    status: "pass", "undecided" (nothing failed, but some task result needs more queries), or "fail". exit_code: 0 for
    "pass" and "undecided", else 1.
    """

    model: str
    bundle: dict[str, Any]
    reference: dict[str, Any]
    budgets: dict[str, str]
    preflight: list[StageResult]
    variants: list[VariantReport]
    queries: dict[str, Sequence[str]] = field(default_factory=dict)
    date: str = ""

    @property
    def status(self) -> Status:
        if any(stage.status == "fail" for stage in self.preflight) or not self.variants:
            return "fail"
        found = {variant.status for variant in self.variants}
        if "fail" in found:
            return "fail"
        return "undecided" if "undecided" in found else "pass"

    @property
    def exit_code(self) -> int:
        return 0 if self.status in ("pass", "undecided") else 1

    @property
    def failed_stage(self) -> str | None:
        """First failed stage: of the preflight, else of the first failed variant."""
        stages = [stage for stage in self.preflight if stage.status == "fail"]
        if stages:
            return stages[0].stage
        return next((v.failed_stage for v in self.variants if v.failed_stage), None)

    @property
    def message(self) -> str:
        """One sentence for a terminal or a CI log."""
        for stage in self.preflight:
            if stage.status == "fail":
                return f"parity failed before any graph ran: {stage.message}"
        if not self.variants:
            return "parity failed: the bundle has no variant to check"
        for status in ("fail", "undecided"):
            for variant in self.variants:
                if variant.status == status:
                    return f"parity {'failed' if status == 'fail' else 'undecided'}: {variant.name}, {variant.message}"
        count = len(self.variants)
        open_ = next((f"; {variant.not_compared}" for variant in self.variants if variant.not_compared), "")
        here = [variant.name for variant in self.variants if variant.not_modelled]
        tail = f"; {', '.join(here)}: by {MIL}, not on a device" if here else ""
        return f"parity holds for {count} of {count} variants{open_}{tail}"

    def variant(self, target: str, precision: str) -> VariantReport:
        """The report of one variant."""
        for variant in self.variants:
            if (variant.target, variant.precision) == (target, precision):
                return variant
        raise unknown_name("variant of this report", f"{target} {precision}", [v.name for v in self.variants])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; pictures are left to the HTML report."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kit_version": pocketvlm.__version__,
            "date": self.date,
            "status": self.status,
            "failed_stage": self.failed_stage,
            "message": self.message,
            "model": self.model,
            "bundle": self.bundle,
            "reference": self.reference,
            "budgets": self.budgets,
            "preflight": [stage.to_dict() for stage in self.preflight],
            "variants": [variant.to_dict() for variant in self.variants],
            "queries": {key: list(value) for key, value in self.queries.items()},
        }

    def save(self, out: str | Path) -> Path:
        """Write parity.json and parity.html into the folder `out`; returns the path of the HTML file."""
        from pocketvlm.export.parity_report import render_html

        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / "parity.json").write_text(text + "\n", "utf-8")
        page = folder / "parity.html"
        page.write_text(render_html(self), "utf-8")
        return page


def check_parity(
    bundle_folder: str | Path,
    reference_folder: str | Path,
    *,
    out: str | Path | None = None,
    targets: Iterable[str] | None = None,
    budgets: str | Path | None = None,
    coreml_results: str | Path | None = None,
) -> ParityReport:
    """Compare every variant of a bundle with a reference run, stage by stage, against budgets.

    Args:
        bundle_folder: what `export_bundle` wrote (a folder or a zip).
        reference_folder: what `record_reference` wrote.
        out: folder for parity.json and parity.html (not inside the bundle, whose files are all listed and hashed).
        targets: "onnx", "executorch", "coreml", or with a precision, "onnx:int8"; None checks every variant.
        budgets: a budgets file of your own; None takes the shipped one.
        coreml_results: what the bundle's conformance/coreml_predict.py wrote on a Mac, judged beside `coreml-mil`.

    Returns:
        The report, also when parity fails: see `status`, `message` and `exit_code`.

    Raises:
        UsageError: `out` lies in the bundle, or the budgets file or the results of a Mac are wrong.
        UnknownNameError: no such target.
    """
    limits = load_budgets(budgets)
    predictions = read_predictions(coreml_results) if coreml_results is not None else None
    folder, wanted = Path(bundle_folder), list(targets) if targets is not None else None
    if out is not None and folder.is_dir() and Path(out).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"the report folder {str(out)!r} lies inside the bundle, whose every file is listed and hashed; the bundle "
            "would no longer load, so choose a folder outside"
        )
    report = ParityReport(
        model="", bundle={"name": folder.name}, reference={"name": Path(reference_folder).name},
        budgets={
            "file": limits.path, "version": limits.version, "sha256": limits.sha256,
            "whose": "shipped" if limits.shipped else "your own",
        },
        preflight=[], variants=[],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
    reference = _open_reference(reference_folder, report)
    bundle = _open_bundle(folder, report)
    if reference is not None and bundle is not None and _same_model(bundle, reference, report):
        report.queries = query_keys(reference)
        chosen = _chosen(bundle, wanted)
        if predictions is not None and not any(variant.target == "coreml" for variant in chosen):
            raise UsageError(
                f"results of a Mac were given ({Path(str(coreml_results)).name}) and no Core ML variant is checked; "
                "they would go unread, so leave them out or check the target coreml"
            )
        shared = [
            kept_to(guarded("S0", lambda: stage_pixels(bundle, reference)), reference),
            kept_to(guarded("S1", lambda: stage_ids(bundle, reference)), reference),
        ]
        for variant in chosen:
            checked = _check_variant(bundle, variant, reference, limits, shared)
            if predictions is not None and variant.target == "coreml":
                judge = partial(stage_predictions, bundle, variant, predictions)
                checked.stages.append(guarded("predict", judge))
            report.variants.append(checked)
        borrow_full_precision(report)
    if out is not None:
        report.save(out)
    return report


# --- before any graph runs ----------------------------------------------------------------------------------------


def _open_reference(folder: str | Path, report: ParityReport) -> ReferenceRun | None:
    try:
        reference = load_reference(folder)
        _ = reference.task
    except PocketvlmError as error:
        report.preflight.append(StageResult("reference", "fail", str(error)))
        return None
    report.reference |= {"sha256": reference.digest, "manifest": reference.manifest, "noise": reference.noise}
    report.preflight.append(
        StageResult("reference", "pass", f"{len(reference.manifest['files'])} files are as recorded")
    )
    return reference


def _open_bundle(folder: Path, report: ParityReport) -> Bundle | None:
    try:
        bundle = Bundle.load(folder)
    except PocketvlmError as error:
        report.preflight.append(StageResult("bundle", "fail", str(error)))
        return None
    report.model = bundle.contract.model_id
    report.bundle |= {
        "model_id": bundle.contract.model_id,
        "kit_version": bundle.raw.get("kit_version"),
        "created": bundle.raw.get("created"),
        "provenance": bundle.provenance,
        "licences": [asdict(row) for row in bundle.licences],
    }
    if not bundle.variants:
        report.preflight.append(
            StageResult("bundle", "fail", "the bundle has no variant, so there is nothing to check")
        )
        return None
    report.preflight.append(StageResult("bundle", "pass", f"{len(bundle.raw['files'])} files match their sha256"))
    return bundle


def _same_model(bundle: Bundle, reference: ReferenceRun, report: ParityReport) -> bool:
    """What makes two contracts one model; preprocessing is left to S0 and S1, which name it better."""
    ours, theirs = bundle.contract.to_dict(), reference.contract.to_dict()
    keys = ("model_id", "space_id", "kind", "embed_dim", "normalized", "logit_scale", "logit_bias", "labels")
    for key in keys:
        if ours[key] != theirs[key]:
            message = (
                f"{key} of the bundle is {ours[key]!r} and of the reference {theirs[key]!r}; they are different "
                "models, so record a reference of this bundle's model or give the right folder"
            )
            report.preflight.append(StageResult("identity", "fail", message))
            return False
    report.preflight.append(StageResult("identity", "pass", f"both are {ours['model_id']}"))
    return True


def _chosen(bundle: Bundle, wanted: list[str] | None) -> list[BundleVariant]:
    if wanted is None:
        return list(bundle.variants)
    chosen: list[BundleVariant] = []
    for name in wanted:
        target, _, precision = name.partition(":")
        found = [v for v in bundle.variants if v.target == target and precision in ("", v.precision)]
        if not found:
            known = {v.target for v in bundle.variants} | {f"{v.target}:{v.precision}" for v in bundle.variants}
            raise unknown_name("target of this bundle", name, known)
        chosen += [variant for variant in found if variant not in chosen]
    if not chosen:
        raise UsageError("an empty list of targets was given, which would check nothing; leave it out to check all")
    return chosen


# --- one variant --------------------------------------------------------------------------------------------------


def _check_variant(
    bundle: Bundle,
    variant: BundleVariant,
    reference: ReferenceRun,
    limits: Budgets,
    shared: list[StageResult],
) -> VariantReport:
    started = time.perf_counter()
    report = VariantReport(variant.target, variant.precision, list(shared), files=bundle.hashes(variant))
    stage = "S2" if variant.precision == "fp32" else "S3"
    try:
        budgets = limits.for_precision(variant.precision)
    except PocketvlmError as error:
        report.stages.append(StageResult(stage, "fail", str(error)))
        return report
    if variant.target not in RUNTIMES:
        message = f"no runtime of this kit runs {variant.target!r} files, so nothing was proved about them"
        report.stages.append(StageResult(stage, "fail", message))
    else:
        report.runtime = RUNTIMES[variant.target]
        _run_stages(report, stage, bundle, variant, reference, budgets)
    report.seconds = time.perf_counter() - started
    return report


def _run_stages(
    report: VariantReport,
    stage: str,
    bundle: Bundle,
    variant: BundleVariant,
    reference: ReferenceRun,
    budgets: PrecisionBudgets,
) -> None:
    held: list[Outputs] = []

    def towers() -> StageResult:
        if variant.target == "coreml":
            return stage_evaluated(stage, held, bundle, variant, reference, budgets)
        held.append(run_towers(open_runtime(bundle, variant), reference))
        return stage_towers(stage, bundle, held[0], variant, reference, budgets)

    report.stages.append(guarded(stage, towers))
    _follow_depth(report, bundle, variant, reference)
    if not held:
        missing = "the graph did not run"
        report.stages += [StageResult(name, "not-run", missing) for name in ("S4", "S5")]
        return
    report.stages.append(guarded("S4", lambda: stage_end_to_end(bundle, variant, reference, budgets)))

    def task() -> StageResult:
        result, changes = stage_task(held[0], variant, reference, budgets)
        report.worst = worst_cases(held[0], variant, reference, changes, budgets)
        return result

    report.stages.append(guarded("S5", task))


def _follow_depth(report: VariantReport, bundle: Bundle, variant: BundleVariant, reference: ReferenceRun) -> None:
    """Drift over depth, where a file shows its inner values; it explains a verdict and is no part of one."""
    full = next((v for v in bundle.variants if (v.target, v.precision, v.dim) == ("onnx", "fp32", variant.dim)), None)
    if variant.target != "onnx" or full is None:
        report.depth_note = (
            f"{variant.target} files do not show their inner values"
            if variant.target != "onnx"
            else "the bundle has no onnx fp32 variant to compare inner values with"
        )
        return
    try:
        report.depth = depth(bundle, variant, full, reference)
    except Exception as error:  # a file that does not run has failed its stage already
        reason = (str(error).splitlines() or [""])[0][:200]
        report.depth_note = f"inner values could not be read ({type(error).__name__}: {reason})"
        return
    explain_by_depth(report)


def explain_by_depth(report: VariantReport) -> None:
    """Let the sentence of a failed S2 or S3 name the block where it began."""
    own_stage = "S2" if report.precision == "fp32" else "S3"
    stage = next((s for s in report.stages if s.stage == own_stage and s.status == "fail"), None)
    failed = next((check for check in stage.checks if check.status == "fail"), None) if stage else None
    if stage is None or failed is None:
        return
    if report.precision == "fp32":
        departed = first_departure(report.depth)
        stage.message += f"; the first block that departs is in the {departed}" if departed else ""
    own = [tap for tap in report.depth.get(failed.where, []) if tap.own is not None]
    if own and failed.metric not in (PER_TENSOR, NOT_QUANTIZED):
        worst = max(own, key=lambda tap: tap.own or 0.0)
        stage.message += f"; the largest error of its own has {worst.tap}, {worst.own:.1e}"


def borrow_full_precision(report: ParityReport) -> None:
    """A reduced-precision row also shows how its target's full-precision graph did, so that blame falls rightly."""
    for variant in report.variants:
        if variant.precision == "fp32":
            continue
        twin = next((v for v in report.variants if v.target == variant.target and v.precision == "fp32"), None)
        stage = next((s for s in twin.stages if s.stage == "S2"), None) if twin else None
        if stage is None:
            shown = StageResult("S2", "not-run", f"the bundle was not checked with a {variant.target} fp32 variant")
        else:
            # its failure is that variant's own; here it is only a pointer
            status: Status = "not-run" if stage.status == "fail" else stage.status
            shown = StageResult("S2", status, f"of {twin.name if twin else ''}: {stage.message}")
        variant.stages.insert(2, shown)
