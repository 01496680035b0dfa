"""A bundle small enough to check by hand: mean colour and mean word vector, both projected to 4 dimensions."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from pocketvlm.edge.bundle import describe_files, sha256_file
from pocketvlm.edge.contract import ImageSpec, ModelContract, TextSpec

SIZE, LENGTH, DIM = 8, 6, 4
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "picture", "of", "red", "green", "blue"]
_rng = np.random.default_rng(7)
IMAGE_WEIGHT = np.concatenate([np.eye(3), _rng.normal(0, 0.2, (3, 1))], axis=1).astype(np.float32)
TEXT_TABLE = _rng.normal(0, 0.1, (len(WORDS), DIM)).astype(np.float32)
TEXT_TABLE[7:10] = IMAGE_WEIGHT * 3  # colour words point where their colours do


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected_image(pixels: np.ndarray) -> np.ndarray:
    """What the tiny image graph computes, in float64: [B, S, S, 3] -> [B, 4]."""
    return unit((pixels.astype(np.float64) / 255).mean(axis=(1, 2)) @ IMAGE_WEIGHT.astype(np.float64))


def expected_text(ids: np.ndarray) -> np.ndarray:
    return unit(TEXT_TABLE.astype(np.float64)[ids].mean(axis=1))


def png(rows: np.ndarray, bit_depth: int, color_type: int, chunks: bytes = b"", interlace: int = 0) -> bytes:
    """A PNG written by hand, so that Pillow's writer is not its own judge; `rows` is uint8 or uint16 [H, W, C]."""
    height, width = rows.shape[:2]
    body = b"".join(b"\0" + row.astype(f">u{bit_depth // 8}").tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, interlace)
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), chunks, chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def tokenizer_json() -> str:
    built = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    return built.to_str()


def _graph(
    nodes: list[Any], name: str, kind: int, shape: list[Any], constants: dict[str, np.ndarray], path: Path
) -> None:
    nodes = [
        *nodes,
        helper.make_node("ReduceL2", ["raw", "last"], ["norm"], keepdims=1),
        helper.make_node("Div", ["raw", "norm"], ["embedding"]),
    ]
    constants = {**constants, "last": np.array([1], np.int64)}
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [shape[0], DIM])],
        [numpy_helper.from_array(value, key) for key, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    save_model(model, str(path))


def write_image_graph(path: Path, batch: str | int = "batch", name: str = "pixels") -> None:
    nodes = [
        helper.make_node("Cast", [name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "full"], ["unit"]),
        helper.make_node("ReduceMean", ["unit", "space"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], ["raw"]),
    ]
    constants = {"full": np.float32(255), "space": np.array([1, 2], np.int64), "weight": IMAGE_WEIGHT}
    constants["full"] = np.array(255, np.float32)
    _graph(nodes, name, TensorProto.UINT8, [batch, SIZE, SIZE, 3], constants, path)


def write_text_graph(path: Path, batch: str | int = "batch") -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["words"]),
        helper.make_node("ReduceMean", ["words", "time"], ["raw"], keepdims=0),
    ]
    constants = {"table": TEXT_TABLE, "time": np.array([1], np.int64)}
    _graph(nodes, "ids", TensorProto.INT32, [batch, LENGTH], constants, path)


def make_contract(folder: Path | None = None, **changes: Any) -> ModelContract:
    values: dict[str, Any] = {
        "kind": "dual",
        "name": "tiny",
        "model_id": "tiny-0",
        "space_id": "tiny-0",
        "embed_dim": DIM,
        "dims": (DIM,),
        "image": ImageSpec(size=SIZE),
        "text": TextSpec(
            context_length=LENGTH,
            vocab_size=len(WORDS),
            tokenizer_sha256=sha256_file(folder / "tokenizer.json") if folder else "",
        ),
        "logit_scale": 20.0,
    }
    return ModelContract(**{**values, **changes})


def write_manifest(folder: Path, **changes: Any) -> None:
    """bundle.json over whatever lies in `folder`; None removes a key."""
    raw: dict[str, Any] = {
        "schema_version": "1.0",
        "kit_version": "0.1.0",
        "created": "2026-11-20T00:00:00Z",
        "contract": make_contract(folder).to_dict(),
        "variants": [
            {
                "target": "onnx",
                "precision": "fp32",
                "dim": None,
                "files": {"image": "onnx/image.onnx", "text": "onnx/text.onnx"},
                "batch": "dynamic",
                "notes": {},
            }
        ],
        "files": describe_files(folder),
        "tokenizer": "tokenizer.json",
        "provenance": {"command": "by hand"},
        "parity": [{"target": "onnx", "precision": "fp32", "status": "passed"}],
        "licences": [{"what": "pictures", "licence": "CC0-1.0", "attribution": "nobody", "url": None}],
    }
    raw.update(changes)
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "bundle.json").write_text(json.dumps(raw))


def write_bundle(folder: Path, batch: str | int = "batch") -> Path:
    (folder / "onnx").mkdir(parents=True)
    write_image_graph(folder / "onnx/image.onnx", batch)
    write_text_graph(folder / "onnx/text.onnx", batch)
    (folder / "tokenizer.json").write_text(tokenizer_json())
    write_manifest(folder)
    return folder


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def tools() -> Any:
    """The helpers of this file, which test files cannot import under pytest's importlib mode."""
    import types

    return types.SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("__")})
