"""What a generative teacher said once, in place of the teacher: the folder `kept` of a run, with its tokenizer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pocketvlm.data.scene_words import OTHER_LANGUAGES
from pocketvlm.data.scenes import PictureSet
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students.vlm.io import TOKENIZER

# what the built-in talking teacher said once (benchmarks/talking_answers.py), for those who have no copy of it
SHIPPED = "openmoji-talking"
ASKED = ("en", *OTHER_LANGUAGES, "kind", "colour")
"""What is asked of a picture that is shown alone: its name by language, its kind, its main colour."""

# by uid of a picture, then by `ASKED`
Said = dict[str, dict[str, str]]


def shipped_folder() -> Path:
    """Of `SHIPPED`."""
    return Path(str(resources.files("pocketvlm.distill.vlm") / "kept"))


@dataclasses.dataclass(frozen=True)
class KeptTeacher:
    """A folder with a tokenizer and the one file of what a teacher said of single pictures."""

    folder: Path

    @property
    def tokenizer_json(self) -> bytes:
        return (self.folder / TOKENIZER).read_bytes()

    def said(self, pictures: PictureSet, numbers: Sequence[int]) -> Said:
        """`pseudo.picture_answers` of a teacher that is not here.

        Raises:
            IntegrityError: nothing was said of one of these pictures, or the file is damaged.
        """
        path = said_path(self.folder)
        found = {} if path is None else read_said(path)
        missing = [number for number in numbers if pictures.pictures[number].uid not in found]
        if missing:
            raise IntegrityError(
                f"what a teacher said in {str(self.folder)!r} leaves out {len(missing)} of {len(numbers)} pictures, so "
                "scenes of them would have no answers; it is of another fold or version of the pictures: give the "
                "teacher itself"
            )
        return found


def said_path(folder: Path) -> Path | None:
    """The file of `pseudo.picture_answers` in a folder, where there is exactly one teacher's."""
    found = sorted(folder.glob("said-*.json"))
    return found[0] if len(found) == 1 else None


def read_said(path: Path) -> Said:
    """Such a file, checked.

    Raises:
        IntegrityError: it is not UTF-8 or not JSON, or a picture lacks an answer or has one that is no text.
    """
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the encoding too
        raise _damaged(path, f"it is no JSON in UTF-8, {error}") from error
    if not isinstance(found, dict):
        raise _damaged(path, f"it holds a {type(found).__name__} where pictures by their ids are expected")
    for uid, answers in found.items():
        if not isinstance(answers, dict):
            raise _damaged(path, f"of picture {uid!r} it holds {answers!r:.40} where answers by name are expected")
        wrong = [key for key in ASKED if not isinstance(answers.get(key), str)]
        if wrong:
            raise _damaged(path, f"of picture {uid!r} it has no text for {', '.join(wrong)}")
    return found


def _damaged(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"what a teacher said, {path.name} in {str(path.parent)!r}, is damaged ({why}), so pictures would get wrong "
        "answers; restore the file, or delete it and let the teacher answer again"
    )
