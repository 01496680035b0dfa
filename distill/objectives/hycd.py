"""Hybrid contrastive distillation (CLIP-Refine): the target is half the truth, half the teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_both_ways
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, positive, share, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES, masked_log_softmax, match_targets


def hybrid_kl(
    target_logits: Tensor, logits: Tensor, group: Tensor | None, duplicates: str, blend: float, rows: slice
) -> Tensor:
    """sum_i KL( blend * match_i + (1 - blend) * softmax(target_logits_i) || softmax(logits_i) ), both [R, P]."""
    match, left_out = match_targets(logits, group, duplicates, rows)
    target = blend * match + (1 - blend) * target_logits.masked_fill(left_out, float("-inf")).softmax(dim=-1)
    # xlogy: a probability that underflowed, or a one-hot zero, adds nothing
    return (torch.xlogy(target, target) - target * masked_log_softmax(logits, left_out)).sum()


class HybridContrastive(BatchObjective):
    """hycd: the student's image-text distributions follow a blend of the truth and the teacher's.

    Formula: with z_ij the image-text similarity of the P captioned rows, P = softmax_j(z_ij / T), eye the identity,
        Q = a eye + (1 - a) P^T,   L = T^2 / 2 [ mean_i KL(Q_i || P^S_i) + the same for columns ].
    KL direction: hybrid target || student. Constants: a = `blend` (0.5), T = `temperature` (1).
    normalize=True (default, ours): z = c cos(v_i, s_j), each model at its own logit scale c, and the student's is
    trained; T comes on top. normalize=False: z = v_i.s_j of the embeddings as they come and no logit scale, as in the
    released code, whose encoders do not normalise. A teacher with unit-length embeddings then has a nearly even softmax
    at T = 1: choose T near 0.01, and mind the factor T^2.
    Inputs: image, text [B, D] of both models (widths may differ); group [B]. Output: {"hycd"}.
    Reduction: mean over captioned rows, half for each direction.
    Paper: Yamaguchi et al. 2025 (CLIP-Refine, 2504.12717), with T^2 and a as in its code.
    Ours: `normalize`; `duplicates` as in `clip` (default "ignore": a duplicate's column is left out of both models'
    softmax; "positives" spreads eye over the group; "negatives" is the paper).
    Related: at T = 1, a = 0 with duplicates "negatives" is `crd`; a = 1 is `clip` (less the target's entropy).
    Cost: two P x P matrices, as `crd`.
    """

    name = "hycd"
    formula = "KL(Q ‖ p^S)·T², Q half the truth and half p^T"
    paper = "CLIP-Refine; `normalize` ours"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        blend: float = 0.5,
        temperature: float = 1.0,
        normalize: bool = True,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        self.blend = share("blend", blend)
        self.temperature = positive("temperature", temperature) or 1.0
        self.normalize = normalize
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"hycd": self.zero(student)}
        target = self._logits(*rows.taught(), teacher)
        logits = self._logits(rows.image, rows.text, student)
        image, text = (self._one_way(theirs, rows.group) for theirs in target.readers())
        return {"hycd": self.temperature**2 * summed_both_ways(image, text, logits) / (2 * len(rows.image))}

    def _one_way(self, target: Callable[[slice], Tensor], group: Tensor | None) -> Callable[[Tensor, slice], Tensor]:
        return lambda block, rows: hybrid_kl(target(rows), block, group, self.duplicates, self.blend, rows)

    def _logits(self, image: Tensor, text: Tensor, outputs: Outputs) -> Similarity:
        if self.normalize:
            return Similarity(unit(image), unit(text), outputs.logit_scale / self.temperature)
        return Similarity(image, text, 1 / self.temperature)
