"""Activation checkpointing: a block keeps only its input and runs again in the backward (Chen et al. 2016, 1604.06174).

About a third more computation for a part of the memory. The numbers are the same: the same parts are dropped, and
running statistics of batch norms move in the first run alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketvlm.distill.dropout import current_keys, rows_keyed
from pocketvlm.distill.masking import statistics_kept
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Student

# what timm calls the parts of a backbone that follow each other
_NAMES = ("blocks", "stages", "layers")


def blocks_of(student: Student) -> list[nn.Module]:
    """Those parts of both towers that are checkpointed.

    Raises:
        UsageError: the backbone has none.
    """
    trunk = student.image_tower.trunk
    found = next((part for name in _NAMES if isinstance(part := getattr(trunk, name, None), nn.Module)), None)
    if found is None:
        raise UsageError(
            f"train.checkpoint_activations was asked for and the backbone of {student.config.name!r} has no "
            f"{' or '.join(_NAMES)} to checkpoint, so nothing would be saved; leave it out and set train.micro_batch"
        )
    return [*found.children(), *student.text_tower.blocks.children()]


@contextmanager
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Forwards inside the `with` keep only the inputs of these blocks."""
    for block in blocks:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, context_fn=partial(_contexts, block)
        )
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _again(block, current_keys())


@contextmanager
def _again(block: nn.Module, keys: Tensor | None) -> Iterator[None]:
    with statistics_kept(block), rows_keyed(keys):
        yield
