"""Pictures that come one after another, from several threads, from many tasks; and what `EdgeModel.load` is told."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.preprocess import decode_image, load_image, resize_image


@pytest.fixture
def model(bundle_folder: Path) -> EdgeModel:
    return EdgeModel.load(bundle_folder, threads=1)


def pictures(count: int) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (9, 13, 3)).astype(np.uint8) for seed in range(count)]


def encoded(picture: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_an_endless_generator_is_read_as_far_as_needed(model: EdgeModel, tools: Any) -> None:
    read = 0

    def camera() -> Iterator[np.ndarray]:
        nonlocal read
        for frame in itertools.cycle(pictures(7)):
            read += 1
            yield frame

    pixels = np.stack([load_image(frame, model.contract.image) for frame in pictures(7)])  # type: ignore[arg-type]
    expected = tools.expected_image(pixels)
    for workers, ahead in ((1, 0), (2, 3)):
        read = 0
        stream = model.stream_images(camera(), batch_size=3, workers=workers)
        for number, row in enumerate(itertools.islice(stream, 10)):
            assert row.shape == (4,)
            np.testing.assert_allclose(row, expected[number % 7], atol=1e-6)
            assert read <= 3 * (number // 3 + 1) + ahead
        stream.close()  # type: ignore[attr-defined]
        assert read == 12 + ahead
    assert threading.active_count() < 10


def test_a_frame_is_answered_before_the_next_is_asked_for(model: EdgeModel) -> None:
    order = []

    def camera() -> Iterator[np.ndarray]:
        for number, frame in enumerate(pictures(3)):
            order.append(f"read {number}")
            yield frame

    for number, _ in enumerate(model.stream_images(camera(), batch_size=1, workers=1)):
        order.append(f"answered {number}")
    assert order == [f"{what} {number}" for number in range(3) for what in ("read", "answered")]


def test_workers_change_nothing_but_the_time(model: EdgeModel, tmp_path: Path) -> None:
    arrays = pictures(9)
    (tmp_path / "0.png").write_bytes(encoded(arrays[0]))
    shared = Image.fromarray(arrays[1])
    mixed: list[Any] = [tmp_path / "0.png", shared, encoded(arrays[2]), *arrays[3:], shared, shared]
    for batch_size in (1, 2, 4, 32):
        plain = model.embed_image(mixed, batch_size=batch_size, workers=1)
        assert np.array_equal(model.embed_image(iter(mixed), batch_size=batch_size, workers=3), plain)
    assert np.array_equal(np.stack(list(model.stream_images(mixed, workers=2))), plain)
    assert np.array_equal(model.embed_image(np.stack(arrays), workers=2), model.embed_image(arrays, workers=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_picture_in_a_stream_stops_it_at_its_batch(model: EdgeModel, workers: int) -> None:
    stream = model.stream_images([*pictures(4), b"nonsense", *pictures(1)], batch_size=2, workers=workers)
    assert len(list(itertools.islice(stream, 4))) == 4
    with pytest.raises(BadSampleError, match="not a picture"):
        next(stream)


def test_no_workers_and_no_pictures(model: EdgeModel) -> None:
    with pytest.raises(UsageError, match="workers is 0"):
        model.embed_image(pictures(2), workers=0)
    with pytest.raises(UsageError, match="batch_size is 0"):
        model.embed_image(pictures(2), batch_size=0)
    with pytest.raises(UsageError, match="images is a int"):
        model.embed_image(5)  # type: ignore[arg-type]
    assert list(model.stream_images([])) == []


def test_many_tasks_share_a_model(model: EdgeModel) -> None:
    """Each task gets the embedding of its own picture, and the loop is not held up meanwhile."""
    arrays = pictures(24)
    expected = model.embed_image(arrays, workers=1)
    ticks = 0

    async def clock(stop: asyncio.Event) -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            await asyncio.sleep(0.001)

    async def everything() -> list[np.ndarray]:
        stop = asyncio.Event()
        watch = asyncio.create_task(clock(stop))
        jobs = [asyncio.to_thread(model.embed_image, picture) for picture in arrays]
        rows = await asyncio.gather(*jobs, asyncio.to_thread(time.sleep, 0.05))
        stop.set()
        await watch
        return rows[:-1]

    found = asyncio.run(everything())
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
    assert ticks > 3


def test_threads_mix_towers_labels_and_streams(model: EdgeModel) -> None:
    arrays = pictures(6)
    images, texts = model.embed_image(arrays), model.embed_text(["red", "a blue", "green"])
    verdicts = model.classify(arrays, ["red", "blue", "green"])

    def work(number: int) -> bool:
        kind = number % 4
        if kind == 0:
            return np.allclose(model.embed_image(arrays, workers=2, batch_size=2), images, atol=1e-6)
        if kind == 1:
            return np.array_equal(model.embed_text(["red", "a blue", "green"]), texts)
        if kind == 2:
            return model.classify(arrays, ["red", "blue", "green"]) == verdicts
        return np.array_equal(np.stack(list(model.stream_images(iter(arrays)))), images)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_short_way_to_pixels_gives_what_the_long_way_gives(model: EdgeModel, orientation: int) -> None:
    spec = model.contract.image
    assert spec is not None
    exif = Image.Exif()
    exif[0x0112] = orientation
    for mode in ("RGB", "L", "CMYK", "RGBA", "P"):
        file = BytesIO()
        image = Image.fromarray(pictures(1)[0]).convert(mode)
        image.save(file, "JPEG" if mode in ("RGB", "L", "CMYK") else "PNG", exif=exif.tobytes())
        found = load_image(file.getvalue(), spec)
        assert np.array_equal(found, resize_image(decode_image(file.getvalue()), spec))
        assert found.flags.writeable
        assert found.flags.c_contiguous


def test_a_picture_given_as_pil_is_left_as_it_is(model: EdgeModel) -> None:
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    load_image(image, model.contract.image)[:] = 255  # type: ignore[arg-type]
    decode_image(image)[:] = 255
    assert np.asarray(image).max() == 0
