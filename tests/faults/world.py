"""What the faults are planted in: a student with everything that can go wrong, its reference and its clean bundle.

A convolutional image tower with batch norm; a text tower of two pre-norm blocks with GELU, "eot" pooling, an attention
mask and a padding id that is not 0.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from PIL import Image

from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.prepare import Prepared
from pocketvlm.export.static import static_tower
from pocketvlm.export.targets.onnx import _forget_initializer_shapes, _quantize_static, export_graph, quiet
from pocketvlm.students import build_student, deploy_image, train_tokenizer

PAD = 3
LOUD = 15_000.0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy: Any = load(Path(__file__).parents[1] / "export" / "toy_parity.py")


def tokenizer() -> bytes:
    """The toy's tokenizer with [PAD] and [SEP] in each other's place, so that padding is not 0."""
    texts = [caption.text for sample in toy.toy_data().samples for caption in sample.captions]
    content = json.loads(train_tokenizer([*texts, "picture of the dog and 0123456789"], 200))
    other = {0: PAD, PAD: 0}
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {piece: other.get(index, index) for piece, index in vocab.items()}
    for token in content["added_tokens"]:
        token["id"] = other.get(token["id"], token["id"])
    for token in content["post_processor"]["special_tokens"].values():
        token["ids"] = [other.get(index, index) for index in token["ids"]]
    return json.dumps(content, ensure_ascii=False).encode()


def student(seed: int = 0) -> Any:
    made = build_student(
        "timm:test_efficientnet",
        embed_dim=32,
        tokenizer_json=tokenizer(),
        seed=seed,
        overrides={
            "image.size": 32,
            "text": {"layers": 2, "width": 32, "heads": 2, "context_length": 12, "pool": "eot"},
        },
    ).eval()
    assert made.contract.text.pad_id == PAD
    with torch.no_grad():
        # as training leaves them: attention that attends, activations that reach the curved part of a GELU
        for block in made.text_tower.blocks:
            block.qkv.weight.mul_(2)
            block.fc1.weight.mul_(2)
        # a depthwise layer's channels differ in scale
        for module in made.image_tower.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                scale = torch.linspace(0.8, 1.25, module.num_features)
                order = torch.randperm(module.num_features, generator=torch.Generator().manual_seed(seed))
                module.weight.mul_(scale[order])
        _fit(made, seed)
    return made


def _fit(made: Any, seed: int) -> None:
    """Solve both projections for one random direction per sample: a trained student's rankings, without a training."""
    samples = toy.toy_data().samples
    pixels = np.stack([load_image(sample.image.read(), made.contract.image) for sample in samples])
    ids = Tokenizer(made.tokenizer_json, made.contract.text).encode([sample.captions[0].text for sample in samples])
    target = torch.randn(len(samples), 32, generator=torch.Generator().manual_seed(seed))
    target = torch.nn.functional.normalize(target, dim=-1)
    for tower, rows, weight in ((made.image_tower, pixels, 1.0), (made.text_tower, ids, 0.1)):
        features = tower(torch.from_numpy(rows))[1].double()
        gram = features.T @ features
        ridge = weight * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
        solved = torch.linalg.solve(gram + ridge, features.T @ target.double())
        tower.projection.first.weight.copy_(solved.T)


def calibration(made: Any) -> Any:
    """The toy data's pictures, uint8 [40, S, S, 3]."""
    return np.stack([load_image(sample.image.read(), made.contract.image) for sample in toy.toy_data().samples])


def make_bundle(made: Any, folder: Path) -> Path:
    """The clean bundle: onnx fp32 and int8, without the exporter's search for the best scheme."""
    toy.make_bundle(made, folder)
    static_int8(made, calibration(made), folder / "onnx/image-int8.onnx")
    dynamic_int8(folder / "onnx/text-fp32.onnx", folder / "onnx/text-int8.onnx", per_channel=True)
    toy.sign(folder, variants=[toy.variant(), toy.variant(precision="int8")])
    return folder


def static_int8(made: Any, pixels: Any, out: Path) -> None:
    """The image tower with its convolutions in static int8, their ranges those of `pixels`."""
    with quiet(), tempfile.TemporaryDirectory() as scratch:
        ready = Prepared(deploy_image(made), pixels)
        static = static_tower(ready)
        source = Path(scratch) / "prepared.onnx"
        export_graph(static.graph, ready.fit[:2], "image", source, contract_digest="toy")
        _quantize_static(source, out, ready, "image", static)


def dynamic_int8(full: Path, out: Path, *, per_channel: bool) -> None:
    """The linear layers of a text tower in dynamic int8."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "plain.onnx"
        model = onnx.load(str(full))
        _forget_initializer_shapes(model)
        onnx.save(model, str(source))
        kinds = ["MatMul", "Gemm"]
        with quiet():
            quantize_dynamic(
                str(source), str(out), weight_type=QuantType.QInt8, per_channel=per_channel, op_types_to_quantize=kinds
            )


def many(count: int = 470) -> Any:
    """Pictures enough for 500 rows with the cases: plain colours, each with its own caption."""
    from pocketvlm.data.sample import Caption, ImageRef, Sample
    from pocketvlm.data.source import DataSource

    rng, samples = np.random.default_rng(0), []
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 40)).save(buffer, "PNG")
        caption = Caption(f"a picture of {index:03d}")
        samples.append(Sample(f"many/{index:03d}", ImageRef(data=buffer.getvalue()), (caption,)))
    return DataSource("many", samples, licences=(("random pictures", "CC0-1.0", "pocketvlm's tests"),))


def loud(made: Any) -> Any:
    """The same function by a residual stream so large that float16 cannot hold its peaks."""
    made = copy.deepcopy(made)
    with torch.no_grad():
        tower = made.text_tower
        for value in (
            tower.token.weight,
            tower.position,
            *(p for block in tower.blocks for layer in (block.out, block.fc2) for p in layer.parameters()),
        ):
            value.mul_(LOUD)
    return made
