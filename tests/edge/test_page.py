"""The Python of docs/edge.md runs as it stands, on the tiny bundle."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).resolve().parents[2] / "docs/edge.md"


def test_the_snippets_run(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_folder == tmp_path / "bundle"
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pictures = [rng.integers(1, 256, (9, 9, 3)).astype(np.uint8) for _ in range(30)]
    for name, picture in zip(("a.jpg", "b.png", "photo.jpg"), pictures):
        Image.fromarray(picture).save(name)
    names = ["dog", "cat", "fox"] * 5
    known: dict[str, Any] = {
        "frames": lambda: iter(pictures[:3]),
        "pictures": pictures[:15],
        "labels": names,
        "others": pictures[15:],
        "their_labels": names,
    }
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len(snippets) == 5
    for snippet in snippets:
        exec(compile(snippet, str(PAGE), "exec"), known)
    row = asyncio.run(known["answer"](Path("a.jpg").read_bytes()))
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-5)
    assert Path("animals.zip").is_file()
