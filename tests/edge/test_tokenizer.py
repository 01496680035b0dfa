"""Text to ids: padding, cutting, refusals."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models

from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError
from pocketvlm.edge.tokenizer import Tokenizer

SPEC = TextSpec(context_length=6, vocab_size=10)


@pytest.fixture
def json(tools: Any) -> str:
    return tools.tokenizer_json()


def test_ids_are_padded_on_the_right(json: str) -> None:
    ids = Tokenizer(json, SPEC).encode(["a red picture", "Blue"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[2, 4, 7, 5, 3, 0], [2, 9, 3, 0, 0, 0]]


def test_long_text_keeps_its_closing_token_and_its_length_is_known(json: str) -> None:
    tokenizer = Tokenizer(json, SPEC)
    long = "a picture of red green blue"
    assert tokenizer.encode([long]).tolist() == [[2, 4, 5, 6, 7, 3]]
    assert tokenizer.lengths([long, "red"]) == [8, 3]


def test_pad_id_is_the_contracts(json: str) -> None:
    spec = TextSpec(context_length=4, vocab_size=10, pad_id=3)
    assert Tokenizer(json, spec).encode("red").tolist() == [[2, 7, 3, 3]]


def test_padding_and_cutting_inside_the_file_are_overruled(json: str) -> None:
    raw = RawTokenizer.from_str(json)
    raw.enable_padding(direction="left", length=9, pad_id=1, pad_token="[UNK]")
    raw.enable_truncation(max_length=3)
    tokenizer = Tokenizer(raw.to_str(), SPEC)
    assert tokenizer.encode("a red picture").tolist() == [[2, 4, 7, 5, 3, 0]]
    assert tokenizer.lengths("a red picture") == [5]


def test_sources_agree(json: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json)
    for source in (json, json.encode(), path, str(path)):
        assert Tokenizer(source, SPEC).encode(["red"]).tolist() == [[2, 7, 3, 0, 0, 0]]


def test_no_text_gives_no_row(json: str) -> None:
    assert Tokenizer(json, SPEC).encode([]).shape == (0, 6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty-text"),
        (" \n\t", "empty-text"),
        (None, "not-a-string"),
        (7, "not-a-string"),
        ("\ud800", "not-unicode"),
    ],
)
def test_bad_texts(json: str, text: Any, reason: str) -> None:
    tokenizer = Tokenizer(json, SPEC)
    for call in (tokenizer.encode, tokenizer.lengths):
        with pytest.raises(BadSampleError) as caught:
            call(["red", text])
        assert caught.value.reason == reason


def test_text_without_any_token_is_refused() -> None:
    raw = RawTokenizer(models.BPE({"[PAD]": 0, "r": 1}, []))  # no unknown token: other letters vanish
    tokenizer = Tokenizer(raw.to_str(), TextSpec(context_length=3, vocab_size=2))
    with pytest.raises(BadSampleError) as caught:
        tokenizer.encode(["r", "green", "blue"])
    assert caught.value.reason == "empty-text"
    assert "'blue'" in str(caught.value)
    assert tokenizer.lengths(["r", "blue"]) == [1, 0]


def test_text_that_the_tokenizer_fails_on_is_named() -> None:
    raw = RawTokenizer(models.WordLevel({"[PAD]": 0, "red": 1}))
    tokenizer = Tokenizer(raw.to_str(), TextSpec(context_length=3, vocab_size=2))
    with pytest.raises(BadSampleError, match="'green'") as caught:
        tokenizer.encode(["red", "green"])
    assert caught.value.reason == "unencodable-text"


def test_hash_and_vocabulary_must_match(json: str) -> None:
    digest = hashlib.sha256(json.encode()).hexdigest()
    assert Tokenizer(json, TextSpec(context_length=6, vocab_size=10, tokenizer_sha256=digest)).lengths("red") == [3]
    with pytest.raises(IntegrityError, match="sha256"):
        Tokenizer(json + " ", TextSpec(context_length=6, vocab_size=10, tokenizer_sha256=digest))
    with pytest.raises(IntegrityError, match="largest id is 9"):
        Tokenizer(json, TextSpec(context_length=6, vocab_size=9))
    with pytest.raises(IntegrityError, match="pad_id is 10"):
        Tokenizer(json, TextSpec(context_length=6, vocab_size=10, pad_id=10))


def test_unusable_files(tmp_path: Path, json: str) -> None:
    with pytest.raises(IntegrityError, match="cannot be parsed"):
        Tokenizer(b"{}", SPEC)
    with pytest.raises(UsageError, match="cannot be read"):
        Tokenizer(tmp_path / "absent.json", SPEC)
    with pytest.raises(UsageError, match="at least 3"):
        Tokenizer(json, TextSpec(context_length=2, vocab_size=10))


def test_threads_agree(json: str) -> None:
    tokenizer = Tokenizer(json, SPEC)
    texts = ["red", "green picture", "a picture of blue red red"]
    expected = tokenizer.encode(texts).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert all(ids.tolist() == expected for ids in pool.map(lambda _: tokenizer.encode(texts), range(40)))
