"""Mistakes in a recipe's weights, schedules and `train` section, found before anything is opened."""

from __future__ import annotations

from collections.abc import Iterator

from pocketvlm.distill.optim import objective_weight
from pocketvlm.distill.recipe import ObjectiveSection, Recipe
from pocketvlm.edge.errors import UsageError


def train_problems(recipe: Recipe) -> Iterator[str]:
    """One sentence for each combination of keys that would do nothing, or not what it says."""
    yield from _weights(recipe)
    yield from _averaging(recipe)
    yield from _texts(recipe)
    train = recipe.train
    if train.warmup_steps > train.steps:
        yield (
            f"train.warmup_steps {train.warmup_steps} is more than train.steps {train.steps}, so the learning rate "
            "would never be reached; lower it"
        )
    for prefix, last in train.freeze_after.items():
        if last <= train.freeze.get(prefix, 0):
            yield (
                f"train.freeze holds {prefix!r} until step {train.freeze[prefix]} and train.freeze_after from step "
                f"{last}, so it would never be trained; freeze it later, or set its train.lr_scale to 0"
            )
    if train.balance is not None and len(recipe.objectives) < 2:
        yield "train.balance weighs objectives against each other and there is only one; leave it out"


def _texts(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.text_pretrain_steps and all(spec.batch != "texts" for spec in recipe.objectives):
        yield "train.text_pretrain_steps has no objective with batch: texts to train by; add one, or set it to 0"
    if isinstance(train.bank, int) and recipe.teacher is None:
        yield "train.bank asks for texts in the teacher's embedding and the recipe has no teacher; use 'student'"
    if recipe.data.parallel is not None and recipe.teacher is None:
        yield "data.parallel is taught by the teacher's embedding of the English and the recipe has none; add 'teacher'"
    if recipe.tokenizer.added_pieces and recipe.data.parallel is None:
        yield "tokenizer.added_pieces are learnt from data.parallel and the recipe has none; set it, or leave them out"
    if train.text_batch and recipe.data.words is None:
        yield "train.text_batch draws from data.words, which is not given; add data.words (name, size)"


def _weights(recipe: Recipe) -> Iterator[str]:
    steps = recipe.train.steps
    for place, spec in enumerate(recipe.objectives):
        here = f"objectives.{place} ({spec.name})"
        if spec.final_weight and spec.schedule not in ("linear", "cosine"):
            yield (
                f"{here} has final_weight {spec.final_weight:g} and schedule {spec.schedule!r}, which never goes "
                "there; use schedule linear or cosine, or leave final_weight out"
            )
        if spec.schedule_steps is not None and spec.schedule == "constant":
            yield (
                f"{here} has schedule_steps and schedule 'constant', which has no steps; name a schedule, or leave "
                "them out"
            )
    if not any(_ever(spec) for spec in recipe.objectives):
        yield "every objective has weight 0 all along, so nothing would be learned; give one a weight"
    texts = [spec for spec in recipe.objectives if spec.batch == "texts"]
    if recipe.train.text_pretrain_steps and texts and not any(objective_weight(spec, 0, steps) for spec in texts):
        yield (
            "train.text_pretrain_steps come before the main phase, where every objective with batch: texts has weight "
            "0, so nothing would be learned in them; let one of these start above 0"
        )


def _ever(spec: ObjectiveSection) -> bool:
    return spec.weight > 0 or (spec.schedule in ("linear", "cosine") and spec.final_weight > 0)


def _averaging(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if train.switch_every and not train.ema_decay:
        yield (
            "train.switch_every puts the moving average into the student and train.ema_decay is 0, so there is none; "
            "set it, or set train.switch_every to 0"
        )
    if train.switch_every > train.steps:
        yield (
            f"train.switch_every is {train.switch_every} but only {train.steps} steps are trained, so nothing would "
            "ever be switched; lower it, or set it to 0"
        )
    if train.interpolate < 1 and _starts_at_random(recipe):
        yield (
            f"train.interpolate is {train.interpolate:g} but student {recipe.student.name!r} starts at random, so the "
            "result would be mixed with noise; start from student.init or pretrained weights, or leave it at 1"
        )


def _starts_at_random(recipe: Recipe) -> bool:
    from pocketvlm.students.config import load_config

    if recipe.student.init is not None:
        return False
    try:
        config = load_config(recipe.student.name, recipe.student.overrides)
    except UsageError:
        return False  # reported where the student is checked
    return config.image.weights == "none" and config.text.weights == "none"
