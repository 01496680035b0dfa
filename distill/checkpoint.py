"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is `step-00000100.pt` with `step-00000100.pt.sha256` beside it. It is written to a temporary
file, synced, and renamed, so that a file under its final name is complete. The hash is checked on load, and
`weights_only=True` keeps a checkpoint from running code.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError

# of what `Trainer.state` holds
SCHEMA = 3
_TEMPORARY = re.compile(r"^\..+\.\d+\.tmp$")
_NAME = re.compile(r"^step-(\d{8})\.pt$")


class CheckpointWriteError(PocketvlmError, OSError):
    """A checkpoint could not be written; the checkpoints written before are intact."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` (tensors and plain Python values) as the checkpoint of `step`; drop all but the newest `keep`.

    Raises:
        CheckpointWriteError: the disk is full or not writable. What was there before stays valid.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    path = folder / f"step-{step:08d}.pt"
    digest = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # both are on the disk before either gets its name; the hash is named first, because a kill between
        # the two renames then leaves a hash without a file, which is ignored
        for target, content in ((_sidecar(path), digest), (path, data)):
            written.append(_temporary(target))
            _write_and_sync(written[-1], content)
        os.replace(written[0], _sidecar(path))
        os.replace(written[1], path)
        _sync_folder(folder)
    except OSError as error:
        for temporary in written:
            if temporary.parent == folder:
                temporary.unlink(missing_ok=True)
        why = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        before = latest_checkpoint(folder)
        kept = f"{before.name} is intact" if before else "there is no earlier one"
        raise CheckpointWriteError(
            f"the checkpoint of step {step} ({len(data) / 1e6:.1f} MB) could not be written to {folder} because "
            f"{why}; {kept}: free some space and continue with --resume"
        ) from error
    for _, old in _all(folder)[:-keep]:
        old.unlink(missing_ok=True)
        _sidecar(old).unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, its hash checked first.

    Raises:
        UsageError: no such file. IntegrityError: the hash is missing or differs.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"checkpoint {path} cannot be read ({error.strerror}); give one that exists, or start anew with --overwrite"
        ) from error
    try:
        expected = _sidecar(path).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError) as error:
        raise IntegrityError(
            f"checkpoint {path} has no readable {_sidecar(path).name}, so it cannot be told whether it is whole; "
            "delete it to continue from the one before"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise IntegrityError(
            f"checkpoint {path} has sha256 {found[:16]}… but {expected[:16]}… was written, so it was damaged; "
            "delete it to continue from the one before"
        )
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def check_origin(state: Mapping[str, Any], path: Path, *, recipe: str, inputs: str) -> None:
    """Whether a run with these digests may go on from `state`, which lay at `path`.

    Raises:
        IntegrityError: it was made by another release, recipe, data, tokenizer or teacher.
    """
    if state.get("schema") != SCHEMA:
        raise IntegrityError(
            f"checkpoint {path} has schema {state.get('schema')} and this release writes and reads {SCHEMA}, so it "
            "cannot be continued here; finish that run with the release that began it, or start anew with --overwrite"
        )
    for key, own in (("recipe", recipe), ("inputs", inputs)):
        if state[key] != own:
            what = {"recipe": "recipe", "inputs": "data, texts, tokenizer or teacher"}[key]
            raise IntegrityError(
                f"checkpoint {path} was made with another {what}, so continuing would mix two runs; restore what "
                "it was made with, or start anew with --overwrite"
            )


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`, or None."""
    found = _all(folder)
    return found[-1][1] if found else None


def step_of(checkpoint: Path) -> int:
    """How many steps were done when it was saved, by its name."""
    return int(checkpoint.stem.rpartition("-")[2])


def write_text_atomically(path: Path, text: str) -> None:
    """Replace a small text file so that a reader sees the old or the new one, never half of it."""
    temporary = _temporary(path)
    try:
        _write_and_sync(temporary, text.encode("utf-8"))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def temporaries(folder: Path) -> list[Path]:
    """Half-written files of a process that was killed; nobody else may be writing there."""
    return [path for path in folder.iterdir() if _TEMPORARY.match(path.name)] if folder.is_dir() else []


def _all(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    matches = ((_NAME.match(path.name), path) for path in folder.iterdir())
    return sorted((int(match.group(1)), path) for match, path in matches if match and _sidecar(path).exists())


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _write_and_sync(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # a rename is durable only once its folder is; Windows cannot open folders and needs no such call
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
