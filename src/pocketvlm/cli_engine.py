"""Commands around long runs: what one will take, and how runs compare. Everything heavy is imported inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError
from pocketvlm.table import emit

Json = Annotated[bool, arg(name="json", help="Print JSON instead of tables.")]


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(plan)
    app.command(report)


def plan(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")],
    overrides: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help="Changes such as train.batch_size=4096.")
    ] = (),
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
    from pocketvlm.distill.plan import make_plan
    from pocketvlm.distill.recipe import load_recipe

    found = make_plan(
        load_recipe(recipe, overrides), samples=samples, epochs=epochs, device=device, count=count, price=price
    )
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    emit(found.rows(), False, title=f"plan of {found.recipe} on {found.count} x {found.device}")
    emit(found.assumptions, False, title="assumptions")


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
        print(f"report: {out}")
