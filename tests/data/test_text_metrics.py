"""chrF and CIDEr-D against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from pocketvlm.data.text_metrics import chrf, cider_d
from pocketvlm.edge.errors import UsageError


def test_chrf_of_two_short_words() -> None:
    """ "abcd" for "abce": of 1-grams 3 of 4, of 2-grams 2 of 3, of 3-grams 1 of 2, of 4-grams 0 of 1."""
    mean = (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert chrf(["abcd"], ["abce"]) == pytest.approx(100 * mean)


def test_chrf_weighs_recall_four_times_and_clips_repeats() -> None:
    """ "aab" for "ab": 1-grams P 2/3, R 2/2; 2-grams P 1/2, R 1/1; of 3-grams the reference has none."""
    precision, recall = (2 / 3 + 1 / 2) / 2, 1.0
    assert chrf(["aab"], ["ab"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    # the other way round P and R change places, and the score changes
    assert chrf(["ab"], ["aab"]) == pytest.approx(100 * 5 * 1.0 * precision / (4 * 1.0 + precision))


def test_chrf_is_of_a_whole_set_and_blind_to_spaces() -> None:
    assert chrf(["a b"], ["ab"]) == 100
    assert chrf(["犬 Bär"], ["犬Bär"]) == pytest.approx(100)
    # sums over the set, not a mean of two scores: 1-grams 2 of 3, 2-grams 1 of 1
    assert chrf(["ab", "x"], ["ab", "y"]) == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert chrf(["", "q"], ["ab", ""]) == 0
    assert chrf(["xyz"], ["abc"]) == 0


def test_cider_d_of_two_pictures() -> None:
    """Words of one picture alone weigh log 2, those of both nothing."""
    references = [["a red dog"], ["a blue cat"]]
    # of "a red dog": 1-grams red, dog; 2-grams (a red), (red dog); 3-gram; no 4-gram, which counts 0
    assert cider_d(["a red dog", "a blue cat"], references) == pytest.approx(10 * 3 / 4)
    # 1-grams: red is right, cat is of the other picture: cosine 1/2; 2-grams: 1 of 2 on one side known there
    # (a red) is known, (red cat) nowhere, which weighs log(2 / 1): cosine 1/2; 3-grams: 0
    assert cider_d(["a red cat", "a blue cat"], references) == pytest.approx((10 * (0.5 + 0.5) / 4 + 10 * 3 / 4) / 2)


def test_cider_d_clips_repeats_and_dislikes_other_lengths() -> None:
    references = [["red dog"], ["blue cat"]]
    # 1-grams: red twice is clipped to once in the product and not in the length: (1 + 1) / (sqrt(4 + 1) sqrt(2))
    # 2-grams: (red red) is new, (red dog) right: 1 / sqrt(2); a word more: exp(-1 / 72)
    expected = (2 / math.sqrt(10) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    other = 10 * 2 / 4
    assert cider_d(["red red dog", "blue cat"], references) == pytest.approx((10 * expected + other) / 2)
    # several references: a mean
    both = [["red dog", "brown horse"], ["blue cat"]]
    assert cider_d(["red dog", "blue cat"], both) == pytest.approx((other / 2 + other) / 2)
    # what every picture has tells nothing
    assert cider_d(["dog"], [["dog"]]) == 0


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UsageError, match="1 captions were to be compared with 2"):
        chrf(["a"], ["a", "b"])
    with pytest.raises(UsageError, match="give as many of both"):
        cider_d([], [])
    with pytest.raises(UsageError, match="has no reference caption"):
        cider_d(["a"], [[]])
