"""The teacher protocol: a frozen source of embeddings with its own preprocessing and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError


@dataclass(frozen=True)
class TeacherOutput:
    """One tower's outputs for a batch, detached, float32, on the teacher's device.

    embedding: [batch, dim], L2-normalised, in the joint space.
    features: [batch, width] pooled features before the joint projection, not normalised, or None.
    taps: {"tokens": [batch, n, width]} from `encode_image_tokens`; n places, row by row, of a square grid.
    """

    embedding: Tensor
    features: Tensor | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Teacher(Protocol):
    """A frozen provider of knowledge. Never trained, never written into a checkpoint.

    name: as given by the user ("openmoji-lit", "open_clip:ViT-B-32@weights.safetensors").
    fingerprint: sha256 hex over weights, preprocessing and tokenizer; a cache made under another one is refused.
    space_id: coordinate system of its embeddings (`edge.contract.identity`).
    logit_scale: multiplier of the cosine (not its logarithm). image: its preprocessing.
    licences: (what, licence, attribution) rows that travel with anything made from it.
    """

    name: str
    fingerprint: str
    space_id: str
    dim: int
    logit_scale: float
    logit_bias: float
    image: ImageSpec
    licences: tuple[tuple[str, str, str], ...]

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """pixels: uint8 [batch, size, size, 3], made by `edge.preprocess` under `self.image`."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput: ...


@runtime_checkable
class TokenTeacher(Teacher, Protocol):
    """A teacher that also shows its last image tokens."""

    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        """As `encode_images`, and taps["tokens"], from the same forward.

        Raises:
            UsageError: this model has no such tokens.
        """
        ...


class TextTeacher:
    """Base of teachers that read texts only: the `Teacher` protocol, with pictures refused.

    Such a model has no logit scale, and 1 is given for it; `image` is never used.
    """

    name: str
    logit_scale = 1.0
    logit_bias = 0.0
    image: ImageSpec = ImageSpec(size=224)

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """Always refused.

        Raises:
            UsageError: there is no image tower.
        """
        raise UsageError(
            f"pictures were given to teacher {self.name!r}, which reads texts only, so there is nothing to compare "
            "them with; use it in a recipe, for texts, or name a teacher with an image tower"
        )
