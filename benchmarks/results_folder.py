"""Where the benchmarks keep their results, and the machine that made them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketvlm.distill.environment import describe_environment
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.students import load_config

RESULTS = Path(__file__).resolve().parent / "results"


def write(name: str, value: Any, folder: Path = RESULTS) -> Path:
    """Write `value` as JSON under the results folder, or another, whole or not at all."""
    return write_text(folder / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks `<!-- NAME:begin -->` and `<!-- NAME:end -->` of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {name}:end -->")
    if not (begin and end):
        raise ValueError(f"{page.name} has no marks of {name!r}")
    write_text(page, f"{before}{begin}{text}{end}{after}")


def machine() -> dict[str, Any]:
    """Versions and processor, and how busy the machine was when it was asked."""
    facts = {key: value for key, value in describe_environment().items() if key != "command"}
    return facts | {"load_average": [round(value, 2) for value in os.getloadavg()]}


def recipe_digest(recipe: str | Mapping[str, Any], changes: Sequence[str], starts: Sequence[str] = ()) -> str:
    """Digest of what a run does: its recipe and student, as far as they are no defaults, and the digests (`starts`) of
    what it starts from. A key that a later release adds does not make a result stale; a changed default does not show.
    """
    loaded = load_recipe(recipe, changes)
    student = load_config(loaded.student.name, loaded.student.overrides)
    facts = [part.model_dump(mode="json", exclude_defaults=True) for part in (loaded, student)]
    for part in facts:
        part.pop("description", None)
    return hashlib.sha256(json.dumps([*facts, *starts], sort_keys=True).encode()).hexdigest()[:16]
