"""A recorded reference run on disk: the reader, which believes no file that the manifest does not vouch for."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError

SCHEMA_VERSION = "1.1"
MANIFEST = "manifest.json"
KIND = "embeddings"
# kind of model -> the command that records one; a manifest that names no kind is of embeddings
COMMANDS = {KIND: "pocketvlm reference", "vlm": "pocketvlm vlm reference"}
CASES, ARRAYS = "cases/cases.json", "cases/arrays.npz"
TAPS, TAP_STATISTICS, TAP_TENSORS = "taps/taps.json", "taps/statistics.npz", "taps/tensors.npz"
TASK, TASK_ARRAYS, NOISE, WEIGHTS = "task/task.json", "task/arrays.npz", "noise.json", "weights.json"
REQUIRED = (CASES, ARRAYS, TAPS, TAP_STATISTICS, TAP_TENSORS, TASK, TASK_ARRAYS, NOISE, WEIGHTS)
STATISTICS = ("min", "max", "absmax", "rms", "p99", "nan", "inf")
AGAIN = "record the reference again or restore the folder from its source"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class ImageRecord:
    """One golden picture. row: its row in the arrays, None if it must be refused with reason `error`."""

    name: str
    file: str
    real: bool
    note: str
    error: str | None
    row: int | None
    pixels_sha256: str | None


@dataclass(frozen=True)
class TextRecord:
    """One golden text. row: its row in the arrays, None if it must be refused with reason `error`."""

    name: str
    text: Any
    real: bool
    note: str
    error: str | None
    row: int | None


@dataclass(frozen=True)
class Task:
    """The retrieval and zero-shot task over held-out concepts.

    uids: of the pictures. texts: the gallery, without repeats. positives: bool [pictures, texts]. pixels: uint8
    [pictures, S, S, 3]. ids: int32 [texts, L]. image, text: float64 unit embeddings of the reference.
    labels, prompts, prompt_ids, prompt, label_of: zero-shot classes (empty where the data has no labels); label_of is
    the class index of each picture.
    """

    uids: list[str]
    texts: list[str]
    positives: NDArray[np.bool_]
    pixels: NDArray[np.uint8]
    ids: NDArray[np.int32]
    image: NDArray[np.float64]
    text: NDArray[np.float64]
    labels: list[str]
    prompts: list[str]
    prompt_ids: NDArray[np.int32]
    prompt: NDArray[np.float64]
    label_of: NDArray[np.int64]


class ReferenceRun:
    """A verified reference folder. Made by `load_reference` or `record_reference`.

    manifest: as recorded. contract: the model's. images, texts: the golden cases. arrays: pixels [n, S, S, 3],
    ids [m, L], image_raw, image, text_raw, text (raw and unit embeddings), logits [n, m].
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files = files
        self.contract = ModelContract.from_dict(manifest["contract"])
        cases = json.loads(files[CASES])
        self.images = [ImageRecord(**value) for value in cases["images"]]
        self.texts = [TextRecord(**value) for value in cases["texts"]]
        self.arrays = read_npz(files[ARRAYS])
        self.noise: dict[str, Any] = json.loads(files[NOISE])
        self.weights: dict[str, Any] = json.loads(files[WEIGHTS])

    @property
    def digest(self) -> str:
        """sha256 of manifest.json: names this recording."""
        return sha256((self.folder / MANIFEST).read_bytes())

    @property
    def not_compared(self) -> dict[str, str]:
        """stage -> why agreement with this recording proves nothing about it (empty for a student)."""
        return dict(self.manifest.get("not_compared", {}))

    def image_bytes(self, record: ImageRecord) -> bytes:
        return self._files[record.file]

    def real_rows(self, kind: str) -> NDArray[np.bool_]:
        """bool [rows] of the case arrays of "image" or "text": True where the case came from the data source."""
        records: list[ImageRecord] | list[TextRecord] = self.images if kind == "image" else self.texts
        return np.array([record.real for record in records if record.row is not None])

    @cached_property
    def taps(self) -> dict[str, tuple[list[str], NDArray[np.float64]]]:
        """tower -> (tap names, statistics [cases, taps, 7] in the order of `STATISTICS`)."""
        names, values = json.loads(self._files[TAPS]), read_npz(self._files[TAP_STATISTICS])
        return {tower: (names[tower], values[tower]) for tower in ("image", "text")}

    @cached_property
    def task(self) -> Task:
        record, arrays = json.loads(self._files[TASK]), read_npz(self._files[TASK_ARRAYS])
        positives = np.zeros((len(record["uids"]), len(record["texts"])), dtype=bool)
        for row, columns in enumerate(record["positives"]):
            positives[row, columns] = True
        unit = {key: _unit(arrays[key]) for key in ("image", "text", "prompt")}
        return Task(
            uids=record["uids"],
            texts=record["texts"],
            positives=positives,
            pixels=sheet_pixels(record, self._files, record["uids"]),
            ids=arrays["ids"],
            image=unit["image"],
            text=unit["text"],
            labels=record["labels"],
            prompts=record["prompts"],
            prompt_ids=arrays["prompt_ids"],
            prompt=unit["prompt"],
            label_of=arrays["label_of"],
        )


def sheet_pixels(record: dict[str, Any], files: Mapping[str, bytes], names: Sequence[str]) -> NDArray[np.uint8]:
    """uint8 [n, S, S, 3] of what `reference_write.write_sheets` wrote. names: of the pictures, for people.

    Raises:
        IntegrityError: a picture does not decode to the pixels that were recorded.
    """
    size, columns = record["size"], record["columns"]
    tiles: list[NDArray[np.uint8]] = []
    for name, count in record["sheets"]:
        sheet = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
        tiles += [
            sheet[i // columns * size : (i // columns + 1) * size, i % columns * size : (i % columns + 1) * size]
            for i in range(count)
        ]
    pixels = np.stack(tiles)
    for name, tile, expected in zip(names, pixels, record["pixels_sha256"], strict=True):
        if sha256(tile.tobytes()) != expected:
            raise IntegrityError(
                f"the task picture {name!r} does not decode to the recorded pixels; this Pillow reads lossless "
                f"sheets differently or the file was remade, so {AGAIN}"
            )
    return pixels


def _unit(x: NDArray[Any]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    norm = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.where(norm > 0, norm, 1.0)


def read_npz(data: bytes) -> dict[str, NDArray[Any]]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def load_reference(folder: str | Path) -> ReferenceRun:
    """Read and verify a reference folder.

    Raises:
        UsageError: there is none. VersionError: written under a newer schema.
        IntegrityError: a file is missing or changed, the case set is empty, a tap is missing, a value is not finite.
    """
    folder = Path(folder)
    manifest, files = read_recording(folder, KIND, SCHEMA_VERSION, REQUIRED)
    try:
        run = ReferenceRun(folder, manifest, files)
        _check_complete(run)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, (UsageError, IntegrityError)):
            raise
        raise IntegrityError(f"reference {folder.name!r} is incomplete ({error}); {AGAIN}") from error
    return run


def read_recording(
    folder: Path, kind: str, schema: str, required: Sequence[str]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """manifest.json and the bytes of every file that it vouches for.

    kind: of the model that was recorded, "embeddings" or "vlm". schema: that this release reads. required: files that
    have to be there.

    Raises:
        UsageError: there is no recording, or one of another kind of model. VersionError: written under a newer schema.
        IntegrityError: a file is missing or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(
            f"folder {folder.name!r} holds no {MANIFEST}, so there is no reference and nothing was proved; "
            f"give a folder that `{COMMANDS[kind]} record` wrote"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        major, minor = (int(part) for part in str(manifest["schema_version"]).split("."))
        listed = dict(manifest["files"])
        found = str(manifest.get("kind", KIND))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{MANIFEST} of reference {folder.name!r} cannot be read ({error}); {AGAIN}") from error
    if found != kind:
        raise UsageError(
            f"reference {folder.name!r} is of a model of kind {found!r} and {kind!r} is expected; it holds none of the "
            f"answers that would be compared, so give a folder that `{COMMANDS[kind]} record` wrote"
        )
    own_major, own_minor = (int(part) for part in schema.split("."))
    if major != own_major or minor > own_minor:
        raise VersionError(
            f"reference {folder.name!r} has schema {major}.{minor} but this release reads {schema}; its fields "
            "could be misread, so upgrade pocketvlm or record again"
        )
    for name in required:
        if name not in listed:
            raise IntegrityError(f"reference {folder.name!r} does not list {name}; it is incomplete, so {AGAIN}")
    return manifest, {name: _verified(folder, name, entry) for name, entry in listed.items()}


def _verified(folder: Path, name: str, entry: dict[str, Any]) -> bytes:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntegrityError(f"reference {folder.name!r} lists {name!r}, which lies outside its folder; {AGAIN}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"reference {folder.name!r} lacks {name}, which its manifest lists; {AGAIN}") from error
    if sha256(data) != entry["sha256"]:
        raise IntegrityError(
            f"{name} of reference {folder.name!r} has sha256 {sha256(data)[:16]}… but the manifest says "
            f"{entry['sha256'][:16]}…; it was changed after recording, so {AGAIN}"
        )
    return data


def _records(run: ReferenceRun) -> dict[str, list[ImageRecord] | list[TextRecord]]:
    return {"image": run.images, "text": run.texts}


def _check_complete(run: ReferenceRun) -> None:
    """Fail closed: an empty set would pass every comparison, and NaN compares as false with every limit."""
    name, arrays, towers = run.folder.name, run.arrays, _records(run)
    for tower, records in towers.items():
        rows = [record.row for record in records if record.row is not None]
        if not rows or not any(record.real for record in records):
            raise IntegrityError(
                f"reference {name!r} has no {tower} case to compare, which would pass anything; {AGAIN}"
            )
        inputs = arrays["pixels" if tower == "image" else "ids"]
        outputs = (arrays[f"{tower}_raw"], arrays[tower])
        if rows != list(range(len(inputs))) or any(len(value) != len(rows) for value in outputs):
            raise IntegrityError(f"reference {name!r} has {tower} cases without recorded inputs or outputs; {AGAIN}")
        taps, statistics = run.taps[tower]
        if not taps or statistics.shape != (len(rows), len(taps), len(STATISTICS)):
            raise IntegrityError(f"reference {name!r} misses {tower} taps for some case or block; {AGAIN}")
        for what, values in (("output", outputs[0]), ("output", outputs[1]), ("tap", statistics)):
            if not np.isfinite(values).all():
                raise IntegrityError(f"reference {name!r} has a non-finite {tower} {what}; the model itself is broken")
        if statistics[:, :, -2:].any():
            raise IntegrityError(
                f"reference {name!r} saw NaN or Inf inside the {tower} tower; the model itself is broken"
            )
    if not (np.isfinite(run.task.image).all() and np.isfinite(run.task.text).all()):
        raise IntegrityError(f"reference {name!r} has a non-finite task embedding; the model itself is broken")
    if not run.task.uids or not run.task.positives.any(axis=1).all():
        raise IntegrityError(f"reference {name!r} has no task, or a picture without its text; {AGAIN}")
