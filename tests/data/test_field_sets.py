"""The field's own sets, as tiny files in their layouts; bad files are one sentence, bad entries are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.data import HardNegative, open_data
from pocketvlm.distill.questions import questions_of
from pocketvlm.edge.errors import BadSampleError, UnknownNameError, UsageError

from .conftest import encode

Picture = Callable[..., Path]


def texts(source: Any) -> dict[str, list[str]]:
    return {sample.uid: [caption.text for caption in sample.captions] for sample in source}


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def imagenet(tmp_path: Path, picture: Picture) -> Path:
    for wnid, name in (("n01440764", "a"), ("n02012849", "b"), ("n03126707", "c"), ("n03126707", "d")):
        picture(f"in/val/{wnid}/{name}.JPEG", encode("jpeg", seed=ord(name)))
    return tmp_path / "in/val"


def test_imagenet_folders_get_their_names(tmp_path: Path, picture: Picture) -> None:
    folder = imagenet(tmp_path, picture)
    write(tmp_path / "in/LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n")
    source = open_data(f"imagenet:{folder}")
    assert [(sample.uid, sample.label) for sample in source] == [
        ("val/n01440764/a.JPEG", "tench"),
        ("val/n02012849/b.JPEG", "crane (n02012849)"),
        ("val/n03126707/c.JPEG", "crane (n03126707)"),
        ("val/n03126707/d.JPEG", "crane (n03126707)"),
    ]
    assert source[0].captions[0].text == "tench"
    assert not open_data(f"imagenet:{folder}?label_captions=0").captions()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "n03126707\tcrane, lifting machine\nn01440764\ttench\nn02012849\tcrane, bird\n"),
        ("names.json", {"1": ["n03126707", "crane,_lifting_machine"], "0": ["n01440764", "tench"],
                        "2": ["n02012849", "crane, bird"]}),
        ("names.json", {"n01440764": "tench", "n02012849": "crane, bird", "n03126707": "crane, lifting machine"}),
        ("names.txt", "tench\ncrane, bird\ncrane, lifting machine\n"),
    ],
)  # fmt: skip
def test_class_names_come_in_several_forms(name: str, content: Any, tmp_path: Path, picture: Picture) -> None:
    file = write(tmp_path / name, content)
    source = open_data(f"imagenet:{imagenet(tmp_path, picture)}?classes={file}")
    assert [s.label for s in source][:3] == ["tench", "crane, bird", "crane, lifting machine"]


def test_imagenet_without_what_it_needs(tmp_path: Path, picture: Picture) -> None:
    folder = imagenet(tmp_path, picture)
    with pytest.raises(UsageError, match=r"has none of LOC_synset_mapping\.txt.*classes=FILE"):
        open_data(f"imagenet:{folder}")
    short = write(tmp_path / "short.txt", "n01440764 tench\n")
    with pytest.raises(UsageError, match=r"2 of 3 class folders have no name .*'n02012849'"):
        open_data(f"imagenet:{folder}?classes={short}")
    with pytest.raises(UsageError, match=r"2 names for 3 class folders"):
        open_data(f"imagenet:{folder}?classes={write(tmp_path / 'two.txt', 'tench x' + chr(10) + 'crane')}")
    with pytest.raises(UsageError, match=r"no JSON file of class names"):
        open_data(f"imagenet:{folder}?classes={write(tmp_path / 'bad.json', '[1]')}")
    with pytest.raises(UsageError, match=r"class names .*none\.txt cannot be read"):
        open_data(f"imagenet:{folder}?classes={tmp_path}/none.txt")
    with pytest.raises(UsageError, match="no picture in a folder per class"):
        open_data(f"imagenet:{folder}/n01440764")


def test_prompts_travel_with_the_data(tmp_path: Path, picture: Picture) -> None:
    folder = imagenet(tmp_path, picture)
    write(folder / "words.txt", "n01440764 tench\nn02012849 crane\nn03126707 lift\n")
    assert questions_of(open_data(f"imagenet:{folder}")).templates == ("{}", "a picture of {}", "an icon of {}")
    write(folder / "templates.txt", "a photo of a {}.\nart of the {}.\n\n")
    found = questions_of(open_data(f"imagenet:{folder}").select(limit=3), templates=("{}",))
    assert found.templates == ("a photo of a {}.", "art of the {}.")
    assert "art of the lift." in found.texts
    with pytest.raises(UsageError, match=r"without \{\} every class"):
        open_data(f"imagenet:{folder}?templates={write(tmp_path / 't.txt', 'a photo')}")


def test_elevater(tmp_path: Path, picture: Picture) -> None:
    for name in ("test/x/1.jpg", "x/2.jpg", "plain.jpg"):
        picture(f"pets/{name}", encode("jpeg", seed=len(name)))
    write(tmp_path / "pets/labels.txt", "Maine_Coon\nbeagle\n")
    lines = ("test.zip@x/1.jpg 0", "train.zip@x/2.jpg 1", "plain.jpg 1", "plain.jpg 0,1", "gone.jpg 0", "plain.jpg 7",
             "plain.jpg cat", "../up.jpg 0", "")  # fmt: skip
    write(tmp_path / "pets/test.txt", "\n".join(lines))
    source = open_data(f"elevater:{tmp_path}/pets")
    assert [(s.uid, s.label) for s in source] == [
        ("pets/x/1.jpg", "Maine Coon"),
        ("pets/x/2.jpg", "beagle"),
        ("pets/plain.jpg", "beagle"),
    ]
    assert source.report.counts == {
        "several-labels": 1,
        "missing-file": 1,
        "bad-label": 1,
        "bad-row": 1,
        "not-a-path": 1,
    }
    with pytest.raises(UsageError, match=r"has no val\.txt"):
        open_data(f"elevater:{tmp_path}/pets?split=val")


def coco(tmp_path: Path, picture: Picture) -> Path:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        picture(f"coco/val2017/{name}", encode("jpeg", seed=ord(name[0])))
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2, 3)] + [{"id": 4, "file_name": "../4.jpg"}, {"id": 5}]
    notes = [{"image_id": 1, "caption": f"caption {n} of one"} for n in range(5)]
    notes += [{"image_id": 2, "caption": "two\n"}, {"image_id": 2, "caption": 7}, {"image_id": 9, "caption": "who"}]
    return write(tmp_path / "coco/annotations/captions_val2017.json", {"images": images, "annotations": notes})


def test_coco_captions(tmp_path: Path, picture: Picture) -> None:
    file = coco(tmp_path, picture)
    source = open_data(f"coco:{file}")
    assert texts(source) == {
        "captions_val2017/1.jpg": [f"caption {n} of one" for n in range(5)],
        "captions_val2017/2.jpg": ["two"],
        "captions_val2017/3.jpg": [],
    }
    assert source.report.counts == {"not-a-path": 2, "not-a-string": 1, "no-such-image": 1}
    with pytest.raises(BadSampleError, match=r"images\[3\].*'\.\./4\.jpg'"):
        open_data(f"coco:{file}", on_bad_sample="refuse")
    assert [s.image.path for s in open_data(f"coco:{tmp_path}/coco")] == [s.image.path for s in source]
    (tmp_path / "coco/val2017").rename(tmp_path / "elsewhere")
    assert len(open_data(f"coco:{file}?images={tmp_path}/elsewhere")) == 3
    with pytest.raises(UsageError, match=r"val2017, images/val2017, images beside it.*\?images=DIR"):
        open_data(f"coco:{file}")
    with pytest.raises(UsageError, match="is not a folder"):
        open_data(f"coco:{file}?images={tmp_path}/none")


@pytest.mark.parametrize("kind", ["coco", "karpathy", "sugarcrepe"])
def test_json_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_data(f"{kind}:{tmp_path}/none.json")
    with pytest.raises(UsageError, match="is not JSON"):
        open_data(f"{kind}:{write(tmp_path / 'cut.json', '{')}")
    with pytest.raises(UsageError, match="is no file of"):
        open_data(f"{kind}:{write(tmp_path / 'other.json', {'images': [], 'info': 1})}")
    with pytest.raises(UsageError, match=r"read by coco:.*karpathy:.*sugarcrepe:"):
        open_data(f"{tmp_path}/other.json")


def test_karpathy_splits(tmp_path: Path, picture: Picture) -> None:
    rows = []
    for i, split in enumerate(("test", "train", "val", "test")):
        sentences = [{"raw": f"{i} a"}, {"raw": f"{i} b"}]
        rows.append({"filename": f"{i}.jpg", "filepath": "val2014", "split": split, "sentences": sentences})
    for i in range(4):
        picture(f"val2014/{i}.jpg", encode("jpeg", seed=i))
    file = write(tmp_path / "dataset_coco.json", {"images": [*rows, {"filename": "x.jpg"}], "dataset": "coco"})
    source = open_data(f"karpathy:{file}")
    assert texts(source) == {"dataset_coco/val2014/0.jpg": ["0 a", "0 b"], "dataset_coco/val2014/3.jpg": ["3 a", "3 b"]}
    assert source[0].tags == {"split": "test"}
    assert source.report.counts == {"bad-row": 1}
    assert len(open_data(f"karpathy:{file}?split=all")) == 4
    with pytest.raises(UnknownNameError, match=r"unknown split of dataset_coco\.json 'tran'; did you mean 'train'"):
        open_data(f"karpathy:{file}?split=tran")
    flickr = [{"filename": "0.jpg", "split": "test", "sentences": [{"raw": "zero"}]}]
    file = write(tmp_path / "dataset_flickr30k.json", {"images": flickr, "dataset": "flickr30k"})
    picture("flickr30k-images/0.jpg")
    assert texts(open_data(f"karpathy:{file}")) == {"dataset_flickr30k/0.jpg": ["zero"]}


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("results_20130124.token", "1.jpg#0\tA dog.\n1.jpg#1\tA brown, wet dog.\n2.jpg#0\tA cat.\nno tab\n", 1),
        ("results.csv", "image_name| comment_number| comment\n1.jpg| 0| A dog.\n1.jpg| 1| A brown, wet dog.\n"
         "2.jpg| 0| A cat.\n2.jpg| 4   A dog runs\n", 1),
        ("captions.txt", 'image,caption\n1.jpg,A dog.\n1.jpg,"A brown, wet dog."\n2.jpg,A cat.\n2.jpg,a,b\n', 1),
        ("flickr_annotations_30k.csv", 'raw,sentids,split,filename,img_id\n'
         '"[""A dog."", ""A brown, wet dog.""]","[0, 1]",test,1.jpg,0\n"[""A cat.""]",[2],test,2.jpg,1\n'
         '"[""x""]",[3],train,3.jpg,2\nbad,[4],test,2.jpg,1\n', 1),
    ],
)  # fmt: skip
def test_flickr30k_in_the_files_that_go_around(
    name: str, content: str, bad: int, tmp_path: Path, picture: Picture
) -> None:
    for number in (1, 2, 3):
        picture(f"flickr30k-images/{number}.jpg", encode("jpeg", seed=number))
    file = write(tmp_path / name, content)
    stem = name.rpartition(".")[0]
    for spec in (f"flickr30k:{file}", f"flickr30k:{tmp_path}"):
        source = open_data(spec)
        found = {uid.rpartition("/")[2]: captions for uid, captions in texts(source).items()}
        assert found == {"1.jpg": ["A dog.", "A brown, wet dog."], "2.jpg": ["A cat."]}
        assert source.report.counts == {"bad-row": bad}
    assert open_data(f"flickr30k:{file}")[0].uid == f"{stem}/1.jpg"


def test_flickr30k_of_no_known_form(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in none of the forms"):
        open_data(f"flickr30k:{write(tmp_path / 'x.csv', 'a,b,c' + chr(10))}")
    with pytest.raises(UsageError, match="has none of results_20130124"):
        open_data(f"flickr30k:{tmp_path}")
    with pytest.raises(UsageError, match="do not exist"):
        open_data(f"flickr30k:{tmp_path}/none.token")


def test_sugarcrepe_brings_its_hard_negatives(tmp_path: Path, picture: Picture) -> None:
    for number in (1, 2):
        picture(f"val2017/{number}.jpg", encode("jpeg", seed=number))
    one = {"filename": "1.jpg", "caption": "a dog on a mat", "negative_caption": "a cat on a mat"}
    write(tmp_path / "data/replace_obj.json", {"0": one, "1": one | {"negative_caption": "a dog on a rug"}})
    two = {"filename": "2.jpg", "caption": "a red car, a blue bus", "negative_caption": "a blue car, a red bus"}
    odd = [one | {"negative_caption": " "}, one | {"negative_caption": one["caption"]}, "x", two | {"filename": 3}]
    write(tmp_path / "data/swap_att.json", {str(i): row for i, row in enumerate([two, *odd])})
    source = open_data(f"sugarcrepe:{tmp_path}/data?images={tmp_path}/val2017")
    assert texts(source) == {"data/1.jpg": ["a dog on a mat"], "data/2.jpg": ["a red car, a blue bus"]}
    assert source[0].hard_negatives == (
        HardNegative("a dog on a mat", "a cat on a mat", "replace_obj"),
        HardNegative("a dog on a mat", "a dog on a rug", "replace_obj"),
    )
    assert source[1].hard_negatives == (HardNegative(two["caption"], two["negative_caption"], "swap_att"),)
    assert source.report.counts == {"bad-hard-negative": 3, "not-a-path": 1}
    assert len(questions_of(source).negatives) == 3
    # captions that go take their hard negatives along
    assert open_data(f"sugarcrepe:{tmp_path}/data?images={tmp_path}/val2017&captions=0")[0].hard_negatives == ()
    assert len(open_data(f"sugarcrepe:{tmp_path}/data/swap_att.json")) == 1
    with pytest.raises(UsageError, match=r"holds no \.json file"):
        open_data(f"sugarcrepe:{tmp_path}/val2017")
