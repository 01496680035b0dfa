"""Objectives on token maps and on masked pictures, against plain loops; and their manners.

The general manners are those of test_objectives.py and test_objectives_relation.py, run here on these cases.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import test_objectives as base
import test_objectives_relation as relation
import torch
from objective_toys import (
    GROUP,
    HAS_TEXT,
    LENGTHS,
    OTHER,
    PROGRESS,
    SEED,
    STEP,
    WIDTHS,
    B,
    F,
    L,
    build,
    contrast,
    cosine,
    huber,
    outputs,
    project,
    rows,
    softmax,
    total,
    unit,
)
from test_objectives_relation import cut

from pocketvlm.distill.objectives import Outputs, Widths, build_objective, objective_needs, objective_taps
from pocketvlm.distill.objectives.common import Projector
from pocketvlm.distill.objectives.hint import projected_to
from pocketvlm.distill.objectives.token_alignment import best_matches
from pocketvlm.edge.errors import UnknownNameError, UsageError

# ------------------------------------------------------------------------------------------------ oracles


def masked_oracle(o, s, t):
    value = 0.0
    for x, y in zip(project(o.projector, rows(s.masked_image)), rows(t.image)):
        x, y = unit(x), unit(y)
        if o.distance == "cosine":
            value += (1 - cosine(x, y)) / B
        elif o.distance == "l2":
            value += math.dist(x, y) ** 2 / B
        else:
            value += math.fsum(huber(a - b, o.beta) for a, b in zip(x, y)) / B
    return value


def alignment_oracle(o, s, t):
    c = math.exp(float(o.log_scale.detach()))
    keep = [i for i in range(B) if HAS_TEXT[i]]
    patches = [project(o.image_projector, rows(s.taps["tokens"])[i]) for i in keep]
    words = [project(o.text_projector, rows(s.taps["text.tokens"])[i][: LENGTHS[i]]) for i in keep]
    by_patches = [[mean(max(cosine(x, y) for y in w) for x in p) for w in words] for p in patches]
    by_words = [[mean(max(cosine(x, y) for x in p) for y in w) for w in words] for p in patches]
    groups = [GROUP[i] for i in keep]
    first = scored(by_words if o.variant == "words" else by_patches, groups, c, o.duplicates)
    return (first + scored([list(column) for column in zip(*by_words)], groups, c, o.duplicates)) / 2


def mean(values) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def scored(scores: list[list[float]], groups: list[int], c: float, duplicates: str) -> float:
    losses = []
    for i, row in enumerate(scores):
        allowed = [j for j in range(len(row)) if j == i or duplicates != "ignore" or groups[j] != groups[i]]
        p = dict(zip(allowed, softmax([c * row[j] for j in allowed])))
        right = [j for j in allowed if groups[j] == groups[i]] if duplicates == "positives" else [i]
        losses.append(-sum(math.log(p[j]) for j in right) / len(right))
    return mean(losses)


def map_hint_oracle(o, s, t):
    """Place by place on equal grids; the mean over places where only the student is tapped."""
    value, tokens = 0.0, rows(s.taps["tokens"])
    targets = rows(t.taps["tokens"] if o.teacher_tap else t.image_features[:, None])
    for ours, theirs in zip(tokens, targets):
        if not o.teacher_tap:
            ours = [[mean(column) for column in zip(*ours)]]
        if o.teacher_tap and o.places < 1:
            places = o.chosen(len(theirs)).tolist()
            ours, theirs = [ours[k] for k in places], [theirs[k] for k in places]
        for x, y in zip(project(o.projector, ours), theirs):
            gaps = [a - b for a, b in zip(standard(x, o.standardize), standard(y, o.standardize))]
            row = math.fsum(d * d if o.distance == "l2" else huber(d) for d in gaps)
            value += row / (1 if o.standardize == "unit" else len(gaps)) / len(theirs) / B
    return value


def standard(v: list[float], how: str) -> list[float]:
    if how == "row":
        centre = mean(v)
        return [(x - centre) / math.sqrt(mean((y - centre) ** 2 for y in v) + 1e-5) for x in v]
    return unit(v) if how == "unit" else v


TAPS = {"student_tap": "tokens", "teacher_tap": "tokens"}
BOTH = {**TAPS, "places": 1}
CASES = [
    ("masked-feature", masked_oracle, {}),
    ("masked-feature", masked_oracle, {"distance": "cosine"}),
    ("masked-feature", masked_oracle, {"distance": "smooth-l1", "beta": 0.3, "ratio": 0.5, "cells": 4}),
    ("token-alignment", alignment_oracle, {}),
    ("token-alignment", alignment_oracle, {"variant": "words", "logit_scale": 3.0}),
    ("token-alignment", alignment_oracle, {"duplicates": "positives", "width": 3}),
    ("token-alignment", alignment_oracle, {"variant": "words", "duplicates": "negatives"}),
    ("hint", map_hint_oracle, BOTH),
    ("hint", map_hint_oracle, TAPS),
    ("hint", map_hint_oracle, {**BOTH, "standardize": "unit", "projector": "mlp"}),
    ("hint", map_hint_oracle, {**BOTH, "standardize": "none", "distance": "smooth-l1"}),
    ("hint", map_hint_oracle, {"student_tap": "tokens"}),
]


def label(options: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


every_case = pytest.mark.parametrize(
    ("name", "oracle", "options"), CASES, ids=[f"{name}-{label(options)}" for name, _, options in CASES]
)


def leaves(student: Outputs) -> dict[str, torch.Tensor]:
    """What of a student these objectives could train."""
    parts = {key: getattr(student, key) for key in ("image", "text", "masked_image", "image_features", "logit_scale")}
    return {**parts, **student.taps}


# ------------------------------------------------------------------------------------------------ general manners


@every_case
def test_value_equals_the_loop_oracle(name, oracle, options):
    base.test_value_equals_the_loop_oracle(name, oracle, options)


@every_case
def test_value_with_another_teacher_width(name, oracle, options):
    base.test_value_with_another_teacher_width(name, oracle, options)


@every_case
def test_float32_and_bfloat16_are_close(name, oracle, options):
    base.test_float32_and_bfloat16_are_close(name, oracle, options)


@pytest.mark.parametrize(("name", "oracle", "options"), base.taught(CASES))
def test_teacher_and_student_are_not_interchangeable(name, oracle, options):
    """What is compared changes places: of a hint that pools, a mean over places and a pooled feature."""
    objective, a, b = build(name, **options), outputs(1), outputs(2)
    c, d = b, a
    if name == "masked-feature":
        c, d = dataclasses.replace(a, masked_image=b.image), dataclasses.replace(b, image=a.masked_image)
    elif "teacher_tap" not in options:
        c = dataclasses.replace(a, taps={"tokens": b.image_features[:, None]})
        d = dataclasses.replace(b, image_features=a.taps["tokens"].mean(dim=1))
    forward, backward = float(total(objective, a, b)), float(total(objective, c, d))
    # a distance is symmetric where no projector stands on one side
    assert (forward == pytest.approx(backward, rel=1e-9)) == (name == "masked-feature")


@every_case
def test_gradients_are_right_and_reach_only_the_student(name, oracle, options):
    objective = build(name, **options).double()
    student, teacher = outputs(1, grad=True), outputs(2, grad=True)
    given = leaves(student)

    def value(*tensors):
        changed = dict(zip(given, tensors))
        taps = {key: changed.pop(key) for key in student.taps}
        return total(objective, dataclasses.replace(student, **changed, taps=taps), teacher)

    assert torch.autograd.gradcheck(value, tuple(given.values()), eps=1e-6, atol=1e-6, fast_mode=True)
    value(*given.values()).backward()
    assert all(part.grad is None for part in leaves(teacher).values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters() if p.numel() > 1)


@every_case
def test_trained_parts_are_the_ones_that_the_formula_names(name, oracle, options):
    objective, student = build(name, OTHER, **options), outputs(1, grad=True)
    total(objective, student, outputs(2, dim=OTHER.embedding, features=OTHER.image_features)).backward()
    wanted = {"masked-feature": {"masked_image"}, "token-alignment": {"tokens", "text.tokens"}, "hint": {"tokens"}}
    found = {key for key, part in leaves(student).items() if part.grad is not None and part.grad.abs().sum() > 0}
    assert found == wanted[name]


@every_case
def test_rows_without_caption_and_padding_are_ignored(name, oracle, options):
    objective, teacher = build(name, **options), outputs(2)
    student, spoiled = outputs(1, grad=True), outputs(1, grad=True)
    total(objective, student, teacher).backward()
    with torch.no_grad():
        spoiled.text[2] = math.nan
        spoiled.taps["text.tokens"][2] = math.inf
        spoiled.taps["text.tokens"][1, LENGTHS[1] :] = 1e4
    value = total(objective, spoiled, teacher)
    value.backward()
    assert float(value) == float(total(objective, student, teacher))
    words = spoiled.taps["text.tokens"].grad
    if words is not None:
        assert words[2].abs().max() == 0
        assert words[1, LENGTHS[1] :].abs().max() == 0
        assert words[1, : LENGTHS[1]].abs().max() > 0


@every_case
@pytest.mark.parametrize("how", ["mask", "no-text", "one"])
def test_batch_without_captions_is_zero_with_a_graph(name, oracle, options, how):
    objective, student, teacher = build(name, **options), outputs(1, grad=True), outputs(2)
    if how == "no-text":
        student = dataclasses.replace(student, text=None, has_text=None)
    else:
        student.has_text = torch.tensor([how == "one"] + [False] * (B - 1))
    terms = objective(student=student, teacher=teacher if objective.needs.teacher else None)
    sum(terms.values()).backward()
    assert all(math.isfinite(float(value)) for value in terms.values())
    if objective.needs.captions:
        assert {float(value) for value in terms.values()} == {0.0}
        assert all(parameter.grad is not None for parameter in objective.parameters())
    else:
        assert float(sum(terms.values())) == pytest.approx(oracle(objective, student, teacher), rel=1e-6)


@every_case
def test_order_of_the_rows_changes_nothing(name, oracle, options):
    objective, student, teacher = build(name, **options), outputs(1), outputs(2)
    wanted = float(total(objective, student, teacher))
    for turn in ([5, 3, 1, 0, 4, 2], [2, 4, 0, 3, 5, 1]):
        assert float(total(objective, cut(student, turn), cut(teacher, turn))) == pytest.approx(wanted, rel=1e-10)


def test_batch_of_one_is_refused_where_rows_are_compared():
    for name, options, enough in (("masked-feature", {}, 1), ("hint", BOTH, 1), ("token-alignment", {}, 2)):
        student, teacher = outputs(1), outputs(2)
        objective = build(name, **options)
        assert float(total(objective, cut(student, slice(enough)), cut(teacher, slice(enough)))) > 0
        for n in range(1, enough):
            with pytest.raises(UsageError, match=f"batch of {n} .*identically zero.*at least {enough}"):
                total(objective, cut(student, slice(n)), cut(teacher, slice(n)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name, _, options in CASES),
        *(("token-alignment", {"variant": variant, "logit_scale": 100.0}) for variant in ("filip", "words")),
    ],
)
def test_range_of_half_precision_is_enough(name, options, dtype):
    relation.test_range_of_half_precision_is_enough(name, options, dtype)


@every_case
def test_projectors_are_seeded_saved_and_restored(name, oracle, options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = build(name, OTHER, **options), build(name, OTHER, **options)
    assert torch.equal(torch.get_rng_state(), before)
    other = build_objective(name, student=WIDTHS, teacher=OTHER, seed=SEED + 1, **options)
    other.at(STEP, PROGRESS)
    assert any("projector" in key for key in first.state_dict())
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in first.state_dict().items())
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    teacher = outputs(2, dim=OTHER.embedding, features=OTHER.image_features)
    assert float(total(other, outputs(1), teacher)) == float(total(first, outputs(1), teacher))


# ------------------------------------------------------------------------------------------------ masked pictures


def test_a_mask_that_hides_nothing_from_the_student_is_feature():
    """Said in the docstring ("feature without the mask"), so true."""
    student, teacher = outputs(1), outputs(2)
    seen = dataclasses.replace(student, masked_image=student.image)
    for distance in ("l2", "cosine", "smooth-l1"):
        wanted = float(total(build("feature", distance=distance, text=0.0), student, teacher))
        assert float(total(build("masked-feature", distance=distance), seen, teacher)) == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------ alignment


def test_chunks_change_nothing():
    g = torch.Generator().manual_seed(0)
    patches = torch.randn(5, 6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    words = torch.randn(7, 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    real = torch.rand(7, 4, generator=g) > 0.4
    real[:, 0] = True
    found = []
    for at_once in (1 << 20, 400, 1):
        a, b = best_matches(patches, words, real, at_once=at_once)
        gradients = torch.autograd.grad((a.sin() + b.cos()).sum(), (patches, words))
        found.append((a, b, *gradients))
    for parts in zip(*found):
        torch.testing.assert_close(parts[0], parts[1])
        torch.testing.assert_close(parts[0], parts[2])


def test_one_patch_and_one_word_are_the_contrastive_loss():
    """With one token on each side nothing is left of the matching."""
    student = outputs(1)
    student.taps = {key: value[:, :1] for key, value in student.taps.items()}
    student.text_mask = torch.ones(B, 1, dtype=torch.bool)
    for variant in ("filip", "words"):
        o = build("token-alignment", variant=variant)
        keep = [i for i in range(B) if HAS_TEXT[i]]
        x = project(o.image_projector, [rows(student.taps["tokens"])[i][0] for i in keep])
        y = project(o.text_projector, [rows(student.taps["text.tokens"])[i][0] for i in keep])
        groups, c = [GROUP[i] for i in keep], math.exp(float(o.log_scale.detach()))
        wanted = (contrast(x, y, groups, c, "ignore") + contrast(y, x, groups, c, "ignore")) / 2
        assert float(total(o, student, student)) == pytest.approx(wanted, rel=1e-6)


def test_patches_that_no_word_wants_count_only_in_filip():
    """A cluttered picture: more patches far from every word lower the score by patches, not the one by words."""
    words = torch.eye(3)[None, :2]
    seen = torch.eye(3)[None, :2]
    cluttered = torch.cat([seen, torch.eye(3)[None, 2:].expand(1, 6, 3)], dim=1)
    real = torch.ones(1, 2, dtype=torch.bool)
    assert [float(part) for part in best_matches(seen, words, real)] == [1.0, 1.0]
    assert [float(part) for part in best_matches(cluttered, words, real)] == [0.25, 1.0]


def test_alignment_reads_feature_maps_too():
    student = outputs(1)
    wanted = float(total(build("token-alignment"), student, student))
    student.taps["tokens"] = student.taps["tokens"].transpose(1, 2).unflatten(2, (3, 3))
    assert float(total(build("token-alignment"), student, student)) == pytest.approx(wanted, rel=1e-12)


# ------------------------------------------------------------------------------------------------ hints on maps


def test_finer_maps_are_averaged_and_coarser_ones_interpolated():
    same = torch.nn.Identity()
    fine = torch.randn(2, 5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = projected_to(fine, 2, same)
    for place, (y, x) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        torch.testing.assert_close(found[:, place], fine[:, :, y : y + 2, x : x + 2].mean(dim=(2, 3)))
    coarse = fine[:, :, :2, :2]
    found = projected_to(coarse.flatten(2).transpose(1, 2), 3, same)
    at = [0.0, 0.5, 1.0]  # half-pixel centres: (k + 1/2) 2/3 - 1/2, held inside 0..1
    for place in range(9):
        y, x = at[place // 3], at[place % 3]
        weights = [((1 - y) * (1 - x), 0, 0), ((1 - y) * x, 0, 1), (y * (1 - x), 1, 0), (y * x, 1, 1)]
        torch.testing.assert_close(found[:, place], sum(w * coarse[:, :, a, b] for w, a, b in weights))
    torch.testing.assert_close(projected_to(fine.flatten(2).transpose(1, 2), 4, same), fine.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("side", [2, 3, 6])
def test_a_linear_projector_may_come_before_or_after_the_resampling(side):
    """Said in the docstring, so true; also of its bias, as the weights of every new place sum to 1."""
    chart = torch.randn(2, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linear = Projector(5, 4, seed=1, tag="x").double()
    with torch.no_grad():
        linear.biases[0].copy_(torch.arange(4.0))
    after = linear(projected_to(chart, side, torch.nn.Identity()))
    torch.testing.assert_close(projected_to(chart, side, linear), after)
    first = linear(chart.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(projected_to(first, side, torch.nn.Identity()), after)


def test_a_map_hint_knows_where_things_are():
    """The pooled hint does not: moving the student's places changes one and not the other."""
    student, teacher = outputs(1), outputs(2)
    moved = dataclasses.replace(student, taps={"tokens": student.taps["tokens"].flip(1)})
    maps, pooled = build("hint", **BOTH), build("hint", student_tap="tokens")
    assert float(total(maps, moved, teacher)) != pytest.approx(float(total(maps, student, teacher)), rel=1e-3)
    assert float(total(pooled, moved, teacher)) == pytest.approx(float(total(pooled, student, teacher)), rel=1e-10)


def test_drawn_places_change_with_the_step_alone_and_average_to_all_of_them():
    student, teacher = outputs(1), outputs(2)
    drawn, whole = build("hint", **TAPS), build("hint", **BOTH)
    places = student.taps["tokens"].shape[1]
    values, seen = [], torch.zeros(places)
    for step in range(400):
        drawn.at(step, 0.0)
        assert len(set(drawn.chosen(places).tolist())) == round(0.4 * places)
        values.append(float(total(drawn, student, teacher)))
        seen[drawn.chosen(places)] += 1
    assert torch.allclose(seen / 400, torch.tensor(round(0.4 * places) / places), atol=0.1)
    assert mean(values) == pytest.approx(float(total(whole, student, teacher)), rel=0.02)
    again = build("hint", **TAPS)
    again.at(7, 0.0)
    assert float(total(again, student, teacher)) == values[7]
    assert len(build("hint", **TAPS, places=0.01).chosen(places)) == 1


# ------------------------------------------------------------------------------------------------ needs and mistakes


def test_needs_and_taps_are_known_before_building():
    assert objective_needs("masked-feature").masked_view
    assert objective_needs("matryoshka", {"inner": {"name": "masked-feature"}}).masked_view
    assert objective_needs("hint").features
    assert not objective_needs("hint", BOTH).features
    assert objective_taps("hint") == {}
    assert objective_taps("hint", {"student_tap": "trunk.blocks.3"}) == {"student_tap": "trunk.blocks.3"}
    assert objective_taps("token-alignment") == {"student_tap": "tokens", "text_tap": "tokens"}
    assert objective_taps("token-gram") == {"student_tap": "tokens", "teacher_tap": "tokens"}


BARE = Widths(embedding=5, image_features=F, text_features=F)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: build("hint", **TAPS, places=0), UsageError, "share of the grid"),
        (lambda: build("hint", **TAPS, places=9), UsageError, "share of the grid"),
        (lambda: build("masked-feature", ratio=0.0), UsageError, "some must be masked|some patches must be masked"),
        (lambda: build("masked-feature", ratio=1), UsageError, "some patches must be masked"),
        (lambda: build("masked-feature", cells=1), UsageError, "whole number of cells from 2"),
        (lambda: build("masked-feature", cells=2, ratio=0.1), UsageError, "some patches must be masked"),
        (lambda: build("masked-feature", distance="l1"), UnknownNameError, "l2"),
        (
            lambda: total(build("masked-feature"), dataclasses.replace(outputs(1), masked_image=None), outputs(2)),
            UsageError,
            "without masked_image",
        ),
        (lambda: build("token-alignment", variant="word"), UnknownNameError, "words"),
        (lambda: build("token-alignment", width=1), UsageError, "only signs"),
        (lambda: build("token-alignment", student_tap="token"), UnknownNameError, "tokens"),
        (lambda: build_objective("token-alignment", student=BARE), UsageError, "without any tap"),
        (
            lambda: total(build("token-alignment"), dataclasses.replace(outputs(1), text_mask=None), outputs(2)),
            UsageError,
            "told from padding",
        ),
        (lambda: build("hint", teacher_tap="tokens"), UsageError, "no student_tap"),
        (lambda: build("hint", WIDTHS, student_tap="tokns", teacher_tap="tokens"), UnknownNameError, "tokens"),
        (lambda: build_objective("hint", student=WIDTHS, teacher=BARE, **BOTH), UsageError, "teacher .*without any"),
        (
            lambda: total(build("hint", **BOTH), outputs(1), tokens(outputs(2), 8)),
            UsageError,
            "teacher map of shape .* square grid",
        ),
        (lambda: total(build("hint", **BOTH), tokens(outputs(1), 8), outputs(2)), UsageError, "student map of shape"),
        (lambda: objective_taps("token-gram", {"student_tap": 3}), UsageError, "must name an inner activation"),
    ],
)
def test_mistakes_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def tokens(o: Outputs, count: int) -> Outputs:
    return dataclasses.replace(o, taps={**o.taps, "tokens": o.taps["tokens"][:, :count]})


def test_lengths_of_the_toys_are_what_the_oracles_think():
    assert outputs(1).text_mask.sum(dim=1).tolist() == LENGTHS
    assert outputs(1).taps["text.tokens"].shape == (B, L, F)
