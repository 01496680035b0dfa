"""Several teachers in one run: what is known of each, and their caches read as one.

Each teacher keeps its own preprocessing, tokenizer, logit scale and cache. Their embeddings lie side by side, in the
order of the recipe, every part of length 1; a teacher of texts alone has zeros for pictures, which nothing may read.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pocketvlm.edge.contract import identity
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import Teacher, TextTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import CacheInfo

Licences = tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TeacherFacts:
    """What a run needs of a teacher besides its cached outputs. pictures: whether it has an image tower."""

    name: str
    fingerprint: str
    space_id: str
    dim: int
    logit_scale: float
    logit_bias: float
    licences: Licences
    pictures: bool = True

    @classmethod
    def of(cls, teacher: Teacher) -> TeacherFacts:
        """Of a loaded teacher."""
        given: dict[str, Any] = {field.name: getattr(teacher, field.name, None) for field in dataclasses.fields(cls)}
        return cls(**given | {"pictures": not isinstance(teacher, TextTeacher)})


@dataclass(frozen=True)
class Ensemble:
    """The teachers of a run, of which there may be one. Build it with `load_ensemble`, or from facts."""

    members: tuple[TeacherFacts, ...]

    @property
    def joint(self) -> tuple[int, ...]:
        """Places of the teachers that an objective learns from where it names none: those that see pictures, if any."""
        seeing = tuple(place for place, member in enumerate(self.members) if member.pictures)
        return seeing or tuple(range(len(self.members)))

    @property
    def pictures(self) -> bool:
        """Whether any of them has an image tower."""
        return any(member.pictures for member in self.members)

    @property
    def name(self) -> str:
        return " + ".join(member.name for member in self.members)

    @property
    def fingerprint(self) -> str:
        """Of all of them, in order; of one alone its own."""
        return _digest([member.fingerprint for member in self.members])

    @property
    def dim(self) -> int:
        """Width of the joint ones side by side."""
        return sum(self.members[place].dim for place in self.joint)

    @property
    def space_id(self) -> str:
        """Coordinate system of the joint ones side by side; of one its own."""
        found = [self.members[place] for place in self.joint]
        return found[0].space_id if len(found) == 1 else identity("ensemble", _digest([m.fingerprint for m in found]))

    @property
    def licences(self) -> Licences:
        return tuple(dict.fromkeys((what, by, who) for member in self.members for what, by, who in member.licences))


def _digest(fingerprints: Sequence[str]) -> str:
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256("|".join(fingerprints).encode()).hexdigest()


def load_ensemble(
    specs: Sequence[str], load: Callable[..., Teacher] | None = None, **options: Any
) -> tuple[list[Teacher], Ensemble]:
    """The teachers of `specs`, loaded with the options of `teachers.load_teacher`, and what is known of them together.

    load: opens a spec in place of `load_teacher`.

    Raises:
        UsageError: none, or one of them twice; and as `load_teacher` does.
    """
    from pocketvlm.teachers import load_teacher

    if not specs:
        raise UsageError("an empty list of teachers was given, so there is nobody to learn from; name at least one")
    teachers = [(load or load_teacher)(spec, **options) for spec in specs]
    for place, teacher in enumerate(teachers):
        if any(teacher.fingerprint == other.fingerprint for other in teachers[:place]):
            raise UsageError(
                f"teacher {teacher.name!r} was given twice, so its opinion would merely count double; name it once and "
                "set the objective's weight"
            )
    return teachers, Ensemble(tuple(map(TeacherFacts.of, teachers)))


class JoinedCache:
    """Caches of several teachers over the same pictures and texts, with the readers of one `TeacherCache`.

    parts: the caches in the order of the teachers; None where a teacher was asked nothing.
    info: of the first, with the widths of all together.
    """

    def __init__(self, members: Sequence[TeacherFacts], parts: Sequence[TeacherCache | None]) -> None:
        self.members, self.parts = tuple(members), tuple(parts)
        infos = [part.info for part in self.parts if part is not None]
        seen = [part.info for part, member in zip(self.parts, self.members) if part is not None and member.pictures]
        self.info: CacheInfo = dataclasses.replace(
            infos[0],
            dim=sum(member.dim for member in self.members),
            feature_dim=sum(info.feature_dim for info in seen),
            text_feature_dim=sum(info.text_feature_dim for info in infos),
            token_grid=max((info.token_grid for info in seen), default=0),
            token_dim=max((info.token_dim for info in seen), default=0),
        )

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, sum of D] float32; as `TeacherCache.image`, like all that follows."""
        rows = len(uids)
        parts = [
            part.image(uids, views) if part is not None and member.pictures else torch.zeros(rows, member.dim)
            for part, member in zip(self.parts, self.members)
        ]
        return torch.cat(parts, dim=1)

    def features(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, sum of F], of the teachers that have them."""
        return self._joined(lambda part: part.info.feature_dim, lambda part: part.features(uids, views))

    def tokens(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, G G, W] of the one teacher that keeps them."""
        return self._joined(lambda part: part.info.token_grid, lambda part: part.tokens(uids, views))

    def text(self, texts: Sequence[str]) -> Tensor:
        """[M, sum of D]."""
        return self._joined(lambda part: part.info.dim, lambda part: part.text(texts))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """[M, sum of G], of the teachers that have them."""
        return self._joined(lambda part: part.info.text_feature_dim, lambda part: part.text_features(texts))

    def load(self) -> JoinedCache:
        """As `TeacherCache.load`."""
        for part in self.parts:
            if part is not None:
                part.load()
        return self

    def _joined(self, width: Callable[[TeacherCache], int], read: Callable[[TeacherCache], Tensor]) -> Tensor:
        return torch.cat([read(part) for part in self.parts if part is not None and width(part)], dim=1)


def joined(members: Sequence[TeacherFacts], parts: Sequence[TeacherCache | None]) -> TeacherCache | JoinedCache | None:
    """One reader of all; a single cache with pictures, or of texts for the text-only batch, is its own."""
    if all(part is None for part in parts):
        return None
    if len(parts) == 1 and parts[0] is not None and members[0].pictures:
        return parts[0]
    return JoinedCache(members, parts)
