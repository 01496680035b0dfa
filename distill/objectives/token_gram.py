"""Relations of the places inside one picture: Gram matrices of token maps follow the teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import (
    BatchObjective,
    Widths,
    choice,
    cross_entropy_rows,
    positive,
    tap_of,
    unit,
    whole_number,
)
from pocketvlm.edge.errors import UsageError


def gram(tokens: Tensor, others: Tensor | None = None) -> Tensor:
    """[B, N, W] -> [B, N, N], the dot products of a picture's tokens (with `others` on the right side)."""
    return tokens @ (tokens if others is None else others).transpose(1, 2)


def relation_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the two Gram matrices taken as vectors, mean over pictures; [B, N, W_S], [B, N, W_T]."""
    return 1 - (unit(gram(student).flatten(1)) * unit(gram(teacher).flatten(1))).sum(dim=-1).mean()


def spatial_correlation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of softmax(scaled G^S / tau) under softmax(scaled G^T / tau), mean over rows and pictures.

    Each row of a Gram matrix is scaled to 0..1 by its smallest and largest entry; the right side of G^S is detached.
    """
    ours, theirs = minmax_rows(gram(student, student.detach())), minmax_rows(gram(teacher))
    return cross_entropy_rows(theirs / temperature, ours / temperature)


def minmax_rows(x: Tensor) -> Tensor:
    """Rows to 0..1; a row of entries that are equal up to rounding becomes 0, with no gradient."""
    low, high = x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)
    flat = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs())
    return ((x - low) / (high - low).masked_fill(flat, 1.0)).masked_fill(flat, 0.0)


def common_tokens(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Token maps [B, N, W] or [B, C, H, W] of both models as [B, N, W] of one N.

    Equal numbers of tokens are taken as they are. Otherwise both are averaged (adaptive average pooling, exact where
    sizes divide) to the smaller height and width; [B, N, W] counts as a square grid.

    Raises:
        UsageError: another shape, tokens that are no grid, or a single token.
    """
    maps = [(student, _grid(student, "student")), (teacher, _grid(teacher, "teacher"))]
    counts = [x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3] for x, _ in maps]
    known = [grid for x, grid in maps if x.ndim == 4]
    if counts[0] != counts[1] or (len(known) == 2 and known[0] != known[1]):
        for (_, grid), count, side in zip(maps, counts, ("student", "teacher")):
            if grid is None:
                raise UsageError(
                    f"objective 'token-gram' was given {counts[0]} student and {counts[1]} teacher tokens, and the "
                    f"{side}'s {count} are no square grid; places could not be matched, so tap a map [B, C, H, W] or "
                    f"drop class and register tokens with {side}_prefix"
                )
        (height, width), (other_height, other_width) = (grid for _, grid in maps if grid is not None)
        size = (min(height, other_height), min(width, other_width))
        maps = [(F.adaptive_avg_pool2d(_as_map(x, grid), size), size) for x, grid in maps if grid is not None]
    ours, theirs = (x if x.ndim == 3 else x.flatten(2).transpose(1, 2) for x, _ in maps)
    if ours.shape[1] < 2:
        raise UsageError(
            "objective 'token-gram' was left with one token for each picture; it has no relations and the loss would "
            "be constant, so tap an earlier layer"
        )
    return ours, theirs


def _grid(x: Tensor, side: str) -> tuple[int, int] | None:
    if x.ndim not in (3, 4):
        raise UsageError(
            f"objective 'token-gram' was given {side} tokens of shape {list(x.shape)} but takes [B, N, W] or "
            "[B, C, H, W]; there are no places to compare, so tap a layer before the pooling"
        )
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    edge = math.isqrt(x.shape[1])
    return (edge, edge) if edge * edge == x.shape[1] else None


def _as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    return x if x.ndim == 4 else x.transpose(1, 2).unflatten(2, grid)


class TokenGram(BatchObjective):
    """token-gram: the places of a picture are alike for the student where they are alike for the teacher.

    Formula: with X [N, W_S], Y [N, W_T] the tokens of a picture, G = X X^T and T = Y Y^T,
    variant "rdist" (default): L = mean_pictures ( 1 - <G, T> / (|G|_F |T|_F) );
    variant "scd": with G' = X sg(X)^T (one side detached), u(.) each *row* scaled to 0..1 by its minimum and maximum (0
        for a row that is constant up to rounding),
        L = mean over rows and pictures of CE( softmax(u(T) / tau), softmax(u(G') / tau) ), tau = `temperature` (0.2).
    Direction: the teacher is the target; the minimum of "scd" is the teacher's entropy, not 0; "rdist" lies in 0..2.
    Inputs: student.taps[`student_tap`], teacher.taps[`teacher_tap`]: [B, N, W] or [B, C, H, W], any widths; the first
    `student_prefix` and `teacher_prefix` tokens of [B, N, W] (class, registers) are dropped. Where the numbers of
    tokens differ, both are average-pooled to the smaller grid. Output: {"token-gram"}. Reduction: mean over pictures,
    captioned or not; a batch of one is fine. normalize=True scales each token to length 1 first.
    "rdist" is uncentred and scale-free: where most entries are positive it starts near 0 and its gradients are weak.
    Paper: "rdist" is L_rel of LLaVA-KD (2410.16236), there on a language model's visual tokens with weight 0.5 (as in
    a note of the paper; its repository has no training script, and its helper takes the *cosine* self-similarity of
    connector outputs: normalize=True). "scd" is SCD-style, after a re-implementation of 2504.02328 (UniRefiner), since
    the official repository has no code; there within sampled regions.
    Ours: the pooling to a common grid, the whole picture as one region for "scd", the mean over pictures for "rdist".
    Related: `gram` compares pictures with each other, this compares places within one. Cost: B N^2 numbers for each.
    In a recipe, `student_tap` names a part of the image tower ("tokens": its last map), and the teacher's map is the
    one that its cache keeps (`teacher.token_grid`), without class and register tokens.
    """

    name = "token-gram"
    formula = "Gram matrices of token maps: `rdist`, `scd`"
    paper = "LLaVA-KD, 2410.16236; SCD-style, 2504.02328"
    needs = Needs(taps=("student_tap", "teacher_tap"))

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        student_tap: str = "tokens",
        teacher_tap: str = "tokens",
        variant: str = "rdist",
        temperature: float = 0.2,
        normalize: bool = False,
        student_prefix: int = 0,
        teacher_prefix: int = 0,
    ) -> None:
        super().__init__()
        self.taps = {"student": student_tap, "teacher": teacher_tap}
        self.prefixes = {
            "student": whole_number("student_prefix", student_prefix, 0),
            "teacher": whole_number("teacher_prefix", teacher_prefix, 0),
        }
        self.variant = choice("variant", variant, ("rdist", "scd"))
        self.temperature = positive("temperature", temperature) or 1.0
        self.normalize = normalize

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        ours, theirs = common_tokens(self._tokens(student, "student"), self._tokens(teacher, "teacher"))
        if self.normalize:
            ours, theirs = unit(ours), unit(theirs)
        if self.variant == "scd":
            return {"token-gram": spatial_correlation(ours, theirs, self.temperature)}
        return {"token-gram": relation_cosine(ours, theirs)}

    def _tokens(self, outputs: Outputs, side: str) -> Tensor:
        prefix = self.prefixes[side]
        tokens = tap_of(self.name, outputs, side, self.taps[side])
        if tokens.ndim == 3 and prefix >= tokens.shape[1]:
            raise UsageError(
                f"objective 'token-gram' was told to drop the first {prefix} of the {side}'s {tokens.shape[1]} tokens; "
                f"none would be left to compare, so lower {side}_prefix to the number of class and register tokens"
            )
        return tokens[:, prefix:] if tokens.ndim == 3 else tokens
