"""What a generative student can learn from a generative teacher of the same vocabulary: LLaVA-KD's distances.

LLaVA-KD (arXiv:2410.16236) adds to the next-token loss 1.0 x the divergence of response tokens, 1.0 x that of visual
tokens (`token_divergence` of the logits at the picture's places) and 0.5 x `relation_distance`. Its formulas sum the
divergences over tokens; here they are means, so that a weight means the same for short and long answers. The teacher's
side never receives a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.common import kl_rows
from pocketvlm.edge.errors import UsageError, unknown_name

Direction = Literal["forward", "reverse", "js"]
DIRECTIONS = ("forward", "reverse", "js")


def token_divergence(
    *, student: Tensor, teacher: Tensor, direction: Direction = "forward", temperature: float = 1.0
) -> Tensor:
    """Divergence of next-token distributions, mean over the tokens, in nats; a scalar.

    With p = softmax(teacher / T) and q = softmax(student / T) over the vocabulary: "forward" is KL(p || q), LLaVA-KD's,
    "reverse" KL(q || p), "js" KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2. There is no factor T^2.

    Args:
        student, teacher: logits [N, V] of the same tokens, computed in float32 or wider. temperature: T above 0.

    Raises:
        UsageError: another vocabulary or other tokens, none at all, or a temperature that is not above 0.
        UnknownNameError: no such direction.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"logits {tuple(student.shape)} of a student were to be compared with {tuple(teacher.shape)} of a teacher; "
            "entry i would mean another token, so use a teacher with the student's tokenizer and the same answers, or "
            "what learns across tokenizers: distill.vlm.aligned or distill.vlm.genrecal"
        )
    if direction not in DIRECTIONS:
        raise unknown_name("direction of a divergence", direction, DIRECTIONS)
    if not len(student) or temperature <= 0:
        raise UsageError(
            f"a divergence of {len(student)} tokens at temperature {temperature} is no number; give one token or more "
            "and a temperature above 0"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    q = F.log_softmax(student.to(wide) / temperature, dim=-1)
    p = F.log_softmax(teacher.detach().to(wide) / temperature, dim=-1)
    if direction == "forward":
        return kl_rows(p, q)
    if direction == "reverse":
        return kl_rows(q, p)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl_rows(p, middle) + kl_rows(q, middle)) / 2


def kept_divergence(*, student: Tensor, ids: Tensor, logs: Tensor, direction: Direction = "forward") -> Tensor:
    """`token_divergence` from the k largest of a teacher's shares and the rest of its mass, mean over the tokens.

    Both distributions are over k + 1 outcomes: the k tokens, and any other one. Merging outcomes never enlarges a
    divergence of these kinds, so this is a lower bound of the whole one, and the whole one where k = V.

    Args:
        student: logits [N, V]. ids: int [N, k], the teacher's largest. logs: [N, k + 1], their log-shares and that of
            all others (`teachers.top_logits.largest`).

    Raises:
        UsageError: other tokens, none at all, or an id outside the vocabulary. UnknownNameError: no such direction.
    """
    if len(student) != len(ids) or ids.shape[1] + 1 != logs.shape[1] or len(logs) != len(ids) or not len(ids):
        raise UsageError(
            f"logits of {len(student)} tokens were to be compared with {len(ids)} kept rows of {ids.shape[1]} ids and "
            f"{logs.shape[1]} log-shares; row i must be of token i and hold one share more than ids, so keep the "
            "teacher's answers of this very list"
        )
    if direction not in DIRECTIONS:
        raise unknown_name("direction of a divergence", direction, DIRECTIONS)
    ids = ids.long()
    if int(ids.max()) >= student.shape[1]:
        raise UsageError(
            f"a kept row names token {int(ids.max())} of a student with {student.shape[1]}; the teacher's vocabulary "
            "is another one, so use a teacher with the student's tokenizer"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    whole = F.log_softmax(student.to(wide), dim=-1)
    q, p = whole.gather(1, ids), logs.detach().to(wide)
    if ids.shape[1] < student.shape[1]:
        rest = whole.scatter(1, ids, -torch.inf).logsumexp(dim=1, keepdim=True)
        q = torch.cat([q, rest], dim=1)
    else:
        p = p[:, :-1]  # nothing is left over, and the gradient of an empty rest is no number
    if direction == "forward":
        return _mean_kl(p, q)
    if direction == "reverse":
        return _mean_kl(q, p)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (_mean_kl(p, middle) + _mean_kl(q, middle)) / 2


def _mean_kl(p: Tensor, q: Tensor) -> Tensor:
    """Mean over rows of sum exp(p) (p - q), where an outcome without mass in p counts nothing."""
    some = p > -torch.inf
    difference = torch.where(some, p, 0.0) - torch.where(some, q, 0.0)
    return (torch.where(some, p.exp(), 0.0) * difference).sum(dim=1).mean()


def relation_distance(*, student: Tensor, teacher: Tensor) -> Tensor:
    """1 - <R_S, R_T> / (|R_S| |R_T|), mean over the pictures, in 0..2; R = Y Y^T of the visual tokens of one picture.

    Not centred, as in the paper, so that tokens with much in common start near 0 and push little. Widths may differ.

    Args:
        student, teacher: hidden states of the visual tokens, [B, K, W] and [B, K, W'], in float32 or wider.

    Raises:
        UsageError: another number of pictures or of visual tokens.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise UsageError(
            f"visual tokens {tuple(student.shape[:2])} (pictures, tokens) of a student were to be related as "
            f"{tuple(teacher.shape[:2])} of a teacher; relation i, j would be of other places, so use towers with the "
            "same grid"
        )
    wide = torch.promote_types(student.dtype, torch.float32)
    own, wanted = student.to(wide), teacher.detach().to(wide)
    relations = (own @ own.transpose(1, 2)).flatten(1)
    return (1 - F.cosine_similarity(relations, (wanted @ wanted.transpose(1, 2)).flatten(1), dim=1)).mean()
