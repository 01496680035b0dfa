"""A prepared tower whose weights were fine-tuned: targets are given these weights, and the grids that go with them."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import fx

from pocketvlm.export.fake_quant import INT8, FakeQuantized, Step
from pocketvlm.export.prepare import Prepared, Rounding


@dataclass(frozen=True)
class Trained:
    """What `export.finetune` left of one tower. graph: with the weights of the files, as float values. steps: node ->
    grid of its value, where it has a fixed range. notes: for `Variant.notes`. float_layers: convolutions at the input
    that stay in float."""

    graph: fx.GraphModule
    steps: dict[str, Step]
    notes: dict[str, object]
    float_layers: int

    def fake_quantized(self) -> FakeQuantized:
        """What the int8 files compute, in float arithmetic."""
        return FakeQuantized(copy.deepcopy(self.graph), self.steps, self.float_layers)


class Tuned(Prepared):
    """`Prepared` that gives the trained graph for each rounding that was trained, and what it gave before otherwise."""

    def __init__(self, ready: Prepared, trained: dict[Rounding, Trained]) -> None:
        self.__dict__.update(ready.__dict__)
        self.trained = trained

    def keeping(self, blocks: Collection[str]) -> Prepared:
        """As `Prepared.keeping`, without what was trained: that knows of no blocks in float."""
        other = super().keeping(blocks)
        if isinstance(other, Tuned):
            other.trained = {}
        return other

    def graph(self, *, static: bool) -> tuple[fx.GraphModule, int]:
        """As `Prepared.graph`; trained is only what int8 tries first."""
        if INT8 not in self.trained or static != self.convolutional:
            return super().graph(static=static)
        return copy.deepcopy(self.trained[INT8].graph), self.trained[INT8].float_layers

    def rounded(self, rounding: Rounding, bits: Literal[4, 8] = 8) -> fx.GraphModule:
        """As `Prepared.rounded`."""
        if rounding not in self.trained:
            return super().rounded(rounding, bits)
        return copy.deepcopy(self.trained[rounding].graph)


def trained(ready: Prepared | None, rounding: Rounding = INT8) -> Trained | None:
    """What fine-tuning for a rounding left of a tower; None where there was none."""
    return ready.trained.get(rounding) if isinstance(ready, Tuned) else None


def tuning_notes(ready: Prepared | None, rounding: Rounding = INT8) -> dict[str, object]:
    """`{"finetune": ...}` for `Variant.notes`, empty where there was none."""
    found = trained(ready, rounding)
    return {} if found is None else {"finetune": found.notes}
