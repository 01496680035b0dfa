"""The smaller student inside a student that was trained for it."""

from __future__ import annotations

import torch
from torch import nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.axes import change_axes
from pocketvlm.students.config import parse_config
from pocketvlm.students.student import Student


def truncated(student: Student, *, text_layers: int | None = None, dim: int | None = None) -> Student:
    """A copy with the first `text_layers` layers of the text tower and the first `dim` numbers of the embedding.

    Really smaller: the other layers and rows of the projections are gone. Its text tower computes what the whole one's
    does after so many layers (through the same final norm, pooling and projection); its image tower is whole but for
    the projection. It stays in `student`'s space: its embeddings compare with the first `dim` numbers of the whole
    student's, normalised again. What it promises in turn are the promises that lie inside it. None: all there is.

    Raises:
        UsageError: a pair that the student does not promise (`exits`; `dims` for the whole text tower).
    """
    config = student.config
    layers = config.text.layers if text_layers is None else text_layers
    width = student.embed_dim if dim is None else dim
    promised = [*config.exits, *((config.text.layers, m) for m in (*config.dims, student.embed_dim))]
    if (layers, width) not in promised:
        shown = ", ".join(f"{layer} x {m}" for layer, m in promised)
        raise UsageError(
            f"student {config.name!r} does not promise {layers} text layers with {width} numbers, so nobody trained "
            f"that smaller student; take one of {shown} (layers x numbers), or train it with matryoshka-2d and "
            "student.overrides.exits"
        )
    inside = {m for layer, m in promised if layer == layers and m < width}
    values = config.model_dump(mode="json")
    values["text"] |= {"layers": layers, "weights_layers": values["text"]["weights_layers"][:layers]}
    values["dims"] = sorted(inside)
    values["exits"] = [[layer, m] for layer, m in config.exits if layer < layers and m <= width]
    smaller = parse_config(values, source=f"truncated student {config.name!r}")
    changed = change_axes(student, torch.eye(student.embed_dim)[:, :width], config=smaller)
    changed.text_tower.blocks = nn.ModuleList(list(changed.text_tower.blocks)[:layers])
    changed.space_id = student.contract.space_id
    return changed
