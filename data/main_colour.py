"""The main colour of a drawn picture, measured from its pixels: a fact to ask questions about.

OpenMoji is drawn with a small palette, so that a pixel either is one of its colours or lies on a blended edge. A pixel
within `TOLERANCE` of a palette colour in every channel counts for that colour's name; black lines and white, which is
the ground too, count for nothing. The picture's main colour is the name with most pixels, if it has `SHARE` of those
that count and they are `AREA` of the picture; otherwise nobody could say, and there is none.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 12
SHARE = 0.6
AREA = 0.03
_PALETTE = {
    "black": "3f3f3f",
    "blue": "92d3f5 61b2e4 1e50a0",
    "brown": "a57939 6a462f",
    "gray": "d0cfce 9b9b9a",
    "green": "b1cc33 5c9e31",
    "orange": "f4aa41 f1b31c e27022",
    "pink": "ffa7c0 e67a94",
    "purple": "b399c8 8967aa",
    "red": "ea5a47 d22f27",
    "yellow": "fcea2b",
}
COLOURS = tuple(_PALETTE)
_ROWS = [(COLOURS.index(name), bytes.fromhex(value)) for name, values in _PALETTE.items() for value in values.split()]
_REFERENCE = np.array([list(value) for _, value in _ROWS], np.int16)
_NAME_OF = np.array([name for name, _ in _ROWS])


def colour_shares(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Share of the picture's pixels that each of `COLOURS` has, float64 [10]; pixels: uint8 [H, W, 3]."""
    flat = pixels.reshape(-1, 3).astype(np.int32)
    values, counts = np.unique(flat[:, 0] << 16 | flat[:, 1] << 8 | flat[:, 2], return_counts=True)
    colours = np.stack([values >> 16, values >> 8 & 255, values & 255], axis=1).astype(np.int16)
    distance = np.abs(colours[:, None] - _REFERENCE).max(axis=2)
    nearest = distance.argmin(axis=1)
    near = distance[np.arange(len(colours)), nearest] <= TOLERANCE
    found = np.bincount(_NAME_OF[nearest[near]], weights=counts[near], minlength=len(COLOURS))
    return found / len(flat)


def main_colour(pixels: NDArray[np.uint8]) -> str | None:
    """One of `COLOURS`, or None where no colour prevails; pixels: uint8 [H, W, 3]."""
    shares = colour_shares(pixels)
    total, first = float(shares.sum()), int(shares.argmax())
    return COLOURS[first] if total >= AREA and shares[first] >= SHARE * total else None
