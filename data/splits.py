"""Which pool a concept belongs to, and which concepts keep their captions: pure functions of names.

Nothing is drawn at random and nothing depends on order, so any machine, run or subset gives the same answer,
and a concept that is hidden from the student is hidden from every teacher that follows the same rule.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Literal, cast

from pocketvlm.data.sample import Caption, Sample
from pocketvlm.edge.errors import UsageError, unknown_name

Pool = Literal["teacher", "student", "test"]
POOLS: tuple[Pool, ...] = ("teacher", "student", "test")
FOLDS = 5


def stable_hash(text: str) -> int:
    """The first 64 bits of sha256 of the UTF-8 text, as an unsigned integer; equal on every platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def draw_caption(captions: Sequence[Caption], key: str) -> Caption | None:
    """One caption, with a probability proportional to its weight, as a function of `key`; None where there is none."""
    if len(captions) < 2:
        return captions[0] if captions else None
    drawn = stable_hash(key) / 2.0**64 * math.fsum(caption.weight for caption in captions)
    for caption in captions:
        drawn -= caption.weight
        if drawn < 0:
            return caption
    return captions[-1]


def pool_of(group: str, fold: int, folds: int = FOLDS) -> Pool:
    """The pool of a group of samples in one of `folds` rotations.

    A group is in the test pool of exactly one fold. In the other folds it is in the teacher's or the student's
    pool (half and half), always the same one, decided by a second hash that is independent of the fold.

    Args:
        group: the base concept (`Sample.group`), or the uid of a sample that belongs to no group.
        fold: 0 <= fold < folds.
        folds: number of rotations, at least 2; 1 / folds of the groups are in the test pool.

    Raises:
        UsageError: `fold` outside the range, or fewer than two folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise UsageError(
            f"fold {fold} of {folds} does not exist; use folds >= 2 and 0 <= fold < folds, "
            "so that every group is tested exactly once"
        )
    if stable_hash(f"fold:{group}") % folds == fold:
        return "test"
    return "teacher" if stable_hash(f"side:{group}") % 2 == 0 else "student"


def has_caption(group: str, fraction: float) -> bool:
    """Whether a group keeps its captions when only `fraction` (0..1) of the groups do.

    Nested: a group that keeps its captions at 0.1 keeps them at 0.2.

    Raises:
        UsageError: `fraction` outside 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(
            f"caption fraction {fraction} is not a share; use a number from 0 (no captions) to 1 (all of them)"
        )
    return stable_hash(f"caption:{group}") < fraction * 2.0**64


def few_shots(samples: Iterable[Sample], shots: int) -> set[str]:
    """The uids of the `shots` samples of each label that keep it, by a stable hash; fewer where a label has fewer.

    Nested: a sample that keeps its label at 4 shots keeps it at 16.

    Raises:
        UsageError: no label at all, or shots below 1.
    """
    by_label: dict[str, list[str]] = {}
    for sample in samples:
        if sample.label is not None:
            by_label.setdefault(sample.label, []).append(sample.uid)
    if shots < 1 or not by_label:
        raise UsageError(
            f"shots={shots} was asked of data with {len(by_label)} labels, so no sample would keep one; use 1 or more "
            "shots of data that has labels"
        )
    return {
        uid for uids in by_label.values() for uid in sorted(uids, key=lambda u: (stable_hash(f"shot:{u}"), u))[:shots]
    }


def check_pool(name: str) -> Pool:
    """`name` as a pool.

    Raises:
        UnknownNameError: not one of "teacher", "student", "test".
    """
    if name not in POOLS:
        raise unknown_name("pool", name, POOLS)
    return cast(Pool, name)


def group_of(sample: Sample) -> str:
    """The name that splits a sample: its group, or its uid when it belongs to none."""
    return sample.group if sample.group is not None else sample.uid


def in_pool(samples: Iterable[Sample], pool: str, fold: int, folds: int = FOLDS) -> list[Sample]:
    """The samples of one pool, in their order; arguments and errors as in `pool_of` and `check_pool`."""
    wanted = check_pool(pool)
    return [sample for sample in samples if pool_of(group_of(sample), fold, folds) == wanted]
