"""A student that adds languages: rows of new pieces, the alignment against a loop, what stays as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer

from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import build_student, train_tokenizer
from pocketvlm.students.languages import add_languages, extend_tokenizer, translations
from pocketvlm.students.student import Student

ENGLISH = ["red apple", "red dog", "green apple", "green dog", "dog", "apple"]
PAIRS = [("roter apfel", "red apple"), ("roter hund", "red dog"), ("grüner hund", "green dog"), ("林檎", "apple")]
TINY = {"image.backbone": "lcnet_035", "image.weights": "none", "image.size": 32, "text.layers": 1, "text.width": 16,
        "text.heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def english() -> Student:
    return build_student("mnv4-035", embed_dim=8, tokenizer_json=train_tokenizer(ENGLISH, 80), overrides=TINY)


def oracle(foreign: list[list[int]], beside: list[list[int]], rounds: int) -> dict[tuple[int, int], float]:
    """IBM Model 1 by its definition: every English piece of a pair is shared out among the pair's foreign pieces."""
    p = {(f, e): 1.0 for a, b in zip(foreign, beside) for f in a for e in b}
    for _ in range(rounds):
        counts = dict.fromkeys(p, 0.0)
        for a, b in zip(foreign, beside):
            for e in b:
                total = sum(p[f, e] for f in a)
                for f in a:
                    counts[f, e] += p[f, e] / total
        sums: dict[int, float] = {}
        for (f, _e), count in counts.items():
            sums[f] = sums.get(f, 0.0) + count
        p = {(f, e): count / sums[f] for (f, e), count in counts.items()}
    return p


@pytest.mark.parametrize("rounds", [1, 2, 6])
def test_the_alignment_against_a_loop(rounds: int) -> None:
    rng = np.random.default_rng(0)
    foreign = [rng.integers(0, 9, size=rng.integers(1, 5)).tolist() for _ in range(30)]
    beside = [rng.integers(0, 7, size=rng.integers(1, 4)).tolist() for _ in range(30)]
    # pieces that stand twice in a text, and pairs of which one side came out empty
    foreign, beside = [[3, 3, 4], [], [2], *foreign], [[1, 1], [2], [], *beside]
    f, e, p = translations([np.array(x, np.int64) for x in foreign], [np.array(x, np.int64) for x in beside], 9, rounds)
    found = dict(zip(zip(f.tolist(), e.tolist()), p.tolist()))
    expected = oracle(foreign, beside, rounds)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12)


def test_new_pieces_start_at_the_english_that_they_mean(english: Student) -> None:
    student = add_languages(english, PAIRS, 300)
    old = len(english.text_tower.token.weight)
    rows = student.text_tower.token.weight.detach()
    assert torch.equal(rows[:old], english.text_tower.token.weight)
    vocab = RawTokenizer.from_str(student.tokenizer_json.decode()).get_vocab()
    assert vocab["apple"] < old <= vocab["hund"]
    near = torch.nn.functional.cosine_similarity(rows[vocab["hund"]], rows[[vocab[w] for w in ("dog", "red", "apple")]])
    assert near.argmax() == 0
    assert near[0] > 0.9
    # beside one word only, so it is that word
    assert rows[vocab["林"]].allclose(rows[vocab["apple"]], atol=1e-6)


def test_english_is_read_as_before(english: Student) -> None:
    student = add_languages(english, PAIRS, 300, seed=5).eval()
    ids = [Tokenizer(s.tokenizer_json, s.text_spec).encode(ENGLISH) for s in (english, student)]
    assert np.array_equal(ids[0], ids[1])
    english.eval()
    with torch.no_grad():
        before, after = (s.encode_text(torch.from_numpy(ids[0])).embedding for s in (english, student))
        pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        pictures = [s.encode_image(pixels).embedding for s in (english, student)]
    english.train()
    assert torch.equal(before, after)
    assert torch.equal(*pictures)
    assert student.space_id == english.space_id


def test_what_cannot_be_extended_is_refused(english: Student) -> None:
    with pytest.raises(UsageError, match="no parallel text was given"):
        add_languages(english, [], 100)
    with pytest.raises(UsageError, match="cannot hold"):
        add_languages(english, PAIRS, 5)
    description = json.loads(english.tokenizer_json)
    description["model"]["type"] = "BPE"
    with pytest.raises(UsageError, match="takes no new pieces"):
        extend_tokenizer(json.dumps(description).encode(), ["hund"], 300)
