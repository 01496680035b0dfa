"""Readers of bilingual word lists: dictionaries of dictd, CC-CEDICT, CLDR annotations, tables of pairs."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pocketvlm.edge.errors import UsageError

Entry = tuple[str, str, str]
"""(text, English text, language of the text as a BCP-47 tag), neither side cleaned of case or articles."""

LANGUAGES = {
    "afr": "af", "ara": "ar", "bul": "bg", "ces": "cs", "cym": "cy", "dan": "da", "deu": "de", "ell": "el",
    "epo": "eo", "fas": "fa", "fin": "fi", "fra": "fr", "gle": "ga", "hin": "hi", "hrv": "hr", "hun": "hu",
    "ind": "id", "isl": "is", "ita": "it", "jpn": "ja", "kor": "ko", "kur": "ku", "lat": "la", "lit": "lt",
    "nld": "nl", "nor": "no", "pol": "pl", "por": "pt", "rus": "ru", "slk": "sk", "slv": "sl", "spa": "es",
    "srp": "sr", "swe": "sv", "swh": "sw", "tur": "tr", "zho": "zh",
}  # fmt: skip
"""ISO 639-3 codes in names of FreeDict's files -> BCP-47 tags."""

LONGEST = 4
"""Words of a gloss; longer ones are explanations, not translations."""
_DIGITS = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}
_ASIDES = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|<[^<>]*>|\{[^{}]*\}|_\S+")
_NUMBER = re.compile(r"^\s*(?:\d+|[a-z])[.)]\s*")
_NOTE = re.compile(r"^\s*(?:\(|[\w -]*:(?:\s|$))")
_SPLIT = re.compile(r"[,;،؛、，；/|]")
_HAN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")


def read_dictd(path: Path) -> Iterator[Entry]:
    """A dictionary as dictd has it: `NAME.index` beside `NAME.dict.dz` (or `.dict`), one side of it English.

    The languages come from the end of the file's name, as FreeDict names its files: `freedict-fra-eng.index`.
    Glosses of an article are cut at commas; remarks in brackets, labels and what has more than four words are left out.

    Raises:
        UsageError: a file is missing or broken, or the name does not tell a language of `LANGUAGES` and English.
    """
    languages = dictd_languages(path)
    if languages is None:
        raise UsageError(
            f"{path.name} does not say which languages it translates; name it like FreeDict's files "
            "(freedict-fra-eng.index), one of the two eng, or give a table of pairs instead"
        )
    code, forward = languages
    text = _body(path)
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
        places = [(row[0], _number(row[1]), _number(row[2])) for row in rows]
    except (OSError, UnicodeDecodeError, KeyError, IndexError) as error:
        raise UsageError(
            f"{path.name} is no index of dictd (lines of headword, offset and length in base 64), so no article can be "
            "found; install the dictionary again"
        ) from error
    for headword, offset, length in places:
        if headword.startswith(("00database", "00-database")) or not headword.strip():
            continue
        if offset + length > len(text):
            raise UsageError(
                f"{path.name} points behind the end of its dictionary ({offset + length} of {len(text)} bytes), so the "
                "two are not of one release; install the dictionary again"
            )
        article = text[offset : offset + length].decode("utf-8", "replace").split("\n")[1:]
        for gloss in glosses(article):
            yield (headword, gloss, code) if forward else (gloss, headword, code)


def dictd_languages(path: Path) -> tuple[str, bool] | None:
    """(BCP-47 tag, whether the headwords are in that language) from the name of an index; None for other names."""
    match = re.search(r"([a-z]{3})-([a-z]{3})\.index$", path.name)
    if match and match[2] == "eng" and match[1] in LANGUAGES:
        return LANGUAGES[match[1]], True
    if match and match[1] == "eng" and match[2] in LANGUAGES:
        return LANGUAGES[match[2]], False
    return None


def glosses(lines: Iterable[str]) -> Iterator[str]:
    """The short translations in the lines of an article, without numbers, brackets and labels."""
    for line in lines:
        if _NOTE.match(line):
            continue
        for part in _SPLIT.split(_ASIDES.sub(" ", _NUMBER.sub("", line))):
            gloss = " ".join(part.strip(" .'\"“”‘’«»!?").split())
            if gloss and len(gloss.split()) <= LONGEST:
                yield gloss


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS[digit]
    return value


def _body(index: Path) -> bytes:
    packed, plain = index.with_suffix(".dict.dz"), index.with_suffix(".dict")
    try:
        # .dz is gzip with a table of entry points in an extra field, which gzip skips
        return gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{index.name} has no readable {packed.name} beside it ({error}), and an index alone holds no "
            "translation; install the dictionary again"
        ) from error


def read_cedict(path: Path) -> Iterator[Entry]:
    """CC-CEDICT's text file, plain or gzip: lines `TRADITIONAL SIMPLIFIED [pin1 yin1] /gloss/gloss/`; the simplified.

    Raises:
        UsageError: the file cannot be read, or none of its lines has that form.
    """
    line_form, found = re.compile(r"^\S+ (\S+) \[[^\]]*\] /(.*)/\s*$"), False
    for line in _lines(path):
        if match := line_form.match(line):
            found = True
            # measure words are no translations
            for gloss in glosses(part for part in match[2].split("/") if not part.startswith("CL:")):
                yield match[1], gloss, "zh"
    if not found:
        raise UsageError(
            f"{path.name} has no line of CC-CEDICT (TRADITIONAL SIMPLIFIED [pin1 yin1] /gloss/), so it holds no pair; "
            "give the file cedict_ts.u8, or a table of pairs"
        )


def read_table(path: Path) -> Iterator[Entry]:
    """Pairs, one a line: `.tsv` with text, English and language in this order, `.jsonl` with "text", "en", "language".

    Raises:
        UsageError: the file cannot be read, or a line is not such a pair.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if path.name.endswith(".jsonl"):
            try:
                row = json.loads(line)
                parts = [row["text"], row["en"], row["language"]]
            except (json.JSONDecodeError, KeyError, TypeError):
                parts = []
        else:
            parts = line.rstrip("\r\n").split("\t")
        if len(parts) != 3 or not all(isinstance(part, str) and part.strip() for part in parts):
            raise UsageError(
                f"line {number} of {path.name} is no pair; give text, its English and its language "
                '(a .tsv: three columns; a .jsonl: {"text", "en", "language"}), nothing was read'
            )
        yield parts[0].strip(), parts[1].strip(), parts[2].strip()


def read_annotations(folder: Path, characters: Mapping[str, str], languages: Iterable[str]) -> Iterator[Entry]:
    """Keywords that Unicode CLDR gives to emoji, paired with English ones by the emoji that they share.

    CLDR lists keywords in each language by itself. Two keywords are taken for translations when the sets of emoji
    that they stand at have a Dice coefficient of at least a half, and no English keyword has a higher one; up to three
    equals are all taken. Only the emoji in `characters` are looked at.

    Args:
        folder: `annotations` of the npm package cldr-annotations-full: LANGUAGE/annotations.json.
        characters: emoji -> anything; those whose keywords may be read. languages: BCP-47 tags.

    Raises:
        UsageError: there is no such file for English or for one of the languages, or it is broken.
    """
    english = _keywords(folder, "en", characters)
    for language in languages:
        if language != "en":
            for text, partners in associate(_keywords(folder, language, characters), english).items():
                yield from ((text, partner, language) for partner in partners)


def associate(own: Mapping[str, set[str]], english: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """Keyword -> the English keywords of the highest Dice coefficient, at least 0.5, at most three of them."""
    places: dict[str, list[str]] = defaultdict(list)
    for keyword, emoji in english.items():
        for character in emoji:
            places[character].append(keyword)
    found = {}
    for text, emoji in own.items():
        shared = Counter(itertools.chain.from_iterable(places[character] for character in emoji))
        scores = {keyword: 2 * count / (len(emoji) + len(english[keyword])) for keyword, count in shared.items()}
        best = max(scores.values(), default=0.0)
        partners = sorted(keyword for keyword, score in scores.items() if score >= max(best, 0.5))
        if partners and len(partners) <= 3:
            found[text] = partners
    return found


def read_stamps(folder: Path) -> Iterator[Entry]:
    """What the stamps of Tux Paint show: `**/*.txt`, English in the first line, then lines `LANGUAGE.utf8=TEXT`.

    Raises:
        UsageError: no such file in `folder`, or one cannot be read.
    """
    found = False
    for path in sorted(folder.rglob("*.txt")):
        lines = list(_lines(path))
        for line in lines[1:]:
            tag, sign, text = line.partition(".utf8=")
            if sign and text.strip(" .") and lines[0].strip(" ."):
                found = True
                yield text.strip(" .。"), lines[0].strip(" ."), {"zh_CN": "zh"}.get(tag, tag.replace("_", "-"))
    if not found:
        raise UsageError(
            f"{folder} holds no stamp of Tux Paint with a translation (.txt with lines such as fr.utf8=...), so there "
            "is nothing to read; give the folder stamps of the package tuxpaint-stamps-default"
        )


def _keywords(folder: Path, language: str, characters: Mapping[str, str]) -> dict[str, set[str]]:
    path = folder / language / "annotations.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
        rows = [(character, words) for character in table for words in table[character].get("default", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is no file of CLDR's annotations, so there are no keywords in {language!r}; give the folder "
            "annotations of the npm package cldr-annotations-full, or leave that language out"
        ) from error
    found: dict[str, set[str]] = defaultdict(set)
    for character, word in rows:
        if character.replace("\ufe0f", "") in characters:
            found[word].add(character)
    return dict(found)


def _lines(path: Path) -> Iterator[str]:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        yield from data.decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(
            f"word list {path} cannot be read as UTF-8 text ({error}); give the path of an existing, whole file"
        ) from error
