"""What lies in an index folder, and the order in which it is written: a kill at any moment loses no committed row.

    index.sqlite         the truth (WAL): which rows exist, their keys and metadata, what the other files hold
    vectors-N.bin        rows, appended; bytes past the last committed row mean nothing and are written over
    cache-G.*            the graph (`index_graph`) or binary codes (`index_binary`); lost or damaged, made again
    writer.lock          held by the one process that writes (`index_lock`)

An add writes its rows behind the last committed one, syncs the file, and then commits their numbers, keys and metadata
in one sqlite transaction. Readers take a snapshot of sqlite; rows are never changed in place, so theirs stay as they
were.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge import index_filter
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.edge.index_lock import not_writable, writer_lock

SCHEMA = "1.0"
DATABASE = "index.sqlite"
APPLICATION = 0x50564C4D  # "PVLM"
_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE rows (row INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, metadata TEXT NOT NULL);
CREATE TABLE dead (row INTEGER PRIMARY KEY);
CREATE TABLE blocks (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE files (path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, digest TEXT, problem TEXT) WITHOUT ROWID;
CREATE INDEX files_by_digest ON files (digest);
{index_filter.TABLES}
"""
_FACTS = {"schema", "space_id", "dim", "dtype", "generation", "rows", "part", "cache"}
BLOCK = 16_384  # rows that are read together


@dataclass(frozen=True)
class State:
    """A committed state. rows: numbers below it are taken. part: which vectors file. dead: removed rows, ascending.

    cache: what `index_cache.publish` told of the graph or codes, None where there are none.
    """

    generation: int
    rows: int
    part: int
    cache: dict[str, Any] | None
    dead: NDArray[np.int64] = field(repr=False)

    @property
    def live(self) -> int:
        """How many rows there are to find."""
        return self.rows - len(self.dead)


class Store:
    """An open index folder: sqlite, rows and the writer's lock. One connection; callers serialise their calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db = _connect(folder)
        facts = self._meta()
        self.space_id: str = facts["space_id"]
        self.dim: int = facts["dim"]
        self.dtype: str = facts["dtype"]
        # int8 rows carry their own scale, so that a row of small numbers keeps its seven bits
        self._layout = (
            np.dtype([("scale", "<f4"), ("codes", "i1", (self.dim,))])
            if self.dtype in ("int8", "binary")
            else np.dtype([("codes", {"f32": "<f4", "f16": "<f2"}[self.dtype], (self.dim,))])
        )
        self._writing = False
        self._state: State | None = None
        self._opened: tuple[int, int] | None = None
        self._map: NDArray[Any] = np.empty(0, self._layout)
        self._file: BinaryIO | None = None

    @classmethod
    def create(cls, folder: Path, space_id: str, dim: int, dtype: str) -> Store:
        """Make the folder and its empty database; the database appears whole or not at all."""
        part = folder / f"{DATABASE}.{os.getpid()}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.unlink(missing_ok=True)
            part.touch()
        except OSError as error:
            raise UsageError(
                f"an index cannot be made in {str(folder)!r} ({error.strerror}) and a folder to write to is expected; "
                "nothing could be kept, so name another place"
            ) from error
        db = sqlite3.connect(part, isolation_level=None)
        db.executescript(f"PRAGMA application_id = {APPLICATION}; BEGIN; {_TABLES} COMMIT;")
        facts = {"schema": SCHEMA, "space_id": space_id, "dim": dim, "dtype": dtype}
        facts |= {"generation": 0, "rows": 0, "part": 0, "cache": None}
        db.executemany("INSERT INTO meta VALUES (?, ?)", [(name, json.dumps(value)) for name, value in facts.items()])
        db.close()
        os.replace(part, folder / DATABASE)
        _sync_folder(folder)
        return cls(folder)

    def close(self) -> None:
        """Let go of the files."""
        self._map = np.empty(0, self._layout)
        if self._file is not None:
            self._file.close()
        self.db.close()

    # --- reading --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[State]:
        """One consistent state for everything that is read inside; may be nested.

        Raises:
            IntegrityError: a file is shorter than what was committed.
        """
        if self.db.in_transaction:
            yield self.state()
            return
        for attempts_left in (2, 1, 0):
            self.db.execute("BEGIN")
            try:
                state = self.state()
                if not attempts_left or state.cache is None or (self.folder / state.cache["file"]).exists():
                    break
            except IntegrityError:
                if not attempts_left:
                    self.db.execute("ROLLBACK")
                    raise
            # a writer may have replaced the files since the snapshot: then the next one names the new ones
            self.db.execute("ROLLBACK")
        try:
            yield state
        except sqlite3.DatabaseError as error:
            raise _damaged(f"{DATABASE} cannot be read ({error})") from error
        finally:
            self.db.execute("ROLLBACK")

    def state(self) -> State:
        """The state that this connection's transaction sees; its files are opened when it is new."""
        facts = self._meta()
        if self._state is None or self._state.generation != facts["generation"]:
            dead = np.fromiter((row for (row,) in self.db.execute("SELECT row FROM dead ORDER BY row")), np.int64)
            found = State(facts["generation"], facts["rows"], facts["part"], facts["cache"], dead)
            if self._opened != (found.part, found.rows):
                self._open_files(found)
            self._state = found
        return self._state

    def fact(self, name: str) -> Any:
        """A remembered JSON value, None where there is none (`set_fact`)."""
        found = self.db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def rows_at(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows by number: float32 [N, dim], normalised but for the rounding of their dtype.

        Of dtype "binary" they are read, not mapped, so that only the codes stay in memory.
        """
        self.state()
        if self.dtype != "binary":
            return self._decode(self._map[numbers])
        rows = np.empty(len(numbers), self._layout)
        for place, number in enumerate(numbers.tolist()):
            self._read(number, rows[place : place + 1])
        return self._decode(rows)

    def blocks(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows `first` to `last` in order, with the number of each block's first row; dead ones too."""
        last = self.state().rows if last is None else last
        for at in range(first, last, BLOCK):
            yield at, self._decode(self._slice(at, min(at + BLOCK, last)))

    def int8_blocks(self, first: int, last: int) -> Iterator[tuple[int, NDArray[np.int8]]]:
        """As `blocks`, rounded to int8 with each row's own scale, which a cosine does not see."""
        for at in range(first, last, BLOCK):
            some = self._slice(at, min(at + BLOCK, last))
            yield at, (some["codes"] if "scale" in (some.dtype.names or ()) else to_int8(self._decode(some))[1])

    def keys_of(self, numbers: Sequence[int]) -> dict[int, tuple[str, str]]:
        """Row number -> key and metadata as JSON, of rows that live."""
        found: dict[int, tuple[str, str]] = {}
        for at in range(0, len(numbers), 500):
            some = numbers[at : at + 500]
            marks = ",".join("?" * len(some))
            for row, key, metadata in self.db.execute(
                f"SELECT row, key, metadata FROM rows WHERE row IN ({marks})", some
            ):
                found[row] = (key, metadata)
        return found

    def rows_of(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        """Key -> row number and metadata as JSON; keys that are not there are left out."""
        found: dict[str, tuple[int, str]] = {}
        for at in range(0, len(keys), 500):
            some = keys[at : at + 500]
            marks = ",".join("?" * len(some))
            for row, key, metadata in self.db.execute(
                f"SELECT row, key, metadata FROM rows WHERE key IN ({marks})", some
            ):
                found[key] = (row, metadata)
        return found

    def verify(self) -> None:
        """Read everything that is committed and compare it with its checksums.

        Raises:
            IntegrityError: naming the first file that differs.
        """
        with self.snapshot() as state:
            told = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if told != "ok":
                raise _damaged(f"{DATABASE} is inconsistent ({told})")
            at = 0
            for first, count, crc in self.db.execute("SELECT first, count, crc FROM blocks ORDER BY first"):
                if first != at or zlib.crc32(self._slice(first, first + count).tobytes()) != crc:
                    raise _damaged(f"rows {first:,} to {first + count:,} differ from their checksum")
                at = first + count
            if at != state.rows:
                raise _damaged(f"{at:,} of {state.rows:,} rows have a checksum")

    # --- writing --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the writer; may be nested. Files that a killed writer left are removed first.

        Raises:
            NotWritableError: another process or another index object writes, or the folder cannot be written to.
        """
        if self._writing:
            yield
            return
        with writer_lock(self.folder):
            self._writing = True
            try:
                self._sweep()
                yield
            finally:
                self._writing = False

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is committed together, as a new generation, or not at all. The writer's alone."""
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE name = 'generation'")
            self.db.execute("COMMIT")
        except BaseException as error:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise not_writable(self.folder, error) from error
            raise
        finally:
            self._state = None

    def set_fact(self, name: str, value: Any) -> None:
        """Remember a JSON value, inside a transaction."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def append(self, rows: NDArray[np.float32]) -> int:
        """Write normalised rows behind the last one, durably, inside a transaction; the number of the first."""
        state = self.state()
        raw = self._encode(rows).tobytes()
        _write_at(self._path(state.part), state.rows * self._layout.itemsize, raw)
        self.db.execute("INSERT INTO blocks VALUES (?, ?, ?)", (state.rows, len(rows), zlib.crc32(raw)))
        self.set_fact("rows", state.rows + len(rows))
        self._state = None
        return state.rows

    def insert(self, first: int, keys: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Name rows that were appended, inside the same transaction."""
        self.db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?)",
            (
                (first + place, key, json.dumps(facts, ensure_ascii=False))
                for place, (key, facts) in enumerate(zip(keys, metadata))
            ),
        )
        index_filter.insert_facts(self.db, [(first + place, facts) for place, facts in enumerate(metadata)])

    def kill(self, rows: Sequence[tuple[int, str]]) -> None:
        """Forget rows, given with their metadata as JSON, inside a transaction; their bytes stay until `rewrite`."""
        index_filter.delete_facts(self.db, rows)
        numbers = [(row,) for row, _ in rows]
        self.db.executemany("DELETE FROM rows WHERE row = ?", numbers)
        self.db.executemany("INSERT INTO dead VALUES (?)", numbers)
        self._state = None

    def relabel(self, changes: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Give rows, each named by its key, another key and metadata, inside a transaction."""
        found = self.rows_of([key for key, _, _ in changes])
        index_filter.delete_facts(self.db, list(found.values()))
        self.db.executemany("DELETE FROM rows WHERE row = ?", ((row,) for row, _ in found.values()))
        for key, new, metadata in changes:
            self.insert(found[key][0], [new], [metadata])

    def rewrite(self) -> None:
        """Copy the rows that live into new files, so that nothing of the removed ones is left on disk."""
        state = self.state()
        keep = np.setdiff1d(np.arange(state.rows), state.dead, assume_unique=True)
        checksums = []
        for at in range(0, len(keep), BLOCK):
            some = keep[at : at + BLOCK]
            # read in one go and picked from: those that live lie close together
            raw = self._slice(some[0], some[-1] + 1)[some - some[0]].tobytes()
            _write_at(self._path(state.part + 1), at * self._layout.itemsize, raw)
            checksums.append((at, len(some), zlib.crc32(raw)))
        with self.transaction():
            self.db.execute("CREATE TEMP TABLE moved (old INTEGER PRIMARY KEY, new INTEGER)")
            self.db.executemany("INSERT INTO moved VALUES (?, ?)", ((int(old), new) for new, old in enumerate(keep)))
            # new numbers never exceed old ones, so ascending order meets no number that is still taken
            for old, new in self.db.execute("SELECT old, new FROM moved WHERE old != new ORDER BY old").fetchall():
                self.db.execute("UPDATE rows SET row = ? WHERE row = ?", (new, old))
            self.db.execute("CREATE TEMP TABLE again AS SELECT name, value, new FROM facts JOIN moved ON old = row")
            self.db.execute("DELETE FROM facts")
            self.db.execute("INSERT INTO facts SELECT * FROM again")
            self.db.execute("DROP TABLE moved")
            self.db.execute("DROP TABLE again")
            self.db.execute("DELETE FROM dead")
            self.db.execute("DELETE FROM blocks")
            self.db.executemany("INSERT INTO blocks VALUES (?, ?, ?)", checksums)
            self.set_fact("rows", len(keep))
            self.set_fact("part", state.part + 1)
            self.set_fact("cache", None)
        # what was removed stands in the journal too, until it is merged
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._sweep()

    def publish_cache(self, facts: dict[str, Any]) -> None:
        """Name a cache file that lies there, complete, as the one to use."""
        _sync_folder(self.folder)
        with self.transaction():
            self.set_fact("cache", facts)
        self._sweep()

    def _sweep(self) -> None:
        """Remove files that no committed state names: what a kill or `rewrite` left behind."""
        state = self.state()
        kept = {self._path(state.part).name, (state.cache or {}).get("file")}
        for pattern in ("vectors-*.bin", "cache-*", f"{DATABASE}.*.part"):
            for path in self.folder.glob(pattern):
                if path.name not in kept:
                    with contextlib.suppress(PermissionError):  # Windows keeps a file that a reader has mapped
                        path.unlink(missing_ok=True)

    # --- bytes ----------------------------------------------------------------------------------------------

    def _meta(self) -> dict[str, Any]:
        try:
            found = self.db.execute("SELECT name, value FROM meta").fetchall()
            facts = {name: json.loads(value) for name, value in found}
        except (sqlite3.DatabaseError, ValueError) as error:
            raise _damaged(f"{DATABASE} cannot be read ({error})") from error
        if missing := _FACTS - facts.keys():
            raise _damaged(f"{DATABASE} lacks {', '.join(sorted(missing))}")
        return facts

    def _path(self, part: int) -> Path:
        return self.folder / f"vectors-{part}.bin"

    def _open_files(self, state: State) -> None:
        path = self._path(state.part)
        found, needed = path.stat().st_size if path.is_file() else 0, state.rows * self._layout.itemsize
        if found < needed:
            raise _damaged(f"{path.name} has {found:,} bytes and {state.rows:,} rows need {needed:,}")
        if self._file is not None:
            self._file.close()
            self._file = None
        self._map = np.empty(0, self._layout)
        if state.rows and self.dtype == "binary":
            self._file = path.open("rb", buffering=0)
        elif state.rows:
            self._map = np.memmap(path, self._layout, "r", shape=(state.rows,))
        self._opened = (state.part, state.rows)

    def _slice(self, first: int, last: int) -> NDArray[Any]:
        """Stored rows; of dtype "binary" read, as in `rows_at`."""
        self.state()
        if self.dtype != "binary":
            return np.asarray(self._map[first:last])
        rows = np.empty(last - first, self._layout)
        self._read(first, rows)
        return rows

    def _read(self, first: int, rows: NDArray[Any]) -> None:
        """Fill `rows` from the file, beginning with row `first`."""
        if self._file is None or not len(rows):
            return
        self._file.seek(first * self._layout.itemsize)
        if self._file.readinto(rows.data) != rows.nbytes:  # type: ignore[attr-defined]
            raise _damaged(f"{Path(self._file.name).name} ends within row {first + len(rows):,}")

    def _encode(self, rows: NDArray[np.float32]) -> NDArray[Any]:
        stored = np.empty(len(rows), self._layout)
        if self.dtype in ("int8", "binary"):
            stored["scale"], stored["codes"] = to_int8(rows)
        else:
            stored["codes"] = rows
        return stored

    def _decode(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        rows = stored["codes"].astype(np.float32)
        if self.dtype in ("int8", "binary"):
            rows *= stored["scale"][:, None]
        return rows


def to_int8(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Scale [N] and codes [N, dim] of rows: codes * scale, the largest of each row at 127."""
    scale = np.abs(rows).max(axis=1) / np.float32(127)
    return scale, np.rint(rows / np.maximum(scale, np.float32(1e-30))[:, None]).astype(np.int8)


def _connect(folder: Path) -> sqlite3.Connection:
    path = folder / DATABASE
    if not path.is_file():
        problem = "holds no index" if folder.is_dir() else ("is a file" if folder.exists() else "does not exist")
        raise UsageError(
            f"{str(folder)!r} {problem} and the folder of one is expected; there is nothing to search, so make it with "
            "EmbeddingIndex.create or 'pocketvlm index'"
        )
    uri = path.absolute().as_uri()
    if not os.access(folder, os.W_OK):
        # without a journal to merge the file is as it is; with one, sqlite must see both
        journal = folder / f"{DATABASE}-wal"
        uri += "?mode=ro" if journal.exists() and journal.stat().st_size else "?immutable=1"
    db = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        mine = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION
        found = db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone() if mine else None
        if os.access(folder, os.W_OK):
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")  # what was removed is not left in unused pages
    except sqlite3.DatabaseError as error:
        db.close()
        raise _damaged(f"{DATABASE} cannot be read ({error})") from error
    if found is None:
        db.close()
        raise IntegrityError(
            f"{str(path)!r} is no index of this kit; its tables would be misread, so name another folder"
        )
    if str(json.loads(found[0])).split(".")[0] != SCHEMA.split(".")[0]:
        db.close()
        raise VersionError(
            f"index {str(folder)!r} has schema {json.loads(found[0])} and this release reads {SCHEMA}; its rows could "
            "be misread, so use the release that wrote it or make it again"
        )
    return db


def _damaged(detail: str) -> IntegrityError:
    return IntegrityError(
        f"{detail}; the index was cut short or changed and would give wrong answers, so restore a copy or make it "
        "again from its source"
    )


def _write_at(path: Path, offset: int, raw: bytes) -> None:
    new = not path.exists()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        file.seek(offset)
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
