"""Every shipped recipe trains: two steps of it on a toy world, with all of its objectives, schedules and starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from distill_toys import TINY_STUDENT

from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import list_recipes, load_recipe
from pocketvlm.distill.run_folder import read_metrics

NAMES = [row["name"] for row in list_recipes()]


def _small(name: str, world: Path, cache: Path) -> list[str]:
    """Overrides that keep what a recipe is about and change how much of it there is."""
    recipe = load_recipe(name)
    found = [
        f"data.train={world}?check=none", f"data.eval={world}?check=none&limit=12", "views.count=1",
        "student.name=mnv4-035", "student.fit_views=1", "tokenizer.source=texts", "train.steps=2", "train.batch_size=8",
        "train.warmup_steps=1", "train.threads=1", "train.log_every=1",
    ]  # fmt: skip
    found += [f"student.overrides.{part}={value}" for part, value in TINY_STUDENT.items()]
    if recipe.data.words is not None:
        found.append("data.words={name: wordfreq-en, size: 60}")
    if recipe.data.parallel is not None:
        table = cache.parent / "pairs.tsv"
        table.write_text("rotes ding\tred thing\tde\nrouge\tred\tfr\n", encoding="utf-8")
        found += [f"data.parallel.sources=['table:{table}']", "tokenizer.added_pieces=200"]
    if recipe.teacher is not None:
        found += ["teacher.spec=toy", f"teacher.cache={cache}"]
    if recipe.train.text_pretrain_steps:
        found.append("train.text_pretrain_steps=1")
    if recipe.train.text_batch:
        found.append("train.text_batch=8")
    if isinstance(recipe.train.bank, int):
        found.append("train.bank=16")
    for place, spec in enumerate(recipe.objectives):
        if spec.schedule_steps is not None:
            found.append(f"objectives.{place}.schedule_steps=2")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_shipped_recipe(
    name: str, world: Path, teacher_cache: Path, toy_teacher: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(name, _small(name, world, teacher_cache))
    result = distill_run(recipe, tmp_path / "run", progress=False)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["phase"] for row in rows] == ["texts"] * recipe.train.text_pretrain_steps + ["pairs"] * 2
    terms = {key.removeprefix("loss/") for row in rows for key in row if key.startswith("loss/")}
    for spec in recipe.objectives:
        inner: Any = spec.options.get("inner", {})
        own = inner.get("name", spec.name)
        assert any(term.startswith(own) for term in terms), f"{own} gave none of {sorted(terms)}"
    assert result.steps == len(rows)


def test_a_published_method_names_its_paper() -> None:
    ours = {"clip", "openmoji", "openmoji-no-teacher", "openmoji-text", "quick"}
    published = {row["name"]: row["description"] for row in list_recipes() if row["name"] not in ours}
    assert len(published) >= 10
    assert [name for name, text in published.items() if not re.search(r"\b2\d{3}\.\d{5}\b", text)] == []
