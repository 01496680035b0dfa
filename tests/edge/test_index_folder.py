"""Folder sync: every picture is accounted for, each content embedded once, and what was moved keeps its embedding."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.index import EmbeddingIndex
from pocketvlm.edge.model import EdgeModel


def paint(path: Path, *colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), colour).save(path)
    return path


@pytest.fixture
def model(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model; `embedded` counts the pictures that went through it."""
    model: Any = EdgeModel.load(bundle_folder, threads=1)
    model.embedded = 0
    original = model.embed_pixels

    def counted(pixels: np.ndarray, **options: Any) -> np.ndarray:
        model.embedded += len(pixels)
        return original(pixels, **options)

    monkeypatch.setattr(model, "embed_pixels", counted)
    return model


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    paint(folder / "red.png", 250, 10, 10)
    paint(folder / "trips/green.png", 10, 250, 10)
    paint(folder / "trips/2024/blue.PNG", 10, 10, 250)
    paint(folder / ".thumbnails/red.png", 1, 2, 3)
    (folder / "notes.txt").write_text("no picture by name")
    return folder


def counts(report: Any) -> dict[str, Any]:
    """What is not zero."""
    facts = vars(report) | {"unreadable": sorted(report.unreadable)}
    shown = {name: value for name, value in facts.items() if value}
    parts = [facts[name] for name in ("unchanged", "touched", "added", "changed", "moved", "copied")]
    assert facts["found"] == sum(parts) + sum(not name.endswith("/") for name in report.unreadable)
    return shown


def test_a_folder_and_what_becomes_of_it(tmp_path: Path, photos: Path, model: Any) -> None:
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        assert counts(index.sync_folder(photos, model)) == {"found": 3, "added": 3}
        assert sorted(index.keys()) == ["red.png", "trips/2024/blue.PNG", "trips/green.png"]
        (hit,) = index.search(model.embed_text("blue"), 1, space=model)[0]
        assert hit.key == "trips/2024/blue.PNG"
        assert (hit.metadata["folder"], hit.metadata["suffix"]) == ("trips/2024", ".png")
        assert hit.metadata["bytes"] == (photos / hit.key).stat().st_size
        assert counts(index.sync_folder(photos, model)) == {"found": 3, "unchanged": 3}
        assert model.embedded == 3

        # moved, copied, touched: nothing is embedded
        (photos / "trips/green.png").rename(photos / "leaf.png")
        shutil.copy(photos / "red.png", photos / "again.png")
        os.utime(photos / "trips/2024/blue.PNG", (1e9, 1e9))
        assert counts(index.sync_folder(photos, model)) == {
            "found": 4,
            "moved": 1,
            "copied": 1,
            "touched": 1,
            "unchanged": 1,
        }
        assert model.embedded == 3
        assert sorted(index.keys()) == ["again.png", "leaf.png", "red.png", "trips/2024/blue.PNG"]
        assert index.search(model.embed_text("green"), 1, space=model)[0][0].key == "leaf.png"
        assert [h.key for h in index.search([1, 0, 0, 0], space=model, where={"year": 2001})[0]] == [
            "trips/2024/blue.PNG"
        ]
        assert index.search([1, 0, 0, 0], space=model, where={"folder": "trips"}) == [[]]

        # changed, new, gone
        paint(photos / "red.png", 10, 200, 220)
        paint(photos / "new.png", 200, 200, 10)
        (photos / "leaf.png").unlink()
        assert counts(index.sync_folder(photos, model)) == {
            "found": 4,
            "changed": 1,
            "added": 1,
            "removed": 1,
            "unchanged": 2,
        }
        assert model.embedded == 5
        assert "leaf.png" not in index
        np.testing.assert_allclose(index.get(["red.png"]), model.embed_image(photos / "red.png"), atol=1e-3)
        index.verify()


def test_two_pictures_trade_places(tmp_path: Path, photos: Path, model: Any) -> None:
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        index.sync_folder(photos, model)
        a, b = photos / "red.png", photos / "trips/green.png"
        a.rename(photos / "c.png")
        b.rename(a)
        (photos / "c.png").rename(b)
        index.sync_folder(photos, model)
        assert index.search(model.embed_text("red"), 1, space=model)[0][0].key == "trips/green.png"
        assert index.search(model.embed_text("green"), 1, space=model)[0][0].key == "red.png"
        assert counts(index.sync_folder(photos, model)) == {"found": 3, "unchanged": 3}


def test_the_same_content_many_times_is_embedded_once(tmp_path: Path, model: Any) -> None:
    for n in range(70):
        paint(tmp_path / f"photos/{n}.png", 9, 9, 200)
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        assert counts(index.sync_folder(tmp_path / "photos", model)) == {"found": 70, "added": 1, "copied": 69}
        assert (model.embedded, len(index)) == (1, 70)


def test_what_cannot_be_read_is_reported_each_time_and_found_once_it_can(
    tmp_path: Path, photos: Path, model: Any
) -> None:
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (photos / "empty.webp").write_bytes(b"")
    (photos / "nowhere.png").symlink_to(tmp_path / "gone")
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        for _ in range(2):
            report = index.sync_folder(photos, model)
            assert sorted(report.unreadable) == ["broken.jpg", "empty.webp", "nowhere.png"]
            assert counts(report)["found"] == 6
        assert "cannot be read" in report.unreadable["nowhere.png"]
        assert len(index) == 3
        paint(photos / "broken.jpg", 3, 99, 3)
        shutil.copy(photos / "broken.jpg", photos / "empty.webp")
        (photos / "red.png").write_bytes(b"damaged later")
        report = index.sync_folder(photos, model)
        assert sorted(report.unreadable) == ["nowhere.png", "red.png"]
        assert (report.added, report.copied, report.removed) == (1, 1, 1)
        assert "red.png" not in index
        assert "empty.webp" in index


def test_a_name_that_is_no_utf8_is_reported(tmp_path: Path, photos: Path, model: Any) -> None:
    shutil.copy(photos / "red.png", os.fsencode(photos) + b"/caf\xe9.png")
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        report = index.sync_folder(photos, model)
        assert report.unreadable == {"caf\ufffd.png": "its name is no UTF-8"}
        assert counts(report)["added"] == 3


def test_a_folder_that_cannot_be_listed_keeps_its_rows(
    tmp_path: Path, photos: Path, model: Any, monkeypatch: Any
) -> None:
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        index.sync_folder(photos, model)
        scandir = os.scandir

        def refuse(path: Any) -> Any:  # root may list everything, so permissions would not do
            if str(path).endswith("trips"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        report = index.sync_folder(photos, model)
        assert report.unreadable == {"trips/": "cannot be listed: Permission denied"}
        assert (report.removed, len(index)) == (0, 3)


def test_a_row_removed_by_hand_comes_back_with_its_picture(tmp_path: Path, photos: Path, model: Any) -> None:
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        index.sync_folder(photos, model)
        index.remove("red.png")
        assert counts(index.sync_folder(photos, model)) == {"found": 3, "added": 1, "unchanged": 2}


def test_one_index_one_folder_one_space(tmp_path: Path, photos: Path, model: Any) -> None:
    with EmbeddingIndex.create(tmp_path / "x", model) as index:
        with pytest.raises(UsageError, match="is no folder"):
            index.sync_folder(photos / "red.png", model)
        index.sync_folder(photos, model)
        assert index.folder == photos
        paint(tmp_path / "others/red.png", 1, 2, 3)
        with pytest.raises(UsageError, match="their names would be taken for each other"):
            index.sync_folder(tmp_path / "others", model)
        photos.rename(tmp_path / "pictures")
        assert counts(index.sync_folder(tmp_path / "pictures", model)) == {"found": 3, "unchanged": 3}
    with EmbeddingIndex.create(tmp_path / "y", "elsewhere", 4) as index, pytest.raises(UsageError, match="'elsewhere'"):
        index.sync_folder(tmp_path / "pictures", model)
    with EmbeddingIndex.create(tmp_path / "z", model) as index:
        index.add("red.png", [1, 0, 0, 0], space=model)
        with pytest.raises(UsageError, match="1 rows that no folder brought"):
            index.sync_folder(tmp_path / "pictures", model)
        no_pictures = SimpleNamespace(contract=SimpleNamespace(space_id="tiny-0", image=None, name="words"), dim=4)
        with pytest.raises(UsageError, match="'words' has no image tower"):
            index.sync_folder(tmp_path / "pictures", no_pictures)  # type: ignore[arg-type]


def test_a_student_searches_what_its_teacher_embedded(tmp_path: Path, bundle_folder: Path, tools: Any) -> None:
    """The gallery is the float64 model's; the query is the bundle's. One space id, one width."""
    teacher = SimpleNamespace(space_id="tiny-0", dim=4)
    student = EdgeModel.load(bundle_folder, threads=1)
    colours = {"red": (250, 5, 5), "green": (5, 250, 5), "blue": (5, 5, 250)}
    pixels = np.stack([np.full((8, 8, 3), colour, np.uint8) for colour in colours.values()])
    with EmbeddingIndex.create(tmp_path / "x", teacher) as index:
        index.add(list(colours), tools.expected_image(pixels), space=teacher)
        for name in colours:
            assert index.search(student.embed_text(name), 1, space=student)[0][0].key == name
        stranger = SimpleNamespace(space_id="clip", dim=4)
        with pytest.raises(UsageError, match="embedding space 'clip'"):
            index.search(student.embed_text("red"), space=stranger)


SYNC = """
import sys
from pathlib import Path
from pocketvlm.edge.index import EmbeddingIndex
from pocketvlm.edge.model import EdgeModel
model = EdgeModel.load(sys.argv[3], threads=1)
def say(done, of):
    print(done, flush=True)
EmbeddingIndex.load(sys.argv[1]).sync_folder(sys.argv[2], model, batch_size=8, progress=say)
"""


def test_a_killed_sync_goes_on_where_it_was(tmp_path: Path, bundle_folder: Path, model: Any) -> None:
    for n in range(400):
        paint(tmp_path / f"photos/{n % 7}/{n:03}.png", 30 + n % 200, 255 - n // 2, n % 90)
    EmbeddingIndex.create(tmp_path / "x", model).close()
    draw, sizes = random.Random(1), [0]
    for _ in range(4):
        command = [sys.executable, "-c", SYNC, str(tmp_path / "x"), str(tmp_path / "photos"), str(bundle_folder)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(draw.randint(10, 90)):
            child.stdout.readline()
        time.sleep(0.01 * draw.random())
        child.send_signal(signal.SIGKILL)
        child.wait()
        with EmbeddingIndex.load(tmp_path / "x", verify=True) as index:
            sizes.append(len(index))
    assert 0 < sizes[1] < sizes[2] < sizes[4] < 400
    with EmbeddingIndex.load(tmp_path / "x") as index:
        report = index.sync_folder(tmp_path / "photos", model)
        assert (report.found, len(index)) == (400, 400)
        assert report.unchanged == sizes[-1]
        assert model.embedded == report.added
        keys = sorted(index.keys())
        np.testing.assert_allclose(
            index.get(keys), model.embed_image([tmp_path / "photos" / key for key in keys]), atol=2e-3
        )
