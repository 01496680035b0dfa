"""The values that weights and activations take after rounding, as the runtimes do it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pocketvlm.export.token_tables import BLOCK

# weights are rounded to -127..127 per output channel, as onnxruntime and XNNPACK do it
_WEIGHT_MAX = 127
# steps between the ends of an activation's range
_STEPS = 255
# elements of a kernel that are worth a scale of their own
SMALLEST_KERNEL = 9
# exponents a of SmoothQuant's s_j = max|x_j|^a / max|W_:j|^(1-a) that are tried for each layer
EXPONENTS = (0.25, 0.5, 0.75)
# a channel this much quieter than the loudest counts as that loud: it may be silent on calibration data only
_QUIET = 1e-3


def round_weight(weight: Tensor) -> Tensor:
    """The values that a weight [out, ...] takes after symmetric int8 rounding per output channel."""
    flat = weight.flatten(1)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _WEIGHT_MAX
    return (torch.round(flat / scale) * scale).reshape(weight.shape)


def round_kernels(weight: Tensor) -> Tensor:
    """`round_weight` with a scale for each output and input channel where a kernel has nine elements and more: what is
    made float when the file is loaded may have any number of scales, and equalised inputs differ."""
    if weight.ndim < 4 or weight[0, 0].numel() < SMALLEST_KERNEL:
        return round_weight(weight)
    return round_weight(weight.flatten(0, 1)).reshape(weight.shape)


def round_blocks(weight: Tensor) -> Tensor:
    """The values that a weight [out, in] takes in 4 bits, each 32 of a row on their own grid of 16 steps with a zero
    point (onnxruntime's MatMulNBits)."""
    blocks = _blocks(weight)
    low, high = blocks.amin(2, keepdim=True).clamp(max=0), blocks.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-12)
    zero = torch.round(-low / scale)
    return _unblocked((torch.round(blocks / scale) + zero).clamp(0, 15).sub(zero) * scale, weight)


def round_blocks_evenly(weight: Tensor) -> Tensor:
    """`round_blocks` without a zero point: -8..7 times a scale (torchao's int4 groups, as XNNPACK takes them)."""
    blocks = _blocks(weight)
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    scale = torch.maximum(-low, high).clamp(min=1e-12) / 7.5
    return _unblocked(torch.round(blocks / scale).clamp(-8, 7) * scale, weight)


def _blocks(weight: Tensor) -> Tensor:
    return nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _unblocked(blocks: Tensor, weight: Tensor) -> Tensor:
    return blocks.flatten(1)[:, : weight.shape[1]]


def round_tensor(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The values that activations take after affine 8-bit rounding of [low, high], of which zero is always part."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / _STEPS).clamp(min=1e-12)
    zero = torch.round(-low / scale)
    return (x / scale).round_().add_(zero).clamp_(0, _STEPS).sub_(zero).mul_(scale)


def round_rows(x: Tensor) -> Tensor:
    """`round_tensor` with a range for each row of the batch, as dynamic quantization has it at batch 1."""
    axes = list(range(1, x.ndim))
    return round_tensor(x, x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True))


def balancing_scales(x: Tensor, weight: Tensor) -> list[Tensor]:
    """SmoothQuant's s for each exponent, then the one with the least sum of both rounding errors where no channel is
    loud: s_j = sqrt(rms x_j / rms W_:j)."""
    x = x.flatten(0, -2)
    loud, reach = not_quiet(x.abs().amax(dim=0)), not_quiet(weight.abs().amax(dim=0))
    power, gain = (not_quiet(value.square().mean(dim=0).sqrt()) for value in (x, weight))
    return [*(loud**a / reach ** (1 - a) for a in EXPONENTS), (power / gain).sqrt()]


def turn_down(x: Tensor, scale: Tensor, limit: float) -> Tensor:
    """`scale` raised where max|x_j| / s_j is above 1 / `limit` of the largest."""
    left = not_quiet(x.flatten(0, -2).abs().amax(dim=0)) / scale
    return scale * (left / left.max() * limit).clamp(min=1.0)


def not_quiet(loudness: Tensor) -> Tensor:
    return loudness.clamp(min=max(float(loudness.max()) * _QUIET, 1e-12))
