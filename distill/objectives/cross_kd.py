"""Cross-model distributions: the student's half of a pair against the teacher's other half."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, Taught, softmax_loss
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    inverse_temperature,
    kl_rows,
    positive,
    projector_if_needed,
    unit,
)


class CrossDistributions(BatchObjective):
    """cross-kd: student pictures over teacher captions, and the reverse, are distributed as the teacher's.

    Formula: with v, s L2-normalised, W, W' projectors (identity for equal widths), c_T and c_S the logit scales, over
    the P captioned rows,
        L = 1/2 [ mean_i KL( softmax_j(c_T v^T_i.s^T_j) || softmax_j(c_S n(W  v^S_i).s^T_j) )
                + mean_i KL( softmax_j(c_T s^T_i.v^T_j) || softmax_j(c_S n(W' s^S_i).v^T_j) ) ].
    KL direction: teacher || student; zero exactly when the distributions are equal. The keys are the teacher's in both.
    Inputs: image, text [B, D] of both models. Output: {"cross-kd"}.
    Reduction: mean over captioned rows, half for each part; no factor tau^2.
    Temperature: `temperature` = 1/c of both; None (default) takes each model's own logit scale, and the student's is
    trained. Duplicate captions need no care: the teacher gives them equal mass.
    Paper: the `cross_kd` loss in the released code of Yang et al. 2024 (CLIP-KD, 2307.12732); that it is one of the
    paper's named losses was not seen. The code multiplies by the stored logarithm of a learned scale that it shares
    with ICL.
    Ours: the temperatures, as in `crd`.
    Related: `icl` has the same logits with a one-hot target; `crd` has the same target with student keys.
    Cost: three P x P matrices.
    """

    name = "cross-kd"
    formula = "KL(p^T ‖ student queries over teacher keys), half each way"
    paper = "CLIP-KD's released code"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, temperature: float | None = None
    ) -> None:
        super().__init__()
        width = (teacher or student).embedding
        self.temperature = positive("temperature", temperature)
        self.image_projector = projector_if_needed(student.embedding, width, seed=seed, tag="cross-kd/image")
        self.text_projector = projector_if_needed(student.embedding, width, seed=seed, tag="cross-kd/text")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"cross-kd": self.zero(student)}
        their_image, their_text = (unit(part) for part in rows.taught())
        target = Similarity(their_image, their_text, inverse_temperature(self.temperature, teacher))
        scale = inverse_temperature(self.temperature, student)
        image = Similarity(unit(self.image_projector(rows.image)), their_text, scale)
        text = Similarity(unit(self.text_projector(rows.text)), their_image, scale)
        if target.held:
            theirs = target.whole()
            both = kl_rows(theirs, image.whole()) + kl_rows(theirs.T, text.whole())
        else:
            both = softmax_loss(image, Taught(target, entropy=True), both_ways=False)
            both = both + softmax_loss(text, Taught(target.T, entropy=True), both_ways=False)
        return {"cross-kd": both / 2}
