"""What is dropped belongs to the sample: masks against plain integers, their shares, and what draws otherwise.

That ranks and parts drop alike is in test_ranks.py and test_accumulate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distill_toys import toy_recipe

from pocketvlm.distill.dropout import (
    KeyedDropout,
    KeyedDropPath,
    drawn_otherwise,
    kept,
    key_by_sample,
    rows_keyed,
    sample_keys,
)
from pocketvlm.distill.feed import Feed
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.optim import snapshot
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.ranks import Ranks
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import UsageError

CPU = torch.device("cpu")
DROPPED = (
    "student.overrides.text.dropout=0.1",
    "student.overrides.image.backbone_args={drop_rate: 0.1, drop_path_rate: 0.1}",
)
Build = Callable[..., Trainer]


@pytest.fixture
def build(world: Path, teacher_cache: Path, toy_teacher: None) -> Build:
    def made(*overrides: str) -> Trainer:
        recipe = load_recipe(toy_recipe(world, teacher_cache), overrides)
        return Trainer(prepare(recipe, Reporter(False)), CPU)

    return made


def split_mix(x: int) -> int:
    """One number of SplitMix64 from its counter, in integers without end."""
    for places, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> places)) * factor) % 2**64
    return x ^ (x >> 31)


def test_masks_are_those_of_plain_integers() -> None:
    keys, layer, count, rate = torch.tensor([0, -1, 2**62 + 12345, -(2**63)]), -(2**61) - 7, 11, 0.3
    found = kept(keys, layer, count, rate)
    for row, key in enumerate(keys.tolist()):
        start = split_mix((key + layer) % 2**64)
        for place in range(count):
            word = split_mix((start + (place // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64)
            short = word >> 16 * (place % 4) & 0xFFFF
            # as a signed number, of which the lowest go
            assert bool(found[row, place]) == ((short ^ 0x8000) >= round(rate * 2**16)), (row, place)
    assert torch.equal(kept(keys, layer, 3, rate), found[:, :3]), "padding behind changes nothing"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_share_that_stays_is_right_in_every_direction(rate: float) -> None:
    """Within five standard deviations of a fair coin's, over all, over rows, over columns, and of neighbours' pairs."""
    keys = sample_keys(map(str, range(400)), 0, 0)
    keep = kept(keys, 5, 1000, rate).double()
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(float(keep.mean()) - (1 - rate)) < 5 * deviation / 400_000**0.5 + 2**-17
    assert float((keep.mean(dim=1) - (1 - rate)).abs().max()) < 5 * deviation / 1000**0.5
    assert float((keep.mean(dim=0) - (1 - rate)).abs().max()) < 5 * deviation / 400**0.5
    off = keep - (1 - rate)
    for pairs in (off[:, 1:] * off[:, :-1], off[1:] * off[:-1], off[:, 4:] * off[:, :-4]):
        assert abs(float(pairs.mean())) < 5 * deviation**2 / 390_000**0.5


def test_masks_differ_over_seeds_steps_samples_and_layers() -> None:
    names = ["picture/a/0", "picture/a/1", "picture/b/0", "caption/a/one", "caption/a/two", "text/one"]
    keys = torch.cat([sample_keys(names, seed, step) for seed in (0, 1) for step in (0, 1)])
    assert len(set(keys.tolist())) == 4 * len(names)
    assert torch.equal(sample_keys(names[::-1], 0, 0), keys[: len(names)].flip(0)), "wherever a sample lies"
    masks = torch.cat([kept(keys, layer, 256, 0.5) for layer in (1, 2)]).double()
    agreement = (masks @ masks.T + (1 - masks) @ (1 - masks).T) / 256
    # half of the places agree by chance, plus or minus five times 1 / 32
    assert float((agreement - torch.eye(len(masks)) - 0.5).fill_diagonal_(0).abs().max()) < 5 / 32


def test_layers_drop_and_scale_as_they_say() -> None:
    x, keys = torch.rand(64, 6, 5, dtype=torch.float64) + 1, sample_keys(map(str, range(64)), 0, 0)
    drop, path = KeyedDropout(0.25, "a"), KeyedDropPath(0.25, True, "b")
    with rows_keyed(keys):
        found, rows, plain = drop(x), path(x), KeyedDropPath(0.25, False, "b")(x)
        with rows_keyed(keys, "again"):
            assert not torch.equal(drop(x), found)
        assert torch.equal(drop(x), found)
        order = torch.randperm(64)
    with rows_keyed(keys[order]):
        assert torch.equal(drop(x[order]), found[order])
        # windows of a row lie beside each other
        assert torch.equal(drop(x[order].flatten(0, 1)).view_as(x), found[order])
    assert set((found / x).round(decimals=12).unique().tolist()) == {0.0, round(4 / 3, 12)}
    assert set((rows / x).flatten(1).unique(dim=1).round(decimals=12).unique().tolist()) == {0.0, round(4 / 3, 12)}
    assert bool(((rows == 0).flatten(1).all(dim=1) | (rows > 0).flatten(1).all(dim=1)).all())
    torch.testing.assert_close(plain * 4 / 3, rows)
    with rows_keyed(keys[:3]), pytest.raises(UsageError, match="64 rows where 3 samples are on their way"):
        drop(x)
    for layer in (drop.eval(), path.eval()):
        assert layer(x) is x, "nobody asks for keys in evaluation"


def test_a_student_drops_by_sample_in_training_and_nothing_in_evaluation(build: Build) -> None:
    made, plain = build(*DROPPED), build()
    layers = [m for m in made.student.modules() if isinstance(m, (KeyedDropout, KeyedDropPath))]
    assert len({layer.layer for layer in layers}) == len(layers)
    kinds = {type(layer) for layer in layers}
    assert kinds == {KeyedDropout, KeyedDropPath}
    assert isinstance(made.student.image_tower.trunk.classifier, KeyedDropout)
    assert not key_by_sample(plain.student)
    assert made.student.state_dict().keys() == plain.student.state_dict().keys()
    assert drawn_otherwise(made.student) == ""
    assert plain.feed.make(0).image_keys is None
    batch = made.feed.make(0)
    assert batch.image_keys is not None
    outputs, start = {}, snapshot(plain.student)
    for name, one in (("dropped", made), ("plain", plain)):
        for mode in (True, False):
            # a training forward moves the running statistics
            one.student.load_state_dict(start)
            one.student.train(mode)
            with torch.no_grad():
                outputs[name, mode] = [one.feed.forward(one.student, batch)["pairs"][0] for _ in range(2)]
    for mode in (True, False):
        for side in ("image", "text"):
            once, twice = (getattr(one, side) for one in outputs["dropped", mode])
            other = getattr(outputs["plain", mode][0], side)
            assert torch.equal(once, twice), "no generator is asked"
            assert torch.equal(once, other) != mode
    losses = [made.one_step(made.feed.make(step))["loss"] for step in range(2)]
    other = build(*DROPPED, "train.seed=1")
    keys = [one.feed.make(step).text_keys for one, step in ((made, 0), (made, 1), (other, 0))]
    assert all(not set(one.tolist()) & set(two.tolist()) for one, two in pairwise(keys))
    assert losses[0] != losses[1]


def test_ranks_give_their_rows_the_keys_of_the_whole(build: Build) -> None:
    whole = build(*DROPPED, "train.captioned_fraction=0.5")
    batch = whole.feed.make(0)
    parts = []
    for rank in range(3):
        feed = Feed(whole.prepared, whole.order, CPU, Ranks(rank, 3))
        feed.keyed = True
        parts.append(feed.make(0))
    for name in ("image_keys", "text_keys"):
        found, wanted = torch.cat([getattr(part, name) for part in parts]), getattr(batch, name)
        assert sorted(found.tolist()) == sorted(wanted.tolist())
        assert len(set(wanted.tolist())) == len(wanted)
    assert len(batch.text_keys) == len(batch.ids)


def test_what_belongs_to_no_sample_is_said(build: Build) -> None:
    made = build()
    made.student.image_tower.trunk.classifier = torch.nn.AlphaDropout(0.1)
    before = {name: value.clone() for name, value in made.student.state_dict().items()}
    said = drawn_otherwise(made.student)
    assert "draws random numbers that belong to no sample (" in said
    assert "another number of ranks or parts trains another student" in said
    for name, value in made.student.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_attention_that_is_fused_is_said_and_written_out_is_keyed(
    build: Build, world: Path, teacher_cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rates = "{attn_drop_rate: 0.1, drop_path_rate: 0.1}"
    vit = f"student.overrides.image={{backbone: test_vit, size: 32, backbone_args: {rates}}}"
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    assert drawn_otherwise(build(vit).student) == ""
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 2)
    assert "dropout inside fused attention" in drawn_otherwise(build(vit).student)
    changes = (vit, "train.micro_batch=4", "train.steps=1", "train.warmup_steps=1", "eval.metrics=[retrieval]")
    distill_run(load_recipe(toy_recipe(world, teacher_cache), changes), tmp_path / "run")
    assert "draws random numbers that belong to no sample" in capsys.readouterr().err
