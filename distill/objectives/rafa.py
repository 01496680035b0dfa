"""Random feature alignment (CLIP-Refine): a picture and its caption are drawn to one random point."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, unit


def reference_points(seed: int, step: int, rows: int, width: int) -> Tensor:
    """[rows, width] standard normal numbers, float32 on the CPU; a function of the arguments and of nothing else."""
    stream = int.from_bytes(hashlib.sha256(f"rafa/{seed}/{step}".encode()).digest()[:7], "big")
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(stream))


def alignment(image: Tensor, text: Tensor, point: Tensor, reduction: str) -> Tensor:
    """Squared distances of both sides to their row of `point`, reduced; all [P, D]. See `RandomFeatureAlignment`."""
    squares = (image - point).square() + (text - point).square()
    return squares.mean() if reduction == "element" else squares.sum(dim=-1).mean() / 2


class RandomFeatureAlignment(BatchObjective):
    """rafa: picture and caption of a pair are both pulled to one random point, so the modality gap closes.

    Formula: with v, s the image and text embeddings of the P captioned rows and, anew in every step, z_i ~ N(0, I_D)
    one point for both,
        L = 1/(2P) sum_i ( |v_i - z_i|^2 + |s_i - z_i|^2 ).
    Inputs: student.image, student.text [B, D]; has_text [B]; no teacher. Output: {"rafa"}.
    Reduction: `reduction` "paper" (default) as written: sum over D, mean over pairs, half. "element": the released
    code's mean over rows and D without the half, which is 2/D times the paper's; its weights (1 beside `hycd` at 1)
    belong to that one.
    No temperature. Duplicates are drawn to different points. A batch of one is fine: rows are not compared.
    normalize=False (default) as in the released code: raw embeddings, whose lengths are drawn to that of z, about
    sqrt(D).
    normalize=True (ours): L2-normalised embeddings and z / sqrt(D), so that z has a mean squared length of 1.
    Randomness: z is drawn for all B rows of the gathered batch by a generator seeded with (seed of the objective,
    step), on the CPU. `at` tells the step (0 until it is called), so a resumed run and every rank have the same z
    without any state; row i's z does not depend on which rows have captions, but on its place in the batch.
    Paper: Yamaguchi et al. 2025 (CLIP-Refine, 2504.12717), RaFA.
    Related: meant beside `hycd`, which keeps what the teacher knows.
    Cost: B x D random numbers in each step.
    """

    name = "rafa"
    formula = "½(|v − z|² + |s − z|²), a random z ~ N(0, I) for each pair"
    paper = "CLIP-Refine, 2504.12717"
    needs = Needs(captions=True, teacher=False)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        reduction: str = "paper",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = choice("reduction", reduction, ("paper", "element"))
        self.normalize, self.seed, self.step = normalize, seed, 0

    def at(self, step: int, progress: float) -> None:
        self.step = step

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, None)
        if rows is None:
            return {"rafa": self.zero(student)}
        points = reference_points(self.seed, self.step, *student.image.shape).to(student.image)
        points = points if student.has_text is None else points[student.has_text]
        image, text = rows.image, rows.text
        if self.normalize:
            image, text, points = unit(image), unit(text), points * points.shape[-1] ** -0.5
        return {"rafa": alignment(image, text, points, self.reduction)}
