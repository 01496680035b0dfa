"""One writer at a time: a lock that falls with its process."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from pocketvlm.edge.errors import UsageError

LOCK = "writer.lock"


class NotWritableError(UsageError):
    """Somebody else writes to this index now, or this process never may; it can be searched all the same."""


@contextlib.contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of an index. It is sqlite's own lock of a file, which works between processes on every system and
    between two objects of one process.

    Raises:
        NotWritableError: it is held, or it cannot be.
    """
    lock: sqlite3.Connection | None = None
    try:
        lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None, check_same_thread=False)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.DatabaseError as error:
        if lock is not None:
            lock.close()
        if "locked" in str(error):
            raise NotWritableError(
                f"index {str(folder)!r} is being written by another process or object, and one writer is allowed at a "
                "time; rows of two would overwrite each other, so try again when it has finished (searching works "
                "meanwhile)"
            ) from error
        raise not_writable(folder, error) from error
    try:
        yield
    finally:
        lock.close()


def not_writable(folder: Path, error: Exception) -> NotWritableError:
    """What to say when sqlite refuses: permissions, a full disk."""
    return NotWritableError(
        f"index {str(folder)!r} cannot be written to ({error}) and adding, removing and saving need that; nothing of "
        "this call was kept and it can still be searched, so look at its permissions and the space on its disk"
    )
