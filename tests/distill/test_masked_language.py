"""Masked language modelling with the picture fused in: the loss against a plain loop, and its way through the loop."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_objectives as base
import test_objectives_relation as relation
import torch
from distill_toys import toy_recipe
from objective_toys import HAS_TEXT, PIECES, WIDTHS, B, build, outputs, project, rows, softmax, total
from test_objectives_relation import cut

from pocketvlm.distill.fusion import PieceMasking, fused, masked_words
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.objectives import Widths, build_objective
from pocketvlm.distill.objectives.masked_language import masked_count
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import load_student

NAME = "masked-language"
Make = Callable[..., Recipe]
SILENT = Reporter(False)


# ------------------------------------------------------------------------------------------------ the loss


def oracle(o, s, t):
    losses = []
    for row in range(B):
        for place, piece in enumerate(PIECES[row] if HAS_TEXT[row] else []):
            if piece < 0:
                continue
            (x,) = project(o.head_projector, [rows(s.masked_words)[row][place]])
            x = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
            mean = math.fsum(x) / len(x)
            spread = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
            guess = [(v - mean) / spread for v in x]
            logits = [math.fsum(a * b for a, b in zip(guess, entry)) for entry in rows(s.token_table)]
            losses.append(-math.log(softmax(logits)[piece]))
    return math.fsum(losses) / len(losses)


CASES = [(NAME, oracle, {})]


@pytest.mark.parametrize(("name", "oracle", "options"), CASES)
def test_value_equals_the_loop_oracle(name, oracle, options):
    base.test_value_equals_the_loop_oracle(name, oracle, options)
    base.test_float32_and_bfloat16_are_close(name, oracle, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_range_of_half_precision_is_enough(dtype):
    relation.test_range_of_half_precision_is_enough(NAME, {}, dtype)


def test_gradients_are_right_and_reach_what_the_formula_names():
    objective, student, teacher = build(NAME).double(), outputs(1, grad=True), outputs(2, grad=True)
    names = ("masked_words", "token_table")
    leaves = tuple(getattr(student, name) for name in names)

    def value(*tensors):
        return total(objective, dataclasses.replace(student, **dict(zip(names, tensors))), teacher)

    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6, fast_mode=True)
    value(*leaves).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert student.image.grad is None
    assert all(getattr(teacher, name).grad is None for name in names)
    head = dict(objective.head_projector.named_parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.values())


def test_rows_without_a_caption_and_places_without_a_piece_are_ignored():
    objective = build(NAME)
    student, spoiled = outputs(1, grad=True), outputs(1, grad=True)
    with torch.no_grad():
        spoiled.masked_words[2] = math.nan
        spoiled.masked_words[1, 1] = math.nan
    spoiled.masked_pieces[2] = 5  # a caption that has_text denies
    values = [total(objective, o, o) for o in (student, spoiled)]
    for value in values:
        value.backward()
    assert float(values[0].detach()) == float(values[1].detach())
    assert torch.equal(student.masked_words.grad, spoiled.masked_words.grad)


@pytest.mark.parametrize("how", ["mask", "no-text", "no-piece"])
def test_batch_without_captions_is_zero_with_a_graph(how):
    objective, student = build(NAME), outputs(1, grad=True)
    if how == "no-text":
        student = dataclasses.replace(student, text=None, has_text=None)
    elif how == "mask":
        student.has_text = torch.zeros(B, dtype=torch.bool)
    else:
        student.masked_pieces = torch.full_like(student.masked_pieces, -1)
    value = total(objective, student, student)
    value.backward()
    assert float(value.detach()) == 0.0
    for part in (student.masked_words, student.token_table):
        assert part.grad.abs().max() == 0
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_order_of_the_rows_changes_nothing_and_one_row_is_enough():
    objective, student = build(NAME), outputs(1)
    wanted = float(total(objective, student, student))
    turned = cut(student, [5, 3, 1, 0, 4, 2])
    assert float(total(objective, turned, turned)) == pytest.approx(wanted, rel=1e-10)
    one = cut(student, slice(1))
    assert float(total(objective, one, one)) > 0


def test_parts_are_seeded_saved_and_restored():
    before = torch.get_rng_state()
    first, second = build(NAME), build(NAME)
    assert torch.equal(torch.get_rng_state(), before)
    assert {key.split(".")[0] for key in first.state_dict()} == {
        "mask", "word_projectors", "image_projectors", "out_projectors", "head_projector",
    }  # fmt: skip
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    other = build_objective(NAME, student=WIDTHS, seed=99)
    assert not torch.equal(other.mask, first.mask)
    stages = [projector.weights[0] for projector in first.word_projectors]
    assert len(stages) == 2
    assert not torch.equal(*stages)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    assert float(total(other, outputs(1), outputs(1))) == float(total(first, outputs(1), outputs(1)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratio": 0.0}, "some pieces must be masked"),
        ({"ratio": [1]}, "some pieces must be masked"),
        ({"width": 0}, "no units"),
        ({"stages": [2]}, r"stages \[2\] of a text tower with 2 blocks.*0 to 1"),
        ({"stages": [1, 0]}, "increasing block numbers"),
        ({"stages": []}, "increasing block numbers"),
        ({"stages": 1.5}, "must be a list"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        build(NAME, **options)


def test_what_is_missing_is_named():
    with pytest.raises(UsageError, match="without the widths of a text tower"):
        build_objective(NAME, student=Widths(4))
    with pytest.raises(UsageError, match="text tower without blocks"):
        build_objective(NAME, student=dataclasses.replace(WIDTHS, text_blocks=0))
    with pytest.raises(UsageError, match="nothing to guess"):
        total(build(NAME), dataclasses.replace(outputs(1), masked_words=None), outputs(1))
    with pytest.raises(UsageError, match="reads no embedding"):
        build("matryoshka", inner={"name": NAME})


# ------------------------------------------------------------------------------------------------ the loop


@pytest.fixture
def recipe(world: Path, teacher_cache: Path) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        objectives = [{"name": "clip"}, {"name": NAME, "options": {"ratio": 0.4, "width": 7}}]
        value = toy_recipe(world, teacher_cache, **{"objectives": objectives, **sections})
        value["teacher"] = None
        value["student"] = {**copy.deepcopy(value["student"]), "embed_dim": 16}
        value["student"]["overrides"]["text"]["layers"] = 2
        value["train"] = {**value["train"], "text_batch": 3, "captioned_fraction": None}
        return load_recipe(value, overrides)

    return make


def trainer_of(recipe: Recipe) -> Trainer:
    return Trainer(prepare(recipe, SILENT), torch.device("cpu"))


def test_a_run_learns_resumes_to_the_same_loss_and_exports_nothing_of_it(recipe: Make, tmp_path: Path) -> None:
    whole = distill_run(recipe(), tmp_path / "run", progress=False)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[0][f"loss/{NAME}"] > 0
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    again = distill_run(recipe(), tmp_path / "run", resume=True, progress=False)
    assert again.final_loss == whole.final_loss
    state = torch.load(next((tmp_path / "run" / "checkpoints").glob("*8.pt")), weights_only=True)
    own = {key for key in state["objectives"] if key.startswith("1.")}
    assert {"1.mask", "1.out_projectors.1.weights.0", "1.head_projector.biases.0"} <= own
    saved = load_student(whole.student)
    assert not [name for name in saved.state_dict() if "projector" in name or name.endswith(".mask")]
    fresh = prepare(recipe(), SILENT).student.state_dict()
    assert {name: value.shape for name, value in saved.state_dict().items()} == {
        name: value.shape for name, value in fresh.items()
    }


def test_every_part_is_trained_and_the_tower_keeps_no_trace(recipe: Make) -> None:
    trainer = trainer_of(recipe("objectives.clip.weight=0"))
    batch = trainer.feed.make(0)
    before = [module for module in trainer.student.modules() if module._forward_hooks]
    trainer.one_step(batch)
    assert before == [module for module in trainer.student.modules() if module._forward_hooks] == []
    for name, parameter in trainer.objectives[1].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    reached = {name.split(".")[0] for name, p in trainer.student.named_parameters() if p.grad is not None}
    assert {"image_tower", "text_tower"} <= reached
    image = trainer.student.image_tower.projection.first.weight
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        fused(trainer.student.text_tower, trainer.beside.fusion, torch.zeros(1, 1), torch.zeros(1, 16)),
    ):
        raise RuntimeError("in the middle")
    assert not any(module._forward_hooks for module in trainer.student.modules())


def test_masked_pieces_are_not_read_and_the_picture_is(recipe: Make) -> None:
    """What stands at a masked place changes nothing but the answer; the picture changes what is made of the rest."""
    trainer = trainer_of(recipe())
    student, fusion = trainer.student.eval(), trainer.beside.fusion
    assert fusion is not None
    ids = torch.tensor([[2, 5, 6, 7, 3, 0], [2, 8, 9, 3, 0, 0]], dtype=torch.int32)
    places, image = torch.tensor([[1, 3], [2, -1]]), torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    words, pieces = masked_words(student, fusion, ids, places, image)
    assert pieces.tolist() == [[5, 7], [9, -1]]
    assert words.shape == (2, 2, 32)
    other = ids.clone()
    other[0, 1], other[1, 2] = 11, 12
    again, those = masked_words(student, fusion, other, places, image)
    assert those.tolist() == [[11, 7], [12, -1]]
    torch.testing.assert_close(again, words, rtol=0, atol=0)
    read = ids.clone()
    read[0, 2] = 10
    assert not torch.allclose(masked_words(student, fusion, read, places, image)[0][0], words[0])
    assert not torch.allclose(masked_words(student, fusion, ids, places, image.flip(0))[0], words)
    # padding may stand inside a text, as the token of "!" does in CLIP's: nothing after it is lost
    inside = torch.tensor([[2, 5, 0, 7, 3, 0], [2, 8, 9, 3, 0, 0]], dtype=torch.int32)
    assert masked_words(student, fusion, inside, torch.tensor([[4, -1], [2, -1]]), image)[1].tolist() == [
        [3, -1],
        [9, -1],
    ]
    # against the tower run by hand
    tower, x = student.text_tower, None
    x = tower.widen(tower.token(ids[:, :5]))
    x[0, 1] = x[0, 3] = x[1, 2] = tower.widen(fusion.mask)
    x, bias = x + tower.position[:5], (ids[:, :5] == 0).float()[:, None, None, :] * -1e4
    v = torch.nn.functional.normalize(image, dim=-1)
    for block, a, b, c in zip(tower.blocks, fusion.word_projectors, fusion.image_projectors, fusion.out_projectors):
        x = block(x, bias)
        x = x + c(torch.nn.functional.gelu(a(x) + b(v)[:, None]))
    torch.testing.assert_close(words[0], tower.norm(x)[0, [1, 3]])
    torch.testing.assert_close(words[1, 0], tower.norm(x)[1, 2])


def test_masks_are_a_function_of_seed_step_and_uid(recipe: Make) -> None:
    trainer = trainer_of(recipe())
    masking = PieceMasking(0.4, trainer.student)
    ids = np.array([[2, 5, 6, 7, 8, 9, 3, 0]] * 2)
    first = masking.places(ids, 0, 3, ["a", "b"])
    assert first.shape == (2, masking.slots) == (2, 3)
    assert torch.equal(first, masking.places(ids, 0, 3, ["a", "b"]))
    assert [(row >= 0).sum() for row in first] == [2, 2]
    others = [masking.places(ids, 1, 3, ["a", "b"]), masking.places(ids, 0, 4, ["a", "b"]), first.flip(0)]
    assert not any(torch.equal(first, other) for other in others)
    counts = np.bincount([p for step in range(500) for p in masking.places(ids[:1], 0, step, ["a"])[0] if p >= 0])
    assert counts[0] == counts.sum() - counts[1:6].sum() == 0  # special pieces and padding are never masked
    assert counts[1:6].min() > 0.8 * 200
    assert masking.places(np.array([[2, 1, 3, 0]]), 0, 0, ["a"]).tolist() == [[-1] * 3]
    batch, again = trainer.feed.make(5), trainer.feed.make(5)
    assert batch.hidden is not None
    assert torch.equal(batch.hidden, again.hidden)
    assert len(batch.hidden) == len(batch.with_text)


def test_at_least_one_piece_of_any_is_masked() -> None:
    assert [masked_count(0.15, n) for n in (0, 1, 3, 10, 22)] == [0, 1, 1, 2, 3]


def test_rows_without_captions_have_no_masked_words(recipe: Make) -> None:
    trainer = trainer_of(recipe())
    for sample in trainer.prepared.samples[::2]:
        object.__setattr__(sample, "captions", ())
    batch = trainer.feed.make(0)
    ours, _ = trainer.feed.forward(trainer.student, batch, trainer.beside)["pairs"]
    has = (ours.masked_pieces >= 0).any(dim=1)
    assert 0 < has.sum() < len(has)
    assert has.nonzero()[:, 0].tolist() == batch.with_text.tolist()
    assert ours.masked_words[~has].abs().max() == 0
    for sample in trainer.prepared.samples:
        object.__setattr__(sample, "captions", ())
    assert trainer.one_step(trainer.feed.make(1))[f"loss/{NAME}"] == 0.0


def test_other_runs_pay_nothing(recipe: Make) -> None:
    trainer = trainer_of(recipe(objectives=[{"name": "clip"}]))
    batch = trainer.feed.make(0)
    assert batch.hidden is None
    assert trainer.beside.fusion is None
    assert trainer.feed.forward(trainer.student, batch, trainer.beside)["pairs"][0].masked_words is None


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        ([{"name": NAME}, {"name": NAME, "weight": 0.5}], "listed 2 times"),
        ([{"name": NAME, "options": {"stages": [0, 2]}}], r"stages \[0, 2\] of a text tower with 2 blocks"),
        ([{"name": NAME, "batch": "texts"}], "picture-caption pairs, which a text-only batch has not"),
    ],
)
def test_recipes_that_cannot_work_are_refused(recipe: Make, objectives: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recipe(objectives=objectives)
