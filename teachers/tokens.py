"""Token maps of a teacher: their shape, their cost on disk, and how they are brought to one grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import Teacher, TokenTeacher
from pocketvlm.teachers.cache_format import DTYPES


def gray(teacher: Teacher) -> Tensor:
    """One picture, to ask a teacher for its shapes: uint8 [1, S, S, 3]."""
    return torch.full((1, teacher.image.size, teacher.image.size, 3), 128, dtype=torch.uint8)


def token_shape(teacher: Teacher, grid: int | None = None) -> tuple[int, int]:
    """(places in a row, width) of the token maps that `teacher` gives, averaged to `grid` places (None: its own).

    Raises:
        UsageError: it gives none, or `grid` is finer than its own.
    """
    if not isinstance(teacher, TokenTeacher):
        raise UsageError(
            f"objectives on token maps were asked of teacher {teacher.name!r}, which gives embeddings only, so there "
            "is no map to learn from; use a teacher with image tokens (openmoji-lit, a ViT), or leave them out"
        )
    tokens = teacher.encode_image_tokens(gray(teacher)).taps["tokens"]
    own = math.isqrt(tokens.shape[1])
    if grid is not None and not 1 <= grid <= own:
        raise UsageError(
            f"token maps of {grid} x {grid} places were asked of teacher {teacher.name!r}, whose own have {own} x "
            f"{own}; finer ones would be made up, so ask for 1 to {own}"
        )
    return grid or own, tokens.shape[2]


def token_bytes(pictures: int, views: int, grid: int, width: int, dtype: str) -> int:
    """Bytes that token maps take on disk: `pictures` x `views` x `grid`^2 x `width` numbers."""
    return pictures * views * grid**2 * width * DTYPES[dtype].itemsize


def on_grid(tokens: Tensor, grid: int) -> Tensor:
    """[B, N, W] of a square grid, averaged (adaptive average pooling, exact where sizes divide) to [B, grid^2, W]."""
    own = math.isqrt(tokens.shape[1])
    if own == grid:
        return tokens
    maps = tokens.transpose(1, 2).unflatten(2, (own, own))
    return F.adaptive_avg_pool2d(maps, (grid, grid)).flatten(2).transpose(1, 2)
