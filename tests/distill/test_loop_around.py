"""Around the loss: the momentum model, switches to the average, interpolation with the start, balanced weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import toy_recipe

from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import load_student

Make = Callable[..., Recipe]
CPU = torch.device("cpu")


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache, **sections), overrides)

    return make


@pytest.fixture
def alone(recipe: Make) -> Make:
    """A student without a teacher, taught by its own average."""

    def make(*overrides: str, **sections: Any) -> Recipe:
        given = {"teacher": None, "objectives": [{"name": "momentum", "options": {"ramp": 0.5}}]}
        return recipe("student.embed_dim=24", "train.text_batch=0", *overrides, **given | sections)

    return make


def trainer(recipe: Recipe) -> Trainer:
    made = Trainer(prepare(recipe, Reporter(False)), CPU)
    made.start()
    return made


def steps(made: Trainer, count: int) -> None:
    for _ in range(count):
        made.one_step(made.feed.make(made.step))


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in made.student.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def resumes_exactly(wanted: Recipe, at: int, total: int) -> Trainer:
    """Two trainers, one of them restored at step `at`, end with equal rows, weights and averages; the whole one."""
    whole = trainer(wanted)
    steps(whole, at)
    state = copy.deepcopy(whole.state())
    steps(whole, total - at)
    resumed = Trainer(prepare(wanted, Reporter(False)), CPU)
    resumed.restore(state, Path("checkpoint"))
    steps(resumed, total - at)
    assert resumed.last == whole.last
    assert equal(weights(resumed), weights(whole))
    with resumed.averaged():
        final = weights(resumed)
    with whole.averaged():
        assert equal(final, weights(whole))
    return whole


# ------------------------------------------------------------------------------------------------ momentum


def test_a_student_without_a_teacher_learns_from_its_average(alone: Make, tmp_path: Path) -> None:
    """40 pictures by chance: R@5 is 12.5 %."""
    quick = ("train.steps=60", "train.batch_size=20", "train.lr=3e-3", "train.ema_decay=0.9", "checkpoint.every=60")
    both = [{"name": "clip"}, {"name": "momentum"}]
    result = distill_run(alone(*quick, views={"count": 1}, objectives=both), tmp_path / "run", progress=False)
    assert result.evaluation is not None
    assert result.evaluation.values["model"]["image_to_text"]["R@5"] > 0.25
    assert load_student(result.student).embed_dim == 24


def test_the_momentum_model_is_the_average_and_moves_nothing(alone: Make) -> None:
    """Its outputs are the averaged student's in evaluation mode; the forward draws nothing and changes nothing."""
    made = trainer(alone("student.overrides.text.dropout=0.5", "train.ema_decay=0.6"))
    steps(made, 3)
    batch = made.feed.make(made.step)
    before, state = torch.get_rng_state(), weights(made)
    average = {name: value.clone() for name, value in made.average.module.state_dict().items()}  # type: ignore[union-attr]
    momentum = made._momentum(batch)
    assert momentum is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(average, made.average.module.state_dict())  # type: ignore[union-attr]
    assert not momentum.image.requires_grad
    with made.averaged(), torch.no_grad():
        made.student.eval()
        wanted, _ = made.feed.forward(made.student, batch)["pairs"]
    for one, other in ((momentum.image, wanted.image), (momentum.text, wanted.text)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other)
    assert equal(weights(made), state)
    assert not equal(average, state)


def test_words_are_not_read_by_the_momentum_model(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(recipe("objectives=[{name: momentum}, {name: feature, batch: texts, options: {text: 0}}]"))
    seen: list[int] = []
    real = type(made.student).encode_text

    def counted(self: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(len(ids))
        return real(self, ids, **kwargs)

    monkeypatch.setattr(type(made.student), "encode_text", counted)
    steps(made, 1)
    assert seen == [8 + 16, 8]


def test_momentum_resumes_to_the_same_numbers(alone: Make) -> None:
    resumes_exactly(alone("student.overrides.text.dropout=0.2"), 3, 6)


def test_momentum_needs_an_average(alone: Make) -> None:
    with pytest.raises(
        UsageError, match=r"momentum\) learns from the student's moving average and train\.ema_decay is"
    ):
        alone("train.ema_decay=0")


def test_momentum_reads_captions_and_pictures_without_them_still_train(alone: Make, monkeypatch: Any) -> None:
    """A batch in which nobody has a caption gives a loss of 0, not a crash."""
    made = trainer(alone())
    batch = made.feed.make(0)
    batch.with_text, batch.ids = torch.zeros(0, dtype=torch.long), None
    assert made.one_step(batch)["loss"] == 0.0


def test_inside_matryoshka_the_average_is_cut_too(alone: Make) -> None:
    objectives = [{"name": "matryoshka", "options": {"inner": {"name": "momentum"}, "dims": [8, 24]}}]
    made = trainer(alone("student.overrides.dims=[8]", objectives=objectives))
    steps(made, 2)
    assert {"loss/momentum_8", "loss/momentum_24"} <= made.last.keys()
    wrapper: Any = made.objectives[0]
    full = Outputs(image=torch.randn(4, 24), text=torch.randn(4, 24))
    terms = wrapper(student=full, teacher=full)
    cut = Outputs(image=full.image[:, :8], text=full.text[:, :8])  # type: ignore[index]
    assert torch.equal(terms["momentum_8"], wrapper.inners[0](student=cut, teacher=cut)["momentum"])
