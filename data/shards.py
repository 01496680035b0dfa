"""Which tar shards a stream reads, in which order, and how their bytes are reached.

No index of samples is kept: a shard is a name and a place, and the order is a pure function of (seed, turn), so that
any position of any reader can be found again without reading what came before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import subprocess
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from itertools import product
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.readers.webdataset import expand_braces, find_shards
from pocketvlm.data.splits import stable_hash
from pocketvlm.edge.errors import UsageError, unknown_name

ORDERS = ("shuffled", "sequential", "resampled")
PIPE = "pipe:"
_URLS = ("http://", "https://")
_LISTS = (".txt", ".list")
# in a command other braces belong to the shell
_RANGE = re.compile(r"(\{\d+\.\.\d+\})")
_WORD = re.compile(r"[^\s'\"]+\.tar\b")
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Shard:
    """name: "folder/stem", the beginning of its samples' uids. place: a path, an http(s) URL, or "pipe:COMMAND"."""

    name: str
    place: str


class ShardError(Exception):
    """The bytes of one shard could not be had, or not all of them.

    reason: "unreadable-shard" (it cannot be opened), "failed-pipe" (its command ended with another status than 0) or
    "truncated-archive" (its bytes end too early, or are no tar).
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def list_shards(spec: str | Sequence[str]) -> list[Shard]:
    """The shards that `spec` names, in its order.

    Args:
        spec: one or several of: a path or brace pattern ("shard-{000..099}.tar"), a folder, a glob pattern, a text
            file (.txt, .list) with one of these per line, relative to that file, an http(s) URL, which may have
            braces, or "pipe:COMMAND", whose output is the tar; ranges like {000..099} are expanded in commands too.
            A command runs in the shell (`sh -c`) whenever its shard is read, because the user wrote it.

    Raises:
        UsageError: nothing is named, a path does not exist, or two shards would give their samples the same uids.
    """
    places = [place for one in ([spec] if isinstance(spec, str) else spec) for place in _places(one, Path())]
    if not places:
        raise UsageError(f"{spec!r} names no tar shard, so there is nothing to read; correct the path or the range")
    shards = [Shard(_name(place), place) for place in places]
    seen: dict[str, str] = {}
    for shard in shards:
        if shard.name in seen:
            raise UsageError(
                f"shards {seen[shard.name]} and {shard.place} are both called {shard.name!r}, so their samples could "
                "not be told apart; name each once, or rename a folder"
            )
        seen[shard.name] = shard.place
    return shards


def digest_shards(shards: Sequence[Shard]) -> str:
    """sha256 over the names, in order; where the shards lie may change between two runs, and what they are may not."""
    return hashlib.sha256("\n".join(shard.name for shard in shards).encode()).hexdigest()


def _places(spec: str, base: Path) -> Iterator[str]:
    if spec.startswith(PIPE):
        parts = [expand_braces(part) if _RANGE.fullmatch(part) else [part] for part in _RANGE.split(spec)]
        yield from ("".join(combination) for combination in product(*parts))
    elif spec.startswith(_URLS):
        yield from expand_braces(spec)
    elif "://" in spec:
        raise UsageError(
            f"shard {spec!r} has an address of a kind that is not read, so nothing would come; use http(s), or "
            "'pipe:COMMAND' with the command that prints it"
        )
    elif spec.endswith(_LISTS):
        path = base / spec
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the list of shards {path} cannot be read ({error}); give a text file of names"
            ) from error
        for line in lines:
            if line.strip() and not line.lstrip().startswith("#"):
                yield from _places(line.strip(), path.parent)
    else:
        yield from (str(path) for path in find_shards(str(base / spec)))


def _name(place: str) -> str:
    """Folder and stem of the file, of the URL's path, or of the last .tar that a command names."""
    path = place
    if place.startswith(PIPE):
        words = _WORD.findall(place)
        if not words:
            return f"pipe/{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        path = words[-1]
    path = urlsplit(path).path if "://" in path else os.path.abspath(path)
    file = Path(path)
    return f"{file.parent.name or 'data'}/{file.stem}"


class ShardOrder:
    """Which shard a reader has at its turn 0, 1, 2, …: a pure function of (seed, turn).

    All readers together deal one endless row of shards round robin: reader `slot` of `slots` takes the numbers slot,
    slot + slots, … of the row. Numbers e n to (e + 1) n - 1 are epoch e, a permutation of all n shards ("shuffled"),
    the shards in order ("sequential"), or n drawn with replacement ("resampled"). So in "shuffled" and "sequential"
    every shard is read exactly once in every epoch, by one reader. Where n is not a multiple of `slots`, nobody waits
    and nothing is padded or left out: some readers begin the next epoch one shard before others.
    """

    def __init__(self, shards: int, *, slot: int, slots: int, order: str, seed: int) -> None:
        if order not in ORDERS:
            raise unknown_name("order of shards", order, ORDERS)
        if not 0 <= slot < slots:
            raise UsageError(f"reader {slot} of {slots} does not exist; readers count from 0 to {slots - 1}")
        self.shards, self.slot, self.slots, self.order, self.seed = shards, slot, slots, order, seed

    def number(self, turn: int) -> int:
        """Place of this reader's turn in the endless row of all readers."""
        return turn * self.slots + self.slot

    def shard(self, turn: int) -> tuple[int, int]:
        """Epoch and index of the shard that this reader has at `turn`."""
        number = self.number(turn)
        epoch, place = divmod(number, self.shards)
        if self.order == "sequential":
            return epoch, place
        if self.order == "resampled":
            return epoch, stable_hash(f"shard/{self.seed}/{number}") % self.shards
        return epoch, int(_permutation(self.shards, self.seed, epoch)[place])


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(stable_hash(f"shards/{seed}/{epoch}"))).permutation(size)


class _Source(Protocol):
    def read(self, size: int, /) -> bytes: ...


class ShardBytes:
    """The bytes of one shard from first to last, with an error where they end too early.

    `tarfile` takes an archive that is cut between two members, or has a damaged header, for one that ends there;
    `finish` does not.
    """

    def __init__(self, source: _Source, length: int | None = None, ended: Callable[[], None] | None = None) -> None:
        self._source, self._length, self._ended = source, length, ended
        self._count = self._content = 0

    def read(self, size: int) -> bytes:
        """The next bytes, none at the end.

        Raises:
            ShardError: the connection broke, bytes are missing, or the command failed.
        """
        try:
            data = self._source.read(size)
        except (OSError, HTTPException) as error:
            raise ShardError(f"it breaks off after {self._count} bytes ({error})", "truncated-archive") from error
        if not data and self._ended is not None:
            self._ended()
        if not data and self._length is not None and self._count < self._length:
            raise ShardError(f"only {self._count} of {self._length} bytes came", "truncated-archive")
        if content := len(data.rstrip(b"\0")):
            self._content = self._count + content
        self._count += len(data)
        return data

    def finish(self, end: int) -> None:
        """Read what is left after the archive was read up to byte `end`, where its closing zeros begin.

        Raises:
            ShardError: as `read`, and where there are none, or other bytes after them.
        """
        while self.read(1 << 20):
            pass
        if self._count < end + tarfile.BLOCKSIZE:
            raise ShardError(f"it ends after {self._count} bytes without the end of an archive", "truncated-archive")
        if self._content > end:
            raise ShardError(f"what begins at byte {end} is no member of an archive", "truncated-archive")


@contextlib.contextmanager
def open_shard(shard: Shard) -> Iterator[ShardBytes]:
    """The bytes of a shard, for one sequential reading.

    Raises:
        ShardError: it does not exist, or the server refuses.
    """
    with contextlib.ExitStack() as stack:
        try:
            if shard.place.startswith(PIPE):
                found = stack.enter_context(_command(shard.place.removeprefix(PIPE)))
            elif shard.place.startswith(_URLS):
                response = stack.enter_context(urllib.request.urlopen(shard.place, timeout=_TIMEOUT_S))
                length = response.headers.get("Content-Length")
                found = ShardBytes(response, int(length) if length else None)
            else:
                found = ShardBytes(stack.enter_context(open(shard.place, "rb")))
        except (OSError, HTTPException, ValueError) as error:
            raise ShardError(f"it cannot be opened ({error})", "unreadable-shard") from error
        yield found


@contextlib.contextmanager
def _command(command: str) -> Iterator[ShardBytes]:
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            ["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
        )
        assert process.stdout is not None, "it was asked for"

        def ended() -> None:
            if status := process.wait():
                complaints.seek(0)
                said = complaints.read().decode("utf-8", "replace").strip().splitlines()
                why = f"its command ended with status {status}{f' ({said[-1]})' if said else ''}"
                raise ShardError(why, "failed-pipe")

        try:
            yield ShardBytes(process.stdout, ended=ended)
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
