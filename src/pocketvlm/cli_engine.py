"""Commands around long runs: the teacher cache, what a run will take, and how runs compare.

In the manner of `cli`: everything heavy is imported inside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.table import emit, emit_record

cache_app = tyro.extras.SubcommandApp()

Json = Annotated[bool, arg(name="json", help="Print JSON instead of tables.")]
Made = Annotated[Path, arg(metavar="DIR", help="The --out of 'pocketvlm cache-teacher', or one cache inside it.")]
Recipe = Annotated[Positional[str], arg(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")]
Overrides = Annotated[
    Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help="Changes such as views.count=4.")
]


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(plan)
    app.command(cache_teacher, name="cache-teacher")
    app.command(cache_app, name="cache", help="Look at a teacher's kept outputs, and check them.")
    app.command(report)


def plan(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    samples: Annotated[
        float | None, arg(metavar="N", help="Pictures of the data, such as 1e9; left out: what data.train has here.")
    ] = None,
    epochs: Annotated[
        float | None, arg(metavar="N", help="Passes over them; left out: 1 with --samples, else train.steps.")
    ] = None,
    device: Annotated[
        str, arg(metavar="NAME", help="h100, h200, a100, l4 or cpu by constants; 'here' is timed for some seconds.")
    ] = "here",
    count: Annotated[int, arg(metavar="N", help="How many of that device.")] = 1,
    price: Annotated[float | None, arg(metavar="PRICE", help="Of one device for an hour.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will take before it starts: work, memory, disk, days, cost, and every assumption behind them."""
    from pocketvlm.distill.overrides import as_typed
    from pocketvlm.distill.plan import make_plan
    from pocketvlm.distill.recipe import load_recipe

    found = make_plan(
        load_recipe(recipe, as_typed(overrides)),
        samples=samples,
        epochs=epochs,
        device=device,
        count=count,
        price=price,
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    emit(found.rows(), False, title=f"plan of {found.recipe} on {found.count} x {found.device}")
    emit(found.assumptions, False, title="assumptions")


def cache_teacher(
    recipe: Recipe,
    overrides: Overrides = (),
    *,
    out: Annotated[Path, arg(help="Folder of the outputs; one that was begun by the same command is continued.")],
    dtype: Annotated[Literal["bfloat16", "float32"], arg(help="How numbers are stored; computed in float32.")] = (
        "bfloat16"
    ),
    shard_size: Annotated[int, arg(metavar="N", help="Pictures in one shard.")] = 512,
    by_shard: Annotated[
        bool, arg(help="One shard for each tar, opened when its turn comes; always so with data.stream.")
    ] = False,
) -> None:
    """Keep what a recipe's teachers say to all views, captions and texts; also in parallel, by torchrun.

    Prints the bytes that it will take first. A run uses the folder by teacher.cache=DIR.
    """
    from pocketvlm.distill.cache_teacher import Share, cache_teacher
    from pocketvlm.distill.overrides import as_typed
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.distill.recipe import load_recipe

    share = Share.of_environment()
    # one of them speaks for all
    report = Reporter(share.rank == 0)
    done = cache_teacher(
        load_recipe(recipe, as_typed(overrides)), out, dtype=dtype, shard_size=shard_size, by_shard=by_shard,
        share=share, report=report,
    )  # fmt: skip
    if done:
        print(f"cache: {out}")
    else:
        said = f"process {share.rank} of {share.world} has made its shards; others are still at theirs"
        print(said, file=sys.stderr)


@cache_app.command(name="show")
def cache_show(made: Positional[Made], as_json: Json = False) -> None:
    """Print who made a cache, from what, what it holds and takes, and what was left out."""
    from pocketvlm.distill.cache_check import show

    rows = show(made)
    if as_json:
        emit(rows, True, title="cache")
        return
    for row in rows:
        emit_record({key: value for key, value in row.items() if key != "folder"}, title=row["folder"])


@cache_app.command(name="verify")
def cache_verify(
    made: Positional[Made],
    *,
    samples: Annotated[int, arg(metavar="N", help="Pictures, and texts, that the teacher is asked about again.")] = 64,
    seed: Annotated[int, arg(help="By which they are drawn.")] = 0,
    recipe: Annotated[
        str | None, arg(metavar="RECIPE", help="Teachers and data, where they are not those that the cache names.")
    ] = None,
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    allow_download: Annotated[
        bool, arg(help="Let a model that is not on this machine be fetched from its hub.")
    ] = False,
    trust_remote_code: Annotated[bool, arg(help="Run Python code that comes with a Hugging Face checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Hash every shard and ask the teacher again about a sample; exits with 1 where it says something else."""
    from pocketvlm.distill.cache_check import verify
    from pocketvlm.distill.recipe import load_recipe

    try:
        found = verify(
            made, samples=samples, seed=seed, recipe=None if recipe is None else load_recipe(recipe), device=device,
            allow_download=allow_download, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except IntegrityError as error:
        print(f"pocketvlm: {error}", file=sys.stderr)
        sys.exit(1)
    emit([one.to_dict() for one in found], as_json, title="cache verify")
    if bad := [one for one in found if not one.holds]:
        worst = min(bad, key=lambda one: one.cosine)
        print(
            f"pocketvlm: the {worst.what} kept of {worst.worst} has cosine {worst.cosine:.6f} to what teacher "
            f"{worst.teacher!r} says now, so a student would be taught something else; make the cache anew",
            file=sys.stderr,
        )
        sys.exit(1)


def report(
    runs: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="RUN ...", help="Run folders; the first is the yardstick.")
    ],
    *,
    out: Annotated[Path | None, arg(metavar="PATH.html", help="Where the page goes.")] = None,
    overwrite: Annotated[bool, arg(help="Replace the file --out.")] = False,
    as_json: Annotated[bool, arg(name="json", help="Print JSON, beside the page or instead of it.")] = False,
) -> None:
    """Compare runs on one page: what differs, scores with paired intervals, curves over each other."""
    from pocketvlm.distill.compare import compare, read_runs, write_comparison

    if out is None and not as_json:
        raise UsageError("report was told neither --out nor --json, so its result would be lost; give --out PATH.html")
    if out is not None and out.suffix != ".html":
        raise UsageError(f"--out {out} does not end in .html, and nothing else is written; name it {out.name}.html")
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"{out} exists and would be lost; name another file or pass --overwrite")
    values = write_comparison(runs, out) if out is not None else compare(read_runs(runs))
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        emit([_in_short(run) for run in values["runs"]], False, title="runs")
        print(f"report: {out}")


def _in_short(run: dict[str, Any]) -> dict[str, str]:
    """One line of a compared run; the page says with what uncertainty."""
    told = {"run": run["name"], "state": run["state"], "steps": f"{run['step']:,} of {run['total']:,}"}
    told["loss"] = "-" if run["loss"] is None else f"{run['loss']:.4g}"
    for part in ("image_to_text", "text_to_image", "zero_shot"):
        scores = run["scores"].get(part, {})
        metric = "top-1" if part == "zero_shot" else "R@5"
        told[f"{part} {metric}"] = f"{scores[metric]:.1%}" if metric in scores else "-"
    return told
