"""Captions longer than the student's context, in training and in evaluation data: counted and said, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distill_toys import ToyTeacher, make_world, toy_recipe
from rich.console import Console

from pocketvlm.data import open_data
from pocketvlm.distill.evaluate import evaluate_path
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import BadSampleError, UsageError

LONG = "a " + "very " * 30 + "long text"


class Heard(Reporter):
    def __init__(self) -> None:
        super().__init__(False)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def add_long(world: Path, *pictures: str) -> Path:
    """One more picture for each of `pictures`, whose only caption is too long."""
    with open(world, "a") as file:
        for name in pictures:
            file.write(json.dumps({"image": f"{name}.png", "caption": f"{name} {LONG}", "uid": f"long-{name}"}) + "\n")
    return world


@pytest.fixture
def both(toy_teacher: None, tmp_path: Path) -> tuple[Path, Path]:
    """Training data with two long captions, evaluation data with one."""
    return (
        add_long(make_world(tmp_path / "train"), "red", "teal"),
        add_long(make_world(tmp_path / "test", pictures=12), "beige"),
    )


def value(train: Path, test: Path, cache: Path) -> dict[str, Any]:
    found = toy_recipe(train, cache)
    found["data"] |= {"train": f"{train}?check=none", "eval": f"{test}?check=none"}
    return found


def test_prepare_leaves_them_out_of_training_and_of_evaluation(both: tuple[Path, Path], tmp_path: Path) -> None:
    heard = Heard()
    prepared = prepare(load_recipe(value(*both, tmp_path / "cache")), heard)
    assert prepared.questions is not None
    # the pictures stay, and without a caption they ask nothing
    assert len(prepared.samples) == 42
    seen = {caption.text for sample in prepared.samples for caption in sample.captions}
    for texts in (seen, set(prepared.texts), set(prepared.questions.texts)):
        assert texts
        assert not any(LONG in text for text in texts)
    assert prepared.source.report.counts == {"too-long-text": 2}
    assert prepared.questions.left_out == {"too-long-text": 1}
    said = [line for line in heard.lines if line.startswith("left out of")]
    assert said == [
        "left out of the training data world: 2 x too-long-text",
        "left out of the evaluation data world: 1 x too-long-text",
    ]


def test_a_run_keeps_the_counts_and_eval_gives_the_same(both: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = both
    recipe = load_recipe(value(train, test, tmp_path / "cache"), ["train.steps=2"])
    result = distill_run(recipe, tmp_path / "run", progress=False)
    data = json.loads((tmp_path / "run" / "environment.json").read_text())["data"]
    assert data["train"]["left_out"]["counts"] == {"too-long-text": 2}
    assert data["eval"]["left_out"]["counts"] == {"too-long-text": 1}
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["data"]["left_out"] == {"too-long-text": 1}
    again = evaluate_path(tmp_path / "run", str(test), teacher="toy", device="cpu")
    assert result.evaluation is not None
    assert again.values == result.evaluation.values | {"teacher_name": ToyTeacher.name}
    assert again.values["model"]["image_to_text"]["queries"] == 12
    console = Console(width=200)
    with console.capture() as shown:
        console.print(again.table())
    assert "left out: 1 too-long-text" in " ".join(shown.get().split())


@pytest.mark.parametrize("where", ["train", "test"])
def test_refusing_stops_at_them_in_either_data(toy_teacher: None, tmp_path: Path, where: str) -> None:
    worlds = {name: make_world(tmp_path / name) for name in ("train", "test")}
    add_long(worlds[where], "red")
    recipe = load_recipe(value(*worlds.values(), tmp_path / "cache"), ["data.on_bad_sample=refuse"])
    with pytest.raises(BadSampleError, match=r"^world/long-red: .* tokens .*--on-bad-sample skip$") as refused:
        prepare(recipe, Reporter(False))
    assert refused.value.reason == "too-long-text"


def test_eval_refuses_them_when_told_to(both: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = both
    recipe = load_recipe(value(train, test, tmp_path / "cache"), ["train.steps=2"])
    distill_run(recipe, tmp_path / "run", progress=False)
    with pytest.raises(BadSampleError, match=r"^world/long-beige: "):
        evaluate_path(tmp_path / "run", open_data(str(test), on_bad_sample="refuse"), device="cpu")


def test_data_with_long_captions_only_says_so(toy_teacher: None, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", captioned=0.0)
    add_long(world, "red", "teal")
    found = toy_recipe(world, tmp_path / "cache")
    found["data"] |= {"train": str(world), "eval": None}
    with pytest.raises(UsageError, match=r"none of the 42 pictures of world has a caption .*2 x too-long-text"):
        prepare(load_recipe(found), Reporter(False))
