"""`EdgeModel` on the tiny bundle, whose embeddings can be worked out by hand."""

from __future__ import annotations

import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UnknownNameError, UsageError
from pocketvlm.edge.model import EdgeModel

RED, GREEN, BLUE = (np.full((8, 8, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


@pytest.fixture
def model(bundle_folder: Path) -> EdgeModel:
    return EdgeModel.load(bundle_folder, threads=1)


def test_load(bundle_folder: Path, model: EdgeModel) -> None:
    assert (model.backend.name, model.variant.precision, model.dim) == ("onnxruntime", "fp32", 4)
    assert model.contract.name == "tiny"
    assert EdgeModel.load(Bundle.load(bundle_folder), "onnxruntime", "fp32").contract == model.contract
    assert "onnxruntime fp32" in repr(model)
    with pytest.raises(UnknownNameError, match="int4"):
        EdgeModel.load(bundle_folder, precision="int4")
    with pytest.raises(UnknownNameError, match="executorch"):
        EdgeModel.load(bundle_folder, backend="executorch")
    with pytest.raises(UnknownNameError, match="tensorrt"):
        EdgeModel.load(bundle_folder, backend="tensorrt")  # type: ignore[arg-type]


def test_every_image_source_and_one_or_many(model: EdgeModel, tmp_path: Path, tools: Any) -> None:
    Image.fromarray(RED).save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    expected = tools.expected_image(RED[None])
    for source in (tmp_path / "red.png", str(tmp_path / "red.png"), data, Image.fromarray(RED), RED):
        embedding = model.embed_image(source)
        assert embedding.shape == (1, 4)
        assert embedding.dtype == np.float32
        assert np.allclose(embedding, expected, atol=1e-6)
    many = [RED, GREEN, data, BLUE, Image.fromarray(GREEN)]
    expected = tools.expected_image(np.stack([RED, GREEN, RED, BLUE, GREEN]))
    for batch_size in (1, 2, 32):
        assert np.allclose(model.embed_image(many, batch_size=batch_size), expected, atol=1e-6)
    assert np.allclose(model.embed_image(iter(many)), expected, atol=1e-6)
    assert np.allclose(model.embed_image(np.stack([RED, BLUE])), tools.expected_image(np.stack([RED, BLUE])), atol=1e-6)
    assert np.allclose(model.embed_pixels(np.stack([RED])), expected[:1], atol=1e-6)


def test_images_are_preprocessed_by_the_contract(model: EdgeModel, tools: Any) -> None:
    wide = np.concatenate([np.zeros((16, 16, 3), np.uint8), np.full((16, 32, 3), (0, 0, 255), np.uint8)], axis=1)
    centre = np.zeros((8, 8, 3), np.uint8) + np.array([0, 0, 255], np.uint8)  # the black third is cropped away
    assert np.allclose(model.embed_image(wide), tools.expected_image(centre[None]), atol=0.01)


def test_texts(model: EdgeModel, tools: Any) -> None:
    ids = np.array([[2, 4, 7, 3, 0, 0], [2, 9, 3, 0, 0, 0]], np.int32)
    assert np.allclose(model.embed_text(["a red", "blue"]), tools.expected_text(ids), atol=1e-6)
    assert np.allclose(model.embed_text("blue"), tools.expected_text(ids[1:]), atol=1e-6)
    assert np.allclose(model.embed_ids(ids, batch_size=1), tools.expected_text(ids), atol=1e-6)
    assert model.embed_text([]).shape == (0, 4)
    assert model.embed_image([]).shape == (0, 4)


def test_classify_averages_normalised_prompts(model: EdgeModel, tools: Any) -> None:
    labels, templates = ["red", "green", "blue"], ["a picture of {}", "{}"]
    verdicts = model.classify([BLUE, RED], labels, templates)
    assert [v.label for v in verdicts] == ["blue", "red"]

    def prompt(text: str) -> np.ndarray:
        words = {word: i for i, word in enumerate(tools.WORDS)}
        ids = [2, *(words[w] for w in text.split()), 3]
        return tools.expected_text(np.array([ids + [0] * (6 - len(ids))]))[0]

    # an independent, plain-loop computation of the same definition
    means = []
    for label in labels:
        total = np.zeros(4)
        for template in templates:
            total += prompt(template.format(label))
        means.append(total / len(templates) / np.linalg.norm(total / len(templates)))
    image = tools.expected_image(BLUE[None])[0]
    exponents = [np.exp(20.0 * float(image @ mean)) for mean in means]
    expected = {label: e / sum(exponents) for label, e in zip(labels, exponents)}
    assert list(verdicts[0].scores) == sorted(labels, key=lambda name: -expected[name])
    for label in labels:
        assert verdicts[0].scores[label] == pytest.approx(expected[label], abs=1e-5)
    assert sum(verdicts[0].scores.values()) == pytest.approx(1.0)
    assert verdicts[0].probability == verdicts[0].scores["blue"] == verdicts[0].top(1)[0][1]
    assert len(verdicts[0].top(2)) == 2


def test_classify_edges(model: EdgeModel) -> None:
    assert model.classify(RED, ["red"])[0].probability == 1.0
    assert model.classify([], ["red", "blue"]) == []
    assert model.classify(RED, ["red", "blue"], "{}")[0].label == "red"
    # the default is that of the command line
    assert model.classify(RED, ["red", "blue"]) == model.classify(RED, ["red", "blue"], ("{}",))
    assert np.array_equal(model.embed_labels(["red", "blue"]), model.embed_labels(["red", "blue"], "{}"))
    assert set(model.classify(RED, ["{odd} {}", "red"])[0].scores) == {"{odd} {}", "red"}


@pytest.mark.parametrize(
    ("labels", "templates", "says"),
    [
        ([], ("{}",), "no label"),
        (["red", "blue", "red"], ("{}",), "'red'"),
        ("red", ("{}",), "a list is expected"),
        (["red"], (), "where the label goes"),
        (["red"], ("{}", "a picture"), "where the label goes"),
    ],
)
def test_classify_refuses(model: EdgeModel, labels: Any, templates: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        model.classify(RED, labels, templates)


def test_label_embeddings_are_remembered_a_few_at_a_time(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = model.backend.run_text
    monkeypatch.setattr(model.backend, "run_text", lambda ids: calls.append(len(ids)) or real(ids))
    for _ in range(3):
        model.classify(RED, ["red", "blue"])
    assert calls == [2]
    for index in range(10):
        model.classify(RED, ["red", f"blue {'a ' * index}"])
    model.classify(RED, ["red", "blue"])
    assert len(calls) == 12
    with pytest.raises(ValueError, match="read-only"):
        model.embed_labels(["red", "blue"])[:] = 0


def test_similarity(model: EdgeModel) -> None:
    a = np.array([[3.0, 0, 0, 0], [0, 2.0, 0, 0]])
    assert np.allclose(model.similarity(a, [1, 1, 0, 0]), [[0.5**0.5], [0.5**0.5]])
    assert model.similarity(a[0], a).tolist() == [[1.0, 0.0]]
    assert np.isfinite(model.similarity(np.zeros(4), a)).all()
    with pytest.raises(UsageError, match=r"\(1, 3\)"):
        model.similarity([1, 2, 3], a)


def test_bad_input_is_one_sentence(model: EdgeModel) -> None:
    with pytest.raises(BadSampleError) as caught:
        model.embed_image([RED, b"not a picture"])
    assert caught.value.reason == "not-an-image"
    with pytest.raises(BadSampleError):
        model.embed_text(["red", ""])
    with pytest.raises(UsageError, match="batch_size is 0"):
        model.embed_text("red", batch_size=0)
    with pytest.raises(UsageError, match=r"uint8 \[N, 8, 8, 3\]"):
        model.embed_pixels(np.zeros((1, 9, 9, 3), np.uint8))
    with pytest.raises(UsageError, match=r"int32 \[N, 6\]"):
        model.embed_ids(np.zeros((1, 6), np.int64))


def reload(folder: Path, tools: Any, **changes: Any) -> EdgeModel:
    tools.write_manifest(folder, **changes)
    return EdgeModel.load(folder, threads=1)


def test_models_without_a_tower(bundle_folder: Path, tools: Any) -> None:
    variant = {"target": "onnx", "precision": "fp32", "files": {"image": "onnx/image.onnx"}, "batch": "dynamic"}
    contract = tools.make_contract(kind="image-labels", text=None).to_dict()
    only_image = reload(bundle_folder, tools, variants=[variant], contract=contract, tokenizer=None)
    assert only_image.embed_image(RED).shape == (1, 4)
    with pytest.raises(UsageError, match="no text tower"):
        only_image.embed_text("red")
    lacking = reload(bundle_folder, tools, variants=[variant])
    with pytest.raises(UsageError, match="no text tower"):
        lacking.embed_text("red")
    with pytest.raises(IntegrityError, match="names no tokenizer"):
        reload(bundle_folder, tools, tokenizer=None)
    with pytest.raises(UsageError, match="'generative'"):
        reload(bundle_folder, tools, contract=tools.make_contract(bundle_folder, kind="generative").to_dict())


def test_a_classifier_has_its_own_labels(bundle_folder: Path, tools: Any, model: EdgeModel) -> None:
    labels = ("red", "green", "blue", "none of these")
    variant = {"target": "onnx", "precision": "fp32", "files": {"image": "onnx/image.onnx"}, "batch": "dynamic"}
    contract = tools.make_contract(kind="classifier", text=None, labels=labels, normalized=False).to_dict()
    classifier = reload(bundle_folder, tools, variants=[variant], contract=contract, tokenizer=None)
    logits = classifier.backend.run_image(classifier_pixels := np.full((1, 8, 8, 3), (250, 10, 10), np.uint8))
    classifier.backend.run_image = lambda pixels: 3 * logits  # type: ignore[method-assign]
    assert np.array_equal(classifier.embed_pixels(classifier_pixels), 3 * logits), "logits stay as they are"
    found = classifier.classify(RED)[0]
    shares = np.exp(3 * logits[0].astype(np.float64))
    shares /= shares.sum()
    assert [found.scores[label] for label in labels] == pytest.approx(shares.tolist())
    assert found.label == labels[int(shares.argmax())]
    with pytest.raises(UsageError, match="was trained for its own labels"):
        classifier.classify(RED, ["red", "blue"])
    with pytest.raises(UsageError, match="has no labels of its own"):
        model.classify(RED)


def test_width_mismatch_and_unnormalised_graphs(bundle_folder: Path, tools: Any, model: EdgeModel) -> None:
    contract = tools.make_contract(bundle_folder, embed_dim=5, dims=(5,)).to_dict()
    with pytest.raises(IntegrityError, match="promises width 5"):
        reload(bundle_folder, tools, contract=contract).embed_image(RED)
    loose = reload(bundle_folder, tools, contract=tools.make_contract(bundle_folder, normalized=False).to_dict())
    real = loose.backend.run_image
    loose.backend.run_image = lambda pixels: 3 * real(pixels)  # type: ignore[method-assign]
    assert np.linalg.norm(loose.embed_image(RED)) == pytest.approx(1.0)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_promised_prefixes_are_cut_and_normalised_again(bundle_folder: Path, tools: Any, model: EdgeModel) -> None:
    tools.write_manifest(bundle_folder, contract=tools.make_contract(bundle_folder, dims=(2, 3, 4)).to_dict())
    mixed = [RED // 2 + GREEN // 3, BLUE // 2 + GREEN // 5 + RED // 7]
    for dim in (2, 3, 4, None):
        cut = EdgeModel.load(bundle_folder, threads=1, dim=dim)
        width = dim or 4
        assert (cut.dim, cut.graph_dim, cut.embed_image([]).shape) == (width, 4, (0, width))
        np.testing.assert_allclose(cut.embed_image(mixed), unit(model.embed_image(mixed)[:, :width]), atol=1e-6)
        np.testing.assert_allclose(cut.embed_text("red"), unit(model.embed_text("red")[:, :width]), atol=1e-6)
        assert cut.embed_labels(["red", "blue"]).shape == (2, width)
        assert set(cut.classify(RED, ["red", "blue"])[0].scores) == {"red", "blue"}
    with pytest.raises(UsageError, match="equal widths"):
        cut.similarity(cut.embed_text("red"), EdgeModel.load(bundle_folder, threads=1, dim=2).embed_text("red"))


def test_other_prefixes_are_refused_with_the_nearest(bundle_folder: Path, tools: Any) -> None:
    with pytest.raises(UsageError, match=r"width 3 .* gives \[4\].*take 4"):
        EdgeModel.load(bundle_folder, threads=1, dim=3)
    contract = tools.make_contract(bundle_folder, dims=(2, 4)).to_dict()
    tools.write_manifest(bundle_folder, contract=contract)
    for dim in (0, -2, 3, 5):
        with pytest.raises(UsageError, match=r"gives \[2, 4\].*take 2 or 4"):
            EdgeModel.load(bundle_folder, threads=1, dim=dim)


def test_a_file_of_the_width_is_taken_before_a_cut(bundle_folder: Path, tools: Any) -> None:
    """A narrower file may hold a model of its own; a wider prefix than a file gives does not exist."""
    first = json.loads((bundle_folder / "bundle.json").read_text())["variants"][0]
    contract = tools.make_contract(bundle_folder, dims=(2, 3, 4)).to_dict()
    tools.write_manifest(bundle_folder, contract=contract, variants=[first, {**first, "dim": 2}])
    assert [EdgeModel.load(bundle_folder, threads=1, dim=dim).variant.dim for dim in (2, 3, 4)] == [2, None, None]
    tools.write_manifest(bundle_folder, contract=contract, variants=[{**first, "dim": 2}])
    with pytest.raises(UsageError, match=r"gives \[2\]"):
        EdgeModel.load(bundle_folder, threads=1, dim=3)


def test_nan_is_not_passed_on(model: EdgeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.backend, "run_image", lambda pixels: np.full((len(pixels), 4), np.nan, np.float32))
    with pytest.raises(IntegrityError, match="NaN"):
        model.embed_image(RED)


def test_auto_takes_what_can_run_here(bundle_folder: Path, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketvlm.edge.model import _pick_target

    def pick(*targets: str) -> str:
        first = json.loads((bundle_folder / "bundle.json").read_text())["variants"][0]
        tools.write_manifest(bundle_folder, variants=[{**first, "target": target} for target in targets])
        return _pick_target(Bundle.load(bundle_folder))

    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert pick("coreml", "executorch", "onnx") == "onnx"
    assert pick("coreml", "executorch") == "executorch"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert pick("coreml", "executorch") == "executorch"  # opening it names the missing extra
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert pick("coreml", "executorch") == "coreml"
    with pytest.raises(UsageError, match="tflite"):
        pick("tflite")


def test_a_text_of_a_megabyte_is_cut_like_any_other(model: EdgeModel) -> None:
    long = "a red picture of " * 60_000
    assert len(long) > 1_000_000
    assert np.array_equal(model.embed_text(long), model.embed_text("a red picture of a red picture"))
    assert np.isfinite(model.embed_text("x" * 1_000_000)).all()


def test_threads_share_a_model(model: EdgeModel) -> None:
    pictures = [RED, GREEN, BLUE]
    expected = [v.label for v in model.classify(pictures, ["red", "green", "blue"])]

    def work(index: int) -> list[str]:
        labels = ["red", "green", "blue"] if index % 2 else ["blue", "green", "red", f"a {'a ' * (index % 20)}"]
        return [v.label for v in model.classify(pictures, labels)]

    assert expected == ["red", "green", "blue"]
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(work, range(60)))
