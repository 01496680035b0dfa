"""What a run measures of itself: speed, the wait for data, memory, the time that is left, and how each loss moves."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

WINDOW = 50
"""Steps over which speed, data wait and time left are averaged; a change of phase begins anew."""
TREND = 100
"""Values of a loss term that its mean and trend are taken of."""


class Term(NamedTuple):
    """A loss term. last: of the last step. mean: over the last `TREND` steps. change: of the newer half's mean against
    the older half's, as a share of the older; None while it is within two standard errors, or too few steps tell."""

    name: str
    last: float
    mean: float
    change: float | None


class Meter:
    """Moving averages over the last steps of a run, from `time.monotonic`, which no clock change moves.

    total: steps of the run. done: steps before this process. elapsed: seconds trained before it. cuda: whether to read
    the device's memory.
    """

    def __init__(self, total: int, done: int = 0, *, elapsed: float = 0.0, cuda: bool = False) -> None:
        self.total, self.step, self.phase, self.cuda = total, done, "", cuda
        self._began = time.monotonic() - elapsed
        self._ends: deque[float] = deque(maxlen=WINDOW + 1)
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=WINDOW)
        self._terms: dict[str, deque[float]] = {}

    def measure(self, row: Mapping[str, Any], *, samples: int, waited: float, taken: float) -> dict[str, float]:
        """Count a step, and return what to add to its row of metrics.jsonl.

        row: of `Trainer.one_step` ("step", "phase", "loss", "loss/..."). samples: in the step, over all ranks.
        waited: seconds of it that went by before the batch was there. taken: seconds of it, with the wait.

        samples_per_s, data_wait_s and step_s are of this step, data_wait_share (0..1) of the last `WINDOW`; elapsed_s
        counts from the run's first step, without the time between a stop and a resume; rss_mb, cuda_max_mb (10^6
        bytes) are the process's memory now (outside Linux: its peak) and the most that the device had allocated.
        """
        now = time.monotonic()
        if row["phase"] != self.phase:
            self.phase = row["phase"]
            for window in (self._ends, self._steps, self._terms):
                window.clear()
        if not self._ends:
            self._ends.append(now - taken)
        self.step = int(row["step"])
        self._ends.append(now)
        self._steps.append((samples, waited, taken))
        for name, value in row.items():
            if name.startswith("loss"):
                self._terms.setdefault(name, deque(maxlen=TREND)).append(value)
        found = {
            "samples_per_s": samples / max(taken, 1e-9),
            "data_wait_s": waited,
            "step_s": taken,
            "data_wait_share": self.data_wait_share,
            "elapsed_s": round(now - self._began, 3),
        }
        return found | memory_mb(self.cuda)

    @property
    def samples_per_s(self) -> float:
        """Over the last steps, without evaluations and checkpoints."""
        return sum(s for s, _, _ in self._steps) / max(sum(t for _, _, t in self._steps), 1e-9)

    @property
    def data_wait_share(self) -> float:
        """Share of the last steps' time, in 0..1, in which nothing was there to train on."""
        return sum(w for _, w, _ in self._steps) / max(sum(t for _, _, t in self._steps), 1e-9)

    @property
    def left_s(self) -> float:
        """Seconds to the end if the remaining steps are like the last ones, with evaluations and checkpoints."""
        if len(self._ends) < 2:
            return math.nan
        return (self.total - self.step) * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)

    def terms(self) -> list[Term]:
        """Every loss of this phase, "loss" first, then its terms in the order in which they were first seen."""
        return [Term(name.removeprefix("loss/"), values[-1], *_moved(values)) for name, values in self._terms.items()]


def _moved(values: deque[float]) -> tuple[float, float | None]:
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return math.nan, None
    mean = sum(found) / len(found)
    half = len(found) // 2
    if half < 8:
        return mean, None
    old, new = found[:half], found[half:]
    (a, error_a), (b, error_b) = _mean_and_error(old), _mean_and_error(new)
    clear = abs(b - a) > 2 * math.hypot(error_a, error_b) and a != 0
    return mean, (b - a) / abs(a) if clear else None


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def memory_mb(cuda: bool) -> dict[str, float]:
    """rss_mb of this process and, with cuda, cuda_max_mb of its device; empty where the system does not tell."""
    found = {}
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found["rss_mb"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    except (OSError, ValueError):
        try:
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found["rss_mb"] = round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
        except ImportError:
            pass
    if cuda:
        import torch

        found["cuda_max_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return found
