"""`pocketvlm vlm distill` and `vlm eval`: train a generative student, score one; heavy imports are inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import require
from pocketvlm.table import emit

Fold = Annotated[int, arg(help="Which fifth of the concepts is held out for testing (0 to 4).")]

Device = Annotated[str, arg(help="auto, cpu, cuda, cuda:1 or mps.")]


def register(vlm_app: Any) -> None:
    """Add these commands to the group `vlm`."""
    vlm_app.command(distill_vlm, name="distill")
    vlm_app.command(evaluate_vlm, name="eval")


def distill_vlm(
    overrides: Annotated[
        Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]", help="Changes such as stages.0.steps=200.")
    ] = (),
    *,
    teacher: Annotated[
        str,
        arg(
            metavar="TEACHER",
            help="Folder of a talking teacher (save_vlm) or of what one said; openmoji-talking: what the built-in "
            "teacher said, which recipe openmoji-talking goes with.",
        ),
    ],
    student: Annotated[str, arg(help="A named size, its YAML file, or a student's folder to go on with.")] = "vlm-8m",
    recipe: Annotated[str, arg(help="A shipped recipe's name or a YAML file; docs/vlm-distill.md.")] = "few-label",
    out: Annotated[Path, arg(metavar="RUN", help="Output folder; must be empty or absent.")],
    fold: Fold = 0,
    words: Annotated[
        str | None,
        arg(metavar="FOLDER", help="Word vectors that a new student's embedding starts at; minilm computes them."),
    ] = None,
    limit: Annotated[int | None, arg(metavar="N", help="So many pictures only, to try a recipe out.")] = None,
    device: Device = "auto",
    scenes: Annotated[int, arg(metavar="N", help="Scenes of the test pool that the student is scored on.")] = 500,
    resume: Annotated[bool, arg(help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, arg(help="Replace an output folder that is not empty.")] = False,
) -> None:
    """Distil a talking teacher into a generative student on the built-in scenes, in the stages of a recipe."""
    require("torch", "distill")
    from pocketvlm.distill.vlm.recipe import load_vlm_recipe
    from pocketvlm.distill.vlm.run import STUDENT
    from pocketvlm.distill.vlm.run import distill_vlm as distill

    found = distill(
        teacher, student, load_vlm_recipe(recipe, overrides), out, fold=fold, words=words, limit=limit,
        device=device, scored_scenes=scenes, resume=resume, overwrite=overwrite,
        say=lambda line: print(line, flush=True),
    )  # fmt: skip
    _show(found["scores"])
    print(f"student: {out / STUDENT}")


def evaluate_vlm(
    model: Annotated[Positional[Path], arg(metavar="FOLDER", help="A generative student, as save_vlm writes it.")],
    *,
    pool: Annotated[Literal["teacher", "student", "test"], arg(help="Whose pictures the scenes are of.")] = "test",
    fold: Fold = 0,
    scenes: Annotated[int, arg(metavar="N", help="How many scenes, four questions about each.")] = 500,
    limit: Annotated[int | None, arg(metavar="N", help="So many pictures only.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, arg(name="json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Accuracy by type of question, how often "yes" is said, captions by chrF and CIDEr-D, and named things that are
    not there."""
    require("torch", "distill")
    from pocketvlm.data.scenes import picture_set
    from pocketvlm.distill.vlm.evaluate import evaluate_vlm as evaluate
    from pocketvlm.students.vlm import load_vlm
    from pocketvlm.teachers.device import full_float32, pick_device

    with full_float32():
        scores = evaluate(load_vlm(model).to(pick_device(device)), picture_set(pool, fold, limit=limit), scenes=scenes)
    if as_json:
        print(json.dumps(scores, indent=2))
    else:
        _show(scores)


def _show(scores: dict[str, Any]) -> None:
    rows = []
    for name, row in scores["types"].items():
        yes = round(100 * row["yes"], 1) if "yes" in row else ""
        rows.append(
            {
                "question": name,
                "n": row["n"],
                "right %": round(100 * row["accuracy"], 1),
                "most common %": round(100 * row["majority"], 1),
                "says yes %": yes,
            }
        )
    emit(rows, False, title="answers")
    captions = scores["captions"]
    print(f"all questions {100 * scores['accuracy']:.1f} %, mean of types {100 * scores['mean']:.1f} %")
    print(
        f"captions: chrF {captions['chrf']:.1f} of 100, CIDEr-D {captions['cider_d']:.2f} of 10; of what "
        f"descriptions of scenes name {100 * captions['hallucinated']:.1f} % is not there"
    )
