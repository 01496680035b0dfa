"""The issue's list of bad input as a user of the command line meets it: one sentence, exit code 2, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.distill import checkpoint

Cli = Callable[..., Any]
RED = (255, 0, 0)


def refusal(done: Any) -> str:
    """The last line of stderr of a run that had begun, and so had said what it is doing."""
    assert done.code == 2, done
    assert "Traceback" not in done.err
    last = done.err.splitlines()[-1]
    assert last.startswith("pocketvlm: ")
    return last


def test_an_empty_data_set(cli: Cli, bundle: Path, recipe: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for command in (
        ("eval", bundle, "--data", empty),
        ("distill", recipe, f"data.train={empty}", "--out", tmp_path / "out"),
    ):
        assert str(empty) in cli(*command).sentence()
    assert not (tmp_path / "out").exists()


def test_captions_longer_than_the_context(cli: Cli, bundle: Path, colours: Path, tmp_path: Path) -> None:
    """The hand-made bundle reads six tokens."""
    folder = Path(shutil.copytree(colours, tmp_path / "data"))
    with (folder / "pairs.jsonl").open("a") as file:
        row = {"image": "red.png", "caption": "a picture of red red red red red", "uid": "long"}
        file.write(json.dumps(row) + "\n")
    command = ("eval", bundle, "--data", folder / "pairs.jsonl")
    done = cli(*command, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"]["left_out"] == {"too-long-text": 1}
    assert json.loads(done.out)["model"]["image_to_text"]["queries"] == 3
    assert "1 too-long-text" in " ".join(cli(*command).out.split())
    said = cli(*command, "--on-bad-sample", "refuse").sentence()
    assert "pairs/long" in said
    assert "10 tokens" in said


def test_a_batch_of_one_has_nothing_to_contrast(cli: Cli, recipe: Path, shapes: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "train.batch_size is 1" in cli("distill", recipe, "train.batch_size=1", *out).sentence()
    # the recipe asks for eight, and the data has one
    said = refusal(cli("distill", recipe, f"data.train={shapes}?limit=1", *out))
    assert "only one picture" in said
    assert "at least two captioned pictures" in said


def test_a_teacher_of_another_width(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    from pocketvlm.teachers.precomputed import import_embeddings

    uids = [f"p{index}" for index in range(4)]
    rows = np.eye(4, 24, dtype=np.float32)
    folder = tmp_path / "embeddings"
    import_embeddings(folder, uids=uids, image=rows, texts=uids, text=rows, name="mine")
    said = refusal(cli("distill", recipe, f"teacher.spec=embeddings:{folder}", "--out", tmp_path / "out"))
    assert "student.embed_dim is 16" in said
    assert "24 dimensions" in said


def test_a_bundle_of_a_newer_release(cli: Cli, bundle: Path, colours: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(bundle, tmp_path / "newer"))
    raw = json.loads((newer / "bundle.json").read_text())
    (newer / "bundle.json").write_text(json.dumps(raw | {"schema_version": "1.7"}))
    for command in (
        ("embed", newer, "red", "--text"),
        ("classify", newer, colours / "red.png", "--labels", "red"),
        ("eval", newer, "--data", colours / "pairs.jsonl"),
    ):
        assert "upgrade pocketvlm" in cli(*command).sentence()


def test_a_student_with_a_changed_byte(cli: Cli, student: Path, shapes: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(student, tmp_path / "bad"))
    data = bytearray((bad / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (bad / "weights.safetensors").write_bytes(data)
    out = ("--out", tmp_path / "out")
    for command in (
        ("eval", bad, "--data", shapes),
        ("export", bad, "--targets", "onnx:fp32", *out),
        ("reference", "record", bad, "--data", shapes, *out),
    ):
        assert "weights.safetensors" in cli(*command).sentence()
    assert not (tmp_path / "out").exists()


def test_unusual_pictures_are_the_picture_that_they_show(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    red, blue = Image.new("RGB", (12, 8), RED), Image.new("RGB", (12, 8), (0, 0, 255))
    red.save(tmp_path / "plain.png")
    Image.new("CMYK", (12, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    Image.new("RGBA", (12, 8), (*RED, 255)).save(tmp_path / "alpha.png")
    red.save(tmp_path / "animated.gif", save_all=True, append_images=[blue], duration=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((8, 12), 32768, np.uint16)).save(tmp_path / "gray16.png")
    Image.new("L", (12, 8), 128).save(tmp_path / "gray8.png")
    names = ("plain.png", "cmyk.tif", "alpha.png", "animated.gif", "turned.png", "gray16.png", "gray8.png")
    done = cli("embed", bundle, *(tmp_path / name for name in names))
    assert done.code == 0, done.err
    rows = np.array([json.loads(line)["embedding"] for line in done.out.splitlines()])
    np.testing.assert_allclose(rows[1:5], rows[[0] * 4], atol=1e-6)
    np.testing.assert_allclose(rows[5], rows[6], atol=1e-6)
    assert np.abs(rows[0] - rows[6]).max() > 0.1


def test_a_picture_that_breaks_off(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])
    assert "cut.jpg" in cli("embed", bundle, path).sentence()
    assert "cut.jpg" in cli("classify", bundle, path, "--labels", "red").sentence()


def test_a_full_disk_keeps_the_checkpoint_before(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint._write_and_sync

    def full(path: Path, data: Any) -> None:
        if "step-00000002.pt" in path.name:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write_and_sync", full)
    out = ("--out", tmp_path / "run")
    said = refusal(cli("distill", recipe, *out))
    assert "the disk is full; step-00000001.pt is intact" in said
    monkeypatch.undo()
    assert cli("distill", recipe, *out, "--resume").code == 0


def test_a_full_disk_while_exporting_leaves_nothing(
    cli: Cli, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.export import bundle as writer

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(writer, "write_vectors", full)
    done = cli("export", student, "--out", tmp_path / "out", "--targets", "onnx:fp32")
    said = done.sentence(after=["computing conformance vectors in float64"])
    assert "No space left on device" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stopped_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that ends after its folder was made ready."""
    from pocketvlm import demo
    from pocketvlm.edge.errors import UsageError

    def stop(_: Any) -> None:
        raise UsageError("stopped here")

    monkeypatch.setattr(demo, "_data_and_teacher", stop)


def test_a_demo_without_its_packages_says_so_at_once(
    cli: Cli, stopped_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm import demo

    monkeypatch.setattr(demo, "PACKAGES", ("torch", "no_such_renderer"))
    said = refusal(cli("demo", "--quick", "--out", tmp_path / "demo"))
    assert "'no_such_renderer'" in said
    assert "pip install 'pocketvlm[demo]'" in said
    assert not (tmp_path / "demo").exists()


def test_a_demo_deletes_only_what_a_demo_made(cli: Cli, stopped_demo: None, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    (out / "chapter.txt").write_text("ten years of work")
    command = ("demo", "--quick", "--out", out)
    assert "--overwrite" in refusal(cli(*command))
    said = refusal(cli(*command, "--overwrite"))
    assert str(out) in said
    assert "not a demo's" in said
    assert (out / "chapter.txt").read_text() == "ten years of work"
    assert "is a file" in refusal(cli("demo", "--out", out / "chapter.txt", "--overwrite"))


def test_a_demo_that_was_stopped_can_be_overwritten(cli: Cli, stopped_demo: None, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert "stopped here" in refusal(cli("demo", "--out", out))
    (out / "half.txt").write_text("")
    assert "--overwrite" in refusal(cli("demo", "--out", out))
    assert "stopped here" in refusal(cli("demo", "--out", out, "--overwrite"))
    assert not (out / "half.txt").exists()
    # a finished one of a release that left no mark at its start
    old = tmp_path / "old"
    old.mkdir()
    for name in ("demo.json", "report.html"):
        (old / name).write_text("{}")
    assert "stopped here" in refusal(cli("demo", "--out", old, "--overwrite"))
    assert not (old / "report.html").exists()
