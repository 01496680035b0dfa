"""VL2V-ADiP: a picture's embedding between the teacher's picture and the teacher's words for it."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, projector_if_needed, share, unit


def mean_cosine(x: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of cos(x_i, target_i), both [N, D]."""
    return (unit(x) * unit(target)).sum(dim=-1).mean()


class VisionLanguageToVision(BatchObjective):
    """vl2v: each student picture points between the teacher's picture and the teacher's caption.

    Formula: with s = W v^S the student's image embedding (W the identity for equal widths), V and T the teacher's image
    and text embeddings of the row, lam = `image_share`,
        L = -[ lam mean_i cos(s_i, V_i) + (1 - lam) mean_{captioned i} cos(s_i, T_i) ].
    Inputs: student.image [B, D]; image, text [B, D] of the teacher. Output: {"vl2v_image", "vl2v_text"}, with their
    factors. Rows without a caption take part in the image term only; the student's text tower is not trained.
    Reduction: mean over rows. The value lies in [-1, 1] and is *negative* when all is well; it is not 0 at the optimum,
    and -1 is out of reach while V_i and T_i differ. No temperature. A batch of one is fine: rows are not compared.
    Duplicates have the same target, which is what is wanted.
    Paper: Addepalli et al. 2024 (VL2V-ADiP, 2310.08255), lam = 0.5; the loss of both of its stages. Stage 1 ("align")
    trains the projection alone and stage 2 ("distill") the backbone alone: that is a matter of `train.lr_scale` and
    `train.freeze`, not of this loss.
    Ours: the caption stands for the class text; W is train-only and takes part only where the widths differ (there, the
    projection is part of the classifier).
    Related: `vl2v_image` is `feature` with distance cosine, without the 1; `vl2v_text` is what this adds.
    Cost: none to speak of, no matrix over pairs of rows.
    """

    name = "vl2v"
    formula = "−½cos(v^S, v^T) − ½cos(v^S, s^T): a picture between the teacher's picture and caption"
    paper = "VL2V-ADiP, 2310.08255"
    needs = Needs(captions=True)
    coordinates = True

    def __init__(
        self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, image_share: float = 0.5
    ) -> None:
        super().__init__()
        self.image_share = share("image_share", image_share)
        self.projector = projector_if_needed(
            student.embedding, (teacher or student).embedding, seed=seed, tag="vl2v/image"
        )

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        image = text = self.zero(student)
        if len(student.image):
            image = -self.image_share * mean_cosine(self.projector(student.image), teacher.image)
        rows = self.pairs(student, teacher)
        if rows is not None:
            text = (self.image_share - 1) * mean_cosine(self.projector(rows.image), rows.taught()[1])
        return {"vl2v_image": image, "vl2v_text": text}
