"""Teachers that have a real one's shapes and answer with random numbers, and pictures where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pocketvlm.data import Caption, DataSource, ImageRef, Sample
from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.counting import Seconds, Work, count, timing
from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.teachers.base import Teacher, TeacherOutput, TextTeacher, TokenTeacher
from pocketvlm.teachers.cache import TeacherCache


class StandIn:
    """A teacher of the same shapes that answers with random numbers, so that nothing waits for it."""

    licences: tuple[tuple[str, str, str], ...] = ()

    def __init__(self, facts: TeacherShapes) -> None:
        self.facts, self.name, self.dim = facts, facts.name, facts.dim
        self.fingerprint = f"{stable_hash(facts.name):016x}" * 4
        self.space_id = identity("rehearsal", self.fingerprint)
        self.logit_scale, self.logit_bias, self.image = 20.0, 0.0, ImageSpec(size=16)
        self._random = torch.Generator().manual_seed(0)

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        return self._output(len(pixels), self.facts.features)

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        return self._output(len(texts), self.facts.text_features)

    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        out = self.encode_images(pixels)
        tokens = self._draw(len(pixels), self.facts.tokens, self.facts.token_width)
        return TeacherOutput(out.embedding, out.features, {"tokens": tokens})

    def _output(self, rows: int, features: int) -> TeacherOutput:
        embedding = F.normalize(self._draw(rows, self.dim), dim=-1)
        return TeacherOutput(embedding, self._draw(rows, features) if features else None)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random)


class TextStandIn(StandIn, TextTeacher):
    """The same for a teacher of texts alone."""

    encode_images = TextTeacher.encode_images


@dataclass(frozen=True)
class TeacherShapes:
    """What is known of a teacher before it answers. dim, features, text_features, tokens, token_width: as
    `TeacherOutput` has them, 0 for none. picture, caption: work of one forward; None where there is
    none, or where the teacher could not be opened (`why`). parameters: of its modules.
    picture_s, caption_s: seconds of one, where they were timed. stored: its answers are on disk already.
    """

    name: str
    dim: int
    features: int = 0
    text_features: int = 0
    tokens: int = 0
    token_width: int = 0
    blind: bool = False
    picture: Work | None = None
    caption: Work | None = None
    parameters: int = 0
    picture_s: Seconds | None = None
    caption_s: Seconds | None = None
    stored: bool = False
    why: str = ""

    def stand_in(self) -> StandIn:
        return TextStandIn(self) if self.blind else StandIn(self)


def teacher_shapes(teacher: Teacher, texts: Sequence[str], *, tokens: bool, timed: bool) -> TeacherShapes:
    """Ask a loaded teacher for its shapes, on gray pictures and a few texts."""
    if isinstance(cache := getattr(teacher, "cache", None), TeacherCache):
        info = cache.info
        return TeacherShapes(
            teacher.name, teacher.dim, info.feature_dim, info.text_feature_dim, info.token_grid**2, info.token_dim,
            stored=True,
        )  # fmt: skip
    texts, blind = list(texts) or ["a picture"], isinstance(teacher, TextTeacher)
    said = teacher.encode_texts(texts)
    found: dict[str, Any] = {"text_features": 0 if said.features is None else said.features.shape[1]}
    found["caption"] = count(lambda: teacher.encode_texts(texts)).times(1 / len(texts))
    if not blind:
        size = teacher.image.size
        pixels = torch.full((8 if timed else 1, size, size, 3), 128, dtype=torch.uint8)
        one = teacher.encode_images(pixels[:1])
        found["features"] = 0 if one.features is None else one.features.shape[1]
        if tokens and isinstance(teacher, TokenTeacher):
            found["tokens"], found["token_width"] = teacher.encode_image_tokens(pixels[:1]).taps["tokens"].shape[1:]
        found["picture"] = count(lambda: teacher.encode_images(pixels[:1]))
        if timed:
            found["picture_s"] = timing(lambda: teacher.encode_images(pixels), 2).times(1 / len(pixels))
    if timed:
        found["caption_s"] = timing(lambda: teacher.encode_texts(texts), 2).times(1 / len(texts))
    modules = [part for part in vars(teacher).values() if isinstance(part, nn.Module)]
    found["parameters"] = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return TeacherShapes(teacher.name, teacher.dim, blind=blind, **found)


_NOUNS = ("boat", "bridge", "cat", "cloud", "dog", "house", "lake", "lamp", "road", "sea", "table", "tower", "train")


def made_up_pictures(count: int, *, captioned: float, size: int) -> DataSource:
    """Noise of `size` pixels as JPEG, a share of it with a caption of one word."""
    rng = np.random.Generator(np.random.PCG64(0))
    samples = []
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        file = BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        noun = str(rng.choice(_NOUNS))
        captions = (Caption(noun),) if index < captioned * count else ()
        samples.append(Sample(f"made-up-{index:09d}", ImageRef(data=file.getvalue()), captions, label=noun))
    return DataSource("made-up pictures", samples)
