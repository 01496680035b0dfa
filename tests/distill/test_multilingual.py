"""Runs with parallel texts: who reads which text, and what a student in other languages is taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distill_toys import DIM, NAMES, ToyTeacher, toy_recipe

from pocketvlm.distill.batches import Order
from pocketvlm.distill.feed import Feed
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import UsageError

SWAPPED = {name: name[::-1] for name in NAMES}


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, tmp_path: Path, toy_teacher: None) -> list[object]:
    """A toy recipe whose pictures are named in English and in a language that spells it backwards."""
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    for row in rows:
        row["image"] = str(world.parent / row["image"])
        row["caption"] = [
            {"text": f"{row['label']} thing", "language": "en"},
            {"text": f"gniht {SWAPPED[row['label']]}", "language": "xx"},
        ]
    data = tmp_path / "two.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{SWAPPED[name]}\t{name}\txx\n" for name in NAMES), encoding="utf-8")
    changes = [f"data.train={data}?check=none&limit=30", f"data.eval={data}?check=none", "train.text_batch=8"]
    changes += [f"data.parallel.sources=['table:{table}']", "tokenizer.added_pieces=300"]
    changes += ["data.words={name: wordfreq-en, size: 30}"]
    return [toy_recipe(world, teacher_cache), changes]


def _prepared(recipe: list[object], *more: str) -> Prepared:
    raw, changes = recipe
    return prepare(load_recipe(raw, [*changes, *more]), Reporter(False))  # type: ignore[arg-type,misc]


def test_the_student_reads_the_text_and_the_teacher_its_english(recipe: list[object]) -> None:
    prepared = _prepared(recipe)
    read = dict(zip(prepared.texts, prepared.english))
    assert read["ayan" if "ayan" in read else SWAPPED["navy"]] == "navy"
    assert read["amber thing"] == "amber thing"
    assert read["gniht rebma"] == "amber thing"
    assert prepared.read(["gniht rebma", "amber thing", "new"]) == ["amber thing", "amber thing", "new"]
    feed = Feed(prepared, Order(prepared.samples, batch_size=8, views=1, seed=0, text_pool=len(prepared.texts),
                                text_batch=8), torch.device("cpu"))  # fmt: skip
    batch, plan = feed.make(0), feed.order.plan(0)
    words = [prepared.texts[i] for i in plan.words]
    expected = ToyTeacher().encode_texts([read[text] for text in words]).embedding
    assert batch.teacher_texts is not None
    assert torch.allclose(batch.teacher_texts, expected, atol=1e-6)
    assert batch.ids is not None
    decoded = prepared.tokenizer.encode(words)
    assert torch.equal(batch.ids[-len(words) :], torch.from_numpy(decoded[:, : batch.ids.shape[1]]))
    # captions too: the target of a picture's caption in any language is that of its English name
    assert any(c is not None and c.startswith("gniht") for c in plan.captions)
    labels = [f"{prepared.samples[row].label} thing" for row in plan.rows]
    assert batch.teacher_captions is not None
    assert batch.teacher_captions.shape == (len(labels), DIM)
    assert torch.allclose(batch.teacher_captions, ToyTeacher().encode_texts(labels).embedding, atol=1e-6)


def test_scored_names_are_withheld(recipe: list[object]) -> None:
    # pictures 31 to 39 are in the evaluation alone
    strict, loose = _prepared(recipe), _prepared(recipe, "data.parallel.strict=false")
    scored = "teal"
    assert SWAPPED[scored] in strict.texts  # "teal" itself is no caption: those are "teal thing"
    assert not any(
        text.startswith("gniht") and text.endswith(SWAPPED[scored]) for text in [*strict.texts, *loose.texts]
    )
    assert strict.english == loose.english


def test_inputs_differ_when_what_the_teacher_reads_does(recipe: list[object], tmp_path: Path) -> None:
    first = _prepared(recipe)
    table = tmp_path / "pairs.tsv"
    lines = table.read_text().splitlines()
    lines[0], lines[1] = (f"{a.split(chr(9))[0]}\t{b.split(chr(9))[1]}\txx" for a, b in (lines[:2], lines[1::-1]))
    table.write_text("\n".join(lines) + "\n")
    assert _prepared(recipe).digest != first.digest


def test_what_cannot_be_learned_is_refused(recipe: list[object]) -> None:
    raw, changes = recipe
    with pytest.raises(UsageError, match=r"data\.parallel is taught by the teacher's embedding"):
        load_recipe(raw, [*changes, "teacher=null"])  # type: ignore[arg-type,misc]
    with pytest.raises(UsageError, match=r"tokenizer\.added_pieces are learnt from data\.parallel"):
        load_recipe(raw, ["tokenizer.added_pieces=10"])  # type: ignore[arg-type]
