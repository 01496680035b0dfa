"""Image bytes to the uint8 pixels that a graph takes, as the contract's `decode` and `resize` say.

`docs/preprocessing.md` gives the same arithmetic in words and pseudocode; `resize_reference` is its
executable form and equals Pillow's resampling (horizontal pass, then vertical pass) bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, UsageError

ImageSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[Any]"
Pixels: TypeAlias = NDArray[np.uint8]

# formats that need an outside program (EPS) or hold no plain picture (PDF, MPEG) stay out
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000", "TGA")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
_FILTERS = {"bilinear": (Image.Resampling.BILINEAR, 1.0), "bicubic": (Image.Resampling.BICUBIC, 2.0)}
_PRECISION_BITS = 22
# above this many intermediate pixels (a 1xN strip, say) only the part that survives the crop is computed
_WINDOWED_ABOVE = 1 << 24
_STRIP_PIXELS = 1 << 18
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, spec: ImageSpec) -> Pixels:
    """Decode and resize one image: `resize_image(decode_image(source, background), spec)`.

    Returns:
        uint8 [size, size, 3], RGB, writable and contiguous.

    Raises:
        BadSampleError: see `decode_image`.
        UsageError: see `decode_image`; or `spec.decode` is not "v1".
    """
    if spec.decode != "v1":
        raise UsageError(
            f"this model wants image decoding {spec.decode!r} and this release knows 'v1' only; "
            "its pixels would be wrong, so upgrade pocketvlm"
        )
    decoded = _decode(source, spec.background)
    if isinstance(decoded, np.ndarray):
        return resize_image(decoded, spec)
    # the same pixels without a way through arrays and back, which costs as much as resizing does
    return _resize(decoded, spec)


def stack(images: Sequence[Pixels]) -> Pixels:
    """Batch equally sized images: n times uint8 [S, S, 3] to uint8 [n, S, S, 3].

    Raises:
        UsageError: no image, or the shapes differ.
    """
    shapes = sorted({image.shape for image in images})
    if len(shapes) != 1:
        found = "none was given" if not shapes else f"shapes {' and '.join(map(str, shapes))} were given"
        raise UsageError(f"a batch needs at least one image and one common shape, but {found}; resize them first")
    return np.stack(images)


# --- decode -------------------------------------------------------------------------------------------------


def decode_image(source: ImageSource, *, background: tuple[int, int, int] = (255, 255, 255)) -> Pixels:
    """Decode one image to RGB under rule "v1" of the contract.

    First frame; EXIF orientation applied; alpha composited on `background` by
    (c * a + b * (255 - a) + 127) // 255; gray, palette and CMYK to RGB; 16-bit PNG (gray and colour) and
    modes "I;16" and "I" to 8-bit by (v * 255 + 32767) // 65535. Colour profiles are ignored.

    Args:
        source: a file path, encoded bytes, a PIL image (its current frame) or a uint8 array [H, W],
            [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA, straight alpha).
        background: RGB, 0..255, seen through transparent pixels.

    Returns:
        uint8 [H, W, 3], writable, contiguous, sharing no memory with `source`.

    Raises:
        BadSampleError: the image cannot be used; reason "missing-file", "unreadable-file", "empty-image",
            "not-an-image", "truncated-image", "image-too-large" (more than twice `PIL.Image.MAX_IMAGE_PIXELS`)
            or "unsupported-pixels" (float images and the like).
        UsageError: an array of another dtype or shape, or a source of another type.
    """
    decoded = _decode(source, background)
    return decoded if isinstance(decoded, np.ndarray) else np.array(decoded)


def _decode(source: ImageSource, background: tuple[int, int, int]) -> Pixels | Image.Image:
    """What `decode_image` returns, or a PIL image of mode RGB with these pixels, which may be the source itself."""
    if isinstance(source, np.ndarray):
        return _from_array(source, background)
    if isinstance(source, Image.Image):
        return _from_pil(source, background, f"PIL image of mode {source.mode}")
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        what = f"image data of {len(data)} bytes"
    elif isinstance(source, (str, Path)):
        data = _read(Path(source))
        what = f"image file {str(source)!r}"
    else:
        raise UsageError(
            f"an image was given as {type(source).__name__}; "
            "give a path, encoded bytes, a PIL image or a uint8 array [H, W, 3]"
        )
    if not data:
        raise BadSampleError(f"{what} is empty; the sample cannot be used, so supply the picture", reason="empty-image")
    return _from_bytes(data, background, what)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError(
            f"image file {str(path)!r} does not exist; the sample cannot be used, so correct the path",
            reason="missing-file",
        ) from error
    except (OSError, ValueError) as error:
        raise BadSampleError(
            f"image file {str(path)!r} cannot be read ({error}); the sample cannot be used", reason="unreadable-file"
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes, what: str) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(what, error) from error
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC):
            raise _truncated(what, "its header is incomplete") from error
        raise BadSampleError(
            f"{what} is not a picture in a known format; the sample cannot be used, "
            f"so convert it to one of {', '.join(_formats())}",
            reason="not-an-image",
        ) from error
    except Exception as error:  # plugins raise OSError, SyntaxError, ValueError, struct.error, ... on damaged headers
        raise _truncated(what, str(error)) from error


def _load(image: Image.Image, what: str) -> None:
    try:
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(what, error) from error
    except Exception as error:
        raise _truncated(what, str(error)) from error


def _truncated(what: str, detail: str) -> BadSampleError:
    return BadSampleError(
        f"{what} is truncated or damaged ({detail}); part of the picture would be made up, so supply it whole",
        reason="truncated-image",
    )


def _too_large(what: str, error: Exception) -> BadSampleError:
    return BadSampleError(
        f"{what} is larger than Pillow's safety limit ({error}); decoding it could exhaust memory, so scale it "
        "down or raise PIL.Image.MAX_IMAGE_PIXELS",
        reason="image-too-large",
    )


def _unsupported(what: str, why: str) -> BadSampleError:
    return BadSampleError(
        f"{what} {why}, which have no agreed meaning in 0..255; the sample cannot be used, so save it as 8-bit RGB",
        reason="unsupported-pixels",
    )


def _from_bytes(data: bytes, background: tuple[int, int, int], what: str) -> Pixels | Image.Image:
    image = _open(data, what)
    tile = getattr(image, "tile", None)
    rawmode = tile[0][3] if image.format == "PNG" and tile else None
    if rawmode in ("L;2", "L;4") and isinstance(image.info.get("transparency"), int):
        # Pillow scales the samples to 0..255 and leaves the transparent one as it is in the file
        image.info["transparency"] *= 85 if rawmode == "L;2" else 17
    if rawmode in ("RGB;16B", "RGBA;16B", "LA;16B"):
        deep = _deep_png(data, str(rawmode), what)
        _load(image, what)
        return _orient(_composite(deep, background), _orientation(image))
    return _from_pil(image, background, what)


def _deep_png(data: bytes, rawmode: str, what: str) -> NDArray[np.uint8]:
    """16-bit colour PNG as uint8 [H, W, 3 or 4]; Pillow alone would keep only the high bytes.

    Reading the same stream once as big-endian and once as little-endian yields the high and the low bytes.
    """
    if rawmode == "LA;16B":
        raw = _png_as(data, "RGBA", what)  # four bytes a pixel: gray high, gray low, alpha high, alpha low
        values = (raw[..., 0::2].astype(np.uint16) << 8) | raw[..., 1::2]
        values = values[..., [0, 0, 0, 1]]
        transparent = None
    else:
        values = _png_as(data, rawmode[:-1] + "B", what).astype(np.uint16)
        values <<= 8
        values |= _png_as(data, rawmode[:-1] + "L", what)
        transparent = _open(data, what).info.get("transparency") if rawmode == "RGB;16B" else None
    if isinstance(transparent, tuple):
        keyed = (values == np.array(transparent, np.uint16)).all(axis=-1, keepdims=True)
        values = np.concatenate([values, np.where(keyed, 0, 65535).astype(np.uint16)], axis=-1)
    return _to_8bit(values)


def _png_as(data: bytes, rawmode: str, what: str) -> NDArray[np.uint8]:
    image: Any = _open(data, what)
    tile = image.tile[0]
    image.tile = [tile._replace(args=rawmode) if hasattr(tile, "_replace") else (*tile[:3], rawmode)]
    _load(image, what)
    return np.asarray(image)


def _to_8bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    rounded = np.empty(values.shape, np.uint8)
    for rows in _strips(values):
        rounded[rows] = (values[rows].astype(np.uint32) * 255 + 32767) // 65535
    return rounded


def _strips(pixels: NDArray[Any]) -> Iterator[slice]:
    """Rows to compute at a time: wider integers for a whole picture of 50 megapixels would take gigabytes."""
    rows = max(1, _STRIP_PIXELS // max(1, pixels.shape[1]))
    return (slice(top, top + rows) for top in range(0, len(pixels), rows))


def _from_pil(image: Image.Image, background: tuple[int, int, int], what: str) -> Pixels | Image.Image:
    _load(image, what)
    if 0 in image.size:
        raise BadSampleError(f"{what} has size {image.size}; there is no pixel to use", reason="empty-image")
    channels = _channels(image, what)
    orientation = _orientation(image)
    if isinstance(channels, np.ndarray):
        return _orient(_composite(channels, background), orientation)
    return channels.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else channels


def _channels(image: Image.Image, what: str) -> NDArray[np.uint8] | Image.Image:
    """An image of mode RGB; where it has transparency or was deep, uint8 [H, W, 3 or 4]."""
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise _unsupported(what, "holds integers outside 0..65535")
        gray = _to_8bit(values)[..., None]
        channels = [gray, gray, gray]
        key = image.info.get("transparency")
        if isinstance(key, int):
            channels.append(np.where(values == key, 0, 255).astype(np.uint8)[..., None])
        return np.concatenate(channels, axis=-1)
    if mode == "F":
        raise _unsupported(what, "holds floating-point values")
    alpha = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    try:
        if mode == "La":
            image = image.convert("LA")
        if alpha and mode != "CMYK":
            return np.asarray(image.convert("RGBA"))
        return image if mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise _unsupported(what, f"holds {mode} values") from error


def _composite(pixels: NDArray[np.uint8], background: tuple[int, int, int]) -> Pixels:
    if pixels.shape[-1] == 3:
        return np.array(pixels)
    behind, flat = np.array(background, np.uint16), np.empty((*pixels.shape[:2], 3), np.uint8)
    for rows in _strips(pixels):
        part = pixels[rows].astype(np.uint16)  # 255 * 255 + 127 still fits
        color, alpha = part[..., :3], part[..., 3:]
        flat[rows] = (color * alpha + behind * (255 - alpha) + 127) // 255
    return flat


def _orientation(image: Image.Image) -> int:
    # only real EXIF counts: Image.getexif() would also obey XMP, which browsers and phones ignore
    data = image.info.get("exif")
    if not data:
        return 1
    try:
        exif = Image.Exif()
        exif.load(data)
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata says nothing about the pixels, which are fine
        return 1


def _orient(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _from_array(array: NDArray[Any], background: tuple[int, int, int]) -> Pixels:
    if array.dtype != np.uint8:
        raise UsageError(
            f"an image array of dtype {array.dtype} was given and uint8 in 0..255 is expected; its scale would be "
            "guessed, so convert it, for instance by (array * 255).round().astype('uint8') for floats in 0..1"
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        hint = "; transpose it with array.transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UsageError(
            f"an image array of shape {array.shape} was given; channels come last, "
            f"as [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]{hint}"
        )
    if array.size == 0:
        raise BadSampleError(f"image array of shape {array.shape} has no pixel to use", reason="empty-image")
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return np.ascontiguousarray(_composite(array, background))


# --- resize -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResizePlan:
    """What the resize rule means for one image size: scale to [height, width], then cut or place at [top, left]."""

    height: int
    width: int
    top: int
    left: int


def resize_plan(height: int, width: int, spec: ImageSpec) -> ResizePlan:
    """Target size and offset for an image of this size under `spec.resize`.

    "crop": offsets are where the [size, size] window starts in the scaled image; "pad": where the scaled image
    starts in the [size, size] canvas; "squash": both zero.
    """
    size, short, long = spec.size, min(height, width), max(height, width)
    if spec.resize == "squash":
        return ResizePlan(size, size, 0, 0)
    if spec.resize == "crop":
        short_to = round(size / spec.crop_fraction)
        long_to = int(short_to * long / short)
        new_h, new_w = (short_to, long_to) if height <= width else (long_to, short_to)
        return ResizePlan(new_h, new_w, round((new_h - size) / 2), round((new_w - size) / 2))
    short_to = max(1, round(short / (long / size)))
    new_h, new_w = (short_to, size) if height <= width else (size, short_to)
    return ResizePlan(new_h, new_w, (size - new_h) // 2, (size - new_w) // 2)


def resize_image(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """Resize decoded pixels to the model's input: uint8 [H, W, 3] to uint8 [size, size, 3].

    Runs Pillow's resampling, one axis a call: a single call leaves the order of the two passes, and with it
    the last bit, to Pillow (always horizontal first up to 12, by estimated cost from 13).
    `resize_reference` gives the same result to the bit.

    Raises:
        UsageError: `pixels` is not uint8 [H, W, 3] with at least one pixel.
    """
    _check_pixels(pixels)
    return _resize(Image.fromarray(np.ascontiguousarray(pixels)), spec)


def _resize(image: Image.Image, spec: ImageSpec) -> Pixels:
    plan = resize_plan(image.height, image.width, spec)
    if max(image.height, plan.height) * plan.width > _WINDOWED_ABOVE:
        return resize_reference(np.asarray(image), spec)
    kernel = _FILTERS[spec.filter][0]
    scaled = image.resize((plan.width, image.height), kernel).resize((plan.width, plan.height), kernel)
    if spec.resize == "pad":
        return _place(np.asarray(scaled), plan, spec)
    return np.array(scaled.crop((plan.left, plan.top, plan.left + spec.size, plan.top + spec.size)))


def resize_reference(pixels: Pixels, spec: ImageSpec) -> Pixels:
    """The definition of `resize_image` in plain numpy: fixed-point coefficients, horizontal pass, vertical pass.

    Takes and returns what `resize_image` does. Only the rows and columns that survive the crop are computed.

    Raises:
        UsageError: as `resize_image`.
    """
    _check_pixels(pixels)
    plan = resize_plan(pixels.shape[0], pixels.shape[1], spec)
    top, left, bottom, right = 0, 0, plan.height, plan.width
    if spec.resize == "crop":
        top, left, bottom, right = plan.top, plan.left, plan.top + spec.size, plan.left + spec.size
    first, vertical = _coefficients(pixels.shape[0], plan.height, spec.filter, top, bottom)
    low, high = int(first.min()), int(first.max()) + vertical.shape[1]
    rows = _resample_columns(
        pixels[low:high], *_coefficients(pixels.shape[1], plan.width, spec.filter, left, right)
    ).transpose(1, 0, 2)
    scaled = _resample_columns(rows, first - low, vertical).transpose(1, 0, 2)
    if spec.resize == "pad":
        return _place(scaled, plan, spec)
    return np.ascontiguousarray(scaled)


def _check_pixels(pixels: Pixels) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.size == 0:
        raise UsageError(
            f"pixels of dtype {pixels.dtype} and shape {pixels.shape} were given and uint8 [H, W, 3] is expected; "
            "decode the image with decode_image first"
        )


def _place(scaled: Pixels, plan: ResizePlan, spec: ImageSpec) -> Pixels:
    canvas = np.empty((spec.size, spec.size, 3), np.uint8)
    canvas[:] = np.array(spec.background, np.uint8)
    canvas[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width] = scaled
    return canvas


def _bilinear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x, a = np.abs(x), -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _coefficients(
    n_in: int, n_out: int, filter_name: str, start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First source index [m] and fixed-point weights [m, taps] of output positions start..stop-1 of one axis."""
    scale = n_in / n_out
    stretch = max(scale, 1.0)
    support = _FILTERS[filter_name][1] * stretch
    center = (np.arange(start, stop) + 0.5) * scale
    first = np.maximum(np.trunc(center - support + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(center + support + 0.5), n_in).astype(np.int64)
    taps = np.arange(int((last - first).max()))
    weigh = _bilinear if filter_name == "bilinear" else _bicubic
    weights = weigh(((taps + first[:, None]) - center[:, None] + 0.5) * (1.0 / stretch))
    weights[taps >= (last - first)[:, None]] = 0.0
    # added left to right, one by one: numpy's pairwise sum would round differently
    total = np.zeros(len(first))
    for tap in taps:
        total += weights[:, tap]
    weights /= total[:, None]
    return first, np.trunc(np.copysign(0.5, weights) + weights * (1 << _PRECISION_BITS)).astype(np.int64)


def _resample_columns(
    pixels: NDArray[np.uint8], first: NDArray[np.int64], weights: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Weighted sums along axis 1: uint8 [rows, n_in, 3] to uint8 [rows, m, 3]."""
    total = np.full((pixels.shape[0], len(first), 3), 1 << (_PRECISION_BITS - 1), np.int64)
    for tap in range(weights.shape[1]):
        column = np.minimum(first + tap, pixels.shape[1] - 1)  # weights beyond the edge are zero
        total += pixels[:, column] * weights[None, :, tap, None]
    return np.clip(total >> _PRECISION_BITS, 0, 255).astype(np.uint8)
