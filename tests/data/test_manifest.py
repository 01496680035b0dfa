from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketvlm.data import Caption, DataSource, Turn, open_data
from pocketvlm.edge.errors import BadSampleError, MissingExtraError, UnknownNameError, UsageError

from .conftest import encode

Write = Callable[..., str]
Picture = Callable[..., Path]


def texts(source: DataSource, index: int = 0) -> list[str]:
    return [caption.text for caption in source[index].captions]


def test_captions_labels_groups_and_tags(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    picture("sub/b.png")
    rows = [
        {"image": "a.jpg", "caption": " one\n dog ", "label": 3, "group": "g", "style": "photo", "width": 5},
        {
            "image": "sub/b.png",
            "captions": ["two", {"text": "zwei", "language": "de", "weight": 0.5}, {"text": "two"}],
            "label": "cat",
        },
    ]
    source = open_data(manifest(*rows))
    assert [sample.uid for sample in source] == ["m/a.jpg", "m/sub/b.png"]
    assert source[0].captions == (Caption("one dog", "en", 1.0),)
    assert (source[0].label, source[0].group, source[0].tags) == ("3", "g", {"style": "photo"})
    assert source[1].captions == (Caption("two"), Caption("zwei", "de", 0.5))
    assert source.report.total == 0
    assert source[0].image.read() == encode("jpeg", len("a.jpg"))


def test_captions_are_weighed_by_where_they_come_from(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    picture("b.jpg")
    again = {"text": "one hound", "source": "rewrite", "weight": 0.5}
    path = manifest({"image": "a.jpg", "captions": ["one dog", again]}, {"image": "b.jpg", "captions": [again]})
    source = open_data(path)
    assert [caption.source for caption in source[0].captions] == ["original", "rewrite"]
    assert source.weighed({}) is source
    weighed = source.weighed({"rewrite": 3.0})
    assert [caption.weight for caption in weighed[0].captions] == [1.0, 1.5]
    without = source.weighed({"rewrite": 0})
    assert [texts(without, index) for index in (0, 1)] == [["one dog"], []]
    assert [texts(source, index) for index in (0, 1)] == [["one dog", "one hound"], ["one hound"]]
    with pytest.raises(UnknownNameError, match="did you mean 'rewrite'"):
        source.weighed({"rewrites": 1.0})
    with pytest.raises(UsageError, match=r"weight -1.*give 0"):
        source.weighed({"rewrite": -1})


def test_columns_side_by_side_are_sources(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    path = manifest({"image": "a.jpg", "caption": "one dog", "rewrite": ["one hound", {"text": "1", "source": "x"}]})
    found = open_data(f"{path}?caption=caption,rewrite")[0].captions
    assert [(c.text, c.source) for c in found] == [("one dog", "caption"), ("one hound", "rewrite"), ("1", "x")]
    assert open_data(f"{path}?caption=caption")[0].captions == (Caption("one dog"),)


def test_an_image_without_captions_is_unlabelled(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    picture("b.jpg")
    source = open_data(manifest({"image": "a.jpg"}, {"image": "b.jpg", "caption": None}))
    assert [sample.captions for sample in source] == [(), ()]


def test_uids_do_not_depend_on_order_or_place(manifest: Write, picture: Picture, tmp_path: Path) -> None:
    paths = [picture("a.jpg"), picture("b.jpg")]
    forward = open_data(manifest({"image": "a.jpg"}, {"image": "b.jpg"}))
    backward = open_data(manifest({"image": "./b.jpg"}, {"image": str(paths[0])}))
    assert {sample.uid for sample in forward} == {sample.uid for sample in backward}
    assert not any(str(tmp_path) in sample.uid for sample in backward)


def test_paths_may_lead_upward(manifest: Write, picture: Picture, tmp_path: Path) -> None:
    picture("pictures/a.jpg")
    (tmp_path / "lists").mkdir()
    source = open_data(manifest({"image": "../pictures/a.jpg", "caption": "x"}, name="lists/m.jsonl"))
    assert source[0].uid == "m/../pictures/a.jpg"
    assert source[0].image.read()


def test_rows_about_one_picture_become_one_sample(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    rows = [{"image": "a.jpg", "caption": text} for text in ("one", "two", "one")]
    source = open_data(manifest(*rows, {"image": "a.jpg", "label": "l"}, {"image": "a.jpg", "label": "other"}))
    assert len(source) == 1
    assert texts(source) == ["one", "two"]
    assert source[0].label == "l"
    assert source.report.counts == {"conflicting-label": 1}


BAD_ROWS = [
    ({"image": "none.jpg", "caption": "x"}, "missing-file"),
    ({"image": "cut.jpg", "caption": "x"}, "truncated-image"),
    ({"image": "cut.png", "caption": "x"}, "truncated-image"),
    ({"image": "cut.webp", "caption": "x"}, "truncated-image"),
    ({"image": "text.jpg", "caption": "x"}, "not-an-image"),
    ({"image": "empty.jpg", "caption": "x"}, "empty-image"),
    ({"image": "good.jpg", "caption": ""}, "empty-text"),
    ({"image": "good.jpg", "caption": " \n "}, "empty-text"),
    ({"image": "good.jpg", "caption": 7}, "not-a-string"),
    ({"image": "good.jpg", "caption": [["x"]]}, "not-a-string"),
    ({"image": "good.jpg", "caption": {"language": "en"}}, "not-a-string"),
    ({"image": "good.jpg", "caption": {"text": "x", "weight": 0}}, "bad-weight"),
    ({"image": "good.jpg", "caption": {"text": "x", "weight": "1"}}, "bad-weight"),
    ({"image": "good.jpg", "caption": {"text": "x", "language": 1}}, "bad-language"),
    ({"image": "good.jpg", "caption": {"text": "x", "source": ""}}, "bad-source"),
    ({"image": "good.jpg", "label": ["x"]}, "bad-label"),
    ({"image": "good.jpg", "uid": True}, "bad-uid"),
    ({"image": 3, "caption": "x"}, "not-a-path"),
    ({"image": "", "caption": "x"}, "not-a-path"),
    ({"caption": "x"}, "no-image-field"),
    ({"image": "good.jpg", "conversations": [{"from": "robot", "value": "x"}]}, "bad-conversation"),
    ({"image": "good.jpg", "conversations": "hello"}, "bad-conversation"),
    ("{broken", "invalid-json"),
    ("[1]", "not-an-object"),
]


def spoil(picture: Picture) -> None:
    picture("ok.jpg")
    picture("good.jpg")
    for suffix, name in (("jpg", "jpeg"), ("png", "png"), ("webp", "webp")):
        data = encode(name)
        picture(f"cut.{suffix}", data[: len(data) // 2])
    picture("text.jpg", b"not a picture at all")
    picture("empty.jpg", b"")


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[f"{reason}-{n}" for n, (_, reason) in enumerate(BAD_ROWS)])
def test_bad_rows_are_counted_and_skipped_or_refused(
    row: object, reason: str, manifest: Write, picture: Picture
) -> None:
    spoil(picture)
    path = manifest({"image": "ok.jpg", "caption": "fine"}, row)
    source = open_data(path)
    assert len(source) == 1
    assert source.report.counts == {reason: 1}
    assert source.report.examples[reason] == [f"{path}:2"]
    assert reason in source.report.table()
    assert source.summary()["left_out"]["counts"] == {reason: 1}
    with pytest.raises(BadSampleError, match="--on-bad-sample skip") as caught:
        open_data(path, on_bad_sample="refuse")
    assert caught.value.reason == reason
    assert str(caught.value).startswith(f"{path}:2")


def test_one_bad_caption_does_not_cost_the_others(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    source = open_data(manifest({"image": "a.jpg", "captions": ["good", "", None]}))
    assert texts(source) == ["good"]
    assert source.report.counts == {"empty-text": 1, "not-a-string": 1}


def test_damage_inside_a_picture_is_found_by_the_full_check(manifest: Write, picture: Picture) -> None:
    # a PNG whose ends are whole and whose middle is zeros
    data = bytearray(encode("png"))
    data[60:-60] = bytes(len(data) - 120)
    picture("a.png", bytes(data))
    picture("b.png")
    path = manifest({"image": "a.png"}, {"image": "b.png"})
    assert len(open_data(path)) == 2
    assert len(open_data(path, check_images=True)) == 1
    assert len(open_data(path + "?check=full")) == 1


def test_no_check_looks_at_nothing(manifest: Write, picture: Picture) -> None:
    path = manifest({"image": "none.jpg"})
    assert len(open_data(path, check_images="none")) == 1
    with pytest.raises(UnknownNameError, match="did you mean 'quick'"):
        open_data(path, check_images="quik")


def test_all_bad_is_an_empty_data_set(manifest: Write) -> None:
    with pytest.raises(UsageError, match=r"empty.*2 x missing-file"):
        open_data(manifest({"image": "none.jpg"}, {"image": "nil.jpg"}))
    with pytest.raises(UsageError, match="is empty"):
        open_data(manifest(name="blank.jsonl"))


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "s3://bucket/a.jpg", "data:image/png;base64,AA"])
def test_remote_pictures_are_refused(url: str, manifest: Write) -> None:
    with pytest.raises(UsageError, match="download the pictures first"):
        open_data(manifest({"image": url, "caption": "x"}))


def test_uid_column(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    picture("b.jpg")
    rows = [{"id": 7, "image": "a.jpg"}, {"id": "x", "image": "b.jpg"}, {"id": 7, "image": "b.jpg"}]
    source = open_data(manifest(*rows))
    assert [sample.uid for sample in source] == ["m/7", "m/x"]
    assert source.report.counts == {"duplicate-uid": 1}


def test_conversations(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    talks = [
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}],
        [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
    ]
    rows = [{"id": 1, "image": "a.jpg", "conversations": talk} for talk in talks]
    forward = open_data(manifest(*rows))
    assert forward[0].conversation == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A dog."))
    assert len(forward) == 2
    assert {sample.uid for sample in forward} == {sample.uid for sample in open_data(manifest(*rows[::-1]))}


def test_named_columns(manifest: Write, picture: Picture) -> None:
    picture("a.jpg")
    row = {"photo": "a.jpg", "alt": "one", "more": ["two", "three"], "caption": "not this", "cls": "c", "sprache": "de"}
    path = manifest(row)
    source = open_data(f"{path}?image=photo&caption=alt,more&label=cls&language_column=sprache")
    assert texts(source) == ["one", "two", "three"]
    assert source[0].label == "c"
    assert {caption.language for caption in source[0].captions} == {"de"}
    with pytest.raises(UnknownNameError, match="did you mean 'photo'"):
        open_data(f"{path}?image=phot")
    with pytest.raises(UsageError, match=r"no image column among photo, alt.*\?image="):
        open_data(path)


def test_csv_and_tsv(tmp_path: Path, picture: Picture) -> None:
    picture("a.jpg")
    picture("b.jpg")
    rows = [["filepath", "caption", "label"], ["a.jpg", 'a "dog", brown', ""], ["b.jpg", "", "cat"]]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        path = tmp_path / f"m.{suffix}"
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(rows)
        source = open_data(str(path))
        assert texts(source) == ['a "dog", brown']
        assert [sample.label for sample in source] == [None, "cat"]
        assert source[1].captions == ()


def test_csv_short_row_and_blank_text(tmp_path: Path, picture: Picture) -> None:
    picture("a.jpg")
    path = tmp_path / "m.csv"
    path.write_text("image,caption\na.jpg\na.jpg,'  '\na.jpg, \n,x\n")
    source = open_data(str(path))
    assert texts(source) == ["' '"]
    assert source.report.counts == {"empty-text": 1, "no-image-field": 1}


def test_parquet_with_paths_and_with_bytes(tmp_path: Path, picture: Picture) -> None:
    import pyarrow
    import pyarrow.parquet

    picture("a.jpg")
    path = tmp_path / "m.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": ["a.jpg"], "captions": [["one", "two"]], "label": [4]}), path)
    source = open_data(str(path))
    assert texts(source) == ["one", "two"]
    assert source[0].label == "4"
    column = [{"bytes": encode("png"), "path": "x.png"}, {"bytes": encode("png", 1), "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "text": ["one", "two"]}), path)
    source = open_data(str(path))
    assert source[0].uid == "m/x.png"
    assert source[1].image.read() == encode("png", 1)


def test_parquet_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="not a readable Parquet"):
        open_data(str(tmp_path / "m.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[distill\]"):
        open_data(str(tmp_path / "m.parquet"))


def test_json_list(tmp_path: Path, picture: Picture) -> None:
    picture("a.jpg")
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"image": "a.jpg", "caption": "x"}, 5]))
    source = open_data(str(path))
    assert texts(source) == ["x"]
    assert source.report.counts == {"not-an-object": 1}
    path.write_text('{"image": "a.jpg"}\n{"image": "a.jpg"}\n')
    with pytest.raises(UsageError, match=r"name it \.jsonl"):
        open_data(str(path))
    path.write_text("{}")
    with pytest.raises(UsageError, match="list of objects"):
        open_data(str(path))


def test_text_that_is_not_utf8(tmp_path: Path, picture: Picture) -> None:
    picture("a.jpg")
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"image": "a.jpg"}\n{"image": "a.jpg", "caption": "caf\xe9"}\n')
    assert open_data(str(path)).report.counts == {"not-utf8-text": 1}
    path = tmp_path / "m.csv"
    path.write_bytes(b"image,caption\na.jpg,caf\xe9\n")
    with pytest.raises(UsageError, match="UTF-8"):
        open_data(str(path))


def test_language_filter(manifest: Write, picture: Picture) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(name)
    path = manifest(
        {"image": "a.jpg", "captions": ["hi", {"text": "oi", "language": "pt-BR"}]},
        {"image": "b.jpg", "caption": "only english"},
        {"image": "c.jpg"},
    )
    source = open_data(f"{path}?language=pt")
    assert [[caption.text for caption in sample.captions] for sample in source] == [["oi"], []]
    assert len(open_data(f"{path}?language=en,pt").captions()) == 3
    with pytest.raises(UnknownNameError, match="language"):
        open_data(f"{path}?language=fi")
    assert open_data(f"{path}?caption_language=sv").summary()["languages"] == {"sv": 2, "pt-BR": 1}
