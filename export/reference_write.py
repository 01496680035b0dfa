"""What a reference run writes: cases, task, taps and weights, each file hashed as it is written."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import decode_image, resize_image, resize_reference
from pocketvlm.export import reference_run as layout
from pocketvlm.export.cases import ImageCase, TextCase
from pocketvlm.export.numerics import spread
from pocketvlm.export.reference_run import sha256
from pocketvlm.export.subject import Runner

BATCH = 8
MAX_TAPS = 48
TENSOR_CASES, TENSOR_LIMIT = 2, 16_384
PROMPT = "a picture of {}"

Rows = NDArray[Any]


def encode_rows(
    runner: Runner,
    tower: str,
    inputs: Rows,
    batch: int = BATCH,
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> NDArray[np.float64]:
    """Raw embeddings [n, D] of preprocessed inputs, as float64 whatever the model's dtype.

    Batches are the same on any machine and are spread over its cores. inside: entered around each batch, on its thread.
    """

    def one(start: int) -> NDArray[np.float64]:
        rows = torch.from_numpy(np.ascontiguousarray(inputs[start : start + batch]))
        with torch.inference_mode(), inside():
            return runner.encode(tower, rows).double().cpu().numpy()

    threads = runner.threads and runner.device.type == "cpu"
    return np.concatenate(spread(one, range(0, len(inputs), batch), threads=threads))


def unit_rows(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    # torch.nn.functional.normalize's own guard, so that a zero row stays what the model would answer
    return raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)


class Writer:
    """Writes files of the recording and keeps their hashes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listing: dict[str, dict[str, Any]] = {}

    def bytes(self, name: str, data: bytes) -> None:
        (self.folder / name).write_bytes(data)
        self.listing[name] = {"sha256": sha256(data), "bytes": len(data)}

    def json(self, name: str, value: Any) -> None:
        self.bytes(name, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def npz(self, name: str, **arrays: Rows) -> None:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        self.bytes(name, buffer.getvalue())


def refuse_full_folder(out: Path, overwrite: bool) -> None:
    """Refuse an output folder that is not empty, unless it holds a recording that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise UsageError(
            f"folder {str(out)!r} is not empty; a recorded reference is replaced only on purpose, so pass "
            "--overwrite or choose another folder"
        )
    if not (out / layout.MANIFEST).is_file():
        raise UsageError(
            f"folder {str(out)!r} is not a reference run, and overwriting would delete what is in it; "
            "choose another folder"
        )


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """A folder beside `out`, made anew, that takes its place on success and vanishes on failure."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_cases(
    files: Writer,
    images: list[ImageCase],
    texts: list[TextCase],
    spec: ImageSpec,
    encode: Callable[[Sequence[Any]], NDArray[np.int32]],
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    image_rows, pixels, text_rows, ids = [], [], [], []
    for case in images:
        file = f"cases/images/{case.name}.{case.extension}"
        files.bytes(file, case.data)
        row: dict[str, Any] = {"name": case.name, "file": file, "real": case.real, "note": case.note}
        seen = _try(lambda data=case.data: decode_image(data, background=spec.background), case)  # type: ignore[misc]
        if seen is not None:
            made = resize_image(seen, spec)
            if not np.array_equal(made, resize_reference(seen, spec)):
                raise UsageError(
                    f"this machine's Pillow resizes {case.name!r} differently from the documented arithmetic, so a "
                    "reference made here would fail everywhere else; install another Pillow"
                )
            pixels.append(made)
        done = seen is not None
        image_rows.append(
            row
            | {
                "error": case.error,
                "row": len(pixels) - 1 if done else None,
                "pixels_sha256": sha256(pixels[-1].tobytes()) if done else None,
            }
        )
    for text in texts:
        encoded = _try(lambda value=text.text: encode([value]), text)  # type: ignore[misc]
        if encoded is not None:
            ids.append(encoded[0])
        row = {"name": text.name, "text": text.text, "real": text.real, "note": text.note, "error": text.error}
        text_rows.append(row | {"row": len(ids) - 1 if encoded is not None else None})
    files.json(layout.CASES, {"images": image_rows, "texts": text_rows})
    return np.stack(pixels), np.stack(ids).astype(np.int32)


def _try(step: Callable[[], Any], case: ImageCase | TextCase) -> Any:
    """The step's result, or None where the case was refused for the reason it must be refused for."""
    try:
        result = step()
    except BadSampleError as error:
        if error.reason == case.error:
            return None
        raise
    if case.error is not None:
        raise UsageError(
            f"case {case.name!r} must be refused as {case.error!r} and was accepted; preprocessing is broken, so "
            "nothing was recorded"
        )
    return result


def write_task(files: Writer, task: dict[str, Any], embedded: dict[str, NDArray[np.float64]]) -> None:
    sheets = write_sheets(files, "task", task["pixels"])
    unit = {key: unit_rows(value) for key, value in embedded.items()}
    scores = unit["image"] @ unit["text"].T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :11]
    top = np.take_along_axis(scores, order, axis=1)
    files.npz(
        layout.TASK_ARRAYS,
        ids=task["ids"],
        prompt_ids=task["prompt_ids"],
        label_of=task["label_of"],
        top=order[:, :10].astype(np.int32),
        top_scores=top[:, :10],
        # margin to the next result: where it is tiny, the reference itself has no order
        margins=top[:, :-1] - top[:, 1:],
        **{key: value.astype(np.float32) for key, value in unit.items()},
    )
    files.json(
        layout.TASK,
        {
            "uids": task["uids"],
            "texts": task["texts"],
            "positives": task["positives"],
            "labels": task["labels"],
            "prompts": task["prompts"],
            "template": PROMPT,
            **sheets,
        },
    )


def write_sheets(files: Writer, room: str, pictures: Rows) -> dict[str, Any]:
    """uint8 [n, S, S, 3] as lossless sheets of many pictures; returns what `reference_run.sheet_pixels` reads."""
    size = pictures.shape[1]
    columns = min(16, max(1, 16_000 // size))
    sheets: list[tuple[str, int]] = []
    for start in range(0, len(pictures), columns * columns):
        tiles = pictures[start : start + columns * columns]
        sheet = np.zeros((-(-len(tiles) // columns) * size, columns * size, 3), np.uint8)
        for i, tile in enumerate(tiles):
            y, x = i // columns * size, i % columns * size
            sheet[y : y + size, x : x + size] = tile
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=80, method=4)
        name = f"{room}/pixels-{len(sheets):03d}.webp"
        files.bytes(name, buffer.getvalue())
        sheets.append((name, len(tiles)))
    return {
        "size": size,
        "columns": columns,
        "sheets": sheets,
        "pixels_sha256": [sha256(tile.tobytes()) for tile in pictures],
    }


def tap_modules(tower: nn.Module) -> list[str]:
    """Names of the blocks of a tower: the outermost modules that hold no list of blocks themselves.

    Sequential, ModuleList and anything that contains one are looked into; the rest is a block. Deep towers keep an
    even selection of `MAX_TAPS` that includes the last block.
    """
    containers = (nn.Sequential, nn.ModuleList)
    names: list[str] = []

    def visit(name: str, module: nn.Module) -> None:
        holds = any(isinstance(inner, containers) and len(inner) for inner in module.modules() if inner is not module)
        if isinstance(module, containers) or holds:
            for key, child in module.named_children():
                visit(f"{name}.{key}" if name else key, child)
        elif not isinstance(module, nn.Identity):
            names.append(name)

    for key, child in tower.named_children():
        visit(key, child)
    if len(names) > MAX_TAPS:
        keep = np.linspace(0, len(names) - 1, MAX_TAPS).round().astype(int)
        names = [names[i] for i in keep]
    return names


def _statistics(x: NDArray[np.float64]) -> list[float]:
    flat = x.ravel()
    size = np.abs(flat)
    return [
        float(flat.min()),
        float(flat.max()),
        float(size.max()),
        float(np.sqrt(np.mean(np.square(flat)))),
        float(np.quantile(size, 0.99)),
        float(np.isnan(flat).sum()),
        float(np.isinf(flat).sum()),
    ]


def write_taps(files: Writer, runner: Runner, inputs: dict[str, Rows]) -> None:
    names: dict[str, list[str]] = {}
    statistics: dict[str, Rows] = {}
    tensors: dict[str, Rows] = {}
    for tower, rows in inputs.items():
        root = runner.blocks(tower)
        taps = tap_modules(root)
        seen: dict[str, Rows] = {}
        table: list[list[list[float]]] = []
        handles = [root.get_submodule(tap).register_forward_hook(_keeper(seen, tap)) for tap in taps]
        try:
            for case in range(len(rows)):
                seen.clear()
                encode_rows(runner, tower, rows[case : case + 1])
                if case == 0:
                    # modules that a tower owns but does not call (an unused head) are no taps
                    taps = [tap for tap in taps if tap in seen]
                table.append([_statistics(seen[tap]) for tap in taps])
                if case < TENSOR_CASES:
                    small = {tap: seen[tap] for tap in taps if seen[tap].size <= TENSOR_LIMIT}
                    tensors |= {f"{tower}/{case}/{tap}": value.astype(np.float32) for tap, value in small.items()}
        finally:
            for handle in handles:
                handle.remove()
        names[tower], statistics[tower] = taps, np.array(table)
    files.json(layout.TAPS, names)
    files.npz(layout.TAP_STATISTICS, **statistics)
    files.npz(layout.TAP_TENSORS, **tensors)


def _keeper(seen: dict[str, Rows], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(value, Tensor) and value.is_floating_point():
            seen[name] = value.double().cpu().numpy()

    return hook
