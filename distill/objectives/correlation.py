"""Correlation congruence: kernel matrices of a batch follow the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pocketvlm.distill.objectives.blocks import summed_rows
from pocketvlm.distill.objectives.common import Widths, positive
from pocketvlm.distill.objectives.within import WithinModality, cosines
from pocketvlm.edge.errors import UsageError


def taylor_kernel(cosine: Tensor, gamma: float, order: int) -> Tensor:
    """Gaussian kernel exp(-gamma |x - y|^2) of unit vectors with these cosines x.y, by its Taylor series.

    exp(-2 gamma) sum_{p=0..order} (2 gamma)^p / p! (x.y)^p: |x - y|^2 = 2 - 2 x.y.
    """
    total = torch.ones_like(cosine)
    for p in range(1, order + 1):
        total = total + (2 * gamma) ** p / math.factorial(p) * cosine**p
    return math.exp(-2 * gamma) * total


class CorrelationCongruence(WithinModality):
    """correlation-congruence: a kernel of every two rows has the teacher's value.

    Formula: K_ij = exp(-2g) sum_{p=0..P} (2g)^p / p! cos_ij^p (Taylor series of exp(-g |x_i - x_j|^2) on unit vectors),
        L = |K^S - K^T|_F^2 / B^2.   g = `gamma` (default 0.4), P = `order` (default 2).
    Inputs: image and/or text ([B, D], widths may differ), chosen by `of` (default "image").
    Output: {"correlation-congruence_image"} (and text). Reduction: mean over all B^2 entries; the diagonal is 0.
    No temperature. At least 2 rows. By default K runs from .23 (opposite) over .45 (orthogonal) to .95 (equal rows).
    Paper: Peng et al. 2019 (CCKD, ICCV, 1904.01802); the kernel as read in torchdistill, the squared norm from memory.
    Other code under this name computes other losses: torchdistill does not square the norm (|K^S - K^T|_F / B^2, a
    gradient that does not fade near the teacher) and does not normalise the rows, although exp(-2g) presumes it;
    RepDistiller's "CC" is mean_i sum_k d_ik d_{i+1,k}, d = |f^S - f^T|, over neighbouring rows, which depends on the
    order of the batch.
    Ours: no linear embedding in front (128 wide in torchdistill's sample); both models' embeddings are projections.
    Related: with order 1 it is (2g exp(-2g))^2 times `gram`'s "cosine"; higher orders weigh close pairs more.
    Cost: two B x B matrices for each model.
    """

    name = "correlation-congruence"
    formula = "squared difference of Taylor-kernel matrices"
    paper = "CCKD, 1904.01802"

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        of: Sequence[str] | str = "image",
        gamma: float = 0.4,
        order: int = 2,
    ) -> None:
        super().__init__(of)
        if not isinstance(order, int) or isinstance(order, bool) or order < 1:
            raise UsageError(
                f"objective option 'order' is {order!r} but must be a whole number from 1; the kernel would be the "
                "same for all pairs, so give the number of terms of the series"
            )
        self.gamma, self.order = positive("gamma", gamma) or 1.0, order

    def suffixes(self) -> tuple[str, ...]:
        return ("",)

    def relation(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        theirs = cosines(teacher)

        def squares(block: Tensor, rows: slice) -> Tensor:
            ours, wanted = (taylor_kernel(part, self.gamma, self.order) for part in (block, theirs.whole(rows)))
            return (ours - wanted).square().sum()

        return {"": summed_rows(squares, cosines(student)) / len(student) ** 2}
