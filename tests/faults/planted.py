"""The faults, one function each. Each takes the folder of a clean bundle and breaks one thing in it, or in the code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pocketvlm.export.reference_run import load_reference, sha256


@dataclass
class Scene:
    """Where a fault is planted. world: the module; bundle: a copy of the clean one; reference: it may be replaced."""

    world: Any
    student: Any
    bundle: Path
    reference: Path
    patch: pytest.MonkeyPatch
    scratch: Path
    recorded: dict[str, Path] = field(default_factory=dict)

    def onnx(self, tower: str, precision: str = "fp32") -> Path:
        return self.bundle / f"onnx/{tower}-{precision}.onnx"

    def sign(self, **fields: Any) -> None:
        self.world.toy.sign(self.bundle, **fields)

    def contract(self, change: Callable[[dict[str, Any]], None]) -> None:
        contract = json.loads((self.bundle / "bundle.json").read_text())["contract"]
        change(contract)
        self.sign(contract=contract)

    def edit(self, tower: str, change: Callable[[Any], None]) -> None:
        model = onnx.load(str(self.onnx(tower)))
        change(model.graph)
        onnx.save(model, str(self.onnx(tower)))
        self.sign()


def _initializer(graph: Any, name: str) -> Any:
    (found,) = [entry for entry in graph.initializer if entry.name == name]
    return found


def _set(graph: Any, name: str, value: Any) -> None:
    _initializer(graph, name).CopyFrom(numpy_helper.from_array(np.asarray(value, np.float32), name))


def _constant(graph: Any, name: str, value: Any) -> str:
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return name


def _nodes(graph: Any, kind: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == kind]


# --- S0 -------------------------------------------------------------------------------------------------------------


def resize_without_antialias(scene: Scene) -> None:
    from pocketvlm.edge import preprocess

    def plain(image: Any, spec: Any) -> Any:
        # what OpenCV's and a GPU's bilinear do: four pixels, whatever the scale
        height, width = image.shape[:2]
        scale = spec.size / min(height, width)
        size = (max(spec.size, round(width * scale)), max(spec.size, round(height * scale)))
        rows = np.clip(((np.arange(size[1]) + 0.5) / scale - 0.5).round().astype(int), 0, height - 1)
        columns = np.clip(((np.arange(size[0]) + 0.5) / scale - 0.5).round().astype(int), 0, width - 1)
        top, left = (size[1] - spec.size) // 2, (size[0] - spec.size) // 2
        found = image[rows][:, columns][top : top + spec.size, left : left + spec.size]
        return np.ascontiguousarray(found)

    scene.patch.setattr(preprocess, "resize_image", plain)


def channels_as_bgr(scene: Scene) -> None:
    from pocketvlm.edge import preprocess

    honest = preprocess._decode
    scene.patch.setattr(
        preprocess, "_decode", lambda *given: np.ascontiguousarray(np.asarray(honest(*given))[..., ::-1])
    )


def exif_rotation_ignored(scene: Scene) -> None:
    from pocketvlm.edge import preprocess

    scene.patch.setattr(preprocess, "_orientation", lambda image: 1)


# --- S1 -------------------------------------------------------------------------------------------------------------


def padding_is_0(scene: Scene) -> None:
    scene.contract(lambda contract: contract["text"].update(pad_id=0))


def text_is_not_truncated(scene: Scene) -> None:
    from pocketvlm.edge.tokenizer import Tokenizer

    class Untruncated(Tokenizer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._padded.no_truncation()

    from pocketvlm.export import parity_stages

    scene.patch.setattr(parity_stages, "Tokenizer", Untruncated)


def closing_token_is_cut(scene: Scene) -> None:
    from pocketvlm.edge.tokenizer import Tokenizer
    from pocketvlm.export import parity_stages

    class Cut(Tokenizer):
        def encode(self, texts: Any) -> Any:
            self._padded.enable_truncation(max_length=200)
            self._padded.enable_padding(pad_id=self.spec.pad_id, length=200)
            return super().encode(texts)[:, : self.spec.context_length]

    scene.patch.setattr(parity_stages, "Tokenizer", Cut)


# --- S2 -------------------------------------------------------------------------------------------------------------


def mean_and_std_of_another_family(scene: Scene) -> None:
    def change(graph: Any) -> None:
        # OpenAI CLIP's in place of the backbone's own
        _set(graph, "tower.shift", np.reshape([0.48145466, 0.4578275, 0.40821073], (3, 1, 1)) * 255)
        _set(graph, "tower.spread", np.reshape([0.26862954, 0.26130258, 0.27577711], (3, 1, 1)) * 255)

    scene.edit("image", change)


def eot_from_the_last_position(scene: Scene) -> None:
    def change(graph: Any) -> None:
        (node,) = [n for n in graph.node if n.op_type == "Equal" and "ids" not in n.input]
        last = scene.student.contract.text.context_length - 1
        node.input[1] = _constant(graph, "last", [[float(last)]])

    scene.edit("text", change)


def mask_forgotten(scene: Scene) -> None:
    def change(graph: Any) -> None:
        (softmaxed, *_) = _nodes(graph, "Softmax")
        (sum_,) = [n for n in graph.node if softmaxed.input[0] in n.output]
        bias = sum_.input[1]
        (product,) = [n for n in graph.node if bias in n.output]
        product.input[1] = _constant(graph, "no_mask", 0.0)

    scene.edit("text", change)


def gelu_by_tanh(scene: Scene) -> None:
    def change(graph: Any) -> None:
        third, slope = _constant(graph, "third", 2 * 0.044715), _constant(graph, "slope", (4 / np.pi) ** 0.5)
        for count, node in enumerate(_nodes(graph, "Erf")):
            # erf(z) with z = x / sqrt(2) becomes tanh(sqrt(2 / pi) (x + 0.044715 x^3))
            z, out = node.input[0], node.output[0]
            names = [f"tanh_{count}_{step}" for step in range(4)]
            place = list(graph.node).index(node)
            graph.node.remove(node)
            nodes = [
                helper.make_node("Mul", [z, z], [names[0]]),
                helper.make_node("Mul", [names[0], z], [names[1]]),
                helper.make_node("Mul", [names[1], third], [names[2]]),
                helper.make_node("Add", [z, names[2]], [names[3]]),
                helper.make_node("Mul", [names[3], slope], [f"{names[3]}_scaled"]),
                helper.make_node("Tanh", [f"{names[3]}_scaled"], [out]),
            ]
            for made in reversed(nodes):
                graph.node.insert(place, made)

    scene.edit("text", change)


def layer_norm_epsilon(scene: Scene) -> None:
    def change(graph: Any) -> None:
        for node in _nodes(graph, "LayerNormalization"):
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    # the 1e-12 of BERT for the 1e-5 of torch
                    attribute.f = 1e-12

    scene.edit("text", change)


def stale_weight(scene: Scene) -> None:
    def change(graph: Any) -> None:
        (gelu, *_) = [n for n in graph.node if n.op_type == "Mul" and n.output[0].startswith("gelu")]
        (product,) = [n for n in graph.node if n.op_type == "MatMul" and gelu.output[0] in n.input]
        entry = _initializer(graph, product.input[1])
        value = numpy_helper.to_array(entry)
        # late in a training: an AdamW step of 1e-4 for every number
        step = 1e-4 * np.sign(np.random.default_rng(0).standard_normal(value.shape))
        entry.CopyFrom(numpy_helper.from_array((value - step).astype(np.float32), entry.name))

    scene.edit("text", change)


def not_normalised(scene: Scene) -> None:
    def change(graph: Any) -> None:
        (node,) = [n for n in graph.node if "embedding" in n.output]
        del node.input[1:]
        node.input.append(_constant(graph, "half", 0.5))

    scene.edit("text", change)


NAN_ROW = 317


def nan_in_one_of_500(scene: Scene) -> None:
    scene.reference = scene.recorded["500"]
    pixels = load_reference(scene.reference).task.pixels.astype(np.float64)
    sums = pixels.sum(axis=(1, 2, 3))
    assert (sums == sums[NAN_ROW]).sum() == 1

    def change(graph: Any) -> None:
        for node in graph.node:
            for index, name in enumerate(node.output):
                if name == "embedding":
                    node.output[index] = "honest"
        _constant(graph, "chosen", float(sums[NAN_ROW]))
        _constant(graph, "nan", np.nan)
        _constant(graph, "zero", 0.0)
        graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "planes"))
        graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "column"))
        graph.node.extend([
            helper.make_node("Cast", ["pixels"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["wide", "planes"], ["sum"], keepdims=0),
            helper.make_node("Equal", ["sum", "chosen"], ["hit"]),
            helper.make_node("Where", ["hit", "nan", "zero"], ["poison"]),
            helper.make_node("Unsqueeze", ["poison", "column"], ["poisons"]),
            helper.make_node("Add", ["honest", "poisons"], ["embedding"]),
        ])  # fmt: skip

    scene.edit("image", change)


# --- S3 -------------------------------------------------------------------------------------------------------------


def absorbed_overflow(scene: Scene) -> None:
    """A residual stream beyond 65504 saturates in float16, and the LayerNorm after it answers in ordinary numbers."""
    scene.reference = scene.recorded["loud"]
    shutil.rmtree(scene.bundle)
    shutil.copytree(scene.recorded["loud-bundle"], scene.bundle)

    def saturate(graph: Any) -> None:
        low, high = _constant(graph, "low", -65504.0), _constant(graph, "high", 65504.0)
        for count, norm in enumerate(_nodes(graph, "LayerNormalization")):
            value = f"saturated_{count}"
            place = list(graph.node).index(norm)
            graph.node.insert(place, helper.make_node("Clip", [norm.input[0], low, high], [value]))
            norm.input[0] = value

    shutil.copy(scene.onnx("image"), scene.onnx("image", "fp16"))
    shutil.copy(scene.onnx("text"), scene.onnx("text", "fp16"))
    model = onnx.load(str(scene.onnx("text", "fp16")))
    saturate(model.graph)
    onnx.save(model, str(scene.onnx("text", "fp16")))
    toy = scene.world.toy
    scene.sign(variants=[toy.variant(), toy.variant(precision="fp16")])


def scale_per_tensor(scene: Scene) -> None:
    scene.world.dynamic_int8(scene.onnx("text"), scene.onnx("text", "int8"), per_channel=False)
    scene.sign()


def left_in_float(scene: Scene) -> None:
    """A converter that could not quantize and said nothing: every number is perfect, and nothing is smaller."""
    shutil.copy(scene.onnx("text"), scene.onnx("text", "int8"))
    scene.sign()


def calibrated_on_noise(scene: Scene) -> None:
    size = scene.student.contract.image.size
    # a generator's floats in 0..1, taken for pixels: the classic stand-in for data
    noise = np.random.default_rng(0).uniform(0, 1, (40, size, size, 3)).round().astype(np.uint8)
    scene.world.static_int8(scene.student, noise, scene.onnx("image", "int8"))
    scene.sign()


def int8_rows_out_of_order(scene: Scene) -> None:
    """The scales of one weight belong to other channels: what a transposed table of scales looks like."""
    path = scene.onnx("text", "int8")
    model = onnx.load(str(path))
    scales = [e for e in model.graph.initializer if e.name.endswith("_scale") and list(e.dims)[:1] == [128]]
    value = numpy_helper.to_array(scales[0])
    scales[0].CopyFrom(numpy_helper.from_array(np.roll(value, 64), scales[0].name))
    onnx.save(model, str(path))
    scene.sign()


# --- S4 -------------------------------------------------------------------------------------------------------------


def runtime_that_mixes_up_a_batch(scene: Scene) -> None:
    from pocketvlm.edge.model import EdgeModel

    honest = EdgeModel._checked

    def mixed(self: Any, embeddings: Any, count: int) -> Any:
        found = honest(self, embeddings, count)
        return np.roll(found, 1, axis=0) if len(found) > 1 else found

    scene.patch.setattr(EdgeModel, "_checked", mixed)


def logits_without_exp(scene: Scene) -> None:
    """The application's own arithmetic takes the stored logarithm for the scale."""
    from dataclasses import replace

    from pocketvlm.edge.model import EdgeModel

    honest = EdgeModel.__init__

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        honest(self, *args, **kwargs)
        self.contract = replace(self.contract, logit_scale=float(np.log(self.contract.logit_scale)))

    scene.patch.setattr(EdgeModel, "__init__", begin)


# --- before any graph runs ------------------------------------------------------------------------------------------


def logit_scale_without_exp(scene: Scene) -> None:
    scene.contract(lambda contract: contract.update(logit_scale=float(np.log(contract["logit_scale"]))))


def artifact_swapped_after_export(scene: Scene) -> None:
    # a valid graph of the right shape, of a model with other weights
    model = onnx.load(str(scene.onnx("image")))
    (weight, *_) = [w for w in model.graph.initializer if len(w.dims) == 4]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(model, str(scene.onnx("image")))


def empty_case_set(scene: Scene) -> None:
    folder = Path(shutil.copytree(scene.reference, scene.scratch / "empty"))
    scene.reference = folder
    data = json.dumps({"images": [], "texts": []}).encode()
    (folder / "cases/cases.json").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["cases/cases.json"] = {"sha256": sha256(data), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
