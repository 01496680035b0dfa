"""The vocabulary of precisions: what each name promises on every target, and how close to the float model it must be.

A target maps a name to the best means that it has, or refuses it; `docs/export.md` has the table. The limits are those
of the parity check (`budgets.json`), so that an export warns of what parity would fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from pocketvlm.export.budgets import load_budgets

Precision = Literal[
    "fp32", "fp16", "w8", "palette8", "mixed", "w8a8-dynamic", "w8a8-static", "int8", "palette6", "w4", "palette4"
]
PRECISIONS: tuple[str, ...] = get_args(Precision)
# set on real inputs; the others need none, and use what they are given to be judged by
CALIBRATED = frozenset({"int8", "mixed", "w8a8-static"})


@dataclass(frozen=True)
class Floor:
    """What the cosines of real inputs must reach: their mean, their 1st percentile, and the least of them."""

    mean: float
    p1: float
    minimum: float


@cache
def floor_of(precision: str) -> Floor:
    """The floor of a precision, from the shipped budgets; a limit that they do not have is -1.

    Raises:
        UnknownNameError: no such precision.
    """
    metrics = load_budgets().for_precision(precision).metrics

    def at_least(name: str) -> float:
        return 1.0 - metrics[name].value if name in metrics else -1.0

    return Floor(at_least("one_minus_cosine_mean"), at_least("one_minus_cosine_p99"), at_least("one_minus_cosine_max"))
