"""The runner of conformance vectors: it passes what is right and names the first stage that is not."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.conformance import StageResult, check_conformance, first_failing
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, VersionError
from pocketvlm.edge.preprocess import decode_image, load_image, resize_image


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.fixture
def vectors(bundle_folder: Path, tools: Any) -> dict[str, Any]:
    """Two lossless pictures, the second without recorded pixels, one JPEG, two strings and the task made of them."""
    folder = bundle_folder / "conformance"
    folder.mkdir()
    spec = ImageSpec(size=8)
    images = []
    for index, name in enumerate(("noise 0", "noise 1", "lossy")):
        picture = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        file = f"conformance/{index}.{'jpg' if name == 'lossy' else 'png'}"
        Image.fromarray(picture).save(bundle_folder / file)
        decoded = decode_image(bundle_folder / file)
        pixels = load_image(bundle_folder / file, spec)
        case = {
            "name": name,
            "note": "",
            "bytes_file": file,
            "lossy": name == "lossy",
            "decoded": {"height": 9, "width": 12, "sha256": sha256(decoded)},
            "pixels_sha256": sha256(pixels),
            "embedding": tools.expected_image(pixels[None])[0].tolist(),
        }
        if name == "lossy":
            (folder / "lossy.bin").write_bytes(decoded.tobytes())
            case["decoded"]["file"] = "conformance/lossy.bin"
        if name != "noise 1":
            (folder / f"{index}.bin").write_bytes(pixels.tobytes())
            case["pixels_file"] = f"conformance/{index}.bin"
        images.append(case)
    texts = []
    for name, ids in (("a red", [2, 4, 7, 3, 0, 0]), ("blue", [2, 9, 3, 0, 0, 0])):
        texts.append(
            {"name": name, "text": name, "ids": ids, "embedding": tools.expected_text(np.array([ids]))[0].tolist()}
        )
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:150])
    return {
        "schema": "1.1",
        "images": images,
        "texts": texts,
        "refused_images": [
            {"name": "half", "note": "cut", "bytes_file": "conformance/half.png", "reason": "truncated-image"}
        ],
        "refused_texts": [{"name": "empty", "note": "no text", "text": " ", "reason": "empty-text"}],
        "retrieval": {"k": 2, **task(images, texts), "margin": {"fp32": 1e-3, "int8": 0.1}},
        "tolerance": {"fp32": 1e-6},
    }


def task(images: list[dict[str, Any]], texts: list[dict[str, Any]]) -> dict[str, Any]:
    def ranked(queries: list[dict[str, Any]], gallery: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = []
        for query in queries:
            scores = {case["name"]: float(np.dot(query["embedding"], case["embedding"])) for case in gallery}
            order = sorted(scores, key=lambda name: -scores[name])
            rows.append({"query": query["name"], "order": order, "scores": [scores[name] for name in order]})
        return rows

    return {
        "images": [case["name"] for case in images],
        "texts": [case["name"] for case in texts],
        "text_to_image": ranked(texts, images),
        "image_to_text": ranked(images, texts),
    }


def check(folder: Path, tools: Any, vectors: dict[str, Any]) -> dict[str, StageResult]:
    (folder / "conformance/vectors.json").write_text(json.dumps(vectors))
    tools.write_manifest(folder, conformance="conformance/vectors.json")
    return {stage.stage: stage for stage in check_conformance(folder, threads=1)}


def failed(stages: dict[str, StageResult]) -> list[str]:
    return [name for name, stage in stages.items() if not stage.passed]


STAGES = (
    *("S0 decode", "S0 resize", "S0 pixels", "S0 refused", "S1 ids", "S1 refused"),
    *("S3 image graph", "S3 text graph", "S4 image", "S4 text", "S5 retrieval"),
)


def test_a_right_bundle_passes_every_stage(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    stages = check(bundle_folder, tools, vectors)
    assert tuple(stages) == STAGES
    assert failed(stages) == []
    assert first_failing(list(stages.values())) is None
    assert [stage.cases for stage in stages.values()] == [3, 1, 3, 1, 2, 1, 2, 2, 3, 2, 5]
    assert stages["S0 pixels"].worst == 0
    assert stages["S4 image"].worst < 1e-6
    assert stages["S4 image"].budget == 1e-6
    assert stages["S5 retrieval"].worst == 0
    assert stages["S5 retrieval"].budget == 1e-3


def test_vectors_of_the_first_schema_are_read(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    old = {
        "schema": "1.0",
        "images": [
            {key: case[key] for key in ("name", "bytes_file", "pixels_file", "pixels_sha256", "embedding")}
            for case in vectors["images"]
            if "pixels_file" in case
        ],
        "texts": [{key: case[key] for key in ("text", "ids", "embedding")} for case in vectors["texts"]],
    }
    stages = check(bundle_folder, tools, old)
    assert list(stages) == ["S0 pixels", "S1 ids", "S3 image graph", "S3 text graph", "S4 image", "S4 text"]
    assert failed(stages) == []


@pytest.mark.parametrize("number", [0, 1])
def test_other_pixels_fail_where_they_arise(
    number: int, bundle_folder: Path, tools: Any, vectors: dict[str, Any]
) -> None:
    picture = np.asarray(Image.open(bundle_folder / f"conformance/{number}.png")).copy()
    picture[:] = 255 - picture
    Image.fromarray(picture).save(bundle_folder / f"conformance/{number}.png")
    stages = check(bundle_folder, tools, vectors)
    assert [name for name in failed(stages) if name != "S5 retrieval"] == ["S0 decode", "S0 pixels", "S4 image"]
    assert first_failing(list(stages.values())) is stages["S0 decode"]
    assert len(stages["S0 pixels"].failures) == 1
    assert f"noise {number}" in stages["S0 pixels"].failures[0]
    # of the second only a hash says that it differs
    assert math.isnan(stages["S0 pixels"].worst) if number else stages["S0 pixels"].worst > 1


def test_another_decoder_is_told_and_judged_from_the_recorded_decoding(
    bundle_folder: Path, tools: Any, vectors: dict[str, Any]
) -> None:
    """As if this machine's JPEG decoder gave a level more here and there."""
    spec, lossy = ImageSpec(size=8), vectors["images"][2]
    recorded = decode_image(bundle_folder / lossy["bytes_file"])
    other = np.clip(recorded.astype(int) + np.random.default_rng(5).integers(-3, 4, recorded.shape), 0, 255)
    other = other.astype(np.uint8)
    pixels = resize_image(other, spec)
    (bundle_folder / "conformance/lossy.bin").write_bytes(other.tobytes())
    (bundle_folder / "conformance/2.bin").write_bytes(pixels.tobytes())
    lossy["decoded"]["sha256"], lossy["pixels_sha256"] = sha256(other), sha256(pixels)
    lossy["embedding"] = tools.expected_image(pixels[None])[0].tolist()
    vectors["retrieval"] |= task(vectors["images"], vectors["texts"])
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == []
    (note,) = stages["S0 decode"].notes
    assert note.startswith("lossy: decoded otherwise, mean 1.")
    lossy["lossy"] = False
    assert failed(check(bundle_folder, tools, vectors))[0] == "S0 decode"


def test_a_lossy_picture_that_is_mirrored_fails(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    with Image.open(bundle_folder / "conformance/2.jpg") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(bundle_folder / "conformance/2.jpg", quality=95)
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S0 decode"]
    assert "more than 8" in stages["S0 decode"].failures[0]


def test_a_picture_of_another_shape_says_so(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    vectors["images"][0]["decoded"]["height"] = 12
    assert "12 x 9 pixels and 12 x 12 are recorded" in check(bundle_folder, tools, vectors)["S0 decode"].failures[0]


def test_what_must_be_refused_and_is_taken(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    vectors["refused_images"][0]["bytes_file"] = "conformance/0.png"
    vectors["refused_texts"][0]["text"] = "red"
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S0 refused", "S1 refused"]
    assert "is taken and must be refused as 'truncated-image': cut" in stages["S0 refused"].failures[0]
    vectors["refused_images"][0] |= {"bytes_file": "conformance/half.png", "reason": "not-an-image"}
    other = check(bundle_folder, tools, vectors)["S0 refused"]
    assert "refused as 'truncated-image' and 'not-an-image' is recorded" in other.failures[0]


def test_another_order_fails_and_a_near_tie_does_not(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    query = vectors["retrieval"]["text_to_image"][0]
    query["order"] = query["order"][::-1]
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S5 retrieval"]
    gap = query["scores"][0] - query["scores"][2]
    assert stages["S5 retrieval"].worst == pytest.approx(gap)
    assert "'a red (text to image)'" in stages["S5 retrieval"].failures[0]
    vectors["retrieval"]["margin"]["fp32"] = gap * 1.01
    assert failed(check(bundle_folder, tools, vectors)) == []
    vectors["retrieval"] = None
    assert "no case" in check(bundle_folder, tools, vectors)["S5 retrieval"].failures[0]


def test_other_ids_and_other_embeddings(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    vectors["texts"][0]["ids"] = [2, 4, 8, 3, 0, 0]
    vectors["images"][0]["embedding"] = [1.0, -1.0, 1.0, -1.0]
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S1 ids", "S3 image graph", "S3 text graph", "S4 image"]
    assert stages["S1 ids"].worst == 1


def test_the_tolerance_decides(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    embedding = np.array(vectors["images"][0]["embedding"])
    turned = embedding + 0.1 * np.array([embedding[1], -embedding[0], 0, 0])  # about 0.005 away
    vectors["images"][0]["embedding"] = turned.tolist()
    assert failed(check(bundle_folder, tools, vectors)) == ["S3 image graph", "S4 image"]
    vectors["tolerance"] = {"fp32": 0.02}
    assert failed(check(bundle_folder, tools, vectors)) == []
    vectors.pop("tolerance")
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S3 image graph", "S4 image"]
    assert stages["S4 image"].budget == 1e-6


def test_it_fails_closed(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    empty = check(bundle_folder, tools, {**vectors, "images": []})
    assert failed(empty) == ["S0 decode", "S0 resize", "S0 pixels", "S3 image graph", "S4 image", "S5 retrieval"]
    assert math.isnan(empty["S0 pixels"].worst)
    first, second = vectors["texts"]
    nan = check(bundle_folder, tools, {**vectors, "texts": [{**first, "embedding": [math.nan] * 4}, second]})
    assert failed(nan) == ["S3 text graph", "S4 text"]
    narrow = check(bundle_folder, tools, {**vectors, "texts": [{**first, "embedding": [1.0, 0.0]}, second]})
    assert failed(narrow) == ["S3 text graph", "S4 text", "S5 retrieval"]
    assert "'a red' has no embedding" in narrow["S5 retrieval"].failures[0]
    vectors["images"][0]["pixels_sha256"] = "0" * 64
    assert failed(check(bundle_folder, tools, vectors)) == ["S0 pixels", "S3 image graph"]


def test_malformed_vectors(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    with pytest.raises(VersionError, match="newer"):
        check(bundle_folder, tools, {**vectors, "schema": "1.2"})
    with pytest.raises(VersionError, match=r"reads 1\.x"):
        check(bundle_folder, tools, {**vectors, "schema": "0.9"})
    with pytest.raises(IntegrityError, match="ids"):
        check(bundle_folder, tools, {**vectors, "texts": [{"name": "red", "text": "red"}]})
    with pytest.raises(IntegrityError, match="refused_images"):
        check(bundle_folder, tools, {key: value for key, value in vectors.items() if key != "refused_images"})
