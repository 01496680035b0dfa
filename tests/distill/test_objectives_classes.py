"""`dho` against an independent oracle in plain loops, and the manners that every objective has."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from objective_toys import B, K, build, kl, outputs, rows, softmax, total

from pocketvlm.distill.objectives import Outputs, Widths, build_objective, objective_needs
from pocketvlm.edge.errors import UsageError


def dho_oracle(o, s, t):
    label = s.label.tolist()
    own, taught, wanted = rows(s.class_logits), rows(s.taught_logits), rows(t.class_logits)
    known = [i for i in range(B) if label[i] >= 0]
    first = sum(-math.log(softmax(own[i])[label[i]]) for i in known) / len(known)
    second, heat = 0.0, o.temperature
    for part in (known, [i for i in range(B) if i not in known]):
        each = [kl(softmax([x / heat for x in wanted[i]]), softmax([x / heat for x in taught[i]])) for i in part]
        second += heat * heat * sum(each) / len(each)
    return o.label_weight * first + o.taught_weight * second


CASES = [
    ("dho", dho_oracle, {}),
    ("dho", dho_oracle, {"temperature": 1.0}),
    ("dho", dho_oracle, {"label_weight": 1.0, "taught_weight": 1.0, "temperature": 4.0}),
    ("dho", dho_oracle, {"label_weight": 0}),
    ("dho", dho_oracle, {"taught_weight": 0}),
]
every_case = pytest.mark.parametrize("options", [options for _, _, options in CASES], ids=str)


def cut(o: Outputs, keep: list[int]) -> Outputs:
    names = ("image", "text", "class_logits", "taught_logits", "label")
    return dataclasses.replace(o, **{name: getattr(o, name)[keep] for name in names})


@every_case
def test_value_equals_the_loop_oracle(options):
    objective, student, teacher = build("dho", **options).double(), outputs(1), outputs(2)
    wanted = dho_oracle(objective, student, teacher)
    assert float(total(objective, student, teacher)) == pytest.approx(wanted, rel=1e-12)


@every_case
def test_float32_and_bfloat16_are_close(options):
    objective = build("dho", **options)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (outputs(seed, dtype=dtype) for seed in (1, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = total(objective, student, teacher)
        assert value.dtype == torch.float32
        # a few sums of float32 terms of size one
        assert float(value) == pytest.approx(dho_oracle(objective, student, teacher), rel=1e-5)


def test_teacher_and_student_are_not_interchangeable():
    objective, a, b = build("dho", label_weight=0), outputs(1), outputs(2)
    a, b = (dataclasses.replace(o, taught_logits=o.class_logits) for o in (a, b))
    b.label = a.label
    assert float(total(objective, a, b)) != pytest.approx(float(total(objective, b, a)), rel=1e-3)


@every_case
def test_gradients_are_right_and_each_head_has_its_own(options):
    objective = build("dho", **options).double()
    student, teacher = outputs(1, grad=True), outputs(2, grad=True)

    def value(own, taught):
        return total(objective, dataclasses.replace(student, class_logits=own, taught_logits=taught), teacher)

    leaves = (student.class_logits, student.taught_logits)
    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-6)
    value(*leaves).backward()
    own, taught = (leaf.grad.abs().sum(dim=1) > 0 for leaf in leaves)
    known = student.label >= 0
    assert own.tolist() == (known if objective.label_weight else torch.zeros(B, dtype=torch.bool)).tolist()
    assert taught.tolist() == [bool(objective.taught_weight)] * B
    assert all(part.grad is None for part in (teacher.class_logits, teacher.taught_logits, teacher.image))


def test_a_student_that_answers_as_its_teacher_has_nothing_to_learn_from_it():
    objective, teacher = build("dho", label_weight=0), outputs(2)
    student = dataclasses.replace(outputs(1), taught_logits=teacher.class_logits.clone().requires_grad_())
    value = total(objective, student, teacher)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)
    assert student.taught_logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("label", [[-1] * B, [2] * B])
def test_a_part_without_rows_is_zero_with_a_graph(label):
    student, teacher = outputs(1, grad=True), outputs(2)
    student.label = torch.tensor(label)
    found = build("dho")(student=student, teacher=teacher)
    sum(found.values()).backward()
    assert (float(found["dho_label"]) == 0.0) == (label[0] < 0)
    assert math.isfinite(float(found["dho_taught"]))
    assert float(found["dho_taught"]) > 0
    assert student.class_logits.grad is not None


def test_rows_weigh_by_their_part_and_duplicates_count_twice():
    """With few labels, a labelled row weighs more than an unlabelled one; the order of the rows changes nothing."""
    objective, student, teacher = build("dho"), outputs(1), outputs(2)
    turn = [5, 3, 1, 0, 4, 2]
    wanted = float(total(objective, student, teacher))
    assert float(total(objective, cut(student, turn), cut(teacher, turn))) == pytest.approx(wanted, rel=1e-12)
    single = [0, 1]  # one labelled row and one without
    assert student.label[single].ge(0).tolist() == [True, False]
    twice = [0, 0, 1, 1]
    values = [float(total(objective, cut(student, keep), cut(teacher, keep))) for keep in (single, twice)]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_batch_of_one_is_enough():
    for row in (0, 1):
        value = total(build("dho"), cut(outputs(1), [row]), cut(outputs(2), [row]))
        assert float(value) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_range_of_half_precision_is_enough(dtype):
    """Zero-shot logits at scale 100, and a student that is sure of the opposite."""
    for sign in (1.0, -1.0):
        student, teacher = outputs(1, dtype=dtype), outputs(2, dtype=dtype)
        teacher.class_logits = (100 * torch.nn.functional.normalize(teacher.class_logits.float(), dim=1)).to(dtype)
        leaves = [(sign * 3 * teacher.class_logits).detach().requires_grad_() for _ in range(2)]
        student.class_logits, student.taught_logits = leaves
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = total(build("dho"), student, teacher)
        value.backward()
        assert torch.isfinite(value)
        assert all(torch.isfinite(leaf.grad).all() for leaf in leaves)


def test_needs_follow_the_weights():
    assert objective_needs("dho").teacher
    assert objective_needs("dho").classes
    assert not objective_needs("dho", {"taught_weight": 0}).teacher
    alone = build_objective("dho", student=Widths(4), taught_weight=0.0)
    assert float(alone(student=outputs(1))["dho_label"]) > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("dho", temperature=0), "above 0"),
        (lambda: build("dho", label_weight=-1), "number from 0"),
        (lambda: build("dho", label_weight=0, taught_weight=0), "both weights 0"),
        (lambda: build_objective("dho", student=Widths(4)), "learns from a teacher"),
        (lambda: build("matryoshka", inner={"name": "dho"}), "reads no embedding"),
        (
            lambda: total(build("dho"), dataclasses.replace(outputs(1), label=None), outputs(2)),
            "without class logits or labels",
        ),
        (
            lambda: total(
                build("dho"), outputs(1), dataclasses.replace(outputs(2), class_logits=torch.zeros(B, K + 1))
            ),
            f"{K} classes of the student and {K + 1} of the teacher",
        ),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(UsageError, match=words):
        call()
