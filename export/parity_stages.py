"""The stages of a parity check: S0 bytes to pixels, S1 text to ids, S2/S3 towers, S4 end to end, S5 task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends import Backend, open_backend
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.contract import ImageSpec, TextSpec
from pocketvlm.edge.errors import BadSampleError, PocketvlmError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.budgets import Check, PrecisionBudgets, Status
from pocketvlm.export.compare import (
    RankingChange,
    drift,
    expected_calibration_error,
    mean_margin,
    plain,
    ranking_change,
    row_error,
    target_ranks,
)
from pocketvlm.export.mil import NAME as MIL
from pocketvlm.export.mil import MilBackend
from pocketvlm.export.onnx_weights import NOT_QUANTIZED, PER_TENSOR, check_scales
from pocketvlm.export.parity_classify import check_classification
from pocketvlm.export.reference_run import ReferenceRun
from pocketvlm.export.reference_show import fp16_headroom

TITLES = {
    "reference": "reference is complete",
    "bundle": "bundle is complete",
    "identity": "bundle and reference are one model",
    "S0": "bytes to pixels",
    "S1": "text to ids",
    "S2": "full-precision graph",
    "S3": "chosen precision",
    "S4": "end to end",
    "S5": "task",
    "predict": "predictions of a Mac",
}
# target in a bundle -> what runs it here
RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": MIL}
DIRECTIONS = ("image-to-text", "text-to-image", "zero-shot")
# the k at which a direction's loss is judged: the floor is on R@5, published tables are on top-1 accuracy
JUDGED_AT = {"image-to-text": 5, "text-to-image": 5, "zero-shot": 1}
_NAMES = {
    "non_finite": "non-finite values",
    "one_minus_cosine_max": "1 - cosine (worst)",
    "one_minus_cosine_mean": "1 - cosine (mean)",
    "one_minus_cosine_p99": "1 - cosine (99th percentile)",
    "sqnr_db": "SQNR",
    "norm_error": "|norm - 1|",
    "hard_changes": "hits changed without a tie",
    "top1_agreement": "top-1 agreement",
    "top10_overlap": "top-10 overlap",
    "task_loss": "task loss",
    "fp16_headroom": "fp16 headroom",
    PER_TENSOR: "weights with one scale for the whole tensor",
    NOT_QUANTIZED: "files without integer weights",
    "probability": "|probability - expected|",
}

# metrics whose note says which case, or how many queries, and so belongs to the sentence
_EXPLAINED = ("task_loss", "non_finite", "one_minus_cosine_max", PER_TENSOR, NOT_QUANTIZED)
Embeddings = dict[str, NDArray[np.float64]]


@dataclass
class StageResult:
    """One stage of one variant. message: one sentence, for people. checks: judged numbers. details: the others."""

    stage: str
    status: Status
    message: str
    checks: list[Check] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return TITLES[self.stage]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "title": self.title, "checks": [check.to_dict() for check in self.checks]}


@dataclass
class Outputs:
    """What a runtime answered: "cases" and "task" rows per tower, "prompt" rows, float64, as the runtime gave them."""

    image: NDArray[np.float64]
    text: NDArray[np.float64]
    task_image: NDArray[np.float64]
    task_text: NDArray[np.float64]
    prompt: NDArray[np.float64]


def metric_name(metric: str) -> str:
    """A metric for people."""
    return _NAMES.get(metric, metric)


def number(metric: str, value: float | None) -> str:
    """A metric's value with its unit."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if metric == "sqnr_db":
        return "identical" if value >= 300 else f"{value:.1f} dB"
    if metric in ("top1_agreement", "top10_overlap"):
        return f"{100 * value:.2f} %"
    if metric == "task_loss":
        return f"{100 * value:+.2f} points"
    if metric == "fp16_headroom":
        return f"{value:.3g} ×"
    if metric in ("non_finite", "hard_changes", "different cases", PER_TENSOR, NOT_QUANTIZED):
        return f"{value:.0f}"
    return f"{value:.2e}"


def judged(stage: str, checks: list[Check], details: dict[str, Any] | None = None, good: str = "") -> StageResult:
    """Stage result of judged numbers: fails at the first failed check; no check at all is a failure."""
    if not checks:
        return StageResult(
            stage, "fail", f"{stage} judged nothing, and nothing judged proves nothing", [], details or {}
        )
    failed = [check for check in checks if check.status == "fail"]
    open_ = [check for check in checks if check.status == "undecided"]
    if failed:
        first = failed[0]
        value, limit = number(first.metric, first.value), number(first.metric, first.limit)
        message = f"{first.where}: {metric_name(first.metric)} is {value}, the budget is {limit}"
        if first.metric in _EXPLAINED and first.note:
            message += f" ({first.note})"
        return StageResult(stage, "fail", message, checks, details or {})
    if open_:
        message = "; ".join(f"{check.where}: {check.note}" for check in open_)
        return StageResult(stage, "undecided", message, checks, details or {})
    return StageResult(stage, "pass", good or "within budget", checks, details or {})


def kept_to(result: StageResult, reference: ReferenceRun) -> StageResult:
    """`result`, or "not-compared" where the recording cannot vouch for that stage; a failure stays a failure."""
    reason = reference.not_compared.get(result.stage)
    if reason is None or result.status != "pass":
        return result
    return replace(result, status="not-compared", message=f"{reason}; by this kit's own, {result.message}")


def guarded(stage: str, step: Callable[[], StageResult]) -> StageResult:
    """Run a stage; whatever stops it is its failure, because an error proves nothing."""
    try:
        return step()
    except PocketvlmError as error:
        return StageResult(stage, "fail", str(error))
    except Exception as error:
        return StageResult(stage, "fail", f"the stage stopped with {type(error).__name__}: {error}")


# --- S0, S1 -------------------------------------------------------------------------------------------------------


def _spec_difference(bundle: ImageSpec | TextSpec | None, reference: ImageSpec | TextSpec | None) -> str:
    if bundle is None or reference is None:
        return "" if bundle is reference else "the bundle has no such tower"
    ours, theirs = asdict(bundle), asdict(reference)
    changed = [key for key in theirs if ours.get(key) != theirs[key]]
    return "; ".join(f"{key} is {ours.get(key)!r}, recorded was {theirs[key]!r}" for key in changed)


def stage_pixels(bundle: Bundle, reference: ReferenceRun) -> StageResult:
    """S0: every picture decodes and resizes to the recorded pixels, to the bit; bad ones are refused alike."""
    spec, wrong, largest = bundle.contract.image, [], 0
    difference = _spec_difference(spec, reference.contract.image)
    if spec is None:
        return StageResult("S0", "fail", "the bundle's contract has no image input, the reference has one")
    for record in reference.images:
        try:
            pixels = load_image(reference.image_bytes(record), spec)
        except BadSampleError as error:
            if error.reason != record.error:
                wrong.append(
                    f"{record.name} is refused as {error.reason!r}, recorded was {record.error or 'accepted'!r}"
                )
            continue
        if record.row is None:
            wrong.append(f"{record.name} is accepted and must be refused as {record.error!r}")
            continue
        expected = reference.arrays["pixels"][record.row]
        if pixels.shape != expected.shape:
            wrong.append(f"{record.name} becomes {list(pixels.shape)}, recorded was {list(expected.shape)}")
        elif not np.array_equal(pixels, expected):
            gap = np.abs(pixels.astype(int) - expected)
            largest = max(largest, int(gap.max()))
            wrong.append(f"{record.name} differs in {int((gap > 0).sum())} values by up to {int(gap.max())}")
    return _exact("S0", len(reference.images), wrong, difference, {"largest_difference": largest}, "pictures")


def stage_ids(bundle: Bundle, reference: ReferenceRun) -> StageResult:
    """S1: every text becomes the recorded ids; what is not a text is refused alike."""
    spec = bundle.contract.text
    difference = _spec_difference(spec, reference.contract.text)
    if spec is None or not bundle.raw.get("tokenizer"):
        return StageResult("S1", "fail", "the bundle has no tokenizer, the reference has one")
    tokenizer, wrong = Tokenizer(bundle.path(bundle.raw["tokenizer"]), spec), []
    for record in reference.texts:
        try:
            ids = tokenizer.encode([record.text])[0]
        except BadSampleError as error:
            if error.reason != record.error:
                wrong.append(
                    f"{record.name} is refused as {error.reason!r}, recorded was {record.error or 'accepted'!r}"
                )
            continue
        if record.row is None:
            wrong.append(f"{record.name} is accepted and must be refused as {record.error!r}")
        elif not np.array_equal(ids, reference.arrays["ids"][record.row]):
            wrong.append(f"{record.name} gives other ids than recorded")
    return _exact("S1", len(reference.texts), wrong, difference, {}, "texts")


def _exact(
    stage: str, cases: int, wrong: list[str], difference: str, details: dict[str, Any], what: str
) -> StageResult:
    details |= {"cases": cases, "different": len(wrong), "examples": wrong[:10]}
    check = Check(
        "different cases", what, float(len(wrong)), 0.0, "lower", "fail" if wrong or difference else "pass",
        "parity.md: S0 and S1 are exact",
    )  # fmt: skip
    if wrong or difference or not cases:
        first = "; ".join(filter(None, [difference, wrong[0] if wrong else ""])) or "there is no case"
        message = f"{len(wrong)} of {cases} {what} are not as recorded; first: {first}"
        return StageResult(stage, "fail", message, [check], details)
    return StageResult(stage, "pass", f"{cases} of {cases} {what} are equal to the bit", [check], details)


# --- S2, S3 -------------------------------------------------------------------------------------------------------


def open_runtime(bundle: Bundle, variant: BundleVariant) -> Backend:
    """What runs a variant's files on this machine: the real runtime, or the evaluator of Core ML programs.

    Raises:
        PocketvlmError: the runtime is missing or cannot load the files.
    """
    if RUNTIMES[variant.target] == MIL:
        return MilBackend({tower: bundle.path(name) for tower, name in variant.files.items()})
    return open_backend(variant.target, bundle.folder, variant, None)


def run_towers(backend: Backend, reference: ReferenceRun) -> Outputs:
    """Every recorded input through a runtime."""
    task, arrays = reference.task, reference.arrays

    def image(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        return _batched(backend.run_image, pixels)

    def text(ids: NDArray[np.int32]) -> NDArray[np.float64]:
        return _batched(backend.run_text, ids) if len(ids) else np.zeros((0, task.text.shape[1]))

    return Outputs(
        image(arrays["pixels"]), text(arrays["ids"]), image(task.pixels), text(task.ids), text(task.prompt_ids)
    )


def _batched(run: Callable[[Any], NDArray[np.float32]], rows: Any, size: int = 32) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(run(rows[i : i + size]), np.float64) for i in range(0, len(rows), size)])


def prefix(rows: NDArray[np.float64], dim: int | None) -> NDArray[np.float64]:
    """The first `dim` components of unit rows, normalised again (all of them if dim is None)."""
    if dim is None or dim == rows.shape[1]:
        return rows
    cut = rows[:, :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)


def stage_towers(
    stage: str,
    bundle: Bundle,
    outputs: Outputs,
    variant: BundleVariant,
    reference: ReferenceRun,
    budgets: PrecisionBudgets,
) -> StageResult:
    """S2 or S3: each tower's unit embeddings against the recorded ones, over cases and task inputs.

    First what good embeddings can hide: no headroom in float16 (a value that saturates before a LayerNorm leaves no
    trace in the answer), and weights rounded by one scale for a whole tensor.
    """
    checks: list[Check] = []
    details: dict[str, Any] = {}
    task = reference.task
    if "fp16_headroom" in budgets.metrics:
        for tower, (factor, tap) in fp16_headroom(reference).items():
            checks.append(budgets.judge("fp16_headroom", factor, f"{tower} at {tap}"))
    checks += check_scales(bundle, variant, details)
    for tower, cases, inputs, recorded in (
        ("image", outputs.image, outputs.task_image, task.image),
        ("text", outputs.text, outputs.task_text, task.text),
    ):
        expected = prefix(np.concatenate([reference.arrays[tower], recorded]), variant.dim)
        actual = np.concatenate([cases, inputs])
        real = np.concatenate([reference.real_rows(tower), np.ones(len(recorded), dtype=bool)])
        names = case_names(reference, tower) + list(task.uids if tower == "image" else task.texts)
        _judge_tower(tower, expected, actual, real, names, reference, budgets, checks, details)
    towers = [details["image"], details["text"]]
    good = (
        f"worst 1 - cosine {max(t['one_minus_cosine_max'] or 0 for t in towers):.1e}, SQNR "
        f"{min(t['sqnr_db'] or 0 for t in towers):.1f} dB over {towers[0]['rows']} "
        f"pictures and {towers[1]['rows']} texts"
    )
    return judged(stage, checks, details, good)


def _judge_tower(
    tower: str,
    expected: NDArray[np.float64],
    actual: NDArray[np.float64],
    real: NDArray[np.bool_],
    names: list[str],
    reference: ReferenceRun,
    budgets: PrecisionBudgets,
    checks: list[Check],
    details: dict[str, Any],
) -> None:
    everything = drift(expected, actual)
    worst = names[everything.worst]
    broken = np.flatnonzero(~np.isfinite(actual).all(axis=1))
    details[tower] = everything.to_dict() | {"worst_case": worst}
    if budgets.rows == "real":
        details[f"{tower}, real only"] = drift(expected[real], actual[real]).to_dict()
        if (~real).any():
            details[f"{tower}, generated only"] = drift(expected[~real], actual[~real]).to_dict()
    values = details[f"{tower}, real only"] if budgets.rows == "real" else details[tower]
    noise = reference.noise.get(budgets.noise, {}).get(tower) if budgets.noise else None
    for metric in budgets.metrics:
        if metric == "non_finite":
            check = budgets.judge(metric, everything.non_finite, tower)
            if len(broken):
                check = replace(check, note=f"in {len(broken)} of {len(names)} cases, first {names[broken[0]]!r}")
            checks.append(check)
        elif metric in values:
            check = budgets.judge(metric, values[metric], tower, noise)
            if metric == "one_minus_cosine_max" and check.status == "fail" and not len(broken):
                check = replace(check, note=f"at {worst!r}")
            checks.append(check)


def case_names(reference: ReferenceRun, tower: str) -> list[str]:
    """Names of the golden cases of a tower that have a row, in the order of their rows."""
    records: Sequence[Any] = reference.images if tower == "image" else reference.texts
    return [record.name for record in records if record.row is not None]


# --- S4 -----------------------------------------------------------------------------------------------------------


def stage_end_to_end(
    bundle: Bundle, variant: BundleVariant, reference: ReferenceRun, budgets: PrecisionBudgets
) -> StageResult:
    """S4: bytes and strings through `EdgeModel`, as an application would call it; bad inputs are refused alike."""
    model = EdgeModel(bundle, variant, open_runtime(bundle, variant), None)
    images = [record for record in reference.images if record.row is not None]
    texts = [record for record in reference.texts if record.row is not None]
    steps: list[tuple[Any, Callable[[], Any]]] = []
    steps += [(r, partial(model.embed_image, reference.image_bytes(r))) for r in reference.images if r.error]
    steps += [(r, partial(model.embed_text, [r.text])) for r in reference.texts if r.error]
    wrong = [fault for record, step in steps if (fault := _accepted(step, record))]
    if wrong:
        return StageResult("S4", "fail", wrong[0], [], {"refusals": wrong})
    checks: list[Check] = []
    details: dict[str, Any] = {"refused": len(steps)}
    embedded = {
        "image": model.embed_image([reference.image_bytes(record) for record in images]).astype(np.float64),
        "text": model.embed_text([str(record.text) for record in texts]).astype(np.float64),
    }
    singles = {
        "image": np.concatenate([model.embed_image(reference.image_bytes(record)) for record in images[:4]]),
        "text": np.concatenate([model.embed_text(str(record.text)) for record in texts[:4]]),
    }
    for tower, actual in embedded.items():
        expected = prefix(reference.arrays[tower], variant.dim)
        real = reference.real_rows(tower)
        _judge_tower(tower, expected, actual, real, case_names(reference, tower), reference, budgets, checks, details)
        details[f"{tower}, one at a time against a batch"] = plain(row_error(actual[:4], singles[tower]).max())
        if "one_minus_cosine_max" in budgets.metrics:
            worst = float(row_error(expected[:4], singles[tower]).max())
            checks.append(budgets.judge("one_minus_cosine_max", worst, f"{tower}, one at a time"))
    checks.append(check_classification(model, reference, [r for r in images if r.real], [r for r in texts if r.real]))
    good = f"{len(images)} pictures and {len(texts)} texts embedded, {details['refused']} bad inputs refused"
    return judged("S4", checks, details, good)


def _accepted(step: Callable[[], Any], record: Any) -> str:
    try:
        step()
    except BadSampleError as error:
        if error.reason == record.error:
            return ""
        return f"{record.name} must be refused as {record.error!r} and was refused as {error.reason!r}"
    return f"{record.name} must be refused as {record.error!r} and was embedded"


# --- S5 -----------------------------------------------------------------------------------------------------------


@dataclass
class TaskScores:
    """Score matrices of one direction: reference and candidate [queries, gallery], and what counts as a hit."""

    reference: NDArray[np.float64]
    candidate: NDArray[np.float64]
    positives: NDArray[np.bool_]


def task_scores(outputs: Outputs, variant: BundleVariant, reference: ReferenceRun) -> dict[str, TaskScores]:
    """direction -> score matrices; "zero-shot" only where the data has labels."""
    task = reference.task
    image, text = prefix(task.image, variant.dim), prefix(task.text, variant.dim)
    ours, theirs = image @ text.T, outputs.task_image @ outputs.task_text.T
    scores = {
        "image-to-text": TaskScores(ours, theirs, task.positives),
        "text-to-image": TaskScores(ours.T.copy(), theirs.T.copy(), task.positives.T.copy()),
    }
    if task.labels:
        hit = np.zeros((len(image), len(task.labels)), dtype=bool)
        hit[np.arange(len(image)), task.label_of] = True
        prompt = prefix(task.prompt, variant.dim)
        scores["zero-shot"] = TaskScores(image @ prompt.T, outputs.task_image @ outputs.prompt.T, hit)
    return scores


def stage_task(
    outputs: Outputs, variant: BundleVariant, reference: ReferenceRun, budgets: PrecisionBudgets
) -> tuple[StageResult, dict[str, RankingChange]]:
    """S5: retrieval both ways and zero-shot classification over held-out concepts, query by query."""
    tie = budgets.tie_width(reference.noise)
    checks: list[Check] = []
    details: dict[str, Any] = {"tie_width": tie}
    changes: dict[str, RankingChange] = {}
    for direction, scores in task_scores(outputs, variant, reference).items():
        change = ranking_change(scores.reference, scores.candidate, scores.positives, tie=tie)
        changes[direction] = change
        entry = change.to_dict()
        entry["mean_margin"] = {"reference": mean_margin(scores.reference), "candidate": mean_margin(scores.candidate)}
        entry["outcomes"] = {str(k): _outcomes(change, k) for k in change.changes}
        if direction == "zero-shot":
            scale, target = reference.contract.logit_scale, reference.task.label_of
            entry["calibration_error"] = {
                "reference": expected_calibration_error(scores.reference, target, scale),
                "candidate": expected_calibration_error(scores.candidate, target, scale),
            }
        details[direction] = entry
        for metric in ("hard_changes", "top1_agreement", "top10_overlap"):
            if metric in budgets.metrics:
                checks.append(budgets.judge(metric, entry[metric], direction))
        if "task_loss" in budgets.metrics:
            k = JUDGED_AT[direction]
            checks.append(budgets.judge_task(change.changes[k], f"{direction} {'top-1' if k == 1 else f'R@{k}'}"))
    details["mixed index"] = _mixed(outputs, variant, reference)
    good = ", ".join(
        f"{name} {'top-1' if JUDGED_AT[name] == 1 else 'R@5'} {100 * change.recall_reference[JUDGED_AT[name]]:.1f} → "
        f"{100 * change.recall_candidate[JUDGED_AT[name]]:.1f} %"
        for name, change in changes.items()
    )
    return judged("S5", checks, details, good), changes


def _mixed(outputs: Outputs, variant: BundleVariant, reference: ReferenceRun) -> dict[str, float]:
    """R@5 when one side was embedded by the reference and the other by this variant: an index built elsewhere."""
    task = reference.task
    gallery, index = prefix(task.text, variant.dim), prefix(task.image, variant.dim)
    pictures = target_ranks(outputs.task_image @ gallery.T, task.positives)
    texts = target_ranks(outputs.task_text @ index.T, task.positives.T)
    return {
        "picture queries, reference gallery, R@5": float((pictures <= 5).mean()),
        "text queries, reference gallery, R@5": float((texts <= 5).mean()),
    }


def _outcomes(change: RankingChange, k: int) -> str:
    """One character a query: "-" lost, "+" gained, "." as before."""
    before, after = change.ranks_reference <= k, change.ranks_candidate <= k
    return "".join("-" if a and not b else "+" if b and not a else "." for a, b in zip(before, after))


def query_keys(reference: ReferenceRun) -> dict[str, Sequence[str]]:
    """direction -> names of its queries, by which folds are pooled and repeats are recognised."""
    task = reference.task
    keys: dict[str, Sequence[str]] = {"image-to-text": task.uids, "text-to-image": task.texts}
    return keys | ({"zero-shot": task.uids} if task.labels else {})
