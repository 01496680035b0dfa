"""Region self-distillation (CLIPSelf): a place of the map says what the student said of that part of the picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.common import BatchObjective, Widths
from pocketvlm.edge.errors import UsageError

MOST_CELLS = 36


def checked_cells(cells: int) -> int:
    """How many cells of a picture are compared, checked.

    Raises:
        UsageError: no whole number from 1 to 36, the cells of the finest grid.
    """
    if isinstance(cells, bool) or not isinstance(cells, int) or not 1 <= cells <= MOST_CELLS:
        raise UsageError(
            f"objective 'region-self' was given cells {cells!r}; no grid has so many to compare, so give a whole "
            f"number from 1 to {MOST_CELLS}"
        )
    return cells


class RegionSelf(BatchObjective):
    """region-self: the student's map, pooled over a cell, agrees with the untrained student's embedding of that cell.

    Formula: a grid of m x n cells is drawn for each picture, 1 <= m <= 6, ceil(m/2) <= n <= min(2m, 6), and of its
    cells at most `cells`. With f(p) the student's embedding at place p of its last map, n(x) = x/|x|, c a cell, and v0
    the embedding that the frozen student before training has of the cell cut out and resized to its input size,
        L = 1 - mean over cells of cos( ROIAlign_1x1( n(f), c ), v0(c) ).
    f(p): the place alone through the tower's head and projection. Where these are linear (EfficientNet with a linear
    projection: pooling is a mean, and the mean of what a linear map gives is what it gives of the mean), the mean of f
    over all places is the picture's embedding; MobileNet's head and batch-standardised or MLP projections are not, and
    f is what they say of a picture that looks alike everywhere. Inner levels are averaged to the last map's grid.
    Which grid and cells: a function of (seed, step, uid) alone. The picture is the view of the step; cells are cut from
    the same view at twice the student's size, and squashed to a square.
    Inputs: student.regions and student.region_targets [B, R, D] (the latter without a gradient), region_mask bool
    [B, R]: which of the R = `cells` places hold a cell. Captions are not used; no external teacher. Output:
    {"region-self": scalar}, 0 to 2. Reduction: mean over all cells of the batch. No temperature; one row is enough.
    Paper: Wu et al. 2024 (CLIPSelf, 2310.01403), there 20 cells, a ViT whose last block has no attention for the map,
    and a picture of 1024 pixels; what is saved is interpolated with the start (`train.interpolate` 0.7 to 0.95).
    Ours: convolutional maps at the student's own size (so a cell of a fine grid is less than a place of the map), 4
    cells. Transformers without a map are refused, and so is a student that starts at random: it knows nothing of cells.
    Related: `masked-feature` hides parts of a picture, this asks about each; `hint` learns a map from a teacher's.
    Cost: `cells` forwards of the image tower without a gradient for each picture, and the head at every place.
    """

    name = "region-self"
    formula = "1 − cosine of the map, pooled over a cell, and the untrained student's embedding of that cell cut out"
    paper = "CLIPSelf, 2310.01403, on convolutional maps"
    needs = Needs(teacher=False, regions=True)

    def __init__(self, *, student: Widths, teacher: Widths | None = None, seed: int = 0, cells: int = 4) -> None:
        super().__init__()
        self.cells = checked_cells(cells)

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        found, wanted, keep = student.regions, student.region_targets, student.region_mask
        if found is None or wanted is None or keep is None:
            raise UsageError(
                "objective 'region-self' was given outputs without regions, region_targets or region_mask; there are "
                "no cells to compare, so pool the student's map over some and put these there"
            )
        if not bool(keep.any()):
            return {"region-self": self.zero(student)}
        return {"region-self": 1 - F.cosine_similarity(found[keep], wanted.detach()[keep], dim=-1).mean()}
