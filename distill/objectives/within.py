"""Relations inside one modality: which tensors, which rows, one term each."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity
from pocketvlm.distill.objectives.common import BatchObjective, choice, unit
from pocketvlm.edge.errors import UsageError


def reads_pictures(options: Mapping[str, Any]) -> bool:
    """Whether the option `of` names anything but texts."""
    of = options.get("of", "image")
    return of != "text" and not (isinstance(of, (list, tuple)) and set(map(str, of)) == {"text"})


def cosines(z: Tensor) -> Similarity:
    """Of the rows of z with each other, [N, D] -> [N, N], not yet made."""
    return Similarity(unit(z), unit(z), 1.0)


def without_own(block: Tensor, rows: slice) -> Tensor:
    """`rows` [R, N] of a matrix N x N without their entries on its diagonal, [R, N - 1]."""
    place = torch.arange(block.shape[1], device=block.device)
    return block[place[rows, None] != place].reshape(len(block), -1)


class WithinModality(BatchObjective):
    """Base of objectives that compare the geometry of one modality with the teacher's geometry of it.

    of: "image", "text" or both; texts are the captioned rows, and fewer than `minimum_rows` of them give 0.
    """

    needs = Needs()
    minimum_rows = 2

    def __init__(self, of: Sequence[str] | str) -> None:
        super().__init__()
        self.of = tuple(choice("of", part, ("image", "text")) for part in ([of] if isinstance(of, str) else of))
        if not self.of:
            raise UsageError(
                f"objective {self.name!r} was given an empty 'of'; nothing would be learned, so name image or text"
            )

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        return dataclasses.replace(cls.needs, teacher_image=reads_pictures(options))

    @abstractmethod
    def relation(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Terms of one modality by suffix; student [N, D_S], teacher [N, D_T], N >= minimum_rows."""

    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """The keys that `relation` returns."""

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        found = {}
        for part in self.of:
            pair = self._rows(part, student, teacher)
            values = self.relation(*pair) if pair else {suffix: self.zero(student) for suffix in self.suffixes()}
            found.update({f"{self.name}_{part}{suffix}": value for suffix, value in values.items()})
        return found

    def _rows(self, part: str, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor] | None:
        if part == "image":
            return student.image, teacher.image
        rows = self.pairs(student, teacher)
        if rows is None:
            return None
        assert rows.teacher_text is not None, "pairs() was given the teacher"
        return rows.text, rows.teacher_text
