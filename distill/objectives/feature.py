"""Feature distillation on the joint embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    not_negative,
    positive,
    projector_if_needed,
    unit,
)
from pocketvlm.edge.errors import UsageError

DISTANCES = ("l2", "cosine", "smooth-l1")


def row_distance(x: Tensor, target: Tensor, distance: str, beta: float) -> Tensor:
    """Distance of each row of x to its row of target, [B, D] x [B, D] -> [B].

    "l2": squared, summed over D. "cosine": 1 - cosine. "smooth-l1": Huber with threshold `beta`, divided by it
    (d^2 / (2 beta) below, |d| - beta/2 above), summed over D.
    """
    if distance == "cosine":
        return 1 - (unit(x) * unit(target)).sum(dim=-1)
    if distance == "l2":
        # not the square of the difference: this keeps x and target, which are there already, for its backward
        return F.mse_loss(x, target, reduction="none").sum(dim=-1)
    return F.smooth_l1_loss(x, target, beta=beta, reduction="none").sum(dim=-1)


class Feature(BatchObjective):
    """feature: each student embedding goes where the teacher's embedding of the same input is.

    Formula: with n(x) = x/|x|, W the projector (identity for equal widths),
        image: mean_i d( n(W v^S_i), n(v^T_i) ),  text: mean over captioned i of d( n(W' s^S_i), n(s^T_i) ).
    distance d: "l2" (default) squared, summed over D (CLIP-KD's FD); "cosine" 1 - cos, exactly half of "l2" on unit
    vectors; "smooth-l1" summed over D with threshold `beta` (default D^-1/2, the size of a unit vector's element).
    normalize=False compares raw student outputs with the teacher's unit vectors (then `beta` defaults to 1).
    Inputs: image [B, D], text [B, D] of both models. Output: {"feature_image", "feature_text"}, each times its weight
    `image` or `text` (0 leaves the term out); rows without a caption take part in the image term only.
    Reduction: sum over D, mean over rows. The released CLIP-KD code takes the element mean times 2000 instead, which is
    2000/D times this. No temperature. A batch of one is fine: rows are not compared with each other.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), "feature distillation" (the squared form).
    Ours: cosine and smooth-l1, the separate weights.
    Related: `masked-feature` hides a part of the picture; `vl2v` draws a picture towards its caption too; `hint`
    compares features before the joint projection; `gram` and `rkd` compare relations, which need no common coordinates.
    Cost: none to speak of, no matrix over pairs of rows; projectors of D_S D_T train-only weights where widths differ.
    """

    name = "feature"
    formula = "distance of each embedding to the teacher's (`l2`, `cosine`, `smooth-l1`)"
    paper = "CLIP-KD (FD); cosine, smooth-l1 ours"
    needs = Needs()
    coordinates = True

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        distance: str = "l2",
        normalize: bool = True,
        beta: float | None = None,
        image: float = 1.0,
        text: float = 1.0,
    ) -> None:
        super().__init__()
        width = (teacher or student).embedding
        self.distance = choice("distance", distance, DISTANCES)
        self.normalize = normalize
        self.beta = positive("beta", beta) or (width**-0.5 if normalize else 1.0)
        self.image_weight, self.text_weight = not_negative("image", image), not_negative("text", text)
        if not image and not text:
            raise UsageError(
                "objective 'feature' has both weights at 0; nothing would be learned, so give image or text one"
            )
        self.image_projector = projector_if_needed(student.embedding, width, seed=seed, tag="feature/image")
        self.text_projector = projector_if_needed(student.embedding, width, seed=seed, tag="feature/text")

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        return dataclasses.replace(cls.needs, teacher_image=bool(options.get("image", 1.0)))

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        found = {}
        if self.image_weight:
            rows = self._distances(self.image_projector(student.image), teacher.image)
            found["feature_image"] = self.image_weight * (rows.mean() if len(rows) else self.zero(student))
        if self.text_weight:
            pairs = self.pairs(student, teacher)
            if pairs is None:
                found["feature_text"] = self.zero(student)
            else:
                assert pairs.teacher_text is not None, "pairs() was given the teacher"
                rows = self._distances(self.text_projector(pairs.text), pairs.teacher_text)
                found["feature_text"] = self.text_weight * rows.mean()
        return found

    def _distances(self, x: Tensor, target: Tensor) -> Tensor:
        if self.normalize:
            x, target = unit(x), unit(target)
        return row_distance(x, target, self.distance, self.beta)
