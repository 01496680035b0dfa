"""What objectives of one step share: the same values and gradients as each on its own, and made once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from objective_toys import HAS_TEXT, build, outputs, total

from pocketvlm.distill.objectives import Outputs, once
from pocketvlm.distill.objectives.once import embeddings, made_once, unit

TOGETHER = ("feature", "clip", "crd", "icl", "affinity", "cross-kd", "siglip", "gram", "rankclip")


def rows_of_a_zero_and_a_tiny_one() -> torch.Tensor:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[1], x[3] = 0.0, 1e-14
    return x.requires_grad_()


def test_unit_is_torchs_normalize_in_value_and_gradient() -> None:
    x = rows_of_a_zero_and_a_tiny_one()
    slope = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(unit(x), F.normalize(x, dim=-1))
    (wanted,) = torch.autograd.grad(F.normalize(x, dim=-1), x, slope)
    (found,) = torch.autograd.grad(unit(x), x, slope)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def step(student: Outputs, teacher: Outputs) -> torch.Tensor:
    return torch.stack([total(build(name).double(), student, teacher) for name in TOGETHER]).sum()


@pytest.mark.parametrize("everywhere", [True, False])
def test_objectives_together_are_what_they_are_apart(everywhere: bool) -> None:
    """With captions on every row, where nothing is copied, and without."""
    student, teacher = outputs(1, grad=True), outputs(2)
    if everywhere:
        student.has_text = torch.ones(len(HAS_TEXT), dtype=torch.bool)
        teacher.has_text = None
    leaves = [student.image, student.text, student.logit_scale]
    apart = step(student, teacher)
    wanted = torch.autograd.grad(apart, leaves)
    with made_once():
        together = step(student, teacher)
    assert float(together.detach()) == pytest.approx(float(apart.detach()), rel=1e-14)
    for found, gradient in zip(torch.autograd.grad(together, leaves), wanted):
        torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-13)


def test_each_embedding_is_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    real = once._unit

    def counted(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return real(x)

    monkeypatch.setattr(once, "_unit", counted)
    student, teacher = outputs(1, grad=True), outputs(2)
    student.has_text = teacher.has_text = None
    with made_once():
        step(student, teacher)
    assert len(seen) == 4  # picture and text, of both models
    step(student, teacher)
    assert len(seen) > 20


def test_what_has_no_gradient_is_not_taken_where_one_is_wanted() -> None:
    x = rows_of_a_zero_and_a_tiny_one()
    with made_once():
        embeddings(x)
        with torch.no_grad():
            assert not unit(x).requires_grad
        assert unit(x).requires_grad
        assert unit(x) is unit(x)
    assert unit(x) is not unit(x)


def test_other_tensors_are_not_held() -> None:
    """A matrix that an objective normalises on the way is nobody else's, and would stay until the forward ends."""
    x = rows_of_a_zero_and_a_tiny_one()
    with made_once():
        assert unit(x) is not unit(x)
