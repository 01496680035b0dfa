"""The field's captioned sets in their own files: COCO captions, Karpathy's splits, Flickr30k, SugarCrepe.

Pictures lie in a folder that `images` names or that is found beside the file under its usual name; nothing is fetched.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pocketvlm.data.readers.common import Collector, image_file
from pocketvlm.data.sample import HardNegative, Sample
from pocketvlm.edge.errors import UsageError, unknown_name

_TOKEN_LINE = re.compile(r"(?P<file>[^\t#]+)#\d+\t(?P<text>.*)")


def read_coco(path: Path, collector: Collector, images: Path | None = None) -> None:
    """COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

    Args:
        path: the JSON file, or the folder that has annotations/captions_val2017.json (or another captions_*.json).
        collector: receives one sample per picture with all its captions; uid: file_name.
        images: the folder of the pictures; without it val2017 (or as the file is named), images/val2017 or images,
            beside the file or one folder above.

    Captions of a picture that the file does not list are counted as "no-such-image".

    Raises:
        UsageError: no such file, not COCO captions, or no folder of pictures.
    """
    if path.is_dir():
        found = sorted((path / "annotations").glob("captions_*.json")) or sorted(path.glob("captions_*.json"))
        chosen = [file for file in found if "val" in file.name] or found
        if len(chosen) != 1:
            raise UsageError(
                f"{path} holds {len(chosen)} files annotations/captions_*.json to choose from; name one, for instance "
                f"coco:{path}/annotations/captions_val2017.json"
            )
        path = chosen[0]
    value = _json(path)
    if not isinstance(value, dict) or not all(isinstance(value.get(key), list) for key in ("images", "annotations")):
        raise UsageError(
            f"{path} is no file of COCO captions, which is an object with the lists 'images' and 'annotations'; "
            "give captions_val2017.json or one like it"
        )
    split = path.stem.removeprefix("captions_")
    folder = _pictures(path, images, (split, f"images/{split}", "images"))
    texts: dict[Any, list[Any]] = {}
    names: dict[Any, str] = {}
    for place, row in enumerate(value["images"]):
        where = f"{path} images[{place}]"
        name = _file_name(row.get("file_name") if isinstance(row, Mapping) else None, where, collector)
        if name is not None:
            names[row.get("id")] = name
    for place, row in enumerate(value["annotations"]):
        where = f"{path} annotations[{place}]"
        if not isinstance(row, Mapping) or row.get("image_id") not in names:
            collector.report.add("no-such-image", where, "the caption is of a picture that the file does not list")
        else:
            texts.setdefault(row["image_id"], []).append(row.get("caption", 0))
    for key, name in names.items():
        _add(collector, folder, name, texts.get(key), f"{path} image {key}")


def read_karpathy(path: Path, collector: Collector, images: Path | None = None, split: str = "test") -> None:
    """Karpathy's splits (dataset_coco.json, dataset_flickr30k.json): "images" with "filename", "split", "sentences".

    Args:
        path: the JSON file. collector: receives one sample per picture with its sentences ("raw"); uid: the file name,
            with "filepath" before it where the file has that (COCO).
        images: the folder of the pictures (for COCO the one above val2014); without it `images`, `flickr30k-images` or
            val2014's parent beside the file. split: "test", "val", "train", "restval" or "all".

    Raises:
        UsageError: no such file, not of this layout, no folder of pictures. UnknownNameError: no picture of `split`.
    """
    value = _json(path)
    rows = value.get("images") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not any(isinstance(row, dict) and "sentences" in row for row in rows):
        raise UsageError(
            f"{path} is no file of Karpathy's splits, which is an object with a list 'images' of objects with "
            "'filename', 'split' and 'sentences'; give dataset_coco.json, dataset_flickr30k.json or one like it"
        )
    known = [row for row in rows if isinstance(row, dict)]
    present = {str(row.get("split")) for row in known}
    if split != "all" and split not in present:
        raise unknown_name(f"split of {path.name}", split, {*present, "all"})
    beside = ("images", f"{value.get('dataset', '')}-images", "flickr30k_images")
    parent = path.parent if any("filepath" in row for row in known) else None
    folder = _pictures(path, images, beside, otherwise=parent)
    for place, row in enumerate(rows):
        where = f"{path} images[{place}]"
        if not isinstance(row, dict) or not isinstance(row.get("sentences"), list):
            collector.report.add("bad-row", where, "a picture needs a list 'sentences'")
            continue
        if split not in ("all", row.get("split")):
            continue
        name = _file_name(row.get("filename"), where, collector)
        if name is not None:
            name = f"{row['filepath']}/{name}" if row.get("filepath") else name
            texts = [s.get("raw") if isinstance(s, dict) else s for s in row["sentences"]]
            _add(collector, folder, name, texts, where, tags={"split": str(row.get("split"))})


def read_flickr30k(path: Path, collector: Collector, images: Path | None = None, split: str = "test") -> None:
    """Flickr30k (and 8k) in the files that go around.

    results_20130124.token (FILE#0, tab, caption); results.csv with "|" between image_name, comment_number and comment;
    captions.txt or .csv with the columns image and caption; flickr_annotations_30k.csv with the columns filename, split
    and raw (a JSON list of captions). Rows of another form are counted as "bad-row".

    Args:
        path: one of these, or the folder of one. collector: receives one sample per picture; uid: its file name.
        images: the folder of the pictures; without it flickr30k-images, flickr30k_images, Images or images beside the
            file, else the file's own folder. split: for the file that has splits; the others are read whole.

    Raises:
        UsageError: no such file, or none of these forms. UnknownNameError: no picture of `split`.
    """
    if path.is_dir():
        found = [path / name for name in _FLICKR_FILES if (path / name).is_file()]
        if not found:
            raise UsageError(f"{path} has none of {', '.join(_FLICKR_FILES)}; name the file of the captions")
        path = found[0]
    if not path.is_file():
        raise UsageError(f"captions {path} do not exist; give one of {', '.join(_FLICKR_FILES)}")
    beside = ("flickr30k-images", "flickr30k_images", "Images", "images")
    folder = _pictures(path, images, beside, otherwise=path.parent)
    for name, texts, where in _flickr_rows(path, collector, split):
        _add(collector, folder, name, texts, where)


_FLICKR_FILES = ("results_20130124.token", "flickr_annotations_30k.csv", "results.csv", "captions.txt")


def _flickr_rows(path: Path, collector: Collector, split: str) -> Iterator[tuple[str, Any, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 ({error}), so its captions would be misread; save it again") from error
    header = [cell.strip() for cell in re.split(r"[|,]", lines[0])] if lines else []
    if lines and _TOKEN_LINE.fullmatch(lines[0]):
        rows: Iterable[tuple[Any, Any]] = ((m["file"], m["text"]) if (m := _TOKEN_LINE.fullmatch(x)) else (None, x)
                                           for x in lines)  # fmt: skip
        first = 1
    elif header[:1] == ["image_name"] and "|" in lines[0]:
        cells = ([cell.strip() for cell in line.split("|", 2)] for line in lines[1:])
        rows, first = ((row[0], row[2]) if len(row) == 3 else (None, row) for row in cells), 2
    elif header == ["image", "caption"]:
        rows, first = ((row[0], row[1]) if len(row) == 2 else (None, row) for row in csv.reader(lines[1:])), 2
    elif {"filename", "raw", "split"} <= set(header):
        table = list(csv.DictReader(lines))
        present = {str(row["split"]) for row in table}
        if split != "all" and split not in present:
            raise unknown_name(f"split of {path.name}", split, {*present, "all"})
        rows = ((row["filename"], _listed(row["raw"])) for row in table if split in ("all", row["split"]))
        first = 2
    else:
        raise UsageError(
            f"{path} is in none of the forms of Flickr30k's captions ({', '.join(_FLICKR_FILES)}); "
            "make it a manifest with the columns image and caption"
        )
    for number, (name, texts) in enumerate(rows, start=first):
        where = f"{path}:{number}"
        if not isinstance(name, str) or not name.strip() or texts is None:
            collector.report.add("bad-row", where, "the row does not name a picture and its caption")
        elif (checked := _file_name(name.strip(), where, collector)) is not None:
            yield checked, texts, where


def _listed(text: str | None) -> Any:
    try:
        value = json.loads(text or "")
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def read_sugarcrepe(path: Path, collector: Collector, images: Path | None = None) -> None:
    """SugarCrepe: JSON files of {"0": {"filename", "caption", "negative_caption"}, ...} over COCO's val2017 pictures.

    Args:
        path: one file, or the folder of add_att.json, replace_obj.json, swap_att.json, ...; the kind of a hard
            negative is its file's name. collector: receives one sample per picture with its captions and hard
            negatives; uid: the picture's file name. images: the folder of the pictures; without it val2017 or images
            beside the file.

    Entries without both texts are counted as "bad-hard-negative".

    Raises:
        UsageError: no such file, none in the folder, not of this layout, or no folder of pictures.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"{path} holds no .json file; give SugarCrepe's folder 'data' or one of its files")
    for file in files:
        rows = _json(file)
        if isinstance(rows, dict):
            rows = list(rows.values())
        if not isinstance(rows, list) or not any(isinstance(row, dict) and "negative_caption" in row for row in rows):
            raise UsageError(
                f"{file} is no file of SugarCrepe, whose entries have 'filename', 'caption' and 'negative_caption'; "
                "give add_att.json or one like it"
            )
        folder = _pictures(file, images, ("val2017", "images/val2017", "images"))
        for place, row in enumerate(rows):
            where = f"{file} entry {place}"
            row = row if isinstance(row, Mapping) else {}
            caption, false = row.get("caption"), row.get("negative_caption")
            if not all(isinstance(text, str) and text.strip() for text in (caption, false)) or caption == false:
                collector.report.add("bad-hard-negative", where, "an entry needs a caption and another, false, one")
                continue
            name = _file_name(row.get("filename"), where, collector)
            if name is not None:
                negative = HardNegative(" ".join(str(caption).split()), " ".join(str(false).split()), file.stem)
                _add(collector, folder, name, [caption], where, negatives=(negative,))


def _add(
    collector: Collector,
    folder: Path,
    name: str,
    texts: Any,
    where: str,
    *,
    tags: dict[str, str] | None = None,
    negatives: tuple[HardNegative, ...] = (),
) -> None:
    captions = collector.captions(texts, where)
    if captions is not None:
        image = image_file(folder / name)
        collector.add(Sample(name, image, captions, tags=tags or {}, hard_negatives=negatives), where)


def _file_name(value: Any, where: str, collector: Collector) -> str | None:
    """`value` where it is the path of a file below the folder of pictures; else counted, and None."""
    if isinstance(value, str) and value.strip() and "\0" not in value:
        path = Path(value.replace("\\", "/"))
        if not path.is_absolute() and ".." not in path.parts:
            return path.as_posix()
    collector.report.add("not-a-path", where, f"the picture is {value!r} and must be a file name")
    return None


def _json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path} does not exist, so there is nothing to read; correct the path of the JSON file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}), so nothing can be read from it; fetch it again") from error


def _pictures(path: Path, given: Path | None, names: Iterable[str], *, otherwise: Path | None = None) -> Path:
    if given is not None:
        if given.is_dir():
            return given
        raise UsageError(f"images={given} is not a folder; give the folder that holds the pictures of {path.name}")
    for base in (path.parent, path.parent.parent):
        for name in names:
            if name and (base / name).is_dir():
                return base / name
    if otherwise is not None:
        return otherwise
    wanted = ", ".join(name for name in names if name)
    raise UsageError(
        f"the pictures of {path} are in none of the folders {wanted} beside it; say where they are with "
        f"{path.name}?images=DIR"
    )
