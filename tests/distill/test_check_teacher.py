"""`check_teacher` says plainly when a teacher knows nothing, knows less than colours do, or knows something."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import ToyTeacher, make_world
from PIL import Image
from rich.console import Console

from pocketvlm.data import open_data
from pocketvlm.distill.check_teacher import _chance, check_teacher
from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import train_tokenizer
from pocketvlm.teachers.base import TeacherOutput


class Noise(ToyTeacher):
    """Answers at random, but repeatably."""

    name = "noise"

    def encode_images(self, pixels: torch.Tensor) -> TeacherOutput:
        seed = int(pixels.long().sum())
        return self._random(len(pixels), seed)

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        return self._random(len(texts), sum(map(len, texts)))

    def _random(self, rows: int, seed: int) -> TeacherOutput:
        values = torch.randn(rows, self.dim, generator=torch.Generator().manual_seed(seed))
        return TeacherOutput(torch.nn.functional.normalize(values, dim=-1))


class LightOrDark(ToyTeacher):
    """Knows bright from dark and no more: better than chance, worse than the colours."""

    name = "light-or-dark"

    def encode_images(self, pixels: torch.Tensor) -> TeacherOutput:
        return self._side(pixels.float().mean(dim=(1, 2, 3)) > 100)

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        found = self._side(torch.tensor([text.split()[0] in ("white", "yellow", "cyan") for text in texts]))
        # texts of one side differ a little, at random, so that they are not all tied
        noise = torch.randn(found.embedding.shape, generator=torch.Generator().manual_seed(1))
        return TeacherOutput(torch.nn.functional.normalize(found.embedding + 0.05 * noise, dim=-1))

    def _side(self, bright: torch.Tensor) -> TeacherOutput:
        return TeacherOutput(
            torch.nn.functional.normalize(torch.where(bright[:, None], 1.0, -1.0) * self.joint[0], dim=-1)
        )


def colour_words(folder: Path) -> Any:
    """120 pictures whose caption *is* their colour, spelled, so that colours alone solve the task."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    words = ["red", "green", "blue", "white", "black", "yellow", "purple", "cyan"]
    values = [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
        (0, 0, 0),
        (255, 255, 0),
        (128, 0, 128),
        (0, 255, 255),
    ]
    for index in range(120):
        word, rgb = words[index % 8], values[index % 8]
        pixels = np.clip(np.array(rgb) + rng.normal(0, 8, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append({"image": f"{index}.png", "caption": f"{word} {index % 3}"})
    (folder / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return open_data(str(folder / "m.jsonl"))


def test_a_good_teacher_is_called_worth_learning_from(world: Path) -> None:
    found = check_teacher(ToyTeacher(), open_data(str(world)))
    assert found.score == 1.0
    assert found.chance == pytest.approx(5 / 40)
    assert found.teacher_on_same == 1.0
    assert not found.worse_than_baseline
    assert "worth learning from" in found.verdict


def test_a_teacher_without_knowledge_is_called_no_better_than_chance(world: Path) -> None:
    found = check_teacher(Noise(), open_data(str(world)))
    assert found.worse_than_baseline
    assert "noise is no better than chance on world" in found.verdict
    assert "do not use it here" in found.verdict


def test_a_teacher_below_the_baseline_is_said_to_be(tmp_path: Path) -> None:
    data = colour_words(tmp_path / "colours")
    found = check_teacher(LightOrDark(), data, k=5)
    assert found.score > found.chance
    assert found.baseline is not None
    assert found.teacher_on_same is not None
    assert found.baseline > found.teacher_on_same
    assert found.worse_than_baseline
    assert found.interval is not None
    assert found.interval.high < 0
    assert "light-or-dark is worse than looking at colours only" in found.verdict


def test_chance_is_exact_for_several_captions() -> None:
    from pocketvlm.data.sample import Caption, ImageRef, Sample

    both = Sample("a", ImageRef(data=b""), captions=(Caption("x"), Caption("y")))
    one = Sample("b", ImageRef(data=b""), captions=(Caption("z"),))
    # 2 of 3 texts drawn: a misses only if both drawn are wrong, which 1 wrong text cannot be
    assert _chance([both, one], "en", 3, 2) == pytest.approx((1 + 2 / 3) / 2)


def test_few_pictures_get_no_baseline_and_one_picture_is_refused(tmp_path: Path) -> None:
    few = check_teacher(ToyTeacher(), open_data(str(make_world(tmp_path / "few", pictures=8))))
    assert few.baseline is None
    assert "too few captioned pictures for a fair baseline" in few.verdict
    with pytest.raises(UsageError, match="1 captioned pictures with 1 different texts"):
        check_teacher(ToyTeacher(), open_data(str(make_world(tmp_path / "one", pictures=1))))


class ShortSighted(ToyTeacher):
    """Says, as the dual encoders do, how it cuts texts."""

    def __init__(self) -> None:
        super().__init__()
        self._json = train_tokenizer(["amber beige black thing"] * 3, 120)
        size = json.loads(self._json)["model"]["vocab"]
        self.text = TextSpec(context_length=12, vocab_size=len(size))

    def tokenizer_json(self) -> bytes:
        return self._json


class Unwritable(ShortSighted):
    def tokenizer_json(self) -> bytes:
        raise UsageError("no tokenizer.json gives this model's ids")


def test_captions_that_the_teacher_would_cut_are_left_out_and_counted(tmp_path: Path) -> None:
    path = make_world(tmp_path / "world")
    with open(path, "a") as file:
        long = "red " + "thing " * 40
        file.write(json.dumps({"image": "red.png", "caption": long, "uid": "long"}) + "\n")
    data = open_data(f"{path}?check=none")
    found = check_teacher(ShortSighted(), data)
    assert found.evaluation.values["data"]["left_out"] == {"too-long-text": 1}
    assert found.evaluation.values["model"]["image_to_text"]["queries"] == 40
    assert str(found.table().caption).endswith("Left out: 1 too-long-text.")
    # no notion of a context: everything is asked, as before
    for teacher in (ToyTeacher(), Unwritable()):
        kept = check_teacher(teacher, data)
        assert kept.evaluation.values["model"]["image_to_text"]["queries"] == 41
        assert kept.table().caption == kept.verdict


def test_it_prints_and_serialises(world: Path) -> None:
    found = check_teacher(ToyTeacher(), open_data(str(world)))
    assert json.loads(json.dumps(found.to_dict()))["held_out"]["queries"] == found.queries
    out = StringIO()
    Console(file=out, width=120).print(found.table())
    assert "colours only (baseline)" in out.getvalue()


def test_answers_are_kept_for_later(tmp_path: Path) -> None:
    data = open_data(str(make_world(tmp_path / "world")))
    first = check_teacher(ToyTeacher(), data, answers=tmp_path / "answers")
    assert [path.suffix for path in (tmp_path / "answers").iterdir()] == [".npz"]

    class Silent(ToyTeacher):
        def encode_images(self, pixels: torch.Tensor) -> TeacherOutput:
            raise AssertionError("asked again")

    assert check_teacher(Silent(), data, answers=tmp_path / "answers").to_dict() == first.to_dict()
    assert check_teacher(ToyTeacher(), data).to_dict() == first.to_dict()
