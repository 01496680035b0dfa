"""What a teacher says of pictures that nobody labelled, as facts that the grammar of scenes can ask about.

Each picture is shown alone and the teacher is asked its name in every language, its kind and its main colour. No label
is read: names, kind, colour and concept of a picture that lacks its labels are replaced as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pocketvlm.data.exact_match import normalise_answer
from pocketvlm.data.main_colour import COLOURS
from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES
from pocketvlm.data.scenes import Picture, PictureSet, Scene
from pocketvlm.data.splits import has_caption
from pocketvlm.distill.vlm.answer_cache import model_digest
from pocketvlm.distill.vlm.batches import drawn_scenes
from pocketvlm.distill.vlm.features import without_trunk
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.teachers.files import write_atomic

_BATCH = 64
_TOKENS = 10


def labelled_numbers(pictures: PictureSet, share: float) -> list[int]:
    """Numbers of the pictures whose concepts keep their labels (`splits.has_caption`)."""
    return [number for number, picture in enumerate(pictures.pictures) if has_caption(picture.group, share)]


def subset(pictures: PictureSet, numbers: Sequence[int]) -> PictureSet:
    return PictureSet([pictures.pictures[n] for n in numbers], [pictures.pixels[n] for n in numbers])


def picture_answers(
    teacher: Vlm, pictures: PictureSet, numbers: Sequence[int], *, kept: Path | None = None
) -> dict[str, dict[str, str]]:
    """By uid what the teacher says of these pictures, each shown alone: its name by language, "kind" and "colour".

    kept: folder of a file that is read and added to, named after the teacher.
    """
    path = None if kept is None else kept / f"said-{model_digest(teacher)[:16]}.json"
    found: dict[str, dict[str, str]] = {}
    if path is not None and path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    asked = [number for number in numbers if pictures.pictures[number].uid not in found]
    if not asked:
        return found
    prompts = {"en": ENGLISH["name"][0]} | {language: row[0] for language, row in OTHER_LANGUAGES.items()}
    prompts |= {"kind": ENGLISH["kind"][0], "colour": ENGLISH["colour"][0]}
    composer = composer_of(subset(pictures, asked), teacher.config.vision.size)
    for start in range(0, len(asked), _BATCH):
        part = asked[start : start + _BATCH]
        scenes = [Scene(1, (place,)) for place in range(start, start + len(part))]
        with torch.no_grad():
            seen = teacher.vision(composer(drawn_scenes(scenes, len(asked), 1, None)).to(teacher.device))
            with without_trunk(teacher):
                said = {
                    key: teacher.generate(seen, [prompt] * len(part), max_new_tokens=_TOKENS)
                    for key, prompt in prompts.items()
                }
        for place, number in enumerate(part):
            found[pictures.pictures[number].uid] = {key: answers[place] for key, answers in said.items()}
        if path is not None:
            write_atomic(path, json.dumps(found, ensure_ascii=False).encode())
    return found


def recorded_path(folder: Path) -> Path | None:
    """The file of `picture_answers` in a folder, where there is exactly one teacher's."""
    found = sorted(folder.glob("said-*.json"))
    return found[0] if len(found) == 1 else None


def recorded_answers(folder: Path, pictures: PictureSet, numbers: Sequence[int]) -> dict[str, dict[str, str]]:
    """`picture_answers` of a teacher that is not here.

    Raises:
        IntegrityError: nothing was said of one of these pictures.
    """
    path = recorded_path(folder)
    found: dict[str, dict[str, str]] = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    missing = [number for number in numbers if pictures.pictures[number].uid not in found]
    if missing:
        raise IntegrityError(
            f"what a teacher said in {str(folder)!r} leaves out {len(missing)} of {len(numbers)} pictures, so scenes "
            "of them would have no answers; it is of another fold or version of the pictures: give the teacher itself"
        )
    return found


def pseudo_labelled(pictures: PictureSet, labelled: Sequence[int], said: Mapping[str, Mapping[str, str]]) -> PictureSet:
    """The same pictures in the same order; all but `labelled` have what was said (`picture_answers`) for their facts.

    An answer that is no kind or no colour that there is gives None; pictures of the same given name are one concept.
    """
    kept = set(labelled)
    found = list(pictures.pictures)
    for number, picture in enumerate(pictures.pictures):
        if number in kept:
            continue
        answers = said[picture.uid]
        names = {key: answer or "unknown" for key, answer in answers.items() if key not in ("kind", "colour")}
        found[number] = Picture(
            uid=picture.uid,
            names=names,
            kind=answers["kind"] if answers["kind"] in KIND_WORDS else None,
            colour=answers["colour"] if answers["colour"] in COLOURS else None,
            group=f"said:{normalise_answer(names['en'])}",
        )
    return PictureSet(found, pictures.pixels)


def agreement(said: PictureSet, true: PictureSet, numbers: Sequence[int]) -> dict[str, float]:
    """For a report only, shares 0..1 of these pictures whose said fact is the true one (of those that have one)."""
    result = {}
    for key in ("name", "kind", "colour"):
        pairs = [(getattr(said.pictures[n], key), getattr(true.pictures[n], key)) for n in numbers]
        known = [(a, b) for a, b in pairs if b is not None]
        result[key] = sum(normalise_answer(a or "") == normalise_answer(b) for a, b in known) / max(len(known), 1)
    return result
