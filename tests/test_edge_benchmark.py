"""docs/edge.md quotes what `benchmarks.edge` wrote, and its floors are judged as the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from benchmarks import edge
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.preprocess import load_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/edge.json").read_text())


def test_the_page_is_the_committed_result(result: dict[str, Any]) -> None:
    page = (ROOT / "docs/edge.md").read_text()
    assert f"<!-- edge:begin -->\n{edge.table(result)}<!-- edge:end -->" in page
    flood = json.loads((ROOT / "benchmarks/results/edge_flood.json").read_text())
    assert flood["connections"] == sum(flood["answers"].values()) == 10_000
    for number in (flood["answers"]["200"], flood["answers"]["429"], flood["peak_mib"]):
        assert f"{number:,}" in page
    assert (flood["tracebacks"], flood["after"]["status"]) == (0, "ok")


def test_the_floors_that_the_page_claims(result: dict[str, Any]) -> None:
    assert result["agreement"]["fp32"]["same_top5_in_order"] == 1
    assert min(result["agreement"]["fp32"]["cosine_least"].values()) >= 0.9999
    for precision in ("int8", "fp32"):
        assert result["overhead"][precision]["embed_pixels over session.run"] <= 1.05
        assert result["overhead"][precision]["embed_image without decode, resize and run, in session.run"] <= 0.05
    for name in ("224 px", "photograph"):
        assert result["beside_fastembed"]["int8"][name]["processor"]["ratio"]["median"] >= 1.2
        assert result["beside_open_clip"][edge.OPEN_CLIP][name]["processor"]["ratio"]["median"] >= 1.2


def test_fastembed_is_given_the_same_graph(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("edge_toys", ROOT / "tests/export/toy_export.py")
    assert spec
    assert spec.loader
    toys = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toys)
    from pocketvlm.export.bundle import export_bundle
    from pocketvlm.export.source import Exportable
    from pocketvlm.students import train_tokenizer

    model = Exportable(toys.toy_towers(), train_tokenizer(["a picture of a dog"] * 3, 300))
    bundle = Bundle.load(export_bundle(model, tmp_path / "bundle", ["onnx"], ["fp32"]))
    folder = edge.fastembed_folder(bundle, "fp32", tmp_path / "fastembed")
    ours = onnxruntime.InferenceSession(str(bundle.path(bundle.variants[0].files["image"])))
    theirs = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert bundle.contract.image is not None
    pixels = load_image(np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8), bundle.contract.image)
    image = bundle.contract.image
    planes = ((pixels / 255 - image.mean) / image.std).transpose(2, 0, 1)[None].astype(np.float32)
    (expected,) = ours.run(None, {"pixels": pixels[None]})
    (found,) = theirs.run(None, {"pixel_values": planes})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [entry.name for entry in theirs.get_inputs()] == ["pixel_values"]
