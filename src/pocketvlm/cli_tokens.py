"""Commands about the visual tokens of generative students. In the manner of `cli`: heavy imports are inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError, require
from pocketvlm.table import emit

tokens_app = tyro.extras.SubcommandApp()

Pool = Annotated[Literal["teacher", "student", "test"], arg(help="Whose built-in pictures the scenes are made of.")]


def register(app: Any) -> None:
    """Add these commands to the command line."""
    app.command(tokens_app, name="tokens", help="Leave visual tokens of a generative student out.")


@tokens_app.command
def sweep(
    run: Annotated[Positional[Path], arg(metavar="RUN", help="A folder with a saved generative student.")],
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help="Folder of tokens.json and its plot; left out: none.")] = None,
    pool: Pool = "test",
    fold: Annotated[int, arg(help="Which fifth of the concepts is held out for testing (0 to 4).")] = 0,
    scenes: Annotated[int, arg(metavar="N", help="Scenes that are shown.")] = 200,
    questions: Annotated[int, arg(metavar="N", help="Questions about each; captions among them are left out.")] = 4,
    keep: Annotated[
        tuple[int, ...], arg(metavar="N ...", help="Visual tokens to keep; left out: 1/2, 1/3, 1/4, 1/6 and 1/9.")
    ] = (),
    methods: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help="Left out: all that this model can do; docs/visual-tokens.md.")
    ] = (),
    positions: Annotated[
        Literal["kept", "renumbered"], arg(help="Whether tokens keep the positions that they have without reduction.")
    ] = "kept",
    batch: Annotated[int, arg(metavar="N", help="Questions that are answered at once.")] = 64,
    rounds: Annotated[int, arg(metavar="N", help="Rounds of timing, in which all settings take turns.")] = 15,
    device: Annotated[str, arg(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    limit: Annotated[int | None, arg(metavar="N", help="The first N pictures of the pool only, for a try.")] = None,
    overwrite: Annotated[bool, arg(help="Replace earlier results in --out.")] = False,
    as_json: Annotated[bool, arg(name="json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Accuracy, operations and prefill time of every way to keep fewer visual tokens, beside all of them."""
    if out is not None:
        require("matplotlib", "distill")
        if (out / "tokens.json").exists() and not overwrite:
            raise UsageError(
                f"{out} holds the results of an earlier sweep, which would be lost; name another folder or pass "
                "--overwrite"
            )
    if min(scenes, questions, batch, rounds) < 1:
        raise UsageError(
            f"{scenes} scenes, {questions} questions, batches of {batch} and {rounds} rounds were asked for, which "
            "measures nothing; give 1 or more of each"
        )
    import torch

    from pocketvlm.data.scenes import picture_set
    from pocketvlm.distill.environment import describe_environment
    from pocketvlm.distill.vlm.sweep import applicable, reduction_of
    from pocketvlm.distill.vlm.sweep import sweep as measure
    from pocketvlm.distill.vlm.sweep_report import as_dict, rows, save_report
    from pocketvlm.students.vlm import load_vlm
    from pocketvlm.teachers.device import describe_device, pick_device

    where = pick_device(device)
    model = load_vlm(run).to(where)
    found = applicable(model, keep, methods)
    settings = [(name, reduction_of(name, number, positions)) for name, numbers in found.items() for number in numbers]
    pictures = picture_set(pool, fold, limit=limit)
    points = measure(
        model, pictures, settings=settings, scenes=scenes, questions=questions, batch=batch, rounds=rounds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    facts: dict[str, Any] = {
        "model": model.config.name,
        "visual_tokens": model.connector.tokens,
        "pool": pool,
        "fold": fold,
        "pictures": len(pictures),
        "scenes": scenes,
        "questions": questions,
        "positions": positions,
        "device": describe_device(where),
        "threads": torch.get_num_threads(),
        "environment": {key: value for key, value in describe_environment().items() if key != "command"},
    }
    if out is not None:
        save_report(points, facts, out)
    if as_json:
        print(json.dumps(as_dict(points, facts), indent=1))
        return
    emit(rows(points), False, title=f"{model.config.name}: visual tokens, {pool} pool, {scenes} scenes")
    if out is not None:
        print(f"report: {out}")
