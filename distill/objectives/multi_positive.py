"""Similarity distribution matching (IRRA): rows of one concept are all right, and the KL is the reverse one."""

from __future__ import annotations

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_both_ways
from pocketvlm.distill.objectives.common import BatchObjective, Widths, inverse_temperature, positive, unit
from pocketvlm.distill.objectives.contrastive import match_targets


def distribution_matching(logits: Tensor, group: Tensor | None, epsilon: float, rows: slice) -> Tensor:
    """sum_i KL( softmax(logits_i) || match_i + epsilon ) over `rows`, match_i even over the columns of i's group."""
    match, _ = match_targets(logits, group, "positives", rows)
    predicted = logits.log_softmax(dim=-1)
    return (predicted.exp() * (predicted - (match + epsilon).log())).sum()


class DistributionMatching(BatchObjective):
    """multi-positive: all rows of one group are right answers, matched by the reverse KL of SDM.

    Formula: with p_ij = softmax_j(v_i.s_j / tau) over the P captioned rows, v and s L2-normalised, q_ij = 1/|group of
    i| where j is in the group of i, else 0, and p', q' the same for columns,
        L = mean_i KL( p_i || q_i + epsilon ) + mean_j KL( p'_j || q'_j + epsilon ),  KL(a || b) = sum a log(a/b).
    KL direction: student || truth, the reverse of a cross-entropy: mass on a wrong row costs about log(1/epsilon),
    while a right row may stay empty as long as another right row of its group has the mass.
    Inputs: student.image, student.text [B, D]; has_text, group [B]; no teacher. Output: {"multi-positive"}.
    Reduction: mean over captioned rows, *sum* of both directions (twice the convention of `clip`), as in the paper's
    code.
    Temperature: `temperature` = tau; None (default) takes the student's logit scale 1/tau, which is then trained.
    q + epsilon does not sum to 1, so that the least value is -log(1 + epsilon), not 0, at groups of one.
    Paper: Jiang and Ye 2023 (IRRA, 2303.12501), similarity distribution matching; epsilon 1e-8 as in its code.
    Related: the forward direction, KL(q || p) + entropy, is `clip` with duplicates "positives". Without `group`, every
    row is its own group, and this still differs from `clip`.
    Cost: one P x P matrix, as `clip`.
    """

    name = "multi-positive"
    formula = "KL(p^S ‖ match + ε): all rows of one `group` are right; both ways, summed"
    paper = "SDM of IRRA, 2303.12501"
    needs = Needs(captions=True, teacher=False)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        temperature: float | None = None,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)
        self.epsilon = positive("epsilon", epsilon) or 1e-8

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, None)
        if rows is None:
            return {"multi-positive": self.zero(student)}
        logits = Similarity(unit(rows.image), unit(rows.text), inverse_temperature(self.temperature, student))
        group = rows.group

        def one_way(block: Tensor, part: slice) -> Tensor:
            return distribution_matching(block, group, self.epsilon, part)

        return {"multi-positive": summed_both_ways(one_way, one_way, logits) / len(rows.image)}
