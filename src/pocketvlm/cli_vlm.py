"""Commands over models that answer in words: `vlm export`, `vlm parity`, `vlm ask`.

In the manner of `cli`: everything heavy is imported inside them; `ask` needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.table import emit, printable

BundlePath = Annotated[Positional[Path], arg(metavar="BUNDLE", help="A bundle folder or zip of 'vlm export'.")]
Backend = Annotated[
    Literal["auto", "onnxruntime", "executorch"],
    arg(help="Runtime; auto takes the first that this machine and the bundle both have."),
]
Threads = Annotated[int | None, arg(metavar="N", help="Threads of one call; default: up to 4.")]


def register(app: Any) -> None:
    """Add these commands to `pocketvlm vlm`."""
    app.command(export)
    app.command(parity)
    app.command(ask)


def export(
    source: Annotated[Positional[Path], arg(metavar="FOLDER", help="A generative student that save_vlm wrote.")],
    *,
    out: Annotated[Path, arg(help="Output folder; must be empty or absent.")],
    targets: Annotated[
        tuple[str, ...], arg(metavar="TARGET,...", help="Any of onnx, executorch, coreml; commas or spaces between.")
    ] = ("onnx", "executorch"),
    precisions: Annotated[
        tuple[str, ...] | None,
        arg(metavar="PRECISION,...", help="Any of fp32, int8, w4 and, for coreml, fp16, w8; left out: all."),
    ] = None,
    resize: Annotated[
        Literal["pad", "squash", "crop"],
        arg(help="A picture that is not square: fitted and centred on white, distorted, or its middle."),
    ] = "pad",
    overwrite: Annotated[bool, arg(help="Replace an output folder that is not empty.")] = False,
) -> None:
    """Freeze a generative student into a bundle: picture and decoder files, tokenizer, template."""
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.edge.vlm_bundle import VlmBundle
    from pocketvlm.export.vlm.bundle import export_vlm

    written = export_vlm(
        source, out, _names(targets), None if precisions is None else _names(precisions), resize=resize,
        overwrite=overwrite, progress=Reporter().line,
    )  # fmt: skip
    rows = [
        {"target": v.target, "precision": v.precision}
        | {f"{part} MB": f"{v.notes['bytes'][part] / 1e6:.2f}" for part in ("picture", "decoder")}
        | {"scheme": v.notes["scheme"]}
        for v in VlmBundle.load(written, verify=False).variants
    ]
    emit(rows, False, title=str(written))


def parity(
    bundle: BundlePath,
    *,
    model: Annotated[Path, arg(metavar="FOLDER", help="The student that the bundle was made of.")],
    prompts: Annotated[int, arg(metavar="N", help="Prompts for logits and text, each about a scene of its own.")] = 100,
    questions: Annotated[int, arg(metavar="N", help="Questions for exact match; 0 leaves them out.")] = 1000,
    fold: Annotated[int, arg(help="Which fifth of the concepts is the test pool (0 to 4).")] = 0,
    targets: Annotated[tuple[str, ...] | None, arg(metavar="TARGET,...", help="Only these; left out: all.")] = None,
    precisions: Annotated[
        tuple[str, ...] | None, arg(metavar="PRECISION,...", help="Only these; left out: all.")
    ] = None,
    threads: Threads = None,
    limit: Annotated[int | None, arg(metavar="N", help="Only so many pictures of the pool, for a trial.")] = None,
    out: Annotated[Path | None, arg(metavar="FILE", help="Write the report as JSON.")] = None,
    as_json: Annotated[bool, arg(name="json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Does the bundle say what the student says? Logits of each step, greedy text, questions; exits with 1 if not."""
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.vlm.parity import check_vlm_parity, write_report

    report = check_vlm_parity(
        bundle, model, prompts=prompts, questions=questions, fold=fold, threads=threads, limit=limit,
        targets=None if targets is None else _names(targets),
        precisions=None if precisions is None else _names(precisions), progress=Reporter().line,
    )  # fmt: skip
    if out is not None:
        write_report(report, out)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        emit(report.rows(), False, title=f"{report.model_id}: parity")
        for variant in report.variants:
            for failure in variant.failures:
                print(f"{variant.target} {variant.precision}: {failure}")
            for found in variant.divergences[:3]:
                print(
                    f"{variant.target} {variant.precision}: {found.prompt!r} differs from token {found.step}: "
                    f"{found.found!r} instead of {found.expected!r}, which leads by {found.margin:.2g}"
                )
        for name in report.not_run:
            print(f"not run here: {name}")
    sys.exit(0 if report.passed else 1)


def ask(
    bundle: BundlePath,
    picture: Annotated[Positional[Path], arg(metavar="PICTURE", help="An image file.")],
    question: Annotated[Positional[str], arg(metavar="QUESTION", help="What to ask about it.")],
    *,
    max_new_tokens: Annotated[int, arg(metavar="N", help="Tokens of the answer at most.")] = 64,
    backend: Backend = "auto",
    precision: Annotated[
        str, arg(metavar="NAME", help="fp32, int8, w4; auto takes the most faithful that there is.")
    ] = "auto",
    threads: Threads = None,
    as_json: Annotated[bool, arg(name="json", help="Print JSON at the end instead of words as they come.")] = False,
) -> None:
    """Ask a question about a picture; the answer is printed while it is written, its speed on stderr."""
    from pocketvlm.edge.vlm import EdgeVLM

    model = EdgeVLM.load(bundle, backend, precision, threads)
    stream = model.generate(picture, question, max_new_tokens=max_new_tokens, stream=True)
    for piece in stream:
        if not as_json:
            print(printable(piece), end="", flush=True)
    answer = stream.answer
    assert answer is not None, "a stream ends with its answer"
    if as_json:
        facts = {"text": answer.text, "ids": answer.ids, "ended": answer.ended}
        speed = {"first_token_ms": answer.first_token_ms, "tokens_per_second": answer.tokens_per_second}
        print(json.dumps(facts | speed, indent=1, ensure_ascii=False))
        return
    print()
    pace = "" if answer.tokens_per_second is None else f", then {answer.tokens_per_second:.0f} tokens/s"
    cut = "" if answer.ended else "; cut off by --max-new-tokens or the cache"
    how = f"{model.backend.name} {model.variant.precision}"
    print(f"{how}: first token after {answer.first_token_ms:.0f} ms{pace}{cut}", file=sys.stderr)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas or spaces between."""
    return tuple(name for part in given for name in part.split(",") if name)
