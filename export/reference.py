"""Record a reference run: what the unpatched eager student answers to golden inputs, and how exact that answer is.

float64 on the CPU, float32 with every shortcut off on CUDA; the same code. The exported, fused and quantised graphs
are later compared with this folder and never with one another.
"""

from __future__ import annotations

import copy
import datetime
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pocketvlm.data.sample import Sample
from pocketvlm.edge.contract import ImageSpec, ModelContract
from pocketvlm.edge.errors import BadSampleError, IntegrityError, PocketvlmError, UsageError
from pocketvlm.edge.preprocess import decode_image, load_image, resize_image, resize_reference
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export import reference_run as layout
from pocketvlm.export.cases import ImageCase, TextCase, golden_images, golden_texts, pick
from pocketvlm.export.compare import drift, plain
from pocketvlm.export.numerics import (
    EmulatedTF32,
    command_line,
    describe_environment,
    reference_device,
    strict_numerics,
)
from pocketvlm.export.reference_run import ReferenceRun, load_reference, sha256
from pocketvlm.export.reference_show import show
from pocketvlm.students.student import weights_digest

__all__ = ["ReferenceRun", "load_reference", "record_reference", "show"]

BATCH = 8
REAL_CASES = 16
# below this many texts "the top ten" is most of the gallery, and its overlap says nothing
MIN_TASK = 20
NOISE_ROWS = 128
MAX_TAPS = 48
TENSOR_CASES, TENSOR_LIMIT = 2, 16_384
PROMPT = "a picture of {}"

Rows = NDArray[Any]


class Source(Protocol):
    """What is asked of a data set; `data.DataSource` has it."""

    @property
    def name(self) -> str: ...
    @property
    def samples(self) -> Sequence[Sample]: ...
    @property
    def licences(self) -> Sequence[tuple[str, str, str]]: ...


def record_reference(
    student_or_folder: Any,
    out: str | Path,
    *,
    data: Source,
    device: str | torch.device = "auto",
    overwrite: bool = False,
    max_task: int = 512,
    seed: int = 0,
    command: str | None = None,
) -> ReferenceRun:
    """Record golden inputs, outputs, taps, a task and the noise floor of one student into the folder `out`.

    Args:
        student_or_folder: a `Student` (or anything with `contract`, `tokenizer_json`, `encode_image`, `encode_text`
            and towers), or a folder that `students.load_student` reads. Use the eager model, not a deploy copy.
        data: pictures with captions that the student was not trained on (for instance openmoji?pool=test&fold=0).
        device: "cpu" (float64), "cuda" (float32, TF32 off), or "auto".
        max_task: at most this many pictures in the task; chosen by a hash of uid and seed.
        command: recorded as the command that made it; by default the running one, without machine paths.

    Returns:
        The recording, read back from disk and verified.

    Raises:
        UsageError: `out` is not empty and `overwrite` is False, or the data has too few captions.
        IntegrityError: the student's outputs are not finite.
    """
    out = Path(out)
    _refuse_full_folder(out, overwrite)
    where = reference_device(device)
    student, source_files = _student(student_or_folder)
    contract: ModelContract = student.contract
    if contract.image is None or contract.text is None:
        raise UsageError(f"model {contract.name!r} is of kind {contract.kind!r}; a reference needs both towers for now")
    weights = weights_digest(student)
    dtype = torch.float64 if where.type == "cpu" else torch.float32
    tokenizer = Tokenizer(student.tokenizer_json, contract.text)
    images = golden_images(data.samples, count=REAL_CASES, seed=seed)
    texts = golden_texts(data.samples, count=REAL_CASES, context_length=contract.text.context_length, seed=seed)
    task = _task_inputs(data.samples, contract, tokenizer, max_task, seed)

    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for room in ("cases/images", "taps", "task"):
        (part / room).mkdir(parents=True)
    try:
        files = _Writer(part)
        pixels, ids = _write_cases(files, images, texts, contract.image, tokenizer)
        with strict_numerics(where):
            model = _cast(student, dtype, where)
            outputs = {"image": _rows(model, "image", pixels), "text": _rows(model, "text", ids)}
            scale, bias = contract.logit_scale, contract.logit_bias
            for tower, raw in outputs.items():
                if not np.isfinite(raw).all():
                    raise IntegrityError(
                        f"the {tower} tower of {contract.name!r} gives NaN or Inf, so nothing can be held to it; "
                        "look for a diverged training before recording"
                    )
            unit = {tower: _unit(raw) for tower, raw in outputs.items()}
            files.npz(
                layout.ARRAYS,
                pixels=pixels,
                ids=ids,
                image_raw=outputs["image"],
                text_raw=outputs["text"],
                image=unit["image"],
                text=unit["text"],
                logits=scale * unit["image"] @ unit["text"].T + bias,
            )
            _write_taps(files, model, {"image": pixels, "text": ids})
            embedded = {
                "image": _rows(model, "image", task["pixels"]),
                "text": _rows(model, "text", task["ids"]),
                "prompt": _rows(model, "text", task["prompt_ids"]) if task["labels"] else _empty(contract),
            }
            _write_task(files, task, embedded)
            files.json(layout.NOISE, _noise(student, model, dtype, where, task, embedded))
        files.json(layout.WEIGHTS, _weights(student))
        manifest = {
            "schema_version": layout.SCHEMA_VERSION,
            "model_id": contract.model_id,
            "contract": contract.to_dict(),
            "sha256": {"weights": weights, "tokenizer": sha256(student.tokenizer_json), **source_files},
            "numerics": {
                "dtype": str(dtype).removeprefix("torch."),
                "tf32_matmul": False,
                "tf32_cudnn": False,
                "cudnn_benchmark": False,
                "deterministic_algorithms": True,
                "cublas_workspace_config": _workspace(where),
                "attention": "math",
                "autocast": False,
                "batch_size": BATCH,
            },
            "environment": describe_environment(where),
            "seeds": {"cases": seed, "task": seed},
            "command": command or command_line(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "data": {"name": data.name, "samples": len(data.samples), "licences": [list(row) for row in data.licences]},
            "counts": {
                "images": len(images),
                "texts": len(texts),
                "task_pictures": len(task["uids"]),
                "task_texts": len(task["texts"]),
                "classes": len(task["labels"]),
            },
            "files": files.listing,
        }
        (part / layout.MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")
        load_reference(part)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return load_reference(out)


# --- inputs -------------------------------------------------------------------------------------------------------


def _refuse_full_folder(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        out.parent.mkdir(parents=True, exist_ok=True)
        return
    if not overwrite:
        raise UsageError(
            f"folder {str(out)!r} is not empty; a recorded reference is replaced only on purpose, so pass --overwrite or "
            "choose another folder"
        )
    if not (out / layout.MANIFEST).is_file():
        raise UsageError(
            f"folder {str(out)!r} is not a reference run, and overwriting would delete what is in it; choose another folder"
        )


def _student(source: Any) -> tuple[Any, dict[str, str]]:
    if not isinstance(source, (str, Path)):
        return source, {}
    from pocketvlm.students import load_student

    folder, files = Path(source), {}
    for recipe in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
        if recipe.is_file():
            files["recipe"] = sha256(recipe.read_bytes())
            break
    return load_student(folder), files


def _cast(student: Any, dtype: torch.dtype, device: torch.device) -> Any:
    # a copy: the caller's student keeps its dtype, device and mode
    return copy.deepcopy(student).to(device=device, dtype=dtype).eval()


def _caption(sample: Sample) -> str | None:
    for caption in sorted(sample.captions, key=lambda caption: not caption.language.startswith("en")):
        if isinstance(caption.text, str) and caption.text.strip():
            return caption.text
    return None


def _task_inputs(
    samples: Sequence[Sample], contract: ModelContract, tokenizer: Tokenizer, limit: int, seed: int
) -> dict[str, Any]:
    """Pictures with a caption and the gallery of their distinct captions; classes where pictures carry labels."""
    assert contract.image is not None
    chosen: list[Sample] = []
    pixels: list[NDArray[np.uint8]] = []
    for sample in pick([s for s in samples if _caption(s)], len(samples), seed):
        if len(chosen) == limit:
            break
        try:
            pixels.append(load_image(sample.image.read(), contract.image))
            tokenizer.encode([_caption(sample) or ""])
        except BadSampleError:
            del pixels[len(chosen) :]
            continue
        chosen.append(sample)
    texts = sorted({_caption(sample) or "" for sample in chosen})
    if len(texts) < MIN_TASK:
        raise UsageError(
            f"the data gives {len(texts)} distinct captions with readable pictures and the reference task needs "
            f"{MIN_TASK}; a smaller gallery would call every ranking equal, so use more data or a larger --max-task"
        )
    column = {text: index for index, text in enumerate(texts)}
    labelled = all(sample.label for sample in chosen)
    labels = sorted({sample.label or "" for sample in chosen}) if labelled else []
    prompts = [PROMPT.format(label) for label in labels]
    return {
        "uids": [sample.uid for sample in chosen],
        "texts": texts,
        "positives": [sorted({column[c.text] for c in s.captions if c.text in column}) for s in chosen],
        "pixels": np.stack(pixels),
        "ids": tokenizer.encode(texts),
        "labels": labels,
        "prompts": prompts,
        "prompt_ids": tokenizer.encode(prompts),
        "label_of": np.array([labels.index(s.label or "") for s in chosen] if labelled else [], dtype=np.int64),
    }


# --- the model ----------------------------------------------------------------------------------------------------


def _rows(model: Any, tower: str, inputs: Rows, batch: int = BATCH) -> NDArray[np.float64]:
    """Raw embeddings [n, D] of preprocessed inputs, as float64 whatever the model's dtype."""
    encode: Callable[[Tensor], Any] = model.encode_image if tower == "image" else model.encode_text
    device = next(model.parameters()).device
    parts = [
        encode(torch.from_numpy(np.ascontiguousarray(inputs[i : i + batch])).to(device)).embedding.double().cpu().numpy()
        for i in range(0, len(inputs), batch)
    ]
    return np.concatenate(parts)


def _unit(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    # torch.nn.functional.normalize's own guard, so that a zero row stays what the model would answer
    return raw / np.maximum(np.linalg.norm(raw, axis=1, keepdims=True), 1e-12)


def _empty(contract: ModelContract) -> NDArray[np.float64]:
    return np.zeros((0, contract.embed_dim))


def _workspace(device: torch.device) -> str | None:
    import os

    return os.environ.get("CUBLAS_WORKSPACE_CONFIG") if device.type == "cuda" else None


def _noise(
    student: Any,
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    task: dict[str, Any],
    embedded: dict[str, NDArray[np.float64]],
) -> dict[str, Any]:
    """The reference against itself under other arithmetic, on the task's inputs (real data, the same precision).

    Each entry: drift per tower and the deviation of the similarity matrix. "float32" compares float32 with float64
    over every row; the others use the first `NOISE_ROWS`.
    """
    inputs = {"image": task["pixels"], "text": task["ids"]}
    cpu = torch.device("cpu")

    def against(other: Callable[[str, Rows], NDArray[np.float64]], rows: int, base: dict[str, Rows]) -> dict[str, Any]:
        reference = {tower: _unit(base[tower][:rows]) for tower in inputs}
        candidate = {tower: _unit(other(tower, inputs[tower][:rows])) for tower in inputs}
        result: dict[str, Any] = {t: drift(reference[t], candidate[t]).to_dict() for t in inputs}
        deviation = candidate["image"] @ candidate["text"].T - reference["image"] @ reference["text"].T
        result["scores"] = {
            "score_max_abs": plain(np.abs(deviation).max()),
            "score_rms": plain(np.sqrt(np.mean(np.square(deviation)))),
        }
        result["rows"] = {tower: len(reference[tower]) for tower in inputs}
        return result

    single = model if dtype == torch.float32 else _cast(student, torch.float32, device)
    if dtype == torch.float64:
        exact = embedded
    else:
        wide = _cast(student, torch.float64, cpu)
        exact = {tower: _rows(wide, tower, inputs[tower]) for tower in inputs}
    ordinary = {tower: _rows(single, tower, inputs[tower][:NOISE_ROWS]) for tower in inputs}

    def emulated(tower: str, rows: Rows) -> NDArray[np.float64]:
        with EmulatedTF32():
            return _rows(single, tower, rows)

    noise = {
        "rerun": against(lambda t, x: _rows(model, t, x), NOISE_ROWS, embedded),
        "float32": against(lambda t, x: _rows(single, t, x), len(task["uids"]), exact),
        "batch": against(lambda t, x: _rows(single, t, x, batch=1), NOISE_ROWS, ordinary),
        "tf32": against(emulated, NOISE_ROWS, ordinary),
    }
    for name, half in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        try:
            narrow = _cast(student, half, device)
            noise[name] = against(lambda t, x, m=narrow: _rows(m, t, x), NOISE_ROWS, exact)  # type: ignore[misc]
        except (RuntimeError, PocketvlmError) as error:
            # an operator without a half-precision kernel here, or an overflow: no floor, so budgets stay as they are
            noise[name] = {"unavailable": str(error).splitlines()[0]}
    return noise


# --- writing ------------------------------------------------------------------------------------------------------


class _Writer:
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


def _write_cases(
    files: _Writer, images: list[ImageCase], texts: list[TextCase], spec: ImageSpec, tokenizer: Tokenizer
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
                    f"this machine's Pillow resizes {case.name!r} differently from the documented arithmetic, so a reference "
                    "made here would fail everywhere else; install another Pillow"
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
        encoded = _try(lambda value=text.text: tokenizer.encode([value]), text)  # type: ignore[misc]
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
            f"case {case.name!r} must be refused as {case.error!r} and was accepted; preprocessing is broken, so nothing "
            "was recorded"
        )
    return result


def _write_task(files: _Writer, task: dict[str, Any], embedded: dict[str, NDArray[np.float64]]) -> None:
    size = task["pixels"].shape[1]
    columns = min(16, max(1, 16_000 // size))
    sheets = []
    for start in range(0, len(task["pixels"]), columns * columns):
        tiles = task["pixels"][start : start + columns * columns]
        sheet = np.zeros((-(-len(tiles) // columns) * size, columns * size, 3), np.uint8)
        for i, tile in enumerate(tiles):
            y, x = i // columns * size, i % columns * size
            sheet[y : y + size, x : x + size] = tile
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "WEBP", lossless=True, quality=80, method=4)
        name = f"task/pixels-{len(sheets):03d}.webp"
        files.bytes(name, buffer.getvalue())
        sheets.append([name, len(tiles)])
    unit = {key: _unit(value) for key, value in embedded.items()}
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
            "size": size,
            "columns": columns,
            "sheets": sheets,
            "pixels_sha256": [sha256(tile.tobytes()) for tile in task["pixels"]],
        },
    )


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


def _write_taps(files: _Writer, model: Any, inputs: dict[str, Rows]) -> None:
    names: dict[str, list[str]] = {}
    statistics: dict[str, Rows] = {}
    tensors: dict[str, Rows] = {}
    for tower, rows in inputs.items():
        root = model.image_tower if tower == "image" else model.text_tower
        taps = tap_modules(root)
        seen: dict[str, Rows] = {}
        table: list[list[list[float]]] = []
        handles = [root.get_submodule(tap).register_forward_hook(_keeper(seen, tap)) for tap in taps]
        try:
            for case in range(len(rows)):
                seen.clear()
                _rows(model, tower, rows[case : case + 1])
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


def _weights(student: Any) -> dict[str, Any]:
    """Per parameter: shape and L2 norm, by which a converted file's constants can be recognised."""
    return {
        name: {"shape": list(value.shape), "norm": float(value.detach().double().norm())}
        for name, value in sorted(student.state_dict().items())
        if value.is_floating_point()
    }
