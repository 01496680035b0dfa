"""Parallel texts: a text in some language beside the English that means the same.

A text tower learns a language from them: it embeds the text, and the teacher's embedding of the English is the target.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketvlm.data.opening import open_data
from pocketvlm.data.readers.bilingual import (
    dictd_languages,
    read_annotations,
    read_cedict,
    read_dictd,
    read_stamps,
    read_table,
)
from pocketvlm.data.source import DataSource
from pocketvlm.data.wordlist import comparison_key
from pocketvlm.edge.errors import UsageError, require, unknown_name

KINDS = ("captions", "dictd", "cedict", "annotations", "stamps", "table")
_LICENCES = {
    "dictd": (
        "bilingual dictionaries given by the user",
        "as their files say (FreeDict: GPL)",
        "see each dictionary's own notice",
    ),
    "cedict": (
        "CC-CEDICT, given by the user",
        "CC BY-SA 4.0",
        "CC-CEDICT by its editors, from Paul Denisowski's CEDICT",
    ),
    "annotations": ("emoji keywords of Unicode CLDR", "Unicode License v3", "Copyright (c) 1991-2026 Unicode, Inc."),
    "stamps": ("descriptions of Tux Paint's stamps, given by the user", "GPL", "the authors of Tux Paint's stamps"),
    "table": ("table of parallel texts given by the user", "as its author says", "see the table's own notice"),
}


@dataclass(frozen=True)
class Pair:
    """text: in `language` (a BCP-47 tag). english: what it means. source: the kind of list that it is from."""

    text: str
    english: str
    language: str
    source: str


def parallel_texts(
    sources: Sequence[str],
    *,
    languages: Sequence[str] = (),
    per_language: int | None = None,
    withheld: Iterable[str] = (),
    strict: bool = True,
) -> list[Pair]:
    """Distinct pairs of all sources, in a fixed order.

    Args:
        sources: each `KIND:WHAT`. "captions:SPEC": samples of a data set (`open_data`) with captions in English and in
            other languages. "dictd:FILE.index" or "dictd:FOLDER": dictionaries of dictd, such as FreeDict's; of a
            folder, all that have English on one side. "cedict:FILE": CC-CEDICT. "annotations:FOLDER?SPEC": emoji
            keywords of CLDR, for the emoji of a built-in data set. "stamps:FOLDER": Tux Paint's.
            "table:FILE": a .tsv or .jsonl of pairs.
        languages: keep these; empty keeps all.
        per_language: at most so many dictionary pairs in each language, those with the most frequent English first
            (package wordfreq; the rarest word counts); pairs from captions, annotations and stamps are not counted.
        withheld: captions that are scored. No text that equals one of them in its own language is kept from captions
            or annotations. strict: neither is any pair of any source whose English equals one (`english_key`).

    Raises:
        UsageError: a source that cannot be read, or nothing is left. UnknownNameError: no such kind.
    """
    denied_text = {comparison_key(text) for text in withheld}
    denied_english = {english_key(text) for text in withheld}
    kept: dict[tuple[str, str, str], Pair] = {}
    for source in sources:
        kind, what = split_source(source)
        for text, english, language in _entries(kind, what, languages):
            english, key = " ".join(english.split()), english_key(english)
            if (languages and language not in languages) or language == "en" or not key or not comparison_key(text):
                continue
            if strict and key in denied_english:
                continue
            if kind in ("captions", "annotations") and (key in denied_english or comparison_key(text) in denied_text):
                continue
            kept.setdefault((language, text.casefold(), key), Pair(text, _bare(english), language, kind))
    pairs = list(kept.values())
    if per_language is not None:
        pairs = _most_frequent(pairs, per_language)
    if not pairs:
        raise UsageError(
            f"parallel texts {', '.join(sources) or '(no source)'} hold no pair in the languages asked for, so no "
            "language would be learned; correct the sources or the languages"
        )
    return pairs


def parallel_licences(sources: Sequence[str]) -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) of `sources`; captions bring those of their own data set."""
    rows: list[tuple[str, str, str]] = []
    for source in sources:
        kind, what = split_source(source)
        rows += open_data(what).licences if kind == "captions" else [_LICENCES[kind]]
    return tuple(dict.fromkeys(rows))


def english_key(text: str) -> str:
    """What makes two English texts equal: letters and digits, case-folded, without a leading article or "to"."""
    return comparison_key(_bare(text))


def split_source(source: str) -> tuple[str, str]:
    """(kind, rest) of a source's name."""
    kind, _, what = source.partition(":")
    if kind not in KINDS:
        raise unknown_name("kind of parallel texts", kind, KINDS)
    if not what:
        raise UsageError(f"parallel texts {source!r} name no file; write {kind}: and what to read")
    return kind, what


def caption_pairs(source: DataSource) -> Iterator[tuple[str, str, str]]:
    """(text, English, language) of every caption beside the sample's first English one."""
    for sample in source:
        english = next((caption.text for caption in sample.captions if caption.language == "en"), None)
        if english is not None:
            yield from ((c.text, english, c.language) for c in sample.captions if c.language != "en")


def _entries(kind: str, what: str, languages: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    if kind == "captions":
        yield from caption_pairs(open_data(what))
    elif kind == "cedict":
        yield from read_cedict(Path(what))
    elif kind == "stamps":
        yield from read_stamps(Path(what))
    elif kind == "table":
        yield from read_table(Path(what))
    elif kind == "annotations":
        folder, _, spec = what.partition("?")
        yield from _annotations(Path(folder), spec or "openmoji", languages)
    else:
        for path in _indices(Path(what)):
            told = dictd_languages(path)
            if told is None or not languages or told[0] in languages:
                yield from read_dictd(path)


def _indices(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*.index") if dictd_languages(file)) if path.is_dir() else []
    if not found:
        raise UsageError(
            f"{path} is neither an index of dictd nor a folder with dictionaries such as freedict-fra-eng.index, so "
            "there is nothing to read; install some (Debian: dict-freedict-fra-eng), or give their folder"
        )
    return found


def _annotations(folder: Path, spec: str, languages: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    known = languages or require("emoji", "demo").LANGUAGES
    stems = [sample.uid.removeprefix("openmoji/") for sample in open_data(spec)]
    characters = {"".join(chr(int(point, 16)) for point in stem.split("-") if point != "FE0F"): stem for stem in stems}
    yield from read_annotations(folder, characters, known)


def _most_frequent(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    rank = functools.cache(require("wordfreq", "distill").zipf_frequency)
    listed: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for place, pair in enumerate(pairs):
        if pair.source not in ("captions", "annotations", "stamps"):
            rarest = min(rank(word, "en") for word in pair.english.split())
            listed[pair.language].append((-rarest, place))
    gone = {place for rows in listed.values() for _, place in sorted(rows)[limit:]}
    return [pair for place, pair in enumerate(pairs) if place not in gone]


def _bare(text: str) -> str:
    head, _, rest = text.strip().partition(" ")
    return rest.strip() if head.casefold() in ("a", "an", "the", "to") and rest.strip() else text.strip()
