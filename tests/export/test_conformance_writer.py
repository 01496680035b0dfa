"""Vectors come from an exact model, through the contract's own preprocessing, and small enough to ship."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.edge.errors import BadSampleError, IntegrityError
from pocketvlm.edge.preprocess import decode_image, load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.cases import ImageCase, nasty_images
from pocketvlm.export.conformance import VECTORS, Vectors, double_rows, widen_tolerance, write_vectors
from pocketvlm.export.targets.base import Towers
from pocketvlm.students import train_tokenizer

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(scope="module")
def towers() -> Towers:
    torch.set_num_threads(1)
    return toy.toy_towers()


@pytest.fixture(scope="module")
def tokenizer(towers: Towers) -> Tokenizer:
    assert towers.contract.text is not None
    return Tokenizer(train_tokenizer(["a picture of a dog"] * 3, 300), towers.contract.text)


@pytest.fixture(scope="module")
def written(towers: Towers, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vectors]:
    folder = tmp_path_factory.mktemp("bundle")
    return folder, write_vectors(folder, towers, tokenizer)


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / VECTORS).read_text())


def test_bytes_pixels_and_embeddings_belong_together(written: tuple[Path, Vectors], towers: Towers) -> None:
    folder, vectors = written
    cases = content(folder)["images"]
    assert len(cases) == len(vectors.pixels)
    exact = copy.deepcopy(towers.image).double()  # type: ignore[union-attr]
    for index, case in enumerate(cases):
        raw = (folder / case["pixels_file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == case["pixels_sha256"]
        pixels = np.frombuffer(raw, np.uint8).reshape(toy.SIZE, toy.SIZE, 3)
        np.testing.assert_array_equal(pixels, vectors.pixels[index])
        again = load_image((folder / case["bytes_file"]).read_bytes(), towers.contract.image)  # type: ignore[arg-type]
        np.testing.assert_array_equal(pixels, again)
        with torch.no_grad():
            row = exact(torch.from_numpy(pixels.copy())[None])[0].numpy()
        np.testing.assert_allclose(case["embedding"], row / np.linalg.norm(row), rtol=1e-8, atol=1e-12)


def test_the_nasty_kinds_are_there(written: tuple[Path, Vectors]) -> None:
    folder, _ = written
    kinds = {}
    for case in content(folder)["images"]:
        with Image.open(folder / case["bytes_file"]) as image:
            kinds[case["name"]] = (image.format, image.mode, image.size, image.getexif().get(0x0112))
    modes = {mode for _, mode, _, _ in kinds.values()}
    assert {"RGB", "RGBA", "CMYK", "L", "P"} <= modes
    assert any(mode.startswith("I") for mode in modes), "16 bit"
    assert any(size[0] == 1 for _, _, size, _ in kinds.values()), "one pixel wide"
    assert any(orientation not in (None, 1) for *_, orientation in kinds.values()), "rotated by EXIF"
    assert any(form == "PNG" and mode == "RGB" for form, mode, _, _ in kinds.values())


def test_lossy_pictures_bring_their_decoded_pixels(written: tuple[Path, Vectors], towers: Towers) -> None:
    folder, _ = written
    spec = towers.contract.image
    assert spec is not None
    for case in content(folder)["images"]:
        stated = case["decoded"]
        decoded = decode_image((folder / case["bytes_file"]).read_bytes(), background=spec.background)
        assert decoded.shape == (stated["height"], stated["width"], 3)
        assert hashlib.sha256(decoded.tobytes()).hexdigest() == stated["sha256"]
        assert case["lossy"] == (case["bytes_file"].endswith(".jpg")) == ("file" in stated)
        if case["lossy"]:
            assert (folder / stated["file"]).read_bytes() == decoded.tobytes()
    assert sum(case["lossy"] for case in content(folder)["images"]) == 3


def test_a_large_input_brings_fewer_pixels(
    towers: Towers, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketvlm.export import conformance

    monkeypatch.setattr(conformance, "_PIXELS_BYTES", 5 * toy.SIZE**2 * 3 + 1)
    write_vectors(tmp_path, towers, tokenizer)
    assert ["pixels_file" in case for case in content(tmp_path)["images"]] == [True] * 5 + [False] * 8
    monkeypatch.setattr(conformance, "_PIXELS_BYTES", 0)
    write_vectors(tmp_path, towers, tokenizer)
    assert sum("pixels_file" in case for case in content(tmp_path)["images"]) == 4


def test_the_task_ranks_as_the_reference_does(written: tuple[Path, Vectors]) -> None:
    folder, vectors = written
    found = content(folder)
    task, texts = found["retrieval"], {case["name"]: row for case, row in zip(found["texts"], vectors.text)}
    images = {case["name"]: row for case, row in zip(found["images"], vectors.image)}
    assert set(task["images"]) == set(images)
    assert found["texts"][0]["text"] == "a red car"
    assert len(task["text_to_image"]) == len(task["texts"]) == 6
    assert len(task["image_to_text"]) == len(images)
    for query in task["text_to_image"]:
        scores = {name: float(texts[query["query"]] @ row) for name, row in images.items()}
        assert query["order"] == sorted(scores, key=lambda name: -scores[name])
        np.testing.assert_allclose(query["scores"], [scores[name] for name in query["order"]], rtol=1e-8, atol=1e-12)
    for query in task["image_to_text"]:
        best = max(task["texts"], key=lambda name: texts[name] @ images[query["query"]])
        assert query["order"][0] == best
    assert task["margin"]["fp32"] == pytest.approx(8 * (2 * 1e-6 / toy.DIM) ** 0.5, rel=0.05)
    assert task["margin"].keys() == found["tolerance"].keys()


def test_captions_of_real_pictures_are_asked_for(towers: Towers, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = nasty_images()[0].data
    write_vectors(tmp_path, towers, tokenizer, examples=[ImageCase("real-00", data, True, "jpg", caption="a dog")])
    asked = content(tmp_path)["retrieval"]["texts"]
    assert [case["text"] for case in content(tmp_path)["texts"] if case["name"] in asked][:2] == ["a dog", "a red car"]


def test_what_must_be_refused_is_refused_here(written: tuple[Path, Vectors], tokenizer: Tokenizer) -> None:
    folder, _ = written
    found = content(folder)
    assert {case["reason"] for case in found["refused_images"]} == {"truncated-image", "not-an-image", "empty-image"}
    for case in found["refused_images"]:
        with pytest.raises(BadSampleError) as refused:
            decode_image((folder / case["bytes_file"]).read_bytes())
        assert refused.value.reason == case["reason"]
    assert {case["text"] for case in found["refused_texts"]} == {"", " \t\n"}
    for case in found["refused_texts"]:
        with pytest.raises(BadSampleError, match="nothing to encode"):
            tokenizer.encode([case["text"]])


def test_strings_cover_scripts_and_the_context(written: tuple[Path, Vectors], tokenizer: Tokenizer) -> None:
    folder, vectors = written
    texts = [case["text"] for case in content(folder)["texts"]]
    assert tokenizer.encode(texts).tolist() == [case["ids"] for case in content(folder)["texts"]]
    np.testing.assert_array_equal(tokenizer.encode(texts), vectors.ids)
    assert max(tokenizer.lengths(texts)) > toy.LENGTH, "past the context"
    joined = "".join(texts)
    wanted = {"CJK": "\u4e00", "combining": "\u0301", "emoji": "\U0001f600", "right to left": "\u0635", "NUL": "\0"}
    assert {name for name, character in wanted.items() if character not in joined} == set()


def test_vectors_stay_small_and_are_plain_ascii(written: tuple[Path, Vectors]) -> None:
    folder, _ = written
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 400_000
    (folder / VECTORS).read_bytes().decode("ascii")


def test_real_pictures_only_when_given(written: tuple[Path, Vectors], towers: Towers, tmp_path: Path) -> None:
    folder, _ = written
    assert not any(case["name"].startswith("real") for case in content(folder)["images"])
    data = (folder / "conformance/images/odd-crop.png").read_bytes()
    only_image = Towers(towers.image, None, towers.contract)
    write_vectors(tmp_path, only_image, None, examples=[ImageCase("real-00", data, True, "png")])
    assert content(tmp_path)["images"][0]["name"] == "real-00"
    assert content(tmp_path)["texts"] == []
    assert content(tmp_path)["retrieval"] is None
    assert content(tmp_path)["refused_texts"] == []


def test_only_rounded_models_may_be_widened_and_say_why(
    written: tuple[Path, Vectors], towers: Towers, tmp_path: Path
) -> None:
    write_vectors(tmp_path, Towers(towers.image, None, towers.contract), None)
    before = content(tmp_path)["tolerance"]
    assert before["fp32"] == 1e-6
    widen_tolerance(tmp_path, {"fp32": 0.5, "int8": 0.001})
    assert content(tmp_path)["tolerance"] == before
    widen_tolerance(tmp_path, {"int8": 0.04})
    after = content(tmp_path)
    assert after["tolerance"] == before | {"int8": pytest.approx(0.06)}
    assert "0.04" in after["tolerance_source"]
    widen_tolerance(tmp_path, {"int8": 0.09})
    assert content(tmp_path)["tolerance"]["int8"] == pytest.approx(0.135)
    widen_tolerance(tmp_path, {"w4": 0.1, "w8": 0.004})
    both = content(tmp_path)
    assert both["tolerance"]["w4"] == pytest.approx(0.15)
    assert both["tolerance"]["w8"] == pytest.approx(0.006)
    assert both["tolerance_source"].startswith("w4: 1.5 times")
    assert "; w8: " in both["tolerance_source"]
    before = (tmp_path / VECTORS).read_bytes()
    with pytest.raises(IntegrityError, match=r"precision fp16 is 0.02 .*at most 0\.01 is allowed"):
        widen_tolerance(tmp_path, {"fp16": 0.02})
    for lost in (0.16, 1.0, float("nan")):
        with pytest.raises(IntegrityError, match=r"at most 0\.15 is allowed"):
            widen_tolerance(tmp_path, {"int8": lost})
    assert (tmp_path / VECTORS).read_bytes() == before


def test_a_model_that_gives_nan_is_refused(towers: Towers) -> None:
    broken = copy.deepcopy(towers.image)
    broken.projection.bias.data[3] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(IntegrityError, match="not finite"):
        double_rows(broken, toy.pictures(2))  # type: ignore[arg-type]


def test_the_reference_is_float64_and_of_unit_length(written: tuple[Path, Vectors], towers: Towers) -> None:
    _, vectors = written
    assert vectors.image.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(vectors.text, axis=1), 1.0, atol=1e-14)
    with torch.no_grad():
        single = towers.image(torch.from_numpy(vectors.pixels)).numpy()  # type: ignore[misc]
    difference = np.abs(single - vectors.image).max()
    assert 0 < difference < 1e-5, "float32 would agree to the bit"
    assert next(towers.image.parameters()).dtype == torch.float32  # type: ignore[union-attr]
