"""The command line: one function per subcommand; everything heavy is imported inside it.

Edge commands (`embed`, `classify`, `list`, `doctor`) work on the base install, without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from pocketvlm.edge.errors import PocketvlmError, UsageError

app = tyro.extras.SubcommandApp()
teacher_app = tyro.extras.SubcommandApp()
reference_app = tyro.extras.SubcommandApp()
app.command(teacher_app, name="teacher", help="Look at a teacher before you train on it.")
app.command(reference_app, name="reference", help="Record and show reference runs.")

Json = Annotated[bool, arg(name="json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, arg(help="Replace an output folder that is not empty.")]
Data = Annotated[str, arg(help="Data source, for instance 'openmoji', 'pairs.jsonl', 'folder:photos'.")]
Out = Annotated[Path, arg(help="Output folder; must be empty or absent.")]
Backend = Literal["auto", "onnxruntime", "executorch", "coreml"]
Names = Literal["students", "teachers", "objectives", "data", "targets", "recipes"]


@app.command
def demo(
    out: Out = Path("runs/demo"),
    quick: Annotated[bool, arg(help="Fewer steps and targets: at most 3 minutes instead of 15.")] = False,
    fold: Annotated[int, arg(help="Which fifth of the concepts is held out for testing (0 to 4).")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Take real knowledge down the whole road: data, teacher, student, bundle, reference, parity, edge."""
    from pocketvlm.demo import run_demo

    run_demo(out, quick=quick, fold=fold, overwrite=overwrite)


@app.command(name="list")
def list_names(what: Positional[Names], as_json: Json = False) -> None:
    """List what can be named: students (with parameters and MACs), teachers, objectives, data, targets, recipes."""
    from pocketvlm.listing import listing

    rows = listing(what)
    _emit(rows, as_json, title=what)


@teacher_app.command(name="check")
def teacher_check(teacher: Positional[str], data: Data, as_json: Json = False, device: str = "auto") -> None:
    """Score a teacher on your own data, beside chance and a simple baseline, before anyone trains on it."""
    from pocketvlm.data import open_data
    from pocketvlm.distill.check_teacher import check_teacher
    from pocketvlm.teachers import load_teacher

    report = check_teacher(load_teacher(teacher, device=device), open_data(data))
    _print(report.to_dict() if as_json else report.table(), as_json)
    if report.worse_than_baseline:
        sys.exit(1)


@app.command
def distill(
    recipe: Annotated[Positional[str], arg(help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[Positional[tuple[str, ...]], arg(help="Changes such as train.steps=200.")] = (),
    *,
    out: Out,
    resume: Annotated[bool, arg(help="Go on from the last checkpoint in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a student by a recipe; writes checkpoints, metrics.jsonl and report.html into --out."""
    from pocketvlm.distill.loop import distill_run
    from pocketvlm.distill.recipe import load_recipe

    result = distill_run(load_recipe(recipe, overrides), out, resume=resume, overwrite=overwrite)
    print(f"student: {result.student}\nreport:  {result.report}")


@app.command(name="eval")
def evaluate(
    model: Annotated[Positional[str], arg(help="A run folder, a student folder or a bundle.")],
    data: Data,
    teacher: Annotated[str | None, arg(help="Report retention and neighbour overlap against this teacher.")] = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Retrieval, MAP and zero-shot classification of a student or of a shipped bundle."""
    from pocketvlm.distill.evaluate import evaluate_path

    report = evaluate_path(model, data, teacher=teacher, backend=backend)
    _print(report.to_dict() if as_json else report.table(), as_json)


@app.command
def export(
    source: Annotated[Positional[str | None], arg(help="A run or student folder.")] = None,
    *,
    out: Out,
    from_: Annotated[
        str | None, arg(name="from", help="A dual encoder of yours: open_clip:NAME@WEIGHTS or hf:DIR.")
    ] = None,
    targets: Annotated[tuple[str, ...], arg(help="Any of onnx, executorch, coreml.")] = ("onnx", "executorch", "coreml"),
    precisions: Annotated[
        tuple[str, ...], arg(help="Any of fp32, fp16, int8; combinations a target lacks are left out and listed.")
    ] = ("fp32", "fp16", "int8"),
    data: Annotated[str | None, arg(help="Calibration data; defaults to the data of the run.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a student into a bundle: model files per target and precision, tokenizer, conformance vectors."""
    from pocketvlm.export.bundle import export_bundle

    if (source is None) == (from_ is None):
        raise UsageError("export takes either a run folder or --from, not both or neither; see: pocketvlm export --help")
    result = export_bundle(
        source or from_, out, targets=targets, precisions=precisions, calibration_data=data, overwrite=overwrite
    )
    _print(result.table(), False)


@reference_app.command(name="record")
def reference_record(
    source: Annotated[Positional[str], arg(help="A run or student folder, or open_clip:… / hf:….")],
    data: Data,
    out: Out,
    device: Annotated[str, arg(help="auto, cpu (float64) or cuda (float32, TF32 off).")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Run the unpatched eager model once and keep everything that parity compares with."""
    from pocketvlm.data import open_data
    from pocketvlm.export.reference import record_reference, show

    record_reference(source, out, data=open_data(data), device=device, overwrite=overwrite)
    _print(show(out), False)


@reference_app.command(name="show")
def reference_show(reference: Positional[Path], as_json: Json = False) -> None:
    """Print who recorded a reference, on what, and its noise floor."""
    from pocketvlm.export.reference import load_reference, show

    _print(load_reference(reference).manifest if as_json else show(reference), as_json)


@app.command
def parity(
    bundle: Positional[Path],
    reference: Annotated[Path, arg(help="A folder made by 'pocketvlm reference record'.")],
    out: Annotated[Path | None, arg(help="Folder for parity.json and parity.html; default: beside the bundle.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle's files, run by their real runtimes, with a reference; exits 1 unless everything passes."""
    from pocketvlm.export.parity import check_parity

    report = check_parity(bundle, reference, out=out)
    _print(report.to_dict() if as_json else report.table(), as_json)
    sys.exit(report.exit_code)


@app.command
def embed(
    bundle: Positional[Path],
    inputs: Annotated[Positional[tuple[str, ...]], arg(help="Image files, or texts with --text.")],
    *,
    text: Annotated[bool, arg(help="Treat the inputs as texts.")] = False,
    out: Annotated[Path | None, arg(help="Write a .npy file of float32 [n, dim] instead of printing.")] = None,
    backend: Backend = "auto",
    precision: str = "auto",
) -> None:
    """Embed images or texts with a bundle; no torch needed."""
    import numpy as np

    from pocketvlm.edge.model import EdgeModel

    model = EdgeModel.load(bundle, backend=backend, precision=precision)
    if not inputs:
        raise UsageError("embed was given nothing to embed; name image files, or texts after --text")
    vectors = model.embed_text(list(inputs)) if text else model.embed_image(list(inputs))
    if out is not None:
        if out.exists():
            raise UsageError(f"{out} exists and would be lost; name another file or remove it first")
        np.save(out, vectors)
        print(f"{out}: float32 {vectors.shape}, space {model.contract.space_id}")
    else:
        for name, vector in zip(inputs, vectors):
            print(json.dumps({"input": name, "embedding": [round(float(x), 7) for x in vector]}))


@app.command
def classify(
    bundle: Positional[Path],
    images: Positional[tuple[str, ...]],
    *,
    labels: Annotated[tuple[str, ...], arg(help="Class names in your own words.")],
    templates: Annotated[tuple[str, ...], arg(help="Prompt templates; {} is the label.")] = ("{}",),
    backend: Backend = "auto",
    precision: str = "auto",
    as_json: Json = False,
) -> None:
    """Zero-shot classification of image files with your own labels; no torch needed."""
    from pocketvlm.edge.model import EdgeModel

    model = EdgeModel.load(bundle, backend=backend, precision=precision)
    results = model.classify(list(images), list(labels), templates=templates)
    rows = [
        {"image": name, "label": r.label, "probability": round(r.probability, 4)} for name, r in zip(images, results)
    ]
    _emit(rows, as_json, title="classification")


@app.command
def doctor(as_json: Json = False) -> None:
    """Say what this installation can do, and which extra brings what is missing."""
    from pocketvlm.listing import doctor_rows

    _emit(doctor_rows(), as_json, title="doctor")


def _emit(rows: Sequence[dict[str, Any]], as_json: bool, *, title: str) -> None:
    """Print rows of equal keys as JSON or as a table."""
    if as_json:
        print(json.dumps(list(rows), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for key in rows[0] if rows else ():
        table.add_column(key.replace("_", " "), justify="right" if isinstance(rows[0][key], int | float) else "left")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console().print(table)


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, indent=2))
        return
    from rich.console import Console

    Console().print(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `pocketvlm`; a user's mistake prints one sentence and exits with 2."""
    call: Callable[..., Any] = app.cli
    try:
        call(prog="pocketvlm", args=argv, description=__doc__.split("\n")[0] if __doc__ else None)
    except PocketvlmError as error:
        print(f"pocketvlm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pocketvlm: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
