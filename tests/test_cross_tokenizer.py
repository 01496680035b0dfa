"""The cross-tokenizer benchmark from a saved teacher to its result, on made-up pictures and models of few weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cross_tokenizer
from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scenes import LANGUAGES, Picture, PictureSet
from pocketvlm.students.vlm import build_vlm, load_vlm_config, save_vlm, train_vlm_tokenizer

_SMALL = {
    "vision.backbone": "test_efficientnet",
    "vision.weights": "none",
    "vision.levels": [3],
    "vision.size": 48,
    "decoder.width": 32,
    "decoder.layers": 1,
    "decoder.hidden": 32,
}


def _pictures(pool: str, fold: int, *, limit: int | None = None) -> PictureSet:
    names = [f"{pool} thing {number}" for number in range(4)]
    return PictureSet(
        [Picture(name, dict.fromkeys(LANGUAGES, name), "tool", "red", name) for name in names],
        [np.full((12, 12, 3), 40 * place, np.uint8) for place in range(4)],
    )


def test_three_students_see_the_same_batches_and_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_tokenizer, "picture_set", _pictures)
    monkeypatch.setattr(cross_tokenizer, "CHANGES", cross_tokenizer.CHANGES | _SMALL)
    shown = _pictures("student", 0)
    texts = [text for i in range(40) for q in ask_about(shown, 0, i, 8)[1] for text in (q.text, q.answer)]
    config = load_vlm_config("vlm-8m", cross_tokenizer.CHANGES | _SMALL | {"decoder.width": 64})
    save_vlm(build_vlm(config, train_vlm_tokenizer(texts, 500), load_weights=False), tmp_path / "teacher")
    out = tmp_path / "out.json"
    cross_tokenizer.main(teacher=tmp_path / "teacher", toy=True, out=out)
    result = json.loads(out.read_text())
    assert list(result["arms"]) == ["labels", "aligned", "genrecal-style"]
    first = [arm["history"][0]["loss"] for arm in result["arms"].values()]
    # the same batch from the same weights, and more to learn from a teacher
    assert first[0] < first[1] < first[2]
    assert all(set(arm["scores"]) == {"test", "student"} for arm in result["arms"].values())
    answers = result["answers"]
    assert 0 < answers["spans"] <= min(answers["student_tokens"], answers["teacher_tokens"])
