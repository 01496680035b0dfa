"""Retrieval metrics against a loop oracle, ties, and the bootstrap against what is known of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pocketvlm.distill import metrics
from pocketvlm.edge.errors import UsageError


def slow_rank_and_ap(scores: list[float], positives: set[int]) -> tuple[int, float]:
    """Walk down the list by hand; among equal scores the wrong ones come first."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j in positives))
    found, precisions, first = 0, [], 0
    for place, j in enumerate(order, 1):
        if j in positives:
            found += 1
            precisions.append(found / place)
            first = first or place
    return first, sum(precisions) / len(precisions)


def test_rank_and_average_precision_agree_with_walking_down_the_list() -> None:
    rng = np.random.default_rng(0)
    # few distinct values, so that ties are everywhere
    scores = rng.integers(0, 5, size=(40, 30)) / 4
    match = rng.random((40, 30)) < 0.15
    match[:, 0] |= ~match.any(axis=1)
    result = metrics.retrieval_from_scores(scores, match)
    for i in range(40):
        rank, ap = slow_rank_and_ap(scores[i].tolist(), set(np.flatnonzero(match[i]).tolist()))
        assert result.rank[i] == rank
        assert result.ap[i] == pytest.approx(ap, abs=1e-12)


def test_retrieval_ranks_by_cosine_whatever_the_lengths_and_the_chunks() -> None:
    rng = np.random.default_rng(1)
    queries, gallery = rng.normal(size=(23, 8)), rng.normal(size=(17, 8))
    matches = [[int(j)] for j in rng.integers(0, 17, size=23)]
    whole = metrics.retrieval(queries, gallery, matches)
    stretched = metrics.retrieval(queries * rng.uniform(0.1, 9, (23, 1)), gallery * 5, matches, chunk=4)
    assert whole.rank.tolist() == stretched.rank.tolist()
    for i in range(23):
        cosines = [float(queries[i] @ g / np.linalg.norm(queries[i]) / np.linalg.norm(g)) for g in gallery]
        assert whole.rank[i] == 1 + sum(c > cosines[matches[i][0]] for c in cosines)


def test_a_collapsed_model_gets_no_hit_by_tie() -> None:
    same = np.ones((50, 4), np.float32)
    result = metrics.retrieval(same, same, [[i] for i in range(50)])
    assert set(result.rank.tolist()) == {50}
    assert result.summary()["R@10"] == 0.0


def test_duplicate_names_are_all_right_answers() -> None:
    gallery = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    matches = metrics.matches_from_keys(["cat"], ["dog", "cat", "cat"])
    assert matches == [[1, 2]]
    result = metrics.retrieval([[1.0, 0.0]], gallery, matches)
    assert result.rank.tolist() == [2]
    assert result.ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_summary_counts_and_refuses_nothing() -> None:
    values = metrics.QueryResults(np.array([1, 2, 6, 11]), np.array([1, 0.5, 0.2, 0.1]), 20).summary()
    assert values["R@1"] == 0.25
    assert values["R@5"] == 0.5
    assert values["R@10"] == 0.75
    assert values["median_rank"] == 4
    assert values["MAP"] == pytest.approx(0.45)
    with pytest.raises(UsageError, match="no query is left"):
        metrics.QueryResults(np.array([], np.int64), np.array([]), 3).summary()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_embeddings_are_refused_instead_of_ranked(bad: float) -> None:
    with pytest.raises(UsageError, match="1 of 2 query embeddings are not finite"):
        metrics.retrieval([[1.0, bad], [1.0, 0.0]], [[1.0, 0.0]], [[0], [0]])
    with pytest.raises(UsageError, match="NaN or infinity"):
        metrics.retrieval_from_scores([[bad]], [[True]])


def test_misfits_are_refused_in_a_sentence() -> None:
    with pytest.raises(UsageError, match="1 queries have no match"):
        metrics.retrieval([[1.0, 0.0]], [[1.0, 0.0]], [[]])
    with pytest.raises(UsageError, match="do not fit together"):
        metrics.retrieval([[1.0, 0.0]], [[1.0, 0.0, 0.0]], [[0]])


def test_neighbour_overlap_against_a_loop() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(20, 6)), rng.normal(size=(20, 3))
    result = metrics.neighbour_overlap(a, b, k=4)
    for i in range(20):
        near = []
        for x in (a, b):
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            others = sorted((j for j in range(20) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
            near.append(set(others[:4]))
        assert result[i] == pytest.approx(len(near[0] & near[1]) / 4)
    assert metrics.neighbour_overlap(a, a * 3, k=50).mean() == 1.0
    with pytest.raises(UsageError, match="same 2 or more items"):
        metrics.neighbour_overlap(a, b[:5])


def test_retention_is_a_ratio_and_never_divides_by_zero() -> None:
    kept = metrics.retention({"R@5": 0.3, "MAP": 0.2, "median_rank": 9}, {"R@5": 0.4, "MAP": 0.0, "median_rank": 4})
    assert kept == {"R@5": pytest.approx(0.75), "MAP": None}


def test_bootstrap_matches_the_normal_interval_on_many_queries() -> None:
    rng = np.random.default_rng(3)
    a, b = (rng.random(4000) < 0.40).astype(float), (rng.random(4000) < 0.35).astype(float)
    interval = metrics.paired_bootstrap(a, b, seed=1, resamples=4000)
    error = (a - b).std(ddof=1) / math.sqrt(4000)
    assert interval.difference == pytest.approx(a.mean() - b.mean())
    assert interval.low == pytest.approx(interval.difference - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(interval.difference + 1.96 * error, abs=0.1 * error)
    assert interval.lower_bound == pytest.approx(interval.difference - 1.645 * error, abs=0.1 * error)
    assert interval.upper_bound == pytest.approx(interval.difference + 1.645 * error, abs=0.1 * error)
    assert interval == metrics.paired_bootstrap(a, b, seed=1, resamples=4000)
    assert interval != metrics.paired_bootstrap(a, b, seed=2, resamples=4000)


def test_pairing_makes_equal_answers_certain() -> None:
    hits = np.array([1.0, 0.0] * 50)
    interval = metrics.paired_bootstrap(hits, hits)
    assert (interval.difference, interval.low, interval.high) == (0.0, 0.0, 0.0)


def test_asking_the_same_queries_again_adds_no_evidence() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.4
    once = metrics.paired_bootstrap(a, b)
    ids = np.tile(np.arange(200), 9)
    thrice = metrics.paired_bootstrap(np.tile(a, 9), np.tile(b, 9), clusters=ids)
    naive = metrics.paired_bootstrap(np.tile(a, 9), np.tile(b, 9))
    assert thrice.clusters == 200
    assert thrice.queries == 1800
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.1)
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_bootstrap_refuses_what_cannot_be_paired() -> None:
    with pytest.raises(UsageError, match="same queries on both sides, not 2 and 3"):
        metrics.paired_bootstrap([1, 0], [1, 0, 1])
    with pytest.raises(UsageError, match="NaN or infinite"):
        metrics.paired_bootstrap([1, np.nan], [1, 0])
    with pytest.raises(UsageError, match="one per query"):
        metrics.paired_bootstrap([1, 0], [1, 0], clusters=[1])
