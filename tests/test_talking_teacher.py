"""The talking teacher's recipe from words to scores, on made-up pictures and a model of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import talking_teacher
from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scenes import LANGUAGES, Picture, PictureSet
from pocketvlm.distill.vlm.train import VlmTraining
from pocketvlm.distill.vlm.words import save_word_vectors
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import load_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.tokenizer import VlmTokenizer

TRAINING = VlmTraining(steps=2, warmup=1, log_every=1)
SIZES = talking_teacher.Sizes(batch=3, scenes=5, workers=0)


def _pictures(pool: str, fold: int, *, limit: int | None = None) -> PictureSet:
    assert (fold, limit) == (1, 60)
    names = [f"{pool} thing {number}" for number in range(4)]
    return PictureSet(
        [Picture(name, dict.fromkeys(LANGUAGES, name), "tool", "red", name) for name in names],
        [np.full((12, 12, 3), 40 * place, np.uint8) for place in range(4)],
    )


def test_the_recipe_goes_from_words_to_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(talking_teacher, "picture_set", _pictures)
    monkeypatch.setattr(
        talking_teacher,
        "_TOY",
        talking_teacher._TOY | {"decoder.width": 32, "decoder.layers": 1, "decoder.hidden": 32, "vision.size": 48},
    )
    shown = _pictures("teacher", 1, limit=60)
    asked = [question for index in range(50) for question in ask_about(shown, 0, index, 8)[1]]
    words = tmp_path / "words"
    with pytest.raises(UsageError, match="--stage prepare"):
        talking_teacher.train(1, torch.device("cpu"), TRAINING, words, tmp_path / "out", SIZES, 0, True)
    words.mkdir()
    made = train_vlm_tokenizer([text for question in asked for text in (question.text, question.answer)], 700)
    (words / talking_teacher.TOKENIZER).write_bytes(made)
    vectors = (
        torch.randn(VlmTokenizer(made).vocab_size, 8) * (torch.arange(VlmTokenizer(made).vocab_size) > 400)[:, None]
    )
    save_word_vectors(vectors, words / talking_teacher.VECTORS)
    result = talking_teacher.train(1, torch.device("cpu"), TRAINING, words, tmp_path / "out", SIZES, 0, True)
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert set(written["scores"]) == {"teacher", "student", "test"}
    assert [row["step"] for row in written["history"]] == [1, 2]
    assert written["scenes_seen"] == 6
    model = load_vlm(tmp_path / "out")
    assert model.tokenizer.json == made
    assert {what.split()[0] for what, _, _ in model.config.licences} >= {"OpenMoji", "image"}
    # eight files are what small transfers bring back, of the whole model and its scores
    assert len(list((tmp_path / "out").iterdir())) == 4
