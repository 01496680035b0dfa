"""Generative students on a GPU: the numbers of a CPU, half precision near them, a killed run's same numbers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_vlm_stages import _recipe
from vlm_toys import PICTURES, SIDE, made_list, tiny

from pocketvlm.distill.checkpoint import latest_checkpoint
from pocketvlm.distill.vlm.answer_cache import kept_answers
from pocketvlm.distill.vlm.evaluate import evaluate_vlm
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.list_answers import list_answers
from pocketvlm.distill.vlm.pseudo import picture_answers
from pocketvlm.distill.vlm.recipe import VlmRecipe
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.distill.vlm.stages import Live, Source, StageRun
from pocketvlm.teachers.device import full_float32

pytestmark = pytest.mark.cuda

ALL = {"answer": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}


@pytest.fixture(autouse=True)
def _true_float32() -> Iterator[None]:
    with full_float32():
        yield


def _made(device: str, folder: Path, *, features: bool = True) -> tuple[Source, Source, Live]:
    where = torch.device(device)
    teacher, student = tiny(3, width=64).to(where), tiny().to(where)
    composer = composer_of(PICTURES, SIDE, variants=2, device=where)
    true, heard = made_list(6), made_list(10, seed=1)
    kept = [
        trunk_features(student, scenes, composer, folder / device) if features else None for scenes in (true, heard)
    ]
    answers = kept_answers(folder / device / "answers", heard, top=5, teacher=teacher, composer=composer, places=True)
    return Source(true, kept[0], composer), Source(heard, kept[1], composer, answers), Live(teacher, composer)


def _run(made: Any, recipe: VlmRecipe, device: str, folder: Path, *, live: bool = False, resume: bool = False) -> Any:
    model = tiny().to(device)
    true, heard, teacher = made
    run = StageRun(model, recipe, true, heard, folder, live=teacher if live else None)
    if true.features is None:
        history = run.run(resume=resume)
    else:
        with without_trunk(model):
            history = run.run(resume=resume)
    return {name: value.cpu() for name, value in model.state_dict().items()}, history


def _losses(history: list[dict[str, Any]]) -> list[list[float]]:
    return [[value for key, value in row.items() if key in (*ALL, "on_policy")] for row in history]


def test_answers_kept_on_a_gpu_are_the_cpus(tmp_path: Path) -> None:
    (_, cpu, _), (_, gpu, _) = (_made(device, tmp_path) for device in ("cpu", "cuda"))
    assert cpu.answers is not None
    assert gpu.answers is not None
    assert gpu.answers.tensors["logs"].device.type == "cpu"
    torch.testing.assert_close(gpu.answers.tensors["ids"], cpu.answers.tensors["ids"])
    for name in ("logs", "place_logs"):
        torch.testing.assert_close(gpu.answers.tensors[name], cpu.answers.tensors[name], atol=4e-3, rtol=0)
    assert gpu.features is not None
    assert cpu.features is not None
    torch.testing.assert_close(gpu.features(range(10)), cpu.features(range(10)), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("features", [True, False], ids=["features", "pixels"])
def test_float32_stages_equal_the_cpus(tmp_path: Path, features: bool) -> None:
    """With answers of one device for both, so that it is the training that is compared."""
    recipe = _recipe(
        {"name": "one", "labelled": 0.5, "weights": ALL}, {"name": "two", "labelled": 1.0, "weights": {"answer": 1.0}}
    )
    made = _made("cpu", tmp_path, features=features)
    cpu, first = _run(made, recipe, "cpu", tmp_path / "one")
    gpu, second = _run(made, recipe, "cuda", tmp_path / "two")
    for own, theirs in zip(_losses(second), _losses(first), strict=True):
        assert own == pytest.approx(theirs, rel=2e-3, abs=2e-4)
    # Adam's first steps are of the rate's size wherever a gradient is not nought, so rounding can turn single weights
    apart = torch.cat([(gpu[name] - cpu[name]).flatten().abs() for name in cpu if cpu[name].is_floating_point()])
    assert float(apart.mean()) < 1e-3


def test_half_precision_is_finite_and_near(tmp_path: Path) -> None:
    stage = {"name": "one", "labelled": 0.5, "weights": ALL}
    made = _made("cuda", tmp_path)
    _, exact = _run(made, _recipe(stage), "cuda", tmp_path / "fp32")
    half = {"optim": {"every": 2, "log_every": 3, "bfloat16": True}}
    _, rough = _run(made, _recipe(stage, **half), "cuda", tmp_path / "bf16")
    for own, theirs in zip(_losses(rough), _losses(exact), strict=True):
        assert own == pytest.approx(theirs, rel=0.05, abs=0.05)


def test_on_policy_answers_are_those_of_the_cpu(tmp_path: Path) -> None:
    recipe = _recipe({"name": "own", "labelled": 0.5, "on_policy": 1.0, "weights": ALL})
    found = [
        _run(_made(device, tmp_path), recipe, device, tmp_path / f"run-{device}", live=True)[1]
        for device in ("cpu", "cuda")
    ]
    assert _losses(found[1])[0] == pytest.approx(_losses(found[0])[0], rel=2e-2)


def test_a_resumed_run_ends_at_the_same_numbers(tmp_path: Path) -> None:
    made = _made("cuda", tmp_path)
    recipe = _recipe({"name": "one", "steps": 5, "labelled": 0.5, "weights": ALL})
    whole, history = _run(made, recipe, "cuda", tmp_path / "whole")

    class Stop(Exception): ...

    model = tiny().to("cuda")
    true, heard, _ = made
    killed = StageRun(model, recipe, true, heard, tmp_path / "killed")
    plain = killed._loss

    def loss(stage: Any, step: int, own: int) -> Any:
        if step == 3:
            raise Stop
        return plain(stage, step, own)

    killed._loss = loss  # type: ignore[method-assign]
    with pytest.raises(Stop), without_trunk(model):
        killed.run()
    assert latest_checkpoint(tmp_path / "killed" / "checkpoints") is not None
    again, resumed = _run(made, recipe, "cuda", tmp_path / "killed", resume=True)
    assert _losses(resumed) == pytest.approx(_losses(history), rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


def test_answers_are_the_cpus() -> None:
    scenes, numbers = made_list(6), list(range(len(PICTURES)))
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny(5).to(device)
        composer = composer_of(PICTURES, SIDE, variants=2, device=device)
        source = Source(scenes, composer=composer)
        found[device] = (
            [row.answer for row in list_answers(model, scenes, source.seen)],
            picture_answers(model, PICTURES, numbers),
            evaluate_vlm(model, PICTURES, scenes=5)["accuracy"],
        )
    said = [one == two for one, two in zip(found["cpu"][0], found["cuda"][0], strict=True)]
    # untrained logits lie close together, so that a rounding may turn one
    assert sum(said) >= len(said) - 1
    assert found["cpu"][1].keys() == found["cuda"][1].keys()
    assert found["cuda"][2] == pytest.approx(found["cpu"][2], abs=0.1)
