"""Tar shards in the WebDataset layout, read in place: an index of byte ranges, no unpacking, random access.

Files of one key (the path up to the first dot of the file name) make one sample: `0001.jpg`, `0001.txt`,
`0001.json` (img2dataset writes "caption" there), `0001.cls`.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pocketvlm.data.readers.common import IMAGE_SUFFIXES, Collector
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.edge.errors import UsageError

_TEXT_SUFFIXES = (".txt", ".caption", ".text")
_BRACES = re.compile(r"\{([^{}]*)\}")
# members that are read as text
TEXTS = frozenset({*_TEXT_SUFFIXES, ".json", ".cls"})
# a caption or a class number; anything longer is not what its name says
LONGEST_TEXT = 1 << 20


def expand_braces(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" and "{x,y}.tar" as lists of names, in order; several braces multiply.

    Raises:
        UsageError: a brace that is never closed, or a range that runs backwards.
    """
    parts = _BRACES.split(pattern)
    if "{" in "".join(parts[::2]) or "}" in "".join(parts[::2]):
        raise UsageError(f"the braces of {pattern!r} do not match; write a range like shard-{{000..003}}.tar")
    choices = [_alternatives(part, pattern) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(combination) for combination in product(*choices)]


def find_shards(pattern: str) -> list[Path]:
    """The tar files that a brace pattern, a glob pattern, a folder or a single path names.

    Raises:
        UsageError: one of them does not exist, or there is none.
    """
    shards: list[Path] = []
    for name in expand_braces(pattern):
        path = Path(name)
        if path.is_dir():
            shards += sorted(path.glob("*.tar"))
        elif any(mark in name for mark in "*?[") and not path.exists():
            shards += [Path(found) for found in sorted(glob.glob(name))]
        elif path.is_file():
            shards.append(path)
        else:
            raise UsageError(f"tar shard {name} does not exist; correct the range or the path of {pattern!r}")
    if not shards:
        raise UsageError(
            f"{pattern!r} names no tar shard; give a .tar file, a range like {{000..003}}, or their folder"
        )
    return shards


def read_webdataset(shards: list[Path], collector: Collector) -> None:
    """One sample per key that has a picture; only texts are read now, pictures stay in their shard.

    uid: shard stem and key. Members that are links, devices, sparse or lead outside the archive are never read; they
    are counted as "unsafe-member". A shard that breaks off keeps the samples before the break ("truncated-archive").

    Raises:
        UsageError: a shard is compressed or no tar file at all.
    """
    for shard in shards:
        members: dict[str, dict[str, tarfile.TarInfo]] = {}
        for member in _members(shard, collector):
            if (named := key_of(member.name)) is not None:
                members.setdefault(named[0], {}).setdefault(named[1], member)
        with open(shard, "rb") as file:
            for key, parts in members.items():
                _add_sample(shard, file, key, parts, collector)


def _add_sample(shard: Path, file: BinaryIO, key: str, parts: dict[str, tarfile.TarInfo], collector: Collector) -> None:
    where = f"{shard}:{key}"
    image = next((part for suffix, part in parts.items() if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        collector.report.add("no-image-member", where, "the key has no picture among its files")
        return
    try:
        texts = {suffix: _read(file, part) for suffix, part in parts.items() if suffix in TEXTS}
        found, label, language = described(texts)
    except ValueError as error:
        collector.report.add("unreadable-text", where, f"its text cannot be read ({error})")
        return
    captions: tuple[Caption, ...] | None = collector.captions(found, where, language)
    if captions is not None:
        reference = ImageRef(path=shard, offset=image.offset_data, length=image.size)
        collector.add(Sample(uid=f"{shard.stem}/{key}", image=reference, captions=captions, label=label), where)


def described(texts: Mapping[str, str]) -> tuple[list[Any], str | None, Any]:
    """Captions, label and language of one key from its text members by suffix (`TEXTS`).

    In the JSON, "caption" and "captions" are a text, {"text", "weight", "language", "source"}, or a list of these; one
    that says more of a text than its .txt does takes its place.

    Raises:
        ValueError: the JSON is none.
    """
    meta = json.loads(texts[".json"]) if ".json" in texts else {}
    meta = meta if isinstance(meta, dict) else {}
    told = [*_as_list(meta.get("caption")), *_as_list(meta.get("captions"))]
    said = {caption.get("text") for caption in told if isinstance(caption, dict)}
    plain = [texts[suffix].strip() for suffix in _TEXT_SUFFIXES if suffix in texts]
    label = texts[".cls"].strip() if ".cls" in texts else _text_or_none(meta.get("label"))
    return [*(text for text in plain if text not in said), *told], label, meta.get("language")


def _members(shard: Path, collector: Collector) -> Iterator[tarfile.TarInfo]:
    try:
        archive = tarfile.open(shard, "r:")  # noqa: SIM115 (closed below; a generator cannot hand over the context)
    except tarfile.ReadError as error:
        raise UsageError(
            f"{shard} is not an uncompressed tar file ({error}); pictures are read in place by byte range, "
            "so unpack a .tar.gz to .tar first"
        ) from error
    with archive:
        while True:
            try:
                member = archive.next()
            except (tarfile.TarError, EOFError, OSError) as error:
                collector.report.add("truncated-archive", str(shard), f"the archive breaks off ({error})")
                return
            if member is None:
                return
            if member.isdir():
                continue
            if not is_safe(member):
                collector.report.note("unsafe-member", f"{shard}:{member.name}")
            else:
                yield member


def key_of(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member: up to the first dot of its file name, and the rest; None for what has no dot."""
    folder, _, file_name = name.rpartition("/")
    stem, dot, suffix = file_name.partition(".")
    if not dot or not stem:
        return None
    return (f"{folder}/{stem}" if folder else stem), "." + suffix.lower()


def is_safe(member: tarfile.TarInfo) -> bool:
    """Whether a member is a plain file that stays below the archive."""
    path = PurePosixPath(member.name)
    plain = member.isreg() and not member.issparse()
    return plain and not path.is_absolute() and ".." not in path.parts and "\\" not in member.name


def _read(file: BinaryIO, member: tarfile.TarInfo) -> str:
    if member.size > LONGEST_TEXT:
        raise ValueError(f"{member.name} has {member.size} bytes")
    file.seek(member.offset_data)
    return file.read(member.size).decode("utf-8-sig")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _text_or_none(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _alternatives(inside: str, pattern: str) -> list[str]:
    first, dots, last = inside.partition("..")
    if not dots:
        return inside.split(",")
    if not (first.isdigit() and last.isdigit() and int(first) <= int(last)):
        raise UsageError(f"the range {{{inside}}} of {pattern!r} does not count upwards; write it like {{000..003}}")
    width = len(first) if first.startswith("0") else 0
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
