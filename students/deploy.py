"""The deployable graphs of a student: fused copies in eval mode that end in an L2-normalised embedding."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import Tensor, nn

from pocketvlm.students.image import ImageTower
from pocketvlm.students.student import Student


class DeployTower(nn.Module):
    """One tower and the final normalisation; a single tensor in, a single [B, D] tensor out."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        embedding, _ = self.tower(x)
        return F.normalize(embedding, dim=-1)


def deploy_image(student: Student) -> nn.Module:
    """uint8 [B, S, S, 3] -> unit-length [B, D], in the student's dtype, sharing no storage with the student.

    Branches that exist for training only (FastViT, RepViT, MobileOne, ...) are folded into one convolution each, which
    changes results by rounding alone: 1e-5 in float32 (tested).
    """
    tower = copy.deepcopy(student.image_tower)
    fuse_branches(tower)
    return _frozen(tower)


def deploy_text(student: Student) -> nn.Module:
    """int32 [B, context_length] -> unit-length [B, D], in the student's dtype, sharing no storage with the student."""
    return _frozen(copy.deepcopy(student.text_tower))


def fuse_branches(tower: ImageTower) -> None:
    """Fold train-time branches in place. In float64, as timm's fused layers are made in the default dtype."""
    dtype, default = tower.shift.dtype, torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        tower.eval().double()
        tower.trunk = reparameterize_model(tower.trunk)
    finally:
        torch.set_default_dtype(default)
    tower.to(dtype)


def _frozen(tower: nn.Module) -> nn.Module:
    return DeployTower(tower).eval().requires_grad_(False)
