"""When a written answer counts as the expected one: what is taken out of both before they are compared."""

from __future__ import annotations

import re
import unicodedata

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
# apostrophes and hyphens join words and stay
_PUNCTUATION = re.compile(r"[^\w\s'’-]")


def normalise_answer(text: str) -> str:
    """Compatibility characters folded, lower case, no punctuation, single spaces, no leading English article, and
    number words to twelve as digits: "The  Hot Dog." -> "hot dog", "Three" -> "3".

    Accents stay, since they tell words apart in other languages.
    """
    plain = _PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    words = [_DIGITS.get(word, word) for word in plain.split()]
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def exact_match(answer: str, expected: str) -> bool:
    """Whether both are the same after `normalise_answer`; an expected answer of punctuation alone must be met as is."""
    wanted = normalise_answer(expected)
    return normalise_answer(answer) == wanted if wanted else answer.strip() == expected.strip()
