"""Small pictures, samples and a tiny deterministic teacher."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.teachers.base import TeacherOutput


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def picture(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Smooth colours and a few edges, different for every seed."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
    x, y = rng.integers(0, width // 2), rng.integers(0, height // 2)
    image[y : y + height // 3, x : x + width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(image)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(count: int) -> list[Sample]:
    return [
        Sample(
            uid=f"p/{i}", image=ImageRef(data=png(picture(i))), captions=(Caption(f"thing number {i}"),), group=f"g{i}"
        )
        for i in range(count)
    ]


class TinyTeacher:
    """Random projections of pixels and of letter counts; counts how many pictures it was shown."""

    name = "tiny"
    fingerprint = "f" * 64
    space_id = "tiny-0"
    dim = 8
    logit_scale = 10.0
    logit_bias = 0.0
    image = ImageSpec(size=16)
    licences = (("tiny", "CC0-1.0", "nobody"),)

    def __init__(self, fail_after: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(16 * 16 * 3, 8, generator=generator)
        self.letters = torch.randn(128, 8, generator=generator)
        self.seen = 0
        self.fail_after = fail_after

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (16, 16, 3)
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        features = pixels.flatten(1).float() / 255 - 0.5
        return TeacherOutput(F.normalize(features @ self.weight, dim=-1), features[:, :5])

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        counts = torch.zeros(len(texts), 128)
        for row, text in zip(counts, texts):
            for char in text:
                row[ord(char) % 128] += 1
        return TeacherOutput(F.normalize(counts @ self.letters, dim=-1))


@pytest.fixture
def tiny_teacher() -> TinyTeacher:
    return TinyTeacher()


@pytest.fixture
def samples() -> list[Sample]:
    return make_samples(11)


@pytest.fixture
def picture_maker() -> Callable[..., Image.Image]:
    return picture


@pytest.fixture
def horizontal_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow resizes columns before rows, as it always did up to version 12 and as the contract says.

    From 13 it picks the order by cost, which moves some pixels by one level of 255.
    """
    resize = Image.Image.resize

    def two_passes(
        self: Image.Image,
        size: tuple[int, int],
        resample: int | None = None,
        box: None = None,
        reducing_gap: None = None,
    ) -> Image.Image:
        assert box is None
        assert reducing_gap is None
        return resize(resize(self, (size[0], self.height), resample), tuple(size), resample)

    monkeypatch.setattr(Image.Image, "resize", two_passes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"
