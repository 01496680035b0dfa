"""Views of a picture that can be replayed: the same (uid, view, seed, policy) gives the same view at any size.

A teacher cache stores the embedding of view 3 of a picture, and months later, on another machine and at another
resolution, the student is shown view 3. The parameters come from a hash, not from a generator with a history.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.edge.preprocess import resize_image

# raised whenever the same policy would give other views; caches made under another number are refused
VIEW_VERSION = 1
_WHITE = (255, 255, 255)
# input pixels per output pixel up to which bilinear sampling is taken without a filter before it
_ALIASING = 1.2


@dataclass(frozen=True, kw_only=True)
class AugmentPolicy:
    """Ranges from which a view is drawn, uniformly unless stated.

    scale: share of the picture's area that the crop covers. ratio: width / height of the crop, uniform in its
    logarithm. flip: probability of mirroring left and right. rotate: degrees to either side.
    brightness, contrast, saturation: a factor within 1 - x .. 1 + x (contrast about mid gray).
    """

    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (0.8, 1.25)
    flip: float = 0.5
    rotate: float = 10.0
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2

    def __post_init__(self) -> None:
        jitters = (self.brightness, self.contrast, self.saturation)
        if not (0 < self.scale[0] <= self.scale[1] <= 1 and 0 < self.ratio[0] <= self.ratio[1]):
            raise UsageError(
                f"crops of scale {self.scale} and ratio {self.ratio} cannot be cut; "
                "use 0 < low <= high (scale at most 1)"
            )
        if not (0 <= self.flip <= 1 and 0 <= self.rotate <= 180 and all(0 <= value <= 1 for value in jitters)):
            raise UsageError(
                f"flip {self.flip}, rotate {self.rotate} or a colour range of {jitters} is out of bounds; "
                "use 0..1, 0..180 degrees and 0..1"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, field for field."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> AugmentPolicy:
        """Inverse of `to_dict`; missing fields keep their defaults, an unknown one is refused with a suggestion."""
        fields = {item.name for item in dataclasses.fields(cls)}
        for key in value:
            if key not in fields:
                raise unknown_name("augmentation setting", key, fields)
        settings: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
        return cls(**settings)

    def digest(self) -> str:
        """sha256 over the settings and VIEW_VERSION; equal digests give equal views."""
        return hashlib.sha256(json.dumps([VIEW_VERSION, self.to_dict()], sort_keys=True).encode()).hexdigest()


NO_AUGMENTATION = AugmentPolicy(
    scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, rotate=0.0, brightness=0.0, contrast=0.0, saturation=0.0
)


@dataclass(frozen=True)
class ViewParams:
    """One view, free of any resolution.

    identity: the plain picture, prepared as the contract says; the other fields then have no effect.
    area: share of the picture's area; ratio: width / height of the crop in pixels; (x, y): where the crop lies in the
    room it has, 0..1. flip: mirrored. angle: degrees, counter-clockwise. brightness, contrast, saturation: factors.
    """

    identity: bool = False
    area: float = 1.0
    ratio: float = 1.0
    x: float = 0.5
    y: float = 0.5
    flip: bool = False
    angle: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def packed(self) -> tuple[int, ...]:
        """VIEW_NUMBERS whole numbers that say it exactly: flags (1 flip, 2 identity), then millionths of the others.

        `view_params` rounds to six decimals, and a whole number of millionths over a million is that very float.

        Raises:
            UsageError: a number past the 32 bits that it is kept in (a crop over 2,147 times as wide as high).
        """
        rest = [round(getattr(self, name) * 1e6) for name in _MILLIONTHS]
        if max(map(abs, rest)) >= 1 << 31:
            raise UsageError(
                f"view {self} has a number beyond 2147, which its 32 bits in a cache cannot hold; narrow the "
                "augmentation policy"
            )
        return (int(self.flip) + 2 * int(self.identity), *rest)

    @classmethod
    def unpacked(cls, numbers: Sequence[int]) -> ViewParams:
        """Inverse of `packed`."""
        flags, *rest = numbers
        return cls(identity=bool(flags & 2), flip=bool(flags & 1), **{k: n / 10**6 for k, n in zip(_MILLIONTHS, rest)})


_MILLIONTHS = ("area", "ratio", "x", "y", "angle", "brightness", "contrast", "saturation")
VIEW_NUMBERS = 1 + len(_MILLIONTHS)


def view_params(uid: str, view: int, seed: int, policy: AugmentPolicy) -> ViewParams:
    """The parameters of view number `view` of a picture; a pure function, equal on every platform.

    View 0 is the picture itself, whatever the policy. Each number of the view is one 32-bit word of
    SHA-512("pocketvlm-view:1:{seed}:{view}:{uid}") and is rounded to six decimals, so that no platform's logarithm
    can move it.

    Raises:
        UsageError: a negative view.
    """
    if view < 0:
        raise UsageError(f"view {view} does not exist; views count from 0, the picture without augmentation")
    if view == 0:
        return ViewParams(identity=True)
    draw = _uniforms(f"pocketvlm-view:{VIEW_VERSION}:{seed}:{view}:{uid}")
    low, high = (math.log(value) for value in policy.ratio)
    return ViewParams(
        area=_between(next(draw), *policy.scale),
        ratio=round(math.exp(low + next(draw) * (high - low)), 6),
        x=round(next(draw), 6),
        y=round(next(draw), 6),
        flip=next(draw) < policy.flip,
        angle=_between(next(draw), -policy.rotate, policy.rotate),
        brightness=_between(next(draw), 1 - policy.brightness, 1 + policy.brightness),
        contrast=_between(next(draw), 1 - policy.contrast, 1 + policy.contrast),
        saturation=_between(next(draw), 1 - policy.saturation, 1 + policy.saturation),
    )


def apply_view(
    pixels: NDArray[np.uint8],
    params: ViewParams,
    size: int,
    background: tuple[int, int, int] = _WHITE,
    *,
    spec: ImageSpec | None = None,
) -> NDArray[np.uint8]:
    """Draw one view of a decoded picture.

    Args:
        pixels: uint8 [H, W, 3], RGB, as `edge.preprocess.decode_image` gives it.
        params: from `view_params`.
        size: pixels per side of the result. background: RGB behind the corners of a rotated picture.
        spec: the preprocessing of the model that will see the view. View 0 then equals `resize_image(pixels, spec)`
            to the bit; without it, view 0 is the centre square, bilinear. Its size and background overrule the others.

    Returns:
        uint8 [size, size, 3], writable. Corners that a rotation turns in show the picture where there is any.
    """
    if spec is None:
        spec = ImageSpec(size=size, background=background)
    if params.identity:
        return resize_image(pixels, spec)
    image, scale_x, scale_y = _shrink(Image.fromarray(pixels), params, spec.size)
    image = image.transform(
        (spec.size, spec.size),
        Image.Transform.AFFINE,
        _affine(pixels.shape[1], pixels.shape[0], params, spec.size, scale_x, scale_y),
        Image.Resampling.BILINEAR,
        fillcolor=spec.background,
    )
    matrix = _colour_matrix(params)
    if matrix is not None:
        image = image.convert("RGB", matrix)
    return np.array(image)


def _crop(width: int, height: int, params: ViewParams) -> tuple[float, float, float, float]:
    """Centre and sides of the crop, in pixels of the picture."""
    crop_width = min(float(width), math.sqrt(width * height * params.area * params.ratio))
    crop_height = min(float(height), math.sqrt(width * height * params.area / params.ratio))
    left, top = params.x * (width - crop_width), params.y * (height - crop_height)
    return left + crop_width / 2, top + crop_height / 2, crop_width, crop_height


def _shrink(image: Image.Image, params: ViewParams, size: int) -> tuple[Image.Image, float, float]:
    """The picture at about the resolution of the view, and the factors by which it was shrunk.

    The affine transform that follows reads two by two pixels; shrinking first keeps it from skipping any.
    """
    _, _, crop_width, crop_height = _crop(*image.size, params)
    rests = []
    factors = []
    for side in (crop_width, crop_height):
        factor = max(1, round(side / size))
        factors.append(factor)
        rests.append(side / size / factor)
    if max(rests) <= _ALIASING:
        # whole-number averages are several times faster than a resampling filter
        small = image if factors == [1, 1] else image.reduce((factors[0], factors[1]))
        return small, float(factors[0]), float(factors[1])
    width = max(1, min(image.width, round(image.width * size / crop_width)))
    height = max(1, min(image.height, round(image.height * size / crop_height)))
    small = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return small, image.width / width, image.height / height


def _affine(
    width: int, height: int, params: ViewParams, size: int, scale_x: float, scale_y: float
) -> tuple[float, float, float, float, float, float]:
    """Output to input coordinates: rotate back about the middle, mirror back, stretch to the crop, move there."""
    centre_x, centre_y, crop_width, crop_height = _crop(width, height, params)
    stretch_x = crop_width / size / scale_x * (-1.0 if params.flip else 1.0)
    stretch_y = crop_height / size / scale_y
    cosine, sine = math.cos(math.radians(params.angle)), math.sin(math.radians(params.angle))
    a, b = stretch_x * cosine, -stretch_x * sine
    d, e = stretch_y * sine, stretch_y * cosine
    middle = size / 2
    return (
        *(a, b, centre_x / scale_x - (a + b) * middle),
        *(d, e, centre_y / scale_y - (d + e) * middle),
    )


def _colour_matrix(params: ViewParams) -> tuple[float, ...] | None:
    """Brightness, saturation and contrast as one linear map, so that a view does not depend on the picture's mean."""
    if params.brightness == params.contrast == params.saturation == 1.0:
        return None
    gain = params.brightness * params.contrast
    shift = 128.0 * (1.0 - params.contrast)
    luma = (0.299, 0.587, 0.114)
    rows = []
    for channel in range(3):
        for other in range(3):
            own = params.saturation if channel == other else 0.0
            rows.append(gain * (own + (1.0 - params.saturation) * luma[other]))
        rows.append(shift)
    return tuple(rows)


def _uniforms(text: str) -> Iterator[float]:
    digest = hashlib.sha512(text.encode()).digest()
    for start in range(0, len(digest), 4):
        yield int.from_bytes(digest[start : start + 4], "big") / 2.0**32


def _between(uniform: float, low: float, high: float) -> float:
    return round(low + uniform * (high - low), 6)
