"""Mistakes in a recipe's student, weights, schedules and `train` section, found before anything is opened."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pocketvlm.distill.objectives.matryoshka_2d import listed_pairs
from pocketvlm.distill.optim import objective_weight
from pocketvlm.distill.recipe import AS_INIT, ObjectiveSection, Recipe, StudentSection
from pocketvlm.edge.errors import UsageError


def start_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with where the student starts."""
    section, teacher = recipe.student, recipe.teacher
    nested = [listed_pairs(spec.options) for spec in recipe.objectives if spec.name == "matryoshka-2d"]
    with suppress(UsageError):  # said of the student itself
        _, exits = _promised(section)
        if untrained := [list(pair) for pair in exits if pair not in {one for pairs in nested for one in pairs}]:
            yield (
                f"the student promises the smaller students {untrained} (exits) and no matryoshka-2d objective trains "
                "them, so a device would search with untrained ones; list them in its pairs, or leave them out"
            )
    if section.fit_text_projection is not None and teacher is None:
        yield "student.fit_text_projection regresses to a teacher's embeddings and the recipe has none; leave it out"
    if section.fit_text_projection is not None and recipe.data.words is None:
        yield "student.fit_text_projection regresses over generic texts; add data.words (name, size), or leave it out"
    if section.fit_views > recipe.views.count:
        yield f"student.fit_views is {section.fit_views} but views.count is {recipe.views.count}; lower it"
    if teacher is not None and teacher.axes == "principal" and len(teacher.specs) > 1:
        yield (
            f"teacher.axes is 'principal' and there are {len(teacher.specs)} teachers, whose spaces have axes of their "
            "own; name one teacher, or leave axes out"
        )
    fitted = section.fit_projection is not None and section.fit_text_projection is not None
    if teacher is not None and teacher.axes == "principal" and section.init and not fitted:
        yield (
            "teacher.axes is 'principal' and student.init brings projections to other coordinates, so the start would "
            "point anywhere; set student.fit_projection and fit_text_projection, or leave one of the two out"
        )


def train_problems(recipe: Recipe) -> Iterator[str]:
    """One sentence for each combination of keys that would do nothing, or not what it says."""
    yield from _policy(recipe)
    yield from _weights(recipe)
    yield from _averaging(recipe)
    yield from _texts(recipe)
    yield from _teachers(recipe)
    yield from _task(recipe)
    yield from _compiled(recipe)
    train = recipe.train
    if train.warmup_steps > train.steps:
        yield (
            f"train.warmup_steps {train.warmup_steps} is more than train.steps {train.steps}, so the learning rate "
            "would never be reached; lower it"
        )
    if train.sync_batchnorm and train.micro_batch is not None:
        yield (
            "train.sync_batchnorm and train.micro_batch are both set, and ranks with unequal numbers of parts would "
            "wait for each other for ever; choose one (train.checkpoint_activations saves memory too)"
        )
    for prefix, last in train.freeze_after.items():
        if last <= train.freeze.get(prefix, 0):
            yield (
                f"train.freeze holds {prefix!r} until step {train.freeze[prefix]} and train.freeze_after from step "
                f"{last}, so it would never be trained; freeze it later, or set its train.lr_scale to 0"
            )
    if train.balance is not None and len(recipe.objectives) < 2:
        yield "train.balance weighs objectives against each other and there is only one; leave it out"


def _compiled(recipe: Recipe) -> Iterator[str]:
    from pocketvlm.distill.objectives import objective_taps

    if not recipe.train.compile:
        return
    if recipe.train.checkpoint_activations:
        yield (
            "train.compile and train.checkpoint_activations are both set, and what runs again is kept out of compiled "
            "towers, so one would undo the other; choose one (train.micro_batch saves memory too)"
        )
    for place, spec in enumerate(recipe.objectives):
        with suppress(UsageError):  # said of the objective itself
            inner = objective_taps(spec.name, spec.options).keys() & {"student_tap", "text_tap"}
            if inner or spec.name in ("matryoshka-2d", "masked-language", "region-self"):
                yield (
                    f"train.compile is set and objectives.{place} ({spec.name}) reads inside the towers by hooks, "
                    "which compiled towers do not call; leave one of them out"
                )


def student_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the student that a recipe names, as far as its files are there."""
    from pocketvlm.distill.objectives.matryoshka import listed_dims

    yield from _saved_student(recipe)
    trained = {m for spec in recipe.objectives if spec.name == "matryoshka" for m in listed_dims(spec.options)}
    try:
        promised, _ = _promised(recipe.student)
        if untrained := sorted(set(promised) - trained):
            yield (
                f"the student promises embeddings cut to {untrained} (dims) and no matryoshka objective trains these "
                "prefixes, so a device would search with untrained ones; list them in its dims, or leave them out"
            )
    except UsageError as error:
        yield str(error).rstrip(".")


def _promised(section: StudentSection) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """`dims` and `exits` of the student; a saved one that is not there (yet) promises nothing, and is missed when it is
    opened."""
    from pocketvlm.students.config import load_config
    from pocketvlm.students.io import saved_config

    if section.name != AS_INIT:
        config = load_config(section.name, section.overrides)
    elif section.init and Path(section.init).is_dir():
        config = saved_config(section.init)
    else:
        return (), ()
    return config.dims, config.exits


def _saved_student(recipe: Recipe) -> Iterator[str]:
    """What is wrong with `student.name: init`."""
    section = recipe.student
    if section.name != AS_INIT:
        return
    if section.init is None:
        yield "student.name is 'init' and student.init names no folder, so there is nothing to train; set student.init"
    given = [key for key in ("overrides", "embed_dim", "init_parts") if getattr(section, key)]
    if given:
        yield (
            f"student.name is 'init' and {', '.join(given)} would change the saved student, whose weights would then "
            "not fit; leave them out, or name the student that they change"
        )


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


def _policy(recipe: Recipe) -> Iterator[str]:
    from pocketvlm.data.augment import AugmentPolicy

    try:
        AugmentPolicy.from_dict(dict(recipe.views.policy))
    except (UsageError, TypeError, ValueError) as error:
        yield f"views.policy: {error}".rstrip(".")


def _teachers(recipe: Recipe) -> Iterator[str]:
    specs = () if recipe.teacher is None else recipe.teacher.specs
    if recipe.teacher is not None and recipe.teacher.logits is not None:
        yield from _logits(recipe, len(specs))
    if recipe.teacher is not None and not specs:
        yield "teacher.spec is an empty list, so there is nobody to learn from; name a teacher, or set teacher to null"
    for spec in sorted({spec for spec in specs if specs.count(spec) > 1}):
        yield f"teacher.spec names {spec!r} twice, whose opinion would merely count double; name it once"


def _logits(recipe: Recipe, teachers: int) -> Iterator[str]:
    from pocketvlm.distill.objectives import objective_needs

    asked = []
    for spec in recipe.objectives:
        with suppress(UsageError):  # said of the objective itself
            asked.append(objective_needs(spec.name, spec.options).logits)
    if not any(asked):
        yield (
            "teacher.logits is set and no objective reads the teacher's top logits; add {name: bank, options: {target: "
            "top-logits}}, or leave it out"
        )
    if teachers > 1:
        yield (
            f"teacher.logits keeps how one teacher scores pictures and teacher.spec names {teachers}, which would have "
            "a bank each; name one teacher, or leave teacher.logits out"
        )
    if isinstance(recipe.train.bank, int):
        yield (
            f"train.bank is {recipe.train.bank} and teacher.logits names a bank too, of which one would be ignored; "
            "leave train.bank out"
        )


def _task(recipe: Recipe) -> Iterator[str]:
    task = recipe.task
    if task is None:
        return
    if all(spec.name != "dho" for spec in recipe.objectives):
        yield "the recipe has a task and no objective 'dho' to train its heads; add it, or leave 'task' out"
    if len(task.classes) == 1 or len(set(task.classes)) < len(task.classes):
        yield (
            f"task.classes is {list(task.classes)}, and a classifier needs at least two classes, each named once; "
            "correct the list, or leave it out for the labels of the data"
        )
    if task.mix == "logits" and task.temperature not in (None, 1):
        yield (
            f"task.temperature is {task.temperature:g} but task.mix: logits mixes at 1, where one linear layer "
            "remains; leave the temperature out, or mix probabilities"
        )


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
        return False  # so student.name is no "init" below
    try:
        config = load_config(recipe.student.name, recipe.student.overrides)
    except UsageError:
        return False  # reported where the student is checked
    return config.image.weights == "none" and config.text.weights == "none"


def stream_problems(recipe: Recipe) -> Iterator[str]:
    """What a recipe asks for that a stream cannot give, before anything is opened."""
    if recipe.data.stream is None:
        if not recipe.data.train:
            yield "data has neither train nor stream, so there is nothing to learn from; name a data set, or shards"
        return
    if recipe.data.train:
        yield "data has train and stream, of which one would be ignored; keep one"
    train, student, teacher = recipe.train, recipe.student, recipe.teacher
    asked = {
        "task": recipe.task is not None,
        "data.parallel": recipe.data.parallel is not None,
        "train.captioned_fraction": train.captioned_fraction is not None,
        "train.cut_after_block": train.cut_after_block is not None,
        "student.fit_projection": student.fit_projection is not None,
        "teacher.axes: principal": teacher is not None and teacher.axes == "principal",
    }
    for key, wanted in asked.items():
        if wanted:
            yield f"{key} needs every sample before the first step and data.stream has no end; leave it out"
