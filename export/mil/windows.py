"""Operations of ML programs that slide a window: convolutions and pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.export.mil.arguments import Arguments, operation
from pocketvlm.export.mil.shapes import widen


def _padding(a: Arguments, x: Tensor, window: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) of each spatial dimension. window: the kernel's span, dilation included."""
    kind = a.text("pad_type", "valid").lower()
    if kind == "valid":
        return [(0, 0)] * len(window)
    if kind == "custom":
        pad = a.ints("pad", [0] * (2 * len(window)))
        return list(zip(pad[::2], pad[1::2]))
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type {kind!r}")
    result = []
    for size, span, stride in zip(x.shape[2:], window, strides):
        total = max((-(-size // stride) - 1) * stride + span - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if kind == "same" else (large, small))
    return result


@operation("conv")
def _conv(a: Arguments) -> Tensor:
    x, weight = a.tensor(), a.tensor("weight")
    count = weight.ndim - 2
    strides, dilations = a.ints("strides", [1] * count), a.ints("dilations", [1] * count)
    window = [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations)]
    x = widen(x, _padding(a, x, window, strides))
    run = (F.conv1d, F.conv2d, F.conv3d)[count - 1]
    return run(x, weight, a.maybe("bias"), strides, 0, dilations, a.integer("groups", 1))


@operation("conv_transpose")
def _conv_transpose(a: Arguments) -> Tensor:
    x, weight = a.tensor(), a.tensor("weight")
    count = weight.ndim - 2
    strides, dilations = a.ints("strides", [1] * count), a.ints("dilations", [1] * count)
    if a.text("pad_type", "valid").lower() not in ("valid", "custom"):
        raise ValueError("conv_transpose with pad_type 'same'")
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[count - 1]
    y = run(x, weight, a.maybe("bias"), strides, 0, 0, a.integer("groups", 1), dilations)
    wanted = a.ints("output_shape", [])
    for dim, (before, after) in enumerate(_padding(a, x, [1] * count, strides)):
        size = y.shape[dim + 2] - before - after
        y = y.narrow(dim + 2, before, wanted[dim + 2] if wanted else size)
    return y


# --- pooling --------------------------------------------------------------------------------------------------------


def _windows(a: Arguments, fill: float) -> tuple[Tensor, Tensor]:
    """Every window [N, C, *out, elements] of the padded input, and the same of a mask of what is no padding."""
    x, kernel = a.tensor(), a.ints("kernel_sizes")
    strides = a.ints("strides", [1] * len(kernel))
    padding = _padding(a, x, kernel, strides)
    mask = widen(torch.ones_like(x), padding)
    x = widen(x, padding, fill)
    if a.flag("ceil_mode"):
        # a last window may hang over the end, though not begin in the padding there
        for i, (span, stride) in enumerate(zip(kernel, strides)):
            size = x.shape[2 + i]
            count = -(-(size - span) // stride) + 1
            if (count - 1) * stride >= size - padding[i][1]:
                count -= 1
            extra = [(0, max(0, (count - 1) * stride + span - size)) if j == i else (0, 0) for j in range(len(kernel))]
            # beyond the padding nothing counts, neither as a value nor in a mean: the mask says 2
            x, mask = widen(x, extra, fill), widen(mask, extra, 2.0)
    for i, (span, stride) in enumerate(zip(kernel, strides)):
        x, mask = x.unfold(2 + i, span, stride), mask.unfold(2 + i, span, stride)
    return x.flatten(2 + len(kernel)), mask.flatten(2 + len(kernel))


@operation("max_pool")
def _max_pool(a: Arguments) -> Tensor:
    return _windows(a, float("-inf"))[0].amax(-1)


@operation("avg_pool")
def _avg_pool(a: Arguments) -> Tensor:
    values, mask = _windows(a, 0.0)
    counted = mask == 1 if a.flag("exclude_padding_from_average") else mask < 2
    return values.sum(-1) / counted.sum(-1)
