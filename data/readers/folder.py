"""Folders of pictures whose names are the labels (the layout of torchvision's ImageFolder), and plain folders."""

from __future__ import annotations

from pathlib import Path

from pocketvlm.data.readers.common import Collector, find_images, image_file, relative_uid
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import UsageError


def read_class_folder(folder: Path, collector: Collector, *, label_captions: bool = True) -> None:
    """One sample per picture of `folder`/CLASS/…; label: the name of the first folder level.

    Args:
        folder: holds one folder per class.
        collector: receives the samples; uid: the path relative to `folder`.
        label_captions: give each sample its label as caption, with "_" read as a space; else it has none.

    Raises:
        UsageError: no folder, or pictures but no class folder.
    """
    pictures = find_images(folder)
    if pictures and all(path.parent == folder for path in pictures):
        raise UsageError(
            f"{folder} holds pictures but no folder per class, so there would be no labels; "
            f"use images:{folder} or sidecar:{folder} instead"
        )
    for path in pictures:
        where = str(path)
        if path.parent == folder:
            collector.report.add("no-class-folder", where, "the picture lies beside the class folders, not in one")
            continue
        label = path.relative_to(folder).parts[0]
        captions = collector.captions(label.replace("_", " "), where) if label_captions else ()
        if captions is not None:
            collector.add(
                Sample(uid=relative_uid(path, folder), image=image_file(path), captions=captions, label=label), where
            )


def read_images(folder: Path, collector: Collector) -> None:
    """One sample without captions per picture below `folder`; uid: the relative path.

    Raises:
        UsageError: `folder` is not a folder.
    """
    for path in find_images(folder):
        collector.add(Sample(uid=relative_uid(path, folder), image=image_file(path)), str(path))
