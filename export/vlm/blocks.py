"""Matrices in 8 or 4 bits with a scale for each block of a row, as onnxruntime's MatMulNBits reads them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketvlm.export.token_tables import BLOCK

# shares of the largest value that the -8 of a block's grid may stand for, -7 for it among them; the one with the least
# squared error is taken
_REACHES = (8 / 7, 1.0, 0.95, 0.9, 0.85, 0.8)


class Blocks(NamedTuple):
    """data: uint8 [N, K / size, size * bits / 8]; in 4 bits two values to a byte, the first in its lower half.
    scales: float32 [N, K / size]. A value is (data - 2^(bits - 1)) * scale.
    columns: K; what the last block holds beyond it counts for nothing."""

    data: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    size: int
    columns: int


def pack_blocks(weight: NDArray[np.float32], bits: int, size: int = BLOCK) -> Blocks:
    """A matrix float32 [N, K] (a row for each output) in blocks of `size` along K; the last one filled with zeros.

    8 bits: -127..127 times a scale. 4 bits: -8..7, the value of largest magnitude near -8 so that all sixteen steps are
    in use (the scale has its sign), or beyond that end, where cutting it leaves the rest of the block nearer.
    """
    rows, columns = weight.shape
    padded = np.pad(weight.astype(np.float32), ((0, 0), (0, -columns % size)))
    blocks = padded.reshape(rows, -1, size)
    if bits == 8:
        scales = np.maximum(np.abs(blocks).max(axis=2), 1e-12) / 127
        data = np.round(blocks / scales[..., None]) + 128
        return Blocks(data.astype(np.uint8), scales.astype(np.float32), bits, size, columns)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[..., None], axis=2)[..., 0]
    extreme = np.where(np.abs(extreme) < 1e-12, np.float32(1e-12), extreme)
    best, scales = np.full(extreme.shape, np.inf, np.float32), np.zeros_like(extreme)
    levels = np.zeros(blocks.shape, np.float32)
    for reach in _REACHES:
        scale = (extreme * np.float32(-reach / 8)).astype(np.float32)
        found = np.clip(np.round(blocks / scale[..., None]), -8, 7)
        error = np.square(found * scale[..., None] - blocks).sum(axis=2)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
        levels = np.where(better[..., None], found, levels)
    nibbles = (levels + 8).astype(np.uint8)
    pairs = np.bitwise_or(nibbles[..., 0::2], nibbles[..., 1::2] << 4).astype(np.uint8)
    return Blocks(pairs, scales.astype(np.float32), bits, size, columns)


def unpack_blocks(blocks: Blocks) -> NDArray[np.float32]:
    """The matrix [N, K] that packed blocks stand for."""
    data = blocks.data
    if blocks.bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:2], -1)
    values = (data.astype(np.float32) - 2 ** (blocks.bits - 1)) * blocks.scales[..., None]
    return values.reshape(len(data), -1)[:, : blocks.columns]
