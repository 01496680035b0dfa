"""Golden inputs: encoded pictures and strings, real ones from any data source and nasty ones made here.

Every generated input exists because somebody's port got it wrong: orientation, alpha, CMYK, 16 bit, palettes,
extreme aspect ratios, aliasing, scripts without spaces, combining marks, text past the context. Inputs that must be
refused are part of the set, each with the reason it must be refused for.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import BadSampleError, UsageError

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageCase:
    """One encoded picture. real: from the data source rather than generated. error: the `BadSampleError` reason it
    must be refused with, or None. extension: of the file it is stored under. caption: what a real one shows."""

    name: str
    data: bytes
    real: bool
    extension: str
    note: str = ""
    error: str | None = None
    caption: str = ""


@dataclass(frozen=True)
class TextCase:
    """One string (or, among the inputs to be refused, something that is not a string)."""

    name: str
    text: object
    real: bool
    note: str = ""
    error: str | None = None


def _order(uid: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}/{uid}".encode()).hexdigest()


def pick(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Up to `count` samples, chosen by a hash of uid and seed: independent of the order of the source."""
    return sorted(samples, key=lambda sample: _order(sample.uid, seed))[:count]


# --- pictures -----------------------------------------------------------------------------------------------------


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _bars(width: int, height: int) -> Image.Image:
    """Red, green, blue and a corner mark: any swap of channels, sides or axes changes it."""
    image = Image.new("RGB", (width, height), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for index, color in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255)]):
        draw.rectangle([index * width // 3, 0, (index + 1) * width // 3 - 1, height * 2 // 3], fill=color)
    draw.ellipse([2, height * 2 // 3, width // 4, height - 2], fill=(20, 30, 40))
    return image


def _waves(width: int, height: int, seed: int) -> NDArray[np.uint8]:
    """A smooth picture with texture: three plane waves per channel, no file needed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = []
    for _ in range(3):
        total = np.zeros((height, width))
        for frequency, phase in zip(rng.uniform(2, 40, (3, 2)), rng.uniform(0, 6.28, 3)):
            total += np.sin(frequency[0] * x + frequency[1] * y + phase)
        channels.append(127.5 + 127.5 * total / 3)
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return _encode(_bars(96, 60), "JPEG", quality=95, exif=exif.tobytes())


def _alpha() -> Image.Image:
    image = _bars(90, 70).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 90).round().astype(np.uint8), (70, 1))))
    return image


def _animated() -> bytes:
    frames = [_bars(64, 48), Image.new("RGB", (64, 48), (1, 2, 3))]
    return _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


def _palette() -> bytes:
    image = _bars(80, 60).quantize(8)
    return _encode(image, "PNG", transparency=0)


def nasty_images(seed: int = 0) -> list[ImageCase]:
    """Generated pictures, the refused ones last. The same seed gives the same bytes under the same Pillow."""
    rng = np.random.default_rng(seed)
    ramp = np.tile(np.linspace(0, 65535, 80).round().astype(np.uint16), (50, 1))
    checks = (np.indices((192, 192)).sum(axis=0) % 2 * 255).astype(np.uint8)
    noise = rng.integers(0, 256, (72, 96, 3), dtype=np.uint8)
    large = Image.new("RGB", (3200, 2400), (240, 240, 235))
    large.paste(_bars(1500, 1200), (850, 600))
    progressive = _encode(Image.fromarray(_waves(150, 110, seed + 2)), "JPEG", quality=85, progressive=True)
    jpeg = _encode(Image.fromarray(_waves(160, 120, seed)), "JPEG", quality=90)
    good = [
        ("exif-6", _rotated(6), "jpg", "EXIF orientation 6: rotate by 90 degrees"),
        ("exif-5", _rotated(5), "jpg", "EXIF orientation 5: transposed"),
        ("rgba", _encode(_alpha(), "PNG"), "png", "alpha composited on the contract's background"),
        ("cmyk", _encode(_bars(96, 72).convert("CMYK"), "JPEG", quality=95), "jpg", "four-colour JPEG"),
        ("gray", _encode(Image.fromarray(_waves(70, 90, seed + 1)).convert("L"), "PNG"), "png", "one channel"),
        ("gray-alpha", _encode(_alpha().convert("LA"), "PNG"), "png", "one channel and alpha"),
        ("gray-16-bit", _encode(Image.fromarray(ramp), "PNG"), "png", "16-bit ramp: 8-bit by the contract's rounding"),
        ("palette", _palette(), "png", "eight colours, one of them transparent"),
        ("bilevel", _encode(Image.fromarray(checks).convert("1"), "PNG"), "png", "one bit a pixel"),
        ("animated", _animated(), "gif", "two frames: the first counts"),
        ("progressive", progressive, "jpg", "progressive JPEG"),
        ("1xN", _encode(Image.fromarray(_waves(1, 220, seed + 3)), "PNG"), "png", "one pixel wide"),
        ("Nx1", _encode(Image.fromarray(_waves(220, 1, seed + 4)), "PNG"), "png", "one pixel high"),
        ("1x1", _encode(Image.new("RGB", (1, 1), (200, 40, 90)), "PNG"), "png", "a single pixel"),
        ("upscaled", _encode(_bars(9, 7), "PNG"), "png", "smaller than the model's input"),
        ("odd-crop", _encode(_bars(201, 134), "PNG"), "png", "a crop offset that ends in .5"),
        ("very-large", _encode(large, "PNG", optimize=True), "png", "7.7 megapixels"),
        ("checkerboard", _encode(Image.fromarray(checks), "PNG"), "png", "aliases unless the filter is antialiased"),
        ("noise", _encode(Image.fromarray(noise), "PNG"), "png", "every frequency at once"),
        ("black", _encode(Image.new("RGB", (40, 40), (0, 0, 0)), "PNG"), "png", "no signal"),
        ("white", _encode(Image.new("RGB", (40, 40), (255, 255, 255)), "PNG"), "png", "saturated"),
        ("webp", _encode(Image.fromarray(_waves(130, 97, seed + 5)), "WEBP", lossless=True), "webp", "lossless WebP"),
    ]  # fmt: skip
    refused = [
        ("truncated", jpeg[: len(jpeg) // 2], "jpg", "a JPEG cut in half", "truncated-image"),
        ("not-a-picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bin", "text", "not-an-image"),
        ("no-bytes", b"", "bin", "an empty file", "empty-image"),
    ]
    cases = [ImageCase(name, data, False, extension, note) for name, data, extension, note in good]
    return cases + [ImageCase(name, data, False, extension, note, why) for name, data, extension, note, why in refused]


# --- texts --------------------------------------------------------------------------------------------------------


def nasty_texts(context_length: int) -> list[TextCase]:
    """Generated strings, the refused ones last. `context_length` sets how long "past the context" is."""
    good = [
        ("one-letter", "a", "shortest possible"),
        ("upper-case", "A RED CAR", "case folding"),
        ("accents", "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m", "composed accents"),
        ("combining", "cafe\u0301 nai\u0308ve", "the same letters with combining marks"),
        ("chinese", "\u4e00\u53ea\u72d7\u5728\u6d77\u6ee9\u4e0a", "no spaces"),
        ("japanese", "\u30ab\u30bf\u30ab\u30ca\u3068\u3072\u3089\u304c\u306a", "two syllabaries"),
        ("korean", "\ud55c\uad6d\uc5b4", "syllable blocks"),
        ("arabic", "\u0635\u0648\u0631\u0629 \u0642\u0637\u0629", "right to left"),
        ("devanagari", "\u0928\u092e\u0938\u094d\u0924\u0947", "marks that normalisers strip"),
        ("emoji", "\U0001f600 a \U0001f436", "beyond the basic plane"),
        ("emoji-joined", "\U0001f469\u200d\U0001f680", "joined by a zero-width character"),
        ("ligature", "\ufb01ne \u2126 \uff26\uff35\uff2c\uff2c", "compatibility characters"),
        ("punctuation", "don't! (a/b) -- #1, 100%?", "splits"),
        ("white-space", "  two\twords\n ", "leading, inner and trailing white space"),
        ("special-token", "[PAD] [CLS] <|endoftext|> </s>", "a user who types special tokens"),
        ("unknown", "\u16a0\u16a2 \U00012000", "runes and cuneiform: unknown to most vocabularies"),
        ("long-word", "x" * 300, "one word, longer than the context"),
        ("past-context", " ".join(["a picture of a small dog and"] * context_length), "cut, closing token kept"),
        ("control", "a\u0000b\u0007c\ufeffd", "control characters and a byte-order mark"),
    ]
    refused = [
        ("empty", "", "no text", "empty-text"),
        ("only-space", " \t\n", "white space only", "empty-text"),
        ("number", 42, "not a string", "not-a-string"),
    ]
    cases = [TextCase(name, text, False, note) for name, text, note in good]
    return cases + [TextCase(name, text, False, note, why) for name, text, note, why in refused]


def golden_images(samples: Sequence[Sample], *, count: int, seed: int = 0) -> list[ImageCase]:
    """`count` real pictures of the source, then the generated ones. A sample without readable bytes is passed over.

    Raises:
        UsageError: no sample of the source can be read.
    """
    real: list[ImageCase] = []
    for sample in pick(samples, len(samples), seed):
        if len(real) == count:
            break
        try:
            data = sample.image.read()
            kind = (Image.open(io.BytesIO(data)).format or "bin").lower()
        except (BadSampleError, OSError, SyntaxError, ValueError):
            continue
        caption = next((c.text for c in sample.captions if isinstance(c.text, str) and c.text.strip()), "")
        extension = {"jpeg": "jpg"}.get(kind, kind)
        real.append(ImageCase(f"real-{len(real):02d}", data, True, extension, sample.uid, caption=caption))
    if not real:
        raise UsageError(
            f"none of the {len(samples)} samples has a readable picture; a reference of generated pictures alone says "
            "nothing about your data, so point --data at a source with images"
        )
    return real + nasty_images(seed)


def golden_texts(samples: Sequence[Sample], *, count: int, context_length: int, seed: int = 0) -> list[TextCase]:
    """`count` captions of the source (first caption of each), then the generated strings.

    Raises:
        UsageError: the source has no caption.
    """
    seen: dict[str, str] = {}
    for sample in pick(samples, len(samples), seed):
        if len(seen) == count:
            break
        if sample.captions and isinstance(sample.captions[0].text, str) and sample.captions[0].text.strip():
            seen.setdefault(sample.captions[0].text, sample.uid)
    if not seen:
        raise UsageError(
            "the data has no caption, so there is no text to hold the text tower to; "
            "use a source with captions (for instance openmoji?pool=test&fold=0)"
        )
    real = [TextCase(f"real-{index:02d}", text, True, uid) for index, (text, uid) in enumerate(seen.items())]
    return real + nasty_texts(context_length)
