"""Commands that hold files to a recording: parity, and two recordings to each other.

In the manner of `cli`: everything heavy is imported inside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError

Json = Annotated[bool, arg(name="json", help="Print JSON instead of a table.")]


def register(app: Any, reference_app: Any) -> None:
    """Add these commands to the command line."""
    reference_app.command(reference_check, name="check")
    reference_app.command(reference_diff, name="diff")
    app.command(parity)


def reference_check(
    reference: Annotated[
        Positional[Path], arg(metavar="REFERENCE", help="A folder made by 'pocketvlm reference record'.")
    ],
    model: Annotated[
        str | None,
        arg(metavar="MODEL", help="The model that was recorded: a run, 'open_clip:NAME@WEIGHTS' or 'hf:FOLDER'."),
    ] = None,
    device: Annotated[str, arg(help="auto, cpu (float64) or cuda (float32, TF32 off).")] = "auto",
    allow_download: Annotated[bool, arg(help="A hub id may reach the network.")] = False,
    trust_remote_code: Annotated[bool, arg(help="Python code that comes with a checkpoint may run.")] = False,
    as_json: Json = False,
) -> None:
    """Is a recording whole and unchanged? With --model, ask the model again here; exits with 1 if it answers otherwise.

    Whoever made the recording, and on whatever device: the answers must agree within the budget of float32.
    """
    from pocketvlm.export.compare import finite
    from pocketvlm.export.reference import load_reference
    from pocketvlm.export.reference_check import replay

    recorded = load_reference(reference)
    counts = ", ".join(f"{value} {key}" for key, value in recorded.manifest["counts"].items())
    if model is None:
        facts = {"whole": True, "sha256": recorded.digest, "counts": recorded.manifest["counts"]}
        print(json.dumps(facts, indent=2) if as_json else f"whole and unchanged: {counts}; sha256 {recorded.digest}")
        return
    found = replay(recorded, model, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code)
    print(json.dumps(finite(found.to_dict()), indent=2) if as_json else "\n".join(found.lines()))
    sys.exit(0 if found.same else 1)


def reference_diff(
    a: Annotated[Positional[Path], arg(metavar="A", help="A folder made by 'pocketvlm reference record'.")],
    b: Annotated[Positional[Path], arg(metavar="B", help="Another one, for instance of another machine.")],
    as_json: Json = False,
) -> None:
    """Compare two recordings: model, inputs, arithmetic, answers, taps; exits with 1 if they differ beyond float32."""
    from pocketvlm.export.compare import finite
    from pocketvlm.export.reference import load_reference
    from pocketvlm.export.reference_diff import diff_references

    diff = diff_references(load_reference(a), load_reference(b))
    if as_json:
        print(json.dumps(finite(diff.to_dict()), indent=2))
    else:
        print("\n".join(diff.lines()))
    sys.exit(0 if diff.same else 1)


def parity(
    bundle: Annotated[Positional[Path | None], arg(metavar="[BUNDLE]", help="A bundle: its folder or .zip.")] = None,
    reference: Annotated[Path | None, arg(metavar="DIR", help="A folder made by 'pocketvlm reference record'.")] = None,
    out: Annotated[Path | None, arg(metavar="PATH", help="Folder for parity.json and parity.html.")] = None,
    targets: Annotated[
        tuple[str, ...] | None, arg(help="Check only these, for instance onnx or onnx:int8; left out: every variant.")
    ] = None,
    budgets: Annotated[
        Path | None, arg(metavar="FILE", help="Your own budgets, in the form of export/budgets.json.")
    ] = None,
    rethreshold: Annotated[
        Path | None, arg(metavar="REPORT", help="Judge this parity.json by --budgets, without running anything.")
    ] = None,
    bisect: Annotated[
        str | None, arg(metavar="VARIANT", help="Find the blocks that must stay in float, for instance of onnx:int8.")
    ] = None,
    coreml_results: Annotated[
        Path | None, arg(metavar="FILE", help="What the bundle's conformance/coreml_predict.py wrote on a Mac.")
    ] = None,
    junit: Annotated[Path | None, arg(metavar="FILE", help="Write JUnit XML too, for CI.")] = None,
    into_bundle: Annotated[
        bool, arg(help="Write the verdict into bundle.json too, where a model card finds it; a folder, every variant.")
    ] = False,
    strict: Annotated[bool, arg(help="Exit with 1 also where too few queries leave a task result undecided.")] = False,
    overwrite: Annotated[bool, arg(help="Replace an earlier report in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Compare a bundle's files, run by their real runtimes, with a reference.

    Exits with 0 if parity holds, 1 if anything fails, 2 if nothing could be judged (a wrong option, no such file). A
    task result that too few queries leave undecided is no failure unless --strict says so; see docs/parity.md.
    """
    from pocketvlm.export.compare import finite
    from pocketvlm.export.parity import check_parity, write_parity_summary
    from pocketvlm.export.parity_again import rethreshold as judge_again
    from pocketvlm.export.parity_junit import write_junit
    from pocketvlm.export.parity_report import print_report

    if out is not None and (out / "parity.json").exists() and not overwrite:
        raise UsageError(f"{out} holds a parity report, which would be lost; name another folder or pass --overwrite")
    if into_bundle and (rethreshold is not None or bisect is not None or targets is not None):
        raise UsageError(
            "--into-bundle writes the verdict on every variant and cannot be given with --rethreshold, --bisect or "
            "--targets, which do not check them all; leave one of the two out"
        )
    if rethreshold is not None:
        if any(given is not None for given in (bundle, reference, targets, bisect, coreml_results)):
            raise UsageError(
                "--rethreshold judges what a report holds and runs nothing, but a bundle, --reference, --targets, "
                "--bisect or --coreml-results was given too, which would be ignored; leave one of the two out"
            )
        report = judge_again(rethreshold, budgets)
        if out is not None:
            report.save(out)
    elif bundle is None or reference is None:
        raise UsageError(
            f"parity was given {'no bundle' if bundle is None else 'no --reference'} and needs both; there is nothing "
            "to compare, so write 'pocketvlm parity BUNDLE --reference DIR', or --rethreshold REPORT"
        )
    else:
        for path in (bundle, reference):
            if not path.exists():
                raise UsageError(f"{str(path)!r} does not exist, so nothing was compared; check the path")
        if bisect is not None and (out is not None or junit is not None or targets is not None):
            raise UsageError(
                "--bisect prints one variant's blocks and writes no report, but --out, --junit or --targets was given "
                "too, which would be ignored; leave one of the two out"
            )
        if bisect is not None:
            _bisect(bundle, reference, bisect, budgets, as_json)
        report = check_parity(
            bundle, reference, out=out, targets=targets, budgets=budgets, coreml_results=coreml_results
        )
    if into_bundle and bundle is not None and report.variants:
        write_parity_summary(bundle, report)
    if junit is not None:
        write_junit(report, junit, strict=strict)
    if as_json:
        print(json.dumps(finite(report.to_dict()), indent=2))
    else:
        print_report(report)
    sys.exit(1 if strict and report.status == "undecided" else report.exit_code)


def _bisect(bundle: Path, reference: Path, variant: str, budgets: Path | None, as_json: bool) -> NoReturn:
    from pocketvlm.export.compare import finite
    from pocketvlm.export.parity_bisect import bisect_precision

    found = bisect_precision(bundle, reference, variant, budgets=budgets)
    if as_json:
        print(json.dumps(finite(found.to_dict()), indent=2))
    else:
        for block, error in found.blocks.items():
            print(f"{'float' if block in (found.keep or []) else '     '}  {error:.2e}  {block}")
        print(found.message)
    sys.exit(0 if found.keep is not None else 1)
