"""Momentum distillation (ALBEF): the student's own moving average softens the targets of its contrastive loss."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, share, unit
from pocketvlm.distill.objectives.contrastive import DUPLICATES, masked_log_softmax, match_targets
from pocketvlm.edge.errors import UsageError


class MomentumDistillation(BatchObjective):
    """momentum: `clip` towards what the student's moving average believes, with the average's embeddings as keys.

    Formula: v, s the student's L2-normalised image and text embeddings of the P captioned rows, v', s' those of the
    momentum model, c the student's logit scale, sg = no gradient, a = `alpha` * min(1, progress / `ramp`),
        y_i = (1 - a) onehot_i + a softmax_j( sg(c) v'_i.s'_j ),
        L = 1/2 [ mean_i CE(y_i, softmax_j(c v_i.s'_j)) + the same with s_i, v'_j and s'_i.v'_j ].
    The keys are the momentum model's in the student's softmax too, so gradients reach the queries and c alone.
    KL direction: up to y's entropy, which has no gradient, CE is KL(y || student).
    Inputs: student.image, student.text [B, D]; has_text, group [B]. `teacher` is the momentum model's outputs for the
    same rows, as wide as the student's: the loop's moving average of parameters and buffers (`train.ema_decay`, ALBEF
    0.995), in evaluation mode and without a gradient. No external teacher. Output: {"momentum": scalar}.
    Reduction: mean over captioned rows, half for each direction. Temperature: the student's logit scale, trained by
    its own logits and constant in the target.
    Constants: `alpha` 0.4 as in ALBEF. `ramp` is the share of the main phase over which a grows from 0 (`at`, which
    the loop calls): 0.1, ours; 0 is no ramp. The authors' scripts take the first of 30 epochs.
    Paper: Li et al. 2021 (ALBEF, 2107.07651), section 3.2 and equation 6, the contrastive part.
    Not as in ALBEF: no queue of 65,536 earlier embeddings (the keys are those of the batch, so use batches as large as
    for `clip`), and our average starts with a lower decay, as `train.ema_decay` says. Ours: `duplicates` as in `clip`.
    Related: `hycd` with an external teacher and the student's own keys; `icl` has a teacher's keys and no soft mass.
    Cost: two P x P matrices more than `clip`, and another forward of both towers without a gradient.
    """

    name = "momentum"
    formula = "`clip` against the keys of the student's own moving average, whose softmax is 40 % of the target"
    paper = "ALBEF, 2107.07651 (no queue)"
    needs = Needs(captions=True, teacher=False, momentum=True)
    coordinates = True
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        alpha: float = 0.4,
        ramp: float = 0.1,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        self.alpha, self.ramp = share("alpha", alpha), share("ramp", ramp)
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.progress = 0.0

    def at(self, step: int, progress: float) -> None:
        self.progress = progress

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"momentum": self.zero(student)}
        if rows.taught()[0].shape[-1] != rows.image.shape[-1]:
            raise UsageError(
                f"objective 'momentum' was given {rows.taught()[0].shape[-1]}-wide outputs for a student of width "
                f"{rows.image.shape[-1]}, so they are no average of it; give the averaged student's, or use `icl` for "
                "another model"
            )
        their_image, their_text = (unit(part) for part in rows.taught())
        soft = self.alpha * (min(1.0, self.progress / self.ramp) if self.ramp else 1.0)
        scale = student.logit_scale
        believed, across = Similarity(their_image, their_text, scale.detach()).readers()
        image = Similarity(unit(rows.image), their_text, scale)
        text = Similarity(unit(rows.text), their_image, scale)
        both = summed_rows(self._one_way(believed, rows.group, soft), image)
        both = both + summed_rows(self._one_way(across, rows.group, soft), text)
        return {"momentum": both / (2 * len(rows.image))}

    def _one_way(
        self, believed: Callable[[slice], Tensor], group: Tensor | None, soft: float
    ) -> Callable[[Tensor, slice], Tensor]:
        def loss(logits: Tensor, rows: slice) -> Tensor:
            match, left_out = match_targets(logits, group, self.duplicates, rows)
            target = (1 - soft) * match + soft * believed(rows).masked_fill(left_out, float("-inf")).softmax(dim=-1)
            return -(target * masked_log_softmax(logits, left_out)).sum()

        return loss
