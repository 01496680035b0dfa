"""`pocketvlm vlm distill` and `vlm eval`: train a generative student, score one; heavy imports are inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from pocketvlm.edge.errors import UsageError, require
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
        str | None,
        arg(
            metavar="TEACHER",
            help="FOLDER or vlm:FOLDER of a talking teacher (save_vlm) or of what one said; hf-vlm:FOLDER or "
            "hf-vlm:ORG/NAME, a Hugging Face model; recorded:FILE.jsonl, answers about --data; openmoji-talking: what "
            "the built-in teacher said, which recipe openmoji-talking goes with.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        arg(
            metavar="DATA",
            help="Your own pictures in place of the built-in ones: conversations as JSON Lines, or with --ask or "
            "recorded answers any data set.",
        ),
    ] = None,
    ask: Annotated[
        tuple[str, ...], arg(metavar="QUESTION", help="With --data: what the teacher is asked about every picture.")
    ] = (),
    aligned: Annotated[
        float,
        arg(metavar="WEIGHT", help="With --data: of the teacher's probabilities of its answers, compared by spans."),
    ] = 0.0,
    own_answers: Annotated[
        bool, arg(help="With --aligned: the conversations' answers are learnt, and the teacher only reads them.")
    ] = False,
    max_new_tokens: Annotated[
        int, arg(metavar="N", help="With --data: tokens of a teacher's answer at most; longer ones are cut.")
    ] = 64,
    student: Annotated[str, arg(help="A named size, its YAML file, or a student's folder to go on with.")] = "vlm-8m",
    vision: Annotated[
        str | None,
        arg(
            metavar="student:FOLDER",
            help="See with the tower of that distilled CLIP student (or of the run that holds it) in place of the one "
            "of --student; its backbone, weights, mean and std, at the size of --student.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        arg(help="A shipped recipe's name or a YAML file; docs/vlm-distill.md. Default: few-label, or answers."),
    ] = None,
    out: Annotated[Path, arg(metavar="RUN", help="Output folder; must be empty or absent.")],
    fold: Fold = 0,
    tokenizer: Annotated[
        Path | None, arg(metavar="FILE", help="tokenizer.json of a new student; default: the teacher's, or a new one.")
    ] = None,
    words: Annotated[
        str | None,
        arg(metavar="FOLDER", help="Word vectors that a new student's embedding starts at; minilm computes them."),
    ] = None,
    limit: Annotated[int | None, arg(metavar="N", help="So many pictures only, to try a recipe out.")] = None,
    device: Device = "auto",
    scenes: Annotated[int, arg(metavar="N", help="Scenes of the test pool that the student is scored on.")] = 500,
    workers: Annotated[int, arg(metavar="N", help="With --data: processes that read pictures.")] = 2,
    on_bad_sample: Annotated[
        Literal["skip", "refuse"], arg(help="With --data: count what cannot be used, or stop at the first.")
    ] = "skip",
    template: Annotated[
        str | None,
        arg(metavar="TEXT", help="Of hf-vlm, in place of its chat template: <image>, {question} and {answer} in it."),
    ] = None,
    allow_download: Annotated[bool, arg(help="A hub id may reach the network.")] = False,
    trust_remote_code: Annotated[bool, arg(help="Run Python code that comes with a Hugging Face checkpoint.")] = False,
    resume: Annotated[bool, arg(help="Go on with the run in --out.")] = False,
    overwrite: Annotated[bool, arg(help="Replace an output folder that is not empty.")] = False,
) -> None:
    """Distil a talking teacher into a generative student, on the built-in scenes or your own pictures and questions."""
    require("torch", "distill")
    from pocketvlm.distill.vlm.recipe import load_vlm_recipe
    from pocketvlm.distill.vlm.run import STUDENT

    given = {"template": template, "allow_download": allow_download, "trust_remote_code": trust_remote_code}
    shared: dict[str, Any] = {
        "words": words, "vision": vision, "tokenizer": tokenizer,
        "options": {name: value for name, value in given.items() if value},
        "limit": limit, "device": device, "overwrite": overwrite, "say": lambda line: print(line, flush=True),
    }  # fmt: skip
    loaded = load_vlm_recipe(recipe or ("few-label" if data is None else "answers"), overrides)
    if data is not None:
        from pocketvlm.distill.vlm.own_data import distill_own

        found = distill_own(
            data, teacher, student, loaded, out, ask=ask, aligned=aligned, own_answers=own_answers,
            max_new_tokens=max_new_tokens, workers=workers, resume=resume,
            on_bad_sample=on_bad_sample, **shared,
        )  # fmt: skip
        print(f"{found['conversations']:,} conversations were learnt from")
        if found["left_out"]["total"]:
            counts = found["left_out"]["counts"].items()
            emit([{"reason": reason, "n": count} for reason, count in counts], False, title="counted")
    else:
        from pocketvlm.distill.vlm.run import distill_vlm as distill

        if teacher is None or ask or aligned or own_answers:
            raise UsageError(
                "the built-in scenes are learnt from a teacher and asked about by themselves; name one with --teacher "
                "(openmoji-talking is shipped), or your own pictures with --data, which --ask and --aligned are for"
            )
        found = distill(teacher, student, loaded, out, fold=fold, scored_scenes=scenes, resume=resume, **shared)
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
