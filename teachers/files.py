"""Small file helpers of this room: hashes, atomic writes, and the digest that makes a fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketvlm.edge.contract import ImageSpec

# called from the calling thread as (done, total, what), at least once with done == total
Progress = Callable[[int, int, str], None]


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes) -> str:
    """Write `data` so that `path` holds either its old bytes or all of the new ones; returns the sha256 in hex.

    Data and name are on the disk when it returns: a later file can rely on this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # processes of several machines may write into one folder, and their numbers are alike
    temporary = path.with_name(f".{path.name}.{_machine()}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # Windows cannot open folders and needs no such call
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return hashlib.sha256(data).hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed processes of this machine left there; those of living ones stay."""
    for path in folder.glob(f".*.{_machine()}.*.tmp"):
        number = path.name.split(".")[-3]
        if number.isdigit() and not _lives(int(number)):
            path.unlink(missing_ok=True)


def _machine() -> str:
    return re.sub(r"[^A-Za-z0-9]", "-", platform.node()) or "machine"


def _lives(process: int) -> bool:
    if os.name != "posix":  # where signal 0 is not a mere question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_json(path: Path, value: Any) -> str:
    """`write_atomic` of sorted, indented JSON."""
    return write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values of a state dict, independent of the file it came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.view(-1).view(dtype=torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def make_fingerprint(*, weights: str, image: ImageSpec, tokenizer: str, extra: Mapping[str, Any] | None = None) -> str:
    """A teacher's fingerprint: sha256 over its weights' and tokenizer's digests and its preprocessing.

    extra: whatever else changes an output, such as the logit scale or a cleaning mode (JSON types).
    """
    parts = {
        "weights": weights,
        "image": dataclasses.asdict(image),
        "tokenizer": tokenizer,
        "extra": dict(extra or {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
