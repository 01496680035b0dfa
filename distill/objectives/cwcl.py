"""Continuously weighted contrastive loss: near rows of the teacher's space are graded positives."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_both_ways
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES, info_nce


def continuous_weights(cosine: Tensor) -> Tensor:
    """(1 + cos_ij) / 2 with each row divided by its sum; [R, P]."""
    weight = ((1 + cosine) / 2).clamp(min=0.0)
    return weight / weight.sum(dim=-1, keepdim=True)


class ContinuouslyWeighted(BatchObjective):
    """cwcl: in one direction, every row of the batch is a positive to the degree that the teacher finds it alike.

    Formula: with u, v the L2-normalised student embeddings of the trusted `side` and of the other side, U the teacher's
    of the trusted side, c the logit scale, over the P captioned rows,
        w_ij = (1 + cos(U_i, U_j)) / 2,
        L = mean_i [ -sum_j (w_ij / sum_k w_ik) log softmax_j(c u_i.v_j) ] + mean_j [ -log softmax_i(c u_i.v_j) ]_{i=j}.
    The first, weighted direction has the trusted side's rows as queries; the second is InfoNCE. The weights are
    detached and not sharpened: at cosines around 0 the row's own column holds only about 2/P of the mass, so that this
    is a structure term rather than a lightly smoothed `clip`. The value is never below the weights' entropy.
    side: "image" (default) or "text": whose space of the teacher is trusted, and which direction is weighted.
    Inputs: image, text [B, D] of both models (widths may differ), of the teacher's only `side`. Output: {"cwcl"}.
    Reduction: mean over captioned rows, *sum* of both directions (twice the convention of `clip`), as in the paper.
    Temperature: the student's logit scale, trained; the weights have none.
    Paper: Srinivasa et al. 2023 (CWCL, 2309.14580); weights and reduction as quoted and coded by a re-implementation,
    the paper's own text could not be read.
    Ours: there, u is the frozen tower's own embedding; here both towers are students and only the weights come from the
    frozen teacher. `duplicates` as in `clip`, for the InfoNCE direction; the weighted one has no one-hot target.
    Related: `crd` takes the teacher's cross-modal softmax as the target, this its cosines within one modality.
    Cost: two P x P matrices.
    """

    name = "cwcl"
    formula = (
        "one direction: cross-entropy with the teacher's cosines within one modality as weights; the other: InfoNCE"
    )
    paper = "CWCL, 2309.14580, adapted"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        side: str = "image",
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        self.side = choice("side", side, ("image", "text"))
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"cwcl": self.zero(student)}
        image, text = rows.taught()
        trusted = unit(image if self.side == "image" else text)
        alike = Similarity(trusted, trusted, 1.0)
        logits = Similarity(unit(rows.image), unit(rows.text), student.logit_scale)
        if self.side == "text":
            logits = logits.T

        def weighted(block: Tensor, part: slice) -> Tensor:
            return -(continuous_weights(alike.whole(part)) * block.log_softmax(dim=-1)).sum()

        def matching(block: Tensor, part: slice) -> Tensor:
            return len(block) * info_nce(block, rows.group, self.duplicates, part)

        return {"cwcl": summed_both_ways(weighted, matching, logits) / len(rows.image)}
