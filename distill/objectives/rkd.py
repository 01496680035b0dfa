"""Relational knowledge distillation: distances of pairs and angles of triplets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketvlm.distill.objectives.common import Widths, not_negative, unit, whole_number
from pocketvlm.distill.objectives.within import WithinModality
from pocketvlm.edge.errors import UsageError

# a cosine in float32 is off by 6e-8 times this, as far as one row is closer than another
_NEAR = 32.0
# squares up to here are of rows that coincide, whose angles are 0
_SAME = 1e-20
# bytes of the [N, N] of all vertices that a GPU works on at once, for each of three buffers
_TOGETHER = 64 << 20


class SquaredDistances(torch.autograd.Function):
    """|z_i - z_j|^2 of all rows, [N, D] -> [N, N], 0 for equal rows.

    In float64, where the products lose nothing that float32 rows hold; where two rows are nearly equal even that is too
    coarse, and theirs is taken from the difference. Apple's GPUs have no float64 and use float32. No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.dtype = z.dtype
        z = z.to(torch.float32 if z.device.type == "mps" else torch.float64)
        z = z - z.mean(dim=0)
        lengths = z.square().sum(dim=1)
        squares = torch.addmm(lengths[:, None] + lengths, z, z.T, alpha=-2.0)
        i, j = (squares <= 1e-6 * squares.max()).nonzero(as_tuple=True)
        # in parts: of a collapsed student these are all pairs, [N^2, D] at once
        for rows, others in zip(i.split(len(z)), j.split(len(z))):
            squares[rows, others] = (z[rows] - z[others]).square().sum(dim=-1)
        ctx.save_for_backward(z)
        return squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        pull = outer + outer.T
        return (2 * (pull.sum(dim=1, keepdim=True) * z - pull @ z)).to(ctx.dtype)


def squared_distances(z: Tensor) -> Tensor:
    """`SquaredDistances` of the rows of z, with gradient."""
    return SquaredDistances.apply(z)


def scaled_distances(squares: Tensor) -> Tensor:
    """Distances [N, N] divided by their mean over the N(N-1) off-diagonal entries; no gradient where one is 0."""
    apart = squares > 0
    distances = torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)
    mean = distances.sum() / (len(distances) * (len(distances) - 1))
    return distances / mean.clamp(min=1e-12)


class AngleLoss(torch.autograd.Function):
    """Mean over all N^3 triplets of Huber_1(psi^S - psi^T), see `RelationalKD`; squared distances [N, N] of both.

    By the law of cosines an angle needs distances only: with s_ij the squares and h_ij = (2 s_ij)^-1/2 (0 where rows
    coincide), psi_ijk = (s_ij + s_ik - s_jk) h_ij h_ik. So its cost does not depend on the width of the rows. One
    vertex i at a time, value and gradient together, so that nothing larger than [N, N] is ever held.
    exact: all of it in the squares' precision. Otherwise in float32, but for vertices that are `lopsided`: there, and
    only there, the sum cancels. No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, exact: bool) -> Tensor:
        near = lopsided(student) | lopsided(teacher) | exact
        value, gradient = _angles_at(near, student, teacher, student.dtype)
        more, slope = _angles_at(~near, student, teacher, torch.float32)
        ctx.save_for_backward((gradient + slope) / len(student) ** 3)
        return (value + more) / len(student) ** 3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer * gradient, None, None


def lopsided(squares: Tensor) -> Tensor:
    """bool [N]: rows whose nearest row, copies apart, is more than `_NEAR` times closer than their farthest."""
    farthest = squares.amax(dim=1)
    return torch.where(squares > _SAME, squares, torch.inf).amin(dim=1) * _NEAR**2 < farthest


def vertices_at_once(squares: Tensor) -> int:
    """A CPU keeps the [N, N] of one vertex in its cache; a GPU waits for each kernel, and takes many at once."""
    return 1 if squares.device.type == "cpu" else max(1, _TOGETHER // squares.nbytes)


def _angles_at(where: Tensor, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum of Huber_1(psi^S - psi^T) over the vertices in `where` (bool [N]), and its gradient at the student's squares.

    Both in the squares' own dtype, the N^3 terms in `dtype`.
    """
    total, to_edges = student.new_zeros(()), torch.zeros_like(student)
    vertices = where.nonzero()[:, 0]
    if not len(vertices):
        return total, to_edges
    ours, theirs = student.to(dtype), teacher.to(dtype)
    half, their_half = _half_inverse(student).to(dtype), _half_inverse(teacher).to(dtype)
    to_opposite, ones = torch.zeros_like(ours), torch.ones_like(ours[0])
    together = vertices_at_once(ours)
    scales, gaps, slope = (ours.new_empty(min(together, len(vertices)), *ours.shape) for _ in range(3))
    # views where it is one at a time
    places = [slice(i, i + 1) for i in vertices.tolist()] if together == 1 else vertices.split(together)
    for at in places:
        h, g, s, t = half[at], their_half[at], ours[at], theirs[at]
        count = len(h)
        scale, gap, steep = scales[:count], gaps[:count], slope[:count]
        # psi^S - psi^T = (a h' + h a' - h S h') - (the same of the teacher), with a = h s
        torch.mul(g[:, :, None], g[:, None, :], out=steep)
        torch.mul(h[:, :, None], h[:, None, :], out=scale)
        torch.mul(scale, ours, out=gap)
        gap.addcmul_(steep, theirs, value=-1.0)
        left, right = torch.stack([h * s, h, -g * t, -g], dim=2), torch.stack([h, h * s, g, g * t], dim=1)
        gap.baddbmm_(left, right, beta=-1.0)
        # Huber_1(x) = x' (x - x'/2) with x' its slope
        torch.clamp(gap, -1.0, 1.0, out=steep)
        total += torch.dot(steep.view(-1), gap.sub_(steep, alpha=0.5).view(-1))
        # d psi_jk / d s_jk = -h_j h_k; d psi_jk / d s_ij = h_j h_k - psi_jk h_j^2, and psi_kj as much again
        pull = scale.mul_(steep)
        to_opposite.sub_(pull[0] if count == 1 else pull.sum(dim=0))
        sums = pull @ ones
        pulled = pull[0] @ s[0] if count == 1 else (pull @ s[:, :, None])[:, :, 0]
        turned = s * sums + pulled - torch.linalg.vecdot(pull, ours)
        to_edges[at] = (2 * (sums - h.square() * turned)).to(to_edges.dtype)
    return total, to_edges + to_opposite


def _half_inverse(squares: Tensor) -> Tensor:
    """(2 squares)^-1/2; 0 for rows that coincide, whose angles then are 0."""
    apart = squares > _SAME
    return torch.where(apart, torch.where(apart, 2 * squares, 1.0).rsqrt(), 0.0)


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
    Related: `gram` compares cosines of pairs as they are, where distances here are relative to their mean; `order`
    takes only the teacher's ranking of them.
    Cost: the angle term's time grows with N^3, whatever the width, its memory with N^2; no second derivative.
    """

    name = "rkd"
    formula = "Huber of scaled distances (weight 1) and of triplet angles (weight 2)"
    paper = "RKD, 1904.05068"
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
        self.distance, self.angle = not_negative("distance", distance), not_negative("angle", angle)
        # the angles of two rows are 0 and 1 for any model
        self.normalize, self.angle_rows = normalize, whole_number("angle_rows", angle_rows, 3)

    def suffixes(self) -> tuple[str, ...]:
        weights = (("_distance", self.distance), ("_angle", self.angle))
        return tuple(suffix for suffix, weight in weights if weight)

    def relation(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        if self.normalize:
            student, teacher = unit(student), unit(teacher)
        ours, theirs = squared_distances(student), squared_distances(teacher)
        found = {}
        if self.distance:
            found["_distance"] = self.distance * F.smooth_l1_loss(scaled_distances(ours), scaled_distances(theirs))
        if self.angle:
            n, exact = self.angle_rows, student.dtype == torch.float64
            found["_angle"] = self.angle * AngleLoss.apply(ours[:n, :n], theirs[:n, :n], exact)
        return {name: value.to(student.dtype) for name, value in found.items()}
