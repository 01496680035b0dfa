"""Gradient distillation (CLIP-KD): the contrastive loss pulls the student's embeddings as it pulls the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    inverse_temperature,
    positive,
    projector_if_needed,
    unit,
)
from pocketvlm.distill.objectives.contrastive import DUPLICATES, masked_log_softmax, match_targets


def info_nce_gradients(
    queries: Tensor, keys: Tensor, scale: Tensor | float, group: Tensor | None, duplicates: str
) -> tuple[Tensor, Tensor]:
    """Gradients of info_nce(scale * queries @ keys.T) with respect to queries and keys, [P, D] each, in closed form."""
    logits = scale * queries @ keys.T
    target, left_out = match_targets(logits, group, duplicates)
    chance = masked_log_softmax(logits, left_out).exp().masked_fill(left_out, 0.0)
    residual = scale / len(logits) * (chance - target)
    return residual @ keys, residual.T @ queries


class GradientDistillation(BatchObjective):
    """gradient: the contrastive loss has the same gradient at the student's embeddings as at the teacher's.

    Formula: with v, s the L2-normalised embeddings of the P captioned rows, c the logit scale, p = softmax_j(c
    v_i.s_j), and I2T = mean_i -log p_ii, its gradients are (y the one-hot target)
        dI2T/dv_k = c/P sum_j (p_kj - y_kj) s_j,    dI2T/ds_k = c/P sum_i (p_ik - y_ik) v_i;
    with the two of T2I, L = sum of the four mean squared errors between the student's and the teacher's.
    Inputs: image, text [B, D] of both models; other widths go through seeded projectors before normalising. group [B].
    Output: {"gradient"}. Reduction: mean over rows *and* D, sum of the four, as in the released code. Each gradient
    carries 1/P, so that the value falls as 1/P^2 with the batch: choose the weight for one batch size.
    The gradients are those at the normalised embeddings, and the student's is differentiated again (through p, c and
    the embeddings); the teacher's is a constant.
    Temperature: `temperature` = 1/c of both models; None (default) takes each model's own logit scale, and the
    student's is trained. Here the logit scale multiplies; the released code passes it as a temperature and divides.
    Paper: Yang et al. 2024 (CLIP-KD, 2307.12732), "gradient distillation". The four separate errors and the mean over D
    are read from the released code; how the paper's own equation reduces them could not be read.
    Ours: `duplicates`: both models' gradients are those of `clip` with the same option (default "ignore").
    Related: `crd` matches p alone; this matches p - y as seen through each model's embeddings.
    Cost: two P x P matrices and eight products of P x P by P x D; no P x D x P tensor, as the released code has.
    """

    name = "gradient"
    formula = "MSE of the gradients that the contrastive loss has at each embedding"
    paper = "CLIP-KD (GD)"
    needs = Needs(captions=True)
    minimum_rows = 2

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        temperature: float | None = None,
        duplicates: str = "ignore",
    ) -> None:
        super().__init__()
        width = (teacher or student).embedding
        self.temperature = positive("temperature", temperature)
        self.duplicates = choice("duplicates", duplicates, DUPLICATES)
        self.image_projector = projector_if_needed(student.embedding, width, seed=seed, tag="gradient/image")
        self.text_projector = projector_if_needed(student.embedding, width, seed=seed, tag="gradient/text")

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        rows = self.pairs(student, teacher)
        if rows is None:
            return {"gradient": self.zero(student)}
        their_image, their_text = (unit(part) for part in rows.taught())
        image, text = unit(self.image_projector(rows.image)), unit(self.text_projector(rows.text))
        found = self._four(image, text, inverse_temperature(self.temperature, student), rows.group)
        wanted = self._four(their_image, their_text, inverse_temperature(self.temperature, teacher), rows.group)
        return {"gradient": torch.stack([F.mse_loss(*pair) for pair in zip(found, wanted)]).sum()}

    def _four(self, image: Tensor, text: Tensor, scale: Tensor | float, group: Tensor | None) -> tuple[Tensor, ...]:
        image_to_text = info_nce_gradients(image, text, scale, group, self.duplicates)
        return (*image_to_text, *info_nce_gradients(text, image, scale, group, self.duplicates))
