"""Learning from a teacher with another tokenizer, the simple way: spans of the answer that both cut at the same places.

Both models are given the same answer. Where both have just finished a character, they agree on a boundary; between two
such boundaries lies a span, of one token or more of each. A model's probability of a span is the product of its tokens'
probabilities, each given the true text before. What is compared is that one number a span: "this text or any other".

Ours, in the spirit of chunk-level alignment. It says nothing about which other texts the teacher thinks likely, and a
span's probability is that of one way of cutting it, not of all. Merging all other outcomes into one never enlarges a
KL divergence, so for the distributions over token sequences of a span this is a lower bound of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.errors import UsageError

# log-probabilities are kept below minus this, so that "any other text" always has some; float32 resolves it
_CERTAIN = 1e-6


class Spans(NamedTuple):
    """Of a batch of answers. student, teacher: int64 [S] and [T], for each token the number of its span; number: of
    spans."""

    student: Tensor
    teacher: Tensor
    number: int

    def to(self, device: torch.device) -> Spans:
        return Spans(self.student.to(device), self.teacher.to(device), self.number)


def shared_spans(student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]]) -> Spans:
    """Spans of answers from how many characters are complete after each token (`teachers.vlm.base.completed`).

    The end of the answer, one past its characters, is the same for both, so that every token has a span and every span
    has tokens of both.

    Args:
        student, teacher: for each answer the ends of its tokens, never falling.

    Raises:
        UsageError: another number of answers, one without tokens, ends that fall, or answers of different lengths.
    """
    if len(student) != len(teacher):
        raise UsageError(
            f"{len(student)} answers of a student were to be aligned with {len(teacher)} of a teacher; spans would be "
            "of other texts, so give the same answers in the same order"
        )
    found: tuple[list[int], list[int]] = ([], [])
    count = 0
    for own, other in zip(student, teacher):
        _check_ends(own, other)
        shared = sorted(set(own) & set(other))
        for side, ends in zip(found, (own, other)):
            span = 0
            for end in ends:
                side.append(count + span)
                # the first token with this end closes the span; those that add nothing to it begin the next one
                span += end == shared[span]
        count += len(shared)
    return Spans(torch.tensor(found[0]), torch.tensor(found[1]), count)


def _check_ends(own: Sequence[int], other: Sequence[int]) -> None:
    if not own or not other or own[-1] != other[-1] or any(list(ends) != sorted(ends) for ends in (own, other)):
        raise UsageError(
            f"token ends {list(own)[-3:]} of a student were to be aligned with {list(other)[-3:]} of a teacher; they "
            "are not of one text, whose ends rise to one past its characters, so give both models the same answer"
        )


def token_log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """[N] log-probabilities, in nats, of tokens `ids` [N] under logits [N, V]; float32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(wide, ids, reduction="none")


def aligned_divergence(*, student: Tensor, teacher: Tensor, spans: Spans) -> Tensor:
    """Mean over the spans of KL(teacher || student) between two outcomes, in nats; a scalar.

    With p and q the teacher's and the student's probability of a span, exp of the sum of the log-probabilities of its
    tokens: p log(p / q) + (1 - p) log((1 - p) / (1 - q)). Sums above -1e-6 count as -1e-6. The teacher's side
    never receives a gradient.

    Args:
        student, teacher: log-probabilities [S] and [T] of the answers' tokens (`token_log_probabilities`), in float32
            or wider. spans: of the same answers in the same order.

    Raises:
        UsageError: another number of tokens than the spans were made of.
    """
    if len(student) != len(spans.student) or len(teacher) != len(spans.teacher) or not spans.number:
        raise UsageError(
            f"log-probabilities of {len(student)} and {len(teacher)} tokens were given for spans of "
            f"{len(spans.student)} and {len(spans.teacher)}; they would be summed over other texts, so make spans and "
            "log-probabilities from the same answers"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = _summed(student.to(wide), spans.student, spans.number)
    log_p = _summed(teacher.detach().to(wide), spans.teacher, spans.number)
    other_p, other_q = torch.log(-torch.expm1(log_p)), torch.log(-torch.expm1(log_q))
    return (log_p.exp() * (log_p - log_q) + other_p.exp() * (other_p - other_q)).mean()


def _summed(values: Tensor, spans: Tensor, count: int) -> Tensor:
    total = torch.zeros(count, dtype=values.dtype, device=values.device)
    return total.index_add(0, spans.to(values.device), values).clamp(max=-_CERTAIN)
