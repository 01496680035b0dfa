"""A teacher's distribution over a list of texts, cut to its largest entries: what a cache keeps of it for each view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.device import full_float32

# texts that a teacher reads at a time
_TEXTS = 256


@dataclass(frozen=True)
class TopLogits:
    """What is asked for: the `top` largest entries of the distribution over `texts`, from 1 and fewer than all.

    Raises:
        UsageError: an empty text, one given twice, or another number of entries.
    """

    texts: tuple[str, ...]
    top: int

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for text in self.texts:
            if not text.strip() or text in seen:
                what = "twice" if text in seen else "among them, which is empty"
                raise UsageError(
                    f"the texts of a teacher's logits have {text!r} {what}, so a part of the distribution would mean "
                    "nothing; give every text once"
                )
            seen.add(text)
        if not 1 <= self.top < len(self.texts):
            raise UsageError(
                f"the {self.top} largest of a teacher's logits over {len(self.texts)} texts were asked for, and there "
                "must be a rest; ask for 1 at least, and for fewer than there are texts"
            )


def text_rows(teacher: Teacher, texts: Sequence[str]) -> Tensor:
    """[N, D] float32 unit vectors of the texts, on the teacher's device."""
    parts = [
        teacher.encode_texts(texts[start : start + _TEXTS]).embedding.float() for start in range(0, len(texts), _TEXTS)
    ]
    return torch.cat(parts)


def log_shares(image: Tensor, texts: Tensor, scale: float) -> Tensor:
    """[B, N] logarithms of softmax_n(scale v.s_n), of unit vectors v [B, D] and s [N, D]; float32.

    A teacher's logit bias is the same for all texts and changes nothing.
    """
    with full_float32():
        return (scale * image.float() @ texts.to(image.device).T).log_softmax(dim=1)


def largest(shares: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Of `log_shares` [B, N], in a form that keeps the most in half precision.

    Shares and not logits, because their logarithms are near 0 where the mass is, and float16 is finest there: a logit
    of 25 would be rounded by up to 0.008, a share of one half by 0.0002 of itself.

    Returns:
        float16 [B, top + 1], the logarithms of the largest shares, falling, and of the sum of all others; and int64
        [B, top], which texts these are.
    """
    kept, ids = shares.topk(top, dim=1)
    rest = shares.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([kept, rest], dim=1).half(), ids


def agreement(kept: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """[B] cosine between the square roots of two distributions (their Bhattacharyya coefficient), 1 where equal.

    kept [B, top + 1] and ids [B, top] as of `largest`, against `log_shares` [B, N] cut at the same texts.
    """
    rest = shares.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
    told = torch.cat([shares.gather(1, ids), rest], dim=1).double()
    return F.cosine_similarity((kept.double() / 2).exp(), (told / 2).exp(), dim=1)


def logit_bytes(top: int, texts: int) -> int:
    """Bytes that `top` of so many texts take for one view, the rest included; 0 for none."""
    return 2 * (top + 1) + id_dtype(texts).itemsize * top if top else 0


def id_dtype(texts: int) -> torch.dtype:
    """The narrowest whole numbers that count so many texts."""
    return torch.uint16 if texts <= 2**16 else torch.int32
