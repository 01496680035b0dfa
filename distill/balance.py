"""Balance objectives by the gradients that they send to the student's embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.objectives import Outputs

_KEPT = 0.9
_NOTHING = 1e-12


class GradientBalance:
    """Factors that give every objective the gradient norm of the first, times its own weight (`train.balance`).

    Formula: with E the student's image, text, bank and masked-image embeddings in the batch that objective k sees
    (gathered over ranks, before any normalisation), n_k the running mean of |d L_k / d E|_2 over measurements,
        factor_k = n_1 / n_k,   n_k <- 0.9 n_k + 0.1 |d L_k / d E|   (the first measurement sets it),
    so that the weighted objective w_k factor_k L_k has a gradient of norm w_k n_1. Schedules of w_k stay as they are.
    A measurement of (nearly) 0, as of a term without captioned rows, is left out. What was never measured keeps
    factor 1: objectives that read no embedding (`hint`, `masked-language`, `region-self`, `dho`), and all until the
    first was measured.
    Cost: at a measurement, each objective's backward once more, down to the embeddings and not into the towers.
    Ranks: the gradient is averaged over ranks first, as some losses are shared out (`objectives.blocks`), so that all
    come to the same factors.

    Sources: this is the rule of the loss balancer of EnCodec (Defossez et al. 2022, 2210.13438; written from memory),
    with the first objective's norm as the reference where they have a constant, and norms measured now and then. The
    adaptive weight of VQGAN (Esser et al. 2021, 2012.09841) is the same ratio for two losses without a running mean.
    It is not GradNorm (Chen et al. 2018, 1711.02257), which *trains* the weights so that losses fall at equal rates.

    norms: n_k, 0 where nothing was measured yet.
    """

    def __init__(self, count: int) -> None:
        self.norms = [0.0] * count

    def measure(
        self, place: int, loss: Tensor, student: Outputs, mean: Callable[[Tensor], Tensor] = lambda value: value
    ) -> None:
        """Take the unweighted loss of objective `place` into its running norm; its graph stays usable.

        mean: over ranks, of a tensor.
        """
        asked = (student.image, student.text, student.bank, student.masked_image)
        embeddings = [e for e in asked if e is not None and e.requires_grad]
        if not embeddings or not loss.requires_grad:
            return
        found = torch.autograd.grad(loss, embeddings, retain_graph=True, allow_unused=True)
        # a rank without a row of a shared loss has no gradient and speaks with the others all the same
        whole = (mean(torch.zeros_like(e) if g is None else g) for e, g in zip(embeddings, found))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in whole))
        if math.isfinite(norm) and norm > _NOTHING:
            before = self.norms[place]
            self.norms[place] = _KEPT * before + (1 - _KEPT) * norm if before else norm

    def factor(self, place: int) -> float:
        """What the weight of objective `place` is multiplied by."""
        first, own = self.norms[0], self.norms[place]
        return first / own if first and own else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms)}

    def load_state_dict(self, value: Mapping[str, Any]) -> None:
        self.norms = [float(norm) for norm in value["norms"]]
