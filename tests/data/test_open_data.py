from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketvlm.data import BadSampleReport, DataSource, cache_dir, open_data
from pocketvlm.data.opening import drop_undecodable
from pocketvlm.data.spec import parse_spec
from pocketvlm.data.splits import pool_of
from pocketvlm.edge.errors import BadSampleError, UnknownNameError, UsageError

from .conftest import encode

Picture = Callable[..., Path]
Write = Callable[..., str]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("openmojis", "unknown data set 'openmojis'; did you mean 'openmoji'"),
        ("manifst:x.jsonl", "unknown kind of data set 'manifst'; did you mean 'manifest'"),
        ("openmoji?pol=test", "did you mean 'pool'"),
        ("openmoji?pool=tset", "did you mean 'test'"),
        ("openmoji?skintones=1", "did you mean 'skin_tones'"),
    ],
)
def test_misspelt_names_are_suggested(
    spec: str, message: str, openmoji: DataSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert openmoji[0].image.path is not None
    monkeypatch.setenv("POCKETVLM_CACHE", str(openmoji[0].image.path.parents[2]))
    if "pool=tset" in spec:
        spec += "&size=16"
    with pytest.raises(UnknownNameError) as caught:
        open_data(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "has no name"),
        ("?pool=test", "has no name"),
        ("folder:", "has no path"),
        ("https://example.org/data.tar", "network address"),
        ("some/where/m.data", "does not exist"),
        ("openmoji?limit=x", "whole number"),
        ("openmoji?pool", "no value"),
        ("openmoji?pool=test&pool=student", "given twice"),
    ],
)
def test_impossible_names(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _limit_of(spec)


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"m\.jsonl does not exist"):
        open_data(f"{tmp_path}/m.jsonl")


def _limit_of(spec: str) -> int | None:
    return parse_spec(spec).whole("limit")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("fold=1", "add pool="),
        ("pool=test&fold=7", "0 <= fold < folds"),
        ("captions=2", "from 0"),
        ("captions=many", "number from 0 to 1"),
        ("limit=0", "at least 1"),
    ],
)
def test_impossible_options(option: str, message: str, tmp_path: Path, picture: Picture) -> None:
    picture("a.jpg")
    with pytest.raises(UsageError, match=message):
        open_data(f"images:{tmp_path}?{option}")


def test_kinds_are_detected(tmp_path: Path, picture: Picture) -> None:
    picture("plain/a.jpg")
    picture("texts/a.jpg")
    picture("texts/a.txt", b"hello")
    picture("classes/cat/a.jpg")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/x.tar").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "list.csv").touch()
    kinds = {
        name: parse_spec(f"{tmp_path}/{name}").kind for name in ("plain", "texts", "classes", "shards", "list.csv")
    }
    assert kinds == {
        "plain": "images",
        "texts": "sidecar",
        "classes": "folder",
        "shards": "wds",
        "list.csv": "manifest",
    }
    with pytest.raises(UsageError, match="nothing can be read"):
        parse_spec(f"{tmp_path}/nothing")
    (tmp_path / "odd.bin").touch()
    with pytest.raises(UsageError, match="no data set that can be read"):
        parse_spec(f"{tmp_path}/odd.bin")


def test_question_marks_and_percent_signs(tmp_path: Path, picture: Picture) -> None:
    picture("why?.jsonl", b"")
    assert parse_spec(f"{tmp_path}/why?.jsonl").path == f"{tmp_path}/why?.jsonl"
    assert parse_spec(f"{tmp_path}/why?.jsonl?caption=alt%20text").options == {"caption": "alt text"}


def test_pools_and_limit_work_for_files(tmp_path: Path, picture: Picture) -> None:
    for number in range(60):
        picture(f"d/{number}.jpg", encode(seed=number))
    whole = {sample.uid for sample in open_data(f"images:{tmp_path}/d")}
    pools = [{s.uid for s in open_data(f"{tmp_path}/d?pool={pool}&fold=2")} for pool in ("teacher", "student", "test")]
    assert set.union(*pools) == whole
    assert sum(map(len, pools)) == 60
    assert len(open_data(f"{tmp_path}/d?limit=7")) == 7


def test_grouped_rows_stay_in_one_pool(manifest: Write, picture: Picture) -> None:
    for number in range(80):
        picture(f"{number}.jpg")
    path = manifest(*({"image": f"{number}.jpg", "group": f"g{number % 16}"} for number in range(80)))
    source = open_data(path)
    for pool in ("teacher", "student", "test"):
        groups = [sample.group for sample in source.select(pool=pool, fold=0)]
        assert groups
        assert all(groups.count(group) == 5 for group in groups)


def test_a_choice_that_leaves_nothing(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    source = open_data(manifest({"image": "a.jpg", "caption": "x"}, {"image": "none.jpg"}))
    pool = "student" if pool_of("m/a.jpg", 0) == "test" else "test"
    with pytest.raises(UsageError, match=f"none of the 1 samples .* with pool={pool}, fold=0"):
        source.select(pool=pool, fold=0)


def test_drop_undecodable(manifest: Write, picture: Picture) -> None:
    data = bytearray(encode("png"))
    data[60:-60] = bytes(len(data) - 120)
    picture("a.png", bytes(data))
    picture("b.png")
    path = manifest({"image": "a.png"}, {"image": "b.png"})
    source = drop_undecodable(open_data(path))
    assert [sample.uid for sample in source] == ["m/b.png"]
    assert source.report.total == 1
    with pytest.raises(BadSampleError):
        drop_undecodable(open_data(path, on_bad_sample="refuse"))


def test_report_counts_keeps_examples_and_merges() -> None:
    report = BadSampleReport()
    for number in range(9):
        report.add("too-long-text", f"line {number}")
    other = BadSampleReport()
    other.add("empty-text", "line 3")
    report.merge(other)
    assert report.total == 10
    assert report.examples["too-long-text"] == [f"line {number}" for number in range(5)]
    assert report.to_dict()["counts"] == {"empty-text": 1, "too-long-text": 9}
    assert report.table().splitlines()[0].split() == ["too-long-text", "9", "e.g.", "line", "0"]
    assert BadSampleReport().table() == ""
    with pytest.raises(UnknownNameError, match="did you mean 'refuse'"):
        BadSampleReport("refuze")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("POCKETVLM_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "pocketvlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "pocketvlm"


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, pocketvlm.data, pocketvlm.data.wordlist, pocketvlm.data.augment;"
        "print([m for m in ('torch', 'pyarrow', 'webdataset', 'wordfreq', 'emoji', 'resvg_py') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
