"""Generative students on disk: safetensors weights in files of bounded size, tokenizer.json, vlm.json with hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

import pocketvlm
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.students.io import verified_bytes
from pocketvlm.students.vlm.config import parse_vlm_config
from pocketvlm.students.vlm.model import Vlm, build_vlm

SCHEMA_VERSION = "1.0"
MANIFEST, TOKENIZER = "vlm.json", "tokenizer.json"
_FILE_BYTES = 14_000_000


def save_vlm(
    model: Vlm,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = _FILE_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write weights-N.safetensors, tokenizer.json and, last, vlm.json.

    Args:
        dtype: of floating-point weights on disk; they are read back as float32. file_bytes: of one file of weights at
            most, unless one tensor is larger.

    Raises:
        UsageError: the folder holds something already and `overwrite` is False.
    """
    folder = Path(folder)
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"folder {str(folder)!r} is not empty; its files would be replaced, so pass overwrite or choose another "
            "folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # an old manifest must never stand beside new weights
    (folder / MANIFEST).unlink(missing_ok=True)
    files = {TOKENIZER: model.tokenizer.json}
    for number, part in enumerate(_parts(model, dtype, file_bytes), start=1):
        files[f"weights-{number}.safetensors"] = save_tensors(part)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kit_version": pocketvlm.__version__,
        "config": model.config.model_dump(mode="json"),
        "parameters": sum(value.numel() for value in model.parameters()),
        "files": {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in files.items()},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    return folder


def _parts(model: Vlm, dtype: torch.dtype, limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in model.state_dict().items():
        value = value.detach().cpu().contiguous()
        value = value.to(dtype) if value.is_floating_point() else value
        size = value.numel() * value.element_size()
        if parts[-1] and used + size > limit:
            parts.append({})
            used = 0
        parts[-1][name] = value
        used += size
    return parts


def load_vlm(folder: str | Path) -> Vlm:
    """Read what `save_vlm` wrote: float32, in eval mode, on the CPU.

    Raises:
        UsageError: no generative student there. VersionError: written by a newer release.
        IntegrityError: a file is missing or not what the manifest says, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"folder {str(folder)!r} holds no {MANIFEST}; there is no generative student to load, so give a folder "
            "that save_vlm wrote"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = str(manifest["schema_version"])
        files = {name: verified_bytes(folder, name, row["sha256"]) for name, row in manifest["files"].items()}
        values: dict[str, Any] = manifest["config"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(
            f"{MANIFEST} in {str(folder)!r} is damaged ({error}); restore it from the original save"
        ) from error
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise VersionError(
            f"student {str(folder)!r} has schema {version} but this release reads {SCHEMA_VERSION}; fields could be "
            "misread, so upgrade pocketvlm or save the student again"
        )
    config = parse_vlm_config(values, source=f"saved student {str(folder)!r}")
    model = build_vlm(config, files[TOKENIZER], load_weights=False)
    state = {name: value for file in files if file != TOKENIZER for name, value in load_tensors(files[file]).items()}
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or [name for name in own if own[name].shape != state[name].shape]
    if odd:
        raise IntegrityError(
            f"weights in {str(folder)!r} do not fit the configuration beside them (first at {odd[0]!r}); the model "
            "would be another one, so restore all files from the same save"
        )
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})
    return model.eval()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
