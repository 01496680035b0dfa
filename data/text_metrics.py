"""Scores of written captions against references: chrF and CIDEr-D, over plain strings.

Written here because no library for them is among the dependencies. Both are of whole sets of captions; texts are
compared as they are, so fold case or punctuation before where that is wanted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

from pocketvlm.edge.errors import UsageError

_CHARACTERS = 6
_WORDS = 4
_SIGMA = 6.0


def chrf(answers: Sequence[str], references: Sequence[str], *, beta: float = 2.0) -> float:
    """chrF2 of a set, 0..100 (Popović, 2015, with the choices of sacrebleu's default: order 6, no words, no spaces).

    For n from 1 to 6, matching character n-grams (each counted as often as in both) are summed over the set; precision
    and recall are averaged over the n of which both sides have any; F = (1 + beta^2) P R / (beta^2 P + R).

    Raises:
        UsageError: another number of references, or none.
    """
    _check(answers, references)
    matches, said, wanted = ([0] * _CHARACTERS for _ in range(3))
    for answer, reference in zip(answers, references):
        one, two = "".join(answer.split()), "".join(reference.split())
        for n in range(1, _CHARACTERS + 1):
            found, expected = _ngrams(one, n), _ngrams(two, n)
            matches[n - 1] += (found & expected).total()
            said[n - 1] += found.total()
            wanted[n - 1] += expected.total()
    orders = [n for n in range(_CHARACTERS) if said[n] and wanted[n]]
    if not orders:
        return 0.0
    precision = sum(matches[n] / said[n] for n in orders) / len(orders)
    recall = sum(matches[n] / wanted[n] for n in orders) / len(orders)
    if not precision + recall:
        return 0.0
    return 100 * (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def cider_d(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a set, 0..10 (Vedantam et al., arXiv:1411.5726), a mean over its captions.

    For n from 1 to 4, vectors of word n-grams: count times log(pictures / pictures whose references have it, at least
    1). A caption's similarity to a reference is their cosine with its counts clipped to the reference's, times
    exp(-(difference of words)^2 / (2 x 6^2)); averaged over references and n, times 10.

    Words are what spaces separate; there is no stemming, as in the authors' code for CIDEr-D. How rare an n-gram is
    comes from these references alone, so that a set of one picture always scores 0.

    Args:
        answers: one caption a picture. references: one or more a picture.

    Raises:
        UsageError: another number of references, none, or a picture without any.
    """
    _check(answers, references)
    if not all(references):
        raise UsageError("a picture has no reference caption, so its caption cannot be scored; leave the picture out")
    shown: Counter[Hashable] = Counter()
    for own in references:
        shown.update({gram for text in own for n in range(1, _WORDS + 1) for gram in _ngrams(tuple(text.split()), n)})
    total = 0.0
    for answer, own in zip(answers, references):
        similar = 0.0
        for reference in own:
            one, two = tuple(answer.split()), tuple(reference.split())
            alike = sum(_similar(one, two, n, shown, len(references)) for n in range(1, _WORDS + 1)) / _WORDS
            similar += alike * math.exp(-((len(one) - len(two)) ** 2) / (2 * _SIGMA**2))
        total += 10 * similar / len(own)
    return total / len(answers)


def _similar(one: tuple[str, ...], two: tuple[str, ...], n: int, shown: Counter[Hashable], pictures: int) -> float:
    vectors = []
    for words in (one, two):
        counts = _ngrams(words, n)
        vectors.append({gram: count * math.log(pictures / max(shown[gram], 1)) for gram, count in counts.items()})
    lengths = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
    if not all(lengths):
        return 0.0
    found, expected = vectors
    dot = sum(min(value, expected[gram]) * expected[gram] for gram, value in found.items() if gram in expected)
    return dot / (lengths[0] * lengths[1])


def _ngrams(items: Sequence[Hashable], n: int) -> Counter[Hashable]:
    return Counter(items[place : place + n] for place in range(len(items) - n + 1))


def _check(answers: Sequence[str], references: Sequence[object]) -> None:
    if len(answers) != len(references) or not answers:
        raise UsageError(
            f"{len(answers)} captions were to be compared with {len(references)} references; they could not be told "
            "apart, so give as many of both, and one at least"
        )
