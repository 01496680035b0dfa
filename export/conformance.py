"""Conformance vectors: what any port of the runtime, in any language, must reproduce.

Bytes -> pixels -> embedding and strings -> ids -> embedding. Pixels and ids are exact; embeddings come from the eager
model in float64. The format is described in `edge.conformance`, which checks it. Generated inputs only, unless the
caller names pictures that may be published: calibration pictures are never copied, as they may be private.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.conformance import DEFAULT_TOLERANCE, VECTORS_SCHEMA
from pocketvlm.edge.errors import BadSampleError, IntegrityError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.cases import ImageCase, nasty_images, nasty_texts
from pocketvlm.export.targets.base import Towers

FOLDER = "conformance"
VECTORS = f"{FOLDER}/vectors.json"

# one of each trap that a port has fallen into; the long list belongs to reference runs
_IMAGES = ("exif-6", "rgba", "cmyk", "gray", "gray-16-bit", "palette", "animated", "progressive", "1xN", "odd-crop")
# measured distances of rounded models on such far-fetched pictures, times this, become the tolerance where they exceed
# the default
_HEADROOM = 1.5
# vectors that allow more than this test nothing: some other model would pass them
_WIDEST = {"fp16": 0.01, "w4": 0.3, "palette4": 0.3}
_WIDEST_8_BIT = 0.1


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

    examples: real pictures that may travel with the bundle (their licence is the caller's to record).

    Raises:
        IntegrityError: the reference gives a value that is not finite.
    """
    (folder / FOLDER / "images").mkdir(parents=True, exist_ok=True)
    (folder / FOLDER / "pixels").mkdir(parents=True, exist_ok=True)
    images, pixels, image_rows = _images(folder, towers, examples)
    texts, ids, text_rows = _texts(towers, tokenizer)
    content = {"schema": VECTORS_SCHEMA, "images": images, "texts": texts, "tolerance": dict(DEFAULT_TOLERANCE)}
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
    cases = [*examples, *(case for case in nasty_images() if case.name in _IMAGES)]
    pixels = np.stack([load_image(case.data, spec) for case in cases])
    rows = double_rows(towers.image, pixels, normalize=towers.contract.kind != "classifier")
    entries = []
    for case, picture, row in zip(cases, pixels, rows):
        bytes_file = f"{FOLDER}/images/{case.name}.{case.extension}"
        pixels_file = f"{FOLDER}/pixels/{case.name}.bin"
        (folder / bytes_file).write_bytes(case.data)
        raw = picture.tobytes()
        (folder / pixels_file).write_bytes(raw)
        entries.append(
            {
                "name": case.name,
                "note": case.note,
                "bytes_file": bytes_file,
                "pixels_file": pixels_file,
                "pixels_sha256": hashlib.sha256(raw).hexdigest(),
                "embedding": _numbers(row),
            }
        )
    return entries, pixels, rows


def _texts(
    towers: Towers, tokenizer: Tokenizer | None
) -> tuple[list[dict[str, Any]], NDArray[np.int32], NDArray[np.float64]]:
    spec = towers.contract.text
    if towers.text is None or spec is None or tokenizer is None:
        return [], np.zeros((0, 1), np.int32), np.zeros((0, 1))
    kept: list[tuple[str, str, NDArray[np.int32]]] = []
    for case in nasty_texts(spec.context_length):
        if case.error is None and isinstance(case.text, str):
            try:
                kept.append((case.name, case.text, tokenizer.encode([case.text])[0]))
            except BadSampleError:
                continue  # a text of which this vocabulary keeps nothing
    ids = np.stack([row for _, _, row in kept])
    rows = double_rows(towers.text, ids)
    entries = [
        {"name": name, "text": text, "ids": row.tolist(), "embedding": _numbers(embedding)}
        for (name, text, row), embedding in zip(kept, rows)
    ]
    return entries, ids, rows


def _numbers(row: NDArray[np.float64]) -> list[float]:
    """Nine significant digits: exact for float32 readers, and a third of the bytes."""
    return [float(f"{value:.9g}") for value in row]


def _dump(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=True, indent=None, separators=(",", ":"))
    (folder / VECTORS).write_text(text + "\n", encoding="utf-8")
