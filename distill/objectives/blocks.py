"""Losses over a similarity matrix that is not held: made in blocks of rows, and made again in backward.

A matrix of P x P similarities of float32 takes 4 GiB at 32,768 rows, and autograd keeps several of them. Here a block
of R rows is made at a time, so that memory is a few R x P blocks and vectors of P. What a softmax over columns needs of
the other rows is a running maximum and a sum relative to it (the streaming log-sum-exp of Milakov and Gimelshein 2018,
1805.02867); the backward makes each block again from the embeddings and from the finished log-sum-exps. One pass serves
both directions of a symmetric loss: 4 P^2 D multiply-adds for forward and backward together, where the held matrix
takes 3 P^2 D. Values and gradients are those of the held matrix up to rounding.

Several ranks share the rows of a matrix out (`shared_rows`): each makes its own rows against all columns, and what the
columns need of all rows is joined by two small collectives of vectors of P. So the work of a rank falls with their
number for both directions, where a local loss over own rows and then over own columns makes two such strips. The value
is the whole loss on every rank. The gradient of a rank holds only what came through its own rows, times the number of
ranks: its *mean* over ranks is the gradient of the whole loss, as it is for a loss that every rank computes whole, so
that gathering and averaging (`distill.gather`) need not know which losses were shared out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

_FULL: ContextVar[int] = ContextVar("largest_matrix", default=64 << 20)
_BLOCK: ContextVar[int] = ContextVar("largest_block", default=16 << 20)
# rank, number of ranks, entries from which a matrix is shared out
_SHARE: ContextVar[tuple[int, int, int]] = ContextVar("share", default=(0, 1, 0))
# of 1,024 rows: of 256, two ranks on CPUs gain nothing, as blocks are made twice and the ranks must speak
LEAST_SHARED = 1 << 20


@contextmanager
def similarity_bytes(full: int, block: int | None = None) -> Iterator[None]:
    """Inside, matrices of more than `full` bytes are made in blocks of about `block` (default a quarter of `full`)."""
    tokens = _FULL.set(full), _BLOCK.set(full // 4 if block is None else block)
    try:
        yield
    finally:
        _FULL.reset(tokens[0])
        _BLOCK.reset(tokens[1])


@contextmanager
def shared_rows(rank: int, count: int, least: int | None = None) -> Iterator[None]:
    """Inside, the rows of matrices of `least` entries (default `LEAST_SHARED`) are shared out over `count` ranks.

    Every rank must compute the same losses over the same rows, in the default process group; only the forward speaks.
    """
    token = _SHARE.set((rank, count, LEAST_SHARED if least is None else least))
    try:
        yield
    finally:
        _SHARE.reset(token)


@dataclass(frozen=True)
class Similarity:
    """scale * queries @ keys.T, [P, N], not yet made. queries: [P, D]; keys: [N, D]; scale: scalar."""

    queries: Tensor
    keys: Tensor
    scale: Tensor | float

    @property
    def ranks(self) -> int:
        """How many share its rows out."""
        _, count, least = _SHARE.get()
        return count if len(self.queries) * len(self.keys) >= least else 1

    @property
    def part(self) -> slice:
        """The rows that this process makes."""
        rank, count, _ = _SHARE.get()
        size = len(self.queries)
        return slice(size * rank // count, size * (rank + 1) // count) if self.ranks > 1 else slice(0, size)

    @property
    def held(self) -> bool:
        """Whether it is small enough to be made whole, here."""
        return self.ranks == 1 and self._small

    @property
    def _small(self) -> bool:
        rows = self.part
        return (rows.stop - rows.start) * len(self.keys) * self.queries.element_size() <= _FULL.get()

    @property
    def T(self) -> Similarity:
        return Similarity(self.keys, self.queries, self.scale)

    def whole(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows."""
        return self.scale * self.queries[rows] @ self.keys.T

    def readers(self) -> tuple[Callable[[slice], Tensor], Callable[[slice], Tensor]]:
        """What gives rows of the matrix, and of its transpose; of a small one, which is then made once."""
        if self.held:
            whole = self.whole()
            return whole.__getitem__, whole.T.__getitem__
        return self.whole, self.T.whole

    def spans(self) -> list[slice]:
        """Rows of each block."""
        mine, row = self.part, len(self.keys) * self.queries.element_size()
        step = max(1, _BLOCK.get() // max(1, row))
        return [slice(start, min(start + step, mine.stop)) for start in range(mine.start, mine.stop, step)]


def summed_rows(loss: Callable[[Tensor, slice], Tensor], logits: Similarity) -> Tensor:
    """Sum of `loss(logits[rows], rows)`, a sum over those rows, over all rows.

    A small matrix is made at once. Of a large one each block is made again in backward, with what `loss` makes of it.
    Gradients also reach what `loss` reads besides.
    """
    if logits.held:
        return loss(logits.whole(), logits.part)
    # a rank without a row takes part in the backward all the same
    total = logits.queries[:0].sum()
    if not logits._small:
        total = total + _checkpointed(loss, logits)
    elif logits.spans():
        total = total + loss(logits.whole(logits.part), logits.part)
    return _OverRanks.apply(total, logits.ranks) if logits.ranks > 1 else total


def summed_both_ways(
    by_row: Callable[[Tensor, slice], Tensor], by_column: Callable[[Tensor, slice], Tensor], logits: Similarity
) -> Tensor:
    """`summed_rows` by one loss, plus that of the transpose by another."""
    if logits.held:
        whole = logits.whole()
        return by_row(whole, logits.part) + by_column(whole.T, logits.T.part)
    return summed_rows(by_row, logits) + summed_rows(by_column, logits.T)


def _checkpointed(loss: Callable[[Tensor, slice], Tensor], logits: Similarity) -> Tensor:
    total = logits.queries.new_zeros(())
    for rows in logits.spans():

        def one(queries: Tensor, keys: Tensor, scale: Tensor | float, rows: slice = rows) -> Tensor:
            return loss(Similarity(queries, keys, scale).whole(), rows)

        part = checkpoint(
            one, logits.queries[rows], logits.keys, logits.scale, use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return total


class _OverRanks(torch.autograd.Function):
    """Sum over ranks; the gradient is that of this rank's part, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, count: int) -> Tensor:
        ctx.count = count
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return upstream * ctx.count, None


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
    for columns (of the teacher's matrix too). logits: [P, P].

    Gradients reach queries, keys and scale of `logits`, once (it has no second derivative).
    """
    if isinstance(target, Matches):
        target = target.prepared()
    return _SoftmaxLoss.apply(
        logits.queries, logits.keys, logits.scale, target, both_ways, logits.spans(), logits.ranks
    )


class _Columns:
    """Running log-sum-exp of each column, and sums of `values` under its softmax."""

    def __init__(self, like: Tensor) -> None:
        # finite, so that a column that is left out of a whole block adds exp(-inf - lowest) = 0, and not a NaN
        self.top = torch.full_like(like, torch.finfo(like.dtype).min)
        self.mass, self.weighted = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, block: Tensor, values: Tensor | None = None) -> None:
        self._raise(torch.maximum(self.top, block.amax(dim=0)))
        mass = (block - self.top).exp_()
        self.mass += mass.sum(dim=0)
        if values is not None:
            self.weighted += mass.mul_(values).sum(dim=0)

    def _raise(self, top: Tensor) -> None:
        fade = (self.top - top).exp_()
        self.top = top
        self.mass *= fade
        self.weighted *= fade

    def finished(self) -> tuple[Tensor, Tensor]:
        """(log-sum-exp, expectation of the values)."""
        return self.top + self.mass.log(), self.weighted / self.mass


def _joined(sums: Tensor, columns: list[_Columns]) -> None:
    """Make sums and columns over the own rows those over the rows of all ranks."""
    if columns:
        tops = torch.stack([column.top for column in columns])
        dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        for column, top in zip(columns, tops):
            column._raise(top)
    parts = [sums, *(part for column in columns for part in (column.mass, column.weighted))]
    flat = torch.cat(parts)
    dist.all_reduce(flat)
    for part, whole in zip(parts, flat.split([len(part) for part in parts])):
        part.copy_(whole)


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
        ranks: int,
    ) -> Tensor:
        logits, count = Similarity(queries, keys, scale), len(queries)
        # 0 in rows of other ranks
        row_lse, column = queries.new_zeros(count), _Columns(queries[:, 0]) if both_ways else None
        # of the target: log-sum-exps of a teacher, or how many columns are right for a row
        their_row, their_column = None, None
        if isinstance(target, Taught):
            their_row = queries.new_zeros(count)
            their_column = _Columns(queries[:, 0]) if both_ways else None
        own = queries.new_zeros(count)  # what the target expects of the row's logits (for KL: less the teacher's)
        right = queries.new_ones(count)
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
                own[rows] = (block * same).sum(dim=1) / right[rows]
            else:
                own[rows] = block.diagonal(rows.start)
                if same is not None:
                    block.masked_fill_(_without_own(same, rows), float("-inf"))
            row_lse[rows] = block.logsumexp(dim=1)
            if column is not None:
                column.add(block)

        ctx.target, ctx.spans, ctx.ranks = target, spans, ranks
        ctx.scale = scale.detach() if isinstance(scale, Tensor) else scale
        sums = torch.stack([row_lse.sum(), own.sum()])
        if isinstance(target, Taught) and target.entropy:
            assert their_row is not None, "made above"
            sums[0] -= their_row.sum()
        if ranks > 1:
            _joined(sums, [columns for columns in (column, their_column) if columns is not None])
        expected = sums[1] / count
        value = sums[0] / count - expected
        column_lse, their_column_lse = None, None
        if column is not None:
            column_lse, _ = column.finished()
            if their_column is None:
                # a matching target is symmetric, so what it expects of rows and of columns has the same sum
                value = (value + column_lse.mean() - expected) / 2
            else:
                assert isinstance(target, Taught), "only a teacher has columns"
                their_column_lse, gains = their_column.finished()
                across = (column_lse - gains).mean()
                value = (value + (across - their_column_lse.mean() if target.entropy else across)) / 2
        ctx.save_for_backward(queries, keys, row_lse, column_lse, their_row, their_column_lse, right)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, keys, row_lse, column_lse, their_row, their_column, right = ctx.saved_tensors
        logits, target, scale = Similarity(queries, keys, ctx.scale), ctx.target, ctx.scale
        ways = 1 if column_lse is None else 2
        # the spans are all rows, or those of this rank
        to_queries = torch.empty_like(queries) if ctx.ranks == 1 else torch.zeros_like(queries)
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
            slope *= upstream * (ctx.ranks / (ways * len(queries)))
            part = slope @ keys
            to_scale += (part * queries[rows]).sum()
            to_queries[rows] = scale * part
            if to_keys is not None:
                to_keys.addmm_(slope.T, scale * queries[rows])
        wanted = ctx.needs_input_grad
        return to_queries if wanted[0] else None, to_keys, to_scale if wanted[2] else None, None, None, None, None


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
