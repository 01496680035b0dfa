"""Cells of pictures: which ones a step compares, their crops, and the student's map pooled over them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import roi_align

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.masking import statistics_kept
from pocketvlm.distill.objectives import objective_options
from pocketvlm.distill.objectives.region_self import RegionSelf, checked_cells
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.taps import encode_image, gray
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Student
from pocketvlm.students.student import TOKENS

Pixels = NDArray[np.uint8]
# cells are cut from the view at this many times the student's size: small ones then keep some detail
FINER = 2


@dataclass(frozen=True)
class Regions:
    """cells: how many of a picture's cells a step compares at most."""

    cells: int

    def boxes(self, seed: int, step: int, uid: str) -> NDArray[np.float32]:
        """[K, 4] left, top, right, bottom in 0..1 of K <= `cells` cells of one grid; a function of the arguments."""
        rng = np.random.Generator(np.random.PCG64(stable_hash(f"regions/{seed}/{step}/{uid}")))
        m = int(rng.integers(1, 7))
        n = int(rng.integers(math.ceil(m / 2), min(2 * m, 6) + 1))
        y, x = np.divmod(rng.permutation(m * n)[: self.cells], n)
        return np.stack([x / n, y / m, (x + 1) / n, (y + 1) / m], axis=1).astype(np.float32)

    def batch(self, views: Sequence[Pixels], seed: int, step: int, uids: Sequence[str], size: int) -> Cells:
        """Cells of these pictures, uint8 [S', S', 3] each, and their crops at `size` pixels."""
        boxes = np.zeros((len(uids), self.cells, 4), np.float32)
        mask, crops = np.zeros(boxes.shape[:2], np.bool_), []
        for row, (pixels, uid) in enumerate(zip(views, uids)):
            found, picture = self.boxes(seed, step, uid), Image.fromarray(pixels)
            boxes[row, : len(found)], mask[row, : len(found)] = found, True
            for left, top, right, bottom in (found * pixels.shape[0]).tolist():
                crop = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
                crops.append(np.asarray(crop))
        return Cells(torch.from_numpy(boxes), torch.from_numpy(mask), torch.from_numpy(np.stack(crops)))


@dataclass
class Cells:
    """boxes: float32 [B, R, 4], in 0..1 of the picture. mask: bool [B, R], which of them there are. crops: uint8
    [N, S, S, 3] of those, row by row."""

    boxes: Tensor
    mask: Tensor
    crops: Tensor


def asked_regions(recipe: Recipe) -> Regions | None:
    """The cells that the recipe's objectives share, or None.

    Raises:
        UsageError: two objectives ask for different ones, or the student has nothing to say of them before training.
    """
    asking = [spec for spec in recipe.objectives if spec.name == RegionSelf.name]
    counts = {checked_cells((objective_options(spec.name) | spec.options)["cells"]) for spec in asking}
    if len(counts) > 1:
        raise UsageError(
            f"objective {RegionSelf.name!r} is asked for {' and for '.join(map(str, sorted(counts)))} cells, and a "
            "step draws them once; give all the same"
        )
    if asking and _image_starts_at_random(recipe):
        raise UsageError(
            f"objective {RegionSelf.name!r} learns from the student as it was before training, and the image tower of "
            f"{recipe.student.name!r} starts at random, so it would learn noise; start from student.init or pretrained "
            "weights"
        )
    return Regions(counts.pop()) if counts else None


def _image_starts_at_random(recipe: Recipe) -> bool:
    from pocketvlm.students.config import load_config

    section = recipe.student
    parts = [part.split(".")[0] for part in section.init_parts]
    if section.init is not None and (not parts or "image_tower" in parts):
        return False
    try:
        return load_config(section.name, section.overrides).image.weights == "none"
    except UsageError:
        return False  # said where the student is checked


def frozen_copy(tower: nn.Module) -> Any:
    """The image tower as it is now, in evaluation mode, which training does not change."""
    return copy.deepcopy(tower).eval().requires_grad_(False)


def map_taps(student: Student, cut: int | None) -> tuple[str, ...]:
    """Names of the taps that `dense_map` reads."""
    levels = student.image_tower.levels if student.image_tower.has_blocks else ()
    return (TOKENS, *(f"trunk.blocks.{level}" for level in levels if level != cut))


def dense_map(student: Student, x: Tensor, taps: dict[str, Tensor], cut: int | None) -> Tensor:
    """[B, D, H, W] float32, the student's embedding at each place of its last map, not normalised.

    x: what the tower was given, which under a cut is the output of the block there. Running statistics stay.
    """
    tower = student.image_tower
    inner = tower.levels if tower.has_blocks else ()
    levels = [x if level == cut else taps[f"trunk.blocks.{level}"] for level in inner]
    with statistics_kept(tower):
        return tower.dense(taps[TOKENS], levels).float()


@torch.no_grad()
def said_of(original: Any, crops: Tensor) -> Tensor:
    """[N, D] float32, what a frozen image tower says of crops [N, S, S, 3], a few at a time where that is faster."""
    # activations of 64 pictures stay in a processor's cache: four times as fast as a thousand at once
    parts = crops.split(64 if crops.device.type == "cpu" else 1024)
    return torch.cat([original(part)[0].float() for part in parts])


def pooled(chart: Tensor, cells: Cells) -> Tensor:
    """[B, R, D]: the map [B, D, H, W], each place scaled to length 1, averaged over each cell; 0 where none is."""
    boxes, mask = cells.boxes.to(chart.device), cells.mask.to(chart.device)
    height, width = chart.shape[2:]
    rows = mask.nonzero()[:, :1].to(chart.dtype)
    places = boxes[mask].to(chart.dtype) * torch.tensor([width, height, width, height], device=chart.device)
    found = roi_align(F.normalize(chart, dim=1), torch.cat([rows, places], dim=1), (1, 1), aligned=True).flatten(1)
    return found.new_zeros(*mask.shape, chart.shape[1]).index_put(tuple(mask.nonzero().T), found)


@torch.no_grad()
def check_dense(recipe: Recipe, student: Student) -> None:
    """Run the map of one gray picture, where an objective asks for it.

    Raises:
        UsageError: the student's tower has none.
    """
    if asked_regions(recipe) is None:
        return
    training, cut = student.training, recipe.train.cut_after_block
    student.eval()
    try:
        x: Tensor = gray(student)
        x = x if cut is None else student.image_tower.until_block(x, cut)
        dense_map(student, x, encode_image(student, x, cut, map_taps(student, cut)).taps, cut)
    finally:
        student.train(training)
