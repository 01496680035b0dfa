"""Several teachers, and teachers of texts alone: what is kept, what each objective sees, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import ToyOtherTeacher, ToyTeacher, ToyTextTeacher, toy_recipe

from pocketvlm.data import open_data
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.ensemble import load_ensemble

Make = Callable[..., Recipe]
SILENT = Reporter(False)
TWO, THREE = ["toy", "toy-other"], ["toy", "toy-text", "toy-other"]
CRD = [{"name": "multi-teacher"}, {"name": "crd", "teacher": 0}, {"name": "crd", "teacher": 1}]


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str, specs: Any = TWO, **sections: Any) -> Recipe:
        given: dict[str, Any] = {"teacher": {"spec": specs, "cache": str(teacher_cache)}} | sections
        return load_recipe(toy_recipe(world, teacher_cache, **given), overrides)

    return make


def trainer_of(recipe: Recipe) -> Trainer:
    trainer = Trainer(prepare(recipe, SILENT), torch.device("cpu"))
    trainer.start()
    return trainer


def seen(trainer: Trainer, batch: str) -> list[Outputs]:
    """What each objective is given of the teachers in the first step."""
    outputs = trainer.feed.forward(trainer.student.eval(), trainer.feed.make(0))
    theirs = outputs[batch][1]
    assert theirs is not None
    return [share(theirs) for share in trainer.shares if share is not None]


# ------------------------------------------------------------------------------------------------ what is kept and seen


def test_every_teacher_keeps_its_own_cache(recipe: Make, tmp_path: Path) -> None:
    """The one that a run of its own would find."""
    (root := tmp_path / "cache").mkdir()
    prepare(recipe(f"teacher.cache={root}", specs="toy"), SILENT)
    alone = {path.name for path in root.iterdir()}
    prepare(recipe(f"teacher.cache={root}", "train.bank=student", objectives=CRD), SILENT)
    found = {path.name for path in root.iterdir()}
    assert alone < found
    new = sorted(re.sub(r"-[0-9a-f]{16}(\.npz)?$", "", name) for name in found - alone)
    assert new == ["toy-other-eval", "toy-other-texts", "toy-other-views"]


def test_objectives_see_their_teacher_or_the_mean_of_the_cosines(recipe: Make) -> None:
    """With a teacher of texts between two that see: it is no part of what is learned where none is named."""
    objectives = [{"name": "crd"}, *({"name": "crd", "teacher": place} for place in (0, 2))]
    objectives += [{"name": "gram", "options": {"of": "text"}, "teacher": 1}]
    trainer = trainer_of(recipe(specs=THREE, objectives=objectives))
    both, first, last, words = seen(trainer, "pairs")
    plan, prepared = trainer.order.plan(0), trainer.prepared
    captions = [text for text in plan.captions if text is not None]
    cache: Any = prepared.images
    uids = [prepared.samples[row].uid for row in plan.rows]
    for teacher, place, found in ((ToyTeacher(), 0, first), (ToyOtherTeacher(), 2, last)):
        assert torch.equal(found.image, cache.parts[place].image(uids, plan.views))
        assert found.text is not None
        torch.testing.assert_close(found.text, teacher.encode_texts(captions).embedding)
        assert float(found.logit_scale) == teacher.logit_scale
    assert words.text is not None
    torch.testing.assert_close(words.text, ToyTextTeacher().encode_texts(captions).embedding)
    mean = (first.image @ first.text.T + last.image @ last.text.T) / 2  # type: ignore[union-attr]
    assert both.text is not None
    torch.testing.assert_close(both.image @ both.text.T, mean)
    torch.testing.assert_close(both.image.norm(dim=1), torch.ones(8))
    assert float(both.logit_scale) == 12.5
    # pooled features are there only where every one of these teachers has them
    assert first.image_features is not None
    assert both.image_features is last.image_features is None
    assert torch.equal(first.image_features, cache.parts[0].features(uids, plan.views))


def test_texts_take_the_place_of_pictures(recipe: Make) -> None:
    objectives = [{"name": "gram", "batch": "texts", "teacher": place} for place in (0, 1, 2)]
    trainer = trainer_of(recipe(specs=THREE, objectives=objectives))
    texts = [trainer.prepared.texts[row] for row in trainer.order.plan(0).words]
    for teacher, found in zip((ToyTeacher(), ToyTextTeacher(), ToyOtherTeacher()), seen(trainer, "texts")):
        torch.testing.assert_close(found.image, teacher.encode_texts(texts).embedding)


def test_targets_are_made_for_each_teacher_apart(recipe: Make) -> None:
    changes = ("teacher.smooth=0.5", "teacher.caption_mix=1")
    both = trainer_of(recipe(*changes, objectives=CRD)).feed.make(0).teacher_image
    alone = [trainer_of(recipe(*changes, specs=spec, objectives=CRD[:1])).feed.make(0).teacher_image for spec in TWO]
    assert both is not None
    torch.testing.assert_close(both, torch.cat(alone, dim=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", ["null", "24"])
def test_the_student_of_several_is_as_wide_as_it_likes(recipe: Make, width: str) -> None:
    """One student embedding against every teacher, as in MobileCLIP: the mean of what each of them would ask."""
    trainer = trainer_of(recipe(f"student.embed_dim={width}", objectives=CRD))
    assert trainer.student.embed_dim == (16 if width == "null" else 24)
    assert trainer.student.space_id not in {member.space_id for member in trainer.prepared.teacher.members}  # type: ignore[union-attr]
    row = trainer.one_step(trainer.feed.make(0))
    first, second = row["loss/crd"], row["loss/crd#2"]
    assert row["loss/multi-teacher"] == pytest.approx((first + second) / 2, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-2)


def test_a_run_with_three_teachers_learns_resumes_and_is_scored(recipe: Make, tmp_path: Path) -> None:
    objectives = [
        {"name": "multi-teacher"},
        {"name": "feature", "options": {"distance": "cosine"}, "teacher": 2},
        {"name": "bank"},
        {"name": "order", "batch": "texts", "teacher": 1},
        {"name": "momentum"},
    ]
    wanted = recipe(specs=THREE, objectives=objectives)
    whole = distill_run(wanted, tmp_path / "run", progress=False)
    assert whole.evaluation is not None
    assert whole.evaluation.values["teacher"]["image_to_text"]["R@5"] > 0.5
    assert "toy text teacher" in {what for what, _, _ in whole.licences}
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    assert distill_run(wanted, tmp_path / "run", resume=True, progress=False).final_loss == whole.final_loss


def test_the_teachers_are_scored_by_the_mean_of_their_cosines(recipe: Make) -> None:
    prepared = prepare(recipe(specs=THREE, objectives=CRD[:1]), SILENT)
    answers, alone = prepared.teacher_answers, [prepare(recipe(specs=spec), SILENT).teacher_answers for spec in TWO]
    assert answers is not None
    mean = sum(one.images @ one.texts.T for one in alone) / 2  # type: ignore[union-attr]
    np.testing.assert_allclose(answers.images @ answers.texts.T, mean, atol=1e-6)
    assert answers.logit_scale == 12.5
    assert prepared.digest != prepare(recipe(specs=["toy", "toy-other"], objectives=CRD), SILENT).digest


def test_another_objective_over_shared_teachers(recipe: Make) -> None:
    shared = prepare(recipe(objectives=CRD), SILENT)
    other = shared.with_recipe(recipe(objectives=[{"name": "crd", "teacher": 1}]))
    made = Trainer(other, torch.device("cpu"))
    assert made.one_step(made.feed.make(0))["loss/crd"] > 0
    with pytest.raises(UsageError, match=r"other inputs \(teacher\)"):
        shared.with_recipe(recipe(specs=["toy-other", "toy"], objectives=CRD))
    with pytest.raises(UsageError, match=r"train\.bank as a number puts the teachers' embeddings, 26 wide"):
        shared.with_recipe(recipe("train.bank=20", objectives=[*CRD, {"name": "bank"}]))


# ------------------------------------------------------------------------------------------------ texts alone

OF_TEXT = [
    {"name": "gram", "options": {"of": "text", "variant": "softmax"}},
    {"name": "rkd", "options": {"of": ["text"]}},
    {"name": "order", "options": {"of": "text"}},
    {"name": "correlation-congruence", "options": {"of": "text"}},
    {"name": "feature", "options": {"image": 0}},
    {"name": "matryoshka", "options": {"inner": {"name": "gram", "options": {"of": "text"}}, "dims": [8, 24]}},
    {"name": "gram", "batch": "texts"},
    {"name": "feature", "batch": "texts", "options": {"text": 0}},
]


def test_a_teacher_of_texts_alone_teaches_texts(recipe: Make, tmp_path: Path) -> None:
    wanted = recipe("student.embed_dim=24", specs="toy-text", objectives=OF_TEXT)
    result = distill_run(wanted, tmp_path / "run", progress=False)
    assert result.evaluation is not None
    assert "teacher" not in result.evaluation.values
    trainer = trainer_of(wanted)
    row = trainer.one_step(trainer.feed.make(0))
    assert all(value > 0 for key, value in row.items() if key.startswith("loss/"))
    for name, parameter in trainer.student.named_parameters():
        if name.startswith("image_tower"):
            assert parameter.grad is None or not parameter.grad.any(), f"{name} was moved by a teacher of texts"


@pytest.mark.parametrize(
    "objective",
    [{"name": "crd"}, {"name": "gram"}, {"name": "bank"}, {"name": "rkd", "options": {"of": ["image", "text"]}},
     {"name": "order", "options": {"of": ["text", "image-to-text"]}}, {"name": "feature"},
     {"name": "matryoshka", "options": {"inner": {"name": "crd"}, "dims": [8, 16]}}],
)  # fmt: skip
@pytest.mark.parametrize("specs", ["toy-text", THREE])
def test_pictures_of_a_teacher_of_texts_are_refused_before_it_works(
    recipe: Make, tmp_path: Path, objective: dict[str, Any], specs: Any
) -> None:
    place = {} if isinstance(specs, str) else {"teacher": 1}
    wanted = recipe(f"teacher.cache={tmp_path / 'none'}", specs=specs, objectives=[objective | place])
    with pytest.raises(UsageError, match=r"learns from a teacher's pictures and teacher 'toy-text' reads texts only"):
        prepare(wanted, SILENT)
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("specs", "objectives", "changes", "words"),
    [
        ([], CRD[:1], (), "teacher.spec is an empty list"),
        (["toy", "toy"], CRD, (), "teacher.spec names 'toy' twice"),
        ("toy", CRD, (), r"objectives.2 \(crd\) names teacher 1 and the recipe has 1, counted from 0"),
        (TWO, [{"name": "clip", "teacher": 0}], (), "learns from no teacher and names teacher 0"),
        (5, CRD, (), "'teacher.spec' is 5"),
    ],
)
def test_recipes_that_name_teachers_wrongly(
    recipe: Make, specs: Any, objectives: Any, changes: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        recipe(*changes, specs=specs, objectives=objectives)


TOKENS = {"name": "hint", "options": {"student_tap": "tokens", "teacher_tap": "tokens"}}


@pytest.mark.parametrize(
    ("specs", "objectives", "changes", "words"),
    [
        (["toy", "any"], CRD, (), "teacher 'toy' was given twice"),
        (["toy-tokens", "toy-other"], [TOKENS], (), "token maps were asked of 2 teachers at once"),
        (TWO, CRD, ("student.fit_projection=0.1",), r"student\.fit_projection puts .* 26 wide .* are 16 wide"),
        (TWO, CRD, ("student.fit_text_projection=0.1",), r"fit_text_projection puts .* set student\.embed_dim to 26"),
        ("toy-text", OF_TEXT[:1], ("student.fit_projection=0.1",), "reads texts only, so there are none"),
        (["toy", "toy-text"], CRD[:2], ("student.embed_dim=24",), "student.embed_dim is 24 but teacher 'toy' embeds"),
        (TWO, [{"name": "hint"}], (), "which one of the two models does not provide"),
    ],
)
def test_what_these_teachers_cannot_give(recipe: Make, specs: Any, objectives: Any, changes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        trainer_of(recipe(*changes, specs=specs, objectives=objectives))


def test_starts_from_a_teacher_beside_one_of_texts(recipe: Make) -> None:
    """The joint teachers are the one that sees, so all that it could do alone it can do here, to the same numbers."""
    changes = ("student.fit_projection=0.1", "student.fit_text_projection=0.1", "train.bank=20")
    objectives = [{"name": "bank"}, {"name": "feature"}]
    alone, beside = (trainer_of(recipe(*changes, specs=s, objectives=objectives)) for s in ("toy", ["toy-text", "toy"]))
    rows = [made.one_step(made.feed.make(0)) for made in (alone, beside)]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert beside.student.space_id == alone.student.space_id == ToyTeacher.space_id


def test_token_maps_of_a_teacher_beside_one_of_texts(recipe: Make) -> None:
    trainer = trainer_of(recipe(specs=["toy-text", "toy-tokens"], objectives=[TOKENS, {"name": "hint", "teacher": 1}]))
    row = trainer.one_step(trainer.feed.make(0))
    assert row["loss/hint"] > 0
    assert row["loss/hint#1"] > 0
    assert seen(trainer, "pairs")[0].taps["tokens"].shape == (8, 16, 12)


def test_embeddings_on_disk_without_texts_are_refused_by_name(recipe: Make, world: Path, tmp_path: Path) -> None:
    from pocketvlm.teachers.precomputed import import_embeddings

    uids = [sample.uid for sample in open_data(f"{world}?check=none").samples]
    rows = np.random.default_rng(0).normal(size=(len(uids), 5)).astype(np.float32)
    import_embeddings(tmp_path / "emb", image=rows, uids=uids, name="numbers")
    wanted = recipe("views.count=1", specs=["toy", f"embeddings:{tmp_path / 'emb'}"], objectives=CRD)
    with pytest.raises(UsageError, match="are not among the embeddings on disk of 'numbers'"):
        prepare(wanted, SILENT)


def test_an_ensemble_of_nobody_is_refused(toy_teacher: None) -> None:
    with pytest.raises(UsageError, match="an empty list of teachers was given"):
        load_ensemble([])
    assert load_ensemble(TWO)[1].dim == 26
