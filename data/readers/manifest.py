"""Manifests: one line per picture in JSON Lines, JSON, CSV, TSV or Parquet, with paths relative to the manifest."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.data.readers.common import Collector, image_file, relative_uid
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ImageRef, Sample, Turn
from pocketvlm.edge.errors import UsageError, require, unknown_name

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# the names that each column has in the wild, most specific first
_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "image_path", "file_name", "filepath", "filename", "image_file", "img", "path"),
    "caption": ("captions", "caption", "texts", "text", "sentences", "sentence", "title"),
    "label": ("label", "class_name", "class"),
    "group": ("group",),
    "uid": ("uid", "id"),
    "language": ("language", "lang"),
    "conversation": ("conversations", "conversation", "messages"),
}
_TAGS = ("style", "category", "split")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_URL = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]+://|data:)")
_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """Which columns to read; None means: the first known name that the row has.

    caption: one or several columns, separated by commas.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    group: str | None = None
    uid: str | None = None
    language: str | None = None


def read_manifest(path: Path, collector: Collector, columns: Columns | None = None) -> None:
    """Read every row of a manifest into `collector`.

    Rows about the same picture become one sample with all their captions, unless they hold conversations or
    different uids. uid: the uid column, else the picture's path relative to the manifest. Bad rows are counted:
    "invalid-json", "not-an-object", "no-image-field", "not-a-path", "bad-label", "bad-conversation", "empty-answer",
    and the reasons of `Collector`. In CSV and TSV an empty cell means "none".

    Args:
        path: its suffix (one of SUFFIXES) decides the format.
        collector: receives the samples. columns: names that differ from the usual ones.

    Raises:
        UsageError: the file does not exist or is not of its format, holds remote URLs, or has no image column.
        UnknownNameError: a column given in `columns` that no row has.
        MissingExtraError: Parquet without pyarrow.
    """
    columns = columns or Columns()
    if not path.is_file():
        raise UsageError(f"manifest {path} does not exist; give the path of a {', '.join(SUFFIXES)} file")
    reader = _Reader(path, collector, columns)
    for where, row in _rows(path, collector.report):
        reader.add(row, where)
    reader.finish()


class _Reader:
    def __init__(self, path: Path, collector: Collector, columns: Columns) -> None:
        self._path = path
        self._base = path.parent
        self._collector = collector
        self._report = collector.report
        self._columns = columns
        self._seen: dict[str, None] = {}
        self._found_image = False
        self._from_text = path.suffix.lower() in (".csv", ".tsv")

    def add(self, row: Mapping[str, Any], where: str) -> None:
        self._seen.update(dict.fromkeys(row))
        if self._from_text:
            row = {key: value for key, value in row.items() if value != ""}
        found = self._image(row, where)
        if found is None:
            return
        image, uid = found
        label = self._text(row, "label", where)
        group = self._text(row, "group", where)
        given = self._text(row, "uid", where)
        language = self._text(row, "language", where)
        if _MISSING in (label, group, given, language):
            return
        turns = self._conversation(row, where)
        captions = self._collector.captions(self._captions(row), where, language)
        if turns is None or captions is None:
            return
        uid = given or uid
        if turns:
            talk = json.dumps([(turn.role, turn.text) for turn in turns], ensure_ascii=False)
            uid += "#" + hashlib.sha256(talk.encode()).hexdigest()[:8]
        tags = {key: row[key] for key in _TAGS if isinstance(row.get(key), str) and row[key]}
        self._collector.add(
            Sample(uid=uid, image=image, captions=captions, label=label, group=group, tags=tags, conversation=turns),
            where,
        )

    def finish(self) -> None:
        for kind, given in vars(self._columns).items():
            for column in (given or "").split(",") if kind == "caption" else [given or ""]:
                if column.strip() and column.strip() not in self._seen:
                    raise unknown_name(f"{kind} column of {self._path.name}", column.strip(), self._seen or {"none"})
        if self._seen and not self._found_image:
            raise UsageError(
                f"{self._path} has no image column among {', '.join(self._seen)}; "
                f"name it, for instance {self._path.name}?image={next(iter(self._seen))}"
            )

    def _value(self, row: Mapping[str, Any], kind: str) -> Any:
        given = getattr(self._columns, kind, None)
        for name in (given,) if given else _NAMES[kind]:
            if row.get(name) is not None:
                return row[name]
        return None

    def _captions(self, row: Mapping[str, Any]) -> Any:
        if not self._columns.caption:
            return self._value(row, "caption")
        values: list[Any] = []
        names = self._columns.caption.split(",")
        for name in names:
            value = row.get(name.strip())
            found = value if isinstance(value, list) else [] if value is None else [value]
            if len(names) > 1:  # told apart by their names
                found = [{"source": name.strip(), **(v if isinstance(v, Mapping) else {"text": v})} for v in found]
            values += found
        return values or None

    def _image(self, row: Mapping[str, Any], where: str) -> tuple[ImageRef, str] | None:
        value = self._value(row, "image")
        names = (self._columns.image,) if self._columns.image else _NAMES["image"]
        self._found_image |= any(name in self._seen for name in names)
        if value is None:
            self._report.add("no-image-field", where, "the row names no picture")
            return None
        if isinstance(value, Mapping):
            # Hugging Face data sets keep the encoded picture in a struct of bytes and path
            data, value = value.get("bytes"), value.get("path")
            if isinstance(data, bytes):
                digest = hashlib.sha256(data).hexdigest()[:16]
                return ImageRef(data=data), f"{value}" if isinstance(value, str) and value else digest
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            self._report.add("not-a-path", where, f"the image is {value!r} and must be a path")
            return None
        if _URL.match(value):
            raise UsageError(
                f"{where} names the picture {value!r}, which is not a file of this machine; nothing is fetched from "
                "a network here, so download the pictures first (img2dataset does) and give relative paths"
            )
        path = self._base / value
        return image_file(path), relative_uid(path, self._base)

    def _text(self, row: Mapping[str, Any], kind: str, where: str) -> Any:
        value = self._value(row, kind)
        if value is None or (isinstance(value, str) and value.strip()):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        self._report.add(f"bad-{kind}", where, f"the {kind} is {value!r} and must be a text or a whole number")
        return _MISSING

    def _conversation(self, row: Mapping[str, Any], where: str) -> tuple[Turn, ...] | None:
        value = self._value(row, "conversation")
        if value is None:
            return ()
        turns = []
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [None]:
            item = item if isinstance(item, Mapping) else {}
            role = _ROLES.get(str(item.get("from", item.get("role"))))
            text = item.get("value", item.get("content"))
            if role == "assistant" and isinstance(text, str) and not text.strip():
                self._report.add("empty-answer", where, "an answer is empty and would teach silence")
                return None
            if role is None or not isinstance(text, str) or not text.strip():
                self._report.add(
                    "bad-conversation",
                    where,
                    'a conversation is a list like [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]',
                )
                return None
            turns.append(Turn(role, text))  # type: ignore[arg-type]
        return tuple(turns)


def _rows(path: Path, report: BadSampleReport) -> Iterator[tuple[str, Mapping[str, Any]]]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from json_lines(path, report, f"{path}", '{"image": …, "caption": …}')
    elif suffix == ".json":
        yield from _json_list(path, report)
    elif suffix in (".csv", ".tsv"):
        yield from _csv_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise UsageError(f"{path} is no manifest that can be read; its name must end in {', '.join(SUFFIXES)}")


def json_lines(path: Path, report: BadSampleReport, name: str, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line; blank lines are passed over, others that are no object are counted by reason.

    name: of the file, in what is reported. example: of a line.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                report.add("not-utf8-text", where, "the line is not UTF-8 and would be misread")
                continue
            except ValueError as error:
                report.add("invalid-json", where, f"the line is not JSON ({error})")
                continue
            if b"\\ud" in line.lower() and not is_unicode(row):
                report.add(
                    "not-unicode", where, "it holds an unpaired surrogate (half an emoji), which is no character"
                )
                continue
            if isinstance(row, dict):
                yield where, row
            else:
                report.add("not-an-object", where, f"a line must be an object like {example}")


def is_unicode(value: Any) -> bool:
    """Whether texts, alone or in plain JSON, hold no unpaired surrogate, which no tokenizer and no file takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_list(path: Path, report: BadSampleReport) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UsageError(
            f"{path} is not JSON ({error}); name it .jsonl if every line is an object of its own"
        ) from error
    if not isinstance(rows, list):
        raise UsageError(
            f"{path} holds a JSON {type(rows).__name__}; a manifest is a list of objects, and files of COCO captions, "
            f"Karpathy's splits and SugarCrepe are read by coco:{path}, karpathy:{path} and sugarcrepe:{path}"
        )
    for number, row in enumerate(rows):
        where = f"{path}[{number}]"
        if isinstance(row, dict):
            yield where, row
        else:
            report.add("not-an-object", where, 'an entry must be an object like {"image": …, "caption": …}')


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter)
            for row in rows:
                # cells beyond the header have no name, missing cells are None
                yield f"{path}:{rows.line_num}", {key: value for key, value in row.items() if key is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as UTF-8 {path.suffix[1:].upper()} ({error}); save it again"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    parquet = require("pyarrow.parquet", "distill")
    arrow = require("pyarrow", "distill")
    try:
        number = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except (arrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is not a readable Parquet file ({error}); write it again") from error
