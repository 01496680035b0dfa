"""Losses between generative models: loops over plain numbers in float64, who gets gradients, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pocketvlm.distill.vlm.losses import DIRECTIONS, relation_distance, token_divergence
from pocketvlm.edge.errors import UnknownNameError, UsageError


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def _softmax(row: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp(value / temperature) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("count", [1, 5])
def test_divergences_are_those_of_the_textbook(direction: str, temperature: float, count: int) -> None:
    student, teacher = _random(count, 7), _random(count, 7, seed=1)
    total = 0.0
    for row in range(count):
        q, p = (_softmax(x[row].tolist(), temperature) for x in (student, teacher))
        middle = [(a + b) / 2 for a, b in zip(p, q)]
        total += {
            "forward": _kl(p, q),
            "reverse": _kl(q, p),
            "js": (_kl(p, middle) + _kl(q, middle)) / 2,
        }[direction]
    found = token_divergence(student=student, teacher=teacher, direction=direction, temperature=temperature)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(total / count)
    # teacher and student are not interchangeable, but for the symmetric one
    swapped = token_divergence(student=teacher, teacher=student, direction=direction, temperature=temperature)  # type: ignore[arg-type]
    assert (abs(float(found - swapped)) < 1e-12) == (direction == "js")
    same = token_divergence(student=student, teacher=student, direction=direction)  # type: ignore[arg-type]
    assert float(same) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_relations_are_compared_as_one_cosine_a_picture(count: int) -> None:
    student, teacher = _random(count, 4, 3), _random(count, 4, 6, seed=1)
    total = 0.0
    for row in range(count):
        flat = []
        for tokens in (student[row].tolist(), teacher[row].tolist()):
            flat.append([sum(a * b for a, b in zip(one, two)) for one in tokens for two in tokens])
        dot = sum(a * b for a, b in zip(*flat))
        total += 1 - dot / math.sqrt(sum(a * a for a in flat[0]) * sum(b * b for b in flat[1]))
    assert float(relation_distance(student=student, teacher=teacher)) == pytest.approx(total / count)
    assert float(relation_distance(student=teacher * 5, teacher=teacher)) == pytest.approx(0, abs=1e-12)


def test_gradients_reach_the_student_only_and_lead_to_the_teacher() -> None:
    losses = [
        (lambda s, t, d=direction: token_divergence(student=s, teacher=t, direction=d), (6, 9), (6, 9))
        for direction in DIRECTIONS
    ]
    losses.append((lambda s, t: relation_distance(student=s, teacher=t), (2, 4, 3), (2, 4, 5)))
    for loss, shape, other in losses:
        student, teacher = _random(*shape).requires_grad_(), _random(*other, seed=1).requires_grad_()
        first = loss(student, teacher)
        first.backward()
        assert teacher.grad is None
        assert student.grad is not None
        with torch.no_grad():
            assert loss(student - 0.05 * student.grad / student.grad.norm(), teacher) < first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = _random(4, 300).to(dtype), _random(4, 300, seed=1).to(dtype)
    for direction in DIRECTIONS:
        found = token_divergence(student=student, teacher=teacher, direction=direction)  # type: ignore[arg-type]
        expected = token_divergence(student=student.double(), teacher=teacher.double(), direction=direction)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(UsageError, match="a teacher with the student's tokenizer"):
        token_divergence(student=_random(2, 7), teacher=_random(2, 8))
    with pytest.raises(UsageError, match="of 0 tokens"):
        token_divergence(student=_random(0, 7), teacher=_random(0, 7))
    with pytest.raises(UsageError, match="temperature 0 is no number"):
        token_divergence(student=_random(2, 7), teacher=_random(2, 7), temperature=0)
    with pytest.raises(UnknownNameError, match="forward"):
        token_divergence(student=_random(2, 7), teacher=_random(2, 7), direction="forwards")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="towers with the same grid"):
        relation_distance(student=_random(2, 4, 3), teacher=_random(2, 5, 3))
