"""The run folder: recipe.yaml, environment.json, metrics.jsonl, checkpoints/, student/, eval.json, report.html."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from pocketvlm.distill.checkpoint import latest_checkpoint, temporaries, write_text_atomically
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.errors import UsageError

RECIPE, ENVIRONMENT, METRICS, CHECKPOINTS, STUDENT, REPORT = (
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "student",
    "report.html",
)


# held while a run writes here (`guards.locked`)
LOCK = "run.lock"


def open_run_folder(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Make `out` ready; returns the checkpoint to continue from, or None for a fresh start.

    `resume` makes a fresh start too, in an empty folder or before the first checkpoint.

    Raises:
        UsageError: the folder is not empty and neither flag was given, `overwrite` of a folder that is not a run,
            `resume` of a folder that is not a run or was made by another recipe.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps a run and --overwrite deletes it; give one of them")
    if out.is_file():
        raise UsageError(f"{out} is a file, and a run needs a folder to write into; name another one")
    halves = temporaries(out)
    there = [path for path in out.iterdir() if path.name != LOCK and path not in halves] if out.exists() else []
    if resume and there:
        checkpoint = _resume(out, recipe)
        for half in (*halves, *temporaries(out / CHECKPOINTS)):
            half.unlink()
        return checkpoint
    if there:
        if not overwrite:
            raise UsageError(
                f"output folder {out} is not empty, and a run would mix its files with those there; name another "
                "folder, or pass --overwrite to replace it, or --resume to continue the run in it"
            )
        if not (out / RECIPE).is_file():
            raise UsageError(
                f"{out} holds files but no {RECIPE}, so it is not a run and --overwrite does not delete it; "
                "name another folder"
            )
        for path in (*there, *halves):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / RECIPE, recipe.to_yaml())
    return None


def save_truncated(source: Path, out: Path, *, text_layers: int | None, dim: int | None, overwrite: bool) -> Path:
    """The smaller student inside the one of a run or student folder (`students.truncated`), in a folder that is used
    like a run: the recipe and environment that it came from stand beside it. Returns the student's folder.

    Raises:
        UsageError: no student there, a pair that it does not promise, or a folder that is not empty.
    """
    from pocketvlm.students import load_student, save_student, truncated

    small = truncated(load_student(source), text_layers=text_layers, dim=dim)
    if not overwrite and out.exists() and any(out.iterdir()):
        raise UsageError(
            f"output folder {out} is not empty, and a student would mix its files with those there; name another "
            "folder, or pass --overwrite"
        )
    saved = save_student(small, out / STUDENT, overwrite=overwrite)
    for name in (RECIPE, ENVIRONMENT):
        if (source / name).is_file():
            write_text_atomically(out / name, (source / name).read_text(encoding="utf-8"))
    return saved


def _resume(out: Path, recipe: Recipe) -> Path | None:
    if not (out / RECIPE).is_file():
        raise UsageError(f"{out} holds no {RECIPE}, so there is no run to resume; start it without --resume")
    before = load_recipe(out / RECIPE)
    if before.digest() != recipe.digest():
        changed = sorted(differences(before.to_dict(), recipe.to_dict()))
        raise UsageError(
            f"the run in {out} was started with another recipe (differs in {', '.join(changed)}), so a resumed run "
            "would be neither of the two; resume with the same recipe and overrides, or start anew elsewhere"
        )
    return latest_checkpoint(out / CHECKPOINTS)


def differences(a: Any, b: Any, where: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in a.keys() | b.keys():
            found |= differences(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
        return found
    return set() if a == b else {where}


class Tracker(Protocol):
    """Where the rows of metrics.jsonl also go. Neither method raises: a tracker that fails says so and falls silent."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops later lines, which a resumed run rewrites.

    A full disk or a read-only folder never stops a run for its metrics: `say` tells it once, the file keeps its whole
    lines, and rows wait in memory (the newest `WAITING`) until one can be written, and then all are. A run that really
    has no room is stopped by its checkpoint, which is written whole or not at all.

    elapsed: `elapsed_s` of the newest line that was kept and has it, else 0. also: each is given every row
    (`distill.trackers`).
    """

    WAITING = 10_000

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        say: Callable[[str], None] = lambda text: None,
        also: Sequence[Tracker] = (),
    ) -> None:
        self._path, self._say, self._also = path, say, also
        kept = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
        kept = [row for row in kept if "final" not in row]
        self.elapsed = next((float(row["elapsed_s"]) for row in reversed(kept) if "elapsed_s" in row), 0.0)
        self._start = "".join(json.dumps(row) + "\n" for row in kept)
        self._file: io.FileIO | None = None
        self._size = self._lost = 0
        self._waiting: deque[bytes] = deque(maxlen=self.WAITING)
        self._failed = False
        self._write()

    def write(self, row: dict[str, Any]) -> None:
        self._lost += len(self._waiting) == self.WAITING
        self._waiting.append((json.dumps(row) + "\n").encode())
        self._write()
        for tracker in self._also:
            tracker.write(row)

    def close(self) -> None:
        """Write what waits, if that is possible now, and say how many rows are lost if it is not."""
        self._write()
        if lost := len(self._waiting) + self._lost:
            self._say(f"{lost} rows of {self._path} could not be written and are lost")
        if self._file is not None:
            self._file.close()
        for tracker in self._also:
            tracker.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                write_text_atomically(self._path, self._start)
                self._file = io.FileIO(self._path, "r+b")
                self._size = len(self._start.encode())
            while self._waiting:
                # from the end of the last whole line: what a failure left of a line is written over
                self._file.seek(self._size)
                data = memoryview(self._waiting[0])
                while data:
                    data = data[self._file.write(data) :]
                self._size += len(self._waiting.popleft())
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):
                    self._file.truncate(self._size)
            if not self._failed:
                why = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
                self._say(
                    f"{self._path} could not be written because {why}; training goes on, and its rows are written as "
                    "soon as there is room: free some space, or the next checkpoint will fail and stop the run"
                )
            self._failed = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
