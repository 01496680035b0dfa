"""Tar shards of one-colour pictures for the tests of streams."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from distill_toys import NAMES, colour
from PIL import Image

SHARDS, SAMPLES = 5, 7


def picture(name: str) -> bytes:
    rng = np.random.default_rng(len(name))
    pixels = np.clip(colour(name) * 255 + rng.normal(0, 6, (24, 32, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_world(folder: Path, shards: int = SHARDS, samples: int = SAMPLES) -> Path:
    """Shards of one-colour pictures, each with its name as caption; samples differ by key."""
    pictures = {name: picture(name) for name in NAMES}
    for number in range(shards):
        members = []
        for index in range(samples):
            name, key = NAMES[(number * samples + index) % len(NAMES)], f"{number:03}{index:03}"
            members += [(f"{key}.jpg", pictures[name]), (f"{key}.txt", f"{name} thing".encode())]
        write_shard(folder / f"s-{number:03}.tar", members)
    return folder
