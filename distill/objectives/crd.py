"""Contrastive relational distillation (CLIP-KD): image-text similarity distributions follow the teacher's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Pairs,
    Widths,
    inverse_temperature,
    kl_rows,
    positive,
    unit,
)


def both_directions(
    divergence: Callable[[Tensor, Tensor], Tensor], rows: Pairs, target_scale: Tensor | float, scale: Tensor | float
) -> Tensor:
    """Half of `divergence(teacher logits, student logits)` image to text plus half of text to image."""
    assert rows.teacher_image is not None, "the caller asked for teacher rows"
    assert rows.teacher_text is not None, "the caller asked for teacher rows"
    target = target_scale * unit(rows.teacher_image) @ unit(rows.teacher_text).T
    logits = scale * unit(rows.image) @ unit(rows.text).T
    return (divergence(target, logits) + divergence(target.T, logits.T)) / 2


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
        return {"crd": both_directions(kl_rows, rows, target_scale, inverse_temperature(self.temperature, student))}
