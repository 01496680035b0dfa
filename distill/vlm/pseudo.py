"""What a teacher says of pictures that nobody labelled, as facts that the grammar of scenes can ask about.

Each picture is shown alone and the teacher is asked its name in every language, its kind and its main colour. No label
is read: names, kind, colour and concept of a picture that lacks its labels are replaced as a whole.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from pocketvlm.data.exact_match import normalise_answer
from pocketvlm.data.main_colour import COLOURS
from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES
from pocketvlm.data.scenes import Picture, PictureSet, Scene
from pocketvlm.data.splits import has_caption
from pocketvlm.distill.vlm.answer_cache import model_digest
from pocketvlm.distill.vlm.batches import drawn_scenes
from pocketvlm.distill.vlm.features import without_trunk
from pocketvlm.distill.vlm.kept_teacher import Said, read_said
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.distill.vlm.teachers import BuiltinVlm
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.teachers.files import write_atomic
from pocketvlm.teachers.vlm.base import VlmTeacher

_BATCH, _OTHERS_BATCH = 64, 8
_TOKENS, _OTHERS_TOKENS = 10, 24
_CHOICES: dict[str, Sequence[str]] = {"kind": list(KIND_WORDS), "colour": list(COLOURS)}
_ONLY = {
    "en": "Answer with its name only.",
    "de": "Antworte nur mit dem Namen.",
    "es": "Responde solo con el nombre.",
    "fr": "Réponds seulement par le nom.",
    "it": "Rispondi solo con il nome.",
    "pt": "Responda só com o nome.",
} | {key: f"Answer with one of: {', '.join(words)}." for key, words in _CHOICES.items()}


def labelled_numbers(pictures: PictureSet, share: float) -> list[int]:
    """Numbers of the pictures whose concepts keep their labels (`splits.has_caption`)."""
    return [number for number, picture in enumerate(pictures.pictures) if has_caption(picture.group, share)]


def subset(pictures: PictureSet, numbers: Sequence[int]) -> PictureSet:
    return PictureSet([pictures.pictures[n] for n in numbers], [pictures.pixels[n] for n in numbers])


def picture_answers(
    teacher: Vlm | VlmTeacher,
    pictures: PictureSet,
    numbers: Sequence[int],
    *,
    kept: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Said:
    """By uid what the teacher says of these pictures, each shown alone: its name by language, "kind" and "colour".

    A teacher that is not of this kit never saw the questions of the scenes: it is asked for the name alone and told
    which kinds and colours there are, of which the one in its answer counts.

    kept: folder of a file that is read and added to, named after the teacher.

    Raises:
        IntegrityError: that file is damaged.
    """
    if isinstance(teacher, BuiltinVlm):
        teacher = teacher.model
    own = isinstance(teacher, Vlm)
    digest = model_digest(teacher) if isinstance(teacher, Vlm) else teacher.fingerprint
    path = None if kept is None else kept / f"said-{digest[:16]}.json"
    found = {} if path is None or not path.is_file() else read_said(path)
    asked = [number for number in numbers if pictures.pictures[number].uid not in found]
    if not asked:
        return found
    prompts = {"en": ENGLISH["name"][0]} | {language: row[0] for language, row in OTHER_LANGUAGES.items()}
    prompts |= {"kind": ENGLISH["kind"][0], "colour": ENGLISH["colour"][0]}
    if not own:
        prompts = {key: f"{prompt} {_ONLY[key]}" for key, prompt in prompts.items()}
    for part, said in _said(teacher, subset(pictures, asked), prompts):
        for place, index in enumerate(part):
            answers = {key: answers[place] for key, answers in said.items()}
            if not own:
                answers = {key: _plain(key, answer) for key, answer in answers.items()}
            found[pictures.pictures[asked[index]].uid] = answers
        if path is not None:
            write_atomic(path, json.dumps(found, ensure_ascii=False).encode())
        say(f"the teacher named {part.stop} of {len(asked)} pictures")
    return found


def _said(
    teacher: Vlm | VlmTeacher, pictures: PictureSet, prompts: Mapping[str, str]
) -> Iterator[tuple[range, dict[str, list[str]]]]:
    """Numbers of pictures with what is answered to each prompt, a batch at a time."""
    composer = composer_of(pictures, teacher.config.vision.size) if isinstance(teacher, Vlm) else None
    size = _OTHERS_BATCH if composer is None else _BATCH
    for start in range(0, len(pictures), size):
        part = range(start, min(start + size, len(pictures)))
        if isinstance(teacher, Vlm):
            assert composer is not None
            scenes = [Scene(1, (number,)) for number in part]
            with torch.no_grad():
                seen = teacher.vision(composer(drawn_scenes(scenes, len(pictures), 1, None)).to(teacher.device))
                with without_trunk(teacher):
                    said = {
                        key: teacher.generate(seen, [prompt] * len(part), max_new_tokens=_TOKENS)
                        for key, prompt in prompts.items()
                    }
        else:
            pixels = torch.from_numpy(np.stack([pictures.pixels[number] for number in part]))
            said = {
                key: teacher.answer(pixels, [prompt] * len(part), max_new_tokens=_OTHERS_TOKENS)
                for key, prompt in prompts.items()
            }
        yield part, said


def _plain(key: str, answer: str) -> str:
    """A name without the full stop of a sentence, or the one kind or colour that an answer holds."""
    if key in _CHOICES:
        folded = answer.casefold().replace("grey", "gray")
        held = [word for word in _CHOICES[key] if re.search(rf"\b{word}\b", folded)]
        return held[0] if len(held) == 1 else answer
    return answer.strip().partition("\n")[0].rstrip(" .!")


def pseudo_labelled(pictures: PictureSet, labelled: Sequence[int], said: Mapping[str, Mapping[str, str]]) -> PictureSet:
    """The same pictures in the same order; all but `labelled` have what was said (`picture_answers`) for their facts.

    An answer that is no kind or no colour that there is gives None, and an empty name, or one of punctuation alone, is
    no name: nothing is asked that needs it. Pictures of the same given name are one concept.
    """
    kept = set(labelled)
    found = list(pictures.pictures)
    for number, picture in enumerate(pictures.pictures):
        if number in kept:
            continue
        answers = said[picture.uid]
        names = {key: name if normalise_answer(name) else "" for key, name in answers.items() if key not in _CHOICES}
        found[number] = Picture(
            uid=picture.uid,
            names=names,
            kind=answers["kind"] if answers["kind"] in KIND_WORDS else None,
            colour=answers["colour"] if answers["colour"] in COLOURS else None,
            group=f"said:{normalise_answer(names['en'])}",
        )
    return PictureSet(found, pictures.pixels)


def unnamed(pictures: PictureSet, numbers: Iterable[int]) -> dict[str, int]:
    """How many of these pictures have no name, by language; languages in which all have one are left out."""
    missing = Counter(
        language for number in numbers for language, name in pictures.pictures[number].names.items() if not name
    )
    return dict(sorted(missing.items()))


def agreement(said: PictureSet, true: PictureSet, numbers: Sequence[int]) -> dict[str, float]:
    """For a report only, shares 0..1 of these pictures whose said fact is the true one (of those that have one)."""
    result = {}
    for key in ("name", "kind", "colour"):
        pairs = [(getattr(said.pictures[n], key), getattr(true.pictures[n], key)) for n in numbers]
        known = [(a, b) for a, b in pairs if b is not None]
        result[key] = sum(normalise_answer(a or "") == normalise_answer(b) for a, b in known) / max(len(known), 1)
    return result
