"""Symmetric contrastive loss of CLIP, aware of duplicate captions."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, unit

DUPLICATES = ("ignore", "positives", "negatives")


def info_nce(logits: Tensor, group: Tensor | None, duplicates: str) -> Tensor:
    """Cross-entropy of each row of `logits` [P, P] with its own column, mean over rows; see `Contrastive`.

    group: int64 [P], equal for rows of one concept, or None for all different.
    """
    if group is None or duplicates == "negatives":
        return -logits.log_softmax(dim=-1).diagonal().mean()
    same = group[:, None] == group[None, :]
    if duplicates == "positives":
        target = same.to(logits.dtype) / same.sum(dim=-1, keepdim=True)
        return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    return -logits.masked_fill(others, float("-inf")).log_softmax(dim=-1).diagonal().mean()


class Contrastive(BatchObjective):
    """clip: each picture finds its caption among the batch's captions, and the reverse.

    Formula: with v, s the L2-normalised image and text embeddings of the P captioned rows and c the logit scale,
        L = 1/2 [ mean_i CE(softmax_j(c v_i.s_j), i) + mean_j CE(softmax_i(c v_i.s_j), j) ].
    Inputs: student.image, student.text [B, D]; has_text, group [B]; no teacher. Output: {"clip": scalar}.
    Reduction: mean over captioned rows, half for each direction. Temperature: the student's logit scale, trained.
    Paper: Radford et al. 2021 (CLIP, 2103.00020), figure 3.
    Ours: `duplicates`, for two rows of one `group` (equal captions). "ignore" (default) leaves the other row out of the
    denominator; "positives" spreads the target evenly over the group; "negatives" is plain CLIP, which pushes equal
    captions apart. Without `group` all three are plain CLIP. Fewer than two captioned rows in a larger batch give 0.
    Related: `crd` and `affinity` replace the one-hot target by the teacher's distribution.
    """

    name = "clip"
    needs = Needs(captions=True, teacher=False)
    minimum_rows = 2

    def __init__(
        self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, duplicates: str = "ignore"
    ) -> None:
        super().__init__()
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, None)
        if rows is None:
            return {"clip": self.zero(student)}
        logits = student.logit_scale * unit(rows.image) @ unit(rows.text).T
        both = info_nce(logits, rows.group, self.duplicates) + info_nce(logits.T, rows.group, self.duplicates)
        return {"clip": both / 2}
