"""Pairwise sigmoid loss of SigLIP, aware of duplicate captions."""

from __future__ import annotations

from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES
from pocketvlm.edge.errors import UsageError


def pairwise_sigmoid(logits: Tensor, group: Tensor | None, duplicates: str, rows: slice = slice(None)) -> Tensor:
    """Sum over pairs of -log sigmoid(+-logit); see `PairwiseSigmoid`. logits: [R, P], the `rows` of all P x P."""
    place = torch.arange(logits.shape[1], device=logits.device)
    right = place[rows, None] == place
    same = right if group is None or duplicates == "negatives" else group[rows, None] == group[None, :]
    if duplicates == "positives":
        right = same
    losses = F.softplus(torch.where(right, -logits, logits))
    return losses.masked_fill(same & ~right, 0.0).sum()


class PairwiseSigmoid(BatchObjective):
    """siglip: each picture-caption pair of the batch is judged right or wrong on its own.

    Formula: with v, s the L2-normalised image and text embeddings of the P captioned rows, c the logit scale, b a bias,
    y_ij = 1 where i = j and -1 elsewhere,
        L = -1/P sum_i sum_j log sigmoid( y_ij (c v_i.s_j + b) ).
    Inputs: student.image, student.text [B, D]; has_text, group [B]; no teacher. Output: {"siglip"}.
    Reduction: *sum* over all P^2 pairs, divided by P, as in the paper (a mean over pairs would be P times smaller).
    Temperature: the student's logit scale c, trained. `bias` (default -10, where the paper starts it) makes b a trained
    parameter of this objective, which is not exported and which rankings do not need: nearly all pairs are wrong ones,
    and b starts them there. bias=None takes the student's own logit_bias, a constant 0 for students that have none.
    A batch of one is defined (one right pair, nothing to push away) and teaches nothing worth having.
    Paper: Zhai et al. 2023 (SigLIP, 2303.15343), algorithm 1.
    Ours: `duplicates`, for two rows of one `group`: "ignore" (default) leaves their pairs out of the sum, "positives"
    gives them y = 1, "negatives" is plain SigLIP. Rows that are left out still count in P.
    Related: `clip` normalises over the batch instead; here every pair stands alone.
    Cost: one P x P matrix, as `clip`; in blocks where it is large.
    """

    name = "siglip"
    formula = "−log sigmoid of ±(c v·s + b), summed over all pairs, divided by rows; b its own, from −10"
    paper = "SigLIP, 2303.15343"
    needs = Needs(captions=True, teacher=False)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        duplicates: str = "ignore",
        bias: float | None = -10.0,
    ) -> None:
        super().__init__()
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        if bias is not None and (isinstance(bias, bool) or not isinstance(bias, (int, float)) or not isfinite(bias)):
            raise UsageError(
                f"objective option 'bias' is {bias!r} but must be a finite number or null; no pair could be judged, so "
                "give for instance -10, or null for the student's own"
            )
        self.bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, None)
        if rows is None:
            return {"siglip": self.zero(student)}
        bias = student.logit_bias if self.bias is None else self.bias
        group, duplicates = rows.group, self.duplicates
        logits = Similarity(unit(rows.image), unit(rows.text), student.logit_scale)
        total = summed_rows(lambda block, part: pairwise_sigmoid(block + bias, group, duplicates, part), logits)
        return {"siglip": total / len(rows.image)}
