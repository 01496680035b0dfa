"""`pocketvlm vlm distill` and `vlm eval` on made-up pictures and models of a few thousand weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
