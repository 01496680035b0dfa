"""The verdict as it travels with the model: the `parity` field of bundle.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketvlm.edge.bundle import MANIFEST
from pocketvlm.edge.errors import UsageError
from pocketvlm.export.compare import finite
from pocketvlm.export.parity_stages import JUDGED_AT

if TYPE_CHECKING:
    from pocketvlm.export.parity import ParityReport, VariantReport


def write_parity_summary(bundle_folder: str | Path, report: ParityReport) -> None:
    """Replace the `parity` field of bundle.json by this report's summary, atomically.

    bundle.json is not among the files that it hashes, so the bundle stays valid. The summary names the sha256 of the
    model files that were checked.

    Raises:
        UsageError: not a bundle folder, or the report is about another model or about other files.
    """
    files = {name: digest for variant in report.variants for name, digest in variant.files.items()}
    write_verdict(bundle_folder, report.model, files, parity_summary(report))


def write_verdict(
    bundle_folder: str | Path, model_id: str, files: Mapping[str, str], summary: list[dict[str, Any]]
) -> None:
    """`write_parity_summary` of a bundle of any kind. files: the model files that were checked, with their sha256."""
    path = Path(bundle_folder) / MANIFEST
    if not path.is_file():
        raise UsageError(f"folder {str(bundle_folder)!r} holds no {MANIFEST}; unzip the bundle before writing into it")
    raw = json.loads(path.read_text("utf-8"))
    if raw["contract"]["model_id"] != model_id:
        raise UsageError(
            f"the parity report is about {model_id!r} and the bundle holds {raw['contract']['model_id']!r}; its "
            "verdict would be a false promise, so check this bundle itself"
        )
    for name, digest in files.items():
        if raw["files"].get(name, {}).get("sha256") != digest:
            raise UsageError(f"{name} changed since it was checked; run parity again before writing its verdict")
    raw["parity"] = summary
    part = path.with_name(MANIFEST + ".part")
    try:
        part.write_text(json.dumps(finite(raw), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def parity_summary(report: ParityReport) -> list[dict[str, Any]]:
    """One short entry per variant for bundle.json: the verdict, the main numbers, and what they were held to."""
    manifest = report.reference.get("manifest", {})
    about = {
        "reference": {
            "sha256": report.reference.get("sha256"),
            "dtype": manifest.get("numerics", {}).get("dtype"),
            "device": manifest.get("environment", {}).get("device"),
        },
        "budgets": report.budgets["version"],
        "date": report.date,
    }
    return [
        {
            "target": variant.target,
            "precision": variant.precision,
            "status": variant.status,
            "failed_stage": variant.failed_stage,
            "message": variant.message,
            "stages": {stage.stage: stage.status for stage in variant.stages},
            **_numbers(variant),
            **about,
        }
        for variant in report.variants
    ]


def _numbers(variant: VariantReport) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for stage in variant.stages:
        own = "S2" if variant.precision == "fp32" else "S3"
        if stage.stage == own and "rows" in stage.details.get("image", {}):
            result |= {
                tower: {
                    key: stage.details[tower][key]
                    for key in ("rows", "cosine_mean", "cosine_p1", "cosine_min", "sqnr_db", "non_finite")
                }
                for tower in ("image", "text")
            }
        if stage.stage == "S5":
            result["task"] = {
                direction: {
                    "queries": entry["queries"],
                    "k": JUDGED_AT[direction],
                    "reference": entry["recall_reference"][str(JUDGED_AT[direction])],
                    "candidate": entry["recall_candidate"][str(JUDGED_AT[direction])],
                    "loss_bound_95": entry["changes"][str(JUDGED_AT[direction])]["bound"],
                    "top1_agreement": entry["top1_agreement"],
                    "top10_overlap": entry["top10_overlap"],
                }
                for direction, entry in stage.details.items()
                if direction in JUDGED_AT
            }
    return result
