"""Embedding into files, and a classifier that is taught, calibrated, kept and loaded, from the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Cli = Callable[..., Any]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Dark and light pictures of three colours, one folder for each."""
    rng = np.random.default_rng(0)
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(5):
            picture = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
            picture[..., channel] += 90
            Image.fromarray(picture).save(tmp_path / "pictures" / name / f"{number}.png")
        (tmp_path / "pictures" / name / ".hidden").write_text("not a picture")
    (tmp_path / "pictures" / "readme.txt").write_text("beside the folders")
    return tmp_path / "pictures"


def test_embed_writes_lines_or_an_array_with_ids(cli: Cli, bundle: Path, colours: Path, tmp_path: Path) -> None:
    pictures = [str(colours / "red.png"), str(colours / "blue.png")]
    printed = cli("embed", bundle, *pictures).out
    out = tmp_path / "rows.jsonl"
    assert cli("embed", bundle, *pictures, "--out", out).code == 0
    assert out.read_text() == printed
    assert "--overwrite" in cli("embed", bundle, *pictures, "--out", out).sentence()
    array = tmp_path / "rows.npy"
    assert cli("embed", bundle, *pictures, "--out", array).code == 0
    facts = json.loads((tmp_path / "rows.ids.json").read_text())
    assert facts["ids"] == pictures
    assert facts["space_id"] == "tiny-0"
    assert len(np.load(array)) == 2
    array.unlink()
    assert "rows.ids.json exists" in cli("embed", bundle, *pictures, "--out", array).sentence()


def test_labels_come_from_the_examples_and_the_classifier_is_kept(
    cli: Cli, bundle: Path, folders: Path, tmp_path: Path
) -> None:
    picture = folders / "green" / "0.png"
    kept = tmp_path / "colours.zip"
    others = Path(shutil.copytree(folders, tmp_path / "others"))
    # one of them under a wrong name, so that no temperature is sure of everything
    (others / "green/4.png").rename(others / "red/9.png")
    command = ("classify", bundle, picture, "--examples", folders, "--save", kept, "--json")
    assert "learnt from" in cli(*command, "--calibrate", folders).sentence()
    done = cli(*command, "--calibrate", others)
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)
    assert row["label"] == "green"
    assert "examples: 15, weight" in done.err
    assert "temperature: " in done.err
    assert "15 pictures" in done.err
    assert json.loads(cli("classify", bundle, picture, "--load", kept, "--json").out) == [row]
    (none,) = json.loads(cli("classify", bundle, picture, "--load", kept, "--threshold", "1.0", "--json").out)
    assert none == {**row, "label": ""}
    assert "--overwrite" in cli("classify", bundle, "--labels", "red", "blue", "--save", kept).sentence()
    # nothing to name: only the file is wanted
    assert cli("classify", bundle, "--labels", "red", "blue", "--save", kept, "--overwrite", "--json").code == 0
    (plain,) = json.loads(cli("classify", bundle, folders / "blue/1.png", "--load", kept, "--json").out)
    assert plain["label"] == "blue"


def test_a_method_that_needs_no_example_of_some_label(cli: Cli, bundle: Path, folders: Path) -> None:
    labels = ("--labels", "red", "green", "blue", "picture")
    command = ("classify", bundle, folders / "red/0.png", "--examples", folders, *labels)
    assert "no example was given of ['picture']" in cli(*command).sentence()
    assert cli(*command, "--method", "cache").code == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--examples", "MISSING"), "is no folder"),
        (("--examples", "EMPTY"), "holds no picture"),
        (("--calibrate", "FEW"), "at least 10 are needed"),
        (("--labels", "red", "yellow", "--examples", "PICTURES"), "unknown label of an example 'blue'"),
        (("--labels", "red", "red", "--threshold", "0.5"), "more than once"),
        (("--labels", "red", "blue", "--threshold", "1.5"), "threshold 1.5 is no probability"),
        (("--threshold", "0.5"), "0 labels were given"),
        (("--load", "MISSING"), "is no file"),
        (("--load", "MISSING", "--labels", "red"), "brings its own labels"),
    ],
)
def test_a_mistake_is_one_sentence(
    cli: Cli, bundle: Path, folders: Path, tmp_path: Path, options: tuple[str, ...], says: str
) -> None:
    (tmp_path / "few/red").mkdir(parents=True)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "few/red/0.png")
    (tmp_path / "few/blue").mkdir()
    Image.new("RGB", (8, 8), "white").save(tmp_path / "few/blue/0.png")
    (tmp_path / "empty/red").mkdir(parents=True)
    named = {"MISSING": "none", "EMPTY": "empty", "FEW": "few", "PICTURES": "pictures"}
    given = [str(tmp_path / named[option]) if option in named else option for option in options]
    assert says in cli("classify", bundle, folders / "red/0.png", *given).sentence()


def test_a_folder_that_the_system_refuses_to_list(
    cli: Cli, bundle: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def refuse(path: Path) -> Any:
        if path.name == "red":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    said = cli("classify", bundle, "--examples", folders, "--save", tmp_path / "kept").sentence()
    assert "cannot be read (Permission denied" in said
    assert not (tmp_path / "kept").exists()


def test_a_damaged_example_is_named(cli: Cli, bundle: Path, folders: Path) -> None:
    (folders / "blue/9.png").write_bytes(b"\x89PNG and no more")
    assert "9.png" in cli("classify", bundle, folders / "red/0.png", "--examples", folders).sentence()
