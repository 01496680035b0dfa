"""LightCLIP-style: the negatives' labels are softened by similarity, the more the longer training runs."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_both_ways
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, share, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES, masked_log_softmax, match_targets


def softened(logits: Tensor, group: Tensor | None, duplicates: str, softness: float, rows: slice) -> Tensor:
    """Cross-entropy of each row with its softened target, summed; see `SoftNegatives`. logits: [R, P], the `rows`."""
    target, left_out = match_targets(logits, group, duplicates, rows)
    with torch.no_grad():
        negative = (target == 0) & ~left_out
        any_negative = negative.any(dim=-1, keepdim=True)
        # a row that has no negative keeps its whole mass; its softmax over nothing is never used
        among = logits.masked_fill(~negative & any_negative, float("-inf")).softmax(dim=-1)
        moved = softness * any_negative.to(logits.dtype)
        target = (1 - moved) * target + moved * among
    return -(target * masked_log_softmax(logits, left_out)).sum()


class SoftNegatives(BatchObjective):
    """soft-negatives: `clip` with some mass on likely negatives, growing while training runs (LightCLIP-style).

    Formula: with s_ij = c v_i.s_j over the P captioned rows, embeddings L2-normalised, c the logit scale, sg = no
    gradient, e = `softness` * progress,
        w_ij = softmax over j != i of sg(s_ij),   y_ii = 1 - e,   y_ij = e w_ij for j != i,
        L = 1/2 [ mean_i CE(y_i, softmax_j(s_ij)) + the same for columns ],   CE(y, p) = -sum y log p.
    progress runs from 0 in the first step of the main phase to 1 in its last (`at`, which the loop calls); until it is
    called, e = 0 and the objective is `clip`. A resumed run and every rank have the same e.
    Inputs: student.image, student.text [B, D]; has_text, group [B]; no teacher. Output: {"soft-negatives"}.
    Reduction: mean over captioned rows, half for each direction. Temperature: the student's logit scale, trained.
    This is our construction, named after what the abstract of LightCLIP (Nie et al. 2023, 2312.00674) says: labels of
    negatives are softened, progressively. The equations of that paper could not be obtained, so weights, schedule and
    `softness` (default 0.2) are ours, and this is LightCLIP-style, not LightCLIP.
    `duplicates` as in `clip`: "ignore" (default) rows are neither positives nor negatives, "positives" share 1 - e
    evenly. A row without any negative keeps its whole mass.
    Related: `clip` at softness 0. `hycd` and `crd` take the soft mass from a teacher instead of from the student
    itself.
    Cost: one P x P matrix, as `clip`.
    """

    name = "soft-negatives"
    formula = "`clip` with mass e(t) on the negatives, by the student's own similarity"
    paper = "our construction, LightCLIP-style (2312.00674)"
    needs = Needs(captions=True, teacher=False)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        softness: float = 0.2,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        self.softness = share("softness", softness)
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.progress = 0.0

    def at(self, step: int, progress: float) -> None:
        self.progress = progress

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, None)
        if rows is None:
            return {"soft-negatives": self.zero(student)}
        logits = Similarity(unit(rows.image), unit(rows.text), student.logit_scale)
        group, now = rows.group, self.softness * self.progress

        def one_way(block: Tensor, part: slice) -> Tensor:
            return softened(block, group, self.duplicates, now, part)

        return {"soft-negatives": summed_both_ways(one_way, one_way, logits) / (2 * len(rows.image))}
