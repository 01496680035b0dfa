from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data.augment import NO_AUGMENTATION, AugmentPolicy, ViewParams, apply_view, view_params
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.edge.preprocess import resize_image


def drawing(width: int = 224, height: int = 224) -> np.ndarray:
    """Smooth and asymmetric, so that a shift, a mirror or a turn changes it and a change of size hardly does."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    x, y = x / width, y / height
    red = 255 * x * (0.5 + 0.5 * np.sin(9 * y))
    green = 255 * np.exp(-40 * ((x - 0.3) ** 2 + (y - 0.6) ** 2))
    blue = 255 * (0.5 + 0.5 * np.cos(7 * x + 3 * y))
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


def difference(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left.astype(np.float64) - right).mean())


def test_parameters_have_known_values() -> None:
    # any change here makes every teacher cache wrong: raise VIEW_VERSION with it
    assert view_params("openmoji/1F600", 1, 0, AugmentPolicy()) == ViewParams(
        identity=False,
        area=0.767328,
        ratio=0.866646,
        x=0.594837,
        y=0.115949,
        flip=False,
        angle=-7.899673,
        brightness=0.805025,
        contrast=0.873323,
        saturation=0.875943,
    )
    assert view_params("openmoji/1F600", 2, 7, AugmentPolicy()) == ViewParams(
        identity=False,
        area=0.972392,
        ratio=0.985363,
        x=0.360177,
        y=0.866448,
        flip=False,
        angle=-0.51683,
        brightness=0.862529,
        contrast=1.028364,
        saturation=1.020551,
    )


def test_parameters_depend_on_every_argument_and_on_nothing_else() -> None:
    policy = AugmentPolicy()
    base = view_params("a", 1, 0, policy)
    assert base == view_params("a", 1, 0, AugmentPolicy())
    others = [view_params("b", 1, 0, policy), view_params("a", 2, 0, policy), view_params("a", 1, 1, policy)]
    assert len({base, *others}) == 4
    assert view_params("a", 1, 0, AugmentPolicy(rotate=0.0)) == dataclasses.replace(base, angle=0.0)


def test_parameters_stay_in_range_and_fill_it() -> None:
    policy = AugmentPolicy()
    views = [view_params("x", view, 3, policy) for view in range(1, 2001)]
    for field, (low, high) in {
        "area": policy.scale,
        "ratio": policy.ratio,
        "x": (0.0, 1.0),
        "y": (0.0, 1.0),
        "angle": (-10.0, 10.0),
        "brightness": (0.8, 1.2),
        "contrast": (0.8, 1.2),
        "saturation": (0.8, 1.2),
    }.items():
        values = np.array([getattr(view, field) for view in views])
        assert low <= values.min() < low + 0.01 * (high - low) + 1e-6
        assert high - 0.01 * (high - low) - 1e-6 < values.max() <= high
        middle = (low * high) ** 0.5 if field == "ratio" else (low + high) / 2
        assert np.median(values) == pytest.approx(middle, abs=0.05 * (high - low))
    assert np.mean([view.flip for view in views]) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("shape", [(224, 224), (300, 200)])
def test_view_zero_is_the_contract(shape: tuple[int, int]) -> None:
    pixels = drawing(*shape)
    params = view_params("a", 0, 5, AugmentPolicy())
    for spec in (ImageSpec(size=64), ImageSpec(size=64, resize="squash", filter="bicubic")):
        assert np.array_equal(apply_view(pixels, params, 64, spec=spec), resize_image(pixels, spec))
    assert np.array_equal(apply_view(pixels, params, 64), resize_image(pixels, ImageSpec(size=64)))


@pytest.mark.parametrize("shape", [(224, 224), (400, 260)])
@pytest.mark.parametrize("big", [160, 192, 256])
def test_one_view_looks_the_same_at_two_sizes(shape: tuple[int, int], big: int) -> None:
    pixels = drawing(*shape)
    for view in range(1, 13):
        params = view_params("picture", view, 0, AugmentPolicy())
        small = apply_view(pixels, params, 96)
        large = Image.fromarray(apply_view(pixels, params, big)).resize((96, 96), Image.Resampling.BILINEAR)
        other = apply_view(pixels, view_params("picture", view + 1, 0, AugmentPolicy()), 96)
        assert difference(small, np.asarray(large)) < 2.0
        assert difference(small, other) > 5.0


def test_crop_takes_the_named_part() -> None:
    pixels = drawing()
    params = ViewParams(area=0.25, ratio=1.0, x=1.0, y=0.0)
    assert difference(apply_view(pixels, params, 112), pixels[:112, 112:]) < 1.0


def test_crop_of_a_wide_picture_has_the_named_shape() -> None:
    pixels = drawing(400, 100)
    # a square crop cannot be wider than the picture is high
    params = ViewParams(area=0.25, ratio=1.0, x=0.0, y=0.5)
    assert difference(apply_view(pixels, params, 100), pixels[:, :100]) < 1.0


def test_flip_mirrors() -> None:
    pixels = drawing()
    plain = apply_view(pixels, ViewParams(area=0.8, x=0.2, y=0.7), 96)
    flipped = apply_view(pixels, ViewParams(area=0.8, x=0.2, y=0.7, flip=True), 96)
    assert difference(plain[:, ::-1], flipped) < 0.6


def test_rotation_is_counter_clockwise_and_filled() -> None:
    pixels = drawing(96, 96)
    turned = apply_view(pixels, ViewParams(angle=90.0), 96, (1, 2, 3))
    assert difference(turned, np.rot90(pixels)) < 1.0
    slanted = apply_view(pixels, ViewParams(angle=45.0), 96, (1, 2, 3))
    assert slanted[0, 0].tolist() == [1, 2, 3]
    inner = apply_view(pixels, ViewParams(area=0.25, angle=20.0), 48, (1, 2, 3))
    assert not (inner == np.array([1, 2, 3])).all(-1).any(), "corners show the picture where there is any"


def test_colours() -> None:
    gray = np.full((8, 8, 3), 100, np.uint8)
    assert apply_view(gray, ViewParams(brightness=1.2), 8)[4, 4].tolist() == [120, 120, 120]
    assert apply_view(gray, ViewParams(contrast=0.5), 8)[4, 4].tolist() == [114, 114, 114]
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    assert apply_view(red, ViewParams(saturation=0.0), 8)[4, 4].tolist() == [60, 60, 60]
    white = np.full((8, 8, 3), 255, np.uint8)
    assert apply_view(white, ViewParams(brightness=1.5), 8).min() == 255


def test_no_augmentation_shows_the_whole_square() -> None:
    params = view_params("a", 4, 0, NO_AUGMENTATION)
    assert params == dataclasses.replace(ViewParams(), x=params.x, y=params.y)
    assert difference(apply_view(drawing(), params, 112), resize_image(drawing(), ImageSpec(size=112))) < 1.0


def test_result_is_writable_uint8() -> None:
    out = apply_view(drawing(50, 40), view_params("a", 1, 0, AugmentPolicy()), 33)
    assert (out.shape, out.dtype, out.flags.writeable) == ((33, 33, 3), np.uint8, True)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (4000, 3)])
def test_odd_pictures_have_views(size: tuple[int, int]) -> None:
    for view in range(4):
        assert apply_view(drawing(*size), view_params("a", view, 0, AugmentPolicy()), 16).shape == (16, 16, 3)


def test_policy_travels_as_json() -> None:
    policy = AugmentPolicy(scale=(0.3, 0.9), rotate=5.0)
    assert AugmentPolicy.from_dict(policy.to_dict()) == policy
    assert policy.digest() == AugmentPolicy.from_dict(policy.to_dict()).digest() != AugmentPolicy().digest()
    with pytest.raises(UnknownNameError, match=r"unknown augmentation setting 'rotation'.*'rotate'"):
        AugmentPolicy.from_dict({"rotation": 3})


@pytest.mark.parametrize(
    "settings", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 1.5)}, {"ratio": (2.0, 1.0)}, {"flip": 2.0}, {"rotate": -1.0}]
)
def test_impossible_policies(settings: dict) -> None:
    with pytest.raises(UsageError):
        AugmentPolicy(**settings)


def test_negative_view() -> None:
    with pytest.raises(UsageError, match="count from 0"):
        view_params("a", -1, 0, AugmentPolicy())
