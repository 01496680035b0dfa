"""What recall does not show: hubs, the gap between the modalities, calibration, and how neighbours drift. numpy only.

Functions that take `weights` give the statistic of a resampled set of rows (row i counted weights[i] times), which is
what `metrics.bootstrap_statistic` needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketvlm.distill.metrics import TIE, normalize
from pocketvlm.edge.errors import UsageError

HUB_K = 10
"""Nearest gallery items of a query that are counted for hubness (the paper's usual k)."""
BINS = 15
"""Bins of the expected calibration error, as in Guo et al. 2017."""
NEIGHBOUR_TEMPERATURE = 0.1
"""Temperature of `neighbour_divergence`; a choice of ours, the same for both models."""

Float = NDArray[np.float64]


def nearest(queries: ArrayLike, gallery: ArrayLike, *, k: int = HUB_K, chunk: int = 1024) -> NDArray[np.int64]:
    """int64 [Q, min(k, M)]: the gallery rows [M, D] with the highest cosine for each query [Q, D], ties by index."""
    q, g = normalize(queries, what="query embeddings"), normalize(gallery, what="gallery embeddings")
    k = min(k, len(g))
    # rounding merges what differs by arithmetic noise, so that the stable sort decides it by index
    rows = [
        np.argsort(-np.round(q[start : start + chunk] @ g.T, 9), axis=1, kind="stable")[:, :k]
        for start in range(0, len(q), chunk)
    ]
    return np.concatenate(rows) if rows else np.zeros((0, k), np.int64)


def occurrences(found: NDArray[np.int64], gallery: int, weights: Float | None = None) -> Float:
    """float64 [M]: N_k, how many queries have each gallery item among their k nearest. found: [Q, k] of `nearest`."""
    counted = None if weights is None else np.repeat(weights, found.shape[1])
    return np.bincount(found.ravel(), weights=counted, minlength=gallery).astype(np.float64)


def skewness(counts: ArrayLike) -> float:
    """Third standardised moment E[(N - mean)^3] / sd^3 with the population's moments; 0 where all are equal.

    The hubness S_{N_k} of Radovanović, Nanopoulos and Ivanović (JMLR 2010, section 2.2) when `counts` is N_k: 0 for no
    hubs, the more positive the more a few items are everybody's neighbour. The paper takes neighbours within one set;
    here queries are of one modality and the gallery is of the other.
    """
    n = np.asarray(counts, np.float64)
    spread = n.std()
    return float(np.mean(((n - n.mean()) / spread) ** 3)) if spread > 1e-12 else 0.0


def modality_gap(images: ArrayLike, texts: ArrayLike, weights: Float | None = None) -> tuple[float, float]:
    """(length of the gap, mean cosine of the pairs) of paired embeddings, both [P, D].

    The gap of Liang et al. 2022 (Mind the Gap, section 2.1): the Euclidean distance between the mean of the normalised
    image embeddings and the mean of the normalised text embeddings, from 0 to 2.
    """
    x, y = normalize(images, what="image embeddings"), normalize(texts, what="text embeddings")
    if x.shape != y.shape or len(x) == 0:
        raise UsageError(
            f"images {x.shape} and texts {y.shape} are no pairs, so there is no gap between them; "
            "give one text row per image row, at least one"
        )
    w = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    return float(np.linalg.norm(w @ (x - y))), float(w @ (x * y).sum(axis=1))


def confidences(queries: ArrayLike, gallery: ArrayLike, scale: float, *, chunk: int = 1024) -> Float:
    """float64 [Q]: the highest probability of softmax(scale * cosine) over the gallery [M, D], per query [Q, D].

    scale: the model's own logit scale, the multiplier (not its logarithm). A bias common to all pairs, as SigLIP has,
    changes nothing.
    """
    if not np.isfinite(scale) or scale <= 0:
        raise UsageError(f"a logit scale of {scale} makes no probabilities; it must be a positive number")
    q, g = normalize(queries, what="query embeddings"), normalize(gallery, what="gallery embeddings")
    best = []
    for start in range(0, len(q), chunk):
        logits = scale * (q[start : start + chunk] @ g.T)
        best.append(1 / np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    return np.concatenate(best) if best else np.zeros(0)


def calibration_error(
    confidence: ArrayLike,
    right: ArrayLike,
    weights: Float | None = None,
    *,
    bins: int = BINS,
    equal_mass: bool = False,
) -> float:
    """Expected calibration error: the mean over bins of |accuracy - mean confidence|, weighted by the bins' sizes.

    Guo et al. 2017, equation 3. Equal-width bins are (i / bins, (i + 1) / bins]; equal-mass bins hold as near to the
    same number of queries as division allows, in order of confidence (Nguyen and O'Connor 2015).

    Args:
        confidence: [Q], the probability of the answer given, in 0..1. right: [Q], whether it was the right one.
    """
    p, r = np.asarray(confidence, np.float64).ravel(), np.asarray(right, np.float64).ravel()
    if len(p) != len(r) or len(p) == 0 or not ((p >= 0) & (p <= 1 + TIE)).all():
        raise UsageError(
            f"{len(p)} confidences with {len(r)} answers cannot be calibrated; give at least one probability, each "
            "with whether its answer was right"
        )
    w = np.ones(len(p)) if weights is None else weights
    if equal_mass:
        place = np.empty(len(p), np.int64)
        place[np.argsort(p, kind="stable")] = np.arange(len(p)) * min(bins, len(p)) // len(p)
    else:
        place = np.clip(np.ceil(p * bins).astype(np.int64) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(place, weights=w * (r - p), minlength=bins)).sum() / w.sum())


def neighbour_divergence(
    teacher: ArrayLike, student: ArrayLike, *, temperature: float = NEIGHBOUR_TEMPERATURE, chunk: int = 1024
) -> Float:
    """Per item, KL(teacher || student) in nats between the two models' distributions over the other items.

    The distribution of item i is softmax_j(cos(i, j) / temperature) over j != i, in each model's own space, so widths
    may differ: stochastic neighbours (Hinton and Roweis 2002) with cosines instead of squared distances. The
    expectation is over the teacher's neighbours: a student that loses one of them pays, one that adds some pays less.

    Args:
        teacher: [N, D]. student: [N, E], the same N >= 2 items. temperature: of both.
    """
    a, b = normalize(teacher), normalize(student)
    if len(a) != len(b) or len(a) < 2:
        raise UsageError(f"neighbours need the same 2 or more items in both spaces, not {len(a)} and {len(b)}")
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} makes no distribution of neighbours; it must be above 0")
    found = []
    for start in range(0, len(a), chunk):
        p, q = (_log_softmax_others(x[start : start + chunk] @ x.T / temperature, start) for x in (a, b))
        keep = np.isfinite(p)
        terms = np.exp(p, where=keep, out=np.zeros_like(p)) * np.subtract(p, q, where=keep, out=np.zeros_like(p))
        found.append(terms.sum(axis=1))
    return np.concatenate(found)


def _log_softmax_others(scores: Float, start: int) -> Float:
    rows = np.arange(len(scores))
    scores[rows, start + rows] = -np.inf
    top = scores.max(axis=1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=1, keepdims=True))


def rank_variances(ranks: ArrayLike) -> Float:
    """Per query, the variance of its rank over languages; its mean is the Mean Rank Variance.

    ranks: [Q, L], the rank of the right answer of query q when asked in language l. Population variance (division by
    L); 0 when every language finds the answer at the same place (Nie et al. 2024, "1-to-K contrastive learning").
    """
    value: NDArray[Any] = np.asarray(ranks, np.float64)
    return value.var(axis=1)
