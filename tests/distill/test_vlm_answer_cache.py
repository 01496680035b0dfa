"""What is kept of a teacher: fixed lists, trunk outputs, the largest shares and the rest, and how they are compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from vlm_toys import OTHER_TOKENIZER, PICTURES, SIDE, TOKENIZER, made_list, random_tensor, tiny

from pocketvlm.data.scenes import PictureSet, SceneTable
from pocketvlm.distill.vlm.answer_cache import (
    MANIFEST,
    REQUEST,
    KeptAnswers,
    check_vocabulary,
    gram_root,
    kept_answers,
    teach,
)
from pocketvlm.distill.vlm.features import KeptTrunk, trunk_features, without_trunk
from pocketvlm.distill.vlm.losses import DIRECTIONS, kept_divergence, relation_distance, token_divergence
from pocketvlm.distill.vlm.pseudo import agreement, labelled_numbers, picture_answers, pseudo_labelled, subset
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.teachers.top_logits import largest


def _softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a > 0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("top", [1, 3, 5])
def test_kept_rows_are_compared_over_the_largest_and_the_rest(direction: str, top: int) -> None:
    student, teacher = random_tensor(5, 7), random_tensor(5, 7, seed=1)
    total = 0.0
    for row in range(5):
        q, p = (_softmax(x[row].tolist()) for x in (student, teacher))
        order = sorted(range(7), key=lambda token: -p[token])
        p, q = ([values[t] for t in order[:top]] + [sum(values[t] for t in order[top:])] for values in (p, q))
        middle = [(a + b) / 2 for a, b in zip(p, q)]
        total += {"forward": _kl(p, q), "reverse": _kl(q, p), "js": (_kl(p, middle) + _kl(q, middle)) / 2}[direction]
    shares = teacher.log_softmax(dim=1)
    logs, ids = shares.topk(top, dim=1)
    rest = shares.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    found = kept_divergence(student=student, ids=ids, logs=torch.cat([logs, rest], 1), direction=direction)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(total / 5)
    whole = token_divergence(student=student, teacher=teacher, direction=direction)  # type: ignore[arg-type]
    assert found < whole


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_row_that_keeps_everything_is_the_whole_divergence(direction: str) -> None:
    student, teacher = random_tensor(6, 9).requires_grad_(), random_tensor(6, 9, seed=1)
    logs, ids = teacher.log_softmax(dim=1).topk(9, dim=1)
    kept = torch.cat([logs, torch.full((6, 1), -torch.inf, dtype=logs.dtype)], dim=1)
    found = kept_divergence(student=student, ids=ids, logs=kept, direction=direction)  # type: ignore[arg-type]
    expected = token_divergence(student=student, teacher=teacher, direction=direction)  # type: ignore[arg-type]
    (own,) = torch.autograd.grad(found, student, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected, student)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(own, wanted)
    # as a cache has it, in half precision
    halves, ids = largest(teacher.float().log_softmax(dim=1), 9)
    rounded = kept_divergence(student=student, ids=ids, logs=halves, direction=direction)  # type: ignore[arg-type]
    assert float(rounded.detach()) == pytest.approx(float(expected.detach()), rel=5e-3)


def test_kept_rows_that_do_not_belong_are_refused() -> None:
    student, ids, logs = random_tensor(2, 7), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 4)
    with pytest.raises(UsageError, match="row i must be of token i"):
        kept_divergence(student=student[:1], ids=ids, logs=logs)
    with pytest.raises(UsageError, match="names token 9 of a student with 7"):
        kept_divergence(student=student, ids=ids + 9, logs=logs)
    with pytest.raises(UnknownNameError, match="forward"):
        kept_divergence(student=student, ids=ids, logs=logs, direction="back")  # type: ignore[arg-type]


def test_the_root_of_a_gram_matrix_relates_as_the_tokens_do() -> None:
    student, teacher = random_tensor(3, 4, 5), random_tensor(3, 4, 8, seed=1)
    kept = gram_root(teacher)
    assert kept.shape == (3, 4, 4)
    expected = relation_distance(student=student, teacher=teacher)
    assert float(relation_distance(student=student, teacher=kept)) == pytest.approx(float(expected), rel=1e-9)


def test_a_list_shows_and_asks_what_its_scenes_do() -> None:
    scenes = made_list(12)
    table = SceneTable.build(PICTURES, SIDE, variants=2)
    composer = composer_of(PICTURES, SIDE, variants=2)
    chosen = [7, 2, 11, 0, 5]
    for row, index in zip(scenes.pixels(chosen, composer), chosen):
        entry = scenes.entries[index]
        assert (row.numpy() == table.compose(entry.scene, entry.variants)).all()
    assert {entry.scene.grid for entry in scenes.entries} == {1, 2, 3}
    rows = scenes.rows(chosen)
    answers = [token for index in chosen for _, answer in scenes.entries[index].talks for token in answer]
    assert rows.targets.tolist() == answers
    every = [token for entry in scenes.entries for _, answer in entry.talks for token in answer]
    assert [every[place] for place in scenes.token_places(chosen).tolist()] == answers
    assert scenes.tokens == len(every)
    assert made_list(12).digest == scenes.digest != made_list(12, seed=1).digest
    assert made_list(12, questions=2).scene_digest == scenes.scene_digest
    only, numbers = scenes.only(lambda scene, place: scene in (3, 8) and place == 1)
    assert numbers == [3, 8]
    assert [entry.questions for entry in only.entries] == [(scenes.entries[i].questions[1],) for i in (3, 8)]
    with pytest.raises(UsageError, match="a list without scenes"):
        scenes.only(lambda scene, place: False)
    tight = SceneList.draw(PICTURES, TOKENIZER, scenes=12, questions=4, seed=0, length=30)
    assert tight.rows(range(12)).ids.shape[1] <= 30
    assert max(sum(len(q) + len(a) - 1 for q, a in entry.talks) for entry in tight.entries) > 24
    with pytest.raises(UsageError, match="no question about a scene fits"):
        SceneList.draw(PICTURES, TOKENIZER, scenes=1, questions=2, seed=0, length=3)


def test_kept_features_give_what_pixels_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scenes, composer = tiny(), made_list(), composer_of(PICTURES, SIDE, variants=2)
    kept = trunk_features(model, scenes, composer, tmp_path)
    chosen = [4, 1, 8]
    rows = scenes.rows(chosen)
    whole = model(scenes.pixels(chosen, composer), rows)
    names = set(model.state_dict())
    assert torch.equal(kept.only([8, 2])([0, 1, 0]), kept([8, 2, 8]))
    with without_trunk(model):
        assert isinstance(model.vision, KeptTrunk)
        assert not any(name.startswith("vision.") for name in model.state_dict())
        torch.testing.assert_close(model(kept(chosen), rows), whole, rtol=2e-2, atol=2e-2)
    assert set(model.state_dict()) == names
    # read again, not made again; another trunk has a file of its own
    monkeypatch.setattr(type(composer), "__call__", lambda *_: pytest.fail("made again"))
    assert (trunk_features(model, scenes, composer, tmp_path).values == kept.values).all()
    monkeypatch.undo()
    trunk_features(tiny(1), scenes, composer, tmp_path)
    assert len(list(tmp_path.glob("trunk-*.npy"))) == 2
    with torch.no_grad():
        for weight in model.vision.parameters():
            weight.mul_(1e6)
    with pytest.raises(UsageError, match="which float16 cannot keep"):
        trunk_features(model, scenes, composer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def _made(folder: Path, scenes: SceneList, teacher: Vlm | None, **options: object) -> KeptAnswers:
    composer = None if teacher is None else composer_of(PICTURES, SIDE, variants=2)
    return kept_answers(folder, scenes, **{"top": 5, **options}, teacher=teacher, composer=composer)  # type: ignore[arg-type]


def test_a_cache_holds_what_the_teacher_says_and_needs_it_once(tmp_path: Path) -> None:
    teacher, scenes = tiny(3, width=64), made_list(20)
    kept = _made(tmp_path / "a", scenes, teacher, places=True)
    chosen = [17, 3, 9]
    composer = composer_of(PICTURES, SIDE, variants=2)
    fresh = teach(teacher, scenes, chosen, scenes.pixels(chosen, composer), 5, True)
    for found in (kept.of(chosen), _made(tmp_path / "a", scenes, None, places=True).of(chosen)):
        assert found.place_ids is not None
        assert fresh.place_ids is not None
        assert (found.ids.long() == fresh.ids).all()
        assert (found.place_ids.long() == fresh.place_ids).all()
        for own, wanted in zip(
            (found.logs, found.place_logs, found.relations), (fresh.logs, fresh.place_logs, fresh.relations)
        ):
            torch.testing.assert_close(own, wanted.float(), rtol=2e-3, atol=2e-3)
    # the distribution is that of the teacher's own forward
    logits = teacher(scenes.pixels(chosen, composer), scenes.rows(chosen))
    whole = logits.log_softmax(dim=1)
    torch.testing.assert_close(whole.gather(1, fresh.ids), fresh.logs[:, :-1].float(), rtol=2e-3, atol=2e-3)
    assert kept.bytes == sum(value.numel() * value.element_size() for value in kept.tensors.values())


def test_an_interrupted_cache_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketvlm.distill.vlm.answer_cache._PART", 4)
    teacher, scenes = tiny(3), made_list(10)
    whole = _made(tmp_path / "whole", scenes, teacher)
    done: list[str] = []

    def stop(line: str) -> None:
        done.append(line)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_answers(
            tmp_path / "cut", scenes, top=5, teacher=teacher, composer=composer_of(PICTURES, SIDE, variants=2), say=stop
        )
    assert not (tmp_path / "cut" / MANIFEST).exists()
    calls = []
    monkeypatch.setattr("pocketvlm.distill.vlm.answer_cache.teach", lambda *a, **k: calls.append(1) or teach(*a, **k))
    resumed = _made(tmp_path / "cut", scenes, teacher)
    assert len(calls) == 1
    for name, value in whole.tensors.items():
        assert torch.equal(resumed.tensors[name], value)
    with pytest.raises(UsageError, match="no finished answers of a teacher"):
        _made(tmp_path / "none", scenes, None)


def test_a_cache_of_something_else_or_damaged_is_refused(tmp_path: Path) -> None:
    teacher, scenes = tiny(3), made_list()
    _made(tmp_path, scenes, teacher)
    with pytest.raises(IntegrityError, match="of another teacher"):
        _made(tmp_path, scenes, tiny(4))
    with pytest.raises(IntegrityError, match="of another list of scenes"):
        _made(tmp_path, made_list(seed=1), teacher)
    with pytest.raises(IntegrityError, match="of another number of entries"):
        _made(tmp_path, scenes, teacher, top=6)
    request = json.loads((tmp_path / REQUEST).read_text())
    (tmp_path / REQUEST).write_text(json.dumps(request | {"tokenizer": "0"}))
    with pytest.raises(IntegrityError, match="of another tokenizer"):
        _made(tmp_path, scenes, None)
    (tmp_path / REQUEST).write_text(json.dumps(request))
    part = next(tmp_path.glob("answers-*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match="is missing or was damaged"):
        _made(tmp_path, scenes, None)
    with pytest.raises(UsageError, match="ask for 1 to as many"):
        _made(tmp_path / "b", scenes, teacher, top=10_000)


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    stranger = tiny(3, tokenizer=OTHER_TOKENIZER)
    with pytest.raises(UsageError, match="whose tokenizer is not the student's") as caught:
        check_vocabulary(stranger, TOKENIZER)
    assert str(caught.value).count(". ") == 0
    with pytest.raises(UsageError, match="whose tokenizer is not the student's"):
        _made(tmp_path, made_list(), stranger)


def test_facts_of_unlabelled_pictures_are_the_teachers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny(3)
    answers = {"What kind": "animal", "What is the main": "plaid"}

    def say(pixels: torch.Tensor, prompts: list[str], **_: object) -> list[str]:
        return [next((a for q, a in answers.items() if prompt.startswith(q)), "thing b") for prompt in prompts]

    monkeypatch.setattr(teacher, "generate", say)
    unlabelled = [number for number in range(len(PICTURES)) if number not in (0, 5)]
    answered = picture_answers(teacher, PICTURES, unlabelled, kept=tmp_path)
    said = pseudo_labelled(PICTURES, [0, 5], answered)
    for number, (own, true) in enumerate(zip(said.pictures, PICTURES.pictures)):
        if number in (0, 5):
            assert own == true
        else:
            assert (own.uid, own.name, own.kind, own.colour) == (true.uid, "thing b", "animal", None)
            assert own.group == "said:thing b"
    assert agreement(said, PICTURES, [1, 4]) == {"name": 0.5, "kind": 0.5, "colour": 0.0}
    # what is said does not depend on labels
    bare = PictureSet([p if n in (0, 5) else _blank(p) for n, p in enumerate(PICTURES.pictures)], PICTURES.pixels)
    assert pseudo_labelled(bare, [0, 5], picture_answers(teacher, bare, unlabelled)).pictures == said.pictures
    # asked once
    monkeypatch.setattr(teacher, "generate", lambda *_, **__: pytest.fail("asked again"))
    assert picture_answers(teacher, PICTURES, unlabelled, kept=tmp_path) == answered
    few = labelled_numbers(PICTURES, 0.3)
    assert 0 < len(few) < len(PICTURES)
    assert [p.uid for p in subset(PICTURES, few).pictures] == [PICTURES.pictures[n].uid for n in few]
    assert np.shares_memory(subset(PICTURES, few).pixels[0], PICTURES.pixels[few[0]])


def _blank(picture: object) -> object:
    import dataclasses

    return dataclasses.replace(picture, names={"en": "?"}, kind=None, colour=None, group="?")  # type: ignore[type-var]
