"""Commands that run a bundle without torch: embed, classify, conformance.

In the manner of `cli`: everything heavy is imported inside them.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError
from pocketvlm.table import emit

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


def embed(
    bundle: Positional[BundlePath],
    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT ...", help="Image files, or texts with --text.")],
    *,
    text: Annotated[bool, arg(help="Treat the inputs as texts.")] = False,
    out: Annotated[
        Path | None, arg(metavar="FILE", help="Write a .npy file of float32 [n, dim] instead of printing.")
    ] = None,
    overwrite: Annotated[bool, arg(help="Replace the file --out.")] = False,
    backend: Backend = "auto",
    precision: Precision = "auto",
) -> None:
    """Embed images or texts with a bundle; no torch needed."""
    import numpy as np

    from pocketvlm.edge.model import EdgeModel

    if not inputs:
        raise UsageError("embed was given nothing to embed; name image files, or texts after --text")
    if out is not None:
        # np.save would add the suffix itself, and so write past the check below
        if out.suffix != ".npy":
            raise UsageError(f"--out {out} does not end in .npy, and no other format is written; name it {out}.npy")
        if out.exists() and not overwrite:
            raise UsageError(f"{out} exists and would be lost; name another file or pass --overwrite")
    model = EdgeModel.load(bundle, backend=backend, precision=precision)
    vectors = model.embed_text(list(inputs)) if text else model.embed_image(list(inputs))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, vectors)
        print(f"{out}: float32 {vectors.shape}, space {model.contract.space_id}")
    else:
        for name, vector in zip(inputs, vectors):
            print(json.dumps({"input": name, "embedding": [round(float(x), 7) for x in vector]}))


def classify(
    bundle: Positional[BundlePath],
    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE ...", help="Image files.")],
    *,
    labels: Annotated[
        tuple[str, ...], arg(metavar="LABEL ...", help="Class names in your own words; none for a classifier's bundle.")
    ] = (),
    templates: Annotated[
        tuple[str, ...], arg(metavar="TEMPLATE ...", help="Prompts around a label, where {} stands for it.")
    ] = ("{}",),
    backend: Backend = "auto",
    precision: Precision = "auto",
    as_json: Json = False,
) -> None:
    """Classification of image files, zero-shot with your own labels or by a classifier's; no torch needed."""
    from pocketvlm.edge.model import EdgeModel

    if not images:
        raise UsageError("classify was given no image; name image files after the bundle")
    model = EdgeModel.load(bundle, backend=backend, precision=precision)
    results = model.classify(list(images), list(labels) or None, templates=templates)
    rows = [
        {"image": name, "label": r.label, "probability": round(r.probability, 4)} for name, r in zip(images, results)
    ]
    emit(rows, as_json, title="classification")


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
