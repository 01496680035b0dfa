"""The order of a run: a pure function of (seed, step), fair to every sample; pictures decoded once."""

from __future__ import annotations

import time
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.distill.batches import Order, Pictures, prefetch
from pocketvlm.distill.optim import learning_rate, objective_weight
from pocketvlm.distill.recipe import ObjectiveSection, TrainSection
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import resize_image


def samples(count: int, captioned: int) -> list[Sample]:
    return [
        Sample(f"s{i}", ImageRef(data=b""), captions=(Caption(f"name {i}"),) if i < captioned else ())
        for i in range(count)
    ]


def order(count: int = 50, captioned: int = 50, **how: object) -> Order:
    values: dict[str, object] = {"batch_size": 8, "views": 4, "seed": 0, "text_pool": 30, "text_batch": 6}
    return Order(samples(count, captioned), **(values | how))  # type: ignore[arg-type]


def test_an_epoch_shows_each_sample_at_most_once_and_epochs_differ() -> None:
    plans = [order().plan(step) for step in range(12)]
    first = [row for plan in plans[:6] for row in plan.rows]
    assert len(first) == len(set(first)) == 48
    assert first != [row for plan in plans[6:] for row in plan.rows]
    seen = Counter(row for step in range(600) for row in order().plan(step).rows)
    assert len(seen) == 50
    assert max(seen.values()) - min(seen.values()) < 25


def test_a_step_needs_no_history() -> None:
    forward = [order().plan(step) for step in range(20)]
    for step in (19, 3, 11):
        again = order().plan(step)
        assert (again.rows, again.views, again.captions, again.words) == (
            forward[step].rows,
            forward[step].views,
            forward[step].captions,
            forward[step].words,
        )
    assert order(seed=1).plan(3).rows != forward[3].rows


def test_every_view_comes_about_equally_often() -> None:
    counts = Counter(view for step in range(400) for view in order().plan(step).views)
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_few_captions_can_be_given_their_share_of_each_batch() -> None:
    mixed = order(captioned=5, captioned_fraction=0.5)
    for step in range(10):
        plan = mixed.plan(step)
        assert sum(text is not None for text in plan.captions) == 4
        assert len(set(plan.rows)) == len(plan.rows) == 8
    only = order(captioned=5, captioned_fraction=1.0)
    assert only.batch_size == 5
    assert all(text is not None for text in only.plan(7).captions)


def test_a_batch_larger_than_the_data_is_the_data_and_no_data_is_refused() -> None:
    assert sorted(order(count=5, captioned=5).plan(9).rows) == [0, 1, 2, 3, 4]
    with pytest.raises(UsageError, match="no sample is left to train on"):
        order(count=0, captioned=0)


def test_equal_captions_are_one_group_and_pictures_without_one_are_alone() -> None:
    same = [
        Sample(f"s{i}", ImageRef(data=b""), captions=(Caption(text),)) for i, text in enumerate(("Cat", "cat ", "dog"))
    ]
    plan = Order([*same, *samples(2, 0)], batch_size=5, views=1, seed=0).plan(0)
    groups = dict(zip(plan.rows, plan.group.tolist()))
    assert groups[0] == groups[1] != groups[2]
    assert len(set(groups.values())) == 4


def test_captions_are_drawn_by_weight() -> None:
    sample = Sample("s", ImageRef(data=b""), captions=(Caption("often", weight=3.0), Caption("seldom")))
    one = Order([sample], batch_size=1, views=1, seed=0)
    counts = Counter(one.plan(step).captions[0] for step in range(800))
    assert 0.68 < counts["often"] / 800 < 0.82


def test_sources_of_captions_are_drawn_in_proportion_and_again_the_same() -> None:
    """One original and three rewrites at 0.5 each: 40 % and 60 %, whatever was drawn before."""
    rewrites = tuple(Caption(f"rewrite {i}", source="rewrite") for i in range(3))
    source = DataSource("d", [Sample(f"s{i}", ImageRef(data=b""), (Caption("plain"), *rewrites)) for i in range(4)])
    weighed = Order(source.weighed({"rewrite": 0.5}).samples, batch_size=4, views=1, seed=0)
    steps = [dict(zip(plan.rows, plan.captions)) for plan in map(weighed.plan, range(500))]
    counts = Counter(text for step in steps for text in step.values())
    assert abs(counts["plain"] / 2000 - 0.4) < 0.04
    assert all(abs(counts[f"rewrite {i}"] / 2000 - 0.2) < 0.03 for i in range(3))
    again = Order(source.weighed({"rewrite": 0.5}).samples, batch_size=4, views=1, seed=0)
    assert [dict(zip(p.rows, p.captions)) for p in map(again.plan, (499, 3, 250))] == [steps[i] for i in (499, 3, 250)]
    # a draw is of a picture and a step: a rank that holds half of the pictures draws the same for them
    half = Order(source.weighed({"rewrite": 0.5}).samples[:2], batch_size=2, views=1, seed=0)
    assert all(half.plan(n).captions[half.plan(n).rows.index(0)] == steps[n][0] for n in range(50))
    other = Order(source.weighed({"rewrite": 0.5}).samples, batch_size=4, views=1, seed=1)
    assert [dict(zip(p.rows, p.captions)) for p in map(other.plan, range(9))] != steps[:9]


def pictures(budget: int = 1 << 20, source_px: int = 0) -> Pictures:
    rng = np.random.default_rng(0)
    found = []
    for i in range(3):
        buffer = BytesIO()
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(buffer, "PNG")
        found.append(Sample(f"p{i}", ImageRef(data=buffer.getvalue())))
    return Pictures(found, ImageSpec(size=24), policy=AugmentPolicy(), seed=3, source_px=source_px, budget=budget)


def test_views_are_the_same_with_and_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rich, poor = pictures(), pictures(budget=0)
    for view in range(3):
        assert np.array_equal(rich.view(1, view), poor.view(1, view))
    assert poor.used == 0
    assert np.array_equal(rich.view(1, 0), resize_image(rich.source(1), rich.spec))
    assert not np.array_equal(rich.view(1, 1), rich.view(1, 2))
    assert rich.batch([0, 1], [2, 0]).shape == (2, 24, 24, 3)

    def decode(*_: object) -> None:
        raise AssertionError("decoded a second time")

    monkeypatch.setattr("pocketvlm.edge.preprocess.decode_image", decode)
    rich.view(1, 4)
    with pytest.raises(AssertionError, match="decoded a second time"):
        poor.view(1, 4)


def test_large_sources_are_reduced_before_they_are_kept() -> None:
    assert pictures(source_px=30).source(0).shape == (30, 40, 3)
    assert pictures(source_px=0).source(0).shape == (60, 80, 3)


def test_prefetch_keeps_order_stays_ahead_and_passes_errors_on() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        if step == 7:
            raise ValueError("step seven")
        made.append(step)
        return step * 10

    steps = prefetch(make, range(2, 9), depth=2)
    assert next(steps) == 20
    deadline = time.monotonic() + 60
    # one handed out, two waiting; a fourth begins only when one of them is taken
    while len(made) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert made == [2, 3, 4]
    assert [next(steps) for _ in range(4)] == [30, 40, 50, 60]
    with pytest.raises(ValueError, match="step seven"):
        next(steps)


def test_the_learning_rate_warms_up_and_falls_on_half_a_cosine() -> None:
    train = TrainSection(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [learning_rate(step, 110, train) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [2, 2, 2]), ("linear", [2, 1.5, 1]), ("cosine", [2, 1.5, 1]), ("warmup", [0, 1, 2])],
)
def test_the_weight_of_an_objective_follows_its_schedule(schedule: str, expected: list[float]) -> None:
    spec = ObjectiveSection(name="crd", weight=2, final_weight=1, schedule=schedule, schedule_steps=101)  # type: ignore[arg-type]
    assert [objective_weight(spec, step, 400) for step in (0, 50, 100)] == pytest.approx(expected)
    assert objective_weight(spec, 300, 400) == pytest.approx(expected[-1])
