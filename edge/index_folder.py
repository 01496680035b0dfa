"""Keeping an index up to date with a folder of pictures, embedding each content once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.index_checks import check_space
from pocketvlm.edge.preprocess import load_image, stack

if TYPE_CHECKING:
    from pocketvlm.edge.index import EmbeddingIndex
    from pocketvlm.edge.model import EdgeModel

SyncProgress = Callable[[int, int], None]

# by name; what Pillow then cannot decode is reported
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
)
_LARGEST = 256 << 20  # bytes of one file
_COMMIT = 256  # files that are committed together at most, embedded or not


@dataclass
class SyncReport:
    """What a sync did. found: pictures under the folder now, by name; each is counted in one of the next seven.

    unchanged; touched: another time, the same content; added; changed: another content under a known name; moved and
    copied: their embedding was there; unreadable: path -> reason, for files that are no pictures, broken or not to be
    read, and beside them for folders that cannot be listed (ending in "/"; what the index holds of them stays).
    removed: rows whose files are gone, or can no longer be read.
    """

    found: int = 0
    unchanged: int = 0
    touched: int = 0
    added: int = 0
    changed: int = 0
    moved: int = 0
    copied: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    removed: int = 0


@dataclass(frozen=True)
class _File:
    """A picture by name. path: under the folder, with "/". size in bytes, modified in nanoseconds."""

    path: str
    size: int
    modified: int

    def metadata(self) -> dict[str, Any]:
        pure = PurePosixPath(self.path)
        folder = pure.parent.as_posix()
        # a damaged file system has files of the year -292 or 60056, which datetime has not
        when = datetime.fromtimestamp(min(max(self.modified / 1e9, 0), 250_000_000_000), UTC)
        return {
            "folder": "" if folder == "." else folder,
            "suffix": pure.suffix.lower(),
            "bytes": self.size,
            "modified": when.isoformat(timespec="seconds")[:19],
            "year": when.year,
        }


def sync_folder(
    index: EmbeddingIndex,
    folder: Path,
    model: EdgeModel,
    *,
    progress: SyncProgress | None = None,
    batch_size: int = 32,
) -> SyncReport:
    """Embed what is new under `folder`, forget what is gone, keep what was moved; then `save`.

    Keys are paths under the folder, with "/". Metadata: folder, suffix, bytes, modified (UTC, as text that sorts) and
    year. Files and folders whose names begin with a dot are left out, links to folders not followed. A file of the same
    size and time is taken as unchanged; any other is compared by content. Each batch is committed: killed or stopped, a
    sync goes on where it was. Other calls on `index` wait meanwhile; another object of the same folder can search.

    Args:
        progress: called with files done and files to do, those that are unchanged not among them.

    Raises:
        UsageError: no such folder; another space, or no image tower; the index holds another folder that is still
            there, or rows of another source; another process is writing.
    """
    check_space(model, index.space_id, index.path)
    if model.contract.image is None:
        raise UsageError(
            f"model {model.contract.name!r} has no image tower and pictures are to be embedded; use one that has"
        )
    root = folder.absolute()
    if not root.is_dir():
        raise UsageError(f"{str(folder)!r} is no folder and one with pictures is expected; there is nothing to index")
    with index._lock, index._store.writing():
        _check_root(index, root)
        sync = _Sync(index, root, model, model.contract.image, batch_size)
        sync.run(progress)
        index.save()
    return sync.report


class _Sync:
    """One run over a folder: what is known, what is there, and the changes that are committed together."""

    def __init__(self, index: EmbeddingIndex, root: Path, model: EdgeModel, spec: ImageSpec, batch_size: int) -> None:
        self.index, self.root, self.model, self.spec, self.batch_size = index, root, model, spec, batch_size
        self.store = index._store
        self.report = SyncReport()
        self.keys = set(index.keys())
        self.known: dict[str, tuple[int, int, str, str | None]] = {
            path: (size, modified, digest, problem)
            for path, size, modified, digest, problem in self.store.db.execute("SELECT * FROM files")
        }
        self.gone: set[str] = set()
        self._empty_batch()

    def _empty_batch(self) -> None:
        self.seen: list[tuple[_File, str, str | None]] = []  # file, digest, problem
        self.fresh: set[str] = set()  # digests whose row this batch makes or renames
        self.pixels: list[NDArray[np.uint8]] = []
        self.to_embed: list[_File] = []
        self.to_relabel: list[tuple[str, _File]] = []  # the key that a row has, and the file that it is now
        self.to_copy: list[tuple[str, _File]] = []
        self.to_drop: list[str] = []

    def run(self, progress: SyncProgress | None) -> None:
        files, hidden = _scan(self.root, self.report)
        unseen = (self.known.keys() | self.keys) - {file.path for file in files}
        self.gone = {path for path in unseen if not any(path.startswith(part) for part in hidden)}
        todo = [file for file in files if not self._unchanged(file)]
        self.report.unchanged = len(files) - len(todo)
        for done, file in enumerate(todo):
            self._look(file)
            if len(self.to_embed) >= self.batch_size or len(self.seen) >= _COMMIT:
                self._commit()
            if progress is not None:
                progress(done + 1, len(todo))
        self._commit()
        # last, so that what was moved could be found
        self.to_drop = sorted(self.gone)
        self.report.removed += len(self.gone & self.keys)
        self._commit()

    def _unchanged(self, file: _File) -> bool:
        # one that could not be read is tried again: what was wrong with it may leave no trace in its time
        size, modified, _, problem = self.known.get(file.path, (None, None, None, None))
        return (size, modified, problem) == (file.size, file.modified, None) and file.path in self.keys

    def _look(self, file: _File) -> None:
        """Decide by its content what a new or touched file asks for."""
        digest, problem, raw = self._read(file)
        if digest in self.fresh:
            self._commit()  # the same content once more: then there is a row to copy
        had_row = file.path in self.keys
        if problem is None and had_row and self._digest_of(file.path) == digest:
            self.to_relabel.append((file.path, file))
            self.fresh.add(digest)
            self.report.touched += 1
        else:
            twin = None if problem else self._twin(file, digest)
            if problem is None and twin is None:
                try:
                    self.pixels.append(load_image(raw, self.spec))
                    self.to_embed.append(file)
                    self.fresh.add(digest)
                    self.report.changed += had_row
                    self.report.added += not had_row
                except BadSampleError as error:
                    problem = str(error)
            elif twin in self.gone:
                self.gone.discard(twin)
                self.to_relabel.append((twin, file))
                self.fresh.add(digest)
                self.report.moved += 1
            elif twin is not None:
                self.to_copy.append((twin, file))
                self.report.copied += 1
            if had_row:
                self.to_drop.append(file.path)
        if problem is not None:
            self.report.unreadable[file.path] = problem
            self.report.removed += had_row
        self.seen.append((file, digest, problem))

    def _digest_of(self, path: str) -> str | None:
        found = self.store.db.execute("SELECT digest FROM files WHERE path = ? AND problem IS NULL", (path,)).fetchone()
        return None if found is None else found[0]

    def _twin(self, file: _File, digest: str) -> str | None:
        """Another key whose row is of the same content, rather one whose file is gone."""
        found = self.store.db.execute(
            "SELECT path FROM files WHERE digest = ? AND problem IS NULL AND path != ?", (digest, file.path)
        )
        # a name that this batch has used may have another row when it is committed
        used = {key for key, _ in self.to_relabel} | {one.path for one, _, _ in self.seen}
        twins = sorted((path not in self.gone, path) for (path,) in found if path in self.keys and path not in used)
        return twins[0][1] if twins else None

    def _read(self, file: _File) -> tuple[str, str | None, bytes]:
        """Digest of the content, what is wrong with it, and the content."""
        if file.size > _LARGEST:
            return "", f"has {file.size:,} bytes, more than the {_LARGEST:,} that are read", b""
        try:
            raw = (self.root / file.path).read_bytes()
        except OSError as error:
            return "", f"cannot be read: {error.strerror}", b""
        return hashlib.blake2b(raw, digest_size=20).hexdigest(), None, raw

    def _commit(self) -> None:
        """Embed and write the batch in one transaction, and begin another."""
        if not self.seen and not self.to_drop:
            return
        store = self.store
        rows = self.model.embed_pixels(stack(self.pixels), batch_size=self.batch_size) if self.pixels else None
        with store.transaction():
            sources = store.rows_of([key for key, _ in self.to_copy])
            copies = store.rows_at(np.array([sources[key][0] for key, _ in self.to_copy], np.int64))
            store.kill(list(store.rows_of(self.to_drop).values()))
            store.relabel([(key, file.path, file.metadata()) for key, file in self.to_relabel])
            for files, some in ((self.to_embed, rows), ([file for _, file in self.to_copy], copies)):
                if files and some is not None:
                    self.index._append([file.path for file in files], some, [file.metadata() for file in files])
            forgotten = [*self.to_drop, *(key for key, _ in self.to_relabel)]
            store.db.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in forgotten))
            store.db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
                ((file.path, file.size, file.modified, digest, problem) for file, digest, problem in self.seen),
            )
        self.keys -= set(forgotten)
        self.keys |= {file.path for file, _, problem in self.seen if problem is None}
        self._empty_batch()


def _check_root(index: EmbeddingIndex, root: Path) -> None:
    before = index._store.fact("root")
    if before not in (None, str(root)) and Path(before).is_dir():
        raise UsageError(
            f"index {str(index.path)!r} holds the pictures of {before!r} and {str(root)!r} was given; their names "
            "would be taken for each other, so make another index for it"
        )
    if before is None and len(index):
        raise UsageError(
            f"index {str(index.path)!r} holds {len(index):,} rows that no folder brought and {str(root)!r} was given; "
            "a picture could have the name of one of them, so make another index for the folder"
        )
    if before != str(root):
        with index._store.transaction():
            index._store.set_fact("root", str(root))


def _scan(root: Path, report: SyncReport) -> tuple[list[_File], list[str]]:
    """Pictures in the order of their paths, and folders that cannot be listed, as beginnings of paths."""
    hidden: list[str] = []
    files: list[_File] = []

    def refused(error: OSError) -> None:
        name = os.path.relpath(error.filename, root).replace(os.sep, "/")
        part = "" if name == "." else f"{name}/"
        hidden.append(part)
        report.unreadable[_shown(part or "./")] = f"cannot be listed: {error.strerror}"

    for name, path in _pictures(root, refused):
        report.found += 1
        try:
            path.encode()
            facts = os.stat(name)
        except UnicodeEncodeError:
            report.unreadable[_shown(path)] = "its name is no UTF-8"
        except OSError as error:
            report.unreadable[path] = f"cannot be read: {error.strerror}"
        else:
            files.append(_File(path, facts.st_size, facts.st_mtime_ns))
    return sorted(files, key=lambda file: file.path), hidden


def _pictures(root: Path, refused: Callable[[OSError], None]) -> Iterator[tuple[str, str]]:
    """Full and relative names."""
    for at, folders, names in os.walk(root, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                full = os.path.join(at, name)
                yield full, os.path.relpath(full, root).replace(os.sep, "/")


def _shown(path: str) -> str:
    """A path whose bytes are no UTF-8, for people."""
    return path.encode(errors="surrogateescape").decode(errors="replace")
