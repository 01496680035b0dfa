"""The resize arithmetic: our numpy definition, Pillow and torchvision agree to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge import preprocess
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import ResizePlan, resize_image, resize_plan, resize_reference

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    noise = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    return noise if rng.random() < 0.7 else np.where(noise > 127, 255, 0).astype(np.uint8)


def random_side(rng: np.random.Generator, largest: int) -> int:
    return int(np.exp(rng.uniform(0, np.log(largest))))


@pytest.mark.parametrize("filter", FILTERS)
def test_reference_equals_pillow_in_one_call_along_each_axis(filter: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(150):
        size, n = random_side(rng, 200), random_side(rng, 500)
        spec = ImageSpec(size=size, resize="squash", filter=filter)
        for shape in ((size, n), (n, size)):
            pixels = picture(rng, *shape)
            expected = np.asarray(Image.fromarray(pixels).resize((size, size), FILTERS[filter]))
            assert np.array_equal(resize_reference(pixels, spec), expected), (shape, size)


@pytest.mark.parametrize("filter", FILTERS)
def test_reference_equals_pillow_horizontal_then_vertical(filter: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(250):
        height, width, size = random_side(rng, 400), random_side(rng, 400), random_side(rng, 160)
        pixels = picture(rng, height, width)
        image = Image.fromarray(pixels).resize((size, height), FILTERS[filter]).resize((size, size), FILTERS[filter])
        spec = ImageSpec(size=size, resize="squash", filter=filter)
        assert np.array_equal(resize_reference(pixels, spec), np.asarray(image)), (height, width, size)
        assert np.array_equal(resize_image(pixels, spec), np.asarray(image)), (height, width, size)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_fast_path_equals_reference(mode: str, filter: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        spec = ImageSpec(
            size=random_side(rng, 130),
            resize=mode,
            filter=filter,
            crop_fraction=float(rng.choice([1.0, 0.95, 0.9, 0.875, 0.6])),
            background=(7, 8, 9),
        )
        pixels = picture(rng, random_side(rng, 400), random_side(rng, 400))
        found = resize_image(pixels, spec)
        assert found.shape == (spec.size, spec.size, 3)
        assert np.array_equal(found, resize_reference(pixels, spec)), (pixels.shape, spec)


@pytest.mark.parametrize("filter", FILTERS)
def test_crop_equals_torchvision(filter: str) -> None:
    from torchvision.transforms import CenterCrop, InterpolationMode, Resize

    rng = np.random.default_rng(4)
    for index in range(120):
        size, fraction = int(rng.choice([32, 63, 96])), float(rng.choice([1.0, 0.9, 0.875]))
        sides = sorted(int(n) for n in rng.integers(5, 300, 2))
        # wide pictures: every Pillow release runs the horizontal pass first on them, as the contract demands
        height, width = sides
        pixels = picture(rng, height, width)
        resize = Resize(round(size / fraction), interpolation=InterpolationMode(filter))
        expected = np.asarray(CenterCrop(size)(resize(Image.fromarray(pixels))))
        spec = ImageSpec(size=size, filter=filter, crop_fraction=fraction)
        assert np.array_equal(resize_image(pixels, spec), expected), (index, pixels.shape, spec)
        # tall pictures: Pillow 13 may swap the passes inside one call, so torchvision gets one axis at a time
        tall = np.ascontiguousarray(pixels.transpose(1, 0, 2))
        plan = resize_plan(*tall.shape[:2], spec)
        assert resize.size == plan.width
        assert (plan.height, plan.width) == resize(Image.fromarray(tall)).size[::-1]
        steps = [
            Resize(s, interpolation=InterpolationMode(filter)) for s in ((width, plan.width), (plan.height, plan.width))
        ]
        expected = np.asarray(CenterCrop(size)(steps[1](steps[0](Image.fromarray(tall)))))
        assert np.array_equal(resize_image(tall, spec), expected), (index, tall.shape, spec)


@pytest.mark.parametrize(
    ("height", "width", "spec", "plan"),
    [
        # shorter side to round(224 / 0.875) = 256, longer to int(256 * 640 / 480) = 341,
        # offset round((341 - 224) / 2) = round(58.5) = 58, the even one
        (480, 640, ImageSpec(size=224, crop_fraction=0.875), ResizePlan(256, 341, 16, 58)),
        (640, 480, ImageSpec(size=224, crop_fraction=0.875), ResizePlan(341, 256, 58, 16)),
        # 35 - 32 = 3 -> 1.5 rounds to the even 2; 33 - 32 = 1 -> 0.5 rounds to the even 0
        (32, 35, ImageSpec(size=32), ResizePlan(32, 35, 0, 2)),
        (33, 32, ImageSpec(size=32), ResizePlan(33, 32, 0, 0)),
        # round(5 / 0.4) = round(12.5) = 12, the even one
        (10, 10, ImageSpec(size=5, crop_fraction=0.4), ResizePlan(12, 12, 4, 4)),
        (480, 640, ImageSpec(size=224, resize="squash"), ResizePlan(224, 224, 0, 0)),
        (480, 640, ImageSpec(size=224, resize="pad"), ResizePlan(168, 224, 28, 0)),
        (640, 479, ImageSpec(size=224, resize="pad"), ResizePlan(224, 168, 0, 28)),
        (3, 100, ImageSpec(size=10, resize="pad"), ResizePlan(1, 10, 4, 0)),
        (1, 1000, ImageSpec(size=10, resize="pad"), ResizePlan(1, 10, 4, 0)),
        (1, 5, ImageSpec(size=1), ResizePlan(1, 5, 0, 2)),
    ],
)
def test_plan(height: int, width: int, spec: ImageSpec, plan: ResizePlan) -> None:
    assert resize_plan(height, width, spec) == plan


@pytest.mark.parametrize(
    ("filter", "first", "weights", "result"),
    [
        ("bilinear", [0, 1], [[1334551, 1715852, 953251, 190650], [190650, 953251, 1715852, 1334551]], [52, 186]),
        (
            "bicubic",
            [0, 0],
            [[1455822, 1743238, 1004169, 122286, -131211], [-131211, 122286, 1004169, 1743238, 1455822]],
            [43, 195],
        ),
    ],
)
def test_worked_example_of_the_documentation(
    filter: str, first: list[int], weights: list[list[int]], result: list[int]
) -> None:
    row = np.repeat(np.array([[[0], [50], [100], [200], [250]]], np.uint8), 3, axis=2)
    found = preprocess._coefficients(5, 2, filter, 0, 2)
    assert [part.tolist() for part in found] == [first, weights]
    assert preprocess._resample_columns(row, *found)[0, :, 0].tolist() == result
    pillow = Image.fromarray(row).resize((2, 1), FILTERS[filter])
    assert np.asarray(pillow)[0, :, 0].tolist() == result


def test_pad_puts_the_background_around() -> None:
    pixels = np.full((2, 4, 3), 200, np.uint8)
    padded = resize_image(pixels, ImageSpec(size=4, resize="pad", background=(1, 2, 3)))
    assert padded[:, 0].tolist() == [[1, 2, 3], [200, 200, 200], [200, 200, 200], [1, 2, 3]]


def test_a_flat_picture_stays_flat() -> None:
    for value in (0, 1, 127, 254, 255):
        for filter in FILTERS:
            pixels = np.full((37, 91, 3), value, np.uint8)
            assert (resize_image(pixels, ImageSpec(size=20, filter=filter)) == value).all()


@pytest.mark.parametrize("filter", FILTERS)
def test_windowed_path_equals_pillow(filter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    spec = ImageSpec(size=24, filter=filter)
    pixels = [picture(rng, *shape) for shape in ((1, 300), (300, 1), (2, 90), (31, 200), (200, 31))]
    expected = [resize_image(p, spec) for p in pixels]
    monkeypatch.setattr(preprocess, "_WINDOWED_ABOVE", 0)
    monkeypatch.setattr(Image.Image, "resize", None)
    for p, e in zip(pixels, expected):
        assert np.array_equal(resize_image(p, spec), e)


def test_a_very_long_strip_needs_no_gigabytes() -> None:
    strip = np.zeros((1, 1_000_000, 3), np.uint8)
    strip[:, 500_000:] = 128  # Pillow would build 64 x 64,000,000 pixels first
    square = resize_image(strip, ImageSpec(size=64))
    # the window straddles the edge: 128 * (j + 0.5) / 64 at column j, a whole number
    assert np.array_equal(square, np.broadcast_to((2 * np.arange(64) + 1)[None, :, None], (64, 64, 3)))


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8)]
)
def test_undecoded_pixels_are_refused(pixels: np.ndarray) -> None:
    for resize in (resize_image, resize_reference):
        with pytest.raises(UsageError, match="decode_image first"):
            resize(pixels, ImageSpec(size=2))
