"""What several objectives make of one batch, made once: full-precision outputs, captioned rows, unit embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_T = TypeVar("_T")
_MADE: ContextVar[dict[Any, tuple[Any, tuple[object, ...]]] | None] = ContextVar("made", default=None)
_NEAR_ZERO = 1e-12


@contextmanager
def made_once() -> Iterator[None]:
    """Inside, objectives share what they make of one step's outputs; leave it before the backward, to free the rest."""
    token = _MADE.set({})
    try:
        yield
    finally:
        _MADE.reset(token)


def once(make: Callable[[], _T], what: str, *of: object) -> _T:
    """`make()`, or inside `made_once` what it gave before for `what` of these very objects."""
    made = _MADE.get()
    if made is None:
        return make()
    # what was made without a graph is of no use where one is wanted
    key = (what, torch.is_grad_enabled(), *map(id, of))
    if key not in made:
        made[key] = (make(), of)  # `of` is held, so that no other object gets its id
    found: _T = made[key][0]
    return found


def embeddings(*given: Tensor | None) -> None:
    """Say that these tensors are the batch's, which other objectives will normalise too."""
    made = _MADE.get()
    if made is not None:
        made |= {id(value): (None, (value,)) for value in given if value is not None}


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; a zero row stays zero. Of the batch's `embeddings`, one tensor for all objectives."""
    made = _MADE.get()
    if made is None or id(x) not in made:
        return _unit(x)
    return once(lambda: _unit(x), "unit", x)


def _unit(x: Tensor) -> Tensor:
    found: Tensor = _Unit.apply(x)
    return found


class _Unit(torch.autograd.Function):
    """torch's `normalize` with less memory in its backward, and no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        divisor = length.clamp_min(_NEAR_ZERO)
        found = x / divisor
        ctx.save_for_backward(found, divisor)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        found, divisor = ctx.saved_tensors
        along = (slope * found).sum(dim=-1, keepdim=True).masked_fill(divisor <= _NEAR_ZERO, 0.0)
        return torch.addcmul(slope, found, along, value=-1).div_(divisor)
