"""Commands over models that answer in words: `vlm export`, `vlm reference record`, `vlm parity`, `vlm ask`.

In the manner of `cli`: everything heavy is imported inside them; `ask` needs no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from pocketvlm.edge.errors import UsageError
from pocketvlm.table import emit, printable

if TYPE_CHECKING:
    from pocketvlm.export.vlm.parity import VlmParity

BundlePath = Annotated[Positional[Path], arg(metavar="BUNDLE", help="A bundle folder or zip of 'vlm export'.")]
Backend = Annotated[
    Literal["auto", "onnxruntime", "executorch"],
    arg(help="Runtime; auto takes the first that this machine and the bundle both have."),
]
Threads = Annotated[int | None, arg(metavar="N", help="Threads of one call; default: up to 4.")]


def register(app: Any) -> None:
    """Add these commands to `pocketvlm vlm`."""
    reference = SubcommandApp()
    reference.command(record)
    app.command(export)
    app.command(reference, name="reference", help="Record what a student answers, for parity.")
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


def record(
    source: Annotated[Positional[Path], arg(metavar="FOLDER", help="A generative student that save_vlm wrote.")],
    *,
    out: Annotated[Path, arg(help="Output folder; must be empty or absent.")],
    device: Annotated[str, arg(help="auto, cpu (float64) or cuda (float32, TF32 off).")] = "auto",
    prompts: Annotated[int, arg(metavar="N", help="Prompts for logits and text, each about a scene of its own.")] = 100,
    questions: Annotated[int, arg(metavar="N", help="Questions for exact match; 0 leaves them out.")] = 1000,
    fold: Annotated[int, arg(help="Which fifth of the concepts is the test pool (0 to 4).")] = 0,
    limit: Annotated[int | None, arg(metavar="N", help="Only so many pictures of the pool, for a trial.")] = None,
    overwrite: Annotated[bool, arg(help="Replace an earlier recording.")] = False,
) -> None:
    """Run the unpatched eager student once and keep what 'vlm parity --reference' compares with."""
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.vlm.reference_write import record_vlm_reference

    found = record_vlm_reference(
        source, out, device=device, prompts=prompts, questions=questions, fold=fold, limit=limit, overwrite=overwrite,
        progress=Reporter().line,
    )  # fmt: skip
    assert found.manifest is not None, "a recording has a manifest"
    manifest = found.manifest
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in manifest["counts"].items())
    megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    machine, noise = manifest["environment"], f"{found.noise:.2g}"
    print(f"{found.model_id}: {manifest['numerics']['dtype']} on {machine['device_name']}; {counts}")
    print(f"float32 costs {noise} of a logit at most; {megabytes:.2f} MB, sha256 {found.digest}")


def parity(
    bundle: BundlePath,
    *,
    model: Annotated[Path | None, arg(metavar="FOLDER", help="The student that the bundle was made of.")] = None,
    reference: Annotated[
        Path | None, arg(metavar="FOLDER", help="Instead: what 'vlm reference record' kept of it; needs no torch.")
    ] = None,
    prompts: Annotated[
        int | None, arg(metavar="N", help="Prompts for logits and text, each about a scene of its own; default 100.")
    ] = None,
    questions: Annotated[
        int | None, arg(metavar="N", help="Questions for exact match, default 1000; 0 leaves them out.")
    ] = None,
    fold: Annotated[
        int | None, arg(metavar="N", help="Which fifth of the concepts is the test pool (0 to 4), default 0.")
    ] = None,
    targets: Annotated[tuple[str, ...] | None, arg(metavar="TARGET,...", help="Only these; left out: all.")] = None,
    precisions: Annotated[
        tuple[str, ...] | None, arg(metavar="PRECISION,...", help="Only these; left out: all.")
    ] = None,
    threads: Threads = None,
    limit: Annotated[int | None, arg(metavar="N", help="Only so many pictures of the pool, for a trial.")] = None,
    out: Annotated[Path | None, arg(metavar="FILE", help="Write the report as JSON.")] = None,
    into_bundle: Annotated[
        bool, arg(help="Write the verdict into bundle.json too, where users find it; a folder, every variant.")
    ] = False,
    strict: Annotated[
        bool, arg(help="Exit with 1 also where too few questions leave a task result undecided.")
    ] = False,
    as_json: Annotated[bool, arg(name="json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Does the bundle say what the student says? Logits of each step, greedy text, questions.

    Exits with 0 if parity holds, 1 if anything fails, 2 if nothing could be judged (a wrong option, no such file). A
    task result that too few questions leave undecided is no failure unless --strict says so; see docs/vlm-export.md.
    """
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.vlm.parity import check_vlm_parity, write_report, write_vlm_summary

    drawn = {"prompts": prompts, "questions": questions, "fold": fold, "limit": limit}
    given = {name: value for name, value in drawn.items() if value is not None}
    if reference is not None and given:
        names = ", ".join(f"--{name}" for name in given)
        raise UsageError(
            f"--reference was given with {names}, but a recording has its own prompts and questions, so that they "
            "would be ignored; leave them out, or record again with them"
        )
    if into_bundle and (targets is not None or precisions is not None):
        raise UsageError(
            "--into-bundle writes the verdict on every variant and cannot be given with --targets or --precisions, "
            "which do not check them all; leave one of the two out"
        )
    if into_bundle and not (bundle / "bundle.json").is_file():
        raise UsageError(
            f"--into-bundle writes into bundle.json, which {str(bundle)!r} does not hold as a folder; unpack it first"
        )
    report = check_vlm_parity(
        bundle, model, reference=reference, **given, threads=threads,
        targets=None if targets is None else _names(targets),
        precisions=None if precisions is None else _names(precisions), progress=Reporter().line,
    )  # fmt: skip
    if out is not None:
        write_report(report, out)
    if into_bundle:
        write_vlm_summary(bundle, report)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        _show_parity(report)
    sys.exit(1 if strict and report.status == "undecided" else report.exit_code)


def _show_parity(report: VlmParity) -> None:
    emit(report.rows(), False, title=f"{report.model_id}: parity")
    for variant in report.variants:
        name = f"{variant.target} {variant.precision}"
        for told in variant.failures:
            print(f"{name}: {told}")
        for told in variant.open:
            print(f"{name} undecided: {told}")
        for found in variant.divergences[:3]:
            print(
                f"{name}: {found.prompt!r} differs from token {found.step}: "
                f"{found.found!r} instead of {found.expected!r}, which leads by {found.margin:.2g}"
            )
    for name in report.not_run:
        print(f"not run here: {name}")


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
        proved = model.parity and {key: model.parity[key] for key in ("status", "message", "reference", "date")}
        print(json.dumps(facts | speed | {"parity": proved}, indent=1, ensure_ascii=False))
        return
    print()
    pace = "" if answer.tokens_per_second is None else f", then {answer.tokens_per_second:.0f} tokens/s"
    cut = "" if answer.ended else "; cut off by --max-new-tokens or the cache"
    how = f"{model.backend.name} {model.variant.precision}"
    checked = "parity not checked" if model.parity is None else f"parity {model.parity['status']}"
    print(f"{how} ({checked}): first token after {answer.first_token_ms:.0f} ms{pace}{cut}", file=sys.stderr)


def _names(given: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas or spaces between."""
    return tuple(name for part in given for name in part.split(",") if name)
