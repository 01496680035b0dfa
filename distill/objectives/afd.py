"""Augmented feature distillation (CLIP-KD): student and teacher embeddings, fused, are contrasted."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity
from pocketvlm.distill.objectives.common import BatchObjective, Projector, Widths, choice, own_scale, positive, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES, matching_loss


def fused(projector: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """n(W [n(student) ; n(teacher)]): [P, D_S], [P, D_T] -> [P, D_S]."""
    return unit(projector(torch.cat([unit(student), unit(teacher)], dim=-1)))


class AugmentedFeature(BatchObjective):
    """afd: pictures and captions, each fused from the student's and the teacher's embedding, find each other.

    Formula: with n(x) = x/|x|, [a ; b] a concatenation, W, W' trained projectors D_S + D_T -> D_S, c' = exp(log_scale),
        f_i = n(W [n(v^S_i) ; n(v^T_i)]),  g_i = n(W' [n(s^S_i) ; n(s^T_i)]),
        L = 1/2 [ mean_i CE(softmax_j(c' f_i.g_j), i) + mean_j CE(softmax_i(c' f_i.g_j), j) ].
    Inputs: image, text [B, D] of both models (widths may differ); group [B]. Output: {"afd"}.
    Reduction: mean over captioned rows, half for each direction.
    Temperature: a learnable log scale of its own, exponentiated here (the released code does not) and kept within
    [1, 100]; it starts at `logit_scale`. The student's logit scale is not touched.
    The projectors always exist, are seeded equally on every rank and saved with the run; they and the scale are
    train-only.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), "augmented feature distillation"; one linear projector for each
    modality, as in the released code.
    Ours: `duplicates` as in `clip` (default "ignore"); fewer than two captioned rows in a larger batch give 0.
    Related: `icl` contrasts student with teacher embeddings instead of fusing them. A fused pair can be found by the
    teacher's part alone, in which case little is asked of the student.
    Cost: as `clip`, and 2 D_S (D_S + D_T) train-only weights.
    """

    name = "afd"
    formula = "InfoNCE of projected [student ; teacher] pairs, own learned scale"
    paper = "CLIP-KD (AFD)"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        logit_scale: float = 1 / 0.07,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        width = student.embedding + (teacher or student).embedding
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.log_scale = nn.Parameter(torch.tensor(math.log(positive("logit_scale", logit_scale) or 1.0)))
        self.image_projector = Projector(width, student.embedding, seed=seed, tag="afd/image")
        self.text_projector = Projector(width, student.embedding, seed=seed, tag="afd/text")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        scale = own_scale(self.log_scale)
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"afd": self.zero(student)}
        their_image, their_text = rows.taught()
        image = fused(self.image_projector, rows.image, their_image)
        logits = Similarity(image, fused(self.text_projector, rows.text, their_text), scale)
        return {"afd": matching_loss(logits, rows.group, self.duplicates, both_ways=True)}
