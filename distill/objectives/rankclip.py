"""RankCLIP: the student's own similarity lists, across and inside modalities, agree in their order."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    inverse_temperature,
    not_negative,
    positive,
    unit,
)
from pocketvlm.distill.objectives.ranking import list_mle
from pocketvlm.distill.objectives.within import cosines
from pocketvlm.edge.errors import UsageError


def consistency(a: Similarity, b: Similarity, scale: Tensor | float) -> Tensor:
    """Mean over rows and places of ListMLE(c a; b) + ListMLE(c b; a), for two matrices of cosines [P, P]."""

    def loss(block: Tensor, rows: slice) -> Tensor:
        other = b.whole(rows)
        return (list_mle(scale * block, other) + list_mle(scale * other, block)).sum()

    return summed_rows(loss, a) / len(a.queries) ** 2


class RankConsistency(BatchObjective):
    """rankclip: texts rank pictures as pictures rank texts, and pictures rank pictures as texts rank texts. No teacher.

    Formula: over the P captioned rows, v, s L2-normalised, c the logit scale, A_ij = v_i.s_j, V_ij = v_i.v_j,
        S_ij = s_i.s_j, and ListMLE(X; Y) = sum_k [ log sum_{m >= k} exp(x_(m)) - x_(k) ] of a row of X sorted by Y,
        cross:  1/P mean_i [ ListMLE(c A_i; A^T_i) + ListMLE(c A^T_i; A_i) ],
        within: 1/P mean_i [ ListMLE(c V_i; S_i) + ListMLE(c S_i; V_i) ], each row's own entry included.
        Y only orders: gradients flow through X alone.
    Inputs: student.image, student.text [B, D]; has_text [B]. Output: {"rankclip_cross", "rankclip_within"}, times the
    options `cross` and `within` (1 each; 0 leaves a term out).
    Reduction: mean over rows and over the places of a list. `reduction: released` divides by 32 more, as the authors'
    code does (it adds r(e) (cross + within) / (32 B) to the CLIP loss, both as means over rows of sums over places).
    Its r(e) = clamp(3 (e-1)/(E-1), 0, 2) over epochs e = 1..E is not part of this module: it is the recipe's weight,
    `weight: 2` (2/32 with reduction "mean") with `schedule: warmup` over schedule_steps = two thirds of the steps.
    Temperature: `temperature` = 1/c; None (default) is the student's logit scale, which the loss then trains (as in
    the code). The minimum is not 0: a likelihood grows with the gaps. Meant beside `clip`, never alone.
    Paper: Zhang et al. 2024 (RankCLIP, 2404.09387); formula as read in the code, Jam1ezhang/RankCLIP, since only a
    note of the paper could be read. The note prints the schedule as (3i - 1)/(n - 1).
    Ours: ties share a denominator (`ranking.list_mle`), where the code shuffles them by a random permutation, so that
    equal captions have no accidental order; no 1e-10 inside the logarithm, which at c = 100 flattens the end of every
    list; every rank's rows get the gradient; fewer than two captioned rows in a larger batch give 0.
    Related: `order` ranks by the teacher instead. Cost: four sorts of P lists, memory O(P^2).
    """

    name = "rankclip"
    formula = "ListMLE of the student's own similarity lists, across and inside modalities"
    paper = "RankCLIP, 2404.09387 (its code)"
    needs = Needs(captions=True, teacher=False)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        cross: float = 1.0,
        within: float = 1.0,
        reduction: str = "mean",
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.cross, self.within = not_negative("cross", cross), not_negative("within", within)
        if not cross and not within:
            raise UsageError(
                "objective 'rankclip' has both weights at 0; nothing would be learned, so give cross or within one"
            )
        self.reduction = choice("reduction", reduction, ("mean", "released"))
        self.temperature = positive("temperature", temperature)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        weights = {"rankclip_cross": self.cross, "rankclip_within": self.within}
        rows = self.pairs(student, None)
        if rows is None:
            return {key: self.zero(student) for key, weight in weights.items() if weight}
        image, text = unit(rows.image), unit(rows.text)
        across = Similarity(image, text, 1.0)
        lists = {"rankclip_cross": (across, across.T)}
        lists["rankclip_within"] = (cosines(rows.image), cosines(rows.text))
        scale = inverse_temperature(self.temperature, student)
        divisor = 32 if self.reduction == "released" else 1
        return {key: weight * consistency(*lists[key], scale) / divisor for key, weight in weights.items() if weight}
