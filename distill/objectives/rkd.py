"""Relational knowledge distillation: distances of pairs and angles of triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketvlm.distill.objectives.common import Widths, unit
from pocketvlm.distill.objectives.within import WithinModality
from pocketvlm.edge.errors import UsageError


def scaled_distances(z: Tensor) -> Tensor:
    """Euclidean distances [N, N] divided by their mean over the N(N-1) off-diagonal entries.

    cdist without the matrix-product shortcut: that one cancels in float32 exactly where rows are alike.
    """
    return _scaled(torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist"))


def _scaled(distances: Tensor) -> Tensor:
    mean = distances.sum() / (len(distances) * (len(distances) - 1))
    return distances / mean.clamp(min=1e-12)


def geometry(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(centred rows [N, D], their products [N, N], squared distances [N, N], 0 for equal rows), no gradient.

    In float64, where the products lose nothing that float32 rows hold; where two rows are nearly equal even that is too
    coarse, and their squared distance is taken from the difference. (Apple's GPUs have no float64 and use float32.)
    """
    z = z.detach().to(torch.float32 if z.device.type == "mps" else torch.float64)
    z = z - z.mean(dim=0)
    products = z @ z.T
    lengths = products.diagonal()
    squares = lengths[:, None] + lengths[None, :] - 2 * products
    i, j = (squares <= 1e-6 * squares.max()).nonzero(as_tuple=True)
    squares[i, j] = (z[i] - z[j]).square().sum(dim=-1)
    return z, products, squares


class AngleLoss(torch.autograd.Function):
    """Mean over all N^3 triplets of Huber_1(psi^S - psi^T), see `RelationalKD`; student, teacher: [N, D_S], [N, D_T].

    One vertex at a time, value and gradient together, so that nothing larger than [N, N] is ever held: with
    A_jk = (z_j - z_i).(z_k - z_i) = G_jk - G_ij - G_ik + G_ii and r_j = 1/|z_j - z_i|, psi_ijk = A_jk r_j r_k.
    No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        n = len(student)
        (z, products, squares), (_, their_products, their_squares) = geometry(student), geometry(teacher)
        inverse, their_inverse = _inverse_root(squares), _inverse_root(their_squares)
        scales, psi, difference = (torch.empty_like(products) for _ in range(3))
        total = products.new_zeros(())
        to_products, to_squares = torch.zeros_like(products), torch.zeros_like(products)
        for i in range(n):
            _cosines_at(i, their_products, their_inverse, scales, difference)
            _cosines_at(i, products, inverse, scales, psi)
            torch.sub(psi, difference, out=difference)
            slope = difference.clamp(-1.0, 1.0)
            # Huber_1(x) = h (x - h/2) with h its slope
            total += torch.linalg.vecdot(slope, difference.sub_(slope, alpha=0.5)).sum()
            r = inverse[i]
            to_squares[i] = -torch.linalg.vecdot(psi, slope) * r.square()
            to_products.addcmul_(slope, scales)
            rows = r * (slope @ r)
            to_products[i] -= 2 * rows
            to_products[i, i] += rows.sum()
        pulls = to_squares + to_squares.T
        gradient = (to_products + to_products.T) @ z + 2 * (pulls.sum(dim=1, keepdim=True) * z - pulls @ z)
        ctx.save_for_backward((gradient / n**3).to(student.dtype))
        return (total / n**3).to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None


def _inverse_root(squares: Tensor) -> Tensor:
    """1 / distance; 0 for rows that coincide, whose angles then are 0."""
    apart = squares > 1e-20
    return torch.where(apart, torch.where(apart, squares, 1.0).rsqrt(), 0.0)


def _cosines_at(i: int, products: Tensor, inverse: Tensor, scales: Tensor, out: Tensor) -> None:
    """psi_i [N, N] into `out`, and r_j r_k into `scales`."""
    r = inverse[i]
    shift = (products[i] - products[i, i] / 2) * r
    torch.outer(r, r, out=scales)
    torch.mul(products, scales, out=out)
    out.addmm_(torch.stack([shift, r], dim=1), torch.stack([r, shift]), alpha=-1.0)


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
    angle term; coinciding rows have distance 0 (the code clamps squares at 1e-12).
    Cost: the angle term's time grows with N^3, its memory with N^2 (one vertex at a time); no second derivative.
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
            theirs = _scaled(geometry(teacher)[2].sqrt()).to(student.dtype)
            found["_distance"] = self.distance * F.smooth_l1_loss(scaled_distances(student), theirs)
        if self.angle:
            n = self.angle_rows
            found["_angle"] = self.angle * AngleLoss.apply(student[:n], teacher[:n])
        return found
