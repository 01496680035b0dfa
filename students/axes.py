"""A student's joint space in other coordinates."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.config import StudentConfig
from pocketvlm.students.student import Student


@torch.no_grad()
def change_axes(student: Student, axes: Tensor, *, config: StudentConfig | None = None) -> Student:
    """A copy whose embeddings are `student`'s times `axes`, folded into the last linear layer of both projections.

    With orthogonal square axes every cosine at full width stays as it is, to rounding, and only what a prefix keeps
    changes; with fewer columns the copy is a narrower student. Its space is its own (`space_id` None).

    Args:
        config: of the copy, where it promises other prefixes than `student` (`dims`, `exits`).
        axes: [D, M], the new coordinates' directions as columns in the old ones, M <= D = the student's width.

    Raises:
        UsageError: axes of another width, or prefixes promised that the narrower student would not have.
    """
    width = student.embed_dim
    if axes.ndim != 2 or axes.shape[0] != width or not 0 < axes.shape[1] <= width:
        raise UsageError(
            f"axes {list(axes.shape)} were given for a student of {width} numbers; its embeddings could not be "
            f"multiplied by them, so give [{width}, M] with M from 1 to {width}"
        )
    config = student.config if config is None else config
    widest = max([0, *config.dims, *(m for _, m in config.exits)])
    if widest > axes.shape[1]:
        raise UsageError(
            f"the student promises prefixes up to {widest} numbers (dims, exits) and {axes.shape[1]} axes leave fewer; "
            "give a config without them, or keep more axes"
        )
    changed = copy.deepcopy(student)
    towers: tuple[Any, Any] = (changed.image_tower, changed.text_tower)
    for tower in towers:
        head = tower.projection
        place = "second" if isinstance(getattr(head, "second", None), nn.Linear) else "first"
        linear = getattr(head, place)
        turn = axes.to(linear.weight.device, torch.float64)
        biased = linear.bias is not None
        # without initial values: drawing them would move the global generator
        new: Any = nn.utils.skip_init(nn.Linear, linear.in_features, turn.shape[1], bias=biased).to(linear.weight)
        new.weight.copy_(turn.T @ linear.weight.double())
        if biased:
            new.bias.copy_(linear.bias.double() @ turn)
        setattr(head, place, new)
    changed.config, changed.embed_dim, changed.space_id = config, axes.shape[1], None
    return changed
