"""Gather the outputs of all ranks, with gradient, so that objectives see the global batch.

Every rank has the value of the global loss, and a gradient whose mean over ranks is the global one: the whole on each,
or for losses over large matrices W times what its own rows give, W the number of ranks (`objectives.blocks`). The
backward of the gather sums the gradients that all ranks send to a row, which is W times the wanted one, and data
parallelism divides by W when it averages parameter gradients: together, exactly the gradient of the global loss.
Parameters that are used after the gather (logit scale, projectors) are averaged alone, which is right for both.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pocketvlm.distill.objectives.base import Outputs
from pocketvlm.edge.errors import UsageError

Pair = tuple[Outputs, Outputs | None]

ROWS: tuple[str, ...] = ("image", "text", "image_features", "text_features", "masked_image", "masked_words", "regions")
ROWS += ("region_targets", "class_logits", "taught_logits", "top_logits")
LABELS = ("has_text", "group", "text_mask", "masked_pieces", "region_mask", "label", "top_ids")


def gather_outputs(outputs: Outputs, group: Any = None) -> Outputs:
    """The outputs of all ranks' batches, concatenated in rank order; ranks may hold different numbers of rows.

    Gathered: image, text, image_features, text_features, masked_image, masked_words, regions and their targets,
    class_logits, taught_logits, top_logits, taps (with gradient), has_text, text_mask, masked_pieces, region_mask,
    label, top_ids, group (group ids must be global). Not gathered, because every rank holds the same: logit_scale,
    logit_bias, bank (but see `gather_step`), token_table.
    Without an initialised process group, or with one rank, `outputs` itself is returned.

    Args:
        outputs: this rank's. Which fields are None, and the taps' names, must be the same on every rank.
        group: a torch.distributed process group; None = all ranks.

    Raises:
        UsageError: the ranks do not hold the same fields and widths (said instead of waiting for ever).
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return outputs
    rows = {name: getattr(outputs, name) for name in ROWS} | {f"taps.{k}": v for k, v in sorted(outputs.taps.items())}
    rows = {name: value for name, value in rows.items() if value is not None}
    labels = {name: getattr(outputs, name) for name in LABELS if getattr(outputs, name) is not None}

    dtype = outputs.image.dtype
    for value in rows.values():
        dtype = torch.promote_types(dtype, value.dtype)
    flat = {name: value.to(dtype).flatten(1) for name, value in rows.items()}
    # one collective for all fields: order on the wire never depends on how autograd walks the graph
    local = torch.cat(list(flat.values()), dim=1)
    sizes, graded = _agreed(local, rows, labels, group)
    if graded and not local.requires_grad:
        # all ranks take part in the backward, also one that has, for instance, no captioned row under a frozen tower
        local = local.detach().requires_grad_()
    parts = _Gather.apply(local, sizes, group).split([value.shape[1] for value in flat.values()], dim=1)
    changed: dict[str, Any] = {
        name: part.reshape(-1, *rows[name].shape[1:]).to(rows[name].dtype) for name, part in zip(rows, parts)
    }
    taps = {name.removeprefix("taps."): changed.pop(name) for name in list(changed) if name.startswith("taps.")}
    for name, value in labels.items():
        whole = _all_rows(value.to(torch.int64).reshape(len(value), -1), sizes, group)
        changed[name] = whole.to(value.dtype).reshape(-1, *value.shape[1:])
    return dataclasses.replace(outputs, taps=taps, **changed)


class _Gather(torch.autograd.Function):
    """[b, d] on each rank -> [sum b, d] on every rank; backward sums over ranks and keeps the own rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, sizes: list[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _all_rows(local, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        rank = dist.get_rank(ctx.group)
        start = sum(ctx.sizes[:rank])
        return gradient[start : start + ctx.sizes[rank]], None, None


def _all_rows(local: Tensor, sizes: list[int], group: Any) -> Tensor:
    """Concatenation in rank order; shorter ranks are padded on the wire only."""
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(found, sizes)])


def _agreed(local: Tensor, rows: dict[str, Tensor], labels: dict[str, Tensor], group: Any) -> tuple[list[int], bool]:
    """(rows of each rank, whether some rank has a gradient to give), when all hold the same fields and widths."""
    described = [(name, tuple(value.shape[1:]), str(value.dtype)) for name, value in {**rows, **labels}.items()]
    graded = local.requires_grad and torch.is_grad_enabled()
    own = torch.tensor([len(local), graded, zlib.crc32(repr(described).encode())], device=local.device)
    numbers = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(numbers, own, group=group)
    table = torch.stack(numbers).tolist()
    if any(row[2] != table[0][2] for row in table):
        found: list[Any] = [None] * len(table)
        dist.all_gather_object(found, described, group=group)
        rank, other = next((rank, other) for rank, other in enumerate(found) if other != found[0])
        raise UsageError(
            f"rank {rank} holds outputs {other} but rank 0 holds {found[0]}; the ranks would wait for each other for "
            "ever, so give every rank the same fields (rows without a caption stay, masked by has_text)"
        )
    return [row[0] for row in table], any(row[1] for row in table)


def gather_step(outputs: Mapping[str, Pair], *, texts_are_bank: bool) -> dict[str, Pair]:
    """Each batch of a step ("pairs", "texts"), gathered.

    texts_are_bank: the bank of the pairs is the text-only batch (`train.bank: student`), of which every rank has a part
    as well; the gathered one then is the bank.
    """
    found = {
        side: (gather_outputs(student), None if teacher is None else gather_outputs(teacher))
        for side, (student, teacher) in outputs.items()
    }
    if not (texts_are_bank and found.keys() >= {"pairs", "texts"}) or found["texts"][0] is outputs["texts"][0]:
        return found
    texts, (student, teacher) = found["texts"], found["pairs"]
    student = dataclasses.replace(student, bank=texts[0].image)
    if teacher is not None and texts[1] is not None:
        teacher = dataclasses.replace(teacher, bank=texts[1].image)
    return found | {"pairs": (student, teacher)}
