"""A whole run on the built-in pictures: lists of scenes, what the teacher says of them, the stages, the scores."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pocketvlm.data.openmoji import licences as data_licences
from pocketvlm.data.scenes import PictureSet, picture_set
from pocketvlm.distill.checkpoint import write_text_atomically
from pocketvlm.distill.vlm.answer_cache import KeptAnswers, check_vocabulary, kept_answers
from pocketvlm.distill.vlm.evaluate import evaluate_vlm
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.pseudo import agreement, labelled_numbers, picture_answers, pseudo_labelled, subset
from pocketvlm.distill.vlm.recipe import VlmRecipe
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.distill.vlm.stages import Live, Source, StageRun
from pocketvlm.distill.vlm.words import load_word_vectors, start_from_words
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm, load_vlm_config, save_vlm
from pocketvlm.teachers.lit import weights_licences

STUDENT, SCORES, WORDS = "student", "eval.json", "words.safetensors"
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
    teacher: Vlm,
    student: Vlm,
    pictures: PictureSet,
    work: Path,
    say: Callable[[str], None] = lambda line: None,
) -> Sources:
    """Draw the recipe's two lists over these pictures, and let the trunk and the teacher see them once.

    Labels of pictures whose concepts do not keep them are read for `facts` alone. work: where features and answers are
    kept; what is there of the same trunk, teacher and lists is read.

    Raises:
        UsageError: no labelled picture, or a teacher of another vocabulary where its distributions are learned from.
    """
    data = recipe.data
    hears = any(stage.weights.hears or stage.on_policy for stage in recipe.stages)
    if hears:
        check_vocabulary(teacher, student.tokenizer.json)
    known = labelled_numbers(pictures, data.captions)
    if not known:
        raise UsageError(
            f"none of {len(pictures)} pictures keeps its labels at data.captions {data.captions:g}, so nothing true is "
            "known of any; raise that share"
        )
    few, side, tokens = subset(pictures, known), student.config.vision.size, student.tokenizer.json
    shared = {"questions": data.questions, "length": data.length, "variants": data.variants}
    moves = any("vision" in stage.train for stage in recipe.stages)

    def source(scenes: SceneList, shown: PictureSet, answers: KeptAnswers | None = None) -> Source:
        composer = composer_of(shown, side, variants=data.variants)
        if moves:
            return Source(scenes, composer=composer, answers=answers)
        kept = trunk_features(
            student, scenes, composer, work / "features", bfloat16=recipe.optim.bfloat16, say=say
        )  # fmt: skip
        return Source(scenes, kept, answers=answers)

    true = source(SceneList.draw(few, tokens, scenes=data.labelled_scenes, seed=data.seed + _LABELLED, **shared), few)
    facts: dict[str, Any] = {
        "pictures": {"all": len(pictures), "labelled": len(known)},
        "answer_tokens": {"labelled": true.scenes.tokens},
    }
    if all(stage.heard == 0 for stage in recipe.stages):
        return Sources(true, None, None, facts)
    unlabelled = sorted(set(range(len(pictures))) - set(known))
    said = pseudo_labelled(pictures, known, picture_answers(teacher, pictures, unlabelled, kept=work))
    say(f"the teacher named {len(unlabelled)} pictures")
    scenes = SceneList.draw(said, tokens, scenes=data.scenes, seed=data.seed + _TAUGHT, **shared)
    answers = live = None
    if hears:
        theirs = composer_of(pictures, teacher.config.vision.size, variants=data.variants)
        if any(stage.on_policy for stage in recipe.stages):
            live = Live(teacher, theirs)
        if any(stage.weights.hears for stage in recipe.stages):
            answers = kept_answers(
                work / f"answers-{scenes.digest[:16]}", scenes, top=recipe.teacher.top, teacher=teacher,
                composer=theirs, places=recipe.teacher.places, say=say,
            )  # fmt: skip
    told = agreement(said, pictures, unlabelled)
    facts["teacher_right_about_unlabelled"] = {key: round(value, 4) for key, value in told.items()}
    facts["answer_tokens"]["taught"] = scenes.tokens
    facts["answer_cache_MB"] = 0.0 if answers is None else round(answers.bytes / 1e6, 1)
    return Sources(true, source(scenes, pictures, answers), live, facts)


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


def distill_vlm(
    teacher: Path,
    student: str,
    recipe: VlmRecipe,
    out: Path,
    *,
    fold: int = 0,
    words: Path | None = None,
    limit: int | None = None,
    scored_scenes: int = _SCORED_SCENES,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Distil a generative teacher into a student on the built-in pictures of the student's pool.

    Args:
        teacher: folder of `save_vlm`. student: a named size, a YAML file of one, or a folder of `save_vlm` to go on
            with. out: gets `student/`, `eval.json` (scores on the test pool), `history.json`, checkpoints, and what the
            teacher and the trunk gave. fold: of the pools. words: folder with words.safetensors that the embedding of
            a new student starts at. limit: so many pictures only, for a toy. resume: go on with what is in `out`.

    Returns what eval.json holds.

    Raises:
        UsageError: a folder that is not empty, a teacher of another vocabulary, or as `sources_of` and `StageRun`.
    """
    if out.exists() and any(out.iterdir()) and not resume:
        if not overwrite:
            raise UsageError(
                f"folder {str(out)!r} is not empty, so two runs would be mixed; pass resume to go on with the one "
                "there, overwrite to replace it, or choose another folder"
            )
        shutil.rmtree(out)
    teacher_model = load_vlm(teacher)
    if recipe.optim.bfloat16:
        teacher_model.to(torch.bfloat16)
    if (Path(student) / "vlm.json").is_file():
        model = load_vlm(student)
    else:
        config = load_vlm_config(student)
        theirs = () if config.vision.weights == "none" else weights_licences()
        config = config.model_copy(update={"licences": (*theirs, *data_licences())})
        model = build_vlm(config, teacher_model.tokenizer.json, seed=recipe.optim.seed)
        if words is not None:
            start_from_words(model, load_word_vectors(words / WORDS), seed=recipe.optim.seed)
    sources = sources_of(recipe, teacher_model, model, picture_set("student", fold, limit=limit), out / "kept", say)
    train_student(model, recipe, sources, out, resume=resume, say=lambda row: say(json.dumps(row)))
    save_vlm(model, out / STUDENT, overwrite=True)
    found = {
        "recipe": recipe.model_dump(mode="json"),
        "student": student,
        "fold": fold,
        **sources.facts,
        "scores": evaluate_vlm(model, picture_set("test", fold, limit=limit), scenes=scored_scenes),
    }
    write_text_atomically(out / SCORES, json.dumps(found, indent=1) + "\n")
    return found
