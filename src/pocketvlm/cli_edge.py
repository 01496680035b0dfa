"""Commands that run a bundle without torch: embed, classify, serve, conformance.

In the manner of `cli`: everything heavy is imported inside them.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError
from pocketvlm.table import emit

if TYPE_CHECKING:
    from pocketvlm.edge.model import EdgeModel
    from pocketvlm.edge.zero_shot import ZeroShotClassifier

Json = Annotated[bool, arg(name="json", help="Print JSON instead of a table.")]
BundlePath = Annotated[Path, arg(metavar="BUNDLE", help="A bundle of 'pocketvlm export': its folder or .zip.")]
Backend = Annotated[
    Literal["auto", "onnxruntime", "executorch", "coreml"],
    arg(help="Runtime; auto takes the first that this machine and the bundle both have."),
]
Precision = Annotated[
    str, arg(metavar="NAME", help="fp32, int8 or another that the bundle has; auto takes the most faithful.")
]
Threads = Annotated[int | None, arg(metavar="N", help="Threads of the runtime for one call; default: up to 4.")]


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(embed)
    app.command(classify)
    app.command(conformance)
    app.command(serve)


def embed(
    bundle: Positional[BundlePath],
    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT ...", help="Image files, or texts with --text.")],
    *,
    text: Annotated[bool, arg(help="Treat the inputs as texts.")] = False,
    out: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="Write instead of printing: .jsonl lines of id and embedding, or .npy of float32 [n, dim] with the "
            "ids in .ids.json beside it.",
        ),
    ] = None,
    dim: Annotated[
        int | None, arg(metavar="N", help="Width of the embeddings, where the model promises several; default: all.")
    ] = None,
    overwrite: Annotated[bool, arg(help="Replace the file --out.")] = False,
    backend: Backend = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
) -> None:
    """Embed images or texts with a bundle; no torch needed."""
    from pocketvlm.edge.model import EdgeModel

    if not inputs:
        raise UsageError("embed was given nothing to embed; name image files, or texts after --text")
    written = _outputs(out, overwrite)
    model = EdgeModel.load(bundle, backend, precision, threads, dim=dim)
    vectors = model.embed_text(inputs) if text else model.embed_image(inputs)
    rows = ({"id": name, "embedding": [float(f"{x:.7g}") for x in vector]} for name, vector in zip(inputs, vectors))
    if out is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".jsonl":
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        import numpy as np

        np.save(out, vectors)
        facts = {"space_id": model.contract.space_id, "model_id": model.contract.model_id, "ids": list(inputs)}
        written[1].write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out}: float32 {vectors.shape}, space {model.contract.space_id}")


def _outputs(out: Path | None, overwrite: bool) -> list[Path]:
    """The files that `embed --out` writes, which must not be there yet."""
    if out is None:
        return []
    # np.save would add the suffix itself, and so write past the check below
    if out.suffix not in (".npy", ".jsonl"):
        raise UsageError(f"--out {out} ends in neither .npy nor .jsonl, and no other format is written; name it so")
    files = [out, out.with_suffix(".ids.json")] if out.suffix == ".npy" else [out]
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise UsageError(f"{there[0]} exists and would be lost; name another file or pass --overwrite")
    return files


def classify(
    bundle: Positional[BundlePath],
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE ...", help="Image files.")],
    *,
    labels: Annotated[
        tuple[str, ...],
        arg(metavar="LABEL ...", help="Class names in your own words; none for a classifier's bundle or with --load."),
    ] = (),
    templates: Annotated[
        tuple[str, ...], arg(metavar="TEMPLATE ...", help="Prompts around a label, where {} stands for it.")
    ] = ("{}",),
    examples: Annotated[
        Path | None,
        arg(metavar="DIR", help="Learn from pictures in one folder for each label; its names are the labels if none."),
    ] = None,
    method: Annotated[
        Literal["means", "cache"], arg(help="How examples are used: Gaussian classes, or votes by nearness.")
    ] = "means",
    calibrate: Annotated[
        Path | None,
        arg(metavar="DIR", help="Fit the temperature to other labelled pictures, in one folder for each label."),
    ] = None,
    threshold: Annotated[
        float | None, arg(metavar="P", help="Below this probability the label is '' (none of these).")
    ] = None,
    save: Annotated[Path | None, arg(metavar="FILE", help="Keep the classifier, without the model, in a file.")] = None,
    load: Annotated[Path | None, arg(metavar="FILE", help="Take a classifier that --save wrote.")] = None,
    overwrite: Annotated[bool, arg(help="Replace the file --save.")] = False,
    backend: Backend = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Classification of image files, zero-shot with your own labels or by a classifier's; no torch needed.

    With examples, calibration or a threshold the classifier is one to keep: save it once, then load it.
    """
    from pocketvlm.edge.model import EdgeModel

    if not images and save is None:
        raise UsageError("classify was given no image; name image files after the bundle")
    if save is not None and save.exists() and not overwrite:
        raise UsageError(f"{save} exists and would be lost; name another file or pass --overwrite")
    kept = [value is not None for value in (examples, calibrate, threshold, save, load)]
    model = EdgeModel.load(bundle, backend, precision, threads)
    if any(kept):
        classifier = _classifier(model, labels, templates, examples, method, calibrate, threshold, load)
        if save is not None:
            print(f"classifier: {classifier.save(save)}", file=sys.stderr)
        results = classifier.classify(images) if images else []
    else:
        results = model.classify(images, list(labels) or None, templates)
    rows = [
        {"image": name, "label": r.label, "probability": round(r.probability, 4)} for name, r in zip(images, results)
    ]
    emit(rows, as_json, title="classification")


def _classifier(
    model: EdgeModel,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    examples: Path | None,
    method: Literal["means", "cache"],
    calibrate: Path | None,
    threshold: float | None,
    load: Path | None,
) -> ZeroShotClassifier:
    """The classifier that the options describe; what was learnt and fitted is told on stderr, so --json stays JSON."""
    from pocketvlm.edge.reading import labelled_pictures
    from pocketvlm.edge.zero_shot import ZeroShotClassifier

    if examples is not None and calibrate is not None and examples.resolve() == calibrate.resolve():
        raise UsageError(
            f"--calibrate names {calibrate}, whose pictures are learnt from; the classifier would look too sure of "
            "itself, so give other labelled pictures"
        )
    if load is not None:
        if labels or templates != ("{}",):
            raise UsageError("--load brings its own labels and templates, and others were given too; leave them out")
        classifier = ZeroShotClassifier.load(model, load)
        if threshold is not None:
            classifier.set_threshold(threshold)
    else:
        if not labels and (examples or calibrate):
            labels = tuple(dict.fromkeys(labelled_pictures(examples or calibrate or "")[1]))
        classifier = ZeroShotClassifier(model, labels, templates, threshold=threshold or 0.0)
    if examples is not None:
        learnt = classifier.learn(*labelled_pictures(examples), method)
        told = f"{learnt.accuracy[0]:.1%} by texts alone, {learnt.accuracy[1]:.1%} with examples (held out)"
        print(f"examples: {sum(learnt.examples.values())}, weight {learnt.weight:g}; accuracy {told}", file=sys.stderr)
    if calibrate is not None:
        fitted = classifier.calibrate(*labelled_pictures(calibrate))
        told = f"expected calibration error {fitted.error[0]:.3f} before, {fitted.error[1]:.3f} after"
        print(f"temperature: {fitted.temperature:.3g} ({fitted.examples} pictures; {told})", file=sys.stderr)
    return classifier


def serve(
    bundle: Positional[BundlePath],
    *,
    host: Annotated[
        str, arg(help="Address to listen on; the default is reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, arg(metavar="N", help="Port; 0 takes any that is free and prints it.")] = 8080,
    workers: Annotated[int, arg(metavar="N", help="Requests computed at a time.")] = 2,
    queue: Annotated[int, arg(metavar="N", help="Requests that may wait; the next are answered with 429.")] = 32,
    backend: Backend = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
) -> None:
    """A local HTTP endpoint: embed, classify, health, OpenAPI; needs the extra 'serve'. Ctrl-C stops it."""
    from pocketvlm.edge.errors import require_installed
    from pocketvlm.edge.model import EdgeModel
    from pocketvlm.edge.serve import Limits
    from pocketvlm.edge.serve import serve as run

    require_installed(("starlette", "uvicorn"), "serve")
    limits = Limits(workers=workers, queue=queue)
    model = EdgeModel.load(bundle, backend, precision, threads)
    run(model, host=host, port=port, limits=limits, say=lambda line: print(line, flush=True))


def conformance(
    bundle: Positional[BundlePath],
    *,
    backend: Backend = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Hold a runtime of this machine to the vectors that the bundle carries; exits with 1 where a stage fails."""
    from pocketvlm.edge.bundle import Bundle
    from pocketvlm.edge.conformance import check_conformance, first_failing

    opened = Bundle.load(bundle)
    stages = check_conformance(opened, backend, precision, threads)
    failing = first_failing(stages)
    if as_json:
        rows = [asdict(stage) for stage in stages]
        for row in rows:
            # JSON has no NaN
            row["worst"] = row["worst"] if math.isfinite(row["worst"]) else None
        first = None if failing is None else failing.stage
        print(json.dumps({"passed": first is None, "first_failing": first, "stages": rows}, indent=2))
    else:
        table = [
            {
                "stage": stage.stage,
                "result": "pass" if stage.passed else "FAIL",
                "cases": stage.cases,
                "worst": f"{stage.worst:.2g}" if math.isfinite(stage.worst) else "-",
                "allowed": f"{stage.budget:.2g}",
            }
            for stage in stages
        ]
        emit(table, False, title=f"{opened.contract.name}: conformance")
        for stage in stages:
            for note in stage.notes:
                print(f"{stage.stage}: {note}")
        if failing is None:
            print("every stage passed")
        else:
            print(f"first failing stage: {failing.stage}")
            for line in failing.failures[:5]:
                print(f"  {line}")
    sys.exit(0 if failing is None else 1)
