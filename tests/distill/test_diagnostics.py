"""Hubness, modality gap, calibration, neighbour divergence and rank variance against loops written from the papers."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest

from pocketvlm.distill import diagnostics, metrics
from pocketvlm.edge.errors import UsageError


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))


def test_k_occurrence_and_its_skewness_against_counting_by_hand() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(30, 5)), rng.normal(size=(12, 5)) + 0.4
    counts = [0] * 12
    for q in queries:
        for j in sorted(range(12), key=lambda j: -cosine(q, gallery[j]))[:3]:
            counts[j] += 1
    found = diagnostics.occurrences(diagnostics.nearest(queries, gallery, k=3, chunk=7), 12)
    assert found.tolist() == counts
    assert sum(counts) == 90
    mean = sum(counts) / 12
    second = sum((n - mean) ** 2 for n in counts) / 12
    third = sum((n - mean) ** 3 for n in counts) / 12
    assert diagnostics.skewness(found) == pytest.approx(third / second**1.5, abs=1e-12)


def test_one_hub_is_skewed_and_no_hub_is_not() -> None:
    gallery = np.eye(10)
    assert diagnostics.skewness(diagnostics.occurrences(diagnostics.nearest(gallery, gallery, k=1), 10)) == 0.0
    hub = diagnostics.occurrences(diagnostics.nearest(np.ones((10, 10)) + gallery[0], gallery, k=1), 10)
    assert hub.tolist() == [10.0] + [0.0] * 9
    assert diagnostics.skewness(hub) == pytest.approx(8 / 3)  # (n - 2) / sqrt(n - 1) of one item among n = 10
    assert diagnostics.skewness([1, 0, 0]) > 0 > diagnostics.skewness([1, 1, 0])


def test_the_modality_gap_is_the_distance_of_the_means_of_unit_vectors() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(9, 4)) * 7, rng.normal(size=(9, 4)) + 2
    means = []
    for side in (x, y):
        unit = [row / math.sqrt(sum(v * v for v in row)) for row in side]
        means.append([sum(row[d] for row in unit) / 9 for d in range(4)])
    gap, pair = diagnostics.modality_gap(x, y)
    assert gap == pytest.approx(math.dist(*means), abs=1e-12)
    assert pair == pytest.approx(sum(cosine(a, b) for a, b in zip(x, y)) / 9, abs=1e-12)
    assert diagnostics.modality_gap(x, x)[0] == 0.0
    assert diagnostics.modality_gap([[1.0, 0.0]], [[-3.0, 0.0]]) == (2.0, -1.0)
    doubled = diagnostics.modality_gap(np.concatenate([x, x[:2]]), np.concatenate([y, y[:2]]))
    assert diagnostics.modality_gap(x, y, np.array([2.0, 2] + [1] * 7)) == pytest.approx(doubled)
    with pytest.raises(UsageError, match="are no pairs"):
        diagnostics.modality_gap(x, y[:3])


def slow_ece(confidence: list[float], right: list[bool], bins: int) -> float:
    total = 0.0
    for b in range(bins):
        inside = [i for i, p in enumerate(confidence) if b / bins < p <= (b + 1) / bins or (b == 0 and p == 0)]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return total


def test_calibration_error_against_a_loop_over_bins() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.random(200)
    right = rng.random(200) < confidence**2
    for bins in (1, 7, 15):
        found = diagnostics.calibration_error(confidence, right, bins=bins)
        assert found == pytest.approx(slow_ece(confidence.tolist(), right.tolist(), bins), abs=1e-12)
    weights = np.repeat([2.0, 1.0], 100)
    again = [*confidence.tolist(), *confidence[:100].tolist()], [*right.tolist(), *right[:100].tolist()]
    assert diagnostics.calibration_error(confidence, right, weights) == pytest.approx(slow_ece(*again, 15), abs=1e-12)


def test_bins_of_equal_mass_hold_equally_many() -> None:
    confidence = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3]
    right = [True, False, False, True, True, False]
    # in order: .1 .2 | .3 .7 | .8 .9 with 0+1, 0+1, 0+1 right
    expected = sum(abs(1 - pair) for pair in (0.3, 1.0, 1.7)) / 6
    assert diagnostics.calibration_error(confidence, right, bins=3, equal_mass=True) == pytest.approx(expected)
    certain = diagnostics.calibration_error([1.0] * 4, [True, True, True, False])
    assert certain == pytest.approx(0.25)
    with pytest.raises(UsageError, match="cannot be calibrated"):
        diagnostics.calibration_error([1.2], [True])


def test_confidence_is_the_highest_probability_at_the_models_scale() -> None:
    rng = np.random.default_rng(3)
    queries, gallery = rng.normal(size=(11, 4)), rng.normal(size=(6, 4))
    found = diagnostics.confidences(queries, gallery, 20.0, chunk=4)
    for q, p in zip(queries, found):
        powers = [math.exp(20 * cosine(q, g)) for g in gallery]
        assert p == pytest.approx(max(powers) / sum(powers), abs=1e-12)
    assert np.isfinite(diagnostics.confidences(queries, gallery, 1e4)).all()
    with pytest.raises(UsageError, match="logit scale of 0"):
        diagnostics.confidences(queries, gallery, 0)


def test_neighbour_divergence_is_from_teacher_to_student() -> None:
    rng = np.random.default_rng(4)
    teacher, student, temperature = rng.normal(size=(8, 5)), rng.normal(size=(8, 3)), 0.2

    def distribution(x: np.ndarray, i: int) -> dict[int, float]:
        powers = {j: math.exp(cosine(x[i], x[j]) / temperature) for j in range(8) if j != i}
        return {j: value / sum(powers.values()) for j, value in powers.items()}

    found = diagnostics.neighbour_divergence(teacher, student, temperature=temperature, chunk=3)
    for i in range(8):
        p, q = distribution(teacher, i), distribution(student, i)
        assert found[i] == pytest.approx(sum(p[j] * math.log(p[j] / q[j]) for j in p), abs=1e-12)
    back = diagnostics.neighbour_divergence(student, teacher, temperature=temperature)
    assert abs(back.mean() - found.mean()) > 1e-3
    assert diagnostics.neighbour_divergence(teacher, teacher * 3).max() < 1e-12
    with pytest.raises(UsageError, match="must be above 0"):
        diagnostics.neighbour_divergence(teacher, student, temperature=0)
    with pytest.raises(UsageError, match="same 2 or more"):
        diagnostics.neighbour_divergence(teacher, student[:4])


def test_rank_variance_is_the_population_variance_over_languages() -> None:
    found = diagnostics.rank_variances([[1, 3, 5], [4, 4, 4]])
    assert found.tolist() == pytest.approx([8 / 3, 0.0])


def test_the_interval_of_a_mean_is_the_same_by_both_bootstraps() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(300), rng.random(300) * 0.9
    groups = np.repeat(np.arange(100), 3)

    def means(w: np.ndarray) -> tuple[float, float]:
        return float(w @ a / w.sum()), float(w @ b / w.sum())

    one = metrics.paired_bootstrap(a, b, clusters=groups, resamples=4000)
    other = metrics.bootstrap_statistic(means, groups, resamples=4000)
    assert (other.difference, other.a, other.clusters) == (pytest.approx(one.difference), pytest.approx(one.a), 100)
    width = one.high - one.low
    for end in ("low", "high", "lower_bound", "upper_bound"):
        assert getattr(other, end) == pytest.approx(getattr(one, end), abs=0.06 * width)
    assert metrics.bootstrap_statistic(means, groups) == metrics.bootstrap_statistic(means, groups)


def test_a_statistic_that_both_have_alike_differs_by_nothing() -> None:
    near = diagnostics.nearest(np.random.default_rng(6).normal(size=(40, 4)), np.eye(4), k=2)

    def skewness(size: int, w: np.ndarray) -> tuple[float, float]:
        value = diagnostics.skewness(diagnostics.occurrences(near, size, w))
        return value, value

    interval = metrics.bootstrap_statistic(partial(skewness, 4), np.arange(40), resamples=100)
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="give no interval"):
        metrics.bootstrap_statistic(partial(skewness, 4), [], resamples=100)
