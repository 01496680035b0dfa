"""`pocketvlm vlm distill` and `vlm eval` on made-up pictures and models of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pocketvlm.students import build_student, save_student, train_tokenizer
from pocketvlm.students.vlm import load_vlm, save_vlm

_SMALL = (
    "data.scenes=12", "data.labelled_scenes=8", "data.questions=3", "data.captions=0.3", "stages.0.steps=2",
    "stages.0.batch=4", "optim.bfloat16=false",
)  # fmt: skip


@pytest.fixture
def made(tmp_path: Path, vlm_toys: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of a teacher and of a student to go on with."""
    for place in ("pocketvlm.distill.vlm.run.picture_set", "pocketvlm.data.scenes.picture_set"):
        monkeypatch.setattr(place, lambda pool, fold, **_: vlm_toys.PICTURES)
    return save_vlm(vlm_toys.tiny(3, width=64), tmp_path / "teacher"), save_vlm(vlm_toys.tiny(), tmp_path / "student")


def test_a_student_is_distilled_and_scored(
    made: tuple[Path, Path], tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    teacher, student = made
    out = tmp_path / "run"
    command: list[Any] = ["vlm", "distill", *_SMALL, "--teacher", teacher, "--student", student, "--out", out]
    done = cli(*command, "--scenes", 4)
    assert done.code == 0, done.err
    assert f"student: {out / 'student'}" in done.out
    assert "mean of types" in done.out
    written = json.loads((out / "eval.json").read_text())
    assert written["pictures"]["all"] == len(vlm_toys.PICTURES)
    assert 0 < written["pictures"]["labelled"] < len(vlm_toys.PICTURES)
    assert written["recipe"]["stages"][0]["steps"] == 2
    weights = (out / "student" / "weights-1.safetensors").read_bytes()
    assert weights != (student / "weights-1.safetensors").read_bytes()
    # a finished run that is resumed ends at the same student
    assert cli(*command, "--scenes", 4, "--resume").code == 0
    assert (out / "student" / "weights-1.safetensors").read_bytes() == weights
    assert "is not empty" in cli(*command).sentence()
    told = cli("vlm", "eval", out / "student", "--scenes", 4, "--json")
    assert json.loads(told.out) == written["scores"]
    shown = cli("vlm", "eval", out / "student", "--scenes", 4).out
    assert "says yes" in shown
    captions = written["scores"]["captions"]
    assert f"chrF {captions['chrf']:.1f} of 100, CIDEr-D {captions['cider_d']:.2f} of 10" in shown
    assert load_vlm(out / "student").tokenizer.json == vlm_toys.TOKENIZER


def test_a_student_sees_with_a_distilled_clip_tower(
    made: tuple[Path, Path], tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    teacher, saved = made
    clip = build_student(
        "timm:test_resnet", embed_dim=8, tokenizer_json=train_tokenizer(["a red thing"], 40),
        overrides={"image.size": 64, "text.layers": 0, "licences": [["seen", "CC0", "them"]]},
    )  # fmt: skip
    folder = save_student(clip, tmp_path / "mine" / "student")
    size = tmp_path / "size.yaml"
    size.write_text(yaml.safe_dump(vlm_toys.tiny().config.model_dump(mode="json")))
    out = tmp_path / "run"
    command: list[Any] = ["vlm", "distill", *_SMALL, "--teacher", teacher, "--out", out, "--scenes", 4]
    done = cli(*command, "--student", size, "--vision", f"student:{folder}")
    assert done.code == 0, done.err
    model = load_vlm(out / "student")
    identity = clip.contract.model_id
    assert (model.config.vision.backbone, model.config.vision.size) == ("test_resnet", vlm_toys.SIDE)
    assert json.loads((out / "eval.json").read_text())["tower"] == model.config.vision.origin == identity
    assert ("seen", "CC0", "them") in model.config.licences
    # the recipe moves connector and decoder alone
    own = clip.image_tower.trunk.state_dict()
    assert all(value.equal(own[name]) for name, value in model.vision.trunk.state_dict().items())
    # the tower's folder is not deleted while it is read
    inside = save_student(clip, out / "clip")
    again = cli(*command, "--student", size, "--vision", f"student:{inside}", "--overwrite").sentence()
    assert "is in it and is read" in again
    other = [*command[:-4], "--out", tmp_path / "other"]
    assert "is a saved student" in cli(*other, "--student", saved, "--vision", f"student:{folder}").sentence()
    assert "student:FOLDER" in cli(*other, "--student", size, "--vision", folder).sentence()
    assert "holds no student.json" in cli(*other, "--student", size, "--vision", f"student:{tmp_path}").sentence()
    assert not (tmp_path / "other").exists()


def test_mistakes_are_answered_in_a_sentence(
    made: tuple[Path, Path], tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    teacher, student = made
    stranger = save_vlm(vlm_toys.tiny(tokenizer=vlm_toys.OTHER_TOKENIZER), tmp_path / "stranger")
    options: list[Any] = ["--teacher", teacher, "--out", tmp_path / "run"]
    assert "whose tokenizer is not the student's" in cli("vlm", "distill", *options, "--student", stranger).sentence()
    found = cli("vlm", "distill", "data.captions=0", *options, "--student", student, "--overwrite").sentence()
    assert "nothing true is known" in found
    assert "generative student" in cli("vlm", "distill", *options, "--student", "vlm-8mm").sentence()
    assert "recipe" in cli("vlm", "distill", *options, "--recipe", "llava").sentence()
    assert "vlm.json" in cli("vlm", "eval", tmp_path).sentence()


def test_a_hugging_face_model_names_the_pictures(
    made: tuple[Path, Path], hf_vlm: Path, tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    _, student = made
    options: list[Any] = ["--teacher", f"hf-vlm:{hf_vlm}", "--student", student, "--device", "cpu", "--scenes", 2]
    out = tmp_path / "run"
    refused = cli("vlm", "distill", *_SMALL, *options, "--out", out).sentence()
    assert "take a recipe of answers alone (--recipe answers)" in refused
    command: list[Any] = ["vlm", "distill", *_SMALL, *options, "--recipe", "answers"]
    done = cli(*command, "--out", out)
    assert done.code == 0, done.err
    found = json.loads((out / "eval.json").read_text())
    told = found["said_of_unlabelled"]
    assert told["pictures"] == len(vlm_toys.PICTURES) - found["pictures"]["labelled"]
    # random weights write no kind that there is
    assert told["without_kind"] == told["pictures"]
    (path,) = (out / "kept").glob("said-*.json")
    said = json.loads(path.read_text())
    assert len(said) == told["pictures"]
    # in another wording
    worded = cli(*command, "--template", "<image>{question} = {answer}", "--out", tmp_path / "worded")
    assert worded.code == 0, worded.err
    assert (
        "must hold <image>, {question}" in cli(*command, "--template", "{question}", "--out", tmp_path / "x").sentence()
    )
    # no teacher of other runs, as there is no tokenizer of this kit
    kept = ("--teacher", out / "kept", "--out", tmp_path / "other")
    assert "unknown generative teacher" in cli("vlm", "distill", *kept).sentence()


def test_names_left_empty_are_counted_and_damage_is_one_sentence(
    made: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    teacher, student = made
    first, new = tmp_path / "first", tmp_path / "new"
    command: list[Any] = ["vlm", "distill", *_SMALL, "--recipe", "answers", "--student", student, "--scenes", 2]
    assert cli(*command, "--teacher", teacher, "--out", first).code == 0
    (path,) = (first / "kept").glob("said-*.json")
    said = json.loads(path.read_text())
    for answers in said.values():
        answers |= {"en": "…", "de": " ", "fr": "chose"}
    path.write_text(json.dumps(said))
    kept: list[Any] = ["--teacher", first / "kept", "--out", new]
    done = cli(*command, *kept)
    assert done.code == 0, done.err
    without = json.loads((new / "eval.json").read_text())["said_of_unlabelled"]["without_name"]
    assert without["en"] == without["de"] == len(said)
    assert "fr" not in without
    assert f"names empty, which are not asked about: {len(said)} in de, {len(said)} in en" in done.out
    path.write_bytes("Löwe".encode("latin-1"))
    assert "is damaged (it is no JSON in UTF-8" in cli(*command, *kept, "--overwrite").sentence()


def test_teachers_and_data_that_do_not_go_together(
    made: tuple[Path, Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    teacher, _ = made
    out: list[Any] = ["--out", tmp_path / "run"]
    file = tmp_path / "said.jsonl"
    file.write_text('{"id": "1", "question": "What?", "answer": "it"}')
    assert "pictures with --data" in cli("vlm", "distill", "--teacher", f"recorded:{file}", *out).sentence()
    assert "name one with --teacher" in cli("vlm", "distill", *out).sentence()
    assert "--ask and --aligned are for" in cli("vlm", "distill", "--teacher", teacher, "--ask", "?", *out).sentence()
    assert "did you mean 'openmoji-talking'" in cli("vlm", "distill", "--teacher", "openmoji", *out).sentence()


def test_a_run_is_resumed_only_as_it_was_begun(
    made: tuple[Path, Path], tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    teacher, _ = made
    sizes = []
    for number, std in enumerate((0.5, 0.6)):
        config = vlm_toys.tiny().config.model_dump(mode="json")
        config["vision"] |= {"mean": [0.5] * 3, "std": [std] * 3}
        sizes.append(tmp_path / f"size-{number}.yaml")
        sizes[-1].write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    command: list[Any] = ["vlm", "distill", *_SMALL, "--teacher", teacher, "--scenes", 2, "--out", out]
    assert cli(*command, "--student", sizes[0]).code == 0
    # the same shapes, another way to see
    assert "would mix two runs" in cli(*command, "--student", sizes[1], "--resume").sentence()
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    elsewhere: list[Any] = [*command[:-1], other, "--student", sizes[0]]
    assert "nothing to resume" in cli(*elsewhere, "--resume").sentence()
    assert "not those of such a run" in cli(*elsewhere, "--overwrite").sentence()
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_an_older_run_is_not_deleted_for_a_mistake(
    made: tuple[Path, Path], tmp_path: Path, vlm_toys: Any, cli: Callable[..., Any]
) -> None:
    teacher, student = made
    out = tmp_path / "run"
    command: list[Any] = ["vlm", "distill", *_SMALL, "--scenes", 2, "--out", out]
    assert cli(*command, "--teacher", teacher, "--student", student).code == 0
    odd = vlm_toys.tiny().config.model_dump(mode="json")
    size = tmp_path / "size.yaml"
    own = ["--tokenizer", out / "student" / "tokenizer.json", "--student", size, "--overwrite"]
    stranger = save_vlm(vlm_toys.tiny(tokenizer=vlm_toys.OTHER_TOKENIZER), tmp_path / "stranger")
    kept = ["--teacher", out / "kept", "--overwrite", "--out", tmp_path / "run"]
    assert "a same-vocabulary loss was asked" in cli(*command, *kept, "--student", stranger).sentence()
    said = ["--teacher", "openmoji-talking", "--student", size, "--recipe", "answers", "--overwrite"]
    size.write_text(yaml.safe_dump(odd))
    assert "leaves out" in cli(*command, *said).sentence()
    assert "is in it and is read" in cli(*command, "--teacher", teacher, *own).sentence()
    more = ["--teacher", teacher, "--overwrite", "--words", tmp_path]
    assert "holds no words.safetensors" in cli(*command, *more, "--student", size).sentence()
    assert "would be ignored" in cli(*command, *more, "--student", student).sentence()
    odd["vision"]["size"] = 64
    size.write_text(yaml.safe_dump(odd))
    assert "give vision.size 60" in cli(*command, *more[:3], "--student", size).sentence()
    odd["vision"]["size"], odd["decoder"]["context_length"] = vlm_toys.SIDE, 60
    size.write_text(yaml.safe_dump(odd))
    assert "set data.length=" in cli(*command, *more[:3], "--student", size).sentence()
    assert (out / "student" / "vlm.json").is_file()
