"""What Core ML answered on a Mac, judged here: the results file of a bundle's `conformance/coreml_predict.py`."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.bundle import Bundle, BundleVariant, check_schema_version
from pocketvlm.edge.conformance import DEFAULT_TOLERANCE
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.export.budgets import Check
from pocketvlm.export.compare import drift, row_error
from pocketvlm.export.mil import NAME, MilBackend
from pocketvlm.export.mil.coreml_predict import SCHEMA, cases
from pocketvlm.export.parity_stages import StageResult, judged

_KIND = "coreml-results"


def read_predictions(path: str | Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
        UsageError: it does not exist, or is not what the script writes. VersionError: a later form of it.
    """
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{str(path)!r} cannot be read as the results of a Mac ({error}); nothing was compared, so give the JSON "
            "file that conformance/coreml_predict.py wrote"
        ) from error
    if not isinstance(found, dict) or found.get("kind") != _KIND or not isinstance(found.get("variants"), list):
        raise UsageError(
            f"{str(path)!r} is not of kind {_KIND!r}; nothing was compared, so give the JSON file that "
            "conformance/coreml_predict.py wrote"
        )
    check_schema_version(found.get("schema"), "results of a Mac", SCHEMA)
    return found


def stage_predictions(bundle: Bundle, variant: BundleVariant, results: dict[str, Any]) -> StageResult:
    """Stage "predict": every conformance case against the float64 embedding that the bundle carries, within the
    vectors' own tolerance, and the distance from `coreml-mil`, which is what that evaluator does not model.

    Raises:
        IntegrityError: the results are of another model, other files or other cases, or of no case.
    """
    entry = _entry(bundle, variant, results)
    vectors = bundle.conformance()
    stated = vectors.get("tolerance") or {}
    limit = float(stated.get(variant.precision, DEFAULT_TOLERANCE.get(variant.precision, DEFAULT_TOLERANCE["int8"])))
    checks: list[Check] = []
    about = {key: results.get(key) for key in ("machine", "compute_units")}
    details: dict[str, Any] = {**about, "errors": entry.get("errors", {})}
    backend = MilBackend({tower: bundle.path(name) for tower, name in variant.files.items()})
    for tower in variant.files:
        expected, found = _rows(vectors, tower, entry, variant.dim)
        bad = int((~np.isfinite(found)).sum())
        worst = float(row_error(expected, found).max())
        source = "tolerance of the conformance vectors"
        checks.append(Check("non_finite", tower, bad, 0.0, "lower", "fail" if bad else "pass", source))
        good = math.isfinite(worst) and worst <= limit
        value = worst if math.isfinite(worst) else None
        checks.append(Check("one_minus_cosine_max", tower, value, limit, "lower", "pass" if good else "fail", source))
        size = bundle.contract.image.size if bundle.contract.image is not None else 0
        inputs = np.stack([row for _, row in cases(bundle.folder, tower, vectors, size)])
        ours = (backend.run_image if tower == "image" else backend.run_text)(inputs)
        details[tower] = drift(expected, found).to_dict()
        details[f"{tower}, against {NAME}"] = drift(ours, found).to_dict() if np.isfinite(ours).all() else None
        details[f"{tower}, median ms"] = float(np.median([row["ms"] for row in entry["towers"][tower]]))
    worst_of = ", ".join(f"{t} {details[t]['one_minus_cosine_max']:.1e}" for t in variant.files if not _bad(checks, t))
    machine = (results.get("machine") or {}).get("system", "unknown")
    good_message = f"worst 1 - cosine {worst_of} on {machine}, compute units {results.get('compute_units')}"
    return judged("predict", checks, details, good_message)


def _bad(checks: list[Check], tower: str) -> bool:
    return any(check.where == tower and check.value is None for check in checks)


def _entry(bundle: Bundle, variant: BundleVariant, results: dict[str, Any]) -> dict[str, Any]:
    again = "so copy this bundle to the Mac and run its conformance/coreml_predict.py again"
    if results.get("model_id") != bundle.contract.model_id:
        raise IntegrityError(
            f"the results of a Mac are of model {results.get('model_id')!r} and the bundle holds "
            f"{bundle.contract.model_id!r}; they prove nothing about it, {again}"
        )
    vectors = bundle.path(bundle.raw["conformance"])
    if results.get("vectors_sha256") != hashlib.sha256(vectors.read_bytes()).hexdigest():
        raise IntegrityError(f"the results of a Mac are of other conformance vectors; they cannot be compared, {again}")
    found = next(
        (e for e in results["variants"] if (e.get("precision"), e.get("dim")) == (variant.precision, variant.dim)), None
    )
    if found is None:
        raise IntegrityError(f"the results of a Mac have no {variant.precision} variant; nothing was compared, {again}")
    if errors := found.get("errors"):
        tower, message = next(iter(errors.items()))
        raise IntegrityError(
            f"the {tower} tower failed on the Mac ({message}); no phone could run it, so export it again"
        )
    files = bundle.raw["files"]
    for tower, package in variant.files.items():
        listed = {name: e["sha256"] for name, e in files.items() if name.startswith(package.rstrip("/") + "/")}
        given = {name: digest for name, digest in found["files"].items() if name in listed}
        if given != listed:
            raise IntegrityError(f"the {tower} package that the Mac ran has other bytes than this bundle's, {again}")
    return found


def _rows(
    vectors: dict[str, Any], tower: str, entry: dict[str, Any], dim: int | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(recorded, answered) rows in the order of the vectors; what was no number comes as NaN."""
    recorded = vectors["texts"] if tower == "text" else [case for case in vectors["images"] if "pixels_file" in case]
    answered = {row["name"]: row["embedding"] for row in entry["towers"].get(tower, [])}
    missing = [case["name"] for case in recorded if case["name"] not in answered]
    if missing or not recorded:
        raise IntegrityError(
            f"the results of a Mac lack {len(missing)} of {len(recorded)} {tower} cases "
            f"({', '.join(missing[:3]) or 'there is none'}); nothing may be left out, so run the script again"
        )
    expected = np.array([case["embedding"][:dim] for case in recorded], np.float64)
    # None becomes NaN
    found = [np.array(answered[case["name"]], np.float64) for case in recorded]
    wrong = next((row.shape for row in found if row.shape != expected.shape[1:]), None)
    if wrong is not None:
        raise IntegrityError(
            f"the Mac answered {tower} embeddings of shape {list(wrong)}, expected {list(expected.shape[1:])}; the "
            "package is of another model, so export it again"
        )
    return expected, np.stack(found)
