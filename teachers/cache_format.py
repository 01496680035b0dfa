"""The on-disk form of a teacher cache: its manifest, its shards, and the checks that refuse a wrong one."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, VersionError
from pocketvlm.teachers.files import sha256_file, write_atomic, write_json

# 1.1: token maps; 1.2: the drawn parameters of every view, and shards named by the data shard that they are of;
# 1.3: the largest logits over a list of texts
SCHEMA_VERSION = "1.3"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CacheWriteError(PocketvlmError, OSError):
    """A file of a cache could not be written; the shards written before are whole."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a cache was made from; two caches with equal fields hold the same numbers.

    policy: the augmentation policy's fields, or None for plain preprocessing only. dim / feature_dim /
    text_feature_dim: widths D, F and G (0 where the teacher has no such features). token_grid / token_dim: places in a
    row of the kept token maps, and their width W (0 where none are kept). top_logits: how many of the largest logits
    over a list of texts are kept; logit_count, logit_texts: how many texts these are, and their digest.
    samples / texts: digests of the uids and of the texts, in order.
    """

    name: str
    fingerprint: str
    space_id: str
    dim: int
    feature_dim: int
    text_feature_dim: int
    logit_scale: float
    logit_bias: float
    image: ImageSpec | None
    views: int
    policy: dict[str, Any] | None
    seed: int
    dtype: Literal["float32", "bfloat16"]
    shard_size: int
    samples: str
    texts: str
    licences: tuple[tuple[str, str, str], ...]
    token_grid: int = 0
    token_dim: int = 0
    top_logits: int = 0
    logit_count: int = 0
    logit_texts: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> CacheInfo:
        """Inverse of `to_dict`."""
        value = dict(value)
        if value["image"] is not None:
            image: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value["image"].items()}
            value["image"] = ImageSpec(**image)
        value["licences"] = tuple((row[0], row[1], row[2]) for row in value["licences"])
        return cls(**value)


def write_manifest(
    folder: Path,
    info: CacheInfo,
    *,
    shards: list[dict[str, Any]],
    text_shards: list[dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """Write `cache.json`, which makes the folder a finished cache."""
    value = {
        "schema_version": SCHEMA_VERSION,
        "kind": "teacher-cache",
        "info": info.to_dict(),
        "shards": shards,
        "text_shards": text_shards,
        "skipped": skipped,
    }
    save_json(folder / "cache.json", value)


def save_json(path: Path, value: Any) -> None:
    """`files.write_json`; a full or unwritable disk is a CacheWriteError."""
    try:
        write_json(path, value)
    except OSError as error:
        raise _write_error(path, error) from error


def write_shard(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> str:
    """Write one shard atomically; returns its sha256. Equal inputs give equal bytes.

    Raises:
        CacheWriteError: the disk is full or not writable; no part of the shard is left there.
    """
    # one metadata key: the safetensors writer does not keep the order of several
    text = json.dumps(meta, sort_keys=True, ensure_ascii=False)
    data = save_tensors({k: v.contiguous() for k, v in tensors.items()}, {"pocketvlm": text})
    try:
        return write_atomic(path, data)
    except OSError as error:
        raise _write_error(path, error, len(data)) from error


def _write_error(path: Path, error: OSError, size: int = 0) -> CacheWriteError:
    why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or str(error))
    what = f"{path} ({size / 1e6:.1f} MB)" if size else str(path)
    return CacheWriteError(
        f"{what} of a teacher cache could not be written because {why}; nothing half-written is left and the shards "
        "before it are whole, so make room (or name a folder that can be written) and start the same command again, "
        "which goes on from there"
    )


def digest_names(names: Sequence[str]) -> str:
    """Order-sensitive digest of uids or texts."""
    return hashlib.sha256(json.dumps(list(names), ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def read_meta(path: Path) -> dict[str, Any]:
    """A shard's own metadata: "uids", "bytes_sha256" and "skipped", or "texts"; all of them for one data shard.

    Raises:
        IntegrityError: not a readable shard.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            return json.loads(handle.metadata()["pocketvlm"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"cache shard {path} cannot be read ({error}); delete its folder, rebuild it") from error


def check_shard(path: Path, expected: str) -> None:
    """Raises IntegrityError where the file is missing or its sha256 is not `expected`."""
    if not path.exists():
        raise IntegrityError(
            f"cache shard {path} is listed in cache.json but missing; delete the folder and rebuild it"
        )
    found = sha256_file(path)
    if found != expected:
        raise IntegrityError(
            f"cache shard {path} has sha256 {found[:16]}… but cache.json says {expected[:16]}…, so its rows cannot be "
            "trusted; delete the folder and rebuild it"
        )


def check_version(folder: Path, manifest: dict[str, Any]) -> None:
    """Same major version, and a minor version that this release knows; otherwise raises VersionError."""
    found = str(manifest.get("schema_version", "none"))
    major, _, minor = found.partition(".")
    ours = SCHEMA_VERSION.split(".")
    if major != ours[0] or not minor.isdigit() or int(minor) > int(ours[1]):
        raise VersionError(
            f"{folder} is a teacher cache of schema {found} and this release reads {SCHEMA_VERSION}; "
            "upgrade pocketvlm or rebuild the cache"
        )


def refuse_difference(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises IntegrityError that names all of `wanted`'s fields, and theirs, that `found` does not have equal."""
    names = {
        "samples": "set of images",
        "texts": "set of texts",
        "fingerprint": "teacher fingerprint",
        "image": "preprocessing",
        "logit_count": "number of texts of the logits",
        "logit_texts": "texts of the logits",
    }
    differing: dict[str, tuple[Any, Any]] = {}
    for key in wanted:
        have, want, name = found.get(key), wanted[key], names.get(key, key)
        if isinstance(have, dict) and isinstance(want, dict):
            parts = [*have, *(part for part in want if part not in have)]
            differing |= {f"{name}.{p}": (have.get(p), want.get(p)) for p in parts if have.get(p) != want.get(p)}
        elif have != want:
            differing[name] = (have, want)
    if differing:
        # the fingerprint covers weights, preprocessing and tokenizer: what lies under it says more
        order = sorted(
            differing, key=lambda name: (not name.startswith("preprocessing"), name != "teacher fingerprint")
        )
        (have, want), *_ = (differing[name] for name in order)
        others = "; ".join(f"{name} {differing[name][0]!r}, not {differing[name][1]!r}" for name in order[1:6])
        more = f" (also: {others}{'; …' if len(order) > 6 else ''})" if others else ""
        raise IntegrityError(
            f"cache {folder} has {order[0]} {have!r} but {want!r} was expected{more}; its rows would be wrong here, so "
            "use another folder or delete this one"
        )
