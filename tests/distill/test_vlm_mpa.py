"""Parity gaps: kept exactly where the teacher is consistent and the student wrong."""

from __future__ import annotations

import dataclasses

import pytest
from vlm_toys import PICTURES, SIDE, made_list, tiny

from pocketvlm.distill.vlm.evaluate import Asked
from pocketvlm.distill.vlm.list_answers import list_answers
from pocketvlm.distill.vlm.mpa import holds, is_parity_gap, parity_gaps
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.edge.errors import UsageError


@pytest.mark.parametrize(
    ("answer", "teacher", "student", "gap"),
    [
        ("A Cat.", "it is a cat", "a dog", True),
        ("cat", "cat", "The CAT!", False),
        ("cat", "dog", "bird", False),
        ("three", "3", "4", True),
        ("cat", "concatenation", "dog", True),  # a substring, as in the authors' code
        ("", "anything", "nothing", False),
        ("?!", "anything", "nothing", False),
        ("cat", "", "", False),
    ],
)
def test_a_gap_is_a_substring_of_one_prediction_and_not_of_the_other(
    answer: str, teacher: str, student: str, gap: bool
) -> None:
    assert is_parity_gap(answer, teacher, student) is gap
    assert holds(answer, answer) is (answer not in ("", "?!"))


def test_exactly_the_gaps_are_kept_with_their_written_answers() -> None:
    scenes = made_list(5, questions=3)
    asked = [
        Asked(index, question, question.answer)
        for index, entry in enumerate(scenes.entries)
        for question in entry.questions
    ]
    student = [dataclasses.replace(row, answer="zzz") if n % 3 == 1 else row for n, row in enumerate(asked)]
    teacher = [dataclasses.replace(row, answer="zzz") if n % 2 == 0 else row for n, row in enumerate(asked)]
    found, numbers = parity_gaps(scenes, teacher, student)
    assert [entry.scene for entry in found.entries] == [scenes.entries[number].scene for number in numbers]
    wanted = [row.question for n, row in enumerate(asked) if n % 3 == 1 and n % 2 == 1]
    assert [question for entry in found.entries for question in entry.questions] == wanted
    assert found.tokens == sum(len(answer) for entry in found.entries for _, answer in entry.talks)
    with pytest.raises(UsageError, match="there is no parity gap"):
        parity_gaps(scenes, teacher, asked)
    with pytest.raises(UsageError, match="ask both about this very list"):
        parity_gaps(scenes, teacher, student[:-1])
    with pytest.raises(UsageError, match="ask both about this very list"):
        parity_gaps(scenes, teacher[::-1], student)


def test_answers_to_a_list_are_those_to_each_question_alone() -> None:
    model, scenes = tiny(), made_list(6)
    composer = composer_of(PICTURES, SIDE, variants=2)
    asked = list_answers(model, scenes, lambda chosen: scenes.pixels(chosen, composer), batch=5)
    pairs = [(index, q) for index, entry in enumerate(scenes.entries) for q in entry.questions]
    assert [(row.scene, row.question) for row in asked] == pairs
    for row in asked[::3]:
        longest = 64 if row.question.type.endswith("caption") else 16
        pixels = scenes.pixels([row.scene], composer)
        assert model.generate(pixels, [row.question.text], max_new_tokens=longest)[0].startswith(row.answer[:12])
