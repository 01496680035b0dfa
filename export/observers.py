"""Where to cut the range of an activation before it is rounded to 256 steps.

The whole range seen wastes steps on a few loud values; a cut range clips them. Each observer is one way to draw that
line, from a histogram of what calibration inputs gave:

- "minmax": the whole range.
- "percentile": what 99.99 % of the values lie above, to what 99.99 % lie below.
- "mse": of `RATIOS` of the largest magnitude, the cut with the smallest squared error of the rounded values.
- "entropy": of the same cuts, the one whose rounded values are nearest to the values by Kullback-Leibler divergence
  (in the manner of Migacz 2017, "8-bit Inference with TensorRT"; there 128 steps of a symmetric range, here 256 of an
  affine one).

All four give float ranges that hold zero; a backend makes its scale and zero point of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Method = Literal["minmax", "percentile", "mse", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)
BINS = 2048
# cuts that "mse" and "entropy" try, as parts of the largest magnitude
RATIOS = tuple(1.0 - 0.0125 * index for index in range(65))
TAIL = 1e-4
_STEPS = 255


@dataclass(frozen=True)
class Histogram:
    """What was seen of one activation. counts: int64 [BINS] of equal width from low to high."""

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def centres(self) -> NDArray[np.float64]:
        """The middle of each bin."""
        width = (self.high - self.low) / len(self.counts)
        return np.asarray(self.low + (np.arange(len(self.counts)) + 0.5) * width, np.float64)


def range_of(seen: Histogram, method: Method) -> tuple[float, float]:
    """The range [low, high] to round, zero included."""
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if not seen.high > seen.low or method == "minmax":
        return low, high
    if method == "percentile":
        return _percentile(seen)
    cuts = [(max(low, -reach), min(high, reach)) for reach in (ratio * max(-low, high) for ratio in RATIOS)]
    error = _squared_error if method == "mse" else _divergence
    return min(cuts, key=lambda cut: error(seen, *cut))


def _percentile(seen: Histogram) -> tuple[float, float]:
    """The outer edges of the bins that the two quantiles lie in."""
    share = np.cumsum(seen.counts) / seen.counts.sum()
    width = (seen.high - seen.low) / len(seen.counts)
    first = int(np.searchsorted(share, TAIL, side="right"))
    last = int(np.searchsorted(share, 1 - TAIL, side="left"))
    return min(seen.low + first * width, 0.0), max(seen.low + (last + 1) * width, 0.0)


def _grid(values: NDArray[np.float64], low: float, high: float) -> tuple[NDArray[np.float64], float, float]:
    """The step of 0..255 that each value takes, the scale, and the zero point."""
    scale = max((high - low) / _STEPS, 1e-12)
    zero = np.round(-low / scale)
    return np.clip(np.round(values / scale) + zero, 0, _STEPS), scale, zero


def _squared_error(seen: Histogram, low: float, high: float) -> float:
    steps, scale, zero = _grid(seen.centres, low, high)
    return float((seen.counts * ((steps - zero) * scale - seen.centres) ** 2).sum())


def _divergence(seen: Histogram, low: float, high: float) -> float:
    """KL(P || Q) in nats: P the bins within the cut with what lies outside added to the outermost ones; Q the same bins
    without it, each step's sum spread over those of its bins that P has.

    The bin of zero counts in neither: zero is on every grid, and the many zeros behind a ReLU, spread over a step,
    would drown all else.
    """
    centres, counts = seen.centres, seen.counts.astype(np.float64)
    counts[np.abs(centres) <= 0.5001 * (seen.high - seen.low) / len(counts)] = 0.0
    within = np.flatnonzero((centres >= low) & (centres <= high))
    if not counts[within].any():
        return float("inf")
    own = counts[within]
    target = own.copy()
    target[0] += counts[: within[0]].sum()
    target[-1] += counts[within[-1] + 1 :].sum()
    steps = _grid(centres[within], low, high)[0].astype(np.int64)
    present = target > 0
    sums = np.bincount(steps, own, _STEPS + 1)
    bins = np.bincount(steps, present, _STEPS + 1)
    spread = (sums / np.maximum(bins, 1))[steps]
    p, q = target[present] / target.sum(), spread[present] / own.sum()
    return float((p * np.log(p / np.maximum(q, 1e-12))).sum())
