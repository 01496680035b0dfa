"""Scenes: answers against an oracle that looks at the pixels' places and the facts, not at the code that asks."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from pocketvlm.data import DataSource, scenes
from pocketvlm.data.exact_match import exact_match, normalise_answer
from pocketvlm.data.main_colour import COLOURS, colour_shares, main_colour
from pocketvlm.data.openmoji_kinds import KINDS
from pocketvlm.data.scene_questions import TYPES, Question, ask, ask_about
from pocketvlm.data.scene_words import ENGLISH, KIND_WORDS, OTHER_LANGUAGES, PLACES
from pocketvlm.data.scenes import EMPTY, LANGUAGES, Picture, PictureSet, Scene, SceneTable, draw_scene, scene_rng
from pocketvlm.edge.errors import UsageError

_INK = {"red": (210, 47, 39), "blue": (30, 80, 160), "green": (92, 158, 49), "yellow": (252, 234, 43)}


def _pictures() -> PictureSet:
    """Forty made-up pictures: kinds and colours in turn, one in ten without a kind, one in eight without a colour."""
    pictures, pixels = [], []
    kinds = ("animal", "vehicle", "food or drink", "tool")
    for number in range(40):
        colour = None if number % 8 == 7 else tuple(_INK)[number % 4]
        drawn = np.full((24, 24, 3), 255, np.uint8)
        drawn[6:18, 6:18] = _INK[colour] if colour else (number * 5, 7, 90)
        names = {language: f"{language} thing {number}" for language in LANGUAGES} | {"en": f"thing {number}"}
        kind = None if number % 10 == 9 else kinds[number // 2 % 4]
        pictures.append(Picture(f"made/{number}", names, kind, colour, f"group {number // 2}"))
        pixels.append(drawn)
    return PictureSet(pictures, pixels)


PICTURES = _pictures()


def _stream(count: int, seed: int = 0) -> list[tuple[Scene, list[Question]]]:
    return [ask_about(PICTURES, seed, index, 8) for index in range(count)]


def test_a_scene_is_the_same_every_time_and_another_for_another_seed() -> None:
    assert _stream(20) == _stream(20)
    assert _stream(20) != _stream(20, seed=1)
    # the stream has no state: scene 7 is the same whether or not the others were drawn
    assert ask_about(PICTURES, 0, 7, 8) == _stream(20)[7]


def _words_between(text: str, template: str) -> dict[str, str] | None:
    """What stands in a template's braces, where `text` was made from it."""
    import re

    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    found = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>.+?)", pattern), text)
    return None if found is None else found.groupdict()


def _true_answer(scene: Scene, question: Question) -> str:
    """Answered from the scene's cells and the pictures' facts alone."""
    words = next(found for t in ENGLISH[question.type] if (found := _words_between(question.text, t)) is not None)
    by_name = {picture.name: number for number, picture in enumerate(PICTURES.pictures)}
    at = {PLACES[scene.grid][i]: number for i, number in enumerate(scene.cells)} if scene.grid > 1 else {}
    shown = [PICTURES.pictures[number] for number in scene.cells if number != EMPTY]
    one = {words_of[0]: kind for kind, words_of in KIND_WORDS.items()}
    many = {words_of[1]: kind for kind, words_of in KIND_WORDS.items()}

    def count(what: str, value: str) -> int:
        return sum(getattr(picture, what) == value for picture in shown)

    def place(what: str, value: str) -> str:
        (found,) = [name for name, n in at.items() if n != EMPTY and getattr(PICTURES.pictures[n], what) == value]
        return found

    def row_column(name: str) -> tuple[int, int]:
        return divmod(scene.cells.index(by_name[name]), scene.grid)

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    kind = question.type
    if kind in ("name", "kind", "colour"):
        return str(getattr(shown[0], kind))
    if kind in ("yesno-name", "exists-name"):
        return yes(count("name", words["name"]) > 0)
    if kind in ("yesno-kind", "exists-kind"):
        return yes(count("kind", one[words["kind"]]) > 0)
    if kind == "yesno-colour":
        return yes(shown[0].colour == words["colour"])
    if kind == "caption":
        picture = shown[0]
        tail = "" if picture.colour is None else f", mainly {picture.colour}"
        return f"{picture.name}, {KIND_WORDS[str(picture.kind)][0]}{tail}"
    if kind == "count":
        return str(len(shown))
    if kind == "count-kind":
        return str(count("kind", many[words["kinds"]]))
    if kind == "count-name":
        return str(count("name", words["name"]))
    if kind == "count-colour":
        return str(count("colour", words["colour"]))
    if kind == "where-name":
        return place("name", words["name"])
    if kind == "where-kind":
        return place("kind", one[words["kind"]])
    if kind == "where-colour":
        return place("colour", words["colour"])
    if kind.startswith("at-"):
        return str(getattr(PICTURES.pictures[at[words["place"]]], kind.removeprefix("at-")))
    if kind == "occupied":
        return yes(at[words["place"]] != EMPTY)
    if kind == "relation":
        (row, column), (other_row, other_column) = row_column(words["name"]), row_column(words["other"])
        return yes(
            {
                "left of": column < other_column,
                "right of": column > other_column,
                "above": row < other_row,
                "below": row > other_row,
            }[words["side"]]
        )
    if kind == "compare":
        return yes(count("kind", many[words["kinds"]]) > count("kind", many[words["others"]]))
    assert kind == "scene-caption"
    return "; ".join(f"{name}: {PICTURES.pictures[n].name}" for name, n in at.items() if n != EMPTY)


def test_every_english_answer_is_what_the_scene_shows() -> None:
    asked: Counter[str] = Counter()
    for scene, questions in _stream(1500):
        for question in questions:
            if question.language == "en":
                assert question.answer == _true_answer(scene, question), (scene, question)
                asked[question.type] += 1
    assert set(asked) == set(ENGLISH)
    assert min(asked.values()) > 20


def test_other_languages_ask_and_answer_in_their_words() -> None:
    seen: Counter[str] = Counter()
    for scene, questions in _stream(1500):
        for question in questions:
            if question.language == "en":
                continue
            what, template, word_yes, word_no = OTHER_LANGUAGES[question.language]
            name = PICTURES.pictures[scene.cells[0]].names[question.language]
            if question.type == "name-other":
                assert (question.text, question.answer) == (what, name)
            else:
                assert question.answer == (word_yes if question.text == template.format(name=name) else word_no)
            seen[question.language] += 1
    assert set(seen) == set(LANGUAGES) - {"en"}


def test_yes_and_no_are_balanced_and_wrong_names_are_mostly_of_the_same_kind() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    negatives: Counter[str] = Counter()
    for scene, questions in _stream(2500):
        groups = {PICTURES.pictures[n].group for n in scene.cells if n != EMPTY}
        for question in questions:
            if question.answer in ("yes", "no") and question.language == "en":
                answers[question.type][question.answer] += 1
            if question.negative:
                negatives[question.negative] += 1
            if question.negative and question.language == "en":
                # the two pictures of one concept are never to be told apart
                name = question.text.split('"')[1]
                assert next(p for p in PICTURES.pictures if p.name == name).group not in groups
    assert len(answers) == 8
    for name, counts in answers.items():
        assert 0.4 < counts["yes"] / counts.total() < 0.6, (name, counts)
    assert 0.6 < negatives["same-kind"] / negatives.total() < 0.9


def test_nothing_is_asked_that_a_missing_fact_leaves_open() -> None:
    unknown = 9
    assert PICTURES.pictures[unknown].kind is None
    scene = Scene(2, (0, unknown, EMPTY, 2))
    types = {q.type for seed in range(40) for q in ask(PICTURES, scene, random.Random(seed), 16)}
    assert not types & {"count-kind", "where-kind", "exists-kind", "compare"}
    assert {"where-name", "count-name", "at-kind"} <= types
    single = {q.type for seed in range(40) for q in ask(PICTURES, Scene(1, (unknown,)), random.Random(seed), 16)}
    assert "name" in single
    assert not single & {"kind", "yesno-kind", "caption"}


def test_nothing_is_asked_that_needs_a_name_nobody_gave() -> None:
    """Of pictures 3 and 5; nobody knows that an unnamed picture is not the thing asked for either."""
    blank = {3: dict.fromkeys(LANGUAGES, ""), 5: PICTURES.pictures[5].names | {"de": ""}}
    pictures = PictureSet(
        [dataclasses.replace(p, names=blank.get(n, p.names)) for n, p in enumerate(PICTURES.pictures)], PICTURES.pixels
    )

    def asked(*cells: int) -> list[Question]:
        scene = Scene(1 if len(cells) == 1 else 2, cells)
        return [q for seed in range(60) for q in ask(pictures, scene, random.Random(seed), 20)]

    alone, among = {q.type for q in asked(3)}, {q.type for q in asked(3, 0, EMPTY, 2)}
    assert alone == {"kind", "colour", "yesno-kind", "yesno-colour"}
    assert not among & {"count-name", "where-name", "exists-name", "relation", "scene-caption"}
    assert {"count", "count-kind", "at-name", "where-kind"} <= among
    assert {q.language for q in asked(5)} == {*LANGUAGES} - {"de"}
    # and no other scene asks about them by a name of nothing
    for index in range(1500):
        for question in ask_about(pictures, 0, index, 8)[1]:
            assert question.answer
            assert '""' not in question.text, question


def test_questions_of_a_scene_differ_and_never_exceed_what_was_asked_for() -> None:
    for scene, questions in _stream(200):
        texts = [question.text for question in questions]
        assert len(texts) == len(set(texts)) <= 8
        assert questions, scene
        assert {question.type for question in questions} <= set(TYPES)


def test_a_scene_shows_each_picture_at_its_place() -> None:
    table = SceneTable.build(PICTURES, 36)
    for index in range(30):
        scene = draw_scene(PICTURES, scene_rng(3, index))
        pixels, place = table.compose(scene), 36 // scene.grid
        assert pixels.shape == (36, 36, 3)
        for cell, number in enumerate(scene.cells):
            row, column = divmod(cell, scene.grid)
            part = pixels[row * place : (row + 1) * place, column * place : (column + 1) * place]
            if number == EMPTY:
                assert (part == 255).all()
            else:
                assert (part[place // 2, place // 2] == PICTURES.pixels[number][12, 12]).all()


def test_variants_move_and_shrink_a_picture_within_its_place() -> None:
    table = SceneTable.build(PICTURES, 72, variants=4, seed=1)
    scene = Scene(2, (0, 1, 2, 3))
    plain, moved = table.compose(scene), table.compose(scene, (1, 2, 3, 1))
    assert (plain == table.compose(scene, (0, 0, 0, 0))).all()
    assert (plain != moved).any()
    for cell in range(4):
        top, left = cell // 2 * 36, cell % 2 * 36
        rows, columns = slice(top, top + 36), slice(left, left + 36)
        inside = (moved[rows, columns] < 250).any(axis=2).sum() / (plain[rows, columns] < 250).any(axis=2).sum()
        assert 0.55 < inside < 1.1
    again = SceneTable.build(PICTURES, 72, variants=4, seed=1)
    assert all((table.cells[grid] == again.cells[grid]).all() for grid in (1, 2, 3))


def test_sides_and_sets_that_cannot_be_are_refused() -> None:
    for side, variants in ((32, 1), (0, 1), (36, 0)):
        with pytest.raises(UsageError, match="would not be whole"):
            SceneTable.build(PICTURES, side, variants=variants)
    with pytest.raises(UsageError, match="makes no scene"):
        PictureSet([], [])


def test_the_main_colour_is_what_most_named_pixels_have() -> None:
    drawn = np.full((20, 20, 3), 255, np.uint8)
    drawn[:10] = (210, 47, 39)
    drawn[10:14] = (30, 80, 160)
    drawn[0] = 0  # a black line counts for nothing
    shares = dict(zip(COLOURS, colour_shares(drawn)))
    assert (shares["red"], shares["blue"]) == pytest.approx((0.45, 0.2))
    assert sum(shares.values()) == pytest.approx(0.65)
    assert main_colour(drawn) == "red"  # 0.69 of what counts
    drawn[10:17] = (30, 80, 160)
    assert main_colour(drawn) is None  # 0.56: nobody could say
    assert main_colour(np.full((20, 20, 3), 255, np.uint8)) is None


def test_answers_are_compared_by_what_they_say() -> None:
    assert normalise_answer("  The  Hot Dog. ") == "hot dog"
    assert normalise_answer("Three") == normalise_answer("３") == "3"
    assert normalise_answer("A") == "a"
    assert exact_match("Yes!", "yes")
    assert exact_match("top left: a; b", "Top left: A B")
    assert not exact_match("não", "nao")
    assert not exact_match("", "yes")
    assert not exact_match("hotdog", "hot dog")
    assert exact_match("?", "?")
    assert not exact_match("!", "?")


def test_words_cover_every_kind_and_question() -> None:
    assert set(KIND_WORDS) == set(KINDS)
    assert set(ENGLISH) | {"name-other", "yesno-other"} == set(TYPES)
    assert set(OTHER_LANGUAGES) == set(LANGUAGES) - {"en"}


def test_the_built_in_pictures_keep_their_pools_apart(openmoji: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample for sample in openmoji if "flag" not in sample.tags]
    monkeypatch.setattr(scenes, "openmoji_samples", lambda **_: samples)
    sets = {pool: scenes.picture_set(pool, 0) for pool in ("teacher", "student", "test")}
    groups = {pool: {picture.group for picture in found.pictures} for pool, found in sets.items()}
    assert not groups["teacher"] & groups["student"]
    assert not groups["test"] & (groups["student"] | groups["teacher"])
    few = scenes.picture_set("student", 0, captions=0.1)
    assert 0.05 < len(few) / len(sets["student"]) < 0.16
    (lime,) = (picture for picture in sets["teacher"].pictures if picture.name == "lime")
    assert (lime.kind, lime.names["de"]) == ("food or drink", "limette")
    assert len(scenes.picture_set("test", 0, limit=7)) == 7
