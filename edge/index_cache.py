"""Files of an index that can be made again from its rows: how they are vouched for, published and opened.

Such a file is written beside the old one, synced, renamed, and then named in the database with its length and
checksums. What it picks is scored again from the stored rows, and rows that came after it are compared one by one.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketvlm.edge.index_store import Store

Progress = Callable[[int, int], None]

_PROBES, _PROBE, _WHOLE = 256, 4096, 64 << 20


class BrokenCacheError(Exception):
    """The file is not what was written; `str()` says how."""


def publish(store: Store, part: Path, name: str, facts: dict[str, Any]) -> None:
    """Make `part`, a complete file, the index's cache under `name`, with what its opener needs to know."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    facts = facts | {"file": name, "bytes": part.stat().st_size, "probe": _probe(part), "crc": _crc(part)}
    os.replace(part, store.folder / name)
    store.publish_cache(facts)


def vouched(store: Store, facts: dict[str, Any], *, whole: bool) -> Path:
    """The file, after a look at its length and at 256 pieces all over it; small files, or with `whole`, at all of it.

    Raises:
        BrokenCacheError: it is missing, cut short or changed. A change between the pieces of a large file goes unseen.
    """
    path = store.folder / facts["file"]
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise BrokenCacheError(f"it has {size:,} bytes instead of {facts['bytes']:,}")
        same = _crc(path) == facts["crc"] if whole or size <= _WHOLE else _probe(path) == facts["probe"]
    except OSError as error:
        raise BrokenCacheError(f"it cannot be read ({error.strerror})") from error
    if not same:
        raise BrokenCacheError("it differs from its checksum")
    return path


def _probe(path: Path) -> str:
    """Digest of 256 pieces of 4 KiB, evenly spread from the first to the last byte."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        for place in range(_PROBES):
            file.seek(max(0, size - _PROBE) * place // (_PROBES - 1))
            digest.update(file.read(_PROBE))
    return digest.hexdigest()


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
