"""benchmarks.multilingual: which pairs an arm learns from, what is kept of English, and its table."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.multilingual import (
    LONG,
    NAME,
    PAGE,
    RESULTS,
    Job,
    _narrow,
    chosen,
    jobs,
    kept_of_english,
    recipe_of,
    summary,
    table,
)
from pocketvlm.data.parallel import Pair

PAIRS = [
    Pair("poisson rouge", "goldfish", "fr", "captions"),
    Pair("carpe", "fish", "fr", "annotations"),
    Pair("poisson", "fish", "fr", "dictd"),
    *(Pair(f"mot{i}", f"word {i}", "fr", "dictd") for i in range(200)),
]


def test_an_arm_learns_from_its_sources_alone() -> None:
    names = chosen(PAIRS, {"fish"}, Job(0, 0, "names", True))
    assert [pair.source for pair in names] == ["captions"]
    strict = chosen(PAIRS, {"fish"}, Job(0, 0, "dictionaries", True))
    loose = chosen(PAIRS, {"fish"}, Job(0, 0, "dictionaries", False))
    assert len(loose) == len(PAIRS)
    assert {pair.english for pair in loose} - {pair.english for pair in strict} == {"fish"}
    few = chosen(PAIRS, set(), Job(0, 0, "dictionaries", True, share=0.1))
    more = chosen(PAIRS, set(), Job(0, 0, "dictionaries", True, share=0.3))
    assert PAIRS[0] in few
    assert set(few) < set(more)
    assert 5 < len(few) < 40 < len(more) < 90


def test_jobs_are_different_runs() -> None:
    found = [job.digest for job in jobs((0, 1), (0, 1))]
    assert len(found) == len(set(found))
    recipe = recipe_of(Job(3, 2, "dictionaries", True, steps=7, align=2))
    assert "fold=3" in recipe.data.train
    assert (recipe.train.text_pretrain_steps, recipe.train.steps, recipe.train.seed) == (7, 2, 2)


def test_what_is_kept_is_a_share_of_the_same_students_english() -> None:
    kept = kept_of_english({"en": 40.0, "de": 30.0, "fr": 36.0})
    assert kept["mean_kept"] == pytest.approx(82.5)
    assert (kept["worst"], kept["worst_kept"]) == ("de", 75.0)
    row = {
        "sources": "names",
        "strict": True,
        "share": 1.0,
        "steps": 7,
        "align": 2,
        "pieces": 9,
        "per_language": 5,
        "pairs": 10,
    }
    rows = [
        row | {"fold": fold, "seed": seed, "recall": {"en": 40.0, "de": de, "fr": 40.0}}
        for fold, seed, de in ((0, 0, 40.0), (0, 1, 20.0), (1, 0, 10.0))
    ]
    first, other = summary(rows)
    # seeds are pooled, folds are not: settings were chosen on one of them
    assert first["recall"]["de"] == 30.0
    assert (first["fold"], first["seeds"], other["fold"], other["seeds"]) == (0, [0, 1], 1, [0])
    assert first["floors_met"] == {"mean": True, "worst": True}
    assert other["floors_met"] == {"mean": False, "worst": False}
    assert "| 0 | names, strict | 10 | 9 | 7 + 2 | 2 | 40.0 | 35.0 | 88 % | de 30.0 | 75 % |" in table([first])


def test_packed_embeddings_are_those_of_the_teacher() -> None:
    rows = torch.nn.functional.normalize(torch.randn(20, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    narrow, scale = _narrow(rows)
    back = torch.nn.functional.normalize(narrow.float() * scale.float(), dim=-1)
    assert narrow.dtype == torch.int8
    assert float((back * rows).sum(dim=1).min()) > 0.9998


def test_the_page_is_the_committed_result() -> None:
    result = json.loads((RESULTS / NAME).read_text(encoding="utf-8"))
    assert summary(result["runs"]) == result["summary"]
    assert table(result["summary"]) in PAGE.read_text(encoding="utf-8")
    (pooled,) = (
        row for row in result["summary"]
        if (row["fold"], row["sources"], row["steps"], row["align"]) == ("all", "dictionaries", 500, LONG)
    )  # fmt: skip
    assert pooled["seeds"] == [0, 1, 2]
    assert pooled["floors_met"] == {"mean": False, "worst": True}
    told = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"keeps {pooled['mean_kept']:.0f} % of its English" in told
    assert f"misses the floor of 80 %, and {pooled['worst_kept']:.0f} % in the worst (Korean)" in told
