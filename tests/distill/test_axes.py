"""`teacher.axes: principal`: the same teacher in coordinates whose first numbers keep the most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import DIM, TINY_STUDENT, toy_recipe

from pocketvlm.distill.axes import TurnedCache, principal_axes
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import load_student

SILENT = Reporter(False)
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(
    world: Path, teacher_cache: Path, toy_teacher: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))

    def make(*overrides: str, **sections: Any) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache, **sections), overrides)

    return make


def test_axes_are_orthogonal_and_sorted_by_what_they_keep() -> None:
    draw = torch.Generator().manual_seed(1)
    pictures, texts = torch.randn(40, 6, generator=draw), torch.randn(9, 6, generator=draw) * torch.arange(1, 7)
    axes = principal_axes(pictures, texts, torch.zeros(0, 6)).double()
    assert torch.allclose(axes.T @ axes, torch.eye(6, dtype=torch.float64), atol=1e-5)
    kept = np.zeros(6)  # by plain loops: mean squared coordinate, both sets alike
    for rows in (pictures, texts):
        for row in rows.double().numpy():
            kept += (row / np.linalg.norm(row) @ axes.numpy()) ** 2 / len(rows) / 2
    assert (np.diff(kept) < 0).all()
    assert kept.sum() == pytest.approx(1, abs=1e-5)
    # no unit vector keeps more than the first axis
    others = torch.nn.functional.normalize(torch.randn(500, 6, generator=draw, dtype=torch.float64), dim=-1)
    both = [torch.nn.functional.normalize(rows.double(), dim=-1) for rows in (pictures, texts)]
    best = max(float(np.mean([(u @ v).square().mean() for u in both])) for v in others)
    assert best < kept[0]
    assert (axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_a_turned_teacher_says_the_same_in_other_numbers(recipe: Make) -> None:
    own, turned = prepare(recipe(), SILENT), prepare(recipe("teacher.axes=principal"), SILENT)
    uids, texts = [sample.uid for sample in own.samples], own.texts
    cosines = []
    for found in (own, turned):
        assert found.images is not None
        assert found.words is not None
        assert found.teacher_answers is not None
        pictures, words = found.images.image(uids, 1), found.words.text(texts)
        answers = found.teacher_answers
        cosines.append((pictures @ words.T, torch.from_numpy(np.asarray(answers.images @ answers.texts.T))))
        assert found.teacher is not None
        assert found.student.space_id == found.teacher.space_id == answers.space_id
    for a, b in zip(*cosines):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)
    assert own.student.space_id != turned.student.space_id
    # the toy teacher knows three numbers, so three axes hold all of them
    assert turned.images is not None
    assert turned.images.image(uids)[:, 3:].abs().max() < 1e-4
    assert own.images is not None
    assert own.images.image(uids)[:, 3:].abs().max() > 0.1
    assert turned.images.image([]).shape == (0, DIM)
    with pytest.raises(UsageError, match="axes of the teacher"):
        own.with_recipe(recipe("teacher.axes=principal"))
    assert isinstance(turned.with_recipe(recipe("teacher.axes=principal", "train.seed=3")).images, TurnedCache)


def test_without_texts_the_captions_say_the_axes(recipe: Make) -> None:
    found = prepare(recipe("teacher.axes=principal", "train.text_batch=0", objectives=[{"name": "feature"}]), SILENT)
    assert found.words is None
    assert isinstance(found.images, TurnedCache)


def test_a_run_ends_in_the_turned_space(recipe: Make, tmp_path: Path) -> None:
    """The student's space is the turned teacher's: mixed pairings are scored there, and the promise is kept."""
    student = {
        "name": "mnv4-035", "overrides": TINY_STUDENT | {"dims": [4]}, "fit_projection": 0.1,
        "fit_text_projection": 0.01,
    }  # fmt: skip
    objectives = [{"name": "matryoshka", "options": {"inner": {"name": "feature"}, "dims": [4, 16]}}]
    wanted = recipe("teacher.axes=principal", student=student, objectives=objectives)
    result = distill_run(wanted, tmp_path / "run", progress=False)
    assert result.evaluation is not None
    assert result.evaluation.values["mixed"]["model_image_teacher_text"]["image_to_text"]["R@5"] > 0
    contract = load_student(result.student).contract
    assert contract.dims == (4, 16)
    assert contract.space_id == prepare(wanted, SILENT).student.space_id


def test_a_start_from_other_coordinates_is_refused(recipe: Make) -> None:
    with pytest.raises(UsageError, match=r"student\.init brings projections to other coordinates"):
        recipe("teacher.axes=principal", "student.init=there")
    fits = ("student.fit_projection=0.1", "student.fit_text_projection=0.01")
    recipe("teacher.axes=principal", "student.init=there", *fits)


def test_axes_of_several_teachers_are_refused(recipe: Make) -> None:
    with pytest.raises(UsageError, match=r"there are 2 teachers, whose spaces have axes of their own"):
        recipe("teacher.axes=principal", "teacher.spec=[toy, minilm]")


def test_axes_of_a_teacher_without_pictures_are_refused(recipe: Make) -> None:
    gram = {"name": "gram", "options": {"of": ["text"]}}
    wanted = recipe("teacher.axes=principal", "teacher.spec=toy-text", "student.embed_dim=6", objectives=[gram])
    with pytest.raises(UsageError, match="reads texts only, so there are no pictures to find axes of"):
        prepare(wanted, SILENT)
