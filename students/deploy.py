"""The deployable graphs of a student: fused copies in eval mode that end in an L2-normalised embedding."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from pocketvlm.students.image import ImageTower, ProjectionHead
from pocketvlm.students.student import Student


class DeployTower(nn.Module):
    """One tower and the final normalisation; a single tensor in, a single [B, D] tensor out."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        embedding, _ = self.tower(x)
        return F.normalize(embedding, dim=-1)


class DeployClassifier(nn.Module):
    """A task student's image tower and what remains of its heads: uint8 [B, S, S, 3] -> logits [B, K]."""

    def __init__(self, tower: ImageTower, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tower.features(x))


def deploy_image(student: Student) -> nn.Module:
    """uint8 [B, S, S, 3] -> unit-length [B, D], on the CPU in the student's dtype, sharing no storage with the student.

    Of a task student: logits [B, K] over its classes, through as few linear layers as give them (`students.task`).

    Branches that exist for training only (FastViT, RepViT, MobileOne, ...) are folded into one convolution each, which
    changes results by rounding alone: 1e-5 in float32 (tested).
    """
    tower = copy.deepcopy(student.image_tower).cpu()
    fuse_branches(tower)
    if student.heads is not None:
        tower.projection = nn.Identity()  # no part of the classifier
        head = copy.deepcopy(student.heads.deployed()).cpu()
        return DeployClassifier(tower, head).eval().requires_grad_(False)
    return _frozen(tower)


def deploy_text(student: Student) -> nn.Module:
    """int32 [B, context_length] -> unit-length [B, D], in the student's dtype, a copy on the CPU."""
    tower = copy.deepcopy(student.text_tower).cpu()
    dtype = tower.token.weight.dtype
    fold_norm(tower.double().projection)
    return _frozen(tower.to(dtype))


def fuse_branches(tower: ImageTower) -> None:
    """Fold train-time branches and norms in place. In float64, as timm's fused layers are made in the default dtype."""
    dtype, default = tower.shift.dtype, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        tower.eval().double()
        tower.trunk = reparameterize_model(tower.trunk)
    finally:
        torch.set_default_dtype(default)
    if isinstance(tower.projection, ProjectionHead):
        fold_norm(tower.projection)
    tower.to(dtype)


@torch.no_grad()
def fold_norm(head: ProjectionHead) -> None:
    """Fold an evaluated batch norm into the linear layer after it, in place; other norms stay."""
    norm, linear = head.norm, head.first
    if not isinstance(norm, nn.BatchNorm1d):
        return
    assert norm.running_mean is not None, "ProjectionHead's batch norm keeps statistics"
    assert norm.running_var is not None, "ProjectionHead's batch norm keeps statistics"
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = linear.weight @ (norm.bias - norm.running_mean * gain)
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
    linear.weight = nn.Parameter(linear.weight * gain)
    head.norm = nn.Identity()


def _frozen(tower: nn.Module) -> nn.Module:
    return DeployTower(tower).eval().requires_grad_(False)
