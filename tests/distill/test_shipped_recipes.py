"""Every shipped recipe trains: two steps of it on a toy world, with all of its objectives, schedules and starts."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from distill_toys import TINY_STUDENT

from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import ObjectiveSection, list_recipes, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.students import build_student, save_student, train_tokenizer

NAMES = [row["name"] for row in list_recipes()]


def _small(name: str, world: Path, cache: Path, start: Path) -> list[str]:
    """Overrides that keep what a recipe is about and change how much of it there is."""
    recipe = load_recipe(name)
    found = [
        f"data.train={world}?check=none", f"data.eval={world}?check=none&limit=12", "views.count=1",
        "student.name=mnv4-035", "student.fit_views=1", "tokenizer.source=texts", "train.steps=2", "train.batch_size=8",
        "train.warmup_steps=1", "train.threads=1", "train.log_every=1",
    ]  # fmt: skip
    found += [f"student.overrides.{part}={value}" for part, value in TINY_STUDENT.items()]
    if recipe.student.init is not None:
        found.append("student.init=null")  # a folder of the user's; test_pruning.py trains one
    if recipe.data.words is not None:
        found.append("data.words={name: wordfreq-en, size: 60}")
    if recipe.data.parallel is not None:
        table = cache.parent / "pairs.tsv"
        table.write_text("rotes ding\tred thing\tde\nrouge\tred\tfr\n", encoding="utf-8")
        found += [f"data.parallel.sources=['table:{table}']", "tokenizer.added_pieces=200"]
    if recipe.teacher is not None:
        # as many as the recipe has, and of texts alone where it has one of these
        maps = any("teacher_tap" in spec.options for spec in recipe.objectives)
        toys = iter(("toy-tokens" if maps else "toy", "toy-other"))
        specs = ["toy-text" if spec == "minilm" else next(toys) for spec in recipe.teacher.specs]
        found += [f"teacher.spec={specs if len(specs) > 1 else specs[0]}", f"teacher.cache={cache}"]
    if recipe.student.fit_text_projection is not None and "teacher.spec=toy-text" in found:
        found.append("student.embed_dim=6")
    if any(spec.name == "region-self" for spec in recipe.objectives):  # which wants a student that knows something
        tokenizer, wide = train_tokenizer(["a red thing"], 64), recipe.student.embed_dim or 8
        student = build_student("mnv4-035", embed_dim=wide, tokenizer_json=tokenizer, overrides=TINY_STUDENT)
        found += [f"student.init={save_student(student, start)}", "student.init_parts=[image_tower]"]
    if recipe.train.text_pretrain_steps:
        found.append("train.text_pretrain_steps=1")
    if recipe.train.text_batch:
        found.append("train.text_batch=8")
    if isinstance(recipe.train.bank, int):
        found.append("train.bank=16")
    if recipe.teacher is not None and recipe.student.overrides.get("dims"):  # the toy teacher has 16 numbers
        found.append("student.overrides.dims=[4, 8]")
        nested = [place for place, spec in enumerate(recipe.objectives) if "dims" in spec.options]
        found += [f"objectives.{place}.options.dims=[4, 8, 16]" for place in nested]
    if recipe.student.overrides.get("exits"):  # and the student's text tower one layer
        found.append("student.overrides.exits=[[1, 4], [1, 8]]")
        nested = [place for place, spec in enumerate(recipe.objectives) if "pairs" in spec.options]
        found += [f"objectives.{place}.options.pairs=[[1, 4], [1, 8]]" for place in nested]
    for place, spec in enumerate(recipe.objectives):
        if spec.schedule_steps is not None:
            found.append(f"objectives.{place}.schedule_steps=2")
    return found


def _term(spec: ObjectiveSection) -> str:
    """What its terms are called in the metrics: by its batch, and by its place where the name is taken."""
    inner: Any = spec.options.get("inner", {})
    return inner.get("name", spec.name) + "(_[a-z0-9-]+)*" + ("@texts" if spec.batch == "texts" else "") + r"(#\d+)?"


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_every_shipped_recipe(
    name: str, world: Path, teacher_cache: Path, toy_teacher: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(name, _small(name, world, teacher_cache, tmp_path / "start"))
    result = distill_run(recipe, tmp_path / "run", progress=False)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["phase"] for row in rows] == ["texts"] * recipe.train.text_pretrain_steps + ["pairs"] * 2
    terms = {key.removeprefix("loss/") for row in rows for key in row if key.startswith("loss/")}
    wanted = Counter(_term(spec) for spec in recipe.objectives)
    for pattern, count in wanted.items():  # two objectives of one name and batch have two terms at least
        assert sum(re.fullmatch(pattern, term) is not None for term in terms) >= count, f"{pattern} in {sorted(terms)}"
    assert result.steps == len(rows)


def test_a_published_method_names_its_paper() -> None:
    ours = {"best", "clip", "openmoji", "openmoji-no-teacher", "openmoji-text", "quick", "text-teacher"}
    published = {row["name"]: row["description"] for row in list_recipes() if row["name"] not in ours}
    assert len(published) >= 10
    assert [name for name, text in published.items() if not re.search(r"\b[12]\d{3}\.\d{4,5}\b", text)] == []
