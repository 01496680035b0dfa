"""Opens any data set by its name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pocketvlm.data.check import check_image, check_mode
from pocketvlm.data.openmoji import SIZE, languages, licences, openmoji_samples
from pocketvlm.data.readers.captioned import read_coco, read_flickr30k, read_karpathy, read_sugarcrepe
from pocketvlm.data.readers.classes import read_elevater, read_imagenet, read_templates
from pocketvlm.data.readers.common import Collector
from pocketvlm.data.readers.folder import read_class_folder, read_images
from pocketvlm.data.readers.manifest import Columns, read_manifest
from pocketvlm.data.readers.sidecar import read_sidecar
from pocketvlm.data.readers.webdataset import find_shards, read_webdataset
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.source import DataSource
from pocketvlm.data.spec import DataSpec, parse_spec
from pocketvlm.data.splits import FOLDS
from pocketvlm.edge.errors import BadSampleError, UsageError

Progress = Callable[[int, int, str], None]


def open_data(
    spec: str,
    *,
    on_bad_sample: str = "skip",
    check_images: str | bool = "quick",
    progress: Progress | None = None,
) -> DataSource:
    """Open a data set.

    Args:
        spec: `openmoji`; a manifest (.jsonl, .json, .csv, .tsv, .parquet); a folder; tar shards such as
            `shards/{000..003}.tar`; or KIND:PATH with KIND one of manifest, folder (a folder per class), sidecar
            (pictures with .txt files), images (no captions), wds, or one of the field's own sets: imagenet, elevater,
            coco, karpathy, flickr30k, sugarcrepe. Options follow after "?": `pool`, `fold`, `folds`,
            `captions`, `shots`, `language`, `limit` for every kind, and those of its kind (docs/data.md).
        on_bad_sample: "skip" counts what cannot be used in `report`; "refuse" raises at the first.
        check_images: "quick" looks at the ends of every file, "full" (or True) decodes it, "none" (or False) trusts.
            The built-in set checks its own files. Overrules the option `check=` unless left at its default.
        progress: called as (done, total, what) while pictures are drawn.

    Raises:
        UnknownNameError: no such data set, kind, option, pool, language or column; the message suggests near ones.
        UsageError: nothing is left, a path does not exist, a URL, or a value that cannot work.
        BadSampleError: the first bad sample, when `on_bad_sample` is "refuse".
        MissingExtraError: the data set needs a package that is not installed.
    """
    parsed = parse_spec(spec)
    report = BadSampleReport(on_bad_sample)
    check = check_mode(check_images)
    if check == "quick" and "check" in parsed.options:
        check = check_mode(parsed.options["check"])
    source = _built_in(parsed, report, progress) if parsed.kind == "openmoji" else _files(parsed, report, check)
    report.refuse_empty(spec, len(source))
    pool = parsed.options.get("pool")
    if pool is None and ("fold" in parsed.options or "folds" in parsed.options):
        raise UsageError(f"data set {spec!r} names a fold but no pool, so all of it would be used; add pool=…")
    return source.select(
        pool=pool,
        fold=parsed.whole("fold", 0) or 0,
        folds=_or(parsed.whole("folds"), FOLDS),
        captions=parsed.share("captions"),
        shots=parsed.whole("shots"),
        # openmoji has read only the languages that were asked for
        language=None if parsed.kind == "openmoji" else parsed.options.get("language"),
        limit=parsed.whole("limit"),
    )


def drop_undecodable(source: DataSource) -> DataSource:
    """Decode every picture once and leave out, counted, those that fail.

    Raises:
        BadSampleError: the first of them, when the source was opened with on_bad_sample="refuse".
        UsageError: none is left.
    """
    kept = []
    for sample in source.samples:
        try:
            check_image(sample.image, "full")
        except BadSampleError as error:
            source.report.add_error(error, sample.uid)
            continue
        kept.append(sample)
    source.report.refuse_empty(source.name, len(kept))
    return replace(source, samples=kept)


def _built_in(spec: DataSpec, report: BadSampleReport, progress: Progress | None) -> DataSource:
    wanted = spec.options.get("language", "en")
    samples = openmoji_samples(
        languages=languages() if wanted == "all" else [tag.strip() for tag in wanted.split(",")],
        skin_tones=spec.flag("skin_tones"),
        flags=spec.options.get("flags", "include"),
        labels=spec.options.get("labels", "name"),
        size=_or(spec.whole("size"), SIZE),
        progress=progress,
    )
    return DataSource("openmoji", samples, report, licences())


def _files(spec: DataSpec, report: BadSampleReport, check: str) -> DataSource:
    path = Path(spec.path)
    shards = find_shards(spec.path) if spec.kind == "wds" else []
    # the folder's own name also for "." and "..", so that uids do not depend on where one stands
    folder = shards[0].parent if len(shards) > 1 else path
    name = Path(os.path.abspath(folder)).name or "data"
    if spec.kind == "manifest" or len(shards) == 1 or path.is_file():
        name = (shards[0] if shards else path).stem
    collector = Collector(name, report, check=check, language=spec.options.get("caption_language", "en"))
    templates: tuple[str, ...] = ()
    if spec.kind == "manifest":
        options = spec.options
        read_manifest(
            path,
            collector,
            Columns(
                image=options.get("image"),
                caption=options.get("caption"),
                label=options.get("label"),
                group=options.get("group"),
                uid=options.get("uid"),
                language=options.get("language_column"),
            ),
        )
    elif spec.kind == "wds":
        read_webdataset(shards, collector)
    elif spec.kind == "folder":
        read_class_folder(path, collector, label_captions=spec.flag("label_captions", True))
    elif spec.kind == "sidecar":
        read_sidecar(path, collector)
    elif spec.kind == "images":
        read_images(path, collector)
    else:
        templates = _own_set(spec, path, collector)
    return DataSource(name, collector.samples, report, templates=templates)


def _own_set(spec: DataSpec, path: Path, collector: Collector) -> tuple[str, ...]:
    """Read one of the field's own sets; the prompts that it brings along."""
    options = spec.options
    images = Path(options["images"]) if "images" in options else None
    label_captions, split = spec.flag("label_captions", True), options.get("split", "test")
    if spec.kind in ("imagenet", "elevater"):
        if spec.kind == "imagenet":
            read_imagenet(path, collector, options.get("classes"), label_captions=label_captions)
        else:
            read_elevater(path, collector, split, label_captions=label_captions)
        return read_templates(path, options.get("templates"))
    if spec.kind == "coco":
        read_coco(path, collector, images)
    elif spec.kind == "karpathy":
        read_karpathy(path, collector, images, split)
    elif spec.kind == "flickr30k":
        read_flickr30k(path, collector, images, split)
    else:
        read_sugarcrepe(path, collector, images)
    return ()


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
