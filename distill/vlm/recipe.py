"""Recipes of generative distillation: stages after LLaVA-KD, as strict YAML.

LLaVA-KD (arXiv:2410.16236) has three: distilled pre-training of the connector, supervised fine-tuning, distilled
fine-tuning, with answer, response, visual and relation weights 1, 1, 1 and 0.5 where a teacher is heard. Its decoder is
a pre-trained language model; ours starts at random, so the shipped recipes train it from the first stage on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pocketvlm.distill.overrides import Loader, apply_override
from pocketvlm.distill.sections import Count, CountOrZero, Fraction, NonNegative, Positive, Section
from pocketvlm.edge.errors import UsageError, unknown_name

Part = Literal["connector", "decoder", "vision"]


class DataSection(Section):
    """scenes, labelled_scenes: how many of each list, drawn by `seed`. questions: to a scene. length: tokens of a row.

    captions: share of the pool's concepts that keep their labels. variants: sizes and places of each picture.
    """

    scenes: Count = 4000
    labelled_scenes: Count = 2000
    questions: Count = 8
    length: Annotated[int, Field(ge=24)] = 123
    captions: Fraction = 0.1
    variants: Count = 3
    seed: int = 0


class TeacherSection(Section):
    """top: entries kept of each distribution. places: keep those at the picture's places too (a weight `visual` needs
    them)."""

    top: Count = 16
    places: bool = False


class WeightsSection(Section):
    """answer: next-token cross-entropy. response, visual: `kept_divergence` of answer tokens and of the picture's
    places, in `direction`. relation: `relation_distance`. Each term is a mean over its tokens or pictures."""

    answer: NonNegative = 1.0
    response: NonNegative = 0.0
    visual: NonNegative = 0.0
    relation: NonNegative = 0.0
    direction: Literal["forward", "reverse", "js"] = "forward"

    @property
    def hears(self) -> bool:
        """Whether a distribution or a hidden state of the teacher is compared."""
        return self.response > 0 or self.visual > 0 or self.relation > 0


class StageSection(Section):
    """train: parts that move; the rest stands still, and a vision trunk that does is computed once.

    labelled: the share of each batch from scenes of labelled pictures with their true answers; the rest is from scenes
    of all pictures with the teacher's. Steps of `on_policy` share let the student answer the latter's questions itself,
    drawn at `temperature`, and the teacher judge each token (no cross-entropy there). rate: of AdamW, after `warmup`
    steps on a cosine to 0 at the end of the stage; the token embedding has `word_rate` of it, vision `vision_rate`.
    """

    name: Annotated[str, Field(min_length=1)]
    steps: Count
    train: Annotated[tuple[Part, ...], Field(min_length=1)] = ("connector", "decoder")
    labelled: Fraction = 0.25
    weights: WeightsSection = WeightsSection()
    on_policy: Fraction = 0.0
    temperature: Positive = 1.0
    batch: Count = 32
    rate: Positive = 1e-3
    word_rate: NonNegative = 0.3
    vision_rate: NonNegative = 0.1
    warmup: CountOrZero = 50

    @property
    def heard(self) -> int:
        """Scenes of a batch whose answers are the teacher's."""
        return self.batch - round(self.batch * self.labelled)

    @model_validator(mode="after")
    def _sense(self) -> StageSection:
        if not self.heard and (self.weights.hears or self.on_policy):
            raise ValueError(
                f"stage {self.name!r} takes all scenes from the labelled ones and gives the teacher's terms a weight, "
                "which then teach nothing; lower labelled or set those weights and on_policy to 0"
            )
        if self.on_policy and not self.weights.response:
            raise ValueError(
                f"stage {self.name!r} lets the student answer in {self.on_policy:g} of its steps, which the teacher "
                "judges by weights.response, and that is 0; give it a weight"
            )
        return self


class OptimSection(Section):
    """Of every stage. bfloat16: the student's forward under autocast, the teacher's weights in it. every: steps from
    one checkpoint to the next."""

    weight_decay: NonNegative = 0.05
    clip: NonNegative = 1.0
    bfloat16: bool = False
    log_every: Count = 50
    every: Count = 100
    seed: CountOrZero = 0


class VlmRecipe(Section):
    """A whole run. Build it with `load_vlm_recipe`."""

    name: str = "run"
    description: str = ""
    data: DataSection = DataSection()
    teacher: TeacherSection = TeacherSection()
    stages: Annotated[tuple[StageSection, ...], Field(min_length=1)]
    optim: OptimSection = OptimSection()

    @model_validator(mode="after")
    def _sense(self) -> VlmRecipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"the stages {', '.join(names)} do not all have names of their own; rename one")
        asking = [stage.name for stage in self.stages if stage.weights.visual]
        if asking and not self.teacher.places:
            raise ValueError(
                f"stage {asking[0]!r} gives weights.visual, but teacher.places is false, so nothing was kept of the "
                "picture's places; set it to true"
            )
        return self

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def digest(self) -> str:
        """sha256 of the canonical JSON without name and description."""
        values = self.model_dump(mode="json", exclude={"name", "description"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def vlm_recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_vlm_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> VlmRecipe:
    """Read, override and check. source: a shipped name, a YAML file or a mapping. overrides: `stages.0.steps=50`;
    a stage may be addressed by its name.

    Raises:
        UnknownNameError: no such recipe. UsageError: every mistake, in one message.
    """
    if isinstance(source, Mapping):
        raw, title = json.loads(json.dumps(source)), "the recipe"
    else:
        raw, title = _read(source)
    for override in overrides:
        apply_override(raw, override)
    try:
        return VlmRecipe.model_validate(raw)
    except ValidationError as error:
        mistakes = list(dict.fromkeys(_sentence(item) for item in error.errors()))
        raise UsageError(f"{title} cannot be run: " + "; ".join(mistakes)) from error


def _read(source: str | Path) -> tuple[dict[str, Any], str]:
    if str(source).endswith((".yaml", ".yml")):
        title = f"recipe {Path(source).name}"
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{title} cannot be read ({error}); give an existing YAML file in UTF-8") from error
    elif str(source) in vlm_recipe_names():
        title = f"recipe {str(source)!r}"
        text = _folder().joinpath(f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise unknown_name("recipe of generative distillation", str(source), [*vlm_recipe_names(), "FILE.yaml"])
    try:
        raw = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{title} is not valid YAML; correct it, nothing was run") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{title} holds no sections; see docs/vlm-distill.md for them")
    return raw, title


def _folder() -> Any:
    return resources.files("pocketvlm.distill.vlm").joinpath("recipes")


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if item["type"] == "extra_forbidden":
        return str(unknown_name("key of a recipe of generative distillation", where, _keys(VlmRecipe, ""))).rstrip(".")
    if item["type"] == "missing":
        return f"the key {where!r} is missing, and it has no default"
    return f"{where!r} is {item['input']!r}, but {item['msg'][0].lower()}{item['msg'][1:]}"


def _keys(section: type[BaseModel], before: str) -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_section(kind)]
        place = f"{before}{name}" if inner != [StageSection] else f"{before}{name}.0"
        found += _keys(inner[0], f"{place}.") if inner else [place]
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
