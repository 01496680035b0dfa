"""What a teacher says of pictures that nobody labelled, as facts that the grammar of scenes can ask about.

Each picture is shown alone and the teacher is asked its name in every language, its kind and its main colour. No label
is read: names, kind, colour and concept of a picture that lacks its labels are replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pocketvlm.data.exact_match import normalise_answer
from pocketvlm.data.main_colour import COLOURS
from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES
from pocketvlm.data.scenes import Picture, PictureSet, Scene
from pocketvlm.data.splits import has_caption
from pocketvlm.distill.vlm.batches import drawn_scenes
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.students.vlm.model import Vlm

_BATCH = 64
_TOKENS = 16


def labelled_numbers(pictures: PictureSet, share: float) -> list[int]:
    """Numbers of the pictures whose concepts keep their labels (`splits.has_caption`)."""
    return [number for number, picture in enumerate(pictures.pictures) if has_caption(picture.group, share)]


def subset(pictures: PictureSet, numbers: Sequence[int]) -> PictureSet:
    return PictureSet([pictures.pictures[n] for n in numbers], [pictures.pixels[n] for n in numbers])


def pseudo_labelled(teacher: Vlm, pictures: PictureSet, labelled: Sequence[int]) -> PictureSet:
    """The same pictures in the same order; all but `labelled` have the teacher's answers in place of their facts.

    An answer that is no kind or no colour that there is gives None; pictures of the same given name are one concept.
    """
    kept = set(labelled)
    asked = [number for number in range(len(pictures)) if number not in kept]
    composer = composer_of(pictures, teacher.config.vision.size)
    prompts = {"en": ENGLISH["name"][0]} | {language: row[0] for language, row in OTHER_LANGUAGES.items()}
    prompts |= {"kind": ENGLISH["kind"][0], "colour": ENGLISH["colour"][0]}
    device = teacher.decoder.embed_tokens.weight.device
    said: dict[str, list[str]] = {key: [] for key in prompts}
    for start in range(0, len(asked), _BATCH):
        scenes = [Scene(1, (number,)) for number in asked[start : start + _BATCH]]
        with torch.no_grad():
            pixels = composer(drawn_scenes(scenes, len(pictures), 1, None)).to(device)
            for key, prompt in prompts.items():
                said[key] += teacher.generate(pixels, [prompt] * len(scenes), max_new_tokens=_TOKENS)
    found = list(pictures.pictures)
    for place, number in enumerate(asked):
        names = {key: said[key][place] or "unknown" for key in prompts if key not in ("kind", "colour")}
        kind, colour = said["kind"][place], said["colour"][place]
        found[number] = Picture(
            uid=found[number].uid,
            names=names,
            kind=kind if kind in KIND_WORDS else None,
            colour=colour if colour in COLOURS else None,
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
