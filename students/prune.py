"""Structured pruning of a trained dual encoder: attention heads, groups of MLP units, then whole blocks.

Modules are ranked by one of `METHODS`:

    mope       MoPE(m) = Z[f] - Z[f without m], the drop of a cross-modal score Z (MoPE-CLIP, arXiv:2403.07839). Heads
               and groups are ranked on the whole model, each removed alone; blocks afterwards on the narrower one.
    magnitude  Euclidean norm of the module's own weights.
    prefix     TinyCLIP's manual inheritance (arXiv:2309.12314): the first heads and units of each block, and the
               blocks range(0, kept * step, step) with step = all // kept.
    random     the control.

The paper's ratios, its groups of units and its rule for depth could not be verified. Ours: a tower's heads and groups
compete across its blocks, and each block keeps one of each. With `prefix` every block keeps equally many.

The residual stream keeps its width, with every method. TinyCLIP slices it too; but a channel of it is read and written
by all blocks, the embeddings and the projection at once, so that no score without it would say what one module is
worth, and the norms over what is left would compute something else. So a pruned tower computes exactly what the whole
one computes with the pruned modules' outputs at zero.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.blocks import check_trunk, cut_block, parts_of
from pocketvlm.students.config import StudentConfig
from pocketvlm.students.student import Student

METHODS = ("mope", "magnitude", "prefix", "random")
TOWERS = ("image", "text")

Kind = Literal["head", "mlp", "block"]
# (student, changed) -> score, higher is better; `changed` names the only tower that differs from the latest call with
# None, so that the other tower's embeddings may be kept
Score = Callable[[Student, str | None], float]


@dataclass(frozen=True, order=True)
class Module:
    """One thing that can be removed. kind "head" or "mlp" (a group of hidden units): the `index`-th of its block;
    "block": the whole block, index 0."""

    tower: str
    kind: Kind
    block: int
    index: int = 0


@dataclass(frozen=True)
class Left:
    """A block that is left, by what it was before: its number, its heads, its groups of hidden units (None: all)."""

    number: int
    heads: list[int]
    mlp_groups: list[int] | None
    hidden: int


@dataclass(frozen=True)
class Pruned:
    """The result of `prune`.

    ranking: importance of every module by `method`, more is worth more (empty for prefix); blocks after the width was
    cut. kept: what is left of each tower. scores: Z "before", "after width" and "after depth", where there is a score.
    """

    student: Student
    method: str
    ranking: dict[Module, float]
    kept: dict[str, list[Left]]
    scores: dict[str, float]


def blocks_of(student: Student, tower: str) -> list[nn.Module]:
    """The transformer blocks of a tower, first to last.

    Raises:
        UsageError: a tower without any (a CNN, a bag of words), or whose inner outputs are features of their own.
    """
    if tower == "text":
        if not len(student.text_tower.blocks):
            raise UsageError(
                f"the text tower of {student.config.name!r} has no layers (a bag of words), so there is nothing to "
                "prune in it; prune the image tower alone (towers: image)"
            )
        return list(student.text_tower.blocks)
    image = student.config.image
    check_trunk(student.image_tower.trunk, image.backbone)
    if image.levels:
        raise UsageError(
            f"image.levels {list(image.levels)} of {student.config.name!r} name blocks by number, and pruning changes "
            "the numbers, so its features would come from other blocks; prune a student without levels"
        )
    return list(student.image_tower.trunk.blocks)  # type: ignore[arg-type]


def modules_of(student: Student, tower: str, kind: Kind, groups: int) -> list[Module]:
    """All modules of one kind in a tower. groups: into how many the hidden units of a block are split.

    Raises:
        UsageError: a block with fewer hidden units than groups, or as `blocks_of` does.
    """
    found = []
    for number, block in enumerate(blocks_of(student, tower)):
        widths = parts_of(block).widths
        if kind == "mlp" and widths.hidden < groups:
            raise UsageError(
                f"block {number} of the {tower} tower has {widths.hidden} hidden units, which cannot be split into "
                f"{groups} groups; some would be empty, so ask for {widths.hidden} groups or fewer"
            )
        count = {"head": widths.heads, "mlp": groups, "block": 1}[kind]
        found += [Module(tower, kind, number, index) for index in range(count)]
    return found


def units_of(hidden: int, groups: int) -> tuple[Tensor, ...]:
    """The hidden units of each group: int64, neighbours together, sizes as equal as can be."""
    return torch.arange(hidden).tensor_split(groups)


@contextmanager
def without(student: Student, module: Module, groups: int) -> Iterator[None]:
    """The student with this module's output at zero (a block: skipped), for the duration of the `with`."""
    block = blocks_of(student, module.tower)[module.block]
    if module.kind == "block":
        handle = block.register_forward_hook(lambda _, given, __: given[0])
        try:
            yield
        finally:
            handle.remove()
        return
    parts = parts_of(block)
    if module.kind == "head":
        layer, columns = parts.out, parts.head_columns([module.index])
    else:
        layer, columns = parts.fc2, units_of(parts.fc2.in_features, groups)[module.index]
    columns = columns.to(layer.weight.device)
    with torch.no_grad():
        before = layer.weight[:, columns].clone()
        layer.weight[:, columns] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            layer.weight[:, columns] = before


def mope_ranking(
    student: Student,
    modules: Sequence[Module],
    score: Score,
    groups: int,
    progress: Callable[[int], None] | None = None,
) -> dict[Module, float]:
    """MoPE(m) = Z[f] - Z[f without m] of each module, removed alone."""
    whole = score(student, None)
    found = {}
    for module in modules:
        with without(student, module, groups):
            found[module] = whole - score(student, module.tower)
        if progress is not None:
            progress(len(found))
    return found


@torch.no_grad()
def magnitude_ranking(student: Student, modules: Sequence[Module], groups: int) -> dict[Module, float]:
    """Euclidean norm of the weights and biases that removing each module would take away."""
    found = {}
    for module in modules:
        block = blocks_of(student, module.tower)[module.block]
        parts = parts_of(block)
        if module.kind == "block":
            taken: list[Tensor] = list(block.parameters())
        elif module.kind == "head":
            rows, columns = parts.head_rows([module.index]), parts.head_columns([module.index])
            taken = [*_rows(parts.qkv, rows), parts.out.weight[:, columns]]
        else:
            units = units_of(parts.fc1.out_features, groups)[module.index]
            taken = [*_rows(parts.fc1, units), parts.fc2.weight[:, units]]
        found[module] = float(sum(value.double().square().sum() for value in taken)) ** 0.5
    return found


def _rows(layer: nn.Linear, rows: Tensor) -> list[Tensor]:
    return [layer.weight[rows]] if layer.bias is None else [layer.weight[rows], layer.bias[rows]]


def share(count: int, keep: float) -> int:
    """How many of `count` are kept: the nearest number to keep * count, halves up, one at the least."""
    return max(1, int(keep * count + 0.5))


def keep_best(ranking: Mapping[Module, float], count: int) -> set[Module]:
    """The `count` modules of highest importance; every block keeps its best one. Equal ones: the earlier first."""
    order = sorted(ranking, key=lambda module: (-ranking[module], module))
    best: dict[int, Module] = {}
    for module in order:
        best.setdefault(module.block, module)
    kept = set(best.values())
    for module in order:
        if len(kept) >= count:
            break
        kept.add(module)
    return kept


def keep_first(modules: Sequence[Module], keep: float) -> set[Module]:
    """The first modules of each block, `share` of them."""
    sizes = Counter(module.block for module in modules)
    return {module for module in modules if module.index < share(sizes[module.block], keep)}


def spaced_blocks(count: int, kept: int) -> list[int]:
    """TinyCLIP's manual inheritance in depth: range(0, kept * step, step) with step = count // kept."""
    step = count // kept
    return list(range(0, kept * step, step))


def prune(
    student: Student,
    *,
    method: str,
    keep_heads: float = 1.0,
    keep_mlp: float = 1.0,
    keep_depth: float = 1.0,
    towers: Sequence[str] = TOWERS,
    score: Score | None = None,
    groups: int = 8,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Pruned:
    """A smaller copy of `student` (which stays as it is), in eval mode: width first, then depth.

    Args:
        method: of METHODS. keep_heads, keep_mlp, keep_depth: shares of each tower's heads, MLP groups and blocks that
            are kept, in (0, 1]. All methods keep equally many where the blocks are alike.
        score: Z, higher is better; "mope" needs it, others only report it. seed: of "random".
        groups: into how many the hidden units of a block are split. progress: called as (done, total, what).

    Raises:
        UnknownNameError: no such method or tower.
        UsageError: shares outside (0, 1], nothing to prune, "mope" without a score, or a tower without heads.
    """
    if method not in METHODS:
        raise unknown_name("pruning method", method, METHODS)
    for tower in towers:
        if tower not in TOWERS:
            raise unknown_name("tower", tower, TOWERS)
    _check_shares(keep_heads, keep_mlp, keep_depth, towers, groups)
    if method == "mope" and score is None:
        raise UsageError(
            "method 'mope' ranks modules by the drop of a score and was given none, so it could not tell them apart; "
            "give data with captions to score on, or another method"
        )
    small = copy.deepcopy(student).eval()
    ranking: dict[Module, float] = {}
    scores: dict[str, float] = {}
    if score is not None:
        scores["before"] = score(small, None)
    draw = random.Random(seed)

    def ranked(modules: list[Module], what: str) -> dict[Module, float]:
        if method == "magnitude":
            found = magnitude_ranking(small, modules, groups)
        elif method == "random":
            found = {module: draw.random() for module in modules}
        else:
            assert score is not None, "checked above"
            tell = None if progress is None else lambda done: progress(done, len(modules), what)
            found = mope_ranking(small, modules, score, groups, tell)
        ranking.update(found)
        return found

    # width: one table of all modules, filled on the whole model
    shares: dict[Kind, float] = {"head": keep_heads, "mlp": keep_mlp}
    wide = {
        (tower, kind): modules_of(small, tower, kind, groups)
        for tower in towers
        for kind, keep in shares.items()
        if keep < 1
    }
    table = {} if method == "prefix" else ranked([m for found in wide.values() for m in found], "heads and MLP groups")
    kept: set[Module] = set()
    for (_, kind), modules in wide.items():
        if method == "prefix":
            kept |= keep_first(modules, shares[kind])
        else:
            equal = len(keep_first(modules, shares[kind]))
            kept |= keep_best({module: table[module] for module in modules}, equal)
    left = {
        tower: _narrow(small, tower, kept, {kind for own, kind in wide if own == tower}, groups) for tower in towers
    }
    if score is not None and wide:
        scores["after width"] = score(small, None)

    # depth: blocks are ranked as the width left them
    if keep_depth < 1:
        deep = {tower: modules_of(small, tower, "block", groups) for tower in towers}
        table = {} if method == "prefix" else ranked([m for found in deep.values() for m in found], "blocks")
        for tower, modules in deep.items():
            count = share(len(modules), keep_depth)
            if method == "prefix":
                chosen = spaced_blocks(len(modules), count)
            else:
                order = sorted(modules, key=lambda module: (-table[module], module))
                chosen = sorted(module.block for module in order[:count])
            _shorten(small, tower, chosen)
            left[tower] = [left[tower][number] for number in chosen]
        if score is not None:
            scores["after depth"] = score(small, None)
    small.config = _described(small, towers)
    return Pruned(small, method, ranking, left, scores)


def _check_shares(heads: float, mlp: float, depth: float, towers: Sequence[str], groups: int) -> None:
    for name, value in (("heads", heads), ("mlp", mlp), ("depth", depth)):
        if not 0 < value <= 1:
            raise UsageError(
                f"keep_{name} is {value:g} but must be more than 0 and at most 1; it is the share that stays, so give "
                "for instance 0.5"
            )
    if min(heads, mlp, depth) == 1 or not towers:
        raise UsageError(
            "keep_heads, keep_mlp and keep_depth are all 1 or no tower is named, so nothing would be pruned; lower one "
            "of them, for instance keep_depth to 0.5"
        )
    if groups < 2:
        raise UsageError(f"groups is {groups}, so an MLP could only be kept whole; split it into 2 or more")


def _narrow(student: Student, tower: str, kept: set[Module], kinds: set[str], groups: int) -> list[Left]:
    """Cut the blocks of a tower to `kept` (all heads or units where that kind is not pruned); says what is left."""
    left = []
    for number, block in enumerate(blocks_of(student, tower)):
        widths = parts_of(block).widths
        chosen = {
            kind: sorted(m.index for m in kept if (m.tower, m.kind, m.block) == (tower, kind, number)) for kind in kinds
        }
        heads = chosen.get("head", list(range(widths.heads)))
        units = torch.arange(widths.hidden)
        if "mlp" in kinds:
            parts = units_of(widths.hidden, groups)
            units = torch.cat([parts[index] for index in chosen["mlp"]])
        if kinds:
            cut_block(block, heads, units)
        left.append(Left(number, heads, chosen.get("mlp"), len(units)))
    return left


def _shorten(student: Student, tower: str, chosen: Sequence[int]) -> None:
    blocks = blocks_of(student, tower)
    if tower == "text":
        student.text_tower.blocks = nn.ModuleList(blocks[number] for number in chosen)
    else:
        student.image_tower.trunk.blocks = nn.Sequential(*(blocks[number] for number in chosen))


def _described(student: Student, towers: Sequence[str]) -> StudentConfig:
    """The configuration that rebuilds the pruned towers."""
    changes = {
        tower: getattr(student.config, tower).model_copy(
            update={"blocks": tuple(parts_of(block).widths for block in blocks_of(student, tower))}
        )
        for tower in towers
    }
    return student.config.model_copy(update={**changes, "name": f"{student.config.name}-pruned"})
