"""One bit for each number of an embedding, and the exact Hamming search over these codes: a cache on disk.

A bit is the sign of a number after the rows' mean is taken away and all is turned by a random rotation (as in ITQ,
Gong et al. 2013, without its optimisation): embeddings of one model share a direction, along which every sign is the
same, and have strong and weak axes, which a sign counts alike. Mean and rotation are in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.index_cache import BrokenCacheError, Progress, publish, vouched
from pocketvlm.edge.index_store import Store

_BLOCK = 16_384  # codes whose distances fit the processor's cache
_SAMPLE = 65_536  # rows that the mean is taken of


class Codes:
    """Opened codes, memory-mapped."""

    def __init__(self, store: Store, facts: dict[str, Any], *, whole: bool = False) -> None:
        """Raises BrokenCacheError where the file is not what was written."""
        path = vouched(store, facts, whole=whole)
        self.rows: int = facts["rows"]
        self._shift, self._turn, start = _head(path, store.dim)
        shape = (self.rows, _width(store.dim))
        if facts["bytes"] != start + shape[0] * shape[1]:
            raise BrokenCacheError(f"it has {facts['bytes']:,} bytes for {self.rows:,} rows")
        self._codes = np.memmap(path, np.uint8, "r", offset=start, shape=shape)

    def pick(self, query: NDArray[np.float32], wanted: int, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The `wanted` likeliest rows where `mask` [rows] holds: of eight times as many with the fewest other bits than
        the query, those whose signs agree best with the query's numbers (asymmetric distances, Gordo et al. 2014).
        """
        turned = _turned(query[None], self._shift, self._turn)
        found = hamming_nearest(self._codes, _pack(turned)[0], mask, 8 * wanted)
        if len(found) <= wanted:
            return found
        signs = np.unpackbits(self._codes[found], axis=1, count=len(query))
        # a sum over set bits orders as one over signs does
        agreement = signs.astype(np.float32) @ turned[0]
        return found[np.argpartition(-agreement, wanted)[:wanted]]


def build_codes(store: Store, old: dict[str, Any] | None, progress: Progress | None) -> None:
    """Make the codes of all committed rows and publish them; `old` is extended until the rows have doubled."""
    state = store.state()
    name = f"cache-{state.generation + 1}.codes"
    part = store.folder / f"{name}.part"
    first, fitted = 0, state.rows
    with part.open("wb") as file:
        if old is not None and state.rows < 2 * old["fitted"]:
            first, fitted = old["rows"], old["fitted"]
            shift, turn, _ = _head(store.folder / old["file"], store.dim)
            with (store.folder / old["file"]).open("rb") as before:
                while block := before.read(1 << 20):
                    file.write(block)
        else:
            shift, turn = _fit(store, state.rows)
            file.write(shift.tobytes() + turn.tobytes())
        for at, rows in store.blocks(first, state.rows):
            file.write(_pack(_turned(rows, shift, turn)).tobytes())
            if progress is not None:
                progress(at + len(rows) - first, state.rows - first)
    publish(store, part, name, {"rows": state.rows, "fitted": fitted})


def hamming_nearest(
    codes: NDArray[np.uint8], query: NDArray[np.uint8], mask: NDArray[np.bool_], count: int
) -> NDArray[np.int64]:
    """Numbers of the `count` rows of `codes` [N, W] nearest to `query` [W] where `mask` holds; equals by number."""
    width, all_pass = codes.shape[1], bool(mask.all())
    word = next(size for size in (8, 4, 2, 1) if width % size == 0)
    words = query.view(f"u{word}")
    beyond = 8 * width + 1
    distances, totals = np.empty(len(codes), np.uint16), np.zeros(beyond + 1, np.int64)
    for at in range(0, len(codes), _BLOCK):
        block = codes[at : at + _BLOCK].view(f"u{word}")
        some = distances[at : at + _BLOCK]
        some[:] = np.bitwise_count(block[:, 0] ^ words[0])
        for column in range(1, len(words)):
            some += np.bitwise_count(block[:, column] ^ words[column])
        if not all_pass:
            some[~mask[at : at + _BLOCK]] = beyond
        totals += np.bincount(some, minlength=beyond + 1)
    radius = int(np.searchsorted(np.cumsum(totals[:beyond]), count))
    if radius == beyond:
        return np.flatnonzero(mask)
    inside = np.flatnonzero(distances < radius)
    return np.concatenate([inside, np.flatnonzero(distances == radius)[: count - len(inside)]])


def _fit(store: Store, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean of evenly spread rows, and a rotation that is the same for every index of a width."""
    sample = store.rows_at(np.linspace(0, rows - 1, min(rows, _SAMPLE)).astype(np.int64))
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(store.dim, store.dim)))
    return sample.mean(axis=0, dtype=np.float32), turn.astype(np.float32)


def _turned(rows: NDArray[np.float32], shift: NDArray[np.float32], turn: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray((rows - shift) @ turn, np.float32)


def _pack(turned: NDArray[np.float32]) -> NDArray[np.uint8]:
    bits = np.packbits(turned > 0, axis=1)
    return np.pad(bits, ((0, 0), (0, _width(turned.shape[1]) - bits.shape[1])))


def _width(dim: int) -> int:
    """Bytes of a code: whole words of 64 bits."""
    return -(-dim // 64) * 8


def _head(path: Path, dim: int) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Mean, rotation, and where the codes begin."""
    numbers = np.fromfile(path, np.float32, dim + dim * dim)
    return numbers[:dim], numbers[dim:].reshape(dim, dim), numbers.nbytes
