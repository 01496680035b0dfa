"""A whole run on the built-in pictures: lists of scenes, what the teacher says of them, the stages, the scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pocketvlm.data.openmoji import licences as data_licences
from pocketvlm.data.scenes import SIDE_STEP, PictureSet, picture_set
from pocketvlm.distill.checkpoint import write_text_atomically
from pocketvlm.distill.vlm.answer_cache import KeptAnswers, check_vocabulary, kept_answers
from pocketvlm.distill.vlm.evaluate import evaluate_vlm
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.kept_teacher import SHIPPED, KeptTeacher, shipped_folder
from pocketvlm.distill.vlm.pseudo import agreement, labelled_numbers, picture_answers, pseudo_labelled, subset, unnamed
from pocketvlm.distill.vlm.recipe import DataSection, VlmRecipe
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.distill.vlm.stages import Live, Source, StageRun
from pocketvlm.distill.vlm.teachers import AnyTeacher, BuiltinVlm, RecordedTeacher, open_vlm_teacher
from pocketvlm.distill.vlm.words import load_word_vectors, start_from_words, word_vectors
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import Vlm, VlmConfig, build_vlm, load_vlm, load_vlm_config, on_student_tower, save_vlm
from pocketvlm.students.vlm.config import STUDENT as CLIP_STUDENT
from pocketvlm.students.vlm.io import MANIFEST as MODEL
from pocketvlm.students.vlm.io import TOKENIZER
from pocketvlm.teachers.device import describe_device, full_float32, pick_device
from pocketvlm.teachers.files import write_atomic
from pocketvlm.teachers.lit import weights_licences
from pocketvlm.teachers.vlm.base import VlmTeacher

STUDENT, SCORES, WORDS = "student", "eval.json", "words.safetensors"
MINILM = "minilm"
_MARK = ".pocketvlm-vlm-run"
# streams of scenes: of a recipe's seed, far from those that score
_LABELLED, _TAUGHT = 11, 500_011
_SCORED_SCENES = 500


class Sources(NamedTuple):
    """What the stages learn from. facts: what is worth reporting of it, plain JSON."""

    labelled: Source
    taught: Source | None
    live: Live | None
    facts: dict[str, Any]


def sources_of(
    recipe: VlmRecipe,
    teacher: Vlm | VlmTeacher | KeptTeacher,
    student: Vlm,
    pictures: PictureSet,
    work: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Sources:
    """Draw the recipe's two lists over these pictures, and let the trunk and the teacher see them once.

    Labels of pictures whose concepts do not keep them are read for `facts` alone. work: where features and answers are
    kept; what is there of the same trunk, teacher and lists is read.

    Raises:
        UsageError: no labelled picture, a teacher of another vocabulary where its distributions are learned from, or
            a kept one where it would have to answer anew. IntegrityError: what it said is damaged or not of these
            lists.
    """
    data = recipe.data
    if isinstance(teacher, BuiltinVlm):
        teacher = teacher.model
    hears = _check_heard(recipe, teacher, student)
    known = labelled_numbers(pictures, data.captions)
    if not known:
        raise UsageError(
            f"none of {len(pictures)} pictures keeps its labels at data.captions {data.captions:g}, so nothing true is "
            "known of any; raise that share"
        )
    side, moves = student.config.vision.size, any("vision" in stage.train for stage in recipe.stages)
    where = student.device

    def source(scenes: SceneList, answers: KeptAnswers | None = None) -> Source:
        composer = composer_of(scenes.pictures, side, variants=data.variants, device=where)
        if moves:
            return Source(scenes, composer=composer, answers=answers)
        kept = trunk_features(
            student, scenes, composer, work / "features", bfloat16=recipe.optim.bfloat16, say=say
        )  # fmt: skip
        return Source(scenes, kept, answers=answers)

    unlabelled = sorted(set(range(len(pictures))) - set(known))
    answers = live = scenes = None
    if isinstance(teacher, KeptTeacher):
        # before anything is computed
        scenes = taught_list(data, pictures, known, teacher.said(pictures, unlabelled), student.tokenizer.json)
        kept = teacher.folder / answers_folder(scenes)
        if hears and not kept.is_dir():
            raise UsageError(
                f"what the teacher said in {str(teacher.folder)!r} is of other scenes than this recipe draws; take the "
                f"recipe that it was kept with (of {SHIPPED}: {SHIPPED}), or give the teacher itself"
            )
        if hears:
            answers = kept_answers(kept, scenes, top=recipe.teacher.top, places=recipe.teacher.places)
    true = source(labelled_list(data, pictures, known, student.tokenizer.json))
    facts: dict[str, Any] = {
        "pictures": {"all": len(pictures), "labelled": len(known)},
        "answer_tokens": {"labelled": true.scenes.tokens},
    }
    if all(stage.heard == 0 for stage in recipe.stages):
        return Sources(true, None, None, facts)
    if not isinstance(teacher, KeptTeacher):
        said = picture_answers(teacher, pictures, unlabelled, kept=work, say=say)
        if isinstance(teacher, Vlm):
            # with it, what is kept here is a teacher for other runs
            write_atomic(work / TOKENIZER, teacher.tokenizer.json)
        scenes = taught_list(data, pictures, known, said, student.tokenizer.json)
    assert scenes is not None, "drawn from what either kind of teacher said"
    if hears and isinstance(teacher, Vlm):
        theirs = composer_of(pictures, teacher.config.vision.size, variants=data.variants, device=where)
        if any(stage.on_policy for stage in recipe.stages):
            live = Live(teacher, theirs)
        if any(stage.weights.hears for stage in recipe.stages):
            answers = kept_answers(
                work / answers_folder(scenes), scenes, top=recipe.teacher.top, teacher=teacher,
                composer=theirs, places=recipe.teacher.places, say=say,
            )  # fmt: skip
    facts["said_of_unlabelled"] = _said_facts(scenes, pictures, unlabelled, say)
    told = agreement(scenes.pictures, pictures, unlabelled)
    facts["teacher_right_about_unlabelled"] = {key: round(value, 4) for key, value in told.items()}
    facts["answer_tokens"]["taught"] = scenes.tokens
    facts["answer_cache_MB"] = 0.0 if answers is None else round(answers.bytes / 1e6, 1)
    return Sources(true, source(scenes, answers), live, facts)


def _check_heard(recipe: VlmRecipe, teacher: Vlm | VlmTeacher | KeptTeacher, student: Vlm) -> bool:
    """Whether distributions of the teacher are learned from, which not every teacher can give."""
    judged = next((stage.name for stage in recipe.stages if stage.on_policy), None)
    hears = judged is not None or any(stage.weights.hears for stage in recipe.stages)
    if hears and isinstance(teacher, KeptTeacher) and teacher.tokenizer_json != student.tokenizer.json:
        raise UsageError(
            f"a same-vocabulary loss was asked of what the teacher in {str(teacher.folder)!r} said, whose tokenizer is "
            "not the student's, so entry i of its shares would teach another token; build the student with that "
            "tokenizer.json, or learn from its answers alone (--recipe answers)"
        )
    if isinstance(teacher, KeptTeacher):
        if judged is not None:
            raise UsageError(
                f"stage {judged!r} lets the teacher judge the student's own answers, and only what it said "
                "once is given; give the teacher's folder, or set on_policy to 0"
            )
    elif hears and isinstance(teacher, Vlm):
        check_vocabulary(teacher, student.tokenizer.json)
    elif hears:
        raise UsageError(
            f"recipe {recipe.name!r} compares distributions or visual tokens (response, visual, relation or on-policy) "
            f"with teacher {teacher.name!r}, whose tokenizer is not the student's, so entry i of its logits would "
            "teach another token; take a recipe of answers alone (--recipe answers), or set those weights to 0"
        )
    return hears


def _said_facts(
    scenes: SceneList, pictures: PictureSet, unlabelled: Sequence[int], say: Callable[[str], None]
) -> dict[str, Any]:
    """What was of no use in the teacher's answers: names by language that it left empty, kinds and colours that are
    none of those that there are."""
    shown = [scenes.pictures.pictures[number] for number in unlabelled]
    without = unnamed(scenes.pictures, unlabelled)
    if without:
        told = ", ".join(f"{count} in {language}" for language, count in without.items())
        say(f"the teacher left names empty, which are not asked about: {told}")
    return {
        "pictures": len(unlabelled),
        "without_name": without,
        "without_kind": sum(picture.kind is None for picture in shown),
        "without_colour": sum(picture.colour is None for picture in shown),
    }


def labelled_list(data: DataSection, pictures: PictureSet, known: Sequence[int], tokenizer_json: bytes) -> SceneList:
    """Scenes of the labelled pictures with true answers."""
    return SceneList.draw(
        subset(pictures, known), tokenizer_json, scenes=data.labelled_scenes, seed=data.seed + _LABELLED,
        questions=data.questions, length=data.length, variants=data.variants,
    )  # fmt: skip


def taught_list(
    data: DataSection,
    pictures: PictureSet,
    known: Sequence[int],
    said: Mapping[str, Mapping[str, str]],
    tokenizer_json: bytes,
) -> SceneList:
    """Scenes of all pictures; answers follow from labels where they are known and from what the teacher said of the
    others (`picture_answers`)."""
    return SceneList.draw(
        pseudo_labelled(pictures, known, said), tokenizer_json, scenes=data.scenes, seed=data.seed + _TAUGHT,
        questions=data.questions, length=data.length, variants=data.variants,
    )  # fmt: skip


def answers_folder(scenes: SceneList) -> str:
    """Name of the folder of a list's `kept_answers`."""
    return f"answers-{scenes.digest[:16]}"


def train_student(
    model: Vlm,
    recipe: VlmRecipe,
    sources: Sources,
    folder: Path,
    *,
    resume: bool,
    say: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Run the stages in place, with kept trunk outputs where the sources have them. Returns the history."""

    def run() -> list[dict[str, Any]]:
        return StageRun(model, recipe, sources.labelled, sources.taught, folder, live=sources.live, say=say).run(
            resume=resume
        )

    if sources.labelled.features is None:
        return run()
    with without_trunk(model):
        return run()


def hf_options(teacher: str | Path, half: bool, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`load_hf_vlm`'s options of a run: those given, and half precision where the run has it."""
    return dict(options or {}) | ({"dtype": "bfloat16"} if half and str(teacher).startswith("hf-vlm:") else {})


def check_student(
    student: str, tokenizer: str | Path | None, vision: str | None, words: str | Path | None = None
) -> None:
    """Before anything is deleted or computed.

    Raises:
        UsageError: no such student, a tokenizer, a tower or vectors of words for one that has its own, a tokenizer or
            vectors that are no file, or as `on_student_tower`.
    """
    saved = (Path(student) / MODEL).is_file()
    if not saved:
        load_vlm_config(student)
    elif vision is not None:
        raise UsageError(
            f"{student!r} is a saved student, which has a tower that its connector was trained on, and vision "
            f"{vision!r} names another; leave one of them out"
        )
    if not saved and vision is not None:
        on_student_tower(load_vlm_config(student), vision)
    if words is not None and saved:
        raise UsageError(
            f"vectors of words were given for the student in {student!r}, whose embedding has learnt its own; they "
            "would be ignored, so leave them out"
        )
    if words is not None and str(words) != MINILM and not (Path(words) / WORDS).is_file():
        raise UsageError(f"folder {str(words)!r} holds no {WORDS}; give one that does, or {MINILM!r}")
    if tokenizer is None:
        return
    if saved:
        raise UsageError(
            f"a tokenizer was given for the student in {student!r}, which has its own; its embedding would mean other "
            "tokens, so leave it out, or name a size for a new student"
        )
    if not Path(tokenizer).is_file():
        raise UsageError(f"the tokenizer {str(tokenizer)!r} is no file; give a tokenizer.json of a generative student")


def student_of(
    student: str,
    tokenizer_of: Callable[[VlmConfig], bytes],
    seed: int,
    *,
    licences: Sequence[tuple[str, str, str]],
    words: str | Path | None = None,
    vision: str | None = None,
) -> Vlm:
    """A folder's student as it is, or a new one.

    Args:
        student, words, vision: as `distill_vlm`. tokenizer_of: of a new one. licences: of what it learns from.
    """
    if (Path(student) / MODEL).is_file():
        return load_vlm(student)
    config = load_vlm_config(student)
    if vision is not None:
        config = on_student_tower(config, vision)
    weights = config.vision.weights
    # a CLIP student brings its own
    theirs = () if weights == "none" or weights.startswith(CLIP_STUDENT) else weights_licences()
    config = config.model_copy(update={"licences": (*theirs, *licences)})
    model = build_vlm(config, tokenizer_of(config), seed=seed)
    if words is not None:
        vectors = (
            word_vectors(model.tokenizer.pieces()) if str(words) == MINILM else load_word_vectors(Path(words) / WORDS)
        )
        start_from_words(model, vectors, seed=seed)
    return model


def tower_folder(config: VlmConfig) -> tuple[str, ...]:
    """The CLIP student's folder whose tower a configuration names, if it does."""
    weights = config.vision.weights
    return (weights.removeprefix(CLIP_STUDENT),) if weights.startswith(CLIP_STUDENT) else ()


def _check_scenes(model: Vlm, recipe: VlmRecipe) -> None:
    """Whether scenes of this recipe can be shown to the student, before anything is computed."""
    side, room = model.config.vision.size, model.config.decoder.context_length - model.text_start
    if side % SIDE_STEP:
        raise UsageError(
            f"the student sees pictures of {side} pixels a side, and scenes are made of whole places at multiples of "
            f"{SIDE_STEP}; give vision.size {side // SIDE_STEP * SIDE_STEP or SIDE_STEP}, or, of a tower with "
            "one size, your own pictures with --data"
        )
    if room < recipe.data.length:
        raise UsageError(
            f"rows of {recipe.data.length} tokens were asked for and the student's decoder has places for {room} "
            f"beside a picture; set data.length={room}, or raise decoder.context_length"
        )


def _tokenizer_of(teacher: AnyTeacher, given: str | Path | None) -> bytes:
    """The one given, else the teacher's own, else that of the shipped answers, which spells the scenes' words."""
    if given is not None:
        return Path(given).read_bytes()
    if isinstance(teacher, BuiltinVlm):
        return teacher.model.tokenizer.json
    return teacher.tokenizer_json if isinstance(teacher, KeptTeacher) else KeptTeacher(shipped_folder()).tokenizer_json


def make_room(out: Path, resume: bool, overwrite: bool, read: tuple[str | Path, ...]) -> None:
    """An empty `out`, but for what a run that is resumed left there."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{str(out)!r} is a file, and a run needs a folder to write into; name another")
    if resume and overwrite:
        raise UsageError(f"the run in {str(out)!r} cannot be both resumed and replaced; give resume or overwrite")
    ours = out.is_dir() and ((out / _MARK).is_file() or not any(out.iterdir()))
    if resume and out.exists() and not ours:
        raise UsageError(
            f"folder {str(out)!r} holds files and no run of this command, so there is nothing to resume and they would "
            "be mixed with one; name the run's folder"
        )
    if resume or not out.exists() or all(path.name == _MARK for path in out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).write_text("made by 'pocketvlm vlm distill'; its --overwrite deletes this folder\n", "utf-8")
        return
    if not overwrite:
        raise UsageError(
            f"folder {str(out)!r} is not empty, so two runs would be mixed; pass resume to go on with the one "
            "there, overwrite to replace it, or choose another folder"
        )
    # of KIND:PATH?OPTIONS the path
    paths = [Path(part) for path in map(str, read) for part in (path, path.partition(":")[2].partition("?")[0]) if part]
    inside = [str(path) for path in paths if path.exists() and path.resolve().is_relative_to(out.resolve())]
    if inside or not (out / _MARK).is_file():
        why = f"{inside[0]} is in it and is read" if inside else "its files are not those of such a run"
        raise UsageError(f"folder {str(out)!r} is not replaced, because {why}; choose another folder")
    shutil.rmtree(out)
    make_room(out, False, False, ())


def distill_vlm(
    teacher: str | Path,
    student: str,
    recipe: VlmRecipe,
    out: Path,
    *,
    vision: str | None = None,
    fold: int = 0,
    words: str | Path | None = None,
    tokenizer: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    limit: int | None = None,
    scored_scenes: int = _SCORED_SCENES,
    device: str | torch.device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Distil a generative teacher into a student on the built-in pictures of the student's pool.

    Args:
        teacher: as `open_vlm_teacher` takes it. student: a named size, a YAML file of one, or a folder of `save_vlm` to
            go on with. vision: "student:FOLDER", the tower of a distilled CLIP student in place of the size's own.
            out: gets `student/`, `eval.json` (scores on the test pool), `history.json`, checkpoints, and what the
            teacher and the trunk gave. fold: of the pools. words: what the embedding of a new student starts at, a
            folder with words.safetensors or "minilm" for vectors of that sentence encoder. tokenizer: file of a new
            student's, else the teacher's. options: of `load_hf_vlm`. limit: so many pictures only, for a toy.
            device: as `teachers.device.pick_device`. resume: go on with what is in `out`.

    Returns what eval.json holds.

    Raises:
        UsageError: a folder that is not empty or not a run's to replace, a teacher of another vocabulary, or as
            `sources_of` and `StageRun`.
    """
    check_student(student, tokenizer, vision, words)
    where, half = pick_device(device), recipe.optim.bfloat16
    opened = open_vlm_teacher(teacher, device=where, **hf_options(teacher, half, options))
    if isinstance(opened, RecordedTeacher):
        raise UsageError(
            f"teacher {str(teacher)!r} is answers about a user's own pictures, and this run is on the built-in ones; "
            "name those pictures with --data"
        )
    if isinstance(opened, BuiltinVlm) and half:
        opened.model.to(torch.bfloat16)
    theirs = () if isinstance(opened, KeptTeacher | BuiltinVlm) else opened.licences
    model = student_of(
        student, lambda config: _tokenizer_of(opened, tokenizer), recipe.optim.seed,
        licences=(*theirs, *data_licences()), words=words,
        vision=vision,
    )  # fmt: skip
    _check_heard(recipe, opened.model if isinstance(opened, BuiltinVlm) else opened, model)
    pictures = picture_set("student", fold, limit=limit)
    _check_scenes(model, recipe)
    if isinstance(opened, KeptTeacher):
        known = set(labelled_numbers(pictures, recipe.data.captions))
        opened.said(pictures, [number for number in range(len(pictures)) if number not in known])
    read = (teacher, student, words, tokenizer, *tower_folder(model.config))
    make_room(out, resume, overwrite, tuple(path for path in read if path))
    model.to(where)
    with full_float32():
        sources = sources_of(recipe, opened, model, pictures, out / "kept", say)
        train_student(model, recipe, sources, out, resume=resume, say=lambda row: say(json.dumps(row)))
        save_vlm(model, out / STUDENT, overwrite=True)
        scores = evaluate_vlm(model, picture_set("test", fold, limit=limit), scenes=scored_scenes)
    found = {
        "recipe": recipe.model_dump(mode="json"),
        "student": student,
        "tower": model.config.vision.origin or model.config.vision.backbone,
        "fold": fold,
        "device": describe_device(where),
        **sources.facts,
        "scores": scores,
    }
    write_text_atomically(out / SCORES, json.dumps(found, indent=1) + "\n")
    return found
