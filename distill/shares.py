"""Which teachers an objective learns from, where a run has several, and what it is shown of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.objectives import Outputs, Widths, objective_needs
from pocketvlm.distill.recipe import ObjectiveSection, Recipe
from pocketvlm.distill.taps import asked_taps
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.student import TOKENS
from pocketvlm.teachers.ensemble import Ensemble


@dataclass(frozen=True)
class Share:
    """What one objective sees of the teachers' outputs side by side: those of the teachers at the places `members`.

    dims, features, text_features: widths of every teacher's embeddings and pooled features (0: none). tokens: width of
    the token maps of the one teacher that has them. scales, biases: of every teacher.
    """

    members: tuple[int, ...]
    dims: tuple[int, ...]
    features: tuple[int, ...]
    text_features: tuple[int, ...]
    tokens: int
    scales: tuple[float, ...]
    biases: tuple[float, ...]

    def widths(self) -> Widths:
        """Of the outputs that the objective is given."""
        features, texts = (self._width(part) for part in (self.features, self.text_features))
        parts = tuple((self.dims[place], self.scales[place]) for place in self.members)
        return Widths(self._width(self.dims) or 0, features, texts, {TOKENS: self.tokens} if self.tokens else {}, parts)

    @property
    def scale(self) -> float:
        """Logit scale: the teacher's own, or of several the mean."""
        return self._mean(self.scales)

    @property
    def bias(self) -> float:
        return self._mean(self.biases)

    def embedding(self, x: Tensor) -> Tensor:
        """[N, width] of all teachers' [N, sum of dims]: unit vectors again, whose cosine is the mean of the cosines."""
        return x if len(self.dims) == 1 else _columns(x, self.dims, self.members) / len(self.members) ** 0.5

    def __call__(self, outputs: Outputs) -> Outputs:
        """The outputs of these teachers out of the outputs of all."""
        if len(self.dims) == 1:
            return outputs
        device = outputs.image.device
        found: dict[str, Any] = {"logit_scale": self.scale, "logit_bias": self.bias}
        found = {name: torch.tensor(value, device=device) for name, value in found.items()}
        for name in ("image", "text", "bank"):
            if (value := getattr(outputs, name)) is not None:
                found[name] = self.embedding(value)
        for name, parts in (("image_features", self.features), ("text_features", self.text_features)):
            value = getattr(outputs, name)
            found[name] = None if value is None or not self._width(parts) else _columns(value, parts, self.members)
        return dataclasses.replace(outputs, **found)

    def _width(self, parts: Sequence[int]) -> int | None:
        """Of these teachers together; None where one of them has nothing."""
        own = [parts[place] for place in self.members]
        return sum(own) if all(own) else None

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values[place] for place in self.members) / len(self.members)


def _columns(x: Tensor, widths: Sequence[int], members: Sequence[int]) -> Tensor:
    parts = x.split(list(widths), dim=1)
    return torch.cat([parts[place] for place in members], dim=1)


def share_of(ensemble: Ensemble, images: Any, words: Any, batch: str = "pairs", place: int | None = None) -> Share:
    """What an objective with `batch` and `teacher: place` sees (None: the joint teachers); images, words: caches."""
    cache = images if batch == "pairs" else words
    infos = [part.info if part is not None else None for part in getattr(cache, "parts", (cache,))]
    texts = tuple(info.text_feature_dim if info is not None else 0 for info in infos)
    seen = [info if member.pictures else None for info, member in zip(infos, ensemble.members)]
    return Share(
        members=ensemble.joint if place is None else (place,),
        dims=tuple(member.dim for member in ensemble.members),
        # texts take the place of pictures in the text-only batch
        features=tuple(info.feature_dim if info is not None else 0 for info in seen) if batch == "pairs" else texts,
        text_features=texts if batch == "pairs" else (0,) * len(texts),
        tokens=cache.info.token_dim if batch == "pairs" else 0,
        scales=tuple(member.logit_scale for member in ensemble.members),
        biases=tuple(member.logit_bias for member in ensemble.members),
    )


def check_shares(recipe: Recipe, ensemble: Ensemble) -> None:
    """Refuse, before a teacher works, what these teachers cannot give this recipe.

    Raises:
        UsageError: pictures asked of a teacher of texts alone, token maps of several teachers, or embeddings of
            another width than the student's where the one takes the place of the other.
    """
    for place, spec in enumerate(recipe.objectives):
        needs = objective_needs(spec.name, spec.options)
        if not needs.teacher or not needs.teacher_image or spec.batch == "texts":
            continue
        for member in ensemble.joint if spec.teacher is None else (spec.teacher,):
            if not ensemble.members[member].pictures:
                raise UsageError(
                    f"objectives.{place} ({spec.name}) learns from a teacher's pictures and teacher "
                    f"{ensemble.members[member].name!r} reads texts only, so there would be nothing to learn; use "
                    "batch: texts or of: text, or set its 'teacher' to one with an image tower"
                )
    seeing = [member.name for member in ensemble.members if member.pictures]
    if recipe.teacher is not None and recipe.teacher.axes == "principal" and not seeing:
        raise UsageError(
            f"teacher.axes is 'principal' and {ensemble.name!r} reads texts only, so there are no pictures to find "
            "axes of; leave axes out, or name a teacher with an image tower"
        )
    if asked_taps(recipe).teacher and len(seeing) > 1:
        raise UsageError(
            f"objectives on token maps were asked of {len(seeing)} teachers at once ({', '.join(seeing)}), whose grids "
            "differ, and maps of one are kept; name one teacher, or leave these objectives out"
        )
    width = recipe.student.embed_dim or student_dim(ensemble)
    if len(seeing) == 1 and width != ensemble.dim:
        raise UsageError(
            f"student.embed_dim is {width} but teacher {seeing[0]!r} embeds into {ensemble.dim} dimensions, so "
            f"their embeddings could not be compared; leave student.embed_dim out, or set it to {ensemble.dim}"
        )
    asks = {
        "student.fit_projection": recipe.student.fit_projection and recipe.student.fit_to == "teacher",
        "student.fit_text_projection": recipe.student.fit_text_projection,
        "train.bank as a number": isinstance(recipe.train.bank, int),
    }
    for key, asked in asks.items():
        if asked and key == "student.fit_projection" and not ensemble.pictures:
            raise UsageError(
                f"{key} regresses to a teacher's pictures and {ensemble.name!r} reads texts only, so there are none; "
                "set student.fit_to: captions, or leave it out"
            )
        if asked and width != ensemble.dim:
            raise UsageError(
                f"{key} puts the teachers' embeddings, {ensemble.dim} wide side by side, in the place of the "
                f"student's, which are {width} wide; leave it out, or set student.embed_dim to {ensemble.dim}"
            )


def student_dim(ensemble: Ensemble) -> int:
    """The width of a student that names none: the first joint teacher's."""
    return ensemble.members[ensemble.joint[0]].dim


def teacher_problem(spec: ObjectiveSection, recipe: Recipe, here: str, learns: bool) -> str | None:
    """What is wrong with the `teacher` of one objective, before anything is loaded."""
    count = 0 if recipe.teacher is None else len(recipe.teacher.specs)
    if spec.teacher is None:
        return None
    if not learns:
        return f"{here} learns from no teacher and names teacher {spec.teacher}; leave it out"
    if spec.teacher >= count:
        return (
            f"{here} names teacher {spec.teacher} and the recipe has {count}, counted from 0, so nobody would answer; "
            "correct the number, or leave it out to learn from all"
        )
    return None
