"""Around the loss: the momentum model, switches to the average, interpolation with the start, balanced weights."""

from __future__ import annotations

import copy
import json
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
from pocketvlm.edge.errors import IntegrityError, UsageError
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


def test_the_momentum_model_does_no_needless_work(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No masked pictures, no inner activations and no teacher are given to it, whatever else the recipe asks for."""
    tapped = {"name": "token-alignment", "options": {"variant": "filip"}}
    made = trainer(recipe(objectives=[{"name": "momentum"}, {"name": "masked-feature"}, {"name": "crd"}, tapped]))
    seen: list[tuple[Any, bool]] = []
    real = type(made.feed).forward

    def watched(self: Any, student: Any, batch: Any, beside: Any = None, *, tapped: bool = True) -> Any:
        seen.append((batch, tapped))
        return real(self, student, batch, beside, tapped=tapped)

    monkeypatch.setattr(type(made.feed), "forward", watched)
    steps(made, 1)
    (batch, whole), (only, part) = seen
    assert (whole, part) == (True, False)
    assert batch.masked is not None
    assert {
        name for name, value in vars(only).items() if value is not None and name.startswith(("teacher", "masked"))
    } == set()
    assert only.pixels is batch.pixels
    assert only.texts == 0


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


# ------------------------------------------------------------------------------------------------ switch to the average


def test_switching_puts_the_average_into_the_student_and_nothing_else(recipe: Make) -> None:
    """At every third step of the main phase; the optimizer's moments and the average itself stay."""
    changes = ("train.text_pretrain_steps=1", "train.ema_decay=0.5", "train.steps=6")
    switching, plain = trainer(recipe(*changes, "train.switch_every=3")), trainer(recipe(*changes))
    for made in (switching, plain):
        steps(made, 1 + 2)
    assert equal(weights(switching), weights(plain))
    for made in (switching, plain):
        steps(made, 1)
        assert made.average is not None
    average = switching.average.module.state_dict()  # type: ignore[union-attr]
    assert equal(average, plain.average.module.state_dict())  # type: ignore[union-attr]
    assert equal(weights(switching), average)
    assert not equal(weights(plain), average)
    for one, other in zip(*(made.optimizer.state_dict()["state"].values() for made in (switching, plain))):
        assert torch.equal(one["exp_avg"], other["exp_avg"])
    steps(switching, 1)
    assert not equal(weights(switching), switching.average.module.state_dict())  # type: ignore[union-attr]


def test_switching_moves_nothing_that_stands_still(recipe: Make) -> None:
    """Neither weights nor batch-norm statistics of a part that stopped earlier, whose average still lags behind."""
    late = ("train.freeze_after={image_tower: 3}", "train.switch_every=2", "train.steps=6", "train.ema_decay=0.9")
    made = trainer(recipe(*late))
    steps(made, 3)
    before = weights(made)
    steps(made, 1)
    after, average = weights(made), made.average.module.state_dict()  # type: ignore[union-attr]
    held = [name for name in before if name.startswith("image_tower.")]
    assert any("running_mean" in name for name in held)
    assert all(torch.equal(after[name], before[name]) for name in held)
    assert any(not torch.equal(after[name], average[name]) for name in held)
    assert all(torch.equal(after[name], average[name]) for name in after if name.startswith("text_tower."))


def test_switching_resumes_to_the_same_numbers(recipe: Make) -> None:
    resumes_exactly(recipe("train.switch_every=2", "train.steps=6", "train.ema_decay=0.9"), 3, 6)


# ------------------------------------------------------------------------------------------------ interpolation


def started(recipe: Make, tmp_path: Path) -> str:
    """A saved student, so that there is a start worth returning to."""
    made = trainer(recipe())
    from pocketvlm.students import save_student

    save_student(made.student, tmp_path / "start")
    return f"student.init={tmp_path / 'start'}"


def test_the_result_is_interpolated_with_the_start(recipe: Make, tmp_path: Path) -> None:
    """Parameter by parameter in plain numbers, logit scale and statistics included; training does not notice."""
    init = started(recipe, tmp_path)
    mixed, plain = trainer(recipe(init, "train.interpolate=0.7")), trainer(recipe(init))
    before = weights(mixed)
    for made in (mixed, plain):
        steps(made, 3)
    assert equal(weights(mixed), weights(plain))
    trained, inside = weights(mixed), {}
    with plain.averaged():
        average = weights(plain)
    with mixed.averaged():
        inside = weights(mixed)
    for name, value in inside.items():
        if value.is_floating_point():
            wanted = 0.3 * before[name].double() + 0.7 * average[name].double()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert torch.equal(value, average[name])
    assert inside["log_scale"] != average["log_scale"]
    assert equal(weights(mixed), trained)


def test_what_is_saved_and_scored_is_interpolated(recipe: Make, tmp_path: Path) -> None:
    init = started(recipe, tmp_path)
    wanted = recipe(init, "train.interpolate=0.4", "train.ema_decay=0", "train.steps=4")
    result = distill_run(wanted, tmp_path / "run", progress=False)
    saved = load_student(result.student).state_dict()
    made = trainer(wanted)
    steps(made, 4)
    assert not equal(saved, weights(made))
    with made.averaged():
        assert equal(saved, weights(made))
        evaluation = made.evaluate()
    assert result.evaluation is not None
    assert evaluation is not None
    assert evaluation.values["model"] == result.evaluation.values["model"]


def test_interpolation_resumes_with_the_start_it_had(recipe: Make, tmp_path: Path) -> None:
    resumes_exactly(recipe(started(recipe, tmp_path), "train.interpolate=0.5", "student.fit_projection=0.1"), 2, 4)


# ------------------------------------------------------------------------------------------------ balance


def norms(made: Trainer) -> list[float]:
    """Gradient norms of the weighted objectives at the embeddings, by hand and by name of the term."""
    batch = made.feed.make(made.step)
    outputs = made.feed.forward(made.student, batch)
    found = []
    for spec, objective in zip(made.recipe.objectives, made.objectives):
        student, teacher = outputs[spec.batch]
        loss = sum(objective(student=student, teacher=teacher).values())
        parts = [part for part in (student.image, student.text, student.bank) if part is not None]
        gradients = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        found.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
    return found


BALANCED = [
    {"name": "clip", "weight": 2.0},
    {"name": "feature", "weight": 3.0, "options": {"distance": "cosine"}},
    {"name": "hint", "weight": 0.1},
    {"name": "feature", "batch": "texts", "weight": 0.5, "options": {"text": 0}},
]


def test_balanced_objectives_pull_as_their_weights_say(recipe: Make) -> None:
    """Weight times factor times the norm at the first step is weight times the first's norm, words included."""
    made = trainer(recipe("train.balance=gradient-norm", "student.overrides.text.dropout=0", objectives=BALANCED))
    wanted = norms(made)
    row = made.one_step(made.feed.make(0))
    factors = [row[f"balance/{place}.{spec['name']}"] for place, spec in enumerate(BALANCED)]
    assert factors[0] == 1.0
    assert factors[2] == 1.0  # hint reads no embedding
    for place in (1, 3):
        assert factors[place] * wanted[place] == pytest.approx(wanted[0], rel=1e-4)
    plain = trainer(recipe("student.overrides.text.dropout=0", objectives=BALANCED))
    unbalanced = plain.one_step(plain.feed.make(0))
    assert row["loss/feature_image@texts"] == pytest.approx(unbalanced["loss/feature_image@texts"] * factors[3])
    assert row["loss/clip"] == unbalanced["loss/clip"]


def test_norms_are_measured_now_and_then_and_averaged(recipe: Make) -> None:
    changes = ("train.balance=gradient-norm", "train.balance_every=2", "student.overrides.text.dropout=0")
    made = trainer(recipe(*changes, objectives=BALANCED))
    measured = [norms(made)]
    for _ in range(3):
        steps(made, 1)
        assert made.balance is not None
        measured.append(norms(made))
    expected = [0.9 * first + 0.1 * third for first, third in zip(measured[0], measured[2])]
    assert made.balance.norms == pytest.approx(expected, rel=1e-3)
    assert made.balance.norms[2] == 0.0


def test_measuring_changes_no_gradient() -> None:
    from pocketvlm.distill.balance import GradientBalance

    def gradient(measure: bool) -> torch.Tensor:
        torch.manual_seed(0)
        tower, x = torch.nn.Linear(3, 4), torch.randn(5, 3)
        student = Outputs(image=tower(x))
        loss = student.image.square().mean()
        if measure:
            balance = GradientBalance(1)
            balance.measure(0, loss, student)
            assert balance.norms[0] == pytest.approx(float((2 * student.image / 20).detach().norm()))
            assert tower.weight.grad is None
        loss.backward()
        assert tower.weight.grad is not None
        return tower.weight.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_term_of_nothing_leaves_its_norm_alone() -> None:
    """A zero before anything was measured gives factor 1, a zero later keeps what was known."""
    from pocketvlm.distill.balance import GradientBalance

    balance = GradientBalance(2)
    image = torch.ones(2, 3, requires_grad=True)
    student = Outputs(image=image)
    balance.measure(0, image.sum(), student)
    balance.measure(1, 0.0 * image.sum(), student)
    assert balance.factor(1) == 1.0
    balance.measure(1, 4.0 * image.sum(), student)
    balance.measure(1, 0.0 * image.sum(), student)
    balance.measure(1, float("nan") * image.sum(), student)
    balance.measure(1, torch.zeros(()), student)
    assert balance.factor(1) == pytest.approx(0.25)


def test_balance_resumes_to_the_same_numbers(recipe: Make) -> None:
    changes = ("train.balance=gradient-norm", "train.balance_every=2", "train.text_pretrain_steps=1", "train.steps=6")
    whole = resumes_exactly(recipe(*changes, objectives=BALANCED), 4, 7)
    assert whole.balance is not None
    assert whole.balance.norms[3] > 0


# ------------------------------------------------------------------------------------------------ freezing, targets


def test_parts_can_stand_still_again(recipe: Make) -> None:
    """Frozen from the second step of the main phase on; moments or decay move nothing either."""
    changed = recipe("train.freeze_after={text_tower: 2}", "train.freeze={text_tower.token: 1}", "train.warmup_steps=0")
    made = trainer(changed)
    moved = []
    for _ in range(4):
        before = weights(made)
        steps(made, 1)
        changes = [name for name, value in weights(made).items() if not torch.equal(value, before[name])]
        moved.append([any(name.startswith(part) for name in changes) for part in ("text_tower.token", "text_tower")])
        assert any(name.startswith("image_tower.projection") for name in changes)
    assert moved == [[False, True], [True, True], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("part", "key"), [("images", "image"), ("images", "text"), ("words", "text"), ("words", "features")]
)
def test_a_teacher_that_says_no_number_is_caught_before_the_step(recipe: Make, part: str, key: str) -> None:
    """Also in the fixed bank, in text features and where captions are mixed into the targets."""
    prepared = prepare(recipe("train.bank=60", "teacher.caption_mix=1"), Reporter(False))
    cache = getattr(prepared, part)
    file = (cache._files if key == "image" else cache._text_files)[0]
    cache.load()._open[file][key][:] = float("inf")
    with pytest.raises(IntegrityError, match="is not finite, and one such target"):
        Trainer(prepared, CPU).feed.make(0)


def test_a_wrong_prefix_to_freeze_is_answered_with_the_nearest(recipe: Make) -> None:
    with pytest.raises(UsageError, match="unknown parameter prefix 'text_towr'; did you mean 'text_tower'"):
        trainer(recipe("train.freeze_after={text_towr: 2}"))


# ------------------------------------------------------------------------------------------------ captions and rewrites


def test_caption_weights_decide_what_a_run_draws(alone: Make, world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    path = tmp_path / "both.jsonl"

    def write(weight: float) -> None:
        for row in rows:
            row["image"] = str(world.parent / Path(row["image"]).name)
            again = {"text": f"a {row['label']} one", "source": "rewrite", "weight": weight}
            row["captions"] = [f"{row['label']} thing", again]
            row.pop("caption", None)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def made(**caption_weights: float) -> Trainer:
        data = {"train": f"{path}?check=none", "eval": None, "caption_weights": caption_weights}
        return trainer(alone(data=data, student=toy_recipe(world, tmp_path)["student"]))

    def drawn(of: Trainer) -> list[str | None]:
        return [text for step in range(40) for text in of.order.plan(step).captions]

    write(1.0)
    even, never, seldom = made(), made(rewrite=0.0), made(rewrite=0.25)
    shares = [sum(str(text).startswith("a ") for text in drawn(one)) / 320 for one in (even, never, seldom)]
    assert 0.4 < shares[0] < 0.6
    assert shares[1] == 0.0
    assert 0.12 < shares[2] < 0.28
    assert drawn(made(rewrite=0.25)) == drawn(seldom)
    # a run is not continued on data that says otherwise how often
    state = even.state()
    write(3.0)
    other = made()
    with pytest.raises(IntegrityError, match="made with another data"):
        other.restore(state, tmp_path)
    with pytest.raises(UsageError, match="unknown caption source"):
        made(rewrites=1.0)
