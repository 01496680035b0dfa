"""What the sections of a recipe are made of, and the section of a task."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSection(Section):
    """A student that tells a fixed list of classes apart, by two heads (`students.task`), and ships as a classifier.

    classes: their names; empty: the labels of the training data. validation: the share of each class's labels, rounded
    down, that no head learns and that chooses `share` and `temperature`, which can also be given; the pictures are
    learned from as unlabelled ones. mix: what is mixed, the
    heads' "probabilities" or their "logits" (at temperature 1; one linear layer remains).
    """

    classes: tuple[str, ...] = ()
    mix: Literal["probabilities", "logits"] = "probabilities"
    share: Fraction | None = None
    temperature: Positive | None = None
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25
