"""Kernel ridge against a plain loop over pairs, and its leave-one-out shortcut against refitting."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.teachers.kernel import KernelOptions, KernelRidge, fit_kernel_ridge

WIDTHS = (3, 2)
OPTIONS = KernelOptions(degree=3, ridge=0.7)


def data(n: int = 9, views: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    targets = F.normalize(torch.randn(n, 4, generator=generator), dim=-1)
    mix = torch.randn(4, 5, generator=generator)
    features = (targets @ mix)[:, None] + 0.3 * torch.randn(n, views, 5, generator=generator)
    return features, targets


def oracle(
    train: Tensor, targets: Tensor, query: Tensor, mean: list[float], std: list[float], ridge: float
) -> list[float]:
    """f(query) with Python floats; `ridge` absolute."""

    def unit(row: list[float]) -> list[float]:
        z = [(v - m) / s / math.sqrt(3 if i < 3 else 2) for i, (v, m, s) in enumerate(zip(row, mean, std))]
        norm = math.sqrt(sum(v * v for v in z))
        return [v / norm for v in z]

    rows = [unit(r) for r in train.flatten(0, 1).tolist()]
    y = [t for t in targets.tolist() for _ in range(train.shape[1])]
    m = len(rows)

    def k(a: list[float], b: list[float]) -> float:
        return (1 + sum(p * q for p, q in zip(a, b))) ** 3

    system = [[k(rows[i], rows[j]) + (ridge if i == j else 0) for j in range(m)] for i in range(m)]
    alpha = torch.linalg.lstsq(torch.tensor(system, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)).solution
    q = unit(query.tolist())
    return [sum(k(q, rows[i]) * float(alpha[i, d]) for i in range(m)) for d in range(4)]


def statistics(features: Tensor) -> tuple[list[float], list[float]]:
    rows = features.double().flatten(0, 1)
    return rows.mean(0).tolist(), (rows.std(0) + 1e-3).tolist()


def test_prediction_equals_the_loop() -> None:
    features, targets = data()
    fit = fit_kernel_ridge(features, targets, WIDTHS, OPTIONS)
    query = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
    found = KernelRidge(fit.state, OPTIONS.degree)(query)
    # unit vectors: the diagonal of the kernel is 2^3
    expected = [oracle(features, targets, q, *statistics(features), ridge=0.7 * 8) for q in query]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


def test_held_out_scores_equal_refitting_without_each_picture() -> None:
    features, targets = data(8)
    fit = fit_kernel_ridge(features, targets, WIDTHS, OPTIONS)
    rows = []
    for i in range(8):
        rest = [j for j in range(8) if j != i]
        rows.append(oracle(features[rest], targets[rest], features[i, 0], *statistics(features), ridge=0.7 * 8))
    cosine = F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1) @ targets.double().T
    hits = sum(int((cosine[i] > cosine[i, i]).sum() < 5) for i in range(8))
    assert fit.recall5 == pytest.approx(hits / 8)
    losses = {}
    for scale in (5, 7, 10, 14, 20, 28, 40, 56):
        total = 0.0
        for i in range(8):
            for line in (cosine[i], cosine[:, i]):
                total += float(torch.logsumexp(scale * line, 0) - scale * cosine[i, i])
        losses[scale] = total
    assert fit.logit_scale == min(losses, key=lambda s: losses[s])


def test_fitting_twice_gives_the_same_bits() -> None:
    features, targets = data()
    one, two = (fit_kernel_ridge(features, targets, WIDTHS, OPTIONS) for _ in range(2))
    assert all(torch.equal(one.state[k], two.state[k]) for k in one.state)


def test_a_constant_feature_does_no_harm() -> None:
    features, targets = data()
    features[..., 4] = 3.0
    fit = fit_kernel_ridge(features, targets, WIDTHS, OPTIONS)
    assert all(torch.isfinite(v).all() for v in fit.state.values())
