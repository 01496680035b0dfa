"""Interactive contrastive learning (CLIP-KD): student queries against teacher keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    own_scale,
    positive,
    projector_if_needed,
    unit,
)
from pocketvlm.distill.objectives.contrastive import DUPLICATES, matching_loss


class Interactive(BatchObjective):
    """icl: the student's picture finds the teacher's caption, and the student's caption the teacher's picture.

    Formula: with v, s L2-normalised, W the projector (identity for equal widths), c' = exp(log_scale) its own,
        L = 1/2 [ mean_i CE(softmax_j(c' n(W v^S_i).s^T_j), i) + mean_i CE(softmax_j(c' n(W' s^S_i).v^T_j), i) ].
    Both softmaxes run over the teacher's P captioned rows; the teacher is detached.
    Inputs: image, text [B, D] of both models; group [B]. Output: {"icl"}.
    Reduction: mean over captioned rows, half for each part.
    Temperature: a learnable log scale of its own (the student's logit scale is not touched), stored in the state dict,
    exponentiated here (the released code forgets to) and kept within [1, 100]. It starts at `logit_scale`.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), "interactive contrastive learning".
    Ours: `duplicates` as in `clip` (default "ignore"); fewer than two captioned rows in a larger batch give 0.
    Related: `cross-kd` has the same logits with the teacher's softmax as target, `momentum` the keys of the student's
    own average; `afd` fuses the two models' embeddings instead.
    Cost: two P x P matrices, and the projectors' 2 D_S D_T train-only weights where the widths differ.
    """

    name = "icl"
    formula = "InfoNCE of student queries against teacher keys, own learned scale"
    paper = "CLIP-KD"
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
        width = (teacher or student).embedding
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.log_scale = nn.Parameter(torch.tensor(math.log(positive("logit_scale", logit_scale) or 1.0)))
        self.image_projector = projector_if_needed(student.embedding, width, seed=seed, tag="icl/image")
        self.text_projector = projector_if_needed(student.embedding, width, seed=seed, tag="icl/text")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        scale = own_scale(self.log_scale)
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"icl": self.zero(student)}
        assert rows.teacher_image is not None, "pairs() was given the teacher"
        assert rows.teacher_text is not None, "pairs() was given the teacher"
        image = Similarity(unit(self.image_projector(rows.image)), unit(rows.teacher_text), scale)
        text = Similarity(unit(self.text_projector(rows.text)), unit(rows.teacher_image), scale)
        parts = [matching_loss(part, rows.group, self.duplicates, both_ways=False) for part in (image, text)]
        return {"icl": (parts[0] + parts[1]) / 2}
