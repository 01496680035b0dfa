"""Relational knowledge distillation: distances of pairs and angles of triplets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.common import Widths, unit
from pocketvlm.distill.objectives.within import WithinModality
from pocketvlm.edge.errors import UsageError


def scaled_distances(z: Tensor) -> Tensor:
    """Euclidean distances [N, N] divided by their mean over the N(N-1) off-diagonal entries.

    cdist without the matrix-product shortcut: that one cancels in float32 exactly where rows are alike.
    """
    distances = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(z) * (len(z) - 1))
    return distances / mean.clamp(min=1e-12)


def angles(z: Tensor) -> Tensor:
    """cosine of the angle at i between j and k, [N, N, N]; 0 where i coincides with j or k."""
    difference = z[None, :, :] - z[:, None, :]
    square = difference.square().sum(dim=-1, keepdim=True)
    apart = square > 1e-20
    # the inner where keeps the square root's gradient finite for coinciding rows
    direction = torch.where(apart, difference / torch.where(apart, square, 1.0).sqrt(), 0.0)
    return direction @ direction.transpose(1, 2)


class RelationalKD(WithinModality):
    """rkd: distances between rows, and angles of triplets of rows, follow the teacher's.

    Formula: D_ij = |z_i - z_j|, mu = mean of D over i != j, psi_ijk = cos of the angle at z_i between z_j and z_k,
        distance: mean over all N^2 entries of Huber_1( D^S/mu^S - D^T/mu^T ),
        angle:    mean over all N^3 entries of Huber_1( psi^S - psi^T ), 0 where i = j or i = k,
        Huber_1(x) = x^2/2 for |x| < 1, else |x| - 1/2. mu^S is not detached.
    Inputs: image and/or text ([B, D], widths may differ), chosen by `of` (default "image").
    Output: {"rkd_image_distance", "rkd_image_angle"} (and text), times `distance` (1) and `angle` (2), the weights of
    the authors' readme; a weight of 0 leaves the term out.
    Reduction: means as above, zero entries included, as in the authors' code. No temperature.
    normalize=True (default) L2-normalises both models' rows first: student outputs are raw and teacher embeddings are
    not. normalize=False is the authors' example. At least 3 rows: with 2, both terms are identically zero.
    Paper: Park et al. 2019 (RKD, 1904.05068), equations 4 to 9; code lenscloth/RKD.
    Ours: normalisation by default; `angle_rows` (default 256): of a larger batch only the first so many rows enter the
    angle term, whose memory grows with N^3; coinciding rows have distance 0 (the code clamps squares at 1e-12).
    """

    name = "rkd"
    minimum_rows = 3

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        of: Sequence[str] | str = "image",
        distance: float = 1.0,
        angle: float = 2.0,
        normalize: bool = True,
        angle_rows: int = 256,
    ) -> None:
        super().__init__(of)
        if not distance and not angle:
            raise UsageError(
                "objective 'rkd' has both weights at 0; nothing would be learned, so give distance or angle one"
            )
        self.distance, self.angle, self.normalize, self.angle_rows = distance, angle, normalize, angle_rows

    def suffixes(self) -> tuple[str, ...]:
        weights = (("_distance", self.distance), ("_angle", self.angle))
        return tuple(suffix for suffix, weight in weights if weight)

    def relation(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        if self.normalize:
            student, teacher = unit(student), unit(teacher)
        found = {}
        if self.distance:
            value = F.smooth_l1_loss(scaled_distances(student), scaled_distances(teacher))
            found["_distance"] = self.distance * value
        if self.angle:
            n = self.angle_rows
            found["_angle"] = self.angle * F.smooth_l1_loss(angles(student[:n]), angles(teacher[:n]))
        return found
