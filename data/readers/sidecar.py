"""Pictures with a text file of the same name beside them: cat.jpg, cat.txt."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.data.readers.common import Collector, find_images, image_file, relative_uid
from pocketvlm.data.sample import Sample


def read_sidecar(folder: Path, collector: Collector) -> None:
    """One sample per picture below `folder`; every line of its .txt file with a text is a caption (UTF-8).

    A picture without a text file stays, unlabelled. An empty text file is counted as "empty-text", one that is not
    UTF-8 as "not-utf8-text", and the picture is left out.

    Raises:
        UsageError: `folder` is not a folder.
    """
    for path in find_images(folder):
        where = str(path)
        text_file = path.with_suffix(".txt")
        lines: list[str] | None = None
        if text_file.is_file():
            try:
                lines = text_file.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                collector.report.add("not-utf8-text", str(text_file), "the text is not UTF-8 and would be misread")
                continue
            lines = [line for line in lines if line.strip()] or [""]
        captions = collector.captions(lines, where)
        if captions is not None:
            collector.add(Sample(uid=relative_uid(path, folder), image=image_file(path), captions=captions), where)
