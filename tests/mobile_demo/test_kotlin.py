"""The Kotlin core, compiled and run: the same ids and pixels as Python, and the stage of a planted fault."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pocketvlm.edge.bundle import Bundle, describe_files, sha256_file
from pocketvlm.edge.conformance import check_conformance, first_failing
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.edge.tokenizer import Tokenizer

pytestmark = pytest.mark.kotlin


def verdict(kotlin: Any, bundle: Path, *options: str) -> tuple[int, str]:
    result = kotlin.kotlin(kotlin.classes, "conformance", bundle, *options)
    assert result.returncode in (0, 1, 3), result.stderr
    return result.returncode, result.stdout.strip().splitlines()[-1]


def test_a_bundle_passes_every_stage(kotlin: Any, exported: Path) -> None:
    result = kotlin.kotlin(kotlin.classes, "conformance", exported, *kotlin.encoder(exported, "onnxruntime", "fp32"))
    assert result.stdout.splitlines()[-1] == "pass", result.stdout + result.stderr
    assert result.returncode == 0
    stages = [line.split(":")[0] for line in result.stdout.splitlines() if ": passes, " in line]
    assert stages == [stage.stage for stage in check_conformance(exported)]  # Python's runner has the same


# --- planted faults: both runners name the same stage ---------------------------------------------------------------


def _ids(folder: Path, vectors: dict[str, Any]) -> None:
    vectors["texts"][3]["ids"][1] += 1


def _pixels(folder: Path, vectors: dict[str, Any]) -> None:
    case = next(case for case in vectors["images"] if "pixels_file" in case and not case["lossy"])
    file = folder / case["pixels_file"]
    file.write_bytes(bytes([file.read_bytes()[0] ^ 9]) + file.read_bytes()[1:])
    case["pixels_sha256"] = sha256_file(file)


def _decoded(folder: Path, vectors: dict[str, Any]) -> None:
    next(case for case in vectors["images"] if not case["lossy"])["decoded"]["sha256"] = "0" * 64


def _orientation(folder: Path, vectors: dict[str, Any]) -> None:
    case = next(case for case in vectors["images"] if case["name"] == "exif-6")
    with Image.open(folder / case["bytes_file"]) as image:
        image.save(folder / case["bytes_file"], "JPEG", quality=95)  # the tag is gone


def _taken(folder: Path, vectors: dict[str, Any]) -> None:
    shutil.copy(folder / vectors["images"][0]["bytes_file"], folder / vectors["refused_images"][0]["bytes_file"])


def _text_taken(folder: Path, vectors: dict[str, Any]) -> None:
    vectors["refused_texts"][0]["text"] = "a word"


def _no_text(folder: Path, vectors: dict[str, Any]) -> None:
    vectors["texts"] = []


def _text_embedding(folder: Path, vectors: dict[str, Any]) -> None:
    row = vectors["texts"][0]["embedding"]
    row.append(row.pop(0))


def _ranking(folder: Path, vectors: dict[str, Any]) -> None:
    for query in vectors["retrieval"]["text_to_image"]:
        query["scores"] = [score * 50 for score in reversed(query["scores"])]


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        (_decoded, "S0 decode"),
        (_orientation, "S0 decode"),
        (_pixels, "S0 pixels"),
        (_taken, "S0 refused"),
        (_ids, "S1 ids"),
        (_no_text, "S1 ids"),
        (_text_taken, "S1 refused"),
        (_text_embedding, "S3 text graph"),
        (_ranking, "S5 retrieval"),
    ],
)
def test_a_planted_fault_is_found_at_its_stage(
    kotlin: Any, exported: Path, tmp_path: Path, fault: Callable[[Path, dict[str, Any]], None], stage: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(exported, bundle)
    vectors = json.loads((bundle / "conformance/vectors.json").read_text())
    fault(bundle, vectors)
    (bundle / "conformance/vectors.json").write_text(json.dumps(vectors))
    _sign(bundle)
    options = kotlin.encoder(bundle, "onnxruntime", "fp32") if stage >= "S3" else ()
    code, told = verdict(kotlin, bundle, *options)
    assert (code, told.partition(":")[0]) == (1, f"fails at {stage}"), told
    python = first_failing(check_conformance(bundle))
    assert python is not None
    assert python.stage == stage


def _sign(bundle: Path) -> None:
    raw = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**raw, "files": describe_files(bundle)}))


def test_a_format_without_a_decoder_is_no_pass(kotlin: Any, exported: Path, tmp_path: Path) -> None:
    bundle = _pictures(exported, tmp_path / "bundle", {"photo": _encode("WEBP", lossless=True)}, ImageSpec(size=16))
    code, told = verdict(kotlin, bundle)
    assert (code, told) == (3, "incomplete: passes what ran; not run: photo (no decoder for WebP here)")


def test_a_changed_file_is_refused(kotlin: Any, exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "bundle")
    (tmp_path / "bundle/onnx/text-fp32.onnx").write_bytes(b"another model")
    result = kotlin.kotlin(kotlin.classes, "conformance", tmp_path / "bundle")
    assert result.returncode == 2
    assert "onnx/text-fp32.onnx is missing or changed" in result.stderr
    result = kotlin.kotlin(kotlin.classes, "conformance", tmp_path)
    assert "there is no bundle in" in result.stderr


# --- pixels ---------------------------------------------------------------------------------------------------------


def _encode(format: str, mode: str = "RGB", **options: Any) -> bytes:
    rng = np.random.default_rng(3)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (37, 53, channels), np.uint8)
    file = BytesIO()
    Image.fromarray(values.squeeze(), mode).save(file, format, **options)
    return file.getvalue()


def _pngs(toys: Any) -> dict[str, bytes]:
    """PNG of every colour type and depth, with transparency by channel, palette and colour, turned, and interlaced."""
    rng = np.random.default_rng(4)

    def deep(channels: int) -> np.ndarray:
        return rng.integers(0, 65536, (21, 34, channels), np.uint16)

    exif = Image.Exif()
    exif[0x0112] = 7
    palette = Image.open(BytesIO(_encode("PNG"))).quantize(13)
    found = {mode: _encode("PNG", mode) for mode in ("L", "LA", "RGB", "RGBA")}
    found |= {
        f"{channels} deep": toys.png(deep(channels), 16, kind) for channels, kind in ((1, 0), (3, 2), (2, 4), (4, 6))
    }
    key = deep(3)
    found["keyed"] = toys.png(key, 16, 2, toys.chunk(b"tRNS", key[5, 6].astype(">u2").tobytes()))
    found["turned"] = _encode("PNG", exif=exif)
    for name, image, options in (
        ("bits", Image.open(BytesIO(found["L"])).convert("1"), {}),
        ("palette", palette, {}),
        ("see-through palette", palette, {"transparency": bytes([0, 90, 255, 17])}),
        ("gray key", Image.open(BytesIO(found["L"])), {"transparency": 7}),
    ):
        file = BytesIO()
        image.save(file, "PNG", **options)
        found[name] = file.getvalue()
    return found


def _pictures(exported: Path, folder: Path, pictures: dict[str, bytes], spec: ImageSpec) -> Path:
    """The exported bundle under another image contract, whose vectors are these pictures by Python's preprocessing."""
    shutil.copytree(exported, folder)
    raw = json.loads((folder / "bundle.json").read_text())
    vectors = json.loads((folder / "conformance/vectors.json").read_text())
    raw["contract"]["image"] = json.loads(json.dumps(vars(spec)))
    vectors["images"] = []
    for index, (name, data) in enumerate(pictures.items()):
        (folder / f"conformance/{index}.bin").write_bytes(data)
        decoded = decode_image(data, background=spec.background)
        pixels = resize_image(decoded, spec)
        (folder / f"conformance/{index}.rgb").write_bytes(pixels.tobytes())
        vectors["images"].append(
            {
                "name": name,
                "bytes_file": f"conformance/{index}.bin",
                "lossy": False,
                "decoded": {"height": len(decoded), "width": decoded.shape[1], "sha256": _sha(decoded)},
                "pixels_file": f"conformance/{index}.rgb",
                "pixels_sha256": _sha(pixels),
                "embedding": [1.0],
            }
        )
    (folder / "conformance/vectors.json").write_text(json.dumps(vectors))
    (folder / "bundle.json").write_text(json.dumps(raw))
    _sign(folder)
    return folder


def _sha(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(size=24, resize="crop", filter="bicubic", crop_fraction=0.875, background=(9, 120, 250)),
        ImageSpec(size=31, resize="pad", filter="bilinear", background=(1, 2, 3)),
        ImageSpec(size=61, resize="squash", filter="bicubic"),
    ],
    ids=lambda spec: spec.resize,
)
def test_pixels_are_exact_under_every_rule(
    kotlin: Any, exported: Path, edge_toys: Any, tmp_path: Path, spec: ImageSpec
) -> None:
    bundle = _pictures(exported, tmp_path / "bundle", _pngs(edge_toys), spec)
    assert verdict(kotlin, bundle) == (0, "pass")


def test_an_interlaced_picture_is_the_same_picture(kotlin: Any, exported: Path, edge_toys: Any, tmp_path: Path) -> None:
    """Adam7, written by hand as Pillow writes none: 4-bit gray, so that rows of a pass end inside bytes."""
    values = np.random.default_rng(6).integers(0, 16, (11, 13), np.uint8)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    body = b""
    for top, left, down, across in passes:
        for row in values[top::down, left::across]:
            body += b"\0" + bytes.fromhex("".join(f"{value:x}" for value in row) + "0" * (len(row) % 2))
    header = edge_toys.chunk(b"IHDR", struct.pack(">IIBBBBB", 13, 11, 4, 0, 0, 0, 1))
    data = header + edge_toys.chunk(b"IDAT", zlib.compress(body)) + edge_toys.chunk(b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + data
    assert (decode_image(data)[..., 0] == values * 17).all()
    bundle = _pictures(exported, tmp_path / "bundle", {"interlaced": data}, ImageSpec(size=8))
    assert verdict(kotlin, bundle) == (0, "pass")


def test_a_damaged_picture_is_refused_and_no_crash(kotlin: Any, exported: Path, edge_toys: Any, tmp_path: Path) -> None:
    whole = _encode("PNG")
    deep = np.random.default_rng(2).integers(0, 65536, (5, 6, 3), np.uint16)
    wide = edge_toys.chunk(b"IHDR", struct.pack(">IIBBBBB", 1 << 30, 37, 8, 2, 0, 0, 0))
    broken = {
        "cut in its pixels": whole[: len(whole) // 2],
        "cut in its header": whole[:20],
        "without an end": whole[:-12],
        "one byte changed": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "too many pixels": whole[:8] + wide + whole[33:],
        "half a transparent colour": edge_toys.png(deep, 16, 2, edge_toys.chunk(b"tRNS", b"\0\1")),
        "a GIF of three bytes": b"GIF",
    }
    bundle = tmp_path / "bundle"
    shutil.copytree(exported, bundle)
    vectors = json.loads((bundle / "conformance/vectors.json").read_text())
    vectors["refused_images"] = []
    for index, (name, data) in enumerate(broken.items()):
        (bundle / f"conformance/broken-{index}").write_bytes(data)
        case = {"name": name, "note": name, "bytes_file": f"conformance/broken-{index}", "reason": "truncated-image"}
        vectors["refused_images"].append(case)
    (bundle / "conformance/vectors.json").write_text(json.dumps(vectors))
    _sign(bundle)
    assert verdict(kotlin, bundle) == (0, "pass")


# --- ids ------------------------------------------------------------------------------------------------------------


def _texts(vocabulary: list[str]) -> list[str]:
    draw = random.Random(8)
    odd = [chr(code) for code in (0, 9, 0x85, 0xA0, 0xAD, 0x130, 0x3A3, 0x3C2, 0x1E9E, 0x200D, 0x3000, 0xFFFD, 0x1F951)]
    pieces = ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", *" .,-'[]\n", *odd]

    def piece() -> str:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(vocabulary)
        if kind < 0.75:
            return draw.choice(pieces)
        return chr(draw.choice([*draw.sample(range(1, 0xD800), 9), *draw.sample(range(0xE000, 0x20000), 3)]))

    texts = ["".join(piece() for _ in range(draw.randint(1, 12))) for _ in range(3000)]
    return [text for text in texts if text.strip()]


def test_ids_are_exact_for_all_kinds_of_strings(kotlin: Any, exported: Path) -> None:
    bundle = Bundle.load(exported)
    assert bundle.contract.text
    vocabulary = sorted(json.loads((exported / "tokenizer.json").read_text())["model"]["vocab"])
    texts = [*_texts(vocabulary), "word " * 50_000]
    result = kotlin.kotlin(kotlin.classes, "encode", exported, stdin="".join(json.dumps(t) + "\n" for t in texts))
    expected = Tokenizer(exported / "tokenizer.json", bundle.contract.text).encode(texts).tolist()
    assert [[int(number) for number in line.split()] for line in result.stdout.splitlines()] == expected, result.stderr


def test_a_tokenizer_of_another_family_is_refused_by_name(kotlin: Any, exported: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(exported, bundle)
    tokenizer = json.loads((bundle / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "ByteLevel"}
    (bundle / "tokenizer.json").write_text(json.dumps(tokenizer))
    _sign(bundle)
    result = kotlin.kotlin(kotlin.classes, "encode", bundle, stdin='"a"\n')
    assert "the tokenizer's pre_tokenizer is ByteLevel and this app knows BertPreTokenizer" in result.stderr
