"""Recipes whose tokenizer is MiniLM's, pruned to the run's own texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distill_toys import NAMES, toy_recipe

from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import UsageError

_TEXT = (
    "{block: bert, weights: minilm-l6, layers: 1, weights_layers: [0], width: 384, heads: 12, mlp_ratio: 4, "
    "context_length: 12}"
)


def test_the_tokenizer_is_pruned_to_the_runs_texts(world: Path, teacher_cache: Path, toy_teacher: None) -> None:
    changes = ["tokenizer.source=minilm-l6", "tokenizer.vocab_size=1800", f"student.overrides.text={_TEXT}"]
    raw = toy_recipe(world, teacher_cache)
    prepared = prepare(load_recipe(raw, changes), Reporter(False))
    vocab = json.loads(prepared.student.tokenizer_json)["model"]["vocab"]
    assert len(vocab) == 1800
    assert {"amber", "thing"} <= vocab.keys()
    # few of 1,800 pieces are left for words, and those are the run's own
    assert sum(name in vocab for name in NAMES) >= 30
    assert "government" not in vocab
    assert any("all-MiniLM-L6-v2" in what for what, _, _ in prepared.licences)
    with pytest.raises(UsageError, match=r"set tokenizer\.source to 'minilm-l6'"):
        prepare(load_recipe(raw, changes[2:]), Reporter(False))
