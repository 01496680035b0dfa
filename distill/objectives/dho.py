"""DHO: one head learns the few labels, another one the teacher's zero-shot classifier, over one backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths, kl_rows, not_negative, positive
from pocketvlm.edge.errors import UsageError


def label_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, K] with label int64 [B] over rows with label >= 0; 0 with a graph if none."""
    known = label >= 0
    return F.cross_entropy(logits[known], label[known]) if bool(known.any()) else logits.reshape(-1)[:0].sum()


def taught_loss(logits: Tensor, teacher_logits: Tensor, label: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher_logits / T) || softmax(logits / T)), [B, K] each: the mean over the rows with a label plus
    the mean over those without; a part without rows is 0 with a graph."""
    total = logits.reshape(-1)[:0].sum()
    for rows in (label >= 0, label < 0):
        if bool(rows.any()):
            total = total + temperature**2 * kl_rows(teacher_logits[rows] / temperature, logits[rows] / temperature)
    return total


class DualHead(BatchObjective):
    """dho: cross-entropy of one head with the labels there are, divergence of another from the teacher's classifier.

    Formula: with g_c and g_k the two heads' logits, z the teacher's zero-shot logits (its logit scale times the cosine
    of picture and class text), y the labels, X_l the rows with a label and X_u those without,
        L = label_weight mean_{X_l} CE(g_c, y) + taught_weight ( D(X_l) + D(X_u) ),
        D(X) = T^2 mean_{i in X} KL( softmax(z_i / T) || softmax(g_k,i / T) ).
    Inputs: student.class_logits (g_c), student.taught_logits (g_k), teacher.class_logits (z), [B, K] each;
    student.label int64 [B], -1 where there is none. Output: {"dho_label", "dho_taught"}, with their weights.
    Reduction: mean over the rows of each part; the two parts of D are added, so that labelled rows count more where
    they are fewer. KL direction: teacher || student, at temperature T = 2, with the factor T^2. A batch of one is fine,
    rows are not compared; duplicates count twice. `taught_weight: 0` reads no teacher (the cross-entropy baseline), and
    `label_weight: 0` no label (zero-shot distillation). Gradients: g_c from labels alone, g_k from the teacher alone;
    they meet in the features.
    Paper: DHO (2505.07675) and its released code: weights 0.5 and 0.5 in few-shot training on ten data sets (the
    defaults), 1 and 1 on ImageNet with 1 % and 10 % of the labels. There X_l and X_u are two batches; here they are the
    rows of one, in the proportion of `train.captioned_fraction`. What the heads are mixed to afterwards is
    `students.task`.
    Related: `bank` compares with texts through the student's own text tower; `hycd` blends truth and teacher into one
    target, which here have a head each.
    Cost: none to speak of, K numbers a row.
    """

    name = "dho"
    formula = (
        "½ CE(g_c, label) + ½ T² KL(p^T ‖ softmax(g_k / T)), the teacher's zero-shot classifier p^T, over labelled "
        "rows and over the others, added; two heads"
    )
    paper = "DHO, 2505.07675"
    needs = Needs(classes=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        temperature: float = 2.0,
        label_weight: float = 0.5,
        taught_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature) or 2.0
        self.label_weight = not_negative("label_weight", label_weight)
        self.taught_weight = not_negative("taught_weight", taught_weight)
        if not (self.label_weight or self.taught_weight):
            raise UsageError(
                "objective 'dho' has both weights 0, so neither head would learn; set label_weight or taught_weight"
            )
        self.needs = self.needs_with({"taught_weight": taught_weight})

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        return Needs(classes=True, teacher=options.get("taught_weight", 0.5) != 0)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        own, taught, label, wanted = student.class_logits, student.taught_logits, student.label, teacher.class_logits
        if own is None or taught is None or label is None or wanted is None:
            raise UsageError(
                "objective 'dho' was given outputs without class logits or labels, so there are no classes to learn; "
                "add 'task' to the recipe, or fill Outputs.class_logits, taught_logits and label"
            )
        if own.shape != wanted.shape:
            raise UsageError(
                f"objective 'dho' was given {own.shape[1]} classes of the student and {wanted.shape[1]} of the "
                "teacher, which cannot be compared; give both the same list of classes"
            )
        found = {"dho_label": self.zero(student), "dho_taught": self.zero(student)}
        if self.label_weight:
            found["dho_label"] = self.label_weight * label_loss(own, label)
        if self.taught_weight:
            found["dho_taught"] = self.taught_weight * taught_loss(taught, wanted, label, self.temperature)
        return found
