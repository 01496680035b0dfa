"""The sample: what every reader yields and everything downstream consumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pocketvlm.edge.errors import BadSampleError


@dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of one image are: a file, a byte range of a file (tar member), or memory."""

    path: Path | None = None
    offset: int = 0
    length: int | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            BadSampleError: reason "missing-file" or "unreadable-file".
        """
        if self.data is not None:
            return self.data
        assert self.path is not None, "an ImageRef has a path or data"
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read() if self.length is None else file.read(self.length)
        except FileNotFoundError as error:
            raise BadSampleError(
                f"image file {self.path} does not exist; the sample cannot be used", reason="missing-file"
            ) from error
        except OSError as error:
            raise BadSampleError(
                f"image file {self.path} cannot be read ({error.strerror})", reason="unreadable-file"
            ) from error


# the source of a caption that names none
ORIGINAL = "original"


@dataclass(frozen=True)
class Caption:
    """One text for an image. `weight` is relative within the sample; `language` is a BCP-47 tag.

    source: where the text comes from, such as "original" or "rewrite"; `DataSource.weighed` weighs by it."""

    text: str
    language: str = "en"
    weight: float = 1.0
    source: str = ORIGINAL


@dataclass(frozen=True)
class HardNegative:
    """A text that is false of a picture and differs little from `caption`, which is true of it.

    kind: how the one was made from the other, such as "replace_attribute" or "swap_object"."""

    caption: str
    text: str
    kind: str


@dataclass(frozen=True)
class Turn:
    """One message of a conversation (used by generative students)."""

    role: Literal["user", "assistant", "system"]
    text: str


@dataclass(frozen=True)
class Sample:
    """One image with what is known about it.

    uid: stable across runs, machines and orderings; cache keys and random streams are derived from it.
    captions: empty for an unlabelled image. group: samples of one group never fall into different pools.
    label: a class name where the source has one. tags: source-specific facts ("style", "category").
    hard_negatives: false texts to be told from true ones; for evaluation only, no student is trained on them.
    """

    uid: str
    image: ImageRef
    captions: tuple[Caption, ...] = ()
    label: str | None = None
    group: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    conversation: tuple[Turn, ...] = ()
    hard_negatives: tuple[HardNegative, ...] = ()
