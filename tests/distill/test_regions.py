"""Region self-distillation: the loss against a plain loop, maps of embeddings, cells of pictures, and the loop."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_objectives as base
import test_objectives_relation as relation
import torch
from distill_toys import TINY_STUDENT, toy_recipe
from objective_toys import CELLS, B, build, cosine, outputs, rows, total
from PIL import Image
from test_objectives_relation import cut

from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.regions import Cells, Regions, pooled
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import build_student, save_student, train_tokenizer
from pocketvlm.students.config import ImageConfig, Projection
from pocketvlm.students.image import ImageTower, build_image_tower
from pocketvlm.students.student import recorded

NAME = "region-self"
Make = Callable[..., Recipe]
SILENT = Reporter(False)


# ------------------------------------------------------------------------------------------------ the loss


def oracle(o, s, t):
    found, wanted = rows(s.regions), rows(s.region_targets)
    cosines = [cosine(found[i][k], wanted[i][k]) for i in range(B) for k in range(CELLS[i])]
    return 1 - math.fsum(cosines) / len(cosines)


CASES = [(NAME, oracle, {})]


@pytest.mark.parametrize(("name", "oracle", "options"), CASES)
def test_value_equals_the_loop_oracle(name, oracle, options):
    base.test_value_equals_the_loop_oracle(name, oracle, options)
    base.test_float32_and_bfloat16_are_close(name, oracle, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_range_of_half_precision_is_enough(dtype):
    relation.test_range_of_half_precision_is_enough(NAME, {}, dtype)


def test_gradients_are_right_and_reach_only_the_map():
    objective, student = build(NAME), outputs(1, grad=True)

    def value(regions):
        return total(objective, dataclasses.replace(student, regions=regions), student)

    assert torch.autograd.gradcheck(value, (student.regions,), eps=1e-6, atol=1e-6)
    value(student.regions).backward()
    assert student.region_targets.grad is None
    assert student.image.grad is None
    assert student.regions.grad[1, 1:].abs().max() == 0
    same = dataclasses.replace(student, regions=student.region_targets * 3)
    assert float(total(objective, same, same).detach()) == pytest.approx(0.0, abs=1e-12)


def test_places_without_a_cell_are_ignored_and_none_is_zero_with_a_graph():
    objective, student, spoiled = build(NAME), outputs(1), outputs(1)
    spoiled.regions[1, 1:] = math.nan
    assert float(total(objective, student, student)) == float(total(objective, spoiled, spoiled))
    student = outputs(1, grad=True)
    student.region_mask = torch.zeros_like(student.region_mask)
    value = total(objective, student, student)
    value.backward()
    assert float(value.detach()) == 0.0
    assert student.regions.grad.abs().max() == 0


def test_captions_and_order_of_the_rows_change_nothing_and_one_row_is_enough():
    objective, student = build(NAME), outputs(1)
    wanted = float(total(objective, student, student))
    turned = cut(student, [5, 3, 1, 0, 4, 2])
    assert float(total(objective, turned, turned)) == pytest.approx(wanted, rel=1e-10)
    bare = dataclasses.replace(student, text=None, has_text=None)
    assert float(total(objective, bare, bare)) == wanted
    one = cut(student, slice(1))
    assert float(total(objective, one, one)) > 0


def test_mistakes_are_named():
    for cells in (0, 37, 2.0, True):
        with pytest.raises(UsageError, match="no grid has so many"):
            build(NAME, cells=cells)
    with pytest.raises(UsageError, match="no cells to compare"):
        total(build(NAME), dataclasses.replace(outputs(1), regions=None), outputs(1))
    with pytest.raises(UsageError, match="reads no embedding of whole pictures"):
        build("matryoshka", inner={"name": NAME})


# ------------------------------------------------------------------------------------------------ maps


def dense_of(tower: ImageTower, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(map of embeddings, embedding)."""
    names = ["tokens", *(f"trunk.blocks.{level}" for level in tower.levels)]
    with torch.no_grad(), recorded(tower.eval(), names) as seen:
        embedding, _ = tower(pixels)
    with torch.no_grad():
        return tower.dense(seen["tokens"], [seen[name] for name in names[1:]]), embedding


@pytest.mark.parametrize("levels", [(), (4, 6)])
def test_a_linear_head_over_each_place_averages_to_the_embedding(levels: tuple[int, ...]) -> None:
    tower = build_image_tower(ImageConfig(backbone="tf_efficientnet_lite0", size=96, levels=levels), 16)
    pixels = torch.randint(0, 256, (2, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    chart, embedding = dense_of(tower, pixels)
    assert chart.shape == (2, 16, 3, 3)
    torch.testing.assert_close(chart.mean(dim=(2, 3)), embedding, rtol=1e-4, atol=1e-5)
    assert chart.flatten(2).std(dim=2).mean() > 0.01


@pytest.mark.parametrize("backbone", ["mobilenetv4_conv_small_035", "repvit_m0_9", "fastvit_t8"])
def test_any_other_head_says_of_a_place_what_it_says_of_a_picture_like_it(backbone: str) -> None:
    projection = Projection(kind="mlp", norm="batch")
    tower = build_image_tower(ImageConfig(backbone=backbone, size=64, projection=projection), 16).eval()
    last = torch.randn(2, tower_channels(tower), 1, 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = tower.projection(tower.trunk.forward_head(last))  # type: ignore[operator]
        found = tower.dense(last.expand(-1, -1, 2, 3))
    assert found.shape == (2, 16, 2, 3)
    torch.testing.assert_close(found, wanted[:, :, None, None].expand_as(found), rtol=1e-4, atol=1e-5)


def tower_channels(tower: ImageTower) -> int:
    with torch.no_grad(), recorded(tower, ["tokens"]) as seen:
        tower(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    return seen["tokens"].shape[1]


def test_a_transformer_has_no_map() -> None:
    extra = {"img_size": 32}
    tower = build_image_tower(ImageConfig(backbone="vit_tiny_patch16_224", size=32, backbone_args=extra), 16)
    with pytest.raises(UsageError, match="whose last tokens are no map"):
        dense_of(tower, torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def test_a_cell_of_whole_places_is_the_mean_of_their_directions() -> None:
    g = torch.Generator().manual_seed(0)
    chart = torch.randn(2, 5, 4, 6, generator=g, requires_grad=True)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [1 / 3, 0.5, 2 / 3, 1.0]], [[0.5, 0.0, 1.0, 0.25], [0, 0, 0, 0]]])
    mask = torch.tensor([[True, True], [True, False]])
    found = pooled(chart, Cells(boxes, mask, torch.zeros(0)))
    directions = torch.nn.functional.normalize(chart, dim=1)
    torch.testing.assert_close(found[0, 0], directions[0].mean(dim=(1, 2)))
    torch.testing.assert_close(found[0, 1], directions[0, :, 2:, 2:4].mean(dim=(1, 2)))
    torch.testing.assert_close(found[1, 0], directions[1, :, :1, 3:].mean(dim=(1, 2)))
    assert found[1, 1].abs().max() == 0
    found[0, 1].sum().backward()
    assert chart.grad is not None
    assert chart.grad[0, :, 2:, 2:4].abs().min() > 0
    assert chart.grad[1].abs().max() == chart.grad[0, :, :2].abs().max() == 0


# ------------------------------------------------------------------------------------------------ cells


def test_grids_are_drawn_as_published_by_seed_step_and_uid() -> None:
    regions = Regions(36)
    grids: Counter[tuple[int, int]] = Counter()
    for step in range(1500):
        boxes = regions.boxes(0, step, "a")
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        n, m = round(1 / float(width[0])), round(1 / float(height[0]))
        np.testing.assert_allclose(width, 1 / n, atol=1e-6)
        np.testing.assert_allclose(height, 1 / m, atol=1e-6)
        # every cell once: they tile the picture
        assert len(boxes) == m * n == len({tuple(np.round(box[:2] * 60)) for box in boxes})
        assert boxes.min() >= 0
        assert boxes.max() <= 1 + 1e-6
        grids[m, n] += 1
    wanted = {(m, n) for m in range(1, 7) for n in range(math.ceil(m / 2), min(2 * m, 6) + 1)}
    assert set(grids) == wanted
    assert sum(count for (m, _), count in grids.items() if m == 1) == pytest.approx(250, abs=60)
    first = Regions(3).boxes(5, 6, "b")
    assert len(first) <= 3
    assert np.array_equal(first, Regions(3).boxes(5, 6, "b"))
    others = [Regions(3).boxes(*key) for key in ((4, 6, "b"), (5, 7, "b"), (5, 6, "c"))]
    assert not any(np.array_equal(first, other) for other in others)


def test_crops_are_the_cells_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    views = [rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for _ in range(3)]
    regions, uids = Regions(2), ["a", "b", "c"]
    cells = regions.batch(views, 1, 2, uids, 24)
    assert cells.boxes.shape == (3, 2, 4)
    assert cells.crops.shape == (int(cells.mask.sum()), 24, 24, 3)
    place = 0
    for row, uid in enumerate(uids):
        for box in regions.boxes(1, 2, uid):
            left, top, right, bottom = (float(x) * 48 for x in box)
            crop = Image.fromarray(views[row]).resize((24, 24), Image.Resampling.BILINEAR, (left, top, right, bottom))
            assert np.array_equal(cells.crops[place].numpy(), np.asarray(crop))
            place += 1
    assert place == len(cells.crops)


# ------------------------------------------------------------------------------------------------ the loop


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student to start from, its image tower not asked where it comes from."""
    folder = tmp_path_factory.mktemp("start") / "student"
    tokenizer = train_tokenizer(["a red thing"], 64)
    save_student(build_student("mnv4-035", embed_dim=16, tokenizer_json=tokenizer, overrides=TINY), folder)
    return folder


TINY = copy.deepcopy(TINY_STUDENT)
TINY["image"]["size"] = 64  # type: ignore[index]


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, start: Path) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        value = toy_recipe(
            world, teacher_cache, **{"objectives": [{"name": NAME, "options": {"cells": 2}}], **sections}
        )
        init = {"init": str(start), "init_parts": ["image_tower"]}
        value |= {"teacher": None, "student": {"name": "mnv4-035", "overrides": TINY, "embed_dim": 16, **init}}
        value["train"] = {**value["train"], "text_batch": 0}
        return load_recipe(value, overrides)

    return make


def trainer_of(recipe: Recipe) -> Trainer:
    made = Trainer(prepare(recipe, SILENT), torch.device("cpu"))
    made.start()
    return made


def test_a_run_learns_and_resumes_to_the_same_loss(recipe: Make, tmp_path: Path) -> None:
    whole = distill_run(recipe("train.interpolate=0.7"), tmp_path / "run", progress=False)
    losses = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(0 < row[f"loss/{NAME}"] < 2 for row in losses)
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    again = distill_run(recipe("train.interpolate=0.7"), tmp_path / "run", resume=True, progress=False)
    assert again.final_loss == whole.final_loss


def test_the_original_stands_still_and_comes_back_from_a_checkpoint(recipe: Make, start: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = trainer_of(recipe())
    original = trainer.beside.original
    saved = load_file(next(start.glob("*.safetensors")))
    for step in range(3):
        trainer.one_step(trainer.feed.make(step))
    for name, value in original.state_dict().items():
        assert torch.equal(value, saved[f"image_tower.{name}"]), name
    assert not original.training
    moved = trainer.student.image_tower.state_dict()
    assert any(not torch.equal(value, moved[name]) for name, value in original.state_dict().items())
    assert all(parameter.grad is None for parameter in original.parameters())
    other = trainer_of(recipe())
    with torch.no_grad():  # as if a resumed process had begun elsewhere
        for parameter in other.student.parameters():
            parameter.add_(1)
    other._remember_start()
    other.restore(trainer.state(), tmp_path)
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in other.beside.original.state_dict().items())


def test_what_the_objective_sees_is_what_the_towers_say(recipe: Make) -> None:
    trainer = trainer_of(recipe())
    batch, student = trainer.feed.make(0), trainer.student.eval()
    assert batch.cells is not None
    assert batch.pixels is not None
    ours = trainer.feed.forward(student, batch, trainer.beside)["pairs"][0]
    assert ours.taps == {}
    assert torch.equal(ours.region_mask, batch.cells.mask)
    wanted = student.encode_image(batch.cells.crops).embedding  # the student is still its own original
    torch.testing.assert_close(ours.region_targets[ours.region_mask], wanted, rtol=1e-4, atol=1e-5)
    assert not ours.region_targets.requires_grad
    chart = student.image_tower.dense(student.encode_image(batch.pixels, taps=["tokens"]).taps["tokens"])
    torch.testing.assert_close(ours.regions, pooled(chart, batch.cells), rtol=1e-4, atol=1e-5)
    again = trainer.feed.make(0).cells
    assert again is not None
    assert torch.equal(again.crops, batch.cells.crops)
    assert trainer.feed.forward(student, batch)["pairs"][0].regions is None


def test_statistics_do_not_see_the_places_one_by_one(recipe: Make) -> None:
    trainer = trainer_of(recipe())
    batch, tower = trainer.feed.make(0), trainer.student.train().image_tower
    start = copy.deepcopy(tower.state_dict())
    trainer.feed.forward(trainer.student, batch)
    plain = {name: value.clone() for name, value in tower.named_buffers()}
    tower.load_state_dict(start)
    trainer.feed.forward(trainer.student, batch, trainer.beside)
    assert all(torch.equal(value, plain[name]) for name, value in tower.named_buffers())


@pytest.mark.parametrize("levels", ["[]", "[1, 3]"])
def test_below_a_cut_the_original_is_still_run_on_pixels(
    recipe: Make, levels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    overrides = [f"student.overrides.image.levels={levels}", "student.init_parts=[image_tower.trunk]"]
    kept, whole = trainer_of(recipe(*overrides, "train.cut_after_block=1")), trainer_of(recipe(*overrides))
    one, other = (t.feed.forward(t.student.eval(), t.feed.make(0), t.beside)["pairs"][0] for t in (kept, whole))
    assert torch.equal(one.region_targets, other.region_targets)
    # what lies below the cut is kept in half precision
    torch.testing.assert_close(one.regions, other.regions, rtol=0.02, atol=0.02)
    assert kept.one_step(kept.feed.make(0))[f"loss/{NAME}"] > 0


def test_a_tower_without_a_map_is_refused_before_the_first_step(recipe: Make) -> None:
    vit = {"backbone": "vit_tiny_patch16_224", "size": 64}
    bare = recipe().to_dict()
    bare["student"] |= {"overrides": {**TINY, "image": vit}}
    with pytest.raises(UsageError, match=r"does not fit the student|no map"):
        prepare(load_recipe(bare), SILENT)


@pytest.mark.parametrize(
    ("sections", "overrides", "words"),
    [
        ({}, ["student.init=null", "student.init_parts=[]"], "'mnv4-035' starts at random, so it would learn noise"),
        ({}, ["student.init_parts=[text_tower]"], "starts at random, so it would learn noise"),
        ({"objectives": [{"name": NAME}, {"name": NAME, "options": {"cells": 3}}]}, [], "3 and for 4 cells"),
        ({"objectives": [{"name": NAME, "options": {"cells": [1]}}]}, [], "no grid has so many"),
        ({"objectives": [{"name": NAME, "batch": "texts"}]}, ["train.text_batch=8"], "compares cells of pictures"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    recipe: Make, sections: dict[str, Any], overrides: list[str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        recipe(*overrides, **sections)
