"""Recipes: every mistake at once, suggestions, typed overrides, and what the parts must know of each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_toys import toy_recipe

from pocketvlm.distill.overrides import as_typed
from pocketvlm.distill.recipe import Recipe, list_recipes, load_recipe
from pocketvlm.edge.errors import UnknownNameError, UsageError


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return toy_recipe(tmp_path / "world.jsonl", tmp_path / "cache")


@pytest.mark.parametrize("name", [row["name"] for row in list_recipes()])
def test_every_shipped_recipe_is_valid_and_survives_its_own_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path).digest() == recipe.digest()


def test_an_unknown_recipe_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown recipe 'quik'; did you mean 'quick'"):
        load_recipe("quik")


def test_all_mistakes_are_listed_at_once_with_suggestions(raw: dict[str, Any]) -> None:
    raw["train"]["stepz"] = 5
    raw["train"]["batch_size"] = "many"
    raw["views"] = {"count": 0}
    raw["optimiser"] = {}
    del raw["student"]["name"]
    with pytest.raises(UsageError) as caught:
        load_recipe(raw, ["train.betas=3", "nonsense"])
    text = str(caught.value)
    assert "7 mistakes, nothing was run" in text
    assert "unknown recipe key in 'train' 'stepz'; did you mean 'steps'" in text
    assert "'train.batch_size' is 'many', but input should be a valid integer" in text
    assert "'views.count' is 0, but input should be greater than or equal to 1" in text
    assert "unknown recipe key 'optimiser'" in text
    assert "'student.name' is missing" in text
    assert "'train.betas'" in text
    assert "override 'nonsense' is not of the form" in text


def test_an_unknown_key_inside_an_objective_or_a_policy_is_named(raw: dict[str, Any]) -> None:
    raw["objectives"][0]["wieght"] = 2
    with pytest.raises(UsageError, match=r"recipe key in 'objectives\.0' 'wieght'; did you mean 'weight'"):
        load_recipe(raw)
    del raw["objectives"][0]["wieght"]
    raw["objectives"][0]["options"]["distanse"] = "l2"
    raw["views"]["policy"] = {"rotat": 3}
    raw["student"]["overrides"] = {"image": {"siez": 32}}
    with pytest.raises(UsageError) as caught:
        load_recipe(raw)
    assert "3 mistakes" in str(caught.value)
    assert "'distanse'; did you mean 'distance'" in str(caught.value)
    assert "'rotat'; did you mean 'rotate'" in str(caught.value)
    assert "did you mean 'image.size'" in str(caught.value)


def test_a_key_that_is_given_again_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    expanded = ("train.steps=2", "data.stream.shards=s-000.tar", "data.stream.shards=s-001.tar")
    assert as_typed(expanded) == expanded
    told = capsys.readouterr().err
    assert told.startswith("data.stream.shards is given 2 times and the last counts ('data.stream.shards=s-001.tar')")
    assert "train.steps" not in told


def test_overrides_are_typed_and_reach_lists(raw: dict[str, Any]) -> None:
    changes = [
        "train.steps=100",
        "train.lr=3e-4",
        "objectives.crd.weight=2",
        "objectives.0.options.distance=l2",
        "objectives.bank.options.temperature=5e-2",
        "teacher.batch_size=7",
        "train.lr_scale={image_tower: 0.1}",
        "student.init=null",
    ]
    recipe = load_recipe(raw, changes)
    assert recipe.train.steps == 100
    assert recipe.train.lr == pytest.approx(3e-4)
    assert recipe.objectives[2].weight == 2
    assert recipe.objectives[0].options == {"distance": "l2"}
    # YAML 1.1 would have left this one a string
    assert recipe.objectives[3].options == {"temperature": 0.05}
    assert recipe.train.lr_scale == {"image_tower": 0.1}
    assert load_recipe(raw).digest() != recipe.digest()
    with pytest.raises(UsageError, match="'feature' more than once; use a number from 0 to 4"):
        load_recipe(raw, ["objectives.feature.weight=1"])
    with pytest.raises(UsageError, match=r"enters 'train\.steps', which has no keys"):
        load_recipe(raw, ["train.steps.more=1"])


def test_a_recipe_cannot_be_changed_by_accident(raw: dict[str, Any]) -> None:
    recipe = load_recipe(raw)
    with pytest.raises(Exception, match="frozen"):
        recipe.train.steps = 5  # type: ignore[misc]
    assert recipe.updated(["train.steps=5"]).train.steps == 5


def test_a_recipe_without_a_teacher_is_legal_but_not_with_objectives_that_need_one(raw: dict[str, Any]) -> None:
    raw["teacher"] = None
    with pytest.raises(UsageError, match=r"objectives\.2 \(crd\) learns from a teacher and the recipe has none"):
        load_recipe(raw)
    raw["objectives"] = [{"name": "clip"}]
    assert load_recipe(raw).teacher is None


def test_a_batch_of_one_is_legal_for_objectives_that_do_not_compare_rows(raw: dict[str, Any]) -> None:
    raw["objectives"] = [{"name": "vl2v"}, {"name": "rafa"}]
    raw["objectives"] += [{"name": "matryoshka", "options": {"inner": {"name": "vl2v"}}}]
    assert load_recipe(raw, ["train.batch_size=1"]).train.batch_size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["train.batch_size=1"], "contrasts each pair with the others of its batch"),
        (["objectives=[{name: matryoshka}]", "train.batch_size=1"], "(matryoshka) contrasts each pair"),
        (["train.text_batch=0"], "needs a bank of texts, and train.text_batch is 0"),
        (["objectives.crd.batch=texts"], "needs picture-caption pairs, which a text-only batch has not"),
        (["data.words=null"], "train.text_batch draws from data.words, which is not given"),
        (["train.warmup_steps=13"], "the learning rate would never be reached"),
        (["objectives.crd.name=crdd"], "unknown objective 'crdd'; did you mean 'crd'"),
        (["student.name=mnv4-005"], "unknown student 'mnv4-005'; did you mean 'mnv4-"),
        (["objectives.crd.schedule_steps=99"], "schedule_steps 99 but only 8 steps are trained"),
        (["objectives=[]"], "at least 1 item"),
        (["objectives=[{name: clip, weight: 0}]"], "every objective has weight 0"),
        (["objectives=[{name: clip, weight: 0, schedule: warmup}]"], "every objective has weight 0"),
        (["objectives=[{name: clip, weight: 0, schedule: cosine}]"], "every objective has weight 0"),
        (["objectives.crd.weight=.nan"], "'objectives.2.weight' is nan, but input should be"),
        (["objectives.crd.weight=.inf"], "'objectives.2.weight' is inf, but input should be a finite number"),
        (["train.lr=.inf"], "'train.lr' is inf, but input should be a finite number"),
        (["objectives.crd.options.temperature=0"], "(crd): objective option 'temperature' is 0 but must be"),
        (["objectives.crd.options.temperature=-1"], "(crd): objective option 'temperature' is -1 but must be"),
        (["objectives.crd.final_weight=2"], "final_weight 2 and schedule 'constant', which never goes there"),
        (["objectives.crd.schedule_steps=4"], "schedule_steps and schedule 'constant', which has no steps"),
        (
            ["objectives.4.schedule=warmup", "train.text_pretrain_steps=3"],
            "every objective with batch: texts has weight 0, so nothing would be learned in them",
        ),
        (["train.switch_every=4", "train.ema_decay=0"], "train.switch_every puts the moving average into the student"),
        (["train.switch_every=9"], "train.switch_every is 9 but only 8 steps are trained"),
        (["train.interpolate=0.5"], "'mnv4-035' starts at random, so the result would be mixed with noise"),
        (["train.interpolate=0"], "'train.interpolate' is 0, but input should be greater than 0"),
        (["objectives=[{name: crd}]", "train.balance=gradient-norm"], "against each other and there is only one"),
        (["train.balance=gradnorm"], "'train.balance' is 'gradnorm', but input should be 'gradient-norm'"),
        (["train.freeze={text_tower: 4}", "train.freeze_after={text_tower: 4}"], "so it would never be trained"),
        (["objectives=[{name: clip}]", "train.text_pretrain_steps=3"], "no objective with batch: texts to train by"),
        (["objectives=[{name: token-gram, batch: texts}]"], "reads inner activations of pictures"),
        (["objectives=[{name: token-gram, options: {teacher_tap: tokns}}]"], "did you mean 'tokens'"),
        (["student.overrides.dims=[4, 8]"], "promises embeddings cut to [4, 8] (dims) and no matryoshka objective"),
        (["objectives=[{name: matryoshka, options: {inner: {name: clip}}, batch: texts}]"], "needs picture-caption"),
        (["objectives=[{name: matryoshka, options: {inner: {name: bank}}}]", "train.text_batch=0"], "needs a bank"),
        (["objectives=[{name: matryoshka, options: {inner: {name: crdd}}}]"], "did you mean 'crd'"),
        (["objectives=[{name: matryoshka, options: {dims: [96, 48]}}]"], "increasing whole numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(raw: dict[str, Any], change: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(raw, change)
    assert message in str(caught.value)


def test_what_a_wrapper_needs_is_what_it_wraps(raw: dict[str, Any]) -> None:
    """crd, the default, needs captions and a teacher; gram and clip each lack one of these needs."""
    wrapped = {"name": "matryoshka", "options": {"inner": {"name": "gram"}, "dims": [96, 384]}}
    raw["student"]["overrides"] = {**raw["student"]["overrides"], "dims": [96]}
    raw["objectives"] = [wrapped, {**wrapped, "batch": "texts"}]
    assert load_recipe(raw).objectives[0].options["dims"] == [96, 384]
    raw["objectives"][0]["options"] = {"inner": {"name": "clip"}, "dims": [96]}
    raw["objectives"], raw["teacher"] = raw["objectives"][:1], None
    assert load_recipe(raw).teacher is None


def test_a_file_that_is_no_recipe_says_so(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("train: [1, 2\nstudent: x")
    with pytest.raises(UsageError, match="is not valid YAML at line 2"):
        load_recipe(path)
    path.write_text("just text")
    with pytest.raises(UsageError, match="holds str, not the sections of a recipe"):
        load_recipe(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UsageError, match="is not valid YAML"):
        load_recipe(path)


def test_the_digest_ignores_how_a_recipe_was_written(raw: dict[str, Any]) -> None:
    shuffled = dict(reversed(list(raw.items())))
    spelled = yaml.safe_load(load_recipe(raw).to_yaml())
    assert load_recipe(raw).digest() == load_recipe(shuffled).digest() == Recipe.model_validate(spelled).digest()
