"""Teachers by their names, and what one said once: read whole or refused, whoever said it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vlm_toys import PICTURES, TOKENIZER, tiny

from pocketvlm.data.main_colour import COLOURS
from pocketvlm.data.scene_words import KIND_WORDS
from pocketvlm.distill.vlm.kept_teacher import ASKED, KeptTeacher, read_said, shipped_folder
from pocketvlm.distill.vlm.pseudo import picture_answers, pseudo_labelled, unnamed
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.distill.vlm.teachers import BuiltinVlm, RecordedTeacher, open_vlm_teacher
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.students.vlm import save_vlm
from pocketvlm.teachers.vlm import HfVlm


class Stranger:
    """A model of others: sentences where a word is wanted, nothing for every third picture."""

    name, fingerprint, vocabulary, vocab_size, width, licences = "stranger", "f" * 64, "v", 1, 1, ()

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.seen: list[Tensor] = []

    def answer(self, pixels: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        self.seen.append(pixels)
        said = []
        for prompt in prompts:
            number = self.asked[prompt]
            self.asked[prompt] += 1
            if "animal" in prompt:
                kinds = ("It is an Animal.", "Some plant or tool", "a plantation")
                said.append("tool" if number == 9 else kinds[number % 3])
            elif "purple" in prompt:
                said.append("Mainly grey!")
            else:
                said.append("Bär!" if number == 9 else (" A dog.\nIt barks.", "thing", " … ")[number % 3])
        return said

    def read(self, *_: Any) -> list[Any]:
        raise AssertionError("only asked")

    def head(self, hidden: Tensor) -> Tensor:
        raise AssertionError("only asked")


def test_a_stranger_is_told_what_to_answer_with_and_understood() -> None:
    teacher, ten = Stranger(), list(range(10))
    said = picture_answers(teacher, PICTURES, ten)
    assert set(teacher.asked.values()) == {10}
    assert len(teacher.asked) == len(ASKED)
    assert "What is this? Answer with its name only." in teacher.asked
    assert any(prompt.endswith(f"one of: {', '.join(KIND_WORDS)}.") for prompt in teacher.asked)
    assert any(prompt.endswith(f"one of: {', '.join(COLOURS)}.") for prompt in teacher.asked)
    first = teacher.seen[0]
    assert torch.equal(first[3], torch.from_numpy(PICTURES.pixels[3]))
    rows = [said[PICTURES.pictures[number].uid] for number in (0, 1, 2, 9)]
    assert [row["en"] for row in rows] == ["A dog", "thing", "…", "Bär"]
    assert [row["kind"] for row in rows] == ["animal", "Some plant or tool", "a plantation", "tool"]
    assert {row["colour"] for row in said.values()} == {"gray"}
    made = pseudo_labelled(PICTURES, range(10, len(PICTURES)), said)
    assert [made.pictures[n].kind for n in (0, 1, 2, 9)] == ["animal", None, None, "tool"]
    assert [made.pictures[n].name for n in (0, 1, 2, 9)] == ["A dog", "thing", "", "Bär"]
    assert unnamed(made, ten) == dict.fromkeys(sorted(set(ASKED) - {"kind", "colour"}), 3)
    assert unnamed(made, [0, 1, 12]) == {}


def test_a_list_has_as_many_scenes_also_where_nothing_is_known_of_a_picture() -> None:
    said = {picture.uid: dict.fromkeys(ASKED, "") for picture in PICTURES.pictures}
    nothing = pseudo_labelled(PICTURES, [], said)
    scenes = SceneList.draw(nothing, TOKENIZER, scenes=20, questions=4, seed=0)
    assert len(scenes) == 20
    assert {q.type for entry in scenes.entries for q in entry.questions} == {"count", "occupied"}


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (b"\xff\xfe", "no JSON in UTF-8"),
        (b'{"a": {', "no JSON in UTF-8"),
        (b"[1]", "holds a list where"),
        (b'{"a": "dog"}', "'dog' where answers by name"),
        (json.dumps({"a": dict.fromkeys(ASKED[1:], "x")}).encode(), "no text for en"),
        (json.dumps({"a": dict.fromkeys(ASKED, "x") | {"kind": None, "pt": 3}}).encode(), "no text for pt, kind"),
    ],
)
def test_damaged_answers_are_refused(tmp_path: Path, damage: bytes, why: str) -> None:
    path = tmp_path / "said-0.json"
    path.write_bytes(damage)
    for read in (
        lambda: read_said(path),
        lambda: KeptTeacher(tmp_path).said(PICTURES, [0]),
        lambda: picture_answers(Named(), PICTURES, [0], kept=tmp_path),
    ):
        with pytest.raises(IntegrityError, match=why):
            read()


class Named(Stranger):
    """Its file is said-0.json."""

    fingerprint = "0"


def test_what_was_said_of_other_pictures_is_refused(tmp_path: Path) -> None:
    said = picture_answers(Named(), PICTURES, range(10), kept=tmp_path)
    assert read_said(tmp_path / "said-0.json") == said
    assert KeptTeacher(tmp_path).said(PICTURES, range(10)) == said
    with pytest.raises(IntegrityError, match="leaves out 2 of 4 pictures"):
        KeptTeacher(tmp_path).said(PICTURES, range(8, 12))


def test_every_kind_of_teacher_has_a_name(tmp_path: Path, hf_llava: Path) -> None:
    folder = save_vlm(tiny(3), tmp_path / "teacher")
    for spec in (folder, f"vlm:{folder}"):
        opened = open_vlm_teacher(spec)
        assert isinstance(opened, BuiltinVlm)
    assert open_vlm_teacher("openmoji-talking") == KeptTeacher(shipped_folder())
    hf = open_vlm_teacher(f"hf-vlm:{hf_llava}", dtype="bfloat16")
    assert isinstance(hf, HfVlm)
    assert hf.dtype == torch.bfloat16
    answers = tmp_path / "said.jsonl"
    answers.write_text("")
    assert open_vlm_teacher(f"recorded:{answers}") == RecordedTeacher(answers)
    with pytest.raises(UsageError, match="names no file"):
        open_vlm_teacher(f"recorded:{tmp_path}")
    with pytest.raises(UsageError, match=f"write 'hf-vlm:{hf_llava}'"):
        open_vlm_teacher(hf_llava)
    with pytest.raises(UsageError, match="which only hf-vlm takes"):
        open_vlm_teacher(folder, dtype="bfloat16")
    for wrong in ("vlm:nothing", "openmoji", "recorded:", tmp_path):
        with pytest.raises(UnknownNameError, match="generative teacher"):
            open_vlm_teacher(wrong)
