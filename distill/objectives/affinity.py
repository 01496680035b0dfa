"""Affinity mimicking (TinyCLIP): cross-entropy between the teacher's and the student's affinities."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, positive
from pocketvlm.distill.objectives.crd import both_directions


class AffinityMimicking(BatchObjective):
    """affinity: cross-entropy between the teacher's and the student's affinity matrices.

    Formula: with A = softmax of c v_i.s_j, embeddings L2-normalised, at logit scale c (rows image to text, columns text
        to image) over the P captioned rows,
        L = 1/2 [ mean_i CE(A^T_i2t, A^S_i2t) + mean_j CE(A^T_t2i, A^S_t2i) ],  CE(p, q) = -sum p log q.
    Direction: the teacher is the target. The minimum is the teacher's entropy, not 0.
    Inputs: image, text [B, D] of both models (widths may differ). Output: {"affinity"}.
    Reduction: mean over captioned rows, half for each direction.
    Temperature: `logit_scale` fixes c of both models (default 50, as TinyCLIP's scripts pin it); None takes each
    model's own, and then trains the student's.
    Paper: Wu et al. 2023 (TinyCLIP, 2309.12314), "affinity mimicking", equations of L_distill.
    Ours: fewer than two captioned rows in a larger batch give 0.
    Related: minus the teacher's entropy this is `crd` at the same temperatures, so use one of the two.
    Cost: one P x P matrix for each model.
    """

    name = "affinity"
    formula = "cross-entropy of the image-text softmax, both logit scales 50"
    paper = "TinyCLIP, 2309.12314"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, logit_scale: float | None = 50.0
    ) -> None:
        super().__init__()
        self.logit_scale = positive("logit_scale", logit_scale)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"affinity": self.zero(student)}
        scales = [self.logit_scale or outputs.logit_scale for outputs in (teacher, student)]
        return {"affinity": both_directions(rows, *scales, entropy=False)}
