"""What every reader does with a caption, a picture and a uid."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketvlm.data.check import check_image
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ORIGINAL, Caption, ImageRef, Sample
from pocketvlm.edge.errors import BadSampleError, UsageError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".avif", ".ppm", ".pgm", ".pnm", ".jp2", ".tga", ".ico"),
    }
)


class Collector:
    """Gathers samples with unique uids, merges rows about one picture, and counts what cannot be used.

    Args:
        name: prefix of every uid. report: where bad samples are counted.
        check: "none", "quick" or "full" (`check_image`). language: BCP-47 tag of captions that carry none.
    """

    def __init__(self, name: str, report: BadSampleReport, *, check: str = "quick", language: str = "en") -> None:
        self.name = name
        self.report = report
        self.language = language
        self._check = check
        self._samples: dict[str, Sample] = {}
        self._refused: set[str] = set()

    @property
    def samples(self) -> list[Sample]:
        return list(self._samples.values())

    def add(self, sample: Sample, where: str) -> None:
        """Keep `sample` (its uid without the prefix), or count why not."""
        sample = dataclasses.replace(sample, uid=f"{self.name}/{sample.uid}")
        known = self._samples.get(sample.uid)
        if known is not None:
            self._merge(known, sample, where)
            return
        if sample.uid in self._refused:
            self.report.note("bad-picture-again", where)
            return
        try:
            check_image(sample.image, self._check)
        except BadSampleError as error:
            self._refused.add(sample.uid)
            self.report.add_error(error, where)
            return
        self._samples[sample.uid] = sample

    def captions(self, value: Any, where: str, language: str | None = None) -> tuple[Caption, ...] | None:
        """Captions from None, a text, {"text", "language", "weight", "source"}, or a list of these.

        Bad ones are counted ("empty-text", "not-a-string", "bad-weight", "bad-language", "bad-source"). Returns an
        empty tuple when there are none, and None when there were some and all were bad: such a sample is left out, not
        unlabelled.
        """
        if value is None:
            return ()
        items = value if isinstance(value, (list, tuple)) else [value]
        kept: dict[tuple[str, str], Caption] = {}
        for item in items:
            caption = self._caption(item, where, language or self.language)
            if caption is not None:
                kept.setdefault((caption.text, caption.language), caption)
        return tuple(kept.values()) if kept or not items else None

    def _caption(self, item: Any, where: str, language: str) -> Caption | None:
        weight: Any = 1.0
        source: Any = ORIGINAL
        if isinstance(item, Mapping):
            language = item.get("language", language)
            weight, source = item.get("weight", 1.0), item.get("source", ORIGINAL)
            item = item.get("text")
        if not isinstance(item, str):
            self.report.add("not-a-string", where, f"a caption is {type(item).__name__} {item!r} and must be text")
        elif not item.strip():
            self.report.add("empty-text", where, "a caption is empty and would teach nothing")
        elif not isinstance(language, str) or not language.strip():
            self.report.add("bad-language", where, f"language {language!r} is not a tag such as 'en' or 'pt-BR'")
        elif isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            self.report.add("bad-weight", where, f"caption weight {weight!r} is not a positive number")
        elif not isinstance(source, str) or not source.strip():
            self.report.add("bad-source", where, f"caption source {source!r} is not a name such as 'rewrite'")
        else:
            return Caption(" ".join(item.split()), language.strip(), float(weight), source.strip())
        return None

    def _merge(self, known: Sample, sample: Sample, where: str) -> None:
        if known.image != sample.image or known.conversation != sample.conversation:
            self.report.add("duplicate-uid", where, f"uid {sample.uid!r} was already given to another sample")
        elif sample.label is not None and known.label not in (None, sample.label):
            self.report.add("conflicting-label", where, f"label {sample.label!r} contradicts {known.label!r}")
        elif sample.group is not None and known.group not in (None, sample.group):
            self.report.add("conflicting-group", where, f"group {sample.group!r} contradicts {known.group!r}")
        else:
            captions = {(caption.text, caption.language): caption for caption in (*sample.captions, *known.captions)}
            ordered = (*known.captions, *sample.captions)
            self._samples[known.uid] = dataclasses.replace(
                known,
                captions=tuple(captions[key] for key in dict.fromkeys((c.text, c.language) for c in ordered)),
                label=known.label if known.label is not None else sample.label,
                group=known.group if known.group is not None else sample.group,
                tags={**sample.tags, **known.tags},
                hard_negatives=tuple(dict.fromkeys((*known.hard_negatives, *sample.hard_negatives))),
            )


def find_images(folder: Path) -> list[Path]:
    """Every picture below `folder` by file suffix, ordered by relative path; hidden files are left out.

    Raises:
        UsageError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder; pictures are looked for below one, so give the folder that holds them"
        )
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def relative_uid(path: Path, base: Path) -> str:
    """`path` as seen from `base`, with forward slashes: the same on every machine that holds the same tree."""
    return Path(os.path.relpath(path, base)).as_posix()


def image_file(path: Path) -> ImageRef:
    """A reference to a whole file."""
    return ImageRef(path=path)
