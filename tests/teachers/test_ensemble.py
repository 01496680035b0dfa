"""Caches of several teachers read as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.teachers.base import TeacherOutput, TextTeacher
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.ensemble import Ensemble, JoinedCache, TeacherFacts, joined

from .conftest import TinyTeacher

TEXTS = ["a cat", "a dog"]


class Letters(TextTeacher):
    name, fingerprint, space_id, dim = "letters", "e" * 64, "letters-0", 3
    licences = (("letters", "CC0-1.0", "nobody"),)

    def encode_texts(self, texts: list[str]) -> TeacherOutput:
        rows = torch.tensor([[float(text.count(letter)) for letter in "a gc"[:3]] for text in texts]) + 0.5
        return TeacherOutput(torch.nn.functional.normalize(rows, dim=-1))


def test_two_teachers_side_by_side(samples: list[Sample], tmp_path: Path) -> None:
    tiny, letters = TinyTeacher(), Letters()
    facts = [TeacherFacts.of(letters), TeacherFacts.of(tiny)]
    caches = [build_cache(letters, [], TEXTS, tmp_path / "l"), build_cache(tiny, samples, TEXTS, tmp_path / "t")]
    both = joined(facts, caches)
    assert isinstance(both, JoinedCache)
    assert (both.info.dim, both.info.feature_dim, both.info.text_feature_dim) == (11, 5, 0)
    uids = [samples[4].uid, samples[1].uid]
    assert torch.equal(both.image(uids), torch.cat([torch.zeros(2, 3), caches[1].image(uids)], dim=1))
    assert torch.equal(both.text(TEXTS), torch.cat([cache.text(TEXTS) for cache in caches], dim=1))
    assert torch.equal(both.features(uids), caches[1].features(uids))
    both.load()
    caches[0]._open["text-00000.safetensors"]["text"][1, 0] = float("nan")
    with pytest.raises(IntegrityError, match="'a dog' is not finite"):
        both.text(TEXTS)
    assert joined(facts[1:], caches[1:]) is caches[1]
    assert joined(facts, [None, None]) is None


def test_who_is_learned_from_where_nobody_is_named() -> None:
    letters, tiny = TeacherFacts.of(Letters()), TeacherFacts.of(TinyTeacher())
    alone, beside = Ensemble((tiny,)), Ensemble((letters, tiny))
    assert (alone.fingerprint, alone.space_id, alone.name) == (tiny.fingerprint, tiny.space_id, "tiny")
    assert (beside.joint, beside.dim, beside.space_id, beside.name) == ((1,), 8, tiny.space_id, "letters + tiny")
    assert beside.fingerprint not in (tiny.fingerprint, letters.fingerprint)
    assert beside.fingerprint != Ensemble((tiny, letters)).fingerprint
    assert beside.licences == (*letters.licences, *tiny.licences)
    texts = Ensemble((letters,))
    assert (texts.joint, texts.dim, texts.pictures) == ((0,), 3, False)
