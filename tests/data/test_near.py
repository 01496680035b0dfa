"""Decoding near the wanted size: exact when off, never enlarging, and close to the whole decode when on."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data.augment import AugmentPolicy, ViewParams, apply_view, view_params
from pocketvlm.data.near import decoded_views, reduction
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError
from pocketvlm.edge.preprocess import decode_image, load_image

PLAIN = ViewParams(identity=True)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with the spectrum of photographs: amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    planes = []
    for _ in range(3):
        wave = np.fft.fft2(rng.normal(size=(height, width))) / np.maximum(frequency, 1)
        plane = np.fft.ifft2(wave).real
        planes.append(128 + 45 * plane / plane.std())
    return Image.fromarray(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "jpeg", **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def views_of(data: bytes, spec: ImageSpec, *, draft: bool, count: int = 6) -> list[np.ndarray]:
    params = [view_params("a/b", view, 0, AugmentPolicy(rotate=0.0)) for view in range(count)]
    return [decoded_views(data, one, [spec], draft=draft)[0] for one in params]


def test_off_is_the_contract_to_the_bit() -> None:
    data = encoded(photo(300, 220), quality=90)
    small, large = ImageSpec(size=32), ImageSpec(size=64, resize="pad", background=(0, 0, 0))
    found = decoded_views(data, PLAIN, [small, large], draft=False)
    assert np.array_equal(found[0], load_image(data, small))
    assert np.array_equal(found[1], load_image(data, large))
    params = view_params("a", 1, 0, AugmentPolicy())
    (found_view,) = decoded_views(data, params, [small], draft=False)
    assert np.array_equal(found_view, apply_view(decode_image(data), params, 32, spec=small))
    # transparency shows each model's own background
    clear = encoded(Image.new("RGBA", (40, 40), (255, 0, 0, 0)), "png")
    found = decoded_views(clear, PLAIN, [small, large], draft=True)
    assert found[0].min() == 255
    assert found[1].max() == 0


def test_a_view_is_never_enlarged_and_never_read_larger_than_needed() -> None:
    policy = AugmentPolicy(scale=(0.05, 1.0))
    shapes = [(640, 480), (333, 1999), (100, 100)]
    for (width, height), size, view in itertools.product(shapes, [32, 96, 224], range(9)):
        spec, params = ImageSpec(size=size), view_params("u", view, 0, policy)
        factor = reduction(width, height, params, spec)
        if view:
            crop = width * height * params.area
            shorter = min(width, height, (crop * params.ratio) ** 0.5, (crop / params.ratio) ** 0.5)
        else:
            shorter = min(width, height)
        assert factor == 1 or shorter / factor >= 1.5 * size
        assert factor == 8 or shorter / (2 * factor) < 1.5 * size
    # crop_fraction asks for more pixels than the result has
    assert reduction(672, 672, PLAIN, ImageSpec(size=224)) == 2
    assert reduction(672, 672, PLAIN, ImageSpec(size=224, crop_fraction=0.875)) == 1


@pytest.mark.parametrize("size", [(1024, 768), (769, 1021)])
def test_draft_pixels_are_close_to_those_of_the_whole(size: tuple[int, int]) -> None:
    data = encoded(photo(*size), quality=90)
    spec = ImageSpec(size=96)
    near, whole = views_of(data, spec, draft=True), views_of(data, spec, draft=False)
    differences = [np.abs(a.astype(int) - b.astype(int)).mean() for a, b in zip(near, whole)]
    # of 255; on such pictures benchmarks.stream finds 3.2 at most, and one squeezed by up to a pixel had 9
    assert max(differences) < 5.5
    assert max(differences) > 0, "otherwise nothing was drafted and this test says nothing"


def test_orientation_and_gray_survive() -> None:
    turned = photo(1024, 512)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(turned, quality=95, exif=exif.tobytes()), encoded(turned.convert("L"), quality=95)):
        spec = ImageSpec(size=64)
        (near,), (whole,) = (decoded_views(data, PLAIN, [spec], draft=draft) for draft in (True, False))
        assert np.abs(near.astype(int) - whole.astype(int)).mean() < 5.5


def test_damage_has_the_same_reason_either_way() -> None:
    data = encoded(photo(512, 512), quality=90)
    cases = ((data[: len(data) // 2], "truncated-image"), (data[:20], "truncated-image"), (b"x", "not-an-image"))
    for broken, reason in cases:
        for draft in (True, False):
            with pytest.raises(BadSampleError) as error:
                decoded_views(broken, PLAIN, [ImageSpec(size=32)], draft=draft)
            assert error.value.reason == reason
