"""Batches of scenes with questions: drawn and worded on the CPU, composed from tables of pictures on the device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pocketvlm.data.scene_questions import ask_about
from pocketvlm.data.scenes import EMPTY, GRIDS, PictureSet, Scene, SceneTable, scene_rng
from pocketvlm.students.vlm.model import Rows, rows_of
from pocketvlm.students.vlm.tokenizer import ASSISTANT, EOS, USER, VlmTokenizer

# most questions come again; sentences that list several pictures do not
_KEPT_LENGTH = 48


class Drawn(NamedTuple):
    """Scenes as numbers, those of smaller grids first. cells: for each of `GRIDS`, int64 [n, grid * grid], rows of the
    table (`Composer`)."""

    cells: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Drawn:
        return Drawn(tuple(value.to(device, non_blocking=True) for value in self.cells))


class Composer:
    """A `SceneTable` on a device; composes scenes there."""

    def __init__(self, table: SceneTable, device: torch.device) -> None:
        self.side = table.side
        self.tables = {grid: torch.from_numpy(cells).flatten(0, 1).to(device) for grid, cells in table.cells.items()}

    def __call__(self, drawn: Drawn) -> Tensor:
        """uint8 [B, side, side, 3]."""
        made = []
        for grid, cells in zip(GRIDS, drawn.cells):
            place = self.side // grid
            picked = self.tables[grid][cells].view(-1, grid, grid, place, place, 3)
            made.append(picked.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.side, self.side, 3))
        return torch.cat(made)


def drawn_scenes(scenes: list[Scene], pictures: int, variants: int, rng: random.Random | None) -> Drawn:
    """Numbers of scenes that are ordered by grid; rng: draws a variant for each place, 0 where None."""
    found: dict[int, list[list[int]]] = {grid: [] for grid in GRIDS}
    for scene in scenes:
        rows = [(0 if rng is None else rng.randrange(variants)) * (pictures + 1) for _ in scene.cells]
        found[scene.grid].append(
            [row + (pictures if number == EMPTY else number) for row, number in zip(rows, scene.cells)]
        )
    return Drawn(tuple(torch.tensor(found[grid], dtype=torch.int64).view(-1, grid * grid) for grid in GRIDS))


class SceneStream(IterableDataset[tuple[Drawn, Rows]]):
    """Batches without end, the same whatever the number of workers.

    Args:
        pictures: to draw scenes from. tokenizer_json: of the model. batch: scenes to a batch. questions: to a scene, as
            many as fit into a row of `length` tokens. variants: of the table.
    """

    def __init__(
        self,
        pictures: PictureSet,
        tokenizer_json: bytes,
        *,
        batch: int,
        questions: int,
        length: int,
        variants: int,
        seed: int,
    ) -> None:
        # the pixels stay behind: a worker only needs facts
        self.pictures = PictureSet(pictures.pictures, ())
        self.tokenizer_json = tokenizer_json
        self.batch, self.questions, self.length = batch, questions, length
        self.variants, self.seed = variants, seed
        self._known: dict[str, list[int]] = {}

    def __iter__(self) -> Iterator[tuple[Drawn, Rows]]:
        worker = get_worker_info()
        number, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._tokenizer = VlmTokenizer(self.tokenizer_json)
        while True:
            yield self.make(number)
            number += step

    def make(self, number: int) -> tuple[Drawn, Rows]:
        asked = [
            ask_about(self.pictures, self.seed, number * self.batch + place, self.questions)
            for place in range(self.batch)
        ]
        asked.sort(key=lambda pair: pair[0].grid)
        rng = scene_rng(self.seed, number, "variants")
        drawn = drawn_scenes([scene for scene, _ in asked], len(self.pictures), self.variants, rng)
        talks = [
            [([USER, *self._ids(q.text), ASSISTANT], [*self._ids(q.answer), EOS]) for q in questions]
            for _, questions in asked
        ]
        return drawn, rows_of(talks, self.length)

    def _ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = self._tokenizer.encode(text)
            if len(text) <= _KEPT_LENGTH:
                self._known[text] = known
        return known


def batches(
    stream: IterableDataset[tuple[Any, Rows]], workers: int, device: torch.device
) -> Iterator[tuple[Any, Rows]]:
    """A stream's batches on the device, of scenes or of `conversations`; workers: processes that make them, 0 for this
    one."""
    loader: DataLoader[tuple[Any, Rows]] = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if workers else None,
    )
    for drawn, rows in loader:
        yield drawn.to(device), rows.to(device)
