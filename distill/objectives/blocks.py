"""Losses over a similarity matrix that is not held: made in blocks of rows, and made again in backward.

A matrix of P x P similarities of float32 takes 4 GiB at 32,768 rows, and autograd keeps several of them. Here a block
of R rows is made at a time, so that memory is a few R x P blocks and vectors of P. What a softmax over columns needs of
the other rows is a running maximum and a sum relative to it (the streaming log-sum-exp of Milakov and Gimelshein 2018,
1805.02867); the backward makes each block again from the embeddings and from the finished log-sum-exps. One pass serves
both directions of a symmetric loss: 4 P^2 D multiply-adds for forward and backward together, where the held matrix
takes 3 P^2 D. Values and gradients are those of the held matrix up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_FULL: ContextVar[int] = ContextVar("largest_matrix", default=64 << 20)
_BLOCK: ContextVar[int] = ContextVar("largest_block", default=16 << 20)


@contextmanager
def similarity_bytes(full: int, block: int | None = None) -> Iterator[None]:
    """Inside, matrices of more than `full` bytes are made in blocks of about `block` (default a quarter of `full`)."""
    tokens = _FULL.set(full), _BLOCK.set(full // 4 if block is None else block)
    try:
        yield
    finally:
        _FULL.reset(tokens[0])
        _BLOCK.reset(tokens[1])


@dataclass(frozen=True)
class Similarity:
    """scale * queries @ keys.T, [P, P], not yet made. queries, keys: [P, D]; scale: scalar."""

    queries: Tensor
    keys: Tensor
    scale: Tensor | float

    @property
    def held(self) -> bool:
        """Whether it is small enough to be made whole."""
        return len(self.queries) * len(self.keys) * self.queries.element_size() <= _FULL.get()

    @property
    def T(self) -> Similarity:
        return Similarity(self.keys, self.queries, self.scale)

    def whole(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows."""
        return self.scale * self.queries[rows] @ self.keys.T

    def spans(self) -> list[slice]:
        """Rows of each block."""
        count, row = len(self.queries), len(self.keys) * self.queries.element_size()
        step = max(1, _BLOCK.get() // max(1, row))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def summed_blocks(loss: Callable[[Tensor, slice], Tensor], logits: Similarity) -> Tensor:
    """Sum of `loss(logits[rows], rows)` over blocks of rows; each is made again in backward."""
    total = logits.queries.new_zeros(())
    for rows in logits.spans():

        def one(queries: Tensor, keys: Tensor, scale: Tensor | float, rows: slice = rows) -> Tensor:
            return loss(Similarity(queries, keys, scale).whole(), rows)

        part = checkpoint(
            one, logits.queries[rows], logits.keys, logits.scale, use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return total


@dataclass(frozen=True)
class Matches:
    """The target is 1 at equal numbers: one-hot on the diagonal, or as `duplicates` says (see `Contrastive`)."""

    group: Tensor | None
    duplicates: str

    def prepared(self) -> Matches:
        """Without groups where they change nothing."""
        group = self.group
        if group is None or self.duplicates == "negatives" or len(group.unique()) == len(group):
            return Matches(None, self.duplicates)
        return self

    def same(self, rows: slice) -> Tensor | None:
        return None if self.group is None else self.group[rows, None] == self.group[None, :]


@dataclass(frozen=True)
class Taught:
    """The target is the softmax of the teacher's matrix; `entropy` makes cross-entropy a KL divergence."""

    logits: Similarity
    entropy: bool


def softmax_loss(logits: Similarity, target: Matches | Taught, *, both_ways: bool) -> Tensor:
    """Cross-entropy of softmax(logits) with `target`, mean over rows; with `both_ways`, the mean of that and the same
    for columns (of the teacher's matrix too).

    Gradients reach queries, keys and scale of `logits`, once (it has no second derivative).
    """
    if isinstance(target, Matches):
        target = target.prepared()
    return _SoftmaxLoss.apply(logits.queries, logits.keys, logits.scale, target, both_ways, logits.spans())


class _Columns:
    """Running log-sum-exp of each column, and sums of `values` under its softmax."""

    def __init__(self, like: Tensor) -> None:
        # finite, so that a column that is left out of a whole block adds exp(-inf - lowest) = 0, and not a NaN
        self.top = torch.full_like(like, torch.finfo(like.dtype).min)
        self.mass, self.weighted = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, block: Tensor, values: Tensor | None = None) -> None:
        top = torch.maximum(self.top, block.amax(dim=0))
        fade = (self.top - top).exp()
        mass = (block - top).exp_()
        self.mass.mul_(fade).add_(mass.sum(dim=0))
        if values is not None:
            self.weighted.mul_(fade).add_(mass.mul_(values).sum(dim=0))
        self.top = top

    def finished(self) -> tuple[Tensor, Tensor]:
        """(log-sum-exp, expectation of the values)."""
        return self.top + self.mass.log(), self.weighted / self.mass


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor | float,
        target: Matches | Taught,
        both_ways: bool,
        spans: list[slice],
    ) -> Tensor:
        logits, count = Similarity(queries, keys, scale), len(queries)
        row_lse, column = queries.new_empty(count), _Columns(queries[:, 0]) if both_ways else None
        # of the target: log-sum-exps of a teacher, or how many columns are right for a row
        their_row, their_column = None, None
        if isinstance(target, Taught):
            their_row = queries.new_empty(count)
            their_column = _Columns(queries[:, 0]) if both_ways else None
        own = queries.new_zeros(count)  # what the target expects of the row's logits (for KL: less the teacher's)
        right = queries.new_ones(count)
        if isinstance(target, Matches):
            own = (scale * queries * keys).sum(dim=-1)
        for rows in spans:
            block = logits.whole(rows)
            if isinstance(target, Taught):
                assert their_row is not None, "made above"
                theirs = target.logits.whole(rows)
                row_lse[rows] = block.logsumexp(dim=1)
                if column is not None:
                    column.add(block)
                gain = block.sub_(theirs) if target.entropy else block
                their_row[rows] = theirs.logsumexp(dim=1)
                if their_column is not None:
                    their_column.add(theirs, gain)
                own[rows] = theirs.sub_(their_row[rows, None]).exp_().mul_(gain).sum(dim=1)
                continue
            same = target.same(rows)
            if same is not None and target.duplicates == "positives":
                right[rows] = same.sum(dim=1).to(right.dtype)
                own[rows] = (block * same).sum(dim=1)
            elif same is not None:
                block.masked_fill_(_without_own(same, rows), float("-inf"))
            row_lse[rows] = block.logsumexp(dim=1)
            if column is not None:
                column.add(block)

        ctx.target, ctx.spans = target, spans
        ctx.scale = scale.detach() if isinstance(scale, Tensor) else scale
        # a matching target is symmetric, so what it expects of rows and of columns has the same sum
        value = row_lse.mean() - (own / right).mean()
        column_lse, their_column_lse = None, None
        if isinstance(target, Taught) and target.entropy:
            assert their_row is not None, "made above"
            value = value - their_row.mean()
        if column is not None:
            column_lse, _ = column.finished()
            if their_column is None:
                value = (value + column_lse.mean() - (own / right).mean()) / 2
            else:
                assert isinstance(target, Taught), "only a teacher has columns"
                their_column_lse, expected = their_column.finished()
                across = (column_lse - expected).mean()
                value = (value + (across - their_column_lse.mean() if target.entropy else across)) / 2
        ctx.save_for_backward(queries, keys, row_lse, column_lse, their_row, their_column_lse, right)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, row_lse, column_lse, their_row, their_column, right = ctx.saved_tensors
        logits, target, scale = Similarity(queries, keys, ctx.scale), ctx.target, ctx.scale
        ways = 1 if column_lse is None else 2
        to_queries = torch.empty_like(queries)
        to_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        to_scale = queries.new_zeros(())
        for rows in ctx.spans:
            block = logits.whole(rows)
            same = target.same(rows) if isinstance(target, Matches) else None
            if same is not None and target.duplicates == "ignore":
                block.masked_fill_(_without_own(same, rows), float("-inf"))
            slope = _softmaxes(block, row_lse[rows], column_lse)
            if isinstance(target, Taught):
                slope -= _softmaxes(target.logits.whole(rows), their_row[rows], their_column)
            elif same is not None and target.duplicates == "positives":
                slope.addcmul_(same.to(slope.dtype), (ways / right[rows])[:, None], value=-1)
            else:
                slope.diagonal(rows.start).sub_(ways)
            slope *= upstream / (ways * len(queries))
            part = slope @ keys
            to_scale += (part * queries[rows]).sum()
            to_queries[rows] = scale * part
            if to_keys is not None:
                to_keys.addmm_(slope.T, scale * queries[rows])
        wanted = ctx.needs_input_grad
        return to_queries if wanted[0] else None, to_keys, to_scale if wanted[2] else None, None, None, None


def _softmaxes(block: Tensor, row_lse: Tensor, column_lse: Tensor | None) -> Tensor:
    """The row softmax, or the sum of it and the column softmax; `block` is overwritten."""
    if column_lse is None:
        return block.sub_(row_lse[:, None]).exp_()
    found = (block - row_lse[:, None]).exp_()
    return found.add_(block.sub_(column_lse).exp_())


def _without_own(same: Tensor, rows: slice) -> Tensor:
    """Rows' twins alone; `same` is overwritten."""
    same.diagonal(rows.start).fill_(False)
    return same
