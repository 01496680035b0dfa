"""Retrieval and classification metrics, and the intervals that say whether a difference is one. numpy only.

Ties are resolved against the model: an item that is not a match and scores the same as a match is ranked
before it. So a model that gives every picture the same embedding gets the last rank everywhere, not a share of
the hits, and the result does not depend on the order of the gallery. Scores closer than `TIE` count as equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketvlm.edge.errors import UsageError

TIE = 1e-9
"""Cosines in float64 closer than this are equal: rounding of a dot product stays below 1e-12."""

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class QueryResults:
    """Per query, in the order given. rank: int64 [Q], best rank of a match, 1 = first. ap: float64 [Q],
    average precision over all matches. gallery: number of candidates."""

    rank: NDArray[np.int64]
    ap: NDArray[np.float64]
    gallery: int

    def hits(self, k: int) -> NDArray[np.bool_]:
        """bool [Q]: a match is among the first k."""
        return self.rank <= k

    def summary(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
        """{"R@1", "R@5", "R@10", "MAP", "median_rank", "queries", "gallery"}; shares in 0..1, NaN-free."""
        if len(self.rank) == 0:
            raise UsageError("no query is left to score, so there is no result; check the filters and the captions")
        values = {f"R@{k}": float(self.hits(k).mean()) for k in ks}
        values |= {"MAP": float(self.ap.mean()), "median_rank": float(np.median(self.rank))}
        return values | {"queries": float(len(self.rank)), "gallery": float(self.gallery)}


def normalize(x: ArrayLike, *, what: str = "embeddings") -> NDArray[np.float64]:
    """Rows of [N, D] scaled to length 1, in float64; an all-zero row stays zero.

    Raises:
        UsageError: a value is NaN or infinite, which would silently rank first or last.
    """
    value = np.asarray(x, dtype=np.float64)
    if not np.isfinite(value).all():
        bad = int((~np.isfinite(value).all(axis=-1)).sum())
        raise UsageError(
            f"{bad} of {len(value)} {what} are not finite, so no ranking of them means anything; "
            "look for a diverged training or an overflow in half precision"
        )
    return value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-30)


def matches_from_keys(query_keys: Sequence[object], gallery_keys: Sequence[object]) -> list[list[int]]:
    """For every query, the gallery indices that carry an equal key (int, string, ...)."""
    places: dict[object, list[int]] = {}
    for index, key in enumerate(gallery_keys):
        places.setdefault(key, []).append(index)
    return [places.get(key, []) for key in query_keys]


def retrieval(
    queries: ArrayLike, gallery: ArrayLike, matches: Sequence[Sequence[int]], *, chunk: int = 1024
) -> QueryResults:
    """Rank `gallery` [M, D] for every one of `queries` [Q, D] by cosine.

    matches: for every query the gallery indices that answer it, at least one (`matches_from_keys`).
    Matches of one query do not compete with each other for `rank`; for `ap` they take places in their order.
    """
    q, g = normalize(queries, what="query embeddings"), normalize(gallery, what="gallery embeddings")
    if len(q) != len(matches) or (len(q) and len(g) and q.shape[1] != g.shape[1]):
        raise UsageError(
            f"queries {q.shape} with {len(matches)} lists of matches and gallery {g.shape} do not fit together; "
            "give one list per query and embeddings of one width"
        )
    ranks, precisions = np.empty(len(q), np.int64), np.empty(len(q), np.float64)
    for start in range(0, len(q), chunk):
        rows = slice(start, start + chunk)
        scores = q[rows] @ g.T
        match = np.zeros(scores.shape, bool)
        for row, indices in enumerate(matches[start : start + chunk]):
            match[row, list(indices)] = True
        ranks[rows], precisions[rows] = _rank_rows(scores, match)
    return QueryResults(ranks, precisions, len(g))


def retrieval_from_scores(scores: ArrayLike, match: ArrayLike) -> QueryResults:
    """The same from a finite score matrix [Q, M] and a bool matrix of matches [Q, M]."""
    s, m = np.asarray(scores, np.float64), np.asarray(match, bool)
    if not np.isfinite(s).all():
        raise UsageError("the scores hold NaN or infinity, so no ranking of them means anything; find their source")
    ranks, precisions = _rank_rows(s, m)
    return QueryResults(ranks, precisions, s.shape[1])


def _rank_rows(scores: NDArray[np.float64], match: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if len(scores) and not match.any(axis=1).all():
        raise UsageError(
            f"{int((~match.any(axis=1)).sum())} queries have no match in the gallery, so no rank exists for them; "
            "score only queries whose answer is there"
        )
    ranks, precisions = np.empty(len(scores), np.int64), np.empty(len(scores), np.float64)
    for i, (row, hit) in enumerate(zip(scores, match)):
        positives = np.sort(row[hit])[::-1]
        others = np.sort(row[~hit])
        # others at or above each match, ties included: the pessimistic side
        above = len(others) - np.searchsorted(others, positives - TIE, side="left")
        order = np.arange(1, len(positives) + 1)
        ranks[i] = 1 + above[0]
        precisions[i] = float(np.mean(order / (order + above)))
    return ranks, precisions


def neighbour_overlap(a: ArrayLike, b: ArrayLike, *, k: int = 10) -> NDArray[np.float64]:
    """Per item, the share of its k nearest other items under `a` [N, D] that are also nearest under `b` [N, E].

    k is lowered to N - 1 where there are fewer items. Ties go to the lower index in both spaces.
    """
    x, y = normalize(a), normalize(b)
    if len(x) != len(y) or len(x) < 2:
        raise UsageError(f"neighbours need the same 2 or more items in both spaces, not {len(x)} and {len(y)}")
    k = min(k, len(x) - 1)
    first, second = _nearest(x, k), _nearest(y, k)
    return np.array([len(np.intersect1d(p, q)) / k for p, q in zip(first, second)])


def _nearest(x: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    # rounding merges values that differ by arithmetic noise, so that the stable sort decides them by index
    scores = np.round(x @ x.T, 9)
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def retention(student: dict[str, float], teacher: dict[str, float]) -> dict[str, float | None]:
    """student / teacher for every share both have (R@k, MAP, top-k); None where the teacher scores 0."""
    keys = [k for k in student if k in teacher and ("R@" in k or k.startswith("top-") or k == "MAP")]
    return {k: (student[k] / teacher[k] if teacher[k] > 0 else None) for k in keys}


@dataclass(frozen=True)
class Interval:
    """A difference a - b with its bootstrap interval.

    low, high: two-sided at `confidence`. lower_bound, upper_bound: one-sided at `confidence`; "a is not worse
    than b by more than m" holds when lower_bound >= -m. queries: rows, clusters: independent units resampled.
    """

    difference: float
    low: float
    high: float
    lower_bound: float
    upper_bound: float
    a: float
    b: float
    queries: int
    clusters: int
    confidence: float

    def to_dict(self) -> dict[str, float]:
        return {name: float(getattr(self, name)) for name in self.__dataclass_fields__}


def paired_bootstrap(
    a_hits: ArrayLike,
    b_hits: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a) - mean(b), both measured on the same queries (any per-query number, not only hits).

    a_hits, b_hits: [Q], aligned. clusters: [Q] ids of independent units (the query, when several seeds answered
    the same one; its concept, when several queries share one); whole clusters are resampled, so that pooling
    seeds does not pretend to more evidence than there are queries. Percentile intervals, deterministic in `seed`.
    """
    a, b = np.asarray(a_hits, np.float64).ravel(), np.asarray(b_hits, np.float64).ravel()
    if len(a) != len(b) or len(a) == 0:
        raise UsageError(
            f"a paired comparison needs the same queries on both sides, not {len(a)} and {len(b)}; "
            "align them by query id first"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UsageError("a per-query result is NaN or infinite, so its mean means nothing; find its source")
    if not 0.5 < confidence < 1 or resamples < 100:
        raise UsageError(
            f"confidence {confidence} with {resamples} resamples gives no interval; use 0.5 < confidence < 1 "
            "and at least 100 resamples"
        )
    ids = np.arange(len(a)) if clusters is None else np.unique(np.asarray(clusters).ravel(), return_inverse=True)[1]
    if len(ids) != len(a):
        raise UsageError(f"{len(ids)} cluster ids were given for {len(a)} queries; give one per query")
    units = int(ids.max()) + 1
    totals = np.bincount(ids, weights=a - b, minlength=units)
    sizes = np.bincount(ids, minlength=units).astype(np.float64)
    rng = np.random.Generator(np.random.PCG64(seed))
    means = np.empty(resamples)
    block = max(1, 2_000_000 // units)
    for start in range(0, resamples, block):
        drawn = rng.integers(0, units, size=(min(block, resamples - start), units))
        means[start : start + len(drawn)] = totals[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high, lower, upper = np.quantile(means, [tail, 1 - tail, 1 - confidence, confidence])
    return Interval(
        difference=float(a.mean() - b.mean()),
        low=float(low),
        high=float(high),
        lower_bound=float(lower),
        upper_bound=float(upper),
        a=float(a.mean()),
        b=float(b.mean()),
        queries=len(a),
        clusters=units,
        confidence=confidence,
    )


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.float64]], tuple[float, float]],
    clusters: ArrayLike,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of a - b for two numbers that are no means of per-query results, both computed on the same rows.

    statistic: from row weights [Q] (how often each row was drawn) to (a, b). clusters: [Q] ids of independent units,
    resampled whole. Percentile intervals, deterministic in `seed`. A statistic that is biased upwards in small samples
    (a calibration error, a distance) is more so in resamples; in the difference most of it cancels.
    """
    ids = np.unique(np.asarray(clusters).ravel(), return_inverse=True)[1]
    if len(ids) == 0 or resamples < 100 or not 0.5 < confidence < 1:
        raise UsageError(
            f"{len(ids)} rows with {resamples} resamples at confidence {confidence} give no interval; use at least one "
            "row, 100 resamples, and 0.5 < confidence < 1"
        )
    units = int(ids.max()) + 1
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = np.empty(resamples)
    for place in range(resamples):
        a, b = statistic(np.bincount(rng.integers(0, units, units), minlength=units)[ids].astype(np.float64))
        drawn[place] = a - b
    tail = (1 - confidence) / 2
    low, high, lower, upper = np.quantile(drawn, [tail, 1 - tail, 1 - confidence, confidence])
    a, b = statistic(np.ones(len(ids)))
    return Interval(
        difference=a - b,
        low=float(low),
        high=float(high),
        lower_bound=float(lower),
        upper_bound=float(upper),
        a=a,
        b=b,
        queries=len(ids),
        clusters=units,
        confidence=confidence,
    )
