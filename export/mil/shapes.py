"""Operations of ML programs that move values and compute none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.export.mil.arguments import Arguments, operation


def widen(x: Tensor, padding: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """`x` with (before, after) more values along each of its last dimensions."""
    # torch pads the last dimension first
    flat = list(itertools.chain.from_iterable(reversed(padding)))
    return F.pad(x, flat, value=value) if any(flat) else x


@operation("shape")
def _shape(a: Arguments) -> Tensor:
    return torch.tensor(a.tensor().shape, dtype=torch.int32)


@operation("fill")
def _fill(a: Arguments) -> Tensor:
    value = a.maybe("value")
    return torch.zeros(a.ints("shape")) if value is None else torch.full(a.ints("shape"), value.item())


@operation("range_1d")
def _range(a: Arguments) -> Tensor:
    return torch.arange(*(a.tensor(name).item() for name in ("start", "end", "step")))


@operation("reshape")
def _reshape(a: Arguments) -> Tensor:
    x, sizes = a.tensor(), a.ints("shape")
    if 0 in sizes and len(sizes) != x.ndim:
        raise ValueError(f"0 in the shape {sizes}, which is of another rank than {list(x.shape)}")
    return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(sizes)])


@operation("transpose")
def _transpose(a: Arguments) -> Tensor:
    return a.tensor().permute(a.ints("perm"))


@operation("expand_dims")
def _expand_dims(a: Arguments) -> Tensor:
    x, axes = a.tensor(), a.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operation("squeeze")
def _squeeze(a: Arguments) -> Tensor:
    return a.tensor().squeeze(a.ints("axes")) if "axes" in a else a.tensor().squeeze()


@operation("tile")
def _tile(a: Arguments) -> Tensor:
    return a.tensor().repeat(a.ints("reps"))


@operation("concat")
def _concat(a: Arguments) -> Tensor:
    values, axis = a.tensors(), a.integer("axis")
    if not a.flag("interleave"):
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@operation("stack")
def _stack(a: Arguments) -> Tensor:
    return torch.stack(a.tensors(), a.integer("axis"))


@operation("split")
def _split(a: Arguments) -> tuple[Tensor, ...]:
    x, axis = a.tensor(), a.integer("axis")
    sizes = a.ints("split_sizes", []) or [x.shape[axis] // a.integer("num_splits")] * a.integer("num_splits")
    return torch.split(x, sizes, axis)


@operation("pad")
def _pad(a: Arguments) -> Tensor:
    x, pad = a.tensor(), a.ints("pad")
    mode = a.text("mode", "constant")
    pairs = list(zip(pad[::2], pad[1::2]))
    if mode == "constant":
        return widen(x, pairs, a.number("constant_val", 0.0))
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        size = x.shape[axis]
        at = torch.arange(-before, size + after)
        if mode == "reflect":
            at = (size - 1) - (at.abs() - (size - 1)).abs()
        elif mode == "replicate":
            at = at.clamp(0, size - 1)
        else:
            raise ValueError(f"pad mode {mode!r}")
        x = x.index_select(axis, at)
    return x


@operation("slice_by_index")
def _slice_by_index(a: Arguments) -> Tensor:
    x = a.tensor()
    begin, end, stride = a.ints("begin"), a.ints("end"), a.ints("stride", [1] * x.ndim)
    masks = [a.flags(name, x.ndim) for name in ("begin_mask", "end_mask", "squeeze_mask")]
    squeezed = []
    for axis, (first, last, step, from_start, to_end, squeeze) in enumerate(zip(begin, end, stride, *masks)):
        size = x.shape[axis]
        if squeeze:
            chosen = [range(size)[first]]
            squeezed.append(axis)
        else:
            chosen = list(range(size)[slice(None if from_start else first, None if to_end else last, step)])
        x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x.squeeze(squeezed) if squeezed else x


@operation("slice_by_size")
def _slice_by_size(a: Arguments) -> Tensor:
    x = a.tensor()
    for axis, (first, size) in enumerate(zip(a.ints("begin"), a.ints("size"))):
        x = x.narrow(axis, first, x.shape[axis] - first if size == -1 else size)
    return x


@operation("gather")
def _gather(a: Arguments) -> Tensor:
    x, indices, skip = a.tensor(), a.tensor("indices").long(), a.integer("batch_dims", 0)
    axis = a.integer("axis", 0) % x.ndim
    if not skip:
        y = x.index_select(axis, indices.reshape(-1))
        return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    rows = zip(x.flatten(0, skip - 1), indices.flatten(0, skip - 1))
    parts = [_gather(Arguments({"x": row, "indices": at, "axis": axis - skip})) for row, at in rows]
    stacked = torch.stack([part for part in parts if isinstance(part, Tensor)])
    return stacked.reshape(*x.shape[:skip], *stacked.shape[1:])


@operation("gather_nd")
def _gather_nd(a: Arguments) -> Tensor:
    x, indices, skip = a.tensor(), a.tensor("indices").long(), a.integer("batch_dims", 0)
    if (indices < 0).any():
        raise IndexError("a negative index, which is out of bounds from iOS 17 on")
    rank = indices.ndim - 1
    batch = [torch.arange(x.shape[i]).reshape([-1 if j == i else 1 for j in range(rank)]) for i in range(skip)]
    return x[(*batch, *indices.unbind(-1))]


@operation("gather_along_axis")
def _gather_along_axis(a: Arguments) -> Tensor:
    return torch.gather(a.tensor(), a.integer("axis", 0), a.tensor("indices").long())
