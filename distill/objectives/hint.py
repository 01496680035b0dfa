"""Hints: inner features of the student, pooled or at every place of a picture, regress the teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Projector,
    Widths,
    choice,
    seeded_generator,
    tap_of,
    unit,
)
from pocketvlm.distill.objectives.feature import row_distance
from pocketvlm.edge.errors import UsageError


def as_map(tokens: Tensor) -> Tensor:
    """[B, C, H, W], which a [B, N, W] of a square grid becomes row by row.

    Raises:
        UsageError: [B, N, W] that is no square grid, or another shape.
    """
    if tokens.ndim == 3:
        own = math.isqrt(tokens.shape[1])
        tokens = tokens.transpose(1, 2).unflatten(2, (own, own)) if own**2 == tokens.shape[1] else tokens
    if tokens.ndim != 4:
        raise UsageError(
            f"objective 'hint' was given a student map of shape {list(tokens.shape)} but takes [B, C, H, W] or a "
            "square grid [B, N, W]; its places have no place on the teacher's grid, so tap a map before the pooling"
        )
    return tokens


def projected_to(tokens: Tensor, side: int, projector: nn.Module, places: Tensor | slice = slice(None)) -> Tensor:
    """A student's map on the teacher's grid and in its width: [B, C, H, W] or square [B, N, W] -> [B, P, W_T], P the
    side^2 places or those named by `places`.

    Towards fewer places in both directions by adaptive average pooling, otherwise bilinearly (half-pixel centres); the
    projector, which works on each place alone, sees whichever of the two grids has fewer places. For a linear one the
    order makes no difference.
    """
    chart = as_map(tokens)
    if min(chart.shape[2:]) >= side:
        return projector(F.adaptive_avg_pool2d(chart, (side, side)).flatten(2).transpose(1, 2)[:, places])
    chart = projector(chart.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return (
        F.interpolate(chart, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)[:, places]
    )


class Hint(BatchObjective):
    """hint: the student's inner image features, through a projector, regress the teacher's, pooled or place by place.

    Formula: with f the features, R the projector, z the `standardize` map,
        L = mean_i mean_d h( z(R f^S_i)_d - z(f^T_i)_d ),  h: `distance` "l2" (x^2, default) or "smooth-l1" (Huber_1).
    Which f: without taps (default) the pooled features before the joint projection, of both models. With `student_tap`
    alone, the mean of that tap over its places against the teacher's pooled feature. With `student_tap` and
    `teacher_tap`, both maps place by place (i runs over pictures and places): the student's is resampled to the
    teacher's grid (averaged where it is finer, bilinear where it is coarser) and projected by a 1 x 1 convolution,
    which is the projector at every place. Of the places of the teacher's grid a step compares the share `places`
    (default 0.4, at least one place; 1: all of them, as FitNets does), the same in every picture and drawn anew in each
    step from its number, so the mean over steps is the mean over all places.
    standardize: "row" (default) gives each row mean 0 and variance 1 over its channels, on both sides, so that feature
    scales of different teachers do not change the weight; "unit" L2-normalises each row; "none" does nothing.
    Inputs: image_features [B, F_S] and [B, F_T], or the taps: student [B, C, H, W] or [B, N, W] (square grid; pooled
    [B, W] where it is used alone), teacher [B, N, W]. Output: {"hint"}. Reduction: mean over channels, places and rows
    ("unit": sum over channels, as in `feature`). The `projector` ("linear" or "mlp") always exists, also between equal
    widths. Captions are not used; no temperature; a batch of one is fine.
    Paper: Romero et al. 2015 (FitNets, 1412.6550), equation 3, there on maps with a convolutional regressor.
    Ours: pooled features, the row standardisation, the mean over channels and places (FitNets sums), the resampling,
    the drawn places.
    Related: `feature` compares joint embeddings; `token-gram` compares relations of places, which need no projector.
    Cost: maps: B N W_S W_T multiplications and twice as many backward, N the compared places (all of the student's
    where its grid is the coarser one); and the teacher's maps in its cache.
    """

    name = "hint"
    formula = "projected features regress the teacher's: pooled, or token maps place by place"
    paper = "FitNets, 1412.6550; row standardisation, pooling ours"
    needs = Needs(features=True)

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        distance: str = "l2",
        standardize: str = "row",
        projector: str = "linear",
        places: float = 0.4,
    ) -> None:
        super().__init__()
        if isinstance(places, bool) or not isinstance(places, (int, float)) or not 0 < places <= 1:
            raise UsageError(
                f"objective 'hint' was given places {places!r} but takes a share of the grid in (0, 1]; no place would "
                "be compared, so give for instance 0.4, or 1 for all"
            )
        self.needs = self.needs_with({"student_tap": student_tap, "teacher_tap": teacher_tap})
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        ours = student.image_features if student_tap is None else student.tap(self.name, "student", student_tap)
        theirs = None if teacher is None else teacher.image_features
        if teacher is not None and teacher_tap is not None:
            theirs = teacher.tap(self.name, "teacher", teacher_tap)
        if ours is None or theirs is None:
            raise UsageError(
                "objective 'hint' compares pooled image features, which one of the two models does not provide; use a "
                "teacher that has them, or leave the objective out"
            )
        self.distance = choice("distance", distance, ("l2", "smooth-l1"))
        self.standardize = choice("standardize", standardize, ("row", "unit", "none"))
        self.projector = Projector(ours, theirs, seed=seed, tag="hint", kind=projector)
        self.places, self.step = places, 0

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        ours, theirs = options.get("student_tap"), options.get("teacher_tap")
        if theirs is not None and ours is None:
            raise UsageError(
                f"objective 'hint' was given teacher_tap {theirs!r} and no student_tap; a map cannot be compared with "
                "a pooled feature, so name a student_tap too ('tokens': the last map)"
            )
        if ours is None:
            return cls.needs
        if theirs is None:
            return Needs(features=True, taps=("student_tap",))
        return Needs(taps=("student_tap", "teacher_tap"))

    def at(self, step: int, progress: float) -> None:
        self.step = step

    def chosen(self, places: int) -> Tensor | slice:
        """Which of so many places this step compares: int64 indices, or all."""
        if self.places == 1:
            return slice(None)
        generator = seeded_generator(0, f"hint places {self.step}")
        return torch.randperm(places, generator=generator)[: max(1, round(self.places * places))]

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        ours, theirs = self._compared(student, teacher)
        x, target = self._standard(ours), self._standard(theirs)
        rows = row_distance(x, target, self.distance, 1.0)
        if not rows.numel():
            return {"hint": self.zero(student)}
        return {"hint": rows.mean() / (1 if self.standardize == "unit" else x.shape[-1])}

    def _compared(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The student's features, projected, and the teacher's: [B, W] or [B, N, W]."""
        theirs = teacher.image_features
        if self.teacher_tap is not None:
            theirs = tap_of(self.name, teacher, "teacher", self.teacher_tap)
        ours = student.image_features
        if self.student_tap is not None:
            ours = tap_of(self.name, student, "student", self.student_tap)
        if ours is None or theirs is None:
            raise UsageError(
                "objective 'hint' was given outputs without image_features; there is nothing to compare, so use a "
                "teacher (or cache) that keeps them"
            )
        if self.teacher_tap is not None:
            side = math.isqrt(theirs.shape[1])
            if theirs.ndim != 3 or side**2 != theirs.shape[1]:
                raise UsageError(
                    f"objective 'hint' was given a teacher map of shape {list(theirs.shape)} but takes [B, N, W] of a "
                    "square grid; places could not be matched, so tap the teacher's tokens"
                )
            places = self.chosen(theirs.shape[1])
            return projected_to(ours, side, self.projector, places), theirs[:, places]
        if self.student_tap is not None and ours.ndim > 2:
            ours = ours.mean(dim=(2, 3)) if ours.ndim == 4 else ours.mean(dim=1)
        return self.projector(ours), theirs

    def _standard(self, x: Tensor) -> Tensor:
        if self.standardize == "row":
            return F.layer_norm(x, x.shape[-1:])
        return unit(x) if self.standardize == "unit" else x
