"""The few-label protocol: arms of equal steps, pools that do not meet, the mix against a loop, a whole run on toys."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import few_label, few_label_mpa
from pocketvlm.data.exact_match import exact_match
from pocketvlm.data.scene_questions import CAPTIONS
from pocketvlm.data.scenes import PictureSet
from pocketvlm.distill.vlm.evaluate import Asked
from pocketvlm.distill.vlm.words import save_word_vectors
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students.vlm import load_vlm, save_vlm

ARMS = (
    *("labels", "distilled", "answers", "no-relation", "response", "reverse", "js"),
    *("dpt-sft", "pt-sft-dft", "dpt-sft-dft"),
)
PLAN = few_label.Plan(
    steps=4,
    batch=4,
    taught=8,
    labelled=6,
    questions=3,
    test_scenes=6,
    layers=1,
    width=48,
    connector=48,
    bfloat16=False,
    top=4,
    relation=0.5,
)


@pytest.fixture(scope="module")
def toys() -> Any:
    path = Path(__file__).parent / "distill" / "vlm_toys.py"
    spec = importlib.util.spec_from_file_location("few_label_toys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_arm_has_the_steps_and_the_batch_of_the_plan() -> None:
    plan = few_label.Plan()
    for arm in ARMS:
        recipe = few_label.recipe_of(arm, 3, plan)
        assert recipe.steps == plan.steps
        assert {stage.batch for stage in recipe.stages} == {plan.batch}
        assert recipe.optim.seed == 3
    (control,) = few_label.recipe_of("labels", 0, plan).stages
    assert control.labelled == 1
    assert not control.weights.hears
    assert few_label_mpa.half_of(plan, 0).steps == plan.steps // 2


def _made(toys: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[few_label.Prepared, Path, Path]:
    monkeypatch.setattr(few_label, "picture_set", lambda pool, fold: toys.PICTURES)
    monkeypatch.setattr(few_label, "LABELS", 0.3)
    monkeypatch.setattr(few_label, "load_vlm_config", lambda name, changes: toys.tiny(width=48).config)
    teacher = save_vlm(toys.tiny(3, width=64), folder / "teacher")
    words = folder / "words"
    words.mkdir()
    size = toys.tiny().tokenizer.vocab_size
    save_word_vectors(torch.randn(size, 8) * (torch.arange(size) > 400)[:, None], words / "words.safetensors")
    return few_label.prepare(PLAN, teacher, words, folder / "work", False, torch.device("cpu")), teacher, words


def test_a_run_goes_from_pictures_to_a_summary_and_is_read_again(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, words = _made(toys, tmp_path, monkeypatch)
    work = tmp_path / "work"
    runs = [few_label.run_one(arm, seed, PLAN, made, words, work) for seed in (0, 1) for arm in ("labels", "distilled")]
    monkeypatch.setattr(few_label, "train_student", lambda *_, **__: pytest.fail("trained again"))
    assert few_label.run_one("labels", 1, PLAN, made, words, work) == runs[2]
    assert runs[0]["history"][-1]["step"] == PLAN.steps
    assert "response" in runs[1]["history"][-1]
    assert load_vlm(work / "distilled-s0" / "student").tokenizer.json == toys.TOKENIZER
    facts = json.loads((work / few_label.FACTS).read_text())
    written = few_label.result_of(PLAN, made.test, facts, runs)
    assert json.loads(json.dumps(written))["prepared"]["parameters"] > 1000
    told = few_label.summary(made.test, runs)
    assert told["distilled"]["gain_over_labels"]["seeds"] == [0, 1]
    for place, name in enumerate(few_label.Mix.names):
        row, control = told["distilled"][name], told["labels"][name]
        gain = told["distilled"]["gain_over_labels"][name]
        assert gain["points"] == pytest.approx(row["mean"] - control["mean"], abs=0.02), place
        low, high = gain["interval_over_scenes"]
        assert low <= gain["points"] <= high
    assert json.loads(json.dumps(few_label.by_type(made.test, runs)))["labels"]["types"]
    # the mix of one run, counted question by question
    pairs = [(q, a) for q, a in zip([q for e in made.test.entries for q in e.questions], runs[0]["said"], strict=True)]
    short = [(q, a) for q, a in pairs if q.type not in CAPTIONS]
    shares = [
        np.mean([exact_match(a, q.answer) for q, a in short if q.type == kind]) for kind in {q.type for q, _ in short}
    ]
    found = few_label.Mix(made.test).values(runs[0]["said"], np.ones((1, len(made.test))))[0]
    assert found[0] == pytest.approx(100 * np.mean([exact_match(a, q.answer) for q, a in short]))
    assert found[1] == pytest.approx(100 * np.mean(shares))


def test_draws_of_scenes_and_of_concepts_are_weights(toys: Any) -> None:
    mix = few_label.Mix(toys.made_list(7))
    scenes, concepts = mix.draws("scenes", 50), mix.draws("concepts", 4000)
    assert scenes.sum(1).tolist() == [7.0] * 50
    assert concepts.mean(0) == pytest.approx(np.ones(7), abs=0.1)
    # a scene of one picture has that concept's weight alone, as another scene of it has
    assert mix.shown.sum(0) == pytest.approx(np.ones(7))


def test_a_trial_holds_out_pictures_of_the_students_own_pool(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def pictures(pool: str, fold: int) -> PictureSet:
        seen.append(pool)
        return toys.PICTURES

    monkeypatch.setattr(few_label, "picture_set", pictures)
    rest, held = few_label.pools(True)
    assert seen == ["student"]
    uids = [{picture.uid for picture in found.pictures} for found in (rest, held)]
    assert not uids[0] & uids[1]
    assert len(uids[0] | uids[1]) == len(toys.PICTURES)
    few_label.pools(False)
    assert seen == ["student", "student", "test"]


def test_parity_gaps_are_learnt_from_and_written(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _, words = _made(toys, tmp_path, monkeypatch)

    # random weights answer nothing as it is written
    def sure(scenes: Any, answers: Any) -> Any:
        pairs = [(index, question) for index, entry in enumerate(scenes.entries) for question in entry.questions]
        return [Asked(index, question, question.answer) for index, question in pairs]

    monkeypatch.setattr(few_label_mpa, "kept_verdicts", sure)
    monkeypatch.setattr(few_label_mpa, "LABELS", 0.3)
    found = few_label_mpa.run_share(0.3, 0, PLAN, made, words, tmp_path / "work", 5)
    assert found["teacher_consistent"] == found["asked"] >= found["gaps"] > 0
    assert found["scenes"] == 5
    assert len(found["said"]) == sum(len(entry.questions) for entry in made.test.entries)
    again = few_label_mpa.run_share(0.3, 0, PLAN, made, words, tmp_path / "work", 5)
    assert again == found


def test_scenes_of_pictures_whose_labels_are_withheld_now_are_not_asked_about(
    toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _, words = _made(toys, tmp_path, monkeypatch)
    seen: list[Any] = []

    def verdicts(scenes: Any, answers: Any) -> Any:
        return [Asked(i, q, q.answer) for i, entry in enumerate(scenes.entries) for q in entry.questions]

    real = few_label_mpa.parity_gaps
    monkeypatch.setattr(few_label_mpa, "kept_verdicts", verdicts)
    monkeypatch.setattr(few_label_mpa, "parity_gaps", lambda asked, *rest: (seen.append(asked), real(asked, *rest))[1])
    monkeypatch.setattr(few_label_mpa, "LABELS", 0.3)
    few = few_label_mpa.labelled_numbers(toys.PICTURES, 0.3)
    monkeypatch.setattr(
        few_label_mpa, "labelled_numbers", lambda pictures, share: few if share == 0.3 else few[: len(few) // 2]
    )
    few_label_mpa.run_share(0.1, 0, PLAN, made, words, tmp_path / "other", 100)
    shown = {number for entry in seen[0].entries for _, number in entry.scene.placed}
    assert not shown & set(few[len(few) // 2 :])


def test_a_finished_run_of_another_plan_is_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "labels-s0" / "said.json"
    path.parent.mkdir()
    for plan in (dataclasses.asdict(dataclasses.replace(PLAN, steps=5)), None):
        path.write_text(json.dumps({"said": [], "plan": plan} if plan else {"said": []}))
        with pytest.raises(IntegrityError, match="was run under another plan"):
            few_label.said_of(path, PLAN)
    path.write_text(json.dumps({"said": [], "plan": dataclasses.asdict(PLAN)}))
    assert few_label.said_of(path, PLAN)["said"] == []
