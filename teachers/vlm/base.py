"""The protocol of generative teachers, and what a white box shows of one answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from pocketvlm.edge.errors import UsageError

# a question and its answer
Pair = tuple[str, str]


@dataclass(frozen=True)
class Scored:
    """One picture with a question and an answer, as the teacher sees it; detached, float32 and int64, on its device.

    ids: [A], the answer's tokens, the last one the end of the answer.
    ends: how many characters of the answer are complete once each token is written (`completed`).
    logits: [A, V], the distributions that predict `ids`.
    hidden: [L, W], last hidden states of picture, question and answer but its last token; the last A of them are what
    `logits` are read from (`VlmTeacher.head`). visual: [K], the picture's places in `hidden`.
    """

    ids: Tensor
    ends: tuple[int, ...]
    logits: Tensor
    hidden: Tensor
    visual: Tensor

    @property
    def visual_hidden(self) -> Tensor:
        """[K, W]."""
        return self.hidden[self.visual]

    @property
    def question_hidden(self) -> Tensor:
        """[L - A, W], of all that stands before the place that predicts the first token of the answer."""
        return self.hidden[: len(self.hidden) - len(self.ids)]

    @property
    def answer_hidden(self) -> Tensor:
        """[A, W], of the places that predict the answer."""
        return self.hidden[len(self.hidden) - len(self.ids) :]


@runtime_checkable
class VlmTeacher(Protocol):
    """A frozen model that answers questions about pictures.

    name: as given by the user. fingerprint: sha256 hex over weights, prompt, preprocessing and tokenizer.
    vocabulary: `vocabulary_id` of its tokenizer; equal ones mean the same token by the same number.
    vocab_size, width: V of its logits, W of its hidden states.
    licences: (what, licence, attribution) rows that travel with anything made from it.
    """

    name: str
    fingerprint: str
    vocabulary: str
    vocab_size: int
    width: int
    licences: tuple[tuple[str, str, str], ...]

    def answer(self, pixels: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """One greedy answer for each picture, uint8 [N, H, W, 3] (RGB), and prompt."""
        ...

    def read(self, pixels: Tensor, pairs: Sequence[Pair]) -> list[Scored]:
        """What it makes of each picture, uint8 [N, H, W, 3] (RGB), with its question and answer."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] to logits [..., V]; gradients pass through to `hidden`."""
        ...


def vocabulary_id(pieces: Mapping[str, int]) -> str:
    """sha256 hex over every token with its number.

    How a text is cut into them may still differ; the same token has the same number, which is what losses over
    distributions need.
    """
    rows = sorted((number, piece) for piece, number in pieces.items())
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def completed(offsets: Sequence[tuple[int, int]], length: int) -> tuple[int, ...]:
    """How many characters of a text of `length` are complete once each of its tokens is written, and its end after.

    Never falling. A character is complete with the last token that has a part of it: of the three bytes of one, the
    first two add nothing. The end of the text, a token of its own, counts one more than there are characters.

    Args:
        offsets: each token's first character and the one behind its last.
    """
    ends: list[int] = []
    ahead = length
    for first, end in reversed(offsets):
        ends.append(max(min(end, ahead), 0))
        ahead = min(ahead, first)
    return (*reversed(ends), length + 1)


def check_asked(pixels: Tensor, texts: Sequence[str], markers: Sequence[str] = ("<image>",)) -> None:
    """Refuse pictures and questions that do not belong together.

    Raises:
        UsageError: other pixels than uint8 [N, H, W, 3], another number of texts, none, an empty one, or one that
        holds one of a picture's markers, whose place the prompt decides.
    """
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or str(pixels.dtype) != "torch.uint8":
        raise UsageError(
            f"pictures were given as {pixels.dtype} {list(pixels.shape)}, and uint8 [N, H, W, 3] is expected; their "
            "values would be misread, so give what edge.preprocess makes"
        )
    if len(texts) != len(pixels) or not texts:
        raise UsageError(
            f"{len(texts)} questions were given for {len(pixels)} pictures; answers could not be told apart, so give "
            "one question for each picture"
        )
    for text in texts:
        if not text.strip():
            raise UsageError("a question is empty, so there is nothing to answer; write one for each picture")
        if found := [marker for marker in markers if marker in text]:
            raise UsageError(
                f"the question {text[:60]!r} holds {found[0]}, the picture's marker, which the prompt adds by itself; "
                "the picture would stand there twice, so take it out"
            )
