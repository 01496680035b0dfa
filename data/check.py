"""Finds pictures that cannot be decoded, without decoding those that visibly end where their format says."""

from __future__ import annotations

import os

from pocketvlm.data.sample import ImageRef
from pocketvlm.edge.errors import BadSampleError, unknown_name
from pocketvlm.edge.preprocess import decode_image

CHECKS = ("none", "quick", "full")
_EDGE = 64


def check_mode(value: str | bool) -> str:
    """`value` as one of CHECKS; True means "full", False "none".

    Raises:
        UnknownNameError: another text.
    """
    if isinstance(value, bool):
        return "full" if value else "none"
    if value not in CHECKS:
        raise unknown_name("value of check_images", value, CHECKS)
    return value


def check_image(image: ImageRef, mode: str) -> None:
    """Refuse a picture that cannot be used.

    Args:
        image: where the encoded bytes are.
        mode: "none" looks at nothing; "quick" looks at the first and last bytes and decodes only where these do not
            prove that the file is whole (a few microseconds a picture); "full" decodes.

    Raises:
        BadSampleError: reasons of `decode_image`, and "missing-file", "unreadable-file", "truncated-image".
    """
    if mode == "none" or (mode == "quick" and _looks_whole(image)):
        return
    decode_image(image.read())


def _looks_whole(image: ImageRef) -> bool:
    head, tail, length = _ends(image)
    if head.startswith(b"\xff\xd8\xff"):
        return tail.rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return tail.endswith(b"IEND\xaeB`\x82")
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return int.from_bytes(head[4:8], "little") + 8 <= length
    return False


def _ends(image: ImageRef) -> tuple[bytes, bytes, int]:
    if image.data is not None:
        return image.data[:_EDGE], image.data[-_EDGE:], len(image.data)
    assert image.path is not None, "an ImageRef has a path or data"
    try:
        with open(image.path, "rb") as file:
            end = os.fstat(file.fileno()).st_size
            stop = end if image.length is None else image.offset + image.length
            if stop > end:
                raise BadSampleError(
                    f"{image.path} ends {stop - end} bytes before the picture at byte {image.offset} does; "
                    "the sample cannot be used",
                    reason="truncated-image",
                )
            file.seek(image.offset)
            head = file.read(min(_EDGE, stop - image.offset))
            file.seek(max(image.offset, stop - _EDGE))
            return head, file.read(stop - file.tell()), stop - image.offset
    except FileNotFoundError as error:
        raise BadSampleError(
            f"image file {image.path} does not exist; the sample cannot be used", reason="missing-file"
        ) from error
    except OSError as error:
        raise BadSampleError(
            f"image file {image.path} cannot be read ({error.strerror}); the sample cannot be used",
            reason="unreadable-file",
        ) from error
