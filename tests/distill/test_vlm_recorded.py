"""A student learns from what a teacher said once, without the teacher: what is shipped, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlm_toys import PICTURES, SIDE, made_list, tiny

from pocketvlm.data.scenes import picture_set
from pocketvlm.distill.vlm.answer_cache import kept_answers, teach
from pocketvlm.distill.vlm.evaluate import evaluate_vlm
from pocketvlm.distill.vlm.kept_teacher import SHIPPED, KeptTeacher
from pocketvlm.distill.vlm.on_policy import sampled_rows
from pocketvlm.distill.vlm.pseudo import labelled_numbers
from pocketvlm.distill.vlm.recipe import VlmRecipe, WeightsSection, load_vlm_recipe
from pocketvlm.distill.vlm.run import answers_folder, distill_vlm, sources_of, taught_list, train_student
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.distill.vlm.stages import stage_terms
from pocketvlm.distill.vlm.teachers import BuiltinVlm, open_vlm_teacher
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.students.vlm import build_vlm, load_vlm, save_vlm
from pocketvlm.students.vlm.config import Reduction
from pocketvlm.students.vlm.io import TOKENIZER
from pocketvlm.teachers.files import sha256_file


def _recipe(**weights: float) -> VlmRecipe:
    stage = {"name": "one", "steps": 2, "batch": 4, "warmup": 0, "weights": {"answer": 1.0} | weights}
    data = {"scenes": 12, "labelled_scenes": 8, "questions": 3, "captions": 0.3}
    return load_vlm_recipe({"data": data, "teacher": {"top": 5}, "stages": [stage]})


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Folders of a student, of a run with a teacher, and of what that teacher said in it."""
    monkeypatch.setattr("pocketvlm.distill.vlm.run.picture_set", lambda pool, fold, **_: PICTURES)
    teacher, student = save_vlm(tiny(3, width=64), tmp_path / "teacher"), save_vlm(tiny(), tmp_path / "student")
    run = tmp_path / "run"
    distill_vlm(teacher, str(student), _recipe(response=1.0), run, scored_scenes=2)
    said = shutil.copytree(run / "kept", tmp_path / "said")
    return student, run, said


def test_without_the_teacher_the_student_is_the_same(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, run, said = made
    assert isinstance(open_vlm_teacher(run / "student"), BuiltinVlm)
    assert open_vlm_teacher(said) == KeptTeacher(said)
    distill_vlm(said, str(student), _recipe(response=1.0), tmp_path / "again", scored_scenes=2)
    ours, theirs = (load_vlm(folder / "student").state_dict() for folder in (tmp_path / "again", run))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert json.loads((run / "eval.json").read_text()) == json.loads((tmp_path / "again" / "eval.json").read_text())


def test_scores_are_those_of_the_saved_student(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """The vision trunk, which is away while the rest trains, must not score in training mode."""
    student, _, said = made
    found = distill_vlm(said, str(student), _recipe(response=1.0), tmp_path / "again", scored_scenes=6)
    saved = load_vlm(tmp_path / "again" / "student")
    assert evaluate_vlm(saved, PICTURES, scenes=6) == found["scores"]
    model, recipe = build_vlm(saved.config, saved.tokenizer.json, seed=0), _recipe(response=1.0)
    assert model.vision.training
    sources = sources_of(recipe, KeptTeacher(said), model, PICTURES, tmp_path / "work")
    train_student(model, recipe, sources, tmp_path / "run2", resume=False, say=lambda row: None)
    assert not any(part.training for part in model.modules())


def test_overwrite_deletes_nothing_but_a_run(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, run, said = made
    holiday = tmp_path / "mine" / "holiday.txt"
    holiday.parent.mkdir()
    holiday.write_text("photos")
    with pytest.raises(UsageError, match="not those of such a run"):
        distill_vlm(said, str(student), _recipe(), holiday.parent, overwrite=True)
    with pytest.raises(UnknownNameError):
        distill_vlm(tmp_path / "nobody", str(student), _recipe(), run, overwrite=True)
    with pytest.raises(UsageError, match="is in it and is read"):
        distill_vlm(said, str(run / "student"), _recipe(), run, overwrite=True)
    with pytest.raises(UsageError, match="cannot be both"):
        distill_vlm(said, str(student), _recipe(), run, overwrite=True, resume=True)
    with pytest.raises(UsageError, match="is a file"):
        distill_vlm(said, str(student), _recipe(), holiday, overwrite=True)
    assert holiday.read_text() == "photos"
    assert (run / "student" / "vlm.json").is_file()
    distill_vlm(said, str(student), _recipe(response=1.0), run, overwrite=True, scored_scenes=2)
    assert not (run / "kept" / TOKENIZER).exists()


def test_terms_are_of_the_right_tokens_where_visual_tokens_are_fewer(made: tuple[Path, Path, Path]) -> None:
    model = tiny()
    scenes = made_list(3)
    seen, rows = scenes.pixels(range(3), composer_of(PICTURES, SIDE, variants=2)), scenes.rows(range(3))
    model.reduce_tokens(Reduction(method="pyramid", keep=1))
    found = stage_terms(model, WeightsSection(), seen, rows, None)["answer"]
    expected = torch.nn.functional.cross_entropy(model(seen, rows), rows.targets)
    torch.testing.assert_close(found, expected)
    heard = teach(model, scenes, range(3), seen, 5, True)
    shares = model(seen, rows).log_softmax(-1)
    torch.testing.assert_close(heard.logs[:, 0].float(), shares.max(-1).values, atol=0.01, rtol=0.01)
    assert heard.relations is not None
    assert heard.relations.shape[1] == model.counts[-1]
    terms = {"visual": 1.0, "relation": 1.0}
    kept = teach(tiny(), scenes, range(3), seen, 5, True)
    with pytest.raises(UsageError, match="another place of the other"):
        stage_terms(model, WeightsSection(**terms), seen, rows, kept)


def test_an_answer_that_is_drawn_leaves_the_trunk_in_its_mode() -> None:
    model = tiny().train()
    model.vision.eval()
    scenes = made_list(2)
    seen = scenes.pixels(range(2), composer_of(PICTURES, SIDE, variants=2))
    sampled_rows(model, seen, [entry.talks for entry in scenes.entries], temperature=1.0, seed=0)
    assert model.training
    assert not model.vision.training


def test_what_only_the_teacher_could_say_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, _, said = made
    recipe = _recipe(response=1.0)
    judged = recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update={"on_policy": 0.5}),)})
    with pytest.raises(UsageError, match="set on_policy to 0"):
        distill_vlm(said, str(student), judged, tmp_path / "a")
    more = recipe.model_copy(update={"data": recipe.data.model_copy(update={"scenes": 13})})
    with pytest.raises(UsageError, match="of other scenes than this recipe draws"):
        distill_vlm(said, str(student), more, tmp_path / "b")
    (path,) = said.glob("said-*.json")
    left = dict(list(json.loads(path.read_text()).items())[1:])
    path.write_text(json.dumps(left))
    with pytest.raises(IntegrityError, match="leaves out 1 of"):
        distill_vlm(said, str(student), recipe, tmp_path / "c")
    with pytest.raises(UnknownNameError, match="generative teacher"):
        open_vlm_teacher(tmp_path / "nothing")


def test_the_shipped_answers_are_of_the_shipped_recipe() -> None:
    """Pictures, scenes, questions and tokenizer of this version are those that the teacher was asked about."""
    opened = open_vlm_teacher(SHIPPED)
    assert isinstance(opened, KeptTeacher)
    recipe, pictures = load_vlm_recipe(SHIPPED), picture_set("student", 0)
    known = labelled_numbers(pictures, recipe.data.captions)
    unlabelled = sorted(set(range(len(pictures))) - set(known))
    answered = opened.said(pictures, unlabelled)
    taught = taught_list(recipe.data, pictures, known, answered, opened.tokenizer_json)
    assert answers_folder(taught) == "answers-3544ee38d03a70b5"
    kept = kept_answers(opened.folder / answers_folder(taught), taught, top=recipe.teacher.top)
    first = kept.of([0, len(taught) - 1])
    assert len(kept.tensors["ids"]) == taught.tokens
    assert first.relations is None
    total = first.logs.exp().sum(dim=1)
    assert torch.allclose(total, torch.ones_like(total), atol=5e-3)
    # most of the time the teacher's best token is the answer that was drawn from what it said
    right = kept.tensors["ids"][:, 0].long() == torch.tensor([t for e in taught.entries for _, a in e.talks for t in a])
    assert right.float().mean() > 0.8


def test_relations_that_were_not_kept_are_missed(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    student, _, said = made
    (folder,) = (path.parent for path in said.glob("answers-*/answers.json"))
    for path in folder.glob("*.safetensors"):
        save_file({name: value for name, value in load_file(path).items() if name != "relations"}, path)
    files = {path.name: sha256_file(path) for path in folder.glob("*.safetensors")}
    (folder / "answers.json").write_text(json.dumps({"files": files}))
    with pytest.raises(UsageError, match="without relations"):
        distill_vlm(said, str(student), _recipe(relation=0.5), tmp_path / "a")
