"""The one syntax that names any data set: `KIND:PATH?option=value&option=value`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from pocketvlm.data.readers.common import IMAGE_SUFFIXES
from pocketvlm.data.readers.manifest import SUFFIXES
from pocketvlm.edge.errors import UsageError, unknown_name

BUILT_IN = ("openmoji",)
KINDS = (
    *("manifest", "folder", "sidecar", "images", "wds"),
    *("imagenet", "elevater", "coco", "karpathy", "flickr30k", "sugarcrepe"),
)
_COMMON = frozenset({"pool", "fold", "folds", "captions", "shots", "language", "limit"})
_FILES = _COMMON | {"check", "caption_language"}
OPTIONS: dict[str, frozenset[str]] = {
    "openmoji": _COMMON | {"skin_tones", "flags", "labels", "size"},
    "manifest": _FILES | {"image", "caption", "label", "group", "uid", "language_column"},
    "folder": _FILES | {"label_captions"},
    "sidecar": _FILES,
    "images": _COMMON | {"check"},
    "wds": _FILES,
    "imagenet": _FILES | {"classes", "templates", "label_captions"},
    "elevater": _FILES | {"split", "templates", "label_captions"},
    "coco": _FILES | {"images"},
    "karpathy": _FILES | {"images", "split"},
    "flickr30k": _FILES | {"images", "split"},
    "sugarcrepe": _FILES | {"images"},
}
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True)
class DataSpec:
    """A parsed data set name. kind: "openmoji" or one of KINDS; path: "" for built-in sets; options: as text."""

    text: str
    kind: str
    path: str = ""
    options: dict[str, str] = field(default_factory=dict)

    def flag(self, name: str, default: bool = False) -> bool:
        """An option that is 1/0, true/false or yes/no."""
        value = self.options.get(name)
        if value is None:
            return default
        if value.lower() in ("1", "true", "yes", ""):
            return True
        if value.lower() in ("0", "false", "no"):
            return False
        raise UsageError(f"option {name}={value} of data set {self.text!r} is a switch; use {name}=1 or {name}=0")

    def whole(self, name: str, default: int | None = None) -> int | None:
        """An option that is a whole number."""
        value = self.options.get(name)
        if value is None:
            return default
        try:
            return int(value)
        except ValueError:
            raise UsageError(f"option {name}={value} of data set {self.text!r} must be a whole number") from None

    def share(self, name: str, default: float = 1.0) -> float:
        """An option that is a number."""
        value = self.options.get(name)
        try:
            return default if value is None else float(value)
        except ValueError:
            raise UsageError(f"option {name}={value} of data set {self.text!r} must be a number from 0 to 1") from None


def parse_spec(text: str) -> DataSpec:
    """Split a data set name and decide its kind; nothing is read but folder listings.

    Raises:
        UsageError: the path does not exist, is a URL, or its content fits no kind.
        UnknownNameError: no such data set, kind or option.
    """
    body, options = _split_options(text)
    if not body:
        raise UsageError("the data set has no name; give 'openmoji', a manifest file or a folder")
    if _URL.match(body):
        raise UsageError(
            f"data set {text!r} is a network address and nothing is fetched from a network here; "
            "download it first and give its path"
        )
    head, colon, rest = body.partition(":")
    if body in BUILT_IN:
        kind, path = body, ""
    elif colon and head in KINDS:
        kind, path = head, rest
        if not path:
            raise UsageError(f"data set {text!r} has no path after {head}:; write {head}:PATH")
    elif colon and len(head) > 1 and not os.path.exists(body) and re.fullmatch(r"\w+", head):
        raise unknown_name("kind of data set", head, (*KINDS, *BUILT_IN))
    else:
        kind, path = _detect(body), body
    options = {"language" if key == "languages" else key: value for key, value in options.items()}
    for key in options:
        if key not in OPTIONS[kind]:
            raise unknown_name(f"option of a data set of kind {kind!r}", key, OPTIONS[kind])
    return DataSpec(text, kind, path, options)


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    body, mark, query = text.strip().rpartition("?")
    # a question mark may belong to a glob pattern or to a file name
    asks = "=" in query or not query or body in BUILT_IN or os.path.exists(body)
    if not mark or not asks or os.path.exists(text.strip()):
        return text.strip(), {}
    options: dict[str, str] = {}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if part and not equals:
            raise UsageError(f"option {part!r} of data set {text!r} has no value; write {part}=VALUE")
        if key in options:
            raise UsageError(f"option {key!r} of data set {text!r} is given twice; keep one of them")
        if part:
            options[unquote(key)] = unquote(value)
    return body, options


def _detect(body: str) -> str:
    lower = body.lower()
    if lower.endswith(".tar"):
        return "wds"
    path = Path(body)
    if path.is_dir():
        return _detect_folder(path)
    if lower.endswith(SUFFIXES):
        return "manifest"
    if path.exists():
        raise UsageError(
            f"{body} is no data set that can be read; give a manifest ({', '.join(SUFFIXES)}), a folder or .tar shards"
        )
    if os.sep in body or "/" in body or "." in body:
        raise UsageError(f"data set {body} does not exist; correct the path, or use the built-in 'openmoji'")
    raise unknown_name("data set", body, (*BUILT_IN, *(f"{kind}:PATH" for kind in KINDS)))


def _detect_folder(folder: Path) -> str:
    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    if any(path.suffix == ".tar" for path in names):
        return "wds"
    pictures = [path for path in names if path.suffix.lower() in IMAGE_SUFFIXES]
    if pictures:
        return "sidecar" if any(path.with_suffix(".txt").is_file() for path in pictures) else "images"
    if any(path.is_dir() for path in names):
        return "folder"
    raise UsageError(
        f"folder {folder} holds neither pictures, nor class folders, nor .tar shards; nothing can be read from it"
    )
