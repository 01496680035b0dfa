"""Symmetric contrastive loss of CLIP, aware of duplicate captions."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Matches, Similarity, softmax_loss
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, unit

DUPLICATES = ("ignore", "positives", "negatives")


def match_targets(
    logits: Tensor, group: Tensor | None, duplicates: str, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Which columns of a square similarity matrix are right for each row: (target, left out), both as logits.

    logits: [R, P], the `rows` of all P x P. target: rows sum to 1. left out: bool, columns that take no part in that
    row's softmax. group: int64 [P], equal for rows of one concept, or None for all different; duplicates: see
    `Contrastive`.
    """
    place = torch.arange(logits.shape[1], device=logits.device)
    own = place[rows, None] == place
    if group is None or duplicates == "negatives":
        return own.to(logits.dtype), torch.zeros_like(own)
    same = group[rows, None] == group[None, :]
    if duplicates == "positives":
        return same.to(logits.dtype) / same.sum(dim=-1, keepdim=True), torch.zeros_like(own)
    return own.to(logits.dtype), same & ~own


def masked_log_softmax(logits: Tensor, left_out: Tensor) -> Tensor:
    """log softmax over the columns that are not left out; 0 (not -inf, which a zero target turns into NaN) in those."""
    return logits.masked_fill(left_out, float("-inf")).log_softmax(dim=-1).masked_fill(left_out, 0.0)


def info_nce(logits: Tensor, group: Tensor | None, duplicates: str, rows: slice = slice(None)) -> Tensor:
    """Cross-entropy of each of `rows` [R, P] with its own column, mean over rows; see `Contrastive`."""
    target, left_out = match_targets(logits, group, duplicates, rows)
    return -(target * masked_log_softmax(logits, left_out)).sum(dim=-1).mean()


def matching_loss(logits: Similarity, group: Tensor | None, duplicates: str, *, both_ways: bool) -> Tensor:
    """`info_nce`, or with `both_ways` its mean over rows and columns; in blocks where the matrix is large."""
    if not logits.held:
        return softmax_loss(logits, Matches(group, duplicates), both_ways=both_ways)
    whole = logits.whole()
    value = info_nce(whole, group, duplicates)
    return (value + info_nce(whole.T, group, duplicates)) / 2 if both_ways else value


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
    Cost: one P x P matrix.
    """

    name = "clip"
    formula = "InfoNCE of v·s both ways, at the student's logit scale"
    paper = "CLIP, 2103.00020"
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
        logits = Similarity(unit(rows.image), unit(rows.text), student.logit_scale)
        return {"clip": matching_loss(logits, rows.group, self.duplicates, both_ways=True)}
