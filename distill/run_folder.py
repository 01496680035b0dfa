"""The run folder: recipe.yaml, environment.json, metrics.jsonl, checkpoints/, student/, eval.json, report.html."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pocketvlm.distill.checkpoint import latest_checkpoint, write_text_atomically
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


def open_run_folder(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Path | None:
    """Make `out` ready; returns the checkpoint to continue from, or None for a fresh start.

    Raises:
        UsageError: the folder is not empty and neither flag was given, `overwrite` of a folder that is not a run,
            `resume` of a folder that is not a run or was made by another recipe.
    """
    if resume and overwrite:
        raise UsageError("--resume keeps a run and --overwrite deletes it; give one of them")
    if out.is_file():
        raise UsageError(f"{out} is a file, and a run needs a folder to write into; name another one")
    if resume:
        return _resume(out, recipe)
    if out.exists() and any(out.iterdir()):
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
        shutil.rmtree(out)
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
        changed = sorted(_differences(before.to_dict(), recipe.to_dict()))
        raise UsageError(
            f"the run in {out} was started with another recipe (differs in {', '.join(changed)}), so a resumed run "
            "would be neither of the two; resume with the same recipe and overrides, or start anew elsewhere"
        )
    return latest_checkpoint(out / CHECKPOINTS)


def _differences(a: Any, b: Any, where: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: set[str] = set()
        for key in a.keys() | b.keys():
            found |= _differences(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
        return found
    return set() if a == b else {where}


class MetricsLog:
    """metrics.jsonl: one JSON object a line. Opening it at a step drops later lines, which a resumed run rewrites."""

    def __init__(self, path: Path, step: int) -> None:
        kept = (
            [row for row in read_metrics(path) if row["step"] <= step and "final" not in row]
            if step and path.exists()
            else []
        )
        write_text_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
