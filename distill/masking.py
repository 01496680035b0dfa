"""The masked view of a batch: which patches of which picture are painted over, and how they are painted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.objectives import objective_needs, objective_options
from pocketvlm.distill.objectives.masked_feature import masked_cells
from pocketvlm.distill.objectives.matryoshka import inner_of
from pocketvlm.distill.recipe import Recipe
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError

Pixels = NDArray[np.uint8]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Masking:
    """ratio: share of the cells x cells patches that are masked."""

    ratio: float
    cells: int

    def mask(self, seed: int, step: int, uid: str) -> NDArray[np.bool_]:
        """bool [cells, cells], True where masked; a function of the arguments alone."""
        key = stable_hash(f"mask/{seed}/{step}/{uid}")
        order = np.random.Generator(np.random.PCG64(key)).permutation(self.cells**2)
        found = np.zeros(self.cells**2, np.bool_)
        found[order[: masked_cells(self.ratio, self.cells)]] = True
        return found.reshape(self.cells, self.cells)

    def paint(self, pixels: Pixels, seed: int, step: int, uids: Sequence[str], spec: ImageSpec) -> Pixels:
        """uint8 [B, S, S, 3] with each picture's masked patches in the colour that `spec` standardises to 0."""
        # pixel y lies in the cell y cells // S, so that patches differ by a pixel where S does not divide
        cell = np.arange(spec.size) * self.cells // spec.size
        hidden = np.stack([self.mask(seed, step, uid)[cell][:, cell] for uid in uids])
        colour = np.rint(np.array(spec.mean) * 255).astype(np.uint8)
        return np.where(hidden[..., None], colour, pixels)


def asked_masking(recipe: Recipe) -> Masking | None:
    """The masked view that the recipe's objectives share, or None.

    Raises:
        UsageError: two objectives ask for different ones.
    """
    found: list[Masking] = []
    for spec in recipe.objectives:
        name, options = spec.name, spec.options
        if name == "matryoshka":
            name, options = inner_of(options.get("inner", {"name": "crd"}))
        if objective_needs(name, options).masked_view:
            values = objective_options(name) | options
            view = Masking(values["ratio"], values["cells"])
            found += [view] if view not in found else []
    if len(found) > 1:
        views = ", ".join(f"{view.ratio} of {view.cells} x {view.cells}" for view in found)
        raise UsageError(
            f"{len(found)} different masked views are asked for ({views}), and a step makes one; give these objectives "
            "the same ratio and cells"
        )
    return found[0] if found else None


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Running statistics of batch norms stay as they are inside the `with`, whatever passes through."""
    norms = [m for m in module.modules() if isinstance(m, NORMS)]
    before = [(m, m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
