"""Several teachers at once (MobileCLIP-style): the mean of their divergences, each at its own scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, Taught, softmax_loss
from pocketvlm.distill.objectives.common import BatchObjective, Widths, kl_rows, positive, unit
from pocketvlm.edge.errors import UsageError


class MultiTeacher(BatchObjective):
    """multi-teacher: the student's image-text distributions follow those of K teachers (MobileCLIP-style).

    Formula: with P_k = softmax_j(c_k v^k_i.s^k_j) of teacher k, P^S = softmax_j(c v_i.s_j) of the student, over the P
    captioned rows, embeddings L2-normalised for each teacher on its own,
        L = 1/(2K) sum_k [ mean_i KL(P_k,i || P^S_i) + the same for columns ].
    Softmax first, then average: up to a constant this is KL(mean_k P_k || P^S), and not the softmax of averaged
    similarities.
    KL direction: teacher || student. The minimum is 0 only where all teachers agree.
    Inputs: image, text [B, D] of both models. The K teachers come side by side in one embedding, as a run with several
    teachers gives them; any scaling of the parts cancels. `widths` [D_1, ..., D_K] says where to cut (None, the
    default: at the run's teachers). The student has one embedding of any width, which all K terms compare with their
    teacher, as in the paper; a student with an embedding of its own for each teacher would be another method.
    Output: {"multi-teacher"}. Reduction: mean over captioned rows, half for each direction, mean over teachers; no
    factor tau^2. Duplicate captions need no care: the teachers give them equal mass.
    Temperature: `logit_scales` [c_1, ..., c_K] of the teachers (None: each one's own); the student's own logit scale,
    trained.
    Paper: Vasu et al. 2024 (MobileCLIP, 2311.17049) and MobileCLIP2 (2508.20691), equation 1, without its (1 - lambda)
    contrastive part and without its second, synthetic-caption batch: add `clip`, and set the weights, for the former.
    Related: with one teacher it is `crd`.
    Cost: K + 1 matrices P x P.
    """

    name = "multi-teacher"
    formula = "mean over K teachers of `crd`, each at its own scale"
    paper = "MobileCLIP-style, 2311.17049"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        widths: Sequence[int] | None = None,
        logit_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.widths = None if widths is None else [int(n) for n in _all_positive("widths", widths)]
        self.logit_scales = None if logit_scales is None else _all_positive("logit_scales", logit_scales)
        parts = () if teacher is None else teacher.parts
        if self.widths is None and parts:
            self.widths = [width for width, _ in parts]
            self.logit_scales = self.logit_scales or [scale for _, scale in parts]
        if self.widths is not None:
            self._counted(self.widths)

    def _counted(self, widths: Sequence[int]) -> None:
        if not widths or (self.logit_scales is not None and len(self.logit_scales) != len(widths)):
            raise UsageError(
                f"objective 'multi-teacher' has {len(widths)} widths and {len(self.logit_scales or [])} logit scales; "
                "each teacher needs its own, so give as many of the one as of the other"
            )

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"multi-teacher": self.zero(student)}
        image, text = rows.taught()
        widths = self.widths or [image.shape[-1]]
        self._counted(widths)
        if sum(widths) != image.shape[-1]:
            raise UsageError(
                f"objective 'multi-teacher' was told of teachers {'+'.join(map(str, widths))} wide but the teacher's "
                f"embeddings have {image.shape[-1]} columns; they would be cut in the wrong places, so correct 'widths'"
            )
        logits = Similarity(unit(rows.image), unit(rows.text), student.logit_scale)
        own = logits.whole() if logits.held else None
        values = []
        for index, (v, s) in enumerate(zip(image.split(widths, dim=-1), text.split(widths, dim=-1))):
            scale = teacher.logit_scale if self.logit_scales is None else self.logit_scales[index]
            target = Similarity(unit(v), unit(s), scale)
            if own is None:
                values.append(softmax_loss(logits, Taught(target, entropy=True), both_ways=True))
            else:
                theirs = target.whole()
                values.append((kl_rows(theirs, own) + kl_rows(theirs.T, own.T)) / 2)
        return {"multi-teacher": torch.stack(values).mean()}


def _all_positive(option: str, values: Sequence[float]) -> list[float]:
    return [positive(option, value or 0.0) or 0.0 for value in values]
