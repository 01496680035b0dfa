"""`matryoshka-2d` against plain loops, its manners, and what a recipe with exits leaves behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_objectives as base
import test_objectives_relation as relation
import torch
from distill_toys import TINY_STUDENT, toy_recipe
from objective_toys import HAS_TEXT, OTHER, WIDTHS, B, D, build, kl, outputs, rows, softmax, total
from test_objectives_relation import cut, matryoshka_oracle

from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.objectives import build_objective, objective_needs
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.students import load_student, truncated

EXIT = "text.exit.1"


def exits_oracle(o, s, t):
    """The inner objective by its own oracle, on the whole and on every exit; the KL by a loop over coordinates."""
    value = matryoshka_oracle(o.heads[0], s, t)
    for (_, m), head in zip(o.pairs_of, o.heads[1:]):
        value += matryoshka_oracle(head, dataclasses.replace(s, text=s.taps[EXIT]), t)
        captioned = [i for i in range(B) if HAS_TEXT[i]]
        apart = [kl(softmax(rows(s.text)[i][:m]), softmax(rows(s.taps[EXIT])[i][:m])) for i in captioned]
        value += o.kl * math.fsum(apart) / len(apart)
    return value


CASES = [
    ("matryoshka-2d", exits_oracle, {}),
    ("matryoshka-2d", exits_oracle, {"pairs": [[1, 3], [1, D]], "inner": {"name": "clip"}, "kl": 2.0}),
    ("matryoshka-2d", exits_oracle, {"pairs": [[1, 3]], "inner": {"name": "feature"}, "detach": False}),
    ("matryoshka-2d", exits_oracle, {"pairs": [[1, 4]], "inner": {"name": "icl"}, "kl": 0.0}),
]
every_case = pytest.mark.parametrize(
    ("name", "oracle", "options"),
    CASES,
    ids=[options.get("inner", {"name": "default"})["name"] for _, _, options in CASES],
)


@every_case
def test_value_equals_the_loop_oracle(name, oracle, options):
    base.test_value_equals_the_loop_oracle(name, oracle, options)


@every_case
def test_value_with_another_teacher_width(name, oracle, options):
    if options.get("inner", {}).get("name") != "clip":
        base.test_value_with_another_teacher_width(name, oracle, options)


@every_case
def test_float32_and_bfloat16_are_close(name, oracle, options):
    base.test_float32_and_bfloat16_are_close(name, oracle, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_case
def test_range_of_half_precision_is_enough(name, oracle, options, dtype):
    relation.test_range_of_half_precision_is_enough(name, options, dtype)


@every_case
def test_order_of_the_rows_changes_nothing(name, oracle, options):
    """Rows 0 and 3 have one caption, at the exits too."""
    relation.test_order_of_the_rows_changes_nothing(name, options)


@pytest.mark.parametrize("inner", ["crd", "icl", "feature"])
def test_teacher_and_student_are_not_interchangeable(inner):
    """With an exit that equals the whole and no KL, which has no teacher in it; a distance is symmetric."""
    objective = build("matryoshka-2d", pairs=[[1, D]], kl=0.0, inner={"name": inner})
    a, b = (dataclasses.replace(o, taps={EXIT: o.text}) for o in (outputs(1), outputs(2)))
    forward, backward = float(total(objective, a, b)), float(total(objective, b, a))
    assert (forward == pytest.approx(backward, rel=1e-9)) == (inner == "feature")


def test_the_kl_is_of_the_exit_from_the_whole_and_not_the_reverse():
    student, turned = outputs(1), outputs(1)
    turned.text, turned.taps[EXIT] = student.taps[EXIT], student.text
    values = [float(build("matryoshka-2d")(student=o, teacher=outputs(2))["kl_1x2"]) for o in (student, turned)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_batch_of_one_is_refused_where_rows_are_compared():
    for inner, enough in (("crd", 2), ("clip", 2), ("rkd", 3), ("feature", 1)):
        objective = build("matryoshka-2d", inner={"name": inner})
        student, teacher = outputs(1), outputs(2)
        assert float(total(objective, cut(student, slice(enough)), cut(teacher, slice(enough)))) > 0, inner
        for n in range(1, enough):
            with pytest.raises(UsageError, match=f"batch of {n} .*identically zero.*at least {enough}"):
                total(objective, cut(student, slice(n)), cut(teacher, slice(n)))


@every_case
def test_rows_without_caption_are_ignored(name, oracle, options):
    objective, teacher = build(name, **options).double(), outputs(2)
    student = outputs(1)
    before = {key: float(value) for key, value in objective(student=student, teacher=teacher).items()}
    for part in (student.text, student.taps[EXIT]):
        part[2] += 5.0
    after = objective(student=student, teacher=teacher)
    assert {key: float(value) for key, value in after.items()} == before


@every_case
@pytest.mark.parametrize("how", ["mask", "no-text"])
def test_a_batch_without_captions_is_zero_with_a_graph(name, oracle, options, how):
    objective, student, teacher = build(name, **options), outputs(1, grad=True), outputs(2)
    if how == "no-text":
        student = dataclasses.replace(student, text=None, has_text=None)
    else:
        student.has_text = torch.zeros(B, dtype=torch.bool)
    terms = objective(student=student, teacher=teacher if objective.needs.targets else None)
    sum(terms.values()).backward()
    assert {float(value) for key, value in terms.items() if not key.startswith("feature_image")} == {0.0}
    assert student.taps[EXIT].grad is not None
    assert student.taps[EXIT].grad.abs().max() == 0
    assert all(parameter.grad is not None for parameter in objective.parameters())


@every_case
def test_gradients_are_right(name, oracle, options):
    objective = build(name, **options).double()
    student, teacher = outputs(1, grad=True), outputs(2, grad=True)
    leaves = (student.image, student.text, student.taps[EXIT])

    def value(image, text, early):
        given = dataclasses.replace(student, image=image, text=text, taps=student.taps | {EXIT: early})
        return total(objective, given, teacher)

    if not options.get("detach", True) or options.get("kl") == 0.0:  # what is detached is not what is differentiated
        assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6, fast_mode=True)
    value(*leaves).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    assert teacher.image.grad is teacher.text.grad is None


def test_the_kl_moves_the_whole_only_when_asked():
    """With a perfectly flat inner loss what is left is the KL: detached, it does not reach the whole's embedding."""
    moved = {}
    for detach in (True, False):
        student = outputs(1, grad=True)
        terms = build("matryoshka-2d", pairs=[[1, 3]], detach=detach)(student=student, teacher=outputs(2))
        terms["kl_1x3"].backward()
        moved[detach] = float(student.text.grad.abs().sum()) if student.text.grad is not None else 0.0
        assert student.taps[EXIT].grad.abs().sum() > 0
        assert student.taps[EXIT].grad[:, 3:].abs().max() == 0
    assert moved[True] == 0 < moved[False]


def test_terms_name_their_pair_and_a_perfect_exit_costs_no_kl():
    student = outputs(1)
    student.taps[EXIT] = student.text.clone()
    found = build("matryoshka-2d", pairs=[[1, 3], [1, D]])(student=student, teacher=outputs(2))
    assert set(found) == {"crd", "crd_1x3", "kl_1x3", "crd_1x5", "kl_1x5"}
    assert float(found["kl_1x3"]) == pytest.approx(0.0, abs=1e-12)
    assert float(found["crd_1x5"]) == pytest.approx(float(found["crd"]))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pairs": [[1, 9]]}, UsageError, "numbers from 2 to 5"),
        ({"pairs": [[0, 3]]}, UsageError, "layers from 1"),
        ({"pairs": [[1, 3], [1, 3]]}, UsageError, "different"),
        ({"pairs": [[1, 3, 4]]}, UsageError, "must list"),
        ({"pairs": [1, 3]}, UsageError, "must list"),
        ({"pairs": [[2, 3]]}, UnknownNameError, "text.exit.1"),
        ({"kl": -1.0}, UsageError, "number from 0"),
        ({"inner": {"name": "matryoshka"}}, UsageError, "twice"),
        ({"inner": {"name": "matryoshka-2d"}}, UsageError, "twice"),
        ({"inner": {"name": "hint"}}, UsageError, "reads no embedding"),
        ({"inner": {"name": "masked-feature"}}, UsageError, "reads no text"),
    ],
)
def test_mistakes_are_named(options, error, words):
    with pytest.raises(error, match=words):
        build("matryoshka-2d", **options)
    assert objective_needs("matryoshka-2d", {"inner": {"name": "feature"}}).captions
    with pytest.raises(UsageError, match="learns from a teacher"):
        build_objective("matryoshka-2d", student=WIDTHS)
    assert build("matryoshka-2d", OTHER).minimum_rows == 2


# ------------------------------------------------------------------------------------------------ in a run

Make = Callable[..., Recipe]
PAIRS = [[1, 4], [2, 8]]


@pytest.fixture
def recipe(
    world: Path, teacher_cache: Path, toy_teacher: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Make:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    text = TINY_STUDENT["text"] | {"layers": 2}
    overrides = TINY_STUDENT | {"text": text, "exits": PAIRS}

    def make(*more: str, **options: Any) -> Recipe:
        objectives = [{"name": "matryoshka-2d", "options": {"pairs": PAIRS} | options}, {"name": "feature"}]
        student = {"name": "mnv4-035", "overrides": overrides}
        return load_recipe(toy_recipe(world, teacher_cache, student=student, objectives=objectives), more)

    return make


def test_a_run_trains_its_exits_and_resumes(recipe: Make, tmp_path: Path) -> None:
    wanted = recipe()
    result = distill_run(wanted, tmp_path / "run", progress=False)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert {"loss/crd", "loss/crd_1x4", "loss/kl_1x4", "loss/crd_2x8", "loss/kl_2x8"} <= row.keys()
    assert row["loss/kl_1x4"] > 0
    assert row["loss/kl_2x8"] == pytest.approx(0, abs=1e-6)  # two layers are all there are
    # the saved student's promise binds who trains it on, too
    on = ("student.name=init", f"student.init={result.student}", "student.overrides={}")
    with pytest.raises(UsageError, match=r"promises the smaller students \[\[2, 8\]\]"):
        recipe(*on, pairs=[[1, 4]])
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    assert distill_run(wanted, tmp_path / "run", resume=True, progress=False).final_loss == result.final_loss
    student = load_student(result.student)
    assert student.config.exits == ((1, 4), (2, 8))
    small = truncated(student, text_layers=1, dim=4)
    assert sum(p.numel() for p in small.text_tower.blocks.parameters()) * 2 == sum(
        p.numel() for p in student.text_tower.blocks.parameters()
    )


def test_a_promise_that_nothing_keeps_is_refused(recipe: Make) -> None:
    with pytest.raises(UsageError, match=r"promises the smaller students \[\[2, 8\]\]"):
        recipe(pairs=[[1, 4]])
    with pytest.raises(UsageError, match="layers from 1 to the text tower's 2"):
        recipe("student.overrides.exits=[[3, 4]]")


def test_an_exit_past_the_last_layer_stops_before_the_first_step(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an exit after 3 layers was asked of a text tower of 2"):
        distill_run(recipe(pairs=[*PAIRS, [3, 4]]), tmp_path / "run", progress=False)


def test_texts_alone_have_no_exits(recipe: Make) -> None:
    with pytest.raises(UsageError, match="needs picture-caption pairs"):
        recipe("objectives.0.batch=texts")
