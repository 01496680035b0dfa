"""Commands that measure: `bench` of bundles, `matrix` of what can be exported, `pick` from it, `quantize` to a budget.

In the manner of `cli`: everything heavy is imported inside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError, require
from pocketvlm.table import emit

Json = Annotated[bool, arg(name="json", help="Print JSON instead of tables.")]
Names = tuple[str, ...] | None


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(bench)
    app.command(matrix)
    app.command(quantize)
    app.command(pick)


def bench(
    bundles: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="BUNDLE ...", help="Bundles of 'pocketvlm export': folders or .zip.")
    ],
    *,
    backends: Annotated[
        Names, arg(metavar="NAME ...", help="onnxruntime, executorch, coreml; left out: all that can run here.")
    ] = None,
    precisions: Annotated[Names, arg(metavar="NAME ...", help="Such as fp32 int8; left out: all.")] = None,
    towers: Annotated[tuple[str, ...], arg(metavar="TOWER ...", help="image, text or both.")] = ("image", "text"),
    threads: Annotated[tuple[int, ...], arg(metavar="N ...", help="Numbers of threads to try.")] = (1,),
    rounds: Annotated[int, arg(metavar="N", help="How often each file has its turn.")] = 7,
    runs: Annotated[int, arg(metavar="N", help="Measured runs in one turn.")] = 20,
    image: Annotated[Path | None, arg(metavar="FILE", help="A picture of yours; default: a made-up JPEG.")] = None,
    text: Annotated[str, arg(metavar="TEXT", help="The string that is embedded.")] = "a photo of a dog on the beach",
    profile: Annotated[bool, arg(help="Sum up the runtimes' own profilers by operator.")] = False,
    out: Annotated[Path | None, arg(metavar="DIR", help="Folder for bench.json and bench.png.")] = None,
    overwrite: Annotated[bool, arg(help="Replace earlier results in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Latency, load time and memory of bundles, each file in its own process, measured in turn; no torch for ONNX."""
    from pocketvlm.export.bench import bench as measure
    from pocketvlm.export.bench_report import JSON_FILE, bench_tables, save_report

    if out is not None:
        require("matplotlib", "distill")
        if (out / JSON_FILE).exists() and not overwrite:
            raise UsageError(f"{out} holds results, which would be lost; name another folder or pass --overwrite")
    report = measure(
        bundles, backends=backends, precisions=precisions, towers=towers, threads=threads, rounds=rounds, runs=runs,
        image=image, text=text, profile=profile, progress=_say,
    )  # fmt: skip
    if out is not None:
        save_report(report, out)
    if as_json:
        print(json.dumps(report.to_dict(), indent=1))
        for warning in report.warnings:
            _say(f"WARNING: {warning}")
    else:
        print(bench_tables(report))


def matrix(
    *,
    students: Annotated[
        tuple[str, ...] | None, arg(metavar="NAME ...", help="Students, folders, NAME=FOLDER; left out: all names.")
    ] = None,
    targets: Annotated[Names, arg(metavar="TARGET ...", help="onnx, executorch, coreml; left out: all.")] = None,
    precisions: Annotated[Names, arg(metavar="NAME ...", help="Such as fp32 int8; left out: all.")] = None,
    data: Annotated[
        str | None, arg(metavar="SOURCE", help="Pictures and texts to calibrate with, for run folders.")
    ] = None,
    judge: Annotated[
        str | None, arg(metavar="SOURCE", help="Others to judge on, R@5 included; left out: 32 of --data.")
    ] = None,
    out: Annotated[Path, arg(metavar="DIR", help="Folder of matrix.json and matrix.md; goes on with what is there.")],
    retry: Annotated[bool, arg(help="Try rows again that failed.")] = False,
    as_json: Json = False,
) -> None:
    """Try students x targets x precisions: what works, how large, how faithful, how fast here; can be continued."""
    require("torch", "distill")
    from pocketvlm.export.matrix import make_matrix, matrix_table
    from pocketvlm.students.config import student_names

    table = make_matrix(
        student_names() if students is None else students, out, targets=targets, precisions=precisions, data=data,
        judge=judge, retry=retry, progress=_say,
    )  # fmt: skip
    print(json.dumps(table, indent=1) if as_json else matrix_table(table))


def pick(
    *,
    size_mb: Annotated[float | None, arg(metavar="MB", help="Files of both towers, at most.")] = None,
    latency_ms: Annotated[float | None, arg(metavar="MS", help="One input on one thread, at most.")] = None,
    target: Annotated[str | None, arg(metavar="TARGET", help="onnx, executorch or coreml.")] = None,
    precision: Annotated[str | None, arg(metavar="NAME", help="Such as fp32 or int8.")] = None,
    tower: Annotated[Literal["image", "text"], arg(help="Whose latency --latency-ms limits.")] = "image",
    table: Annotated[
        Path | None, arg(metavar="FILE", help="A matrix.json of yours; default: the one that ships.")
    ] = None,
    measure: Annotated[bool, arg(help="Lower the candidates on this machine and time them; takes minutes.")] = False,
    at_most: Annotated[int, arg(metavar="N", help="So many candidates are measured.")] = 3,
    as_json: Json = False,
) -> None:
    """List the students that fit a size and a latency, largest first, from the matrix that ships with the kit."""
    from pocketvlm.export.pick import pick as choose

    if measure:
        require("torch", "distill")
    rows = choose(
        size_mb=size_mb, latency_ms=latency_ms, target=target, precision=precision, tower=tower, table=table,
        measure=measure, at_most=at_most, progress=_say,
    )  # fmt: skip
    if as_json:
        emit(rows, True, title="")
        return
    shown = [
        {
            **{key: row[key] for key in ("student", "target")},
            "prec": row["precision"],
            "MB": f"{row['mb']:.1f}",
            "image ms": _ms(row["image_ms"]),
            "text ms": _ms(row["text_ms"]),
            "cosine": f"{row['cosine']:.5f}",
            "weights": row["weights"],
            "timed": row["measured"],
        }
        for row in rows
    ]
    emit(shown, False, title="students that fit")


def quantize(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="A run or student folder.")],
    *,
    budget: Annotated[
        str, arg(metavar="BUDGET", help="'r@5 -0.5' (points that may be lost), 'cosine 0.995' or 'size 0.3'.")
    ],
    out: Annotated[Path, arg(metavar="DIR", help="Folder of quantize.json, its plot, the plan and the bundle.")],
    data: Annotated[
        str | None,
        arg(
            metavar="SOURCE",
            help="Captioned pictures to calibrate and judge on; default: the training data of the run. Not a test's.",
        ),
    ] = None,
    target: Annotated[str, arg(metavar="TARGET", help="onnx or executorch; a plan serves every target.")] = "onnx",
    precisions: Annotated[
        Names, arg(metavar="NAME ...", help="Beside fp32, int8 and mixed; left out: w8a8-dynamic, w4, w8a8-static.")
    ] = None,
    verdict: Annotated[
        Literal["auto", "bound", "estimate"],
        arg(help="A loss by its one-sided 95 % bound, as measured, or by the bound where the sample can prove it."),
    ] = "auto",
    prefer: Annotated[
        Literal["both", "size", "latency"], arg(help="Which point within the budget is exported.")
    ] = "both",
    pictures: Annotated[int, arg(metavar="N", help="At most so many to judge on.")] = 1024,
    overwrite: Annotated[bool, arg(help="Replace earlier results in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Size, latency and accuracy of what a student can be quantized to, and the bundle that meets a budget.

    Exits with 1 where no point meets it.
    """
    require("matplotlib", "distill")
    from pocketvlm.export.quantize import quantize as measure
    from pocketvlm.export.quantize_report import as_dict, table
    from pocketvlm.export.quantize_report import verdict as sentence

    found = measure(
        run, out, budget=budget, data=data, target=target, precisions=precisions, verdict=verdict, prefer=prefer,
        pictures=pictures, overwrite=overwrite, progress=_say,
    )  # fmt: skip
    print(json.dumps(as_dict(found), indent=1) if as_json else table(found))
    if found.chosen is None:
        if as_json:
            _say(sentence(found))
        sys.exit(1)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _say(line: str) -> None:
    """Progress, on stderr, so that --json stays JSON."""
    print(line, file=sys.stderr, flush=True)
