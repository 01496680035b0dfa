"""Decode rule "v1": every kind of picture against values worked out by hand from docs/preprocessing.md."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import decode_image, load_image, stack


def reason(source: Any) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode_image(source)
    message = str(caught.value)
    assert "\n" not in message
    return caught.value.reason


def one_pixel(mode: str, value: Any) -> Image.Image:
    return Image.new(mode, (1, 1), value)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (200, 100, 0, 128), (227, 177, 127)),  # (200*128 + 255*127 + 127) // 255 = 227
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("RGBA", (9, 9, 9, 255), (9, 9, 9)),
        ("LA", (100, 51), (224, 224, 224)),  # (100*51 + 255*204 + 127) // 255 = 224
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (100, 0, 0, 50), (125, 205, 205)),  # 205 - round(100*205/255) = 205 - 80
        ("I;16", 255, (1, 1, 1)),  # (255*255 + 32767) // 65535; the high byte alone would be 0
        ("I;16", 32768, (128, 128, 128)),
        ("I;16", 65535, (255, 255, 255)),
        ("I", 40000, (156, 156, 156)),
        ("HSV", (0, 255, 255), (255, 0, 0)),
    ],
)
def test_every_mode_has_its_value(mode: str, value: Any, expected: tuple[int, int, int]) -> None:
    pixels = decode_image(one_pixel(mode, value))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 1, 3)
    assert tuple(pixels[0, 0].tolist()) == expected


def test_cmyk_files_tiff_exact_and_jpeg_near(tools: Any) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert (decode_image(tools.encode(image, "TIFF")) == (255, 0, 0)).all()
    assert np.abs(decode_image(tools.encode(image, "JPEG", quality=95)).astype(int) - (255, 0, 0)).max() <= 3


def test_alpha_shows_the_background_of_the_contract(tools: Any) -> None:
    data = tools.encode(one_pixel("RGBA", (200, 100, 0, 128)), "PNG")
    assert decode_image(data, background=(0, 0, 0))[0, 0].tolist() == [100, 50, 0]
    spec = ImageSpec(size=1, background=(0, 255, 10))
    assert load_image(data, spec)[0, 0].tolist() == [100, 177, 5]


def test_palette_with_a_transparent_entry(tools: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode_image(tools.encode(image, "PNG"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    data = tools.encode(image, "PNG", transparency=1)
    assert decode_image(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_gray_png_with_a_transparent_level(tools: Any) -> None:
    levels = np.array([[[5], [6]]], np.uint8)
    data = tools.png(levels, 8, 0, tools.chunk(b"tRNS", struct.pack(">H", 6)))
    assert decode_image(data, background=(1, 2, 3))[0].tolist() == [[5, 5, 5], [1, 2, 3]]


@pytest.mark.parametrize(("bits", "row", "others"), [(2, 0b00_01_10_11, 85), (4, 0b0001_0010, 17)])
def test_gray_png_of_few_bits_with_a_transparent_level(tools: Any, bits: int, row: int, others: int) -> None:
    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    body = zlib.compress(bytes([0, row]))
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 2)), (b"IDAT", body), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(tools.chunk(*chunk) for chunk in chunks)
    found = decode_image(data, background=(7, 7, 7))[0, :, 0].tolist()
    levels = [row >> shift & ((1 << bits) - 1) for shift in range(8 - bits, -1, -bits)]
    assert found == [7 if level == 2 else level * others for level in levels]


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize(
    ("color_type", "pixel", "expected"),
    [
        (0, [255], [1, 1, 1]),
        (2, [255, 32768, 65535], [1, 128, 255]),
        (6, [255, 32768, 65535, 65535], [1, 128, 255]),
        (6, [255, 32768, 65535, 0], [255, 255, 255]),
        (4, [33151, 65535], [129, 129, 129]),
        (4, [0, 32768], [127, 127, 127]),  # alpha 128: (255*127 + 127) // 255
    ],
)
def test_sixteen_bit_png_is_rounded_not_cut(
    tools: Any, color_type: int, pixel: list[int], expected: list[int], interlace: int
) -> None:
    # a 1x1 interlaced PNG has its only pixel in the first pass, so the same bytes serve both layouts
    data = tools.png(np.array([[pixel]], np.uint16), 16, color_type, interlace=interlace)
    assert decode_image(data)[0, 0].tolist() == expected


def test_sixteen_bit_png_with_a_transparent_colour(tools: Any) -> None:
    key = tools.chunk(b"tRNS", struct.pack(">HHH", 256, 512, 768))
    rows = np.array([[[256, 512, 768], [257, 512, 768]]], np.uint16)  # equal in 8 bits, different in 16
    assert decode_image(tools.png(rows, 16, 2, key))[0].tolist() == [[255, 255, 255], [1, 2, 3]]
    gray = tools.png(np.array([[[300], [301]]], np.uint16), 16, 0, tools.chunk(b"tRNS", struct.pack(">H", 300)))
    assert decode_image(gray)[0].tolist() == [[255, 255, 255], [1, 1, 1]]


def test_sixteen_bit_png_of_many_pixels_and_filters(tools: Any) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    expected = np.array([[[(int(v) * 255 + 32767) // 65535 for v in p] for p in row] for row in values])
    body = b""
    for index, row in enumerate(values):
        raw = np.frombuffer(row.astype(">u2").tobytes(), np.uint8)
        if index % 2:  # filter "Sub": difference to the byte six places to the left
            left = np.concatenate([np.zeros(6, np.uint8), raw[:-6]])
            body += b"\1" + (raw - left).tobytes()
        else:
            body += b"\0" + raw.tobytes()
    plain = tools.png(values, 16, 2)
    start = plain.index(b"IDAT") - 4
    data = plain[:start] + tools.chunk(b"IDAT", zlib.compress(body)) + tools.chunk(b"IEND", b"")
    assert np.array_equal(decode_image(plain), expected)
    assert np.array_equal(decode_image(data), expected)


def test_exif_orientation_six_turns_clockwise(tools: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.array([[1, 2], [3, 4], [5, 6]], np.uint8))
    turned = decode_image(tools.encode(image, "PNG", exif=exif))
    assert turned[..., 0].tolist() == [[5, 3, 1], [6, 4, 2]]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_equals_pillows_transpose(tools: Any, orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(orientation).integers(0, 256, (4, 6, 3), np.uint8)
    data = tools.encode(Image.fromarray(pixels), format, exif=exif)
    from io import BytesIO

    assert np.array_equal(decode_image(data), np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data)))))


def test_damaged_exif_is_ignored(tools: Any) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    data = tools.encode(image, "PNG", exif=b"Exif\0\0not a tiff header")
    assert decode_image(data).shape == (1, 2, 3)


@pytest.mark.parametrize(("format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_animation_gives_its_first_frame(tools: Any, format: str, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (3, 2), color) for color in ((255, 0, 0), (0, 0, 255))]
    data = tools.encode(frames[0], format, save_all=True, append_images=frames[1:], duration=50, **options)
    pixels = decode_image(data)
    assert pixels.shape == (2, 3, 3)
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("shape", [(1, 9, 3), (9, 1, 3)])
def test_one_by_n(tools: Any, shape: tuple[int, int, int]) -> None:
    line = np.arange(27, dtype=np.uint8).reshape(shape)
    assert np.array_equal(decode_image(tools.encode(Image.fromarray(line), "PNG")), line)


def test_truncated_jpeg_and_png(tools: Any) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        data = tools.encode(noise, format)
        assert reason(data[: len(data) // 2]) == "truncated-image", format
        assert reason(data[:18]) == "truncated-image", format


def test_not_an_image_and_empty_and_missing(tmp_path: Path) -> None:
    assert reason(b"This is a text, not a picture.") == "not-an-image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not-an-image"  # never starts Ghostscript
    assert reason(b"") == "empty-image"
    assert reason(tmp_path / "absent.png") == "missing-file"
    assert reason(str(tmp_path)) == "unreadable-file"
    assert reason("nul\0byte.png") == "unreadable-file"
    assert reason(np.zeros((0, 4, 3), np.uint8)) == "empty-image"
    assert reason(Image.new("RGB", (0, 4))) == "empty-image"


def test_too_large_is_refused_before_decoding(tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tools.encode(Image.new("RGB", (10, 10)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert reason(data) == "image-too-large"


def test_values_without_a_meaning_in_eight_bits(tools: Any) -> None:
    assert reason(one_pixel("F", 0.5)) == "unsupported-pixels"
    assert reason(one_pixel("I", 70000)) == "unsupported-pixels"
    assert reason(one_pixel("I", -1)) == "unsupported-pixels"
    assert reason(tools.encode(one_pixel("F", 0.5), "TIFF")) == "unsupported-pixels"


def test_arrays() -> None:
    assert decode_image(np.array([[7, 8]], np.uint8))[0].tolist() == [[7, 7, 7], [8, 8, 8]]
    assert decode_image(np.array([[[9]]], np.uint8))[0].tolist() == [[9, 9, 9]]
    assert decode_image(np.array([[[1, 2, 3]]], np.uint8))[0].tolist() == [[1, 2, 3]]
    assert decode_image(np.array([[[200, 100, 0, 128]]], np.uint8))[0].tolist() == [[227, 177, 127]]


def test_the_result_is_a_copy() -> None:
    source = np.zeros((2, 2, 3), np.uint8)
    result = decode_image(source)
    result[:] = 9
    assert not source.any()
    flipped = decode_image(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)[:, ::-1])
    assert flipped.flags.c_contiguous
    assert flipped[0, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((2, 2, 3), 0.5, np.float32), "* 255"),
        (np.zeros((2, 2, 3), np.uint16), "uint16"),
        (np.zeros((2, 2, 3), bool), "bool"),
        (np.zeros((3, 5, 6), np.uint8), "transpose(1, 2, 0)"),
        (np.zeros((5, 6, 2), np.uint8), "channels come last"),
        (np.zeros((1, 5, 6, 3), np.uint8), "(1, 5, 6, 3)"),
    ],
)
def test_arrays_that_would_be_guessed_are_refused(array: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_image(array)
    assert says in str(caught.value)


def test_other_types_and_other_decode_rules_are_refused() -> None:
    with pytest.raises(UsageError, match="given as int"):
        decode_image(5)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'v2'"):
        load_image(np.zeros((2, 2, 3), np.uint8), ImageSpec(size=2, decode="v2"))


def test_every_kind_of_source_agrees(tools: Any, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, 4, 3), np.uint8)
    data = tools.encode(Image.fromarray(pixels), "PNG")
    (tmp_path / "ü picture.png").write_bytes(data)
    path = tmp_path / "ü picture.png"
    for source in (path, str(path), data, bytearray(data), memoryview(data), Image.fromarray(pixels), pixels):
        assert np.array_equal(decode_image(source), pixels)


def test_stack() -> None:
    a, b = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    assert stack([a, b]).shape == (2, 2, 2, 3)
    with pytest.raises(UsageError, match="none was given"):
        stack([])
    with pytest.raises(UsageError, match=r"\(1, 2, 3\) and \(2, 2, 3\)"):
        stack([a, a[:1]])


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_wide_integers_stand_for_a_few_rows_only(mode: str) -> None:
    # a picture of 50 megapixels once took gigabytes on its way to 8 bits: serve computes two of them at a time
    rng = np.random.default_rng(0)
    bands, dtype = (4, np.uint8) if mode == "RGBA" else (1, np.uint16)
    values = rng.integers(0, np.iinfo(dtype).max + 1, (900, 1000, bands), dtype).squeeze()
    image, background = Image.fromarray(values), (7, 200, 255)
    assert image.mode == mode
    tracemalloc.start()
    try:
        pixels = decode_image(image, background=background)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    wide = values.astype(np.uint32)
    if mode == "RGBA":
        alpha = wide[..., 3:]
        expected = (wide[..., :3] * alpha + np.array(background, np.uint32) * (255 - alpha) + 127) // 255
    else:
        expected = np.repeat(((wide * 255 + 32767) // 65535)[..., None], 3, axis=-1)
    assert (pixels == expected).all()
    assert peak < 18 * 900 * 1000
