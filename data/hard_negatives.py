"""Hard negatives made from a data set's own captions: texts that differ little from a true one and are false.

In the manner of SugarCrepe (Hsieh et al. 2023: replace, swap, add), without a language model: our construction. English
only. Kinds:

replace_attribute, replace_person, replace_object, replace_action: one word becomes another one of the same contrast
    (`contrasts`) that some caption of the data uses: "red heart" / "green heart", "dog face" / "rabbit face".
swap_attribute: two words of one contrast change places, each before a noun of its own.
swap_object: the two sides of a preposition such as "behind" change places: "sun behind cloud" / "cloud behind sun".
add_attribute: a colour that no pixel of the picture has is put before an object: "dog face" / "blue dog face".
word_order: the words reversed, for names of two nouns ("dog face" / "face dog") and for four words or more with a
    preposition. The reverse is no claim that could be false; it is what nobody would call the picture.

Captions with a negation give none. A text is only used if it is no caption and no label of the picture, nor of a
picture that shares one with it, and if the word put in is in none of these. Which word is put in, and where, is decided
by a hash of the picture's uid.
Captions are taken to name what there is: in a scene, something that no caption mentions can make a replacement true.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from pocketvlm.data.contrasts import (
    ACTIONS,
    ARTICLES,
    ATTRIBUTES,
    FUNCTION_WORDS,
    IN_BETWEEN,
    NEGATIONS,
    NOUNS,
    NUMBERS,
    OBJECTS,
    PEOPLE,
    VERBS,
)
from pocketvlm.data.sample import HardNegative, Sample
from pocketvlm.data.source import DataSource
from pocketvlm.data.splits import stable_hash
from pocketvlm.data.wordlist import comparison_key
from pocketvlm.edge.errors import BadSampleError

# degrees of the hue circle that could be called by the colour's name, generously
_HUES = {"red": (320, 400), "yellow": (35, 80), "green": (65, 180), "blue": (165, 275), "purple": (245, 335)}
_FEWEST_COLOURED = 0.001
_SIDE = 128


def with_hard_negatives(source: DataSource) -> DataSource:
    """The data set with hard negatives at its samples; as it is where it brings some of its own.

    At most one of each kind per sample, from its first English caption that allows one. Reads the pictures whose
    caption names an object, for their colours.
    """
    if any(sample.hard_negatives for sample in source.samples):
        return source
    vocabulary = {word for sample in source.samples for text in _english(sample) for word in _words(text)}
    truths = _truths(source.samples)
    samples = []
    for sample in source.samples:
        true = frozenset().union(*(truths[key] for key in _keys(sample)))
        made = _negatives(sample, true, vocabulary)
        samples.append(dataclasses.replace(sample, hard_negatives=tuple(made)))
    return dataclasses.replace(source, samples=samples)


def _english(sample: Sample) -> list[str]:
    return [c.text for c in sample.captions if c.language.lower().split("-")[0] == "en"]


def _words(text: str) -> list[str]:
    return [word.strip('.,;:!?"“”()').lower() for word in text.split()]


def _texts(sample: Sample) -> list[str]:
    label = [sample.label.replace("_", " ")] if sample.label else []
    return [*(caption.text for caption in sample.captions), *label]


def _keys(sample: Sample) -> list[str]:
    return [comparison_key(text) for text in _texts(sample)]


def _truths(samples: Iterable[Sample]) -> dict[str, frozenset[str]]:
    """Key of a text -> every text of every picture that has it: what else is true of such a picture."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        for key in _keys(sample):
            found.setdefault(key, set()).update(_texts(sample))
    return {key: frozenset(texts) for key, texts in found.items()}


def _negatives(sample: Sample, true: frozenset[str], vocabulary: set[str]) -> Iterator[HardNegative]:
    known = {comparison_key(text) for text in true}
    used = {word for text in true for word in _words(text)}

    def replace(rivals: Mapping[str, frozenset[str]]) -> Callable[[list[str], list[str]], list[str]]:
        return lambda shown, words: _replace(shown, words, rivals, vocabulary - used, sample.uid)

    makers: dict[str, Callable[[list[str], list[str]], list[str]]] = {
        "replace_attribute": replace(ATTRIBUTES),
        "replace_person": replace(PEOPLE),
        "replace_object": replace(OBJECTS),
        "replace_action": replace(ACTIONS),
        "swap_attribute": _swap_attributes,
        "swap_object": _swap_objects,
        "add_attribute": lambda shown, words: _add_colour(shown, words, vocabulary - used, sample),
        "word_order": _reverse,
    }
    for kind, make in makers.items():
        for caption in _english(sample):
            shown, words = caption.rstrip(" .").split(), _words(caption.rstrip(" ."))
            made = [] if any(word.split("-")[0] in NEGATIONS for word in words) else make(shown, words)
            text = " ".join(made) + ("." if caption.rstrip().endswith(".") else "")
            if made and comparison_key(text) not in known:
                yield HardNegative(caption, text, kind)
                break


def _pick(options: Iterable[str], *seed: str) -> str:
    return min(options, key=lambda option: stable_hash("/".join(("hard-negative", *seed, option))))


def _replace(
    shown: list[str], words: list[str], rivals: Mapping[str, frozenset[str]], allowed: set[str], uid: str
) -> list[str]:
    choices = {}
    for place, word in enumerate(words):
        options = rivals.get(word, frozenset()) & allowed
        if word in NUMBERS:
            # who sees three also sees two
            options &= frozenset(NUMBERS[NUMBERS.index(word) + 1 :])
        # a word said twice would stay true elsewhere; a word with signs ("red,") is left alone
        if options and words.count(word) == 1 and shown[place].lower() == word:
            choices[str(place)] = options
    if not choices:
        return []
    place = int(_pick(choices, uid, "place"))
    new = _pick(sorted(choices[str(place)]), uid, "word")
    return _articles([*shown[:place], new.title() if shown[place].istitle() else new, *shown[place + 1 :]], place)


def _swap_attributes(shown: list[str], words: list[str]) -> list[str]:
    places = [i for i, word in enumerate(words[:-1]) if word in ATTRIBUTES and shown[i].lower() == word]
    for first, second in combinations(places, 2):
        nouns = words[first + 1], words[second + 1]
        plain = all(noun not in ATTRIBUTES and noun not in FUNCTION_WORDS for noun in nouns)
        if words[second] in ATTRIBUTES[words[first]] and len(places) == 2 and plain and nouns[0] != nouns[1]:
            swapped = list(shown)
            swapped[first], swapped[second] = shown[second].lower(), shown[first].lower()
            return _articles(_articles(swapped, first), second)
    return []


def _swap_objects(shown: list[str], words: list[str]) -> list[str]:
    joints = [place for place, word in enumerate(words) if word in IN_BETWEEN or word in VERBS]
    if len(joints) != 1 or len(words) > 8:
        return []
    left, right = slice(0, joints[0]), slice(joints[0] + 1, None)
    sides = [[word for word in words[side] if word not in ARTICLES] for side in (left, right)]
    if not all(sides) or any(word in FUNCTION_WORDS for side in sides for word in side) or sides[0] == sides[1]:
        return []
    if words[joints[0]] in VERBS and not all(words[side][0] in ARTICLES for side in (left, right)):
        return []
    return [*shown[right], shown[joints[0]], *shown[left]]


def _add_colour(shown: list[str], words: list[str], allowed: set[str], sample: Sample) -> list[str]:
    places = [place for place, word in enumerate(words) if word in OBJECTS]
    colours = sorted(set(_HUES) & allowed)
    if not places or not colours or any(word in ATTRIBUTES for word in words):
        return []
    start = places[0]
    while start > 0 and words[start - 1] not in FUNCTION_WORDS:
        start -= 1
    absent = [colour for colour in colours if colour not in _seen_colours(sample)]
    if not absent:
        return []
    return _articles([*shown[:start], _pick(absent, sample.uid, "colour"), *shown[start:]], start)


def _seen_colours(sample: Sample) -> set[str]:
    """The colours of `_HUES` that some pixels could be called by; all of them for a picture that cannot be read."""
    from PIL import Image

    from pocketvlm.edge.preprocess import decode_image

    try:
        pixels = Image.fromarray(decode_image(sample.image.read()))
    except BadSampleError:
        return set(_HUES)
    pixels.thumbnail((_SIDE, _SIDE), Image.Resampling.NEAREST)
    hue, saturation, value = (np.asarray(plane, np.float64) for plane in pixels.convert("HSV").split())
    hue = hue[(saturation > 50) & (value > 40)] * 360 / 256
    least = _FEWEST_COLOURED * saturation.size
    return {
        name
        for name, (low, high) in _HUES.items()
        if np.count_nonzero(((hue >= low) & (hue <= high)) | ((hue + 360 >= low) & (hue + 360 <= high))) > least
    }


def _reverse(shown: list[str], words: list[str]) -> list[str]:
    if {"and", "or", "&"} & set(words) or any(word.isdigit() for word in words) or "(" in "".join(shown):
        return []
    two_nouns = len(words) == 2 and all(word in NOUNS for word in words) and words[0] != words[1]
    phrase = len(words) >= 4 and any(word in FUNCTION_WORDS for word in words[1:-1])
    return [word.lower() for word in shown[::-1]] if two_nouns or phrase else []


def _articles(shown: Sequence[str], place: int) -> list[str]:
    """ "a" or "an" before the word at `place`, whose beginning may have changed."""
    fixed = list(shown)
    if place and fixed[place - 1].lower() in ("a", "an"):
        article = "an" if fixed[place][0].lower() in "aeiou" else "a"
        fixed[place - 1] = article.title() if fixed[place - 1].istitle() else article
    return fixed
