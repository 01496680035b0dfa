"""Classification sets of the field: ImageNet's class folders with their names, and ELEVATER's index files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from pocketvlm.data.readers.common import Collector, find_images, image_file, relative_uid
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import UsageError

CLASS_FILES = ("LOC_synset_mapping.txt", "imagenet_class_index.json", "words.txt", "classnames.txt", "labels.txt")
_WNID = re.compile(r"n\d{8}")


def read_templates(folder: Path, given: str | None) -> tuple[str, ...]:
    """The prompts of `given`, or of templates.txt in `folder`: a line each, with {} for the name; () without either.

    Raises:
        UsageError: the file does not exist, or a line has no {}.
    """
    path = Path(given) if given else folder / "templates.txt"
    if not given and not path.is_file():
        return ()
    lines = [line for line in _lines(path, "templates") if line]
    bad = [line for line in lines if "{}" not in line]
    if bad or not lines:
        raise UsageError(
            f"{path} must have prompts such as 'a photo of a {{}}.', one a line, and has "
            f"{bad[0] if bad else 'none'!r}; "
            "without {} every class would get the same text"
        )
    return tuple(lines)


def read_imagenet(folder: Path, collector: Collector, classes: str | None = None, *, label_captions: bool) -> None:
    """ImageNet's layout: `folder`/n01440764/*.JPEG and a file of class names.

    The file is one of CLASS_FILES in the folder or up to two above it, or `classes`: lines "n01440764 tench, Tinca
    tinca" (space or tab), or names alone in the order of the sorted folders; JSON {"0": ["n01440764", "tench"]} or
    {"n01440764": "tench"}. The label is the first name; where two classes share it, all their names; where they still
    are the same, the name with the wnid in brackets, which no prompt can tell apart.

    Args:
        collector: receives the samples; uid: the path relative to `folder`; group: none.
        label_captions: give each sample its label as caption.

    Raises:
        UsageError: no folder per class, no file of names, or a class without a name.
    """
    pictures = find_images(folder)
    wnids = sorted({path.relative_to(folder).parts[0] for path in pictures if path.parent != folder})
    if not wnids:
        raise UsageError(
            f"{folder} holds no picture in a folder per class such as n01440764/, so there would be no labels; "
            "sort the pictures into class folders first"
        )
    labels = _labels(_class_names(_class_file(folder, classes), wnids), wnids)
    for path in pictures:
        if path.parent == folder:
            collector.report.add("no-class-folder", str(path), "the picture lies beside the class folders, not in one")
            continue
        label = labels[path.relative_to(folder).parts[0]]
        captions = collector.captions(label, str(path)) if label_captions else ()
        if captions is not None:
            sample = Sample(uid=relative_uid(path, folder), image=image_file(path), captions=captions, label=label)
            collector.add(sample, str(path))


def _class_file(folder: Path, given: str | None) -> Path:
    if given:
        return Path(given)
    above = (folder, *list(folder.resolve().parents)[:2])
    found = [base / name for base in above for name in CLASS_FILES if (base / name).is_file()]
    if not found:
        raise UsageError(
            f"{folder} has none of {', '.join(CLASS_FILES)} in it or above it, so n01440764 would have no name; add "
            "one, or name it with classes=FILE"
        )
    return found[0]


def _class_names(path: Path, wnids: list[str]) -> dict[str, list[str]]:
    """wnid -> its names, most usual first."""
    if path.suffix == ".json":
        try:
            value = json.loads("\n".join(_lines(path, "class names")))
            pairs = [row if isinstance(row, list) else [key, row] for key, row in value.items()]
            return {str(wnid): _synonyms(str(names).replace("_", " ")) for wnid, names in pairs}
        except (ValueError, AttributeError) as error:
            raise UsageError(
                f'{path} is no JSON file of class names ({error}), such as {{"0": ["n01440764", "tench"]}}; '
                "give another one with classes=FILE"
            ) from error
    lines = [line for line in _lines(path, "class names") if line]
    pairs = [re.split(r"\s+", line, maxsplit=1) for line in lines]
    if all(len(pair) == 2 and (_WNID.fullmatch(pair[0]) or pair[0] in wnids) for pair in pairs):
        return {wnid: _synonyms(names) for wnid, names in pairs}
    if len(lines) == len(wnids):
        return {wnid: [" ".join(line.split())] for wnid, line in zip(wnids, lines)}
    raise UsageError(
        f"{path} has {len(lines)} names for {len(wnids)} class folders, and no wnids to tell which is whose; give "
        "lines such as 'n01440764 tench', or as many names as there are folders, in their order"
    )


def _synonyms(names: str) -> list[str]:
    return [" ".join(name.split()) for name in names.split(",") if name.strip()]


def _labels(names: dict[str, list[str]], wnids: list[str]) -> dict[str, str]:
    missing = [wnid for wnid in wnids if not names.get(wnid)]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(wnids)} class folders have no name in the file of class names (first "
            f"{missing[0]!r}), so they could not be asked for; add them, or give another file with classes=FILE"
        )
    first = Counter(names[wnid][0] for wnid in wnids)
    every = Counter(", ".join(names[wnid]) for wnid in wnids)
    labels = {}
    for wnid in wnids:
        short, long = names[wnid][0], ", ".join(names[wnid])
        labels[wnid] = short if first[short] == 1 else long if every[long] == 1 else f"{long} ({wnid})"
    return labels


def read_elevater(folder: Path, collector: Collector, split: str = "test", *, label_captions: bool) -> None:
    """ELEVATER's layout (that of vision-datasets): labels.txt, an index file per split, pictures.

    labels.txt (or labelmap.txt) has one class name a line. test.txt has lines "PATH INDEX"; PATH is relative to the
    folder, or "test.zip@PATH", which is looked for in the unpacked folder test/ and in the folder itself. Counted:
    "bad-row" (no whole number after the path), "bad-label" (an index that no name has), "several-labels" ("3,7": the
    multi-label sets are not classification into one class).

    Args:
        collector: receives the samples; uid: PATH without the archive. split: the index file's name without .txt.
        label_captions: give each sample its class name as caption.

    Raises:
        UsageError: a file is missing.
    """
    names_file = next((folder / n for n in ("labels.txt", "labelmap.txt") if (folder / n).is_file()), None)
    index = folder / f"{split}.txt"
    if names_file is None or not index.is_file():
        missing = index.name if names_file else "labels.txt"
        raise UsageError(
            f"{folder} has no {missing}; a set of ELEVATER has labels.txt (one class name a line) and {split}.txt "
            "(lines 'PATH INDEX'), so give that folder, or split=NAME"
        )
    names = [" ".join(line.replace("_", " ").split()) for line in _lines(names_file, "class names") if line]
    for number, line in enumerate(_lines(index, "index"), start=1):
        if not line:
            continue
        where = f"{index}:{number}"
        path, _, place = line.rpartition(" ")
        if path and re.fullmatch(r"\d+(,\d+)+", place):
            collector.report.add("several-labels", where, "a picture of several classes has no one right answer")
        elif not path or not place.isdigit():
            collector.report.add("bad-row", where, "a line must be a path and the index of its class")
        elif int(place) >= len(names):
            collector.report.add("bad-label", where, f"class {place} has no name among the {len(names)} of labels.txt")
        else:
            archive, at, inside = path.strip().rpartition("@")
            bases = [folder / Path(archive).stem, folder] if at else [folder]
            found = next((base for base in bases if (base / inside).is_file()), bases[0])
            label = names[int(place)]
            captions = collector.captions(label, where) if label_captions else ()
            if ".." in Path(inside).parts or Path(inside).is_absolute():
                collector.report.add("not-a-path", where, "the path leads out of the folder")
            elif captions is not None:
                collector.add(Sample(inside, image_file(found / inside), captions, label=label), where)


def _lines(path: Path, what: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UsageError(f"the {what} {path} cannot be read ({error.strerror}); correct the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the {what} {path} are not UTF-8 and would be misread; save the file as UTF-8") from error
