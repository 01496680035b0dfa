"""How two sets of embeddings, and the rankings made from them, differ. numpy only, float64 inside.

Three kinds of measure, because each alone has let a broken model through: direction (cosine), size of the
error (SQNR, max abs, norm ratio), and consequence (flips, recall, overlap of the top ten). Nothing here
replaces a NaN or an Inf: a non-finite value is counted and makes every measure of its tensor NaN, and
`export.budgets.judge` treats NaN as a failure.

Error units: where a larger value is better (dB, agreement) the docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import UsageError

# two equal tensors have no error; a finite ceiling keeps the JSON plain and is far above float64's own limit
IDENTICAL_DB = 300.0
# components below a tenth of the row's rms would turn harmless rounding into huge ratios
RELATIVE_GUARD = 0.1
ONE_SIDED_95 = 1.6448536269514722

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Drift:
    """Difference between reference rows and candidate rows, both [rows, dim].

    one_minus_cosine_*: mean, 99th percentile and maximum over rows; cosine_*: the same as mean, 1st percentile,
    minimum. sqnr_db: 10 log10(sum ref^2 / sum (ref - cand)^2) over all rows, and of the worst row (larger is
    better, capped at 300). max_abs: largest component difference. max_rel: largest
    |ref - cand| / max(|ref|, 0.1 rms(row)). norm_ratio_*: |cand| / |ref|. norm_error: max |norm ratio - 1|.
    non_finite: number of NaN or Inf components in the candidate. worst: index of the row of lowest cosine.
    """

    rows: int
    one_minus_cosine_mean: float
    one_minus_cosine_p99: float
    one_minus_cosine_max: float
    cosine_mean: float
    cosine_p1: float
    cosine_min: float
    sqnr_db: float
    sqnr_db_min: float
    max_abs: float
    max_rel: float
    norm_ratio_min: float
    norm_ratio_max: float
    norm_error: float
    non_finite: int
    worst: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain JSON types; NaN becomes None, because JSON has no NaN."""
        return {key: plain(value) for key, value in asdict(self).items()}


def plain(value: Any) -> Any:
    """`value` for JSON: NaN and Inf become None, numpy scalars become Python numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def finite(value: Any) -> Any:
    """`plain`, through nested mappings and lists: the result is valid JSON."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return plain(value)


def _pair(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[Array, Array]:
    ref, cand = np.asarray(reference, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if ref.ndim != 2 or ref.shape != cand.shape or ref.shape[0] == 0:
        raise UsageError(
            f"reference has shape {list(ref.shape)} and candidate {list(cand.shape)}, but both must be the same "
            "non-empty [rows, dim]; nothing can be compared, so check the embedding width and the case set"
        )
    if not np.isfinite(ref).all():
        raise UsageError("the reference holds NaN or Inf, so no candidate could be judged; record it again")
    return ref, cand


def row_error(reference: NDArray[Any], candidate: NDArray[Any]) -> Array:
    """1 - cosine of every row, [rows]. Computed as |u - v|^2 / 2 of the unit rows, which does not cancel near 0.

    A row of zeros has no direction: its error is 1 unless both rows are zero. A non-finite row gives NaN.
    """
    ref, cand = _pair(reference, candidate)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        ref_norm, cand_norm = np.linalg.norm(ref, axis=1), np.linalg.norm(cand, axis=1)
        unit_ref = ref / np.where(ref_norm > 0, ref_norm, 1.0)[:, None]
        unit_cand = cand / np.where(cand_norm > 0, cand_norm, 1.0)[:, None]
        error = 0.5 * np.square(unit_ref - unit_cand).sum(axis=1)
    one_zero = (ref_norm == 0) != (cand_norm == 0)
    return np.where(one_zero, 1.0, error)


def _decibel(signal: Array, noise: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 10.0 * np.log10(np.where(signal > 0, signal, np.finfo(np.float64).tiny) / noise)
    return np.where(noise == 0, IDENTICAL_DB, np.minimum(value, IDENTICAL_DB))


def drift(reference: NDArray[Any], candidate: NDArray[Any]) -> Drift:
    """Compare rows of embeddings.

    Args:
        reference: [rows, dim], finite. candidate: the same shape, any float dtype.

    Raises:
        UsageError: empty or differently shaped inputs, or a reference that is not finite.
    """
    ref, cand = _pair(reference, candidate)
    non_finite = int((~np.isfinite(cand)).sum())
    error = row_error(ref, cand)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = np.abs(ref - cand)
        power, noise = np.square(ref).sum(axis=1), np.square(difference).sum(axis=1)
        rms = np.sqrt(np.mean(np.square(ref), axis=1, keepdims=True))
        guarded = np.maximum(np.maximum(np.abs(ref), RELATIVE_GUARD * rms), np.finfo(np.float64).tiny)
        ratio = np.linalg.norm(cand, axis=1) / np.maximum(np.linalg.norm(ref, axis=1), np.finfo(np.float64).tiny)
        values = {
            "one_minus_cosine_mean": error.mean(),
            "one_minus_cosine_p99": np.quantile(error, 0.99, method="higher"),
            "one_minus_cosine_max": error.max(),
            "cosine_mean": 1.0 - error.mean(),
            "cosine_p1": 1.0 - np.quantile(error, 0.99, method="higher"),
            "cosine_min": 1.0 - error.max(),
            "sqnr_db": _decibel(power.sum(), noise.sum()),
            "sqnr_db_min": _decibel(power, noise).min(),
            "max_abs": difference.max(),
            "max_rel": (difference / guarded).max(),
            "norm_ratio_min": ratio.min(),
            "norm_ratio_max": ratio.max(),
            "norm_error": np.abs(ratio - 1.0).max(),
        }
    numbers = {key: math.nan if non_finite else float(value) for key, value in values.items()}
    worst = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
    return Drift(rows=len(ref), non_finite=non_finite, worst=worst, **numbers)


# --- rankings -------------------------------------------------------------------------------------------------


def target_ranks(scores: Array, positives: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Rank (1 = first) of each query's best positive, ties counted against it, so a collapsed model ranks last.

    Args:
        scores: [queries, gallery]. positives: bool of the same shape, at least one True in every row.
    """
    return _rank_bounds(scores, positives, 0.0)[1]


def _rank_bounds(
    scores: Array, positives: NDArray[np.bool_], tie: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    best = np.where(positives, scores, -np.inf).max(axis=1, keepdims=True)
    others = np.where(positives, -np.inf, scores)
    low = 1 + (others > best + tie).sum(axis=1)
    high = 1 + (others >= best - tie).sum(axis=1)
    return low.astype(np.int64), high.astype(np.int64)


@dataclass(frozen=True)
class Flip:
    """One query whose first result changed. margin: the reference's score of its own first result minus its score
    of the candidate's first result (>= 0); near_tie: the margin is within the tie width."""

    query: int
    reference: int
    candidate: int
    margin: float
    near_tie: bool


def top_one_flips(reference: Array, candidate: Array, tie: float) -> list[Flip]:
    """Queries whose first result differs. Scores are [queries, gallery]; `tie` is in units of the score."""
    first, other = reference.argmax(axis=1), candidate.argmax(axis=1)
    flips = []
    for query in np.flatnonzero(first != other):
        margin = float(reference[query, first[query]] - reference[query, other[query]])
        flips.append(Flip(int(query), int(first[query]), int(other[query]), margin, margin <= tie))
    return flips


def top_k(scores: Array, k: int) -> NDArray[np.int64]:
    """Indices of the k largest scores per row, best first; equal scores in gallery order."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int64)


def top_k_overlap(reference: Array, candidate: Array, k: int, tie: float) -> Array:
    """Share of the candidate's first k that belongs there, per query, [queries].

    An item belongs if the reference scores it no more than `tie` below its own k-th score.
    """
    k = min(k, reference.shape[1])
    cut = -np.partition(-reference, k - 1, axis=1)[:, k - 1 : k]
    chosen = top_k(candidate, k)
    return (np.take_along_axis(reference, chosen, axis=1) >= cut - tie).mean(axis=1)


def _average_ranks(scores: Array) -> Array:
    ranks = np.empty_like(scores)
    for row, out in zip(scores, ranks):
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        out[:] = (ends - (counts - 1) / 2.0)[inverse]
    return ranks


def spearman_rows(reference: Array, candidate: Array) -> Array:
    """Spearman rank correlation of every row of two score matrices (average ranks for ties), [queries].

    A constant row has no order: its correlation is 0 unless both rows are constant (then 1).
    """
    a, b = _average_ranks(reference), _average_ranks(candidate)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm_a, norm_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    product = np.where(norm_a * norm_b > 0, norm_a * norm_b, 1.0)
    value = (a * b).sum(axis=1) / product
    return np.where((norm_a == 0) & (norm_b == 0), 1.0, value)


# --- paired task change -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedChange:
    """Hits lost and gained between reference and candidate over the same queries; fractions, not percent.

    loss: (lost - gained) / queries. bound: one-sided 95 % upper bound of the loss; floor: the lower one (both
    Tango's score bound, which stays honest when nothing or almost nothing changed; a bootstrap would then report
    a width of zero). interval: 95 % paired bootstrap interval of the loss. mcnemar_p: exact two-sided p-value.
    """

    queries: int
    lost: int
    gained: int
    loss: float
    bound: float
    floor: float
    interval: tuple[float, float]
    mcnemar_p: float


def tango_bound(lost: int, gained: int, queries: int, z: float = ONE_SIDED_95) -> float:
    """Upper score bound of the paired loss (lost - gained) / queries.

    Tango, Statistics in Medicine 17 (1998) 891-908, eq. 8: the largest d for which the score statistic
    (lost - gained - n d) / sqrt(n (2 q + d (1 - d))) is at least -z, with q the restricted maximum-likelihood
    estimate of the smaller discordant probability under loss = d.
    """

    def statistic(d: float) -> float:
        a = 2.0 * queries
        b = -lost - gained + (2.0 * queries - lost + gained) * d
        c = -gained * d * (1.0 - d)
        q = (math.sqrt(max(b * b - 4.0 * a * c, 0.0)) - b) / (2.0 * a)
        variance = queries * (2.0 * q + d * (1.0 - d))
        difference = lost - gained - queries * d
        if variance <= 0:
            return 0.0 if difference == 0 else math.copysign(math.inf, difference)
        return difference / math.sqrt(variance)

    low, high = (lost - gained) / queries, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if statistic(middle) >= -z:
            low = middle
        else:
            high = middle
    return high


def queries_needed(budget: float, z: float = ONE_SIDED_95) -> int:
    """Fewest queries at which a candidate that changes nothing at all stays within `budget` (a fraction) by its bound.

    With no discordant pair Tango's bound is z^2 / (n + z^2); fewer queries cannot decide the question either way.
    """
    if not 0 < budget < 1:
        raise UsageError(f"a task budget of {budget} is not between 0 and 1, so no number of queries can decide it")
    return math.ceil(z * z * (1.0 / budget - 1.0) - 1e-9)


def _mcnemar(lost: int, gained: int) -> float:
    total, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, i) for i in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**total))


def paired_change(lost: int, gained: int, queries: int, *, seed: int = 0, resamples: int = 4000) -> PairedChange:
    """All the numbers about one paired change. Counting suffices: hits are 0 or 1, so resampling queries with
    replacement is a multinomial draw of (lost, gained, unchanged)."""
    if queries < 1 or lost < 0 or gained < 0 or lost + gained > queries:
        raise UsageError(f"{lost} lost and {gained} gained of {queries} queries is not a paired comparison")
    draws = np.random.default_rng(seed).multinomial(
        queries, [lost / queries, gained / queries, 1.0 - (lost + gained) / queries], size=resamples
    )
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / queries, [0.025, 0.975])
    return PairedChange(
        queries=queries,
        lost=lost,
        gained=gained,
        loss=(lost - gained) / queries,
        bound=tango_bound(lost, gained, queries),
        floor=-tango_bound(gained, lost, queries),
        interval=(float(low), float(high)),
        mcnemar_p=_mcnemar(lost, gained),
    )


@dataclass(frozen=True)
class RankingChange:
    """What happened to one retrieval direction. `recall_*` are fractions by k; `hard_changes` counts queries whose
    hit at some k changed although no near tie explains it; `top1_agreement` forgives near ties (larger is better)."""

    queries: int
    gallery: int
    tie: float
    recall_reference: dict[int, float]
    recall_candidate: dict[int, float]
    changes: dict[int, PairedChange]
    hard_changes: int
    top1_agreement: float
    flips: list[Flip]
    top10_overlap: float
    overlap_rows: Array
    spearman: float
    ranks_reference: NDArray[np.int64]
    ranks_candidate: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-query arrays, in plain JSON types."""
        return {
            "queries": self.queries,
            "gallery": self.gallery,
            "tie": plain(self.tie),
            "recall_reference": {str(k): plain(v) for k, v in self.recall_reference.items()},
            "recall_candidate": {str(k): plain(v) for k, v in self.recall_candidate.items()},
            "changes": {str(k): asdict(v) for k, v in self.changes.items()},
            "hard_changes": self.hard_changes,
            "top1_agreement": plain(self.top1_agreement),
            "flips": len(self.flips),
            "near_tie_flips": sum(flip.near_tie for flip in self.flips),
            "top10_overlap": plain(self.top10_overlap),
            "spearman": plain(self.spearman),
        }


def ranking_change(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    positives: NDArray[np.bool_],
    *,
    tie: float,
    ks: Sequence[int] = (1, 5, 10),
) -> RankingChange:
    """Compare two score matrices [queries, gallery] over the same queries and gallery.

    Args:
        positives: bool [queries, gallery]; at least one True in every row.
        tie: width, in units of the score, within which the reference itself cannot tell two results apart.

    Raises:
        UsageError: differently shaped or empty matrices, a query without a positive, a non-finite score.
    """
    ref, cand = _pair(reference, candidate)
    if positives.shape != ref.shape or not positives.any(axis=1).all():
        raise UsageError("every query needs at least one positive in the gallery, else its recall has no meaning")
    if not np.isfinite(cand).all():
        raise UsageError("the candidate's scores hold NaN or Inf, so its results have no order")
    ranks_ref, ranks_cand = target_ranks(ref, positives), target_ranks(cand, positives)
    low, high = _rank_bounds(ref, positives, tie)
    unexplained = (ranks_cand < low) | (ranks_cand > high)
    changes: dict[int, PairedChange] = {}
    hard = np.zeros(len(ref), dtype=bool)
    for k in ks:
        hit_ref, hit_cand = ranks_ref <= k, ranks_cand <= k
        changes[k] = paired_change(int((hit_ref & ~hit_cand).sum()), int((~hit_ref & hit_cand).sum()), len(ref))
        hard |= (hit_ref != hit_cand) & unexplained
    flips = top_one_flips(ref, cand, tie)
    overlap = top_k_overlap(ref, cand, 10, tie)
    return RankingChange(
        queries=ref.shape[0],
        gallery=ref.shape[1],
        tie=tie,
        recall_reference={k: float((ranks_ref <= k).mean()) for k in ks},
        recall_candidate={k: float((ranks_cand <= k).mean()) for k in ks},
        changes=changes,
        hard_changes=int(hard.sum()),
        top1_agreement=1.0 - sum(not flip.near_tie for flip in flips) / len(ref),
        flips=flips,
        top10_overlap=float(overlap.mean()),
        overlap_rows=overlap,
        spearman=float(spearman_rows(ref, cand).mean()),
        ranks_reference=ranks_ref,
        ranks_candidate=ranks_cand,
    )


def expected_calibration_error(scores: Array, target: NDArray[np.int64], scale: float, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy of the softmax over `scale * scores`, weighted by bin size, 0..1.

    Args:
        scores: cosines [queries, classes]. target: class index [queries]. scale: the contract's logit scale.
    """
    logits = scale * (scores - scores.max(axis=1, keepdims=True))
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = shares.max(axis=1), scores.argmax(axis=1) == target
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].sum() - right[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(scores))


def mean_margin(scores: Array) -> float:
    """Mean distance between the best and the second-best score of a row, in units of the score."""
    best = np.partition(scores, scores.shape[1] - 2, axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).mean())
