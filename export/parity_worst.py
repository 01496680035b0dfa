"""The cases to look at first: pictures whose first result changed, and those that moved the farthest."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.bundle import BundleVariant
from pocketvlm.export.budgets import PrecisionBudgets
from pocketvlm.export.compare import RankingChange, row_error, top_k
from pocketvlm.export.parity_stages import Outputs, prefix
from pocketvlm.export.reference_run import ReferenceRun

SHOWN, RESULTS = 6, 5


@dataclass
class Result:
    """One result of a picture query. score: cosine. right: it is a correct text. tie: the reference scores it within
    the tie width of its neighbour in the list, so its place means nothing."""

    text: str
    score: float
    right: bool
    tie: bool = False


@dataclass
class Worst:
    """One picture. why: what is remarkable. error: 1 - cosine. reference, candidate: the first texts of each.

    margin: the reference's score difference between its first result and the candidate's (0 if both agree).
    """

    name: str
    why: str
    error: float
    margin: float
    near_tie: bool
    reference: list[Result]
    candidate: list[Result]
    pixels: NDArray[np.uint8] | None = field(repr=False)

    @property
    def picture(self) -> str:
        """The model's input as a data: URL; empty where the report was read back from JSON, which has no pictures."""
        if self.pixels is None:
            return ""
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "why": self.why,
            "error": self.error,
            "margin": self.margin,
            "near_tie": self.near_tie,
            "reference": [vars(result) for result in self.reference],
            "candidate": [vars(result) for result in self.candidate],
        }


def worst_cases(
    outputs: Outputs,
    variant: BundleVariant,
    reference: ReferenceRun,
    changes: dict[str, RankingChange],
    budgets: PrecisionBudgets,
) -> list[Worst]:
    """Up to `SHOWN` pictures: flips with the widest margin, then the largest errors; near ties come last."""
    task, tie = reference.task, budgets.tie_width(reference.noise)
    image, text = prefix(task.image, variant.dim), prefix(task.text, variant.dim)
    before = np.concatenate([image, prefix(reference.arrays["image"], variant.dim)]) @ text.T
    after = np.concatenate([outputs.task_image, outputs.image]) @ outputs.task_text.T
    errors = np.concatenate([
        row_error(image, outputs.task_image),
        row_error(prefix(reference.arrays["image"], variant.dim), outputs.image),
    ])  # fmt: skip
    pixels = [*task.pixels, *reference.arrays["pixels"]]
    accepted = [record for record in reference.images if record.row is not None]
    names = [*task.uids, *(f"{record.name} ({record.note})" for record in accepted)]
    right = np.zeros_like(before, dtype=bool)
    right[: len(image)] = task.positives
    flips = sorted(changes["image-to-text"].flips, key=lambda flip: (flip.near_tie, -flip.margin))
    chosen: dict[int, tuple[str, float, bool]] = {}
    for flip in flips[: SHOWN // 2]:
        why = "the first result changed" + (", a near tie" if flip.near_tie else "")
        chosen[flip.query] = (why, flip.margin, flip.near_tie)
    for index in np.argsort(-errors, kind="stable"):
        if len(chosen) == SHOWN:
            break
        known = next((flip for flip in flips if flip.query == index), None)
        chosen.setdefault(
            int(index), ("moved the farthest", known.margin if known else 0.0, bool(known and known.near_tie))
        )
    first = {"reference": top_k(before, RESULTS), "candidate": top_k(after, RESULTS)}

    def results(index: int, side: str, scores: NDArray[np.float64]) -> list[Result]:
        order = first[side][index]
        gaps = np.abs(np.diff(before[index, order]))
        close = [bool((gaps[max(0, i - 1) : i + 1] <= tie).any()) for i in range(len(order))]
        return [
            Result(task.texts[j], float(scores[index, j]), bool(right[index, j]), mark) for j, mark in zip(order, close)
        ]

    return [
        Worst(
            names[index], why, float(errors[index]), margin, near,
            results(index, "reference", before), results(index, "candidate", after), pixels[index],
        )
        for index, (why, margin, near) in chosen.items()
    ]  # fmt: skip
