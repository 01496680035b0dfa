"""Pictures from wherever they come to batches of pixels, decoded by several threads while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import ImageSource, load_image

_ONE = (str, Path, bytes, bytearray, memoryview, Image.Image)


def each_image(images: ImageSource | Iterable[ImageSource]) -> Iterable[Any]:
    """One image as a tuple of it; several, or an array [N, H, W, C], as they are, and an iterator unread."""
    if isinstance(images, _ONE) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return (images,)
    if not isinstance(images, Iterable):
        raise UsageError(
            f"images is a {type(images).__name__}; give a path, encoded bytes, a PIL image, a uint8 array [H, W, 3] or "
            "several of them"
        )
    return images


def labelled_pictures(folder: str | Path) -> tuple[list[Path], list[str]]:
    """Files of a folder with one folder of pictures for each label, and their labels; hidden files are passed over.

    Raises:
        UsageError: no such folder, one that cannot be read, or one without labels or pictures.
    """
    root, given = Path(folder), f"folder {str(folder)!r}"
    again = "expected is one folder of pictures for each label, named by it"
    paths, labels = [], []
    try:
        if not root.is_dir():
            raise UsageError(f"{given} is no folder; {again}")
        for label in sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != "."):
            found = sorted(path for path in label.iterdir() if path.is_file() and path.name[0] != ".")
            paths += found
            labels += [label.name] * len(found)
    except OSError as error:
        raise UsageError(
            f"{given} cannot be read ({error.strerror}: {error.filename}); nothing can be learnt from it, so permit it"
        ) from error
    if not paths:
        raise UsageError(f"{given} holds no picture in a folder of its own; {again}")
    return paths, labels


def pixel_batches(
    images: Iterable[ImageSource], spec: ImageSpec, batch_size: int, workers: int
) -> Iterator[NDArray[np.uint8]]:
    """uint8 [n, S, S, 3] with n <= batch_size, in order.

    With two or more workers at most one batch beyond the one that is handed out is read and decoded ahead; with one
    nothing is. A picture that cannot be used raises when its batch is asked for, an error of `images` itself at once.

    Raises:
        BadSampleError, UsageError: see `edge.preprocess.load_image`.
    """
    source = iter(images)
    first = list(islice(source, batch_size))
    if workers < 2 or len(first) < 2:
        while first:
            yield np.stack([load_image(image, spec) for image in first])
            first = list(islice(source, batch_size))
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="pocketvlm-decode") as pool:
        current = [_started(pool, image, spec) for image in first]
        following: list[Future[NDArray[np.uint8]]] = []
        try:
            while current:
                following = [_started(pool, image, spec) for image in islice(source, batch_size)]
                yield np.stack([future.result() for future in current])
                current, following = following, []
        finally:
            for future in (*current, *following):
                future.cancel()


def _started(pool: ThreadPoolExecutor, image: ImageSource, spec: ImageSpec) -> Future[NDArray[np.uint8]]:
    if not isinstance(image, Image.Image):
        return pool.submit(load_image, image, spec)
    # PIL images load lazily and are not safe to share among threads, and the same one may come twice
    done: Future[NDArray[np.uint8]] = Future()
    try:
        done.set_result(load_image(image, spec))
    except Exception as error:
        done.set_exception(error)
    return done
