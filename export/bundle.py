"""The bundle writer: every variant, what it takes to run and to check them, in one folder that appears at once.

`edge.bundle` reads what this writes and documents the layout. Nothing is dropped silently: a target that cannot be
written, or a full-precision file that does not compute what the model computes, stops the export.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pocketvlm
from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import RECIPE
from pocketvlm.edge.bundle import MANIFEST, SCHEMA_VERSION, describe_files
from pocketvlm.edge.bundle_write import check_out, staged
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError
from pocketvlm.export.bundle_table import VariantRow, format_table, summarize
from pocketvlm.export.calibration import DEFAULT_SIZE, open_calibration
from pocketvlm.export.cases import ImageCase, golden_images
from pocketvlm.export.conformance import VECTORS, Vectors, double_rows, widen_tolerance, write_vectors
from pocketvlm.export.fidelity import split_calibration
from pocketvlm.export.finetune import Finetune, finetune_export
from pocketvlm.export.labels import BARE, bake_labels
from pocketvlm.export.mil import PREDICT_SCRIPT
from pocketvlm.export.mixed import PLAN_FILE, Plan, load_plan
from pocketvlm.export.optimum_files import OptimumFiles
from pocketvlm.export.probe import Probe, probe_variants
from pocketvlm.export.source import Exportable, Source, open_source
from pocketvlm.export.targets import Calibration, Target, Variant, check_precision, list_targets
from pocketvlm.export.targets.executorch_writer import BackgroundWriter
from pocketvlm.export.unlowered import lowering_error
from pocketvlm.export.wanted import check_plan_is_used, wanted_variants

__all__ = ["DEFAULT_TARGETS", "VariantRow", "export_bundle", "format_table", "summarize"]

DEFAULT_TARGETS = ("onnx", "executorch", "coreml")
# the floor for full precision against float64; int8 is judged by the parity check on real data
_FP32_LIMIT = 1e-6
_EXAMPLES = 8
_PACKAGES = (
    *("torch", "timm", "numpy", "Pillow", "tokenizers", "onnx", "onnxscript", "onnxruntime"),
    *("executorch", "torchao", "coremltools", "open_clip_torch", "transformers"),
)

Progress = Callable[[str], None]


def export_bundle(
    student_or_run: Source,
    out: str | Path,
    targets: Sequence[str | Target] = DEFAULT_TARGETS,
    precisions: Sequence[str] | None = None,
    calibration_data: str | Path | DataSource | Sequence[Sample] | Calibration | None = None,
    overwrite: bool = False,
    *,
    calibration_size: int = DEFAULT_SIZE,
    examples: Sequence[ImageCase] | None = None,
    plan: Plan | str | Path | None = None,
    labels: Sequence[str] | None = None,
    templates: str | Sequence[str] = BARE,
    finetune: Finetune | int | None = None,
    allow_download: bool = False,
    trust_remote_code: bool = False,
    processes: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Export a model to every target at every precision and write the bundle.

    Args:
        student_or_run: a `Student`, a run or student folder, "open_clip:..." or "hf:...", or an `Exportable`.
        out: the bundle folder; it appears complete or not at all.
        targets: of "onnx", "executorch", "coreml"; "onnx:int8" asks for one precision of one target. Or a `Target` of
            yours, such as files that were made elsewhere (`export.optimum_files`).
        precisions: of `export.precision.PRECISIONS`; each target writes those that it knows. None: each target's own
            few (`Target.defaults`).
        calibration_data: int8 and w8a8-static cannot do without, the other quantized precisions have their biases
            corrected with it and are judged by it: a `--data` spec, a data source, samples, or a ready `Calibration`.
            None: the training data of the run, where `student_or_run` is a run folder.
        overwrite: replace an existing bundle.
        calibration_size: pictures and texts to calibrate and judge with.
        examples: real pictures for the conformance vectors, which must be free to publish. None: eight of the
            calibration source where that is the built-in set, else none.
        plan: what stays in float in "mixed" variants, or its file (`export.mixed`); the bundle keeps a copy.
        labels: bake these into the graph: an image-only bundle whose output is a logit for each (`export.labels`).
        templates: the prompts that stand for a label.
        finetune: fine-tune with fake quantization before int8 and w4 are written (`export.finetune`), or its steps.
        allow_download, trust_remote_code: permit, for a hub id, the network, and code that lies beside its weights.
        processes: 2 lowers ExecuTorch programs in a process of their own while the other targets are written; the
            files are the same.
        progress: called with one line per step.

    Returns:
        The bundle folder. `summarize` gives its table.

    Raises:
        UsageError: `out` is not empty, nothing to export, a precision that no chosen target writes, or one that needs
            calibration data or a plan without it; a plan that fits another student, or that nothing would use.
        UnknownNameError: no such target or precision, or no such block in the model.
        MissingExtraError: a target's converter is not installed; names the extra.
        IntegrityError: a written file does not run or does not compute what the model computes.
    """
    out, say = Path(out), progress or (lambda line: None)
    check_out(out, overwrite)
    wanted = wanted_variants(targets, precisions)
    keep = load_plan(plan) if isinstance(plan, str | Path) else plan
    check_plan_is_used(keep, wanted)
    model = open_source(student_or_run, allow_download=allow_download, trust_remote_code=trust_remote_code)
    if labels is not None:
        model = bake_labels(model, labels, templates)
    if keep is not None:
        keep.check(model.towers.contract, {"image": model.towers.image, "text": model.towers.text})
    tokenizer = model.tokenizer()
    calibration, source = None, None
    data = calibration_data or data_of_run(student_or_run)
    if data is not None and any(precision != "fp32" for _, precision in wanted):
        say("reading calibration data")
        calibration, source = open_calibration(data, model.towers.contract, tokenizer, size=calibration_size)
        for warning in calibration.warnings if calibration is not None else ():
            say(f"WARNING: {warning}")
    for target, precision in wanted:
        if isinstance(target, OptimumFiles):
            continue  # calibrated by who made them
        # before anything slow is done
        check_precision(target, precision, calibration, keep)
    if finetune is not None:
        finetune_export(
            finetune, [(target.name, precision) for target, precision in wanted], model, calibration, data, say
        )
    if examples is None:
        examples = _examples(source)
    with staged(out, overwrite) as folder, _background(wanted, processes) as writer:
        if model.tokenizer_json is not None:
            assert model.towers.contract.text is not None
            (folder / model.towers.contract.text.tokenizer).write_bytes(model.tokenizer_json)
        say("computing conformance vectors in float64")
        vectors = write_vectors(folder, model.towers, tokenizer, examples=examples)
        lowered = {}
        for target, precision in _in_order(wanted, writer):
            say(f"lowering to {target.name} {precision}")
            lowered[target.name, precision] = _lower(target, precision, model, folder, calibration, keep)
        if writer is not None:
            say("waiting for executorch")
            _finish(writer, model)
        variants = [lowered[target.name, precision] for target, precision in wanted]
        if keep is not None:
            keep.save(folder / PLAN_FILE)
        if any(variant.target == "coreml" for variant in variants):
            script = resources.files("pocketvlm.export.mil").joinpath("coreml_predict.py").read_bytes()
            (folder / PREDICT_SCRIPT).write_bytes(script)
        say("running the files")
        variants = _with_measurements(folder, model, variants, vectors, calibration)
        manifest = _manifest(folder, model, variants, calibration, source, bool(examples))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


# --- plan and folder ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _background(plan: list[tuple[Target, str]], processes: int) -> Iterator[BackgroundWriter | None]:
    """The process that lowers ExecuTorch programs, where there is something to write beside them."""
    names = {target.name for target, _ in plan}
    if processes < 2 or "executorch" not in names or len(names) == 1:
        yield None
        return
    with BackgroundWriter() as writer:
        yield writer


def _in_order(plan: list[tuple[Target, str]], writer: BackgroundWriter | None) -> list[tuple[Target, str]]:
    """The plan as it is carried out: what the other process lowers is handed over first."""
    if writer is None:
        return plan
    from pocketvlm.export.targets.executorch import ExecuTorchTarget

    first = [(ExecuTorchTarget(writer.write), precision) for target, precision in plan if target.name == "executorch"]
    return [*first, *((target, precision) for target, precision in plan if target.name != "executorch")]


def data_of_run(source: object) -> str | None:
    """What the run in this folder was trained on; None for anything else."""
    if not isinstance(source, str | Path) or not (Path(source) / RECIPE).is_file():
        return None
    return load_recipe(Path(source) / RECIPE).data.train or None


def _examples(source: DataSource | None) -> list[ImageCase]:
    """Pictures of the built-in set, which may be published; its licence tells it, as any folder may bear its name."""
    if source is None or not any(what.startswith("OpenMoji ") for what, _, _ in source.licences):
        return []
    return [case for case in golden_images(source.samples, count=_EXAMPLES) if case.real]


def _finish(writer: BackgroundWriter, model: Exportable) -> None:
    try:
        writer.finish()
    except UsageError as error:
        if error.__cause__ is None:
            raise
        raise lowering_error(error, "executorch", model.towers) from error


def _lower(
    target: Target,
    precision: str,
    model: Exportable,
    folder: Path,
    calibration: Calibration | None,
    plan: Plan | None,
) -> Variant:
    how: Any = {"precision": precision, "folder": folder, "calibration": calibration}
    try:
        variant = target.lower(model.towers, plan=plan, **how)
        if precision != "mixed" or plan is None:
            return variant
        kept = {tower: list(blocks) for tower, blocks in plan.keep.items()}
        return replace(variant, notes={**variant.notes, "plan": PLAN_FILE, "in_float": kept})
    except PocketvlmError:
        raise
    except Exception as error:  # converters raise whatever they like, often for one unknown operator
        raise lowering_error(error, f"{target.name} {precision}", model.towers) from error


# --- measurements ---------------------------------------------------------------------------------------------------


def _with_measurements(
    folder: Path, model: Exportable, variants: list[Variant], vectors: Vectors, calibration: Calibration | None
) -> list[Variant]:
    held = None
    if model.towers.contract.kind == "classifier" and calibration is not None:
        _, held = split_calibration(calibration.pixels)
    probes = _probe(folder, model, variants, vectors, held)
    sizes = [_bytes(folder, variant) for variant in variants]
    full = {v.target: size for v, size in zip(variants, sizes) if v.precision == "fp32"}
    measured: dict[str, float] = {}
    finished = []
    for variant, size in zip(variants, sizes):
        notes: dict[str, object] = {
            "bytes": size,
            "ratio_to_fp32": round(size / full.get(variant.target, _parameter_bytes(model)), 4),
        }
        probe = probes.get((variant.target, variant.precision))
        if probe is not None:
            _check_probe(variant, probe)
            worst = max(probe.worst.values())
            measured[variant.precision] = max(worst, measured.get(variant.precision, 0.0))
            notes["vectors_mean_cosine"] = {tower: round(v, 6) for tower, v in probe.mean_cosine.items()}
            notes["vectors_worst_1_minus_cosine"] = {tower: float(f"{v:.3g}") for tower, v in probe.worst.items()}
            if probe.top1 is not None and held is not None:
                notes["same_label"] = {"share": round(probe.top1, 4), "pictures": len(held)}
            notes["latency_ms_batch1_1thread"] = {tower: round(v, 3) for tower, v in probe.latency_ms.items()}
        finished.append(replace(variant, notes={**variant.notes, **notes}))
    widen_tolerance(folder, measured)
    return finished


def _probe(
    folder: Path, model: Exportable, variants: list[Variant], vectors: Vectors, held: NDArray[np.uint8] | None
) -> dict[tuple[str, str], Probe]:
    found: dict[tuple[str, str], Probe] = {}
    inputs: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if model.towers.image is not None:
        inputs["image"], expected["image"] = vectors.pixels, vectors.image
        if held is not None:
            inputs["judged"], expected["judged"] = held, double_rows(model.towers.image, held, normalize=False)
    if model.towers.text is not None:
        inputs["text"], expected["text"] = vectors.ids, vectors.text
    for target in dict.fromkeys(v.target for v in variants):
        if target == "coreml" and platform.system() != "Darwin":
            continue  # its interface was read back and checked; prediction exists on macOS only
        if target not in list_targets():
            continue  # nothing here runs it
        mine = [v for v in variants if v.target == target]
        for variant, probe in zip(mine, probe_variants(folder, mine, inputs, expected)):
            found[target, variant.precision] = probe
    return found


def _check_probe(variant: Variant, probe: Probe) -> None:
    for tower, worst in probe.worst.items():
        limit = _FP32_LIMIT if variant.precision == "fp32" else 1.0
        if not (np.isfinite(worst) and worst <= limit):
            raise IntegrityError(
                f"the {tower} tower of {variant.target} {variant.precision}, run from its file, is {worst:.3g} (1 - "
                f"cosine) away from the model and at most {limit:.0e} is allowed; no bundle was written, "
                "so leave this target out and report it with the student's name"
            )


def _bytes(folder: Path, variant: Variant) -> int:
    total = 0
    for relative in set(variant.files.values()):
        path = folder / relative
        parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
        total += sum(part.stat().st_size for part in parts)
    return total


def _parameter_bytes(model: Exportable) -> int:
    towers = [tower for tower in (model.towers.image, model.towers.text) if tower is not None]
    return 4 * sum(parameter.numel() for tower in towers for parameter in tower.parameters())


# --- manifest -------------------------------------------------------------------------------------------------------


def _manifest(
    folder: Path,
    model: Exportable,
    variants: list[Variant],
    calibration: Calibration | None,
    source: DataSource | None,
    pictures: bool,
) -> dict[str, Any]:
    from pocketvlm.distill.environment import git_commit

    contract = model.towers.contract
    provenance = {
        **model.provenance,
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": _versions(),
        "calibration": calibration.description if calibration is not None else None,
        "calibration_warnings": list(calibration.warnings) if calibration is not None else [],
    }
    rows = list(model.licences)
    if source is not None:
        rows += source.licences
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kit_version": pocketvlm.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "contract": contract.to_dict(),
        "contract_sha256": contract.digest(),
        "variants": [asdict(variant) for variant in variants],
        "files": describe_files(folder),
        "tokenizer": contract.text.tokenizer if contract.text is not None else None,
        "conformance": VECTORS,
        "provenance": provenance,
        "parity": [],
        "licences": [
            {"what": what, "licence": licence, "attribution": attribution, "url": ""}
            for what, licence, attribution in dict.fromkeys(rows)
        ],
    }
    if pictures:
        manifest["conformance_pictures"] = "some are real; the licences above apply to them"
    return manifest


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
