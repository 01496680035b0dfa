from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketvlm.data import open_data
from pocketvlm.data.readers.webdataset import expand_braces
from pocketvlm.edge.errors import BadSampleError, UsageError

from .conftest import encode

Picture = Callable[..., Path]


def test_class_folder(tmp_path: Path, picture: Picture) -> None:
    for name in ("d/golden_retriever/1.jpg", "d/golden_retriever/deep/2.png", "d/cat/1.JPG", "d/stray.jpg"):
        picture(name, encode("jpeg"))
    picture("d/cat/notes.md", b"x")
    picture("d/.hidden/1.jpg")
    source = open_data(f"folder:{tmp_path}/d")
    assert [(sample.uid, sample.label) for sample in source] == [
        ("d/cat/1.JPG", "cat"),
        ("d/golden_retriever/1.jpg", "golden_retriever"),
        ("d/golden_retriever/deep/2.png", "golden_retriever"),
    ]
    assert source[1].captions[0].text == "golden retriever"
    assert source.report.counts == {"no-class-folder": 1}
    assert not open_data(f"folder:{tmp_path}/d?label_captions=0").captions()
    with pytest.raises(UsageError, match="switch"):
        open_data(f"folder:{tmp_path}/d?label_captions=maybe")


def test_class_folder_without_classes(tmp_path: Path, picture: Picture) -> None:
    picture("1.jpg")
    with pytest.raises(UsageError, match=r"use images:"):
        open_data(f"folder:{tmp_path}")


def test_sidecar_texts(tmp_path: Path, picture: Picture) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "sub/e.jpg"):
        picture(name)
    (tmp_path / "a.txt").write_text("one\n\n two \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\n")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "sub/e.txt").write_text("\ufeffdrei", encoding="utf-8")
    source = open_data(f"sidecar:{tmp_path}?caption_language=de")
    found = {sample.uid.partition("/")[2]: [caption.text for caption in sample.captions] for sample in source}
    assert found == {"a.jpg": ["one", "two"], "d.jpg": [], "sub/e.jpg": ["drei"]}
    assert source.report.counts == {"empty-text": 1, "not-utf8-text": 1}
    assert source.summary()["languages"] == {"de": 3}


def test_plain_pictures(tmp_path: Path, picture: Picture) -> None:
    picture("x/b.jpg")
    picture("x/a.png")
    picture("x/a.txt", b"never read")
    picture("x/cut.jpg", encode()[:200])
    source = open_data(f"images:{tmp_path}/x")
    assert [sample.uid for sample in source] == ["x/a.png", "x/b.jpg"]
    assert source.summary()["with_captions"] == 0
    assert source.report.counts == {"truncated-image": 1}
    with pytest.raises(BadSampleError, match=r"cut\.jpg"):
        open_data(f"images:{tmp_path}/x", on_bad_sample="refuse")


@pytest.mark.parametrize("kind", ["folder", "sidecar", "images", "wds", "manifest"])
def test_missing_path(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a folder|does not exist"):
        open_data(f"{kind}:{tmp_path}/none")


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    meta = json.dumps({"caption": ["json one", "both"], "label": 5, "url": "https://example.org"}).encode()
    write_shard(
        tmp_path / "s-000.tar",
        [
            ("0001.jpg", encode("jpeg", 1)),
            ("0001.txt", b"both"),
            ("0001.json", meta),
            ("dir/0002.png", encode("png", 2)),
            ("dir/0002.cls", b"cat\n"),
            ("0003.txt", b"no picture"),
        ],
    )
    write_shard(tmp_path / "s-001.tar", [("0001.webp", encode("webp", 3)), ("0001.txt", b"other shard")])
    source = open_data(f"wds:{tmp_path}/s-{{000..001}}.tar")
    name = tmp_path.name
    assert [sample.uid for sample in source] == [f"{name}/s-000/0001", f"{name}/s-000/dir/0002", f"{name}/s-001/0001"]
    assert [caption.text for caption in source[0].captions] == ["both", "json one"]
    assert [sample.label for sample in source] == ["5", "cat", None]
    assert source.report.counts == {"no-image-member": 1}
    # in any order, from the archive itself, nothing kept in memory
    assert [source[index].image.read() for index in (2, 0, 1)] == [
        encode("webp", 3),
        encode("jpeg", 1),
        encode("png", 2),
    ]
    assert all(sample.image.data is None for sample in source)
    assert len(open_data(str(tmp_path))) == len(open_data(f"wds:{tmp_path}/*.tar")) == 3
    assert open_data(f"{tmp_path}/s-001.tar")[0].uid == "s-001/s-001/0001"


def test_bad_members_are_counted(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "s.tar",
        [
            ("ok.jpg", encode()),
            ("../escape.jpg", encode()),
            ("/absolute.jpg", encode()),
            ("cut.jpg", encode()[:300]),
            ("blank.jpg", encode()),
            ("blank.txt", b" "),
            ("latin.jpg", encode()),
            ("latin.txt", b"caf\xe9"),
            ("odd.jpg", encode()),
            ("odd.json", b"{"),
            ("number.jpg", encode()),
            ("number.json", b'{"caption": 3}'),
        ],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    source = open_data(str(path))
    assert [sample.uid for sample in source] == ["s/s/ok"]
    assert source.report.counts == {
        "unsafe-member": 3,
        "truncated-image": 1,
        "empty-text": 1,
        "unreadable-text": 2,
        "not-a-string": 1,
    }


def test_unsafe_members_are_ignored_even_when_bad_samples_are_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", [("ok.jpg", encode()), ("../escape.jpg", encode())])
    source = open_data(str(path), on_bad_sample="refuse")
    assert len(source) == 1
    assert source.report.counts == {"unsafe-member": 1}


def test_shard_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", [("a.jpg", encode()), ("b.jpg", encode()), ("c.jpg", encode())])
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    path.write_bytes(path.read_bytes()[: members[1].offset_data + 100])
    source = open_data(str(path))
    assert [sample.uid for sample in source] == ["s/s/a"]
    assert source.report.total >= 1
    assert set(source.report.counts) <= {"truncated-archive", "truncated-image"}


def test_compressed_shard(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(UsageError, match="unpack"):
        open_data(str(tmp_path / "s.tar"))


def test_missing_shard_of_a_range(tmp_path: Path) -> None:
    write_shard(tmp_path / "s-0.tar", [("a.jpg", encode())])
    with pytest.raises(UsageError, match=r"s-1\.tar does not exist"):
        open_data(f"wds:{tmp_path}/s-{{0..1}}.tar")


def test_braces() -> None:
    assert expand_braces("a-{008..011}.tar") == [f"a-{number:03}.tar" for number in (8, 9, 10, 11)]
    assert expand_braces("{x,y}/{1..2}") == ["x/1", "x/2", "y/1", "y/2"]
    assert expand_braces("plain") == ["plain"]
    for wrong in ("a{1..", "a}", "{3..1}", "{a..c}"):
        with pytest.raises(UsageError, match=r"range|braces"):
            expand_braces(wrong)
