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

from pocketvlm.edge.conformance import StageResult, check_conformance
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, VersionError
from pocketvlm.edge.preprocess import load_image


@pytest.fixture
def vectors(bundle_folder: Path, tools: Any) -> dict[str, Any]:
    folder = bundle_folder / "conformance"
    folder.mkdir()
    images = []
    for index in range(2):
        picture = np.random.default_rng(index).integers(0, 256, (9, 12, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{index}.png")
        pixels = load_image(folder / f"{index}.png", ImageSpec(size=8))
        (folder / f"{index}.bin").write_bytes(pixels.tobytes())
        images.append(
            {
                "name": f"noise {index}",
                "bytes_file": f"conformance/{index}.png",
                "pixels_file": f"conformance/{index}.bin",
                "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
                "embedding": tools.expected_image(pixels[None])[0].tolist(),
            }
        )
    ids = [2, 4, 7, 3, 0, 0]
    texts = [{"text": "a red", "ids": ids, "embedding": tools.expected_text(np.array([ids]))[0].tolist()}]
    return {"schema": "1.0", "images": images, "texts": texts, "tolerance": {"fp32": 1e-6}}


def check(folder: Path, tools: Any, vectors: dict[str, Any]) -> dict[str, StageResult]:
    (folder / "conformance/vectors.json").write_text(json.dumps(vectors))
    tools.write_manifest(folder, conformance="conformance/vectors.json")
    return {stage.stage: stage for stage in check_conformance(folder, threads=1)}


def failed(stages: dict[str, StageResult]) -> list[str]:
    return [name for name, stage in stages.items() if not stage.passed]


def test_a_right_bundle_passes_every_stage(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    stages = check(bundle_folder, tools, vectors)
    assert list(stages) == ["S0 pixels", "S1 ids", "S3 image graph", "S3 text graph", "S4 image", "S4 text"]
    assert failed(stages) == []
    assert [stage.cases for stage in stages.values()] == [2, 1, 2, 1, 2, 1]
    assert stages["S0 pixels"].worst == 0
    assert stages["S4 image"].worst < 1e-6
    assert stages["S4 image"].budget == 1e-6


def test_other_pixels_fail_where_they_arise(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    picture = np.asarray(Image.open(bundle_folder / "conformance/1.png")).copy()
    picture[:] = 255 - picture
    Image.fromarray(picture).save(bundle_folder / "conformance/1.png")
    stages = check(bundle_folder, tools, vectors)
    assert failed(stages) == ["S0 pixels", "S4 image"]
    assert len(stages["S0 pixels"].failures) == 1
    assert "noise 1" in stages["S0 pixels"].failures[0]
    assert stages["S0 pixels"].worst > 1


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
    assert failed(empty) == ["S0 pixels", "S3 image graph", "S4 image"]
    assert math.isnan(empty["S0 pixels"].worst)
    nan = check(bundle_folder, tools, {**vectors, "texts": [{**vectors["texts"][0], "embedding": [math.nan] * 4}]})
    assert failed(nan) == ["S3 text graph", "S4 text"]
    narrow = check(bundle_folder, tools, {**vectors, "texts": [{**vectors["texts"][0], "embedding": [1.0, 0.0]}]})
    assert failed(narrow) == ["S3 text graph", "S4 text"]
    vectors["images"][0]["pixels_sha256"] = "0" * 64
    assert failed(check(bundle_folder, tools, vectors)) == ["S0 pixels", "S3 image graph"]


def test_malformed_vectors(bundle_folder: Path, tools: Any, vectors: dict[str, Any]) -> None:
    with pytest.raises(VersionError, match="newer"):
        check(bundle_folder, tools, {**vectors, "schema": "1.1"})
    with pytest.raises(IntegrityError, match="ids"):
        check(bundle_folder, tools, {**vectors, "texts": [{"text": "red"}]})
