"""Retrieval on the test concepts of a fold, by whatever computes the embeddings: for benchmarks of quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data import open_data
from pocketvlm.export.compare import row_error, target_ranks
from pocketvlm.export.reference import task_inputs
from pocketvlm.export.subject import open_subject

K = 5
Rows = NDArray[Any]


@dataclass(frozen=True)
class HeldOut:
    """Test pictures and the gallery of their captions. rows: tower -> the graph's inputs. positives: bool [n, m]."""

    uids: list[str]
    texts: list[str]
    rows: dict[str, Rows]
    positives: NDArray[np.bool_]

    def hits(self, embeddings: dict[str, Rows]) -> dict[str, NDArray[np.bool_]]:
        """Direction -> whether each query finds a match among its first five."""
        scores = embeddings["image"].astype(np.float64) @ embeddings["text"].astype(np.float64).T
        return {
            "image-to-text": target_ranks(scores, self.positives) <= K,
            "text-to-image": target_ranks(scores.T.copy(), self.positives.T.copy()) <= K,
        }


def held_out(run: Path, fold: int) -> HeldOut:
    """The test pool of a fold, as the inputs of this run's student."""
    data = open_data(f"openmoji?pool=test&fold={fold}&flags=exclude")
    found = task_inputs(list(data), open_subject(run), limit=10_000, seed=0)
    positives = np.zeros((len(found["uids"]), len(found["texts"])), bool)
    for row, columns in enumerate(found["positives"]):
        positives[row, columns] = True
    return HeldOut(found["uids"], found["texts"], {"image": found["pixels"], "text": found["ids"]}, positives)


def changes(before: dict[str, NDArray[np.bool_]], after: dict[str, NDArray[np.bool_]]) -> dict[str, str]:
    """Direction -> a character per query: "-" lost, "+" gained, "." the same."""
    return {
        direction: "".join("." if a == b else "-" if a else "+" for a, b in zip(before[direction], after[direction]))
        for direction in before
    }


def distance(reference: Rows, rows: Rows) -> dict[str, float]:
    """Mean and 99th percentile of 1 - cosine."""
    error = row_error(reference, rows)
    return {"mean": float(f"{error.mean():.4g}"), "p99": float(f"{np.percentile(error, 99):.4g}")}
