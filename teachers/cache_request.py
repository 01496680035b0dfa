"""What is asked of a teacher cache: whether it can be made, what from, and how many bytes it will take on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pocketvlm.data.augment import VIEW_NUMBERS, VIEW_VERSION, AugmentPolicy
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import Teacher, TeacherOutput, TextTeacher
from pocketvlm.teachers.cache_format import DTYPES, CacheInfo, digest_names
from pocketvlm.teachers.tokens import gray, token_shape
from pocketvlm.teachers.top_logits import TopLogits, logit_bytes


@dataclass(frozen=True)
class Cost:
    """Bytes that a cache will take. pictures, views, texts: counts; views of all pictures together.

    view: of one view (outputs and parameters). images, words: of all pictures (with names and hashes) and of all texts.
    """

    pictures: int
    views: int
    texts: int
    view: int
    images: int
    words: int

    @property
    def total(self) -> int:
        return self.images + self.words

    @classmethod
    def of(cls, info: CacheInfo, uids: Sequence[str], texts: Sequence[str]) -> Cost:
        """What these pictures and texts will take; the fixed part of a shard, some 400 bytes, is not counted."""
        size = DTYPES[info.dtype].itemsize
        drawn = 4 * VIEW_NUMBERS if info.policy is not None else 0
        view = size * (info.dim + info.feature_dim + info.token_grid**2 * info.token_dim) + drawn
        view += logit_bytes(info.top_logits, info.logit_count)
        # in the metadata a name stands in quotes and after a comma, a picture with its hash
        words = sum(_written(text) + size * (info.dim + info.text_feature_dim) for text in texts)
        names = sum(_written(uid) + 68 for uid in uids)
        views = len(uids) * info.views
        return cls(len(uids), views, len(texts), view, views * view + names, words)


def _written(name: str) -> int:
    return len(json.dumps(name, ensure_ascii=False).encode("utf-8", "surrogatepass")) + 2


def check_request(
    uids: Sequence[str],
    texts: Sequence[str],
    shards: Mapping[str, Any],
    views: int,
    policy: AugmentPolicy | None,
    dtype: str,
) -> None:
    """Raises UsageError where nothing is asked for, or what cannot be made."""
    if not uids and not texts and not shards:
        raise UsageError("a teacher cache of no images and no texts was asked for; give at least one of them")
    if uids and shards:
        raise UsageError("samples and data shards were both given; give the samples of the shards, or a list, not both")
    if len(set(uids)) != len(uids):
        seen: set[str] = set()
        twice = next(u for u in uids if u in seen or seen.add(u))  # type: ignore[func-returns-value]
        raise UsageError(f"uid {twice!r} occurs more than once, so one image would overwrite another; make uids unique")
    if views < 1 or (views > 1 and policy is None):
        raise UsageError(
            f"views={views} with policy={policy!r} cannot be drawn; use views=1, or give an AugmentPolicy too"
        )
    if dtype not in DTYPES:
        raise UsageError(f"cache dtype {dtype!r} is not one of {sorted(DTYPES)}; bfloat16 halves the disk space")


def describe(
    teacher: Teacher,
    *,
    views: int,
    policy: AugmentPolicy | None,
    seed: int,
    dtype: Literal["float32", "bfloat16"],
    size: int,
    grid: int,
    features: bool,
    pictures: bool,
    samples: str,
    texts: str,
    any_text: bool,
    logits: TopLogits | None = None,
) -> CacheInfo:
    """What the cache will be made from.

    pictures, any_text: whether it will hold any. samples, texts: their digests; the rest as in `CacheBuild`.

    Raises:
        UsageError: towers of the teacher that do not fit each other, or tokens that it lacks.
    """
    # widths are asked of the teacher itself, on one gray picture and one word
    blind = isinstance(teacher, TextTeacher) and not pictures
    image = TeacherOutput(torch.zeros(1, teacher.dim)) if blind else teacher.encode_images(gray(teacher))
    token_dim = token_shape(teacher, grid)[1] if grid else 0
    text = teacher.encode_texts(["a"]) if any_text else None
    if image.embedding.shape[-1] != teacher.dim or (text is not None and text.embedding.shape[-1] != teacher.dim):
        widths = [image.embedding.shape[-1], text.embedding.shape[-1] if text is not None else teacher.dim]
        raise UsageError(
            f"teacher {teacher.name!r} says dim {teacher.dim} but gives image and text widths {widths}; "
            "cosines between them would be meaningless, so fix the teacher's projection"
        )
    return CacheInfo(
        name=teacher.name,
        fingerprint=teacher.fingerprint,
        space_id=teacher.space_id,
        dim=teacher.dim,
        feature_dim=0 if image.features is None or not features else image.features.shape[-1],
        text_feature_dim=0 if text is None or text.features is None or not features else text.features.shape[-1],
        logit_scale=teacher.logit_scale,
        logit_bias=teacher.logit_bias,
        image=teacher.image,
        views=views,
        policy=None if policy is None else {**policy.to_dict(), "view_version": VIEW_VERSION},
        seed=seed,
        dtype=dtype,
        shard_size=size,
        samples=samples,
        texts=texts,
        licences=teacher.licences,
        token_grid=grid,
        token_dim=token_dim,
        top_logits=0 if logits is None else logits.top,
        logit_count=0 if logits is None else len(logits.texts),
        logit_texts="" if logits is None else digest_names(logits.texts),
    )
