"""Conformance vectors: what any port of the runtime, in any language, must reproduce.

Bytes -> pixels -> embedding, strings -> ids -> embedding, what must be refused, and a tiny retrieval task. Pixels and
ids are exact; embeddings come from the eager model in float64. The format is described in `edge.conformance`, which
checks it, and in docs/conformance.md. Generated inputs only, unless the caller names pictures that may be published:
calibration pictures are never copied, as they may be private.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from pocketvlm.edge.conformance import DEFAULT_TOLERANCE, VECTORS_SCHEMA
from pocketvlm.edge.errors import BadSampleError, IntegrityError
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.cases import ImageCase, nasty_images, nasty_texts
from pocketvlm.export.targets.base import Towers

FOLDER = "conformance"
VECTORS = f"{FOLDER}/vectors.json"

# one of each trap that a port has fallen into; the long list belongs to reference runs. The first ones come with their
# pixels, as many as fit, so what tells most goes first
_IMAGES = (
    *("odd-crop", "exif-6", "rgba", "gray-16-bit", "palette", "1xN", "cmyk", "progressive"),
    *("gray", "gray-alpha", "animated", "Nx1", "1x1"),
)
_PIXELS_BYTES = 512 << 10
_PIXELS_LEAST = 4
# beside the captions of real pictures: what the tiny retrieval task asks for
_PLAIN = ("a red car", "a picture of a dog", "two people", "a cup of coffee", "a striped flag", "a white page")
_ASKED = "asked-"
_TOP = 5
_LOSSLESS = ("PNG", "GIF", "BMP", "TIFF", "PPM")
# measured distances of rounded models on such far-fetched pictures, times this, become the tolerance where they exceed
# the default
_HEADROOM = 1.5
# vectors that allow more than this test nothing: some other model would pass them
_WIDEST = {"fp16": 0.01, "w4": 0.3, "palette4": 0.3}
_WIDEST_8_BIT = 0.15


@dataclass(frozen=True)
class Vectors:
    """What was written: inputs of the graphs and the reference rows, float64 and, but for logits, of unit length.

    pixels: uint8 [n, S, S, 3]. ids: int32 [m, L]. image, text: [n, D] and [m, D]; a classifier's image rows are its
    logits as they are. Zero rows for an absent tower.
    """

    pixels: NDArray[np.uint8]
    ids: NDArray[np.int32]
    image: NDArray[np.float64]
    text: NDArray[np.float64]


def write_vectors(
    folder: Path, towers: Towers, tokenizer: Tokenizer | None, *, examples: Sequence[ImageCase] = ()
) -> Vectors:
    """Write `conformance/` below the bundle folder.

    examples: real pictures that may travel with the bundle (their licence is the caller's to record); their captions
        are what the retrieval task asks for, beside a few plain phrases.

    Raises:
        IntegrityError: the reference gives a value that is not finite.
    """
    (folder / FOLDER / "images").mkdir(parents=True, exist_ok=True)
    images, pixels, image_rows = _images(folder, towers, examples)
    texts, ids, text_rows = _texts(towers, tokenizer, examples)
    content: dict[str, Any] = {
        "schema": VECTORS_SCHEMA,
        "images": images,
        "texts": texts,
        "refused_images": _refused_images(folder) if images else [],
        "refused_texts": _refused_texts(towers) if texts else [],
        "retrieval": _retrieval(images, image_rows, texts, text_rows) if images and texts else None,
        "tolerance": dict(DEFAULT_TOLERANCE),
    }
    _set_margins(content)
    _dump(folder, content)
    return Vectors(pixels, ids, image_rows, text_rows)


def widen_tolerance(folder: Path, measured: dict[str, float]) -> None:
    """Raise tolerances to what this export measured, so that vectors test the port and not the rounding.

    measured: precision -> largest 1 - cosine over the vectors on this machine's runtimes. fp32 is never widened, as
    full-precision graphs have no excuse.

    Raises:
        IntegrityError: a file is so far from the model that no tolerance could tell it from another model.
    """
    path = folder / VECTORS
    content = json.loads(path.read_text(encoding="utf-8"))
    reasons = []
    for precision, worst in sorted(measured.items()):
        widest = _WIDEST.get(precision, _WIDEST_8_BIT)
        if precision == "fp32":
            continue
        if not worst <= widest:
            raise IntegrityError(
                f"a file of precision {precision} is {worst:.3g} (1 - cosine) away from the model on the conformance "
                f"inputs and at most {widest} is allowed; a port could not be told from another model, so no bundle "
                f"was written: leave {precision} out, or give other calibration data"
            )
        if worst > content["tolerance"][precision]:
            content["tolerance"][precision] = round(min(widest, worst * _HEADROOM), 6)
            reasons.append(
                f"{precision}: {_HEADROOM} times the largest 1 - cosine measured at export ({worst:.6f}), at most "
                f"{widest}"
            )
    if reasons:
        content["tolerance_source"] = "; ".join(reasons)
        _set_margins(content)
        _dump(folder, content)


def double_rows(module: nn.Module, rows: NDArray[Any], *, normalize: bool = True) -> NDArray[np.float64]:
    """The tower's rows computed in float64, one input at a time; of unit length unless told otherwise.

    Raises:
        IntegrityError: a value is not finite.
    """
    exact = copy.deepcopy(module).double().eval()
    with torch.no_grad():
        found = torch.cat([exact(torch.from_numpy(rows[i : i + 1])) for i in range(len(rows))]).double().numpy()
    if not np.isfinite(found).all():
        raise IntegrityError(
            "the model in float64 gives values that are not finite for the conformance inputs; every runtime would, "
            "so the weights are damaged: export an earlier checkpoint"
        )
    return found / np.linalg.norm(found, axis=1, keepdims=True) if normalize else found


def _images(
    folder: Path, towers: Towers, examples: Sequence[ImageCase]
) -> tuple[list[dict[str, Any]], NDArray[np.uint8], NDArray[np.float64]]:
    spec = towers.contract.image
    if towers.image is None or spec is None:
        return [], np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 1))
    known = {case.name: case for case in nasty_images()}
    generated = [known[name] for name in _IMAGES]
    cases = [*examples[:1], *generated, *examples[1:]]
    decoded = [decode_image(case.data, background=spec.background) for case in cases]
    pixels = np.stack([resize_image(picture, spec) for picture in decoded])
    rows = double_rows(towers.image, pixels, normalize=towers.contract.kind != "classifier")
    # graphs are compared from recorded pixels, so the first few have theirs; of the others a hash says right or wrong
    with_pixels = max(_PIXELS_LEAST, _PIXELS_BYTES // pixels[0].nbytes)
    entries = []
    for index, (case, whole, picture, row) in enumerate(zip(cases, decoded, pixels, rows)):
        bytes_file = f"{FOLDER}/images/{case.name}.{case.extension}"
        (folder / bytes_file).write_bytes(case.data)
        lossy = _is_lossy(case.data)
        entry: dict[str, Any] = {
            "name": case.name,
            "note": case.note,
            "bytes_file": bytes_file,
            "lossy": lossy,
            "decoded": {"height": whole.shape[0], "width": whole.shape[1], "sha256": _sha256(whole)},
            "pixels_sha256": _sha256(picture),
            "embedding": _numbers(row),
        }
        if lossy:
            entry["decoded"]["file"] = _write(folder, f"{FOLDER}/decoded/{case.name}.bin", whole)
        if index < with_pixels:
            entry["pixels_file"] = _write(folder, f"{FOLDER}/pixels/{case.name}.bin", picture)
        entries.append(entry)
    return entries, pixels, rows


def _is_lossy(data: bytes) -> bool:
    """Whether two right decoders may give different pixels."""
    with Image.open(io.BytesIO(data)) as image:
        return image.format not in _LOSSLESS and not (image.format == "WEBP" and b"VP8L" in data[:64])


def _sha256(array: NDArray[np.uint8]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _write(folder: Path, name: str, array: NDArray[np.uint8]) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(array.tobytes())
    return name


def _refused_images(folder: Path) -> list[dict[str, Any]]:
    entries = []
    for case in nasty_images():
        if case.error is not None:
            name = f"{FOLDER}/images/{case.name}.{case.extension}"
            (folder / name).write_bytes(case.data)
            entries.append({"name": case.name, "note": case.note, "bytes_file": name, "reason": case.error})
    return entries


def _texts(
    towers: Towers, tokenizer: Tokenizer | None, examples: Sequence[ImageCase]
) -> tuple[list[dict[str, Any]], NDArray[np.int32], NDArray[np.float64]]:
    spec = towers.contract.text
    if towers.text is None or spec is None or tokenizer is None:
        return [], np.zeros((0, 1), np.int32), np.zeros((0, 1))
    kept: list[tuple[str, str, NDArray[np.int32]]] = []
    plain = dict.fromkeys([*(case.caption for case in examples if case.caption), *_PLAIN])
    wanted = [(f"{_ASKED}{index:02d}", text) for index, text in enumerate(plain)]
    wanted += [
        (case.name, case.text)
        for case in nasty_texts(spec.context_length)
        if case.error is None and isinstance(case.text, str)
    ]
    for name, text in wanted:
        try:
            kept.append((name, text, tokenizer.encode([text])[0]))
        except BadSampleError:
            continue  # a text of which this vocabulary keeps nothing
    ids = np.stack([row for _, _, row in kept])
    rows = double_rows(towers.text, ids)
    entries = [
        {"name": name, "text": text, "ids": row.tolist(), "embedding": _numbers(embedding)}
        for (name, text, row), embedding in zip(kept, rows)
    ]
    return entries, ids, rows


def _refused_texts(towers: Towers) -> list[dict[str, Any]]:
    assert towers.contract.text is not None
    return [
        {"name": case.name, "note": case.note, "text": case.text, "reason": case.error}
        for case in nasty_texts(towers.contract.text.context_length)
        if case.error is not None and isinstance(case.text, str)
    ]


def _retrieval(
    images: list[dict[str, Any]],
    image_rows: NDArray[np.float64],
    texts: list[dict[str, Any]],
    text_rows: NDArray[np.float64],
) -> dict[str, Any]:
    """Every picture against every plain text, both ways, as the reference ranks them."""
    asked = [index for index, case in enumerate(texts) if case["name"].startswith(_ASKED)]
    pictures, plain = [case["name"] for case in images], [texts[index]["name"] for index in asked]
    scores = text_rows[asked] @ image_rows.T

    def ranked(queries: list[str], gallery: list[str], rows: NDArray[np.float64]) -> list[dict[str, Any]]:
        orders = np.argsort(-rows, axis=1, kind="stable")
        return [
            {"query": query, "order": [gallery[i] for i in order], "scores": _numbers(row[order])}
            for query, row, order in zip(queries, rows, orders)
        ]

    return {
        "k": _TOP,
        "images": pictures,
        "texts": plain,
        "text_to_image": ranked(plain, pictures, scores),
        "image_to_text": ranked(pictures, plain, scores.T),
    }


def _set_margins(content: dict[str, Any]) -> None:
    """How much reference score a place of the top k may lose, by precision.

    Embeddings of D numbers that are 1 - cos = t away moved by sqrt(2 t). In a random direction that changes one score
    by sqrt(2 t / D), and the difference of two by at most twice that, as query and both candidates move; four times
    it is allowed.
    """
    if content["retrieval"] is not None:
        width = len(content["images"][0]["embedding"])
        content["retrieval"]["margin"] = {
            precision: float(f"{8 * math.sqrt(2 * tolerance / width):.2g}")
            for precision, tolerance in content["tolerance"].items()
        }


def _numbers(row: NDArray[np.float64]) -> list[float]:
    """Nine significant digits: exact for float32 readers, and a third of the bytes."""
    return [float(f"{value:.9g}") for value in row]


def _dump(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=True, indent=None, separators=(",", ":"))
    (folder / VECTORS).write_text(text + "\n", encoding="utf-8")
