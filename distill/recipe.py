"""The recipe: one frozen, typed description of a run, read from YAML and checked as a whole.

`load_recipe` reports every mistake of a file in one error, so that a recipe is corrected once. Keys that do
not exist are refused, with the nearest existing key; values are typed, also those given on the command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from pocketvlm.distill.overrides import Loader, apply_override
from pocketvlm.distill.sections import (
    Count,
    CountOrZero,
    Fraction,
    LogitsSection,
    NonNegative,
    ParallelSection,
    Positive,
    Section,
    StreamSection,
    TaskSection,
    TokenizerSection,
    WordsSection,
)
from pocketvlm.edge.errors import UsageError, unknown_name


class DataSection(Section):
    """train / eval: data specs (`data.open_data`). stream: tar shards, in place of `train`, which is empty then.
    words: generic texts, or null. parallel: other languages, or null.

    on_bad_sample: "skip" counts and reports unreadable samples, "refuse" stops at the first.
    caption_weights: source of a caption ("original", "rewrite") -> factor on its weight among a picture's captions, of
    which each step draws one; 0 leaves these out of training.
    source_px: pictures are kept in memory with their shorter side at most this long (0: never reduced).
    ram_gb: memory for decoded pictures and finished views; past it they are made again on every use.
    """

    train: str = ""
    stream: StreamSection | None = None
    eval: str | None = None
    words: WordsSection | None = None
    caption_weights: dict[str, NonNegative] = Field(default_factory=dict)
    parallel: ParallelSection | None = None
    on_bad_sample: Literal["skip", "refuse"] = "skip"
    source_px: CountOrZero = 256
    ram_gb: NonNegative = 2.0


class ViewsSection(Section):
    """Augmented views, the same for teacher and student and for every arm of a comparison.

    count: views per picture; view 0 is not augmented. seed: of the view parameters, apart from `train.seed`,
    so that runs with different seeds share one teacher cache. policy: fields of `data.augment.AugmentPolicy`.
    """

    count: Count = 8
    seed: int = 0
    policy: dict[str, Any] = Field(default_factory=dict)


class TeacherSection(Section):
    """spec: of `teachers.load_teacher`, or a list of several, each with its own cache; an objective learns from those
    with an image tower side by side, or from the one that it names. cache: folder of the outputs (null: the user's);
    one that `pocketvlm cache-teacher` made is used as it is, or refused. cache_dtype: null takes what such a folder
    has, and float32 where the run makes its own.

    allow_download lets a spec that names a hub id reach the network. trust_remote_code runs Python code that comes
    with a Hugging Face checkpoint. batch_size: of the teacher's forward. token_grid: places in a row of the token maps
    that are kept where an objective reads them (null: the teacher's own); their bytes are told before they are made.
    logits: a fixed bank of texts in place of `train.bank`, of the teacher's logits over which the largest are kept.
    The target of a picture's view is unit(unit((1 - smooth) * view + smooth * mean of its views) + caption_mix *
    caption), the caption part only where the student may see the caption; 0 and 0 is the teacher's own embedding.
    axes: "principal" turns the teacher's space so that the first numbers keep the most (`distill.axes`); cosines stay.
    """

    spec: str | tuple[str, ...]
    smooth: Fraction = 0.0
    caption_mix: NonNegative = 0.0
    cache: str | None = None
    cache_dtype: Literal["float32", "bfloat16"] | None = None
    batch_size: Count = 32
    token_grid: Count | None = None
    logits: LogitsSection | None = None
    axes: Literal["own", "principal"] = "own"
    allow_download: bool = False
    trust_remote_code: bool = False

    @property
    def specs(self) -> tuple[str, ...]:
        return (self.spec,) if isinstance(self.spec, str) else self.spec


# student.name of a run that trains the student of student.init as it is
AS_INIT = "init"


class StudentSection(Section):
    """name: of `students.list_students`, or "init": the saved student of `init` as it is (a pruned one, for instance),
    with its own configuration, embedding width and tokenizer.
    embed_dim: null means the teacher's width (256 without a teacher).

    overrides: changes to the named student's configuration (image size, text tower, ...).
    init: a folder of `students.save_student` to start from. init_parts: parameter-name prefixes to copy from it
    ("text_tower"); empty means everything.
    fit_projection: start the image projection at the ridge solution with this strength; null starts it at random.
    fit_to: towards the "teacher"'s embeddings, or, also where there is no teacher, towards the student's own embeddings
    of its "captions". fit_views: how many views of each picture that regression sees.
    fit_text_projection: the same for the text projection, over the text pool, towards the teacher's embeddings.
    """

    name: str
    embed_dim: Count | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    init: str | None = None
    init_parts: tuple[str, ...] = ()
    fit_projection: Positive | None = None
    fit_to: Literal["teacher", "captions"] = "teacher"
    fit_views: Count = 1
    fit_text_projection: Positive | None = None


class ObjectiveSection(Section):
    """One term of the loss.

    batch: "pairs" sees the batch of pictures (with captions where there are some); "texts" sees the text-only
    batch (`train.text_batch`) as if texts were pictures: their embeddings, and features where both have them.
    teacher: the place, from 0, of the one teacher of a list that it learns from; null: all that see pictures.
    schedule: of the weight, from `weight` to `final_weight` over `schedule_steps` (null: the whole run) by
    "linear" or "cosine"; "warmup" goes from 0 to `weight`; "constant" stays.
    """

    name: str
    weight: NonNegative = 1.0
    batch: Literal["pairs", "texts"] = "pairs"
    teacher: CountOrZero | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    schedule: Literal["constant", "linear", "cosine", "warmup"] = "constant"
    final_weight: NonNegative = 0.0
    schedule_steps: Count | None = None


class TrainSection(Section):
    """steps: of the main phase. text_pretrain_steps: steps before it that train only on text-only batches.

    batch_size: pictures of a step, over all ranks. micro_batch: at most so many of a rank's pictures go through the
    towers at once, with the gradient of the whole batch (`distill.accumulate`); null: all.
    captioned_fraction: share of each batch drawn from captioned pictures (null: as they come). text_batch: words and
    captions drawn each step for `batch: texts` objectives and for the bank.
    bank: "student" makes the bank from the text-only batch through the student's text tower; a number uses
    that many fixed texts in the teacher's own embedding for both models (no cost, image tower only).
    lr_scale: parameter-name prefix -> factor on `lr` (0 freezes). freeze: prefix -> steps of the main phase to keep it
    frozen. freeze_after: prefix -> step of the main phase from which it stands still.
    hold_statistics: prefixes whose batch norms keep their running statistics while their weights are trained.
    cut_after_block: freeze the image trunk up to this block and compute what it gives once (EfficientNet and
    MobileNet families); a step then costs only what lies above.
    precision: "auto" is bf16 or fp16 on CUDA and fp32 elsewhere. clip_norm 0: no clipping.
    max_skipped: so many steps in a row may be skipped because loss or gradient is no number, or because the gradient's
    norm before clipping is above skip_norm_above (null: any finite norm is taken); one more stops the run.
    compile: run both towers through torch.compile. checkpoint_activations: blocks of both towers keep only their inputs
    and run again in the backward (`distill.recompute`).
    sync_batchnorm: batch norms normalise by the rows of all ranks (CUDA only), and not each rank's by its own.
    ema_decay: of the moving average of all weights and batch-norm statistics, min(ema_decay, (1 + t) / (10 + t)) after
    t steps, which is what is evaluated and saved, and the momentum model of `momentum`. 0: off.
    switch_every: after every so many steps of the main phase the student's weights and statistics become the average's
    and training goes on from there, optimizer and average untouched (SEMA, Li et al. 2024, 2402.09240, who switch after
    each epoch); 0: never.
    interpolate: what is evaluated and saved is (1 - interpolate) start + interpolate trained (`optim.interpolated`);
    training itself goes on uninterpolated.
    similarity_mib: the largest matrix of a batch's similarities that is held; larger ones are made in blocks of rows,
    and again in backward (`objectives.blocks`), with the same values up to rounding.
    balance: "gradient-norm" scales the weights by `distill.balance.GradientBalance`, measured every `balance_every`
    steps of the main phase; the first objective is the reference. null: weights as given.
    log_every: steps between rows of metrics.jsonl and, elsewhere than on a terminal, lines of progress.
    trackers: who is given these rows as well (`distill.trackers`); each is an extra of the same name.
    """

    steps: Count = 1000
    batch_size: Count = 128
    micro_batch: Count | None = None
    captioned_fraction: Fraction | None = None
    text_batch: CountOrZero = 0
    text_pretrain_steps: CountOrZero = 0
    bank: Literal["student"] | Count = "student"
    lr: Positive = 1e-3
    min_lr_ratio: Fraction = 0.01
    lr_scale: dict[str, NonNegative] = Field(default_factory=dict)
    freeze: dict[str, Count] = Field(default_factory=dict)
    freeze_after: dict[str, Count] = Field(default_factory=dict)
    hold_statistics: tuple[str, ...] = ()
    sync_batchnorm: bool = False
    cut_after_block: CountOrZero | None = None
    weight_decay: NonNegative = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    warmup_steps: CountOrZero = 50
    clip_norm: NonNegative = 1.0
    max_skipped: CountOrZero = 3
    skip_norm_above: Positive | None = None
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.995
    switch_every: CountOrZero = 0
    interpolate: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    balance: Literal["gradient-norm"] | None = None
    balance_every: Count = 20
    similarity_mib: NonNegative = 64.0
    seed: CountOrZero = 0
    device: str = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    threads: Count | None = None
    log_every: Count = 20
    trackers: tuple[Literal["tensorboard", "trackio"], ...] = ()


class EvalSection(Section):
    """every: steps between evaluations while training (0: only at the end). metrics: which parts to score
    (docs/evaluation.md), or "all".

    templates: prompts of zero-shot classification. tags: sample tags by which results are also given.
    """

    every: CountOrZero = 0
    metrics: tuple[str, ...] = ("retrieval", "zeroshot", "neighbours", "mixed")
    templates: tuple[str, ...] = ("{}", "a picture of {}", "an icon of {}")
    tags: tuple[str, ...] = ("style", "category")
    batch_size: Count = 64


class CheckpointSection(Section):
    """every: steps between checkpoints (the last step always has one). keep: how many of the newest stay."""

    every: Count = 200
    keep: Count = 2


class Recipe(Section):
    """A whole run. Build it with `load_recipe`, which also checks what one section cannot know of another."""

    name: str = "run"
    description: str = ""
    data: DataSection
    views: ViewsSection = ViewsSection()
    teacher: TeacherSection | None = None
    student: StudentSection
    task: TaskSection | None = None
    tokenizer: TokenizerSection = TokenizerSection()
    objectives: Annotated[tuple[ObjectiveSection, ...], Field(min_length=1)]
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every default spelled out."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def digest(self) -> str:
        """sha256 of the canonical JSON; equal recipes have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def updated(self, overrides: Sequence[str]) -> Recipe:
        """A copy with `key.sub=value` overrides applied, checked again."""
        return load_recipe(self.to_dict(), overrides)


def list_recipes() -> list[dict[str, Any]]:
    """One row per shipped recipe: name, student, teacher, objectives, steps, description."""
    rows = []
    for entry in sorted(_folder().iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            value = yaml.load(entry.read_text(encoding="utf-8"), Loader)
            rows.append(
                {
                    "name": entry.name.removesuffix(".yaml"),
                    "student": value["student"]["name"],
                    "teacher": str((value.get("teacher") or {}).get("spec", "none")).strip("[]").replace("'", ""),
                    "objectives": ", ".join(item["name"] for item in value["objectives"]),
                    "steps": value.get("train", {}).get("steps", TrainSection().steps),
                    "description": " ".join(str(value.get("description", "")).split()),
                }
            )
    return rows


def _folder() -> Any:
    return resources.files("pocketvlm.distill").joinpath("recipes")


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    source: a YAML file, the name of a shipped recipe, or a mapping. overrides: `key.sub=value`; the value is
    read as YAML, list items are addressed by number or, among objectives, by name (`objectives.crd.weight=2`).

    Raises:
        UsageError: anything wrong, all of it in one message.
    """
    raw, title = _read(source)
    problems: list[str] = []
    for override in overrides:
        try:
            apply_override(raw, override)
        except UsageError as error:
            problems.append(str(error))
    recipe, found = _validate(raw)
    problems += found
    if recipe is not None:
        problems += list(_cross_checks(recipe))
    if problems or recipe is None:
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        listed = problems[0] if len(problems) == 1 else "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        raise UsageError(f"{title} has {count}, nothing was run: {listed}")
    return recipe


def _read(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return json.loads(json.dumps(source)), "the recipe"
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        title = f"recipe {path}"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{title} cannot be read ({error}); give an existing YAML file, or one of the shipped names: "
                + ", ".join(row["name"] for row in list_recipes())
            ) from error
    else:
        known = [row["name"] for row in list_recipes()]
        if str(source) not in known:
            raise unknown_name("recipe", str(source), known)
        title = f"recipe {str(source)!r}"
        text = _folder().joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        where = f" at line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        reason = getattr(error, "problem", None) or "not readable"
        raise UsageError(f"{title} is not valid YAML{where} ({reason}); correct that line, nothing was run") from error
    if not isinstance(value, dict):
        raise UsageError(f"{title} holds {type(value).__name__}, not the sections of a recipe; see docs/recipes.md")
    return value, title


def _validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    try:
        return Recipe.model_validate(raw), []
    except ValidationError as error:
        return None, list(dict.fromkeys(_sentence(item, raw) for item in error.errors()))


# what pydantic puts into the place of a mistake for each kind that a union allows
_KINDS = ("int", "str", "tuple[str, ...]", "literal['student']")


def _sentence(item: Any, raw: dict[str, Any]) -> str:
    loc = [part for part in item["loc"] if not (isinstance(part, str) and part in _KINDS)]
    loc = [part for part in loc if not (isinstance(part, str) and part.startswith(("constrained-", "function-")))]
    where = ".".join(str(part) for part in loc)
    if item["type"] == "extra_forbidden":
        section = _section_at(loc[:-1])
        kind = f"recipe key in {'.'.join(map(str, loc[:-1]))!r}" if len(loc) > 1 else "recipe key"
        return str(unknown_name(kind, str(loc[-1]), section.model_fields)).rstrip(".")
    if item["type"] == "missing":
        return f"the key {where!r} is missing, and it has no default"
    return f"{where!r} is {item['input']!r}, but {item['msg'][0].lower()}{item['msg'][1:]}"


def _section_at(loc: Sequence[Any]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        inner = list(_models_in(section.model_fields[part].annotation))
        section = inner[0]
    return section


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)


def _cross_checks(recipe: Recipe) -> Iterator[str]:
    """What the parts must know of each other; whatever needs the data itself is checked in `prepare`."""
    from pocketvlm.distill.board import check_metrics
    from pocketvlm.distill.objectives import build_objective, list_objectives, objective_needs
    from pocketvlm.distill.shares import teacher_problem
    from pocketvlm.distill.taps import shared_problems, stand_in_widths, tap_problems
    from pocketvlm.distill.train_checks import start_problems, stream_problems, student_problems, train_problems

    train = recipe.train
    yield from stream_problems(recipe)
    yield from student_problems(recipe)
    try:
        check_metrics(recipe.eval.metrics)
    except UsageError as error:
        yield f"eval.metrics: {error}".rstrip(".")
    known = list_objectives()
    for place, spec in enumerate(recipe.objectives):
        here = f"objectives.{place} ({spec.name})"
        if spec.name not in known:
            yield str(unknown_name("objective", spec.name, known)).rstrip(".")
            continue
        compares_rows = False
        needs = objective_needs(spec.name)
        try:
            wide = stand_in_widths(spec)
            needs = objective_needs(spec.name, spec.options)
            built = build_objective(spec.name, student=wide, teacher=wide, **spec.options)
            compares_rows = built.minimum_rows > 1  # asked of what was built: a wrapper compares what its inner does
        except (UsageError, TypeError, ValueError) as error:
            yield f"{here}: {error}".rstrip(".")
        yield from tap_problems(spec, here)
        if problem := teacher_problem(spec, recipe, here, needs.teacher):
            yield problem
        if needs.classes and recipe.task is None:
            yield f"{here} learns classes and the recipe has none; add 'task' (task={{}}: the labels of the data)"
        if needs.classes and spec.teacher is not None:
            yield f"{here} classifies as all teachers together do; leave its 'teacher' out"
        if needs.classes and spec.batch == "texts":
            yield f"{here} classifies pictures, which a text-only batch has not; use batch: pairs"
        if needs.masked_view and spec.batch == "texts":
            yield f"{here} masks pictures, which a text-only batch has not; use batch: pairs"
        if needs.regions and spec.batch == "texts":
            yield f"{here} compares cells of pictures, which a text-only batch has not; use batch: pairs"
        if needs.teacher and recipe.teacher is None:
            yield f"{here} learns from a teacher and the recipe has none; add 'teacher', or leave the objective out"
        if needs.momentum and not train.ema_decay:
            yield (
                f"{here} learns from the student's moving average and train.ema_decay is 0, so there is none; set it, "
                "for instance to 0.995"
            )
        fixed = recipe.teacher is not None and recipe.teacher.logits is not None
        if needs.logits and not fixed:
            yield (
                f"{here} learns from the teacher's top logits and teacher.logits names no texts for them; set it, for "
                "instance to {texts: prompts.txt, top: 32}"
            )
        elif needs.bank and isinstance(train.bank, str) and train.text_batch < 1 and not fixed:
            yield (
                f"{here} needs a bank of texts, and train.text_batch is 0; set train.text_batch, or train.bank "
                "to a number of texts"
            )
        if needs.logits and spec.batch == "texts":
            yield f"{here} learns how pictures are scored, which a text-only batch has not; use batch: pairs"
        if needs.captions and spec.batch == "texts":
            yield f"{here} needs picture-caption pairs, which a text-only batch has not; use batch: pairs"
        if spec.batch == "texts" and train.text_batch < 2:
            yield f"{here} is set on texts, and train.text_batch is {train.text_batch}; set it to 2 or more"
        if spec.schedule_steps is not None and spec.schedule_steps > train.steps:
            yield f"{here} has schedule_steps {spec.schedule_steps} but only {train.steps} steps are trained"
        if train.batch_size == 1 and spec.batch == "pairs" and needs.captions and compares_rows:
            yield (
                f"{here} contrasts each pair with the others of its batch, and train.batch_size is 1, so its "
                "loss would be 0 for any student; use a batch of 2 or more"
            )
    yield from shared_problems(recipe)
    yield from start_problems(recipe)
    yield from train_problems(recipe)
