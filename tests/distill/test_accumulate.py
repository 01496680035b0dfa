"""A step in parts is the step at once, in float64, wherever no row sees another one on its way through the towers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from distill_toys import make_world, toy_recipe

from pocketvlm.distill.accumulate import parts_of
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.recompute import blocks_of
from pocketvlm.edge.errors import UsageError

CPU = torch.device("cpu")
HELD = "train.hold_statistics=[image_tower]"
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Make, Prepared]]:
    """Half of the pictures have captions, so that some parts have none; all in float64."""
    folder = tmp_path_factory.mktemp("accumulate")
    world = make_world(folder / "world", captioned=0.5)

    def make(*overrides: str) -> Recipe:
        return load_recipe(toy_recipe(world, folder / "cache"), overrides)

    with pytest.MonkeyPatch.context() as patch:
        from distill_toys import use_toy_teacher

        use_toy_teacher(patch)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            prepared = prepare(make(), Reporter(False))
        finally:
            torch.set_default_dtype(torch.float32)
        yield make, prepared


@pytest.fixture
def trainer(inputs: Any) -> Iterator[Callable[..., Trainer]]:
    make, prepared = inputs

    def build(*overrides: str) -> Trainer:
        made = Trainer(prepared.with_recipe(make(*overrides)), CPU)
        made.start()
        return made

    torch.set_default_dtype(torch.float64)
    yield build
    torch.set_default_dtype(torch.float32)


def gradients(made: Trainer) -> dict[str, Any]:
    """Loss, terms and gradients of the first step, unclipped."""
    row = made.one_step(made.feed.make(0))
    named = [*made.student.named_parameters(), *made.objectives.named_parameters(prefix="objectives")]
    found = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    return {"row": row, "gradients": found}


DROPPED = (
    "student.overrides.text.dropout=0.1",
    "student.overrides.image.backbone_args={drop_rate: 0.1, drop_path_rate: 0.1}",
)
MASKED = "objectives=[{name: clip}, {name: masked-feature}, {name: token-alignment}, {name: masked-language}]"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.balance=gradient-norm", "train.captioned_fraction=0.3"),
        ("train.bank=20", "train.captioned_fraction=0.25", "train.text_batch=2", "train.batch_size=16"),
        (MASKED, "train.text_batch=0"),
        (*DROPPED, "train.captioned_fraction=0.3"),
        (*DROPPED, MASKED, "train.text_batch=0"),
        ("objectives=[{name: momentum}, {name: hint, options: {student_tap: trunk.blocks.1}}]", "train.text_batch=0"),
        ("train.text_pretrain_steps=1",),
    ],
    ids=[
        "pairs, texts, projectors, scale",
        "balanced",
        "a fixed bank",
        "taps and modules",
        "dropout",
        "dropout, taps",
        "momentum",
        "texts alone",
    ],
)
def test_the_step_in_parts_is_the_step(trainer: Callable[..., Trainer], overrides: tuple[str, ...]) -> None:
    """1e-9 of float64 is what another order of the sums leaves of gradients over a tower's depth."""
    plain = ("train.clip_norm=0", HELD, *overrides)
    whole, parts = gradients(trainer(*plain)), gradients(trainer(*plain, "train.micro_batch=3"))
    assert parts["row"].keys() == whole["row"].keys()
    assert {k: v for k, v in parts["row"].items() if k != "phase"} == pytest.approx(
        {k: v for k, v in whole["row"].items() if k != "phase"}, rel=1e-9, abs=1e-12
    )
    assert parts["gradients"].keys() == whole["gradients"].keys()
    for name, wanted in whole["gradients"].items():
        torch.testing.assert_close(parts["gradients"][name], wanted, rtol=1e-8, atol=1e-10, msg=name)
    assert sum(float(value.abs().sum()) for value in whole["gradients"].values()) > 0


@pytest.mark.parametrize("micro", ["null", "3"])
def test_blocks_that_run_again_give_the_same_gradients(trainer: Callable[..., Trainer], micro: str) -> None:
    """Batch norm and dropout at work: nothing is held, the same parts are dropped, statistics move once."""
    plain = ("train.clip_norm=0", *DROPPED, f"train.micro_batch={micro}")
    wanted, found = trainer(*plain), trainer(*plain, "train.checkpoint_activations=true")
    runs = [gradients(made) for made in (wanted, found)]
    assert len(found.recomputed) > 2
    assert all("forward" not in vars(block) for block in found.recomputed)
    assert runs[0]["row"].pop("phase") == runs[1]["row"].pop("phase")
    assert runs[0]["row"] == pytest.approx(runs[1]["row"], rel=1e-12)
    for name, value in runs[0]["gradients"].items():
        torch.testing.assert_close(runs[1]["gradients"][name], value, rtol=1e-9, atol=1e-12, msg=name)
    for name, buffer in wanted.student.named_buffers():
        assert torch.equal(dict(found.student.named_buffers())[name], buffer), name


def test_compiled_towers_give_the_same_gradients(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is traced, run without a compiler; the average's copy and the saved names must survive it."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: real(self, backend="eager"))
    plain = ("train.clip_norm=0", "train.text_batch=0", "objectives=[{name: clip}, {name: feature}]", *DROPPED)
    wanted, found = trainer(*plain), trainer(*plain, "train.compile=true")
    runs = [gradients(made) for made in (wanted, found)]
    assert runs[0]["row"]["loss"] == pytest.approx(runs[1]["row"]["loss"], rel=1e-9)
    assert found.student.state_dict().keys() == wanted.student.state_dict().keys()
    for name, value in runs[0]["gradients"].items():
        torch.testing.assert_close(runs[1]["gradients"][name], value, rtol=1e-8, atol=1e-10, msg=name)
    torch.compiler.reset()


def test_what_compiled_towers_cannot_do_is_refused(inputs: Any) -> None:
    with pytest.raises(UsageError, match=r"train\.compile and train\.checkpoint_activations"):
        inputs[0]("train.compile=true", "train.checkpoint_activations=true")
    with pytest.raises(UsageError, match=r"objectives\.1 \(token-alignment\) reads inside the towers by hooks"):
        inputs[0]("train.compile=true", "objectives=[{name: clip}, {name: token-alignment}]")


def test_parts_and_statistics_of_all_ranks_exclude_each_other(inputs: Any) -> None:
    with pytest.raises(UsageError, match=r"train\.sync_batchnorm and train\.micro_batch are both set"):
        inputs[0]("train.sync_batchnorm=true", "train.micro_batch=4")


def test_a_backbone_without_blocks_has_nothing_to_run_again(trainer: Callable[..., Trainer]) -> None:
    made = trainer()
    made.student.image_tower.trunk = torch.nn.Identity()
    with pytest.raises(UsageError, match="has no blocks or stages or layers to checkpoint"):
        blocks_of(made.student)


def test_both_forwards_of_a_part_draw_the_same_numbers(trainer: Callable[..., Trainer]) -> None:
    """Dropout falls alike in both, statistics move in the first alone, and the generator goes on after the first."""
    dropout = "student.overrides.text.dropout=0.3"
    made = trainer(dropout, "train.micro_batch=3")
    made.student.train()
    seen: list[Any] = []
    real = made._forward

    def watched(batch: Any) -> Any:
        seen.append(real(batch))
        return seen[-1]

    made._forward = watched  # type: ignore[method-assign]
    parts = made._parts(made.feed.make(0))
    assert parts is not None
    count, state = len(parts.parts), torch.get_rng_state()
    buffers = {name: value.clone() for name, value in made.student.named_buffers()}
    loss, _ = made._loss(parts.outputs, made.feed.make(0), 0)
    loss.backward()
    parts.backward()
    assert count == 3
    for first, second in zip(seen[:count], seen[count:], strict=True):
        for side in first:
            assert torch.equal(first[side][0].image, second[side][0].image)
        assert torch.equal(first["pairs"][0].text, second["pairs"][0].text)
    assert not torch.equal(seen[0]["texts"][0].image, seen[1]["texts"][0].image)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in made.student.named_buffers())
    assert any(parameter.grad is not None for parameter in made.student.text_tower.parameters())


def test_parts_are_all_of_the_batch(trainer: Callable[..., Trainer]) -> None:
    made = trainer("train.captioned_fraction=0.3")
    batch = made.feed.make(0)
    parts = parts_of(batch, 3)
    assert [part.size for part in parts] == [2, 3, 3]
    assert sum(part.texts for part in parts) == batch.texts
    for name in ("pixels", "group", "teacher_image", "teacher_captions", "teacher_texts"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    starts = [0, 2, 5]
    captioned = torch.cat([part.with_text + start for part, start in zip(parts, starts)])  # type: ignore[operator]
    assert torch.equal(captioned, batch.with_text)
    assert parts_of(batch, 8) == parts_of(batch, None) == [batch]


def test_a_part_knows_its_own_cells(trainer: Callable[..., Trainer]) -> None:
    from pocketvlm.distill.regions import Regions

    made = trainer()
    batch = made.feed.make(0)
    views = [made.prepared.pictures.view(row, 0) for row in range(batch.size)]
    batch.cells = Regions(4).batch(views, 0, 0, [str(row) for row in range(batch.size)], 16)
    parts = parts_of(batch, 3)
    counts = [int(part.cells.mask.sum()) for part in parts if part.cells is not None]
    assert counts == [len(part.cells.crops) for part in parts if part.cells is not None]
    assert torch.equal(torch.cat([part.cells.crops for part in parts if part.cells is not None]), batch.cells.crops)


def test_a_part_of_one_picture_is_refused_where_statistics_are_made_of_it(trainer: Callable[..., Trainer]) -> None:
    made = trainer("train.batch_size=3", "train.micro_batch=2", "train.text_batch=4")
    with pytest.raises(UsageError, match=r"part of a step has 1 picture.*train\.hold_statistics"):
        made.one_step(made.feed.make(0))
    made = trainer("train.batch_size=3", "train.micro_batch=2", "train.text_batch=4", HELD)
    assert made.one_step(made.feed.make(0))["loss"] > 0
