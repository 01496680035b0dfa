"""Distribution of each picture over a fixed bank of texts follows the teacher's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    inverse_temperature,
    kl_rows,
    positive,
    projector_if_needed,
    unit,
)
from pocketvlm.edge.errors import UsageError


class Bank(BatchObjective):
    """bank: over a bank of N texts, the student scores each picture as the teacher does. Needs no captions.

    Formula: with v, a L2-normalised picture and bank-text embeddings, tau_T and tau_S temperatures,
        L = mean_i KL( softmax_n(v^T_i.a^T_n / tau_T) || softmax_n(v^S_i.a_n / tau_S) ).
    anchors "student" (default): a = the student's `bank`, so the text tower is trained too (a student `bank` that the
    loop took from the teacher stays a constant). anchors "teacher": a = the teacher's `bank`, compared with n(W v^S_i),
    W a seeded projector where the widths differ; the image tower alone is trained.
    KL direction: teacher || student. Reduction: mean over pictures (all rows, captioned or not); no factor tau^2.
    Temperature: `temperature` is tau_S and, unless `teacher_temperature` is given, tau_T; None (default) takes each
    model's own logit scale, and the student's is then trained.
    target "top-logits": instead of the teacher's embeddings, what its cache keeps of its distribution
    (`teacher.logits`): the T largest shares p_n, n in K, and that of all others together, r = 1 - sum_K p_n,
        L = mean_i [ sum_K p_n log(p_n / q_n) + r log(r / (1 - sum_K q_n)) ], q the student's softmax over all N texts:
    the divergence after all others were put into one event. It is at most the whole divergence, equal to it for
    T = N - 1, and 0 where the student's shares are the teacher's. These are at the teacher's own logit scale, so
    `teacher_temperature` is refused and `temperature` is tau_S alone; `teacher.smooth` and `caption_mix` do not enter.
    Inputs: image [B, D], bank [N, D] of both models, N >= 2, the same texts in the same order; with "top-logits" the
    teacher's top_logits [B, T + 1] and top_ids [B, T] in place of its image. Output: {"bank"}.
    A batch of one is fine: pictures are compared with texts, not with each other.
    Cost: one B x N matrix for each model; anchors "student" run the text tower over the bank in every step.
    This is our construction: a cross-modal relative of SEED (Fang et al. 2021, 2101.04731), which matches distributions
    over a queue of teacher-embedded *pictures*, with texts of a word list as anchors instead.
    Related: `crd` compares with the captions of the batch, in both directions; `dho` with the classes of a task, by
    heads of their own.
    """

    name = "bank"
    formula = "KL(T ‖ S) of each picture's distribution over a bank of texts"
    paper = "our construction, a cross-modal relative of SEED, 2101.04731"
    needs = Needs(bank=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        anchors: str = "student",
        temperature: float | None = None,
        teacher_temperature: float | None = None,
        target: str = "embeddings",
    ) -> None:
        super().__init__()
        self.anchors = choice("anchors", anchors, ("student", "teacher"))
        self.temperature = positive("temperature", temperature)
        self.teacher_temperature = positive("teacher_temperature", teacher_temperature) or self.temperature
        self.target = choice("target", target, ("embeddings", "top-logits"))
        if self.target == "top-logits" and teacher_temperature is not None:
            raise UsageError(
                f"objective 'bank' has teacher_temperature {teacher_temperature:g} and learns from top logits, which "
                "were kept at the teacher's own; leave it out, or use target: embeddings"
            )
        self.needs = self.needs_with({"target": target})
        width = (teacher or student).embedding if anchors == "teacher" else student.embedding
        self.projector = projector_if_needed(student.embedding, width, seed=seed, tag="bank")

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        return Needs(bank=True, logits=options.get("target") == "top-logits")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        anchors = teacher.bank if self.anchors == "teacher" else student.bank
        if teacher.bank is None or anchors is None:
            raise UsageError(
                "objective 'bank' was given outputs without a bank of texts; there is nothing to score pictures "
                "against, so set a text batch or a bank in the recipe"
            )
        if len(anchors) != len(teacher.bank) or len(anchors) < 2:
            raise UsageError(
                f"objective 'bank' was given banks of {len(anchors)} and {len(teacher.bank)} texts but compares the "
                "same 2 or more; distributions over different texts mean nothing, so embed one list by both models"
            )
        if not len(student.image):
            return {"bank": self.zero(student)}
        scale = inverse_temperature(self.temperature, student)
        logits = Similarity(unit(self.projector(student.image)), unit(anchors), scale)
        if self.target == "top-logits":
            kept, ids = _largest(teacher, len(anchors))
            total = summed_rows(lambda block, rows: len(block) * _kl_of_largest(kept[rows], ids[rows], block), logits)
        else:
            their_scale = inverse_temperature(self.teacher_temperature, teacher)
            target = Similarity(unit(teacher.image), unit(teacher.bank), their_scale)
            total = summed_rows(lambda block, rows: len(block) * kl_rows(target.whole(rows), block), logits)
        return {"bank": total / len(student.image)}


def _largest(teacher: Outputs, texts: int) -> tuple[Tensor, Tensor]:
    """The teacher's top logits [B, k + 1] and the texts that they are of [B, k]."""
    kept, ids = teacher.top_logits, teacher.top_ids
    if kept is None or ids is None:
        raise UsageError(
            "objective 'bank' was given a teacher without top logits, so it has no target; set teacher.logits in the "
            "recipe, or use target: embeddings"
        )
    if int(ids.max()) >= texts:
        raise UsageError(
            f"objective 'bank' was given top logits of text {int(ids.max())} and a bank of {texts}, so they "
            "are of another list; give both the same texts"
        )
    return kept, ids


def _kl_of_largest(kept: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    others = logits.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    return kl_rows(kept, torch.cat([logits.gather(1, ids), others], dim=1))
