"""Decoding near the size that is wanted: a JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a part of the cost.

Its decoder then leaves out the high frequencies of each 8 x 8 block, where a whole decode and a resize would average
them away. The pixels differ a little (docs/data.md has the measurement), so a cached teacher should have seen the same;
off, every view is what `edge.preprocess` and `data.augment` make of the whole picture, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO

from PIL import Image

from pocketvlm.data.augment import ViewParams, apply_view
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.preprocess import Pixels, decode_image, resize_plan

_JPEG = b"\xff\xd8\xff"
# source pixels for each pixel of the view, along each side, that are kept to be averaged: nearly as fast as 1, and
# closer to the whole decode (docs/data.md)
_GAP = 1.5


def decoded_views(data: bytes, params: ViewParams, specs: Sequence[ImageSpec], *, draft: bool) -> list[Pixels]:
    """One view of an encoded picture, as every model of `specs` takes it: uint8 [size, size, 3] each.

    draft: decode a JPEG at the smallest size that is enough for all of them (`reduction`).

    Raises:
        BadSampleError: as `edge.preprocess.decode_image`.
    """
    jpeg = data.startswith(_JPEG)
    small = _small(data, params, specs) if draft and jpeg else None
    decoded: dict[tuple[int, int, int], Pixels] = {}
    views = []
    for spec in specs:
        # a JPEG has no transparency that would show the background
        behind = (0, 0, 0) if jpeg else spec.background
        if behind not in decoded:
            decoded[behind] = decode_image(data if small is None else small, background=spec.background)
        views.append(apply_view(decoded[behind], params, spec.size, spec=spec))
    return views


def reduction(width: int, height: int, params: ViewParams, spec: ImageSpec) -> int:
    """By how much (1, 2, 4 or 8) a picture may shrink and leave 1.5 pixels for each of the view's, along its sides.

    The smaller one of the view on the picture as it lies and turned by 90 degrees, which EXIF may ask for.
    """
    if params.identity:
        plan = resize_plan(height, width, spec)
        room = min(height / plan.height, width / plan.width)
    else:
        area = width * height * params.area
        sides = (width, height, math.sqrt(area * params.ratio), math.sqrt(area / params.ratio))
        room = min(sides) / spec.size
    return next((factor for factor in (8, 4, 2) if factor <= room / _GAP), 1)


def _small(data: bytes, params: ViewParams, specs: Sequence[ImageSpec]) -> Image.Image | None:
    """The opened picture, set to decode smaller; None where it cannot be, which a whole decode then explains."""
    try:
        image = Image.open(BytesIO(data), formats=("JPEG",))
        factor = min(reduction(*image.size, params, spec) for spec in specs)
        width, height = image.size
        image.draft(None, (max(1, width // factor), max(1, height // factor)))
        if image.size == (width, height):
            return None
        if width % factor or height % factor:
            # the last blocks reach over the picture's edge, and all of it would be squeezed by up to a pixel
            seen = (0.0, 0.0, width / factor, height / factor)
            size = (max(1, round(seen[2])), max(1, round(seen[3])))
            return image.resize(size, Image.Resampling.BILINEAR, box=seen)
    except Exception:  # damaged files raise whatever they like
        return None
    return image
