"""A teacher's joint space in its principal axes, so that the first numbers of an embedding say the most."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.contract import identity
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.ensemble import Ensemble

if TYPE_CHECKING:
    from pocketvlm.distill.prepare import Prepared


def principal_axes(*sets: Tensor) -> Tensor:
    """Orthogonal [D, D] float32: the eigenvectors, as columns, of the mean second moment of unit vectors.

    Formula: with M_k = mean_i u_i u_i^T over the unit-length rows of set k, the columns are the eigenvectors of
    mean_k M_k by falling eigenvalue: of all projections to m numbers that keep the most of the squared length, here of
    pictures and texts alike. Nothing is centred, because a cosine is not. Each column's largest element is positive.
    Computed in float64 on the CPU. Cosines at full width do not change.

    Args:
        sets: each [N, D], for instance pictures and texts; those without rows do not count.
    """
    moments = [(u := F.normalize(rows.double().cpu(), dim=-1)).T @ u / len(u) for rows in sets if len(rows)]
    axes = torch.linalg.eigh(torch.stack(moments).mean(dim=0)).eigenvectors.flip(1)
    signs = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return (axes * signs).float()


class TurnedCache(TeacherCache):
    """A teacher's kept embeddings times `axes` [D, M], unit length again; features and tokens as they were."""

    def __init__(self, cache: TeacherCache, axes: Tensor) -> None:
        self.__dict__.update(cache.__dict__)
        self.axes = axes
        self.info = dataclasses.replace(cache.info, dim=axes.shape[1])

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._turned(super().image(uids, views))

    def text(self, texts: Sequence[str]) -> Tensor:
        return self._turned(super().text(texts))

    def _turned(self, rows: Tensor) -> Tensor:
        return F.normalize(rows @ self.axes, dim=-1) if len(rows) else rows


def axes_of(prepared: Prepared) -> Tensor:
    """[D, D] `principal_axes` of what the teacher says to the training pictures, all views, and to its texts: the text
    pool where it answered one, else the training captions."""
    images = prepared.images
    assert images is not None, "the recipe has a teacher"
    uids = [sample.uid for sample in prepared.samples]
    pictures = torch.cat([images.image(uids, view) for view in range(prepared.recipe.views.count)])
    if prepared.words is not None:
        return principal_axes(pictures, prepared.words.text(prepared.english))
    return principal_axes(pictures, images.text(prepared.read(list(dict.fromkeys(prepared.source.captions())))))


def turned(prepared: Prepared, axes: Tensor) -> Prepared:
    """The same inputs with the teacher in other coordinates: its outputs times `axes` [D, M], and a space of its own,
    which is the student's too."""
    images, teacher, answers = prepared.images, prepared.teacher, prepared.teacher_answers
    assert isinstance(images, TeacherCache), "the recipe has one teacher"
    assert teacher is not None, "the recipe has one teacher"
    words = prepared.words
    assert words is None or isinstance(words, TeacherCache), "the recipe has one teacher"
    digest = hashlib.sha256(axes.contiguous().numpy().tobytes()).hexdigest()
    space = identity(
        teacher.space_id.partition("@")[0], hashlib.sha256((teacher.space_id + digest).encode()).hexdigest()
    )
    if answers is not None:
        turn = axes.double().numpy()
        answers = dataclasses.replace(answers, space_id=space, images=answers.images @ turn, texts=answers.texts @ turn)
    prepared.student.space_id = space
    return dataclasses.replace(
        prepared,
        images=TurnedCache(images, axes),
        words=None if words is None else TurnedCache(words, axes),
        teacher=Ensemble((dataclasses.replace(teacher.members[0], dim=axes.shape[1], space_id=space),)),
        teacher_answers=answers,
    )
