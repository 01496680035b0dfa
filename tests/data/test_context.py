"""Captions that a text tower cannot read whole: counted and left out, or refused, never cut in silence."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from pocketvlm.data import BadSampleReport, Caption, DataSource, ImageRef, Sample
from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import BadSampleError
from pocketvlm.edge.tokenizer import Tokenizer

WORDS = ("[PAD]", "a", "red", "blue", "thing")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Four tokens of known words; a question mark is no token, other words are an error."""
    raw = RawTokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    raw.normalizer = normalizers.Replace("?", "")
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(raw.to_str(), TextSpec(context_length=4, vocab_size=len(WORDS)))


def source(*captions: tuple[str, ...], mode: str = "skip") -> DataSource:
    samples = [
        Sample(f"s{index}", ImageRef(data=b""), tuple(map(Caption, texts)), label=str(index))
        for index, texts in enumerate(captions)
    ]
    return DataSource("some", samples, BadSampleReport(mode))


LONG = "a red thing a blue thing"


def test_long_captions_are_counted_and_left_out(tokenizer: Tokenizer) -> None:
    before = source(("a red thing", LONG), (LONG,), ("a blue a thing",), ())
    before.report.note("missing-file", "line 9")
    after = before.within_context(tokenizer)
    assert [[c.text for c in sample.captions] for sample in after] == [["a red thing"], [], ["a blue a thing"], []]
    assert [sample.label for sample in after] == ["0", "1", "2", "3"], "the pictures and their labels stay"
    assert after.report.counts == {"missing-file": 1, "too-long-text": 2}
    assert after.report.examples["too-long-text"] == ["s0", "s1"]
    # asked twice, for two students, nothing is counted twice
    assert before.report.counts == {"missing-file": 1}
    assert before.within_context(tokenizer).report.counts == after.report.counts
    assert after.within_context(tokenizer).report.counts == after.report.counts


def test_what_has_no_tokens_at_all_is_counted_by_its_own_reason(tokenizer: Tokenizer) -> None:
    after = source(("red", "weiß"), ("blue", "\ud800"), ("a thing", "??")).within_context(tokenizer)
    assert [[c.text for c in sample.captions] for sample in after] == [["red"], ["blue"], ["a thing"]]
    assert after.report.counts == {"unencodable-text": 1, "not-unicode": 1, "empty-text": 1}


def test_refusing_names_the_sample_and_both_lengths(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadSampleError) as refused:
        source(("red",), (LONG,), mode="refuse").within_context(tokenizer)
    said = str(refused.value)
    assert refused.value.reason == "too-long-text"
    assert said.startswith("s1: ")
    assert "6 tokens" in said
    assert "4" in said
    assert "--on-bad-sample skip" in said
    assert "\n" not in said


def test_nothing_to_leave_out_changes_nothing(tokenizer: Tokenizer) -> None:
    before = source(("red",), (), ("a blue thing",), mode="refuse")
    assert before.within_context(tokenizer).samples == before.samples
    assert source((), ()).within_context(tokenizer).samples == source((), ()).samples
