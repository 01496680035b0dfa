"""Cases for the web app's unit tests: what Python makes of random pixels, PNG files of every kind, odd strings."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketvlm.edge.contract import ImageSpec, TextSpec
from pocketvlm.edge.errors import PocketvlmError
from pocketvlm.edge.preprocess import decode_image, load_image, resize_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.edge.vlm import EdgeVLM

# of each script something, with marks, joiners, look-alikes and controls between
ALPHABET = [
    *"abc XYZ 019 .,!?'\"-_/\\()[]{}<>@#$%^&*~`|+=;:", *"äéîøüßÅŁıİſǆςёй\u1e9eﷺ", "e\u0301", "n\u0303", "ΑΣ",
    *"\u0301\u200d\u200b\u00a0\u3000\t\n\u0007\ufeff\u202e", *"一只狗在海滩上カタカナひらがな한국어", "ｶﾅ",
    *"صورةقطة", *"עברית", "नमस्ते", "ไทย", "😀", "🐶", "👩\u200d🚀", "🇫🇷", "👍🏽", "☀️",
    *"ＦﬁΩ①Ⅷ½€“”–…", *"𒀀ᚠ\U00020000\U0002b825\U0002b925\U00030001",
    "[CLS]", "[SEP]", "[PAD]", "[UNK]", "##ing",
]  # fmt: skip


def cases(tokenizers: dict[str, tuple[str, TextSpec]], seed: int = 0) -> dict[str, Any]:
    """tokenizers: name -> text of a tokenizer.json and how the model uses it."""
    rng = np.random.default_rng(seed)
    return {
        "resize": list(_resized(rng)),
        "png": [_decoded(name, data) for name, data in pngs(rng).items()],
        "tokens": [_encoded(text, spec, strings(rng)) for text, spec in tokenizers.values()],
    }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _resized(rng: np.random.Generator) -> Any:
    sizes = [(1, 1), (1, 97), (83, 1), (32, 32), (33, 31), (640, 480), (7, 300), (300, 7), (129, 200), (64, 65)]
    for i, (height, width) in enumerate(sizes * 4):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        if i % 3 == 0:
            pixels = (pixels > 127).astype(np.uint8) * 255  # extremes: overshoot of the bicubic kernel is clamped
        spec = ImageSpec(
            size=(16, 33, 48)[i % 3],
            resize=("crop", "squash", "pad", "crop")[i // len(sizes)],  # type: ignore[arg-type]
            filter=("bilinear", "bicubic")[i % 2],  # type: ignore[arg-type]
            crop_fraction=0.875 if i >= 3 * len(sizes) else 1.0,
            background=(250, 10, 128),
        )
        yield {
            "spec": {name: getattr(spec, name) for name in ("size", "resize", "filter", "crop_fraction", "background")},
            "width": width,
            "height": height,
            "pixels": _text(pixels.tobytes()),
            "result": _text(resize_image(pixels, spec).tobytes()),
        }


def _decoded(name: str, data: bytes) -> dict[str, Any]:
    pixels = decode_image(data)
    return {
        "name": name,
        "bytes": _text(data),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "result": _text(pixels.tobytes()),
    }


def pngs(rng: np.random.Generator) -> dict[str, bytes]:
    """PNG of every colour type and depth, interlaced or not, with a transparent colour, with each EXIF orientation."""
    found = {}
    for color, samples, depths in ((0, 1, (1, 2, 4, 8, 16)), (2, 3, (8, 16)), (4, 2, (8, 16)), (6, 4, (8, 16))):
        for depth in depths:
            values = rng.integers(0, 1 << depth, (13, 11, samples))
            for interlaced in (False, True):
                found[f"type {color}, {depth} bits, interlaced {interlaced}"] = _png(values, depth, color, interlaced)
            if color in (0, 2):
                key = struct.pack(f">{samples}H", *values[5, 5])
                found[f"type {color}, {depth} bits, a transparent colour"] = _png(
                    values, depth, color, False, _chunk(b"tRNS", key)
                )
    picture = Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8))
    for value in range(1, 9):
        exif = Image.Exif()
        exif[274] = value
        found[f"orientation {value}"] = _saved(picture, exif=exif)
    palette = picture.quantize(7)
    found["palette"] = _saved(palette)
    found["palette with transparency"] = _saved(palette, transparency=bytes([0, 128, 255]))
    smooth = Image.fromarray(np.add.outer(np.arange(200), np.arange(150)).astype(np.uint8))
    inverse = smooth.point(lambda value: 255 - value)
    found["every filter of rows"] = _saved(Image.merge("RGB", [smooth, smooth, inverse]).resize((90, 70)))
    return found


def _saved(image: Image.Image, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def _png(values: np.ndarray, depth: int, color: int, interlaced: bool, extra: bytes = b"") -> bytes:
    height, width = values.shape[:2]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    body = b""
    for x, y, dx, dy in passes if interlaced else [(0, 0, 1, 1)]:
        for row in values[y::dy, x::dx]:
            if row.size:
                body += b"\0" + _packed(row.reshape(-1), depth)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, int(interlaced))
    chunks = [_chunk(b"IHDR", header), extra, _chunk(b"IDAT", zlib.compress(body)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _packed(row: np.ndarray, depth: int) -> bytes:
    if depth >= 8:
        return row.astype(f">u{depth // 8}").tobytes()
    bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def strings(rng: np.random.Generator, count: int = 400) -> list[str]:
    """Random strings that are not blank."""
    made = ("".join(rng.choice(ALPHABET, rng.integers(1, 40))) for _ in range(2 * count))
    return [text for text in made if text.strip()][:count]


def _encoded(tokenizer: str, spec: TextSpec, texts: list[str]) -> dict[str, Any]:
    ids = Tokenizer(tokenizer, spec).encode(texts)
    fields = ("context_length", "vocab_size", "pad_id")
    return {
        "spec": {name: getattr(spec, name) for name in fields},
        "tokenizer": tokenizer,
        "texts": texts,
        "ids": ids.tolist(),
    }


def tokenizers_of(*bundles: Path) -> dict[str, tuple[str, TextSpec]]:
    """The tokenizers of bundles, for `cases`."""
    from pocketvlm.edge.bundle import Bundle

    found = {}
    for path in bundles:
        bundle = Bundle.load(path)
        assert bundle.contract.text is not None
        found[str(path)] = (bundle.path("tokenizer.json").read_text(encoding="utf-8"), bundle.contract.text)
    return found


QUESTIONS = (
    "What is this?",
    "<image>\nbus",
    "is a taxi top left of the dolphin?",
    "wo ist die “Büroklammer”",
    "日本 🐬",
)


def asked(bundle: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Pictures of odd shapes in `folder` and what Python answers about them at fp32; prompts of odd strings as ids, or
    None where they are refused; ids as text.

    bundle: kind "vlm", onnx fp32.
    """
    rng = np.random.default_rng(seed)
    model = EdgeVLM.load(bundle, "onnxruntime", "fp32")
    contract = model.contract
    folder.mkdir()
    answers = []
    for i, question in enumerate(QUESTIONS * 10):
        pixels = rng.integers(0, 256, (24 + i, 74 - i, 3), np.uint8)
        path = folder / f"{i}.png"
        Image.fromarray(pixels).save(path)
        answer = model.generate(path, question)
        told = {"text": answer.text, "ids": answer.ids, "ended": answer.ended, "margin": _margin(model, path, question)}
        answers.append({"picture": str(path), "question": question, **told})
    # random weights come to ties, which another order of sums decides otherwise
    answers = sorted(answers, key=lambda row: -row["margin"])[:10]
    texts = ["", " \x1f\u3000", '"', '""x', "<image>", "a<image>b", "<image><image>", "bus " * 200, *strings(rng)]
    texts += ["<EOS>", "<0x41>", "<0xFF>", "▁▁a▁", "\ufeffbus", "Σας ΟΔΟΣ"]
    ends = (contract.template.first_text, contract.vocab_size)
    rows = [rng.integers(*ends, size).tolist() for size in rng.integers(1, 20, 200)]
    # bytes, of which few runs are UTF-8
    rows += [rng.integers(ends[0], ends[0] + 256, size).tolist() for size in rng.integers(1, 6, 200)]
    return {
        "contract": contract.to_dict(),
        "tokenizer": bundle.joinpath(contract.tokenizer).read_text(encoding="utf-8"),
        "answers": answers,
        "texts": texts,
        "ids": [_prompt_ids(model, text) for text in texts],
        "decoded": [{"ids": row, "text": model.text.decode(row)} for row in rows],
    }


def _margin(model: EdgeVLM, picture: Path, question: str) -> float:
    """By how much the word that was said was ahead of the next one, at least."""
    ids = model.text.prompt_ids(question)
    place = model.contract.prefix + len(ids)
    decoding, logits = model.prefill(load_image(picture, model.contract.image), ids)
    found = np.inf
    for step in range(min(64, model.contract.context_length - place)):
        second, first = np.sort(logits)[-2:]
        found = min(found, float(first - second))
        token = int(logits.argmax())
        if token == model.contract.template.end:
            break
        logits = decoding.decode(token, place + step)
    return found


def _prompt_ids(model: EdgeVLM, text: str) -> list[int] | None:
    try:
        return model.text.prompt_ids(text)
    except PocketvlmError:
        return None
