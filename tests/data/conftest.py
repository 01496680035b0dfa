"""Pictures and layouts small enough to write in every test."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data import DataSource, open_data


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """The whole built-in set at 16 pixels, drawn once per test session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return open_data("openmoji?size=16&languages=all")


def encode(format_name: str = "jpeg", seed: int = 0) -> bytes:
    """A noisy 24 x 32 picture (noise, so that cutting the file cuts pixels)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture (or the given bytes) below tmp_path."""

    def write(name: str, data: bytes | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix[1:].replace("jpg", "jpeg")
        path.write_bytes(encode(suffix, seed=len(name)) if data is None else data)
        return path

    return write


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., str]:
    """Writes a JSON Lines manifest into tmp_path and returns its path."""

    def write(*rows: object, name: str = "m.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
