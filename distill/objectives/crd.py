"""Contrastive relational distillation (CLIP-KD): image-text similarity distributions follow the teacher's."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, Taught, softmax_loss
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Pairs,
    Widths,
    cross_entropy_rows,
    inverse_temperature,
    kl_rows,
    positive,
    unit,
)


def both_directions(rows: Pairs, target_scale: Tensor | float, scale: Tensor | float, *, entropy: bool) -> Tensor:
    """Half of the teacher's divergence from the student image to text plus half of it text to image.

    entropy: KL(teacher || student); without it their cross-entropy. In blocks where the matrices are large.
    """
    their_image, their_text = rows.taught()
    target = Similarity(unit(their_image), unit(their_text), target_scale)
    logits = Similarity(unit(rows.image), unit(rows.text), scale)
    if not logits.held:
        return softmax_loss(logits, Taught(target, entropy), both_ways=True)
    divergence = kl_rows if entropy else cross_entropy_rows
    theirs, own = target.whole(), logits.whole()
    return (divergence(theirs, own) + divergence(theirs.T, own.T)) / 2


class ContrastiveRelational(BatchObjective):
    """crd: the student's image-text similarity distributions follow the teacher's.

    Formula: with p = softmax_j(v_i.s_j / tau) (image to text), q = softmax_i(v_i.s_j / tau) (text to image) over the P
        captioned rows, superscripts T and S for teacher and student, embeddings L2-normalised,
        L = 1/2 [ mean_i KL(p^T_i || p^S_i) + mean_j KL(q^T_j || q^S_j) ].
    KL direction: teacher || student; zero exactly when the distributions are equal.
    Inputs: image, text [B, D] of both models (widths may differ: only similarities are compared). Output: {"crd"}.
    Reduction: mean over captioned rows, half for each direction; no factor tau^2.
    Temperature: `temperature` = tau of both models; None (default) takes each model's own logit scale 1/tau, and the
    student's is trained by this loss. Duplicate captions need no care: the teacher gives them equal mass.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), equations of "contrastive relational distillation".
    Ours: the shared `temperature`; fewer than two captioned rows in a larger batch give 0.
    Related: `affinity` has the same gradient at the same temperatures, up to the teacher's constant entropy.
    Cost: one P x P matrix for each model.
    """

    name = "crd"
    formula = "KL(p^T ‖ p^S) of the image-text softmax, half each way"
    paper = "CLIP-KD, 2307.12732"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, temperature: float | None = None
    ) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"crd": self.zero(student)}
        target_scale = inverse_temperature(self.temperature, teacher)
        scale = inverse_temperature(self.temperature, student)
        return {"crd": both_directions(rows, target_scale, scale, entropy=True)}
