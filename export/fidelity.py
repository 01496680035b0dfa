"""How faithful a quantized candidate is to its float tower on inputs it was not calibrated with, and which to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketvlm.export.precision import floor_of

# floors for int8 on real data (shared with the parity check), and what a few dozen held-out rows must show for a
# scheme to be taken without a look at the next one: their 1st percentile is little more than their worst row, and on
# EfficientNet-Lite0 .993 of 48 rows went with .977 of 400
FLOOR_MEAN, FLOOR_P1 = 0.99, 0.98
_COMFORT_MEAN, _COMFORT_P1 = 0.997, 0.995


@dataclass(frozen=True)
class Fidelity:
    """Cosine of quantized against float32 rows on pictures or texts that were not used for calibration."""

    mean: float
    p1: float
    minimum: float
    cases: int

    @property
    def comfortable(self) -> bool:
        """Far enough above the floors that no other scheme needs to be tried."""
        return self.mean >= _COMFORT_MEAN and self.p1 >= _COMFORT_P1

    @property
    def meets_floor(self) -> bool:
        return self.mean >= FLOOR_MEAN and self.p1 >= FLOOR_P1

    def notes(self, precision: str = "int8") -> dict[str, object]:
        """For `Variant.notes`; `meets_floor` is False where the parity check must be expected to fail."""
        floor = floor_of(precision)
        return {
            "held_out_cosine_mean": round(self.mean, 6),
            "held_out_cosine_p1": round(self.p1, 6),
            "held_out_cases": self.cases,
            "meets_floor": self.mean >= floor.mean and self.p1 >= floor.p1 and self.minimum >= floor.minimum,
        }


def fidelity(found: NDArray[Any], expected: NDArray[Any]) -> Fidelity:
    """Row-wise cosine of two [n, D] arrays; a row that is not finite counts as -1."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    cosine = np.where(np.isfinite(cosine), cosine, -1.0)
    return Fidelity(float(cosine.mean()), float(np.percentile(cosine, 1)), float(cosine.min()), len(cosine))


T = TypeVar("T")


@dataclass(frozen=True)
class Scheme(Generic[T]):
    """A way to quantize. make: builds the candidate. last_resort: only for when nothing else meets the floor, because
    it leaves much of the tower in float (or, for transformers, rarely helps)."""

    name: str
    make: Callable[[], T]
    last_resort: bool = False


def choose_scheme(
    schemes: Sequence[Scheme[T]], run: Callable[[T], NDArray[Any]], expected: NDArray[Any]
) -> tuple[T, Scheme[T], dict[str, object]]:
    """Try schemes in order until one is comfortably faithful; else take the one with the best 1st percentile.

    run: the candidate's rows for the held-out inputs. expected: the float rows.

    Returns:
        The candidate, its scheme, and notes for `Variant.notes`.
    """
    tried: list[tuple[Fidelity, Scheme[T], T]] = []
    for scheme in schemes:
        if scheme.last_resort and any(result.meets_floor for result, _, _ in tried):
            continue
        candidate = scheme.make()
        result = fidelity(run(candidate), expected)
        tried.append((result, scheme, candidate))
        if result.comfortable:
            break
    result, scheme, candidate = max(tried, key=lambda entry: (entry[0].comfortable, entry[0].p1))
    notes = {"scheme": scheme.name, **result.notes(), "tried": [entry.name for _, entry, _ in tried]}
    return candidate, scheme, notes


def split_calibration(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Three quarters to calibrate with, one quarter (at least one row) to judge the result on."""
    held = np.arange(len(rows)) % 4 == 3
    if not held.any():
        return rows, rows
    return rows[~held], rows[held]


@torch.no_grad()
def run_module(module: Callable[[Tensor], Tensor], rows: NDArray[Any], batch: int = 32) -> NDArray[np.float32]:
    """Eager forward over [n, ...] rows in batches; float32 [n, D]."""
    parts = [module(torch.from_numpy(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    return torch.cat(parts).float().numpy()
