"""Scenes: one to nine of the built-in pictures on a white ground, at known places, drawn again from a seed.

A scene is a square grid of 1, 4 or 9 places, some of them empty. What is known of each picture (names, kind, main
colour) and where it lies answers every question of `scene_questions`, so that no person had to write one.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.data.main_colour import main_colour
from pocketvlm.data.openmoji import openmoji_samples
from pocketvlm.data.openmoji_kinds import kind_of
from pocketvlm.data.sample import Sample
from pocketvlm.data.splits import group_of, has_caption, in_pool, stable_hash
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import decode_image

LANGUAGES = ("en", "de", "es", "fr", "it", "pt")
GRIDS = (1, 2, 3)
EMPTY = -1
# the side of a scene, in pixels, is a multiple of this, so that every grid divides it
SIDE_STEP = 6
_WHITE = 255
# a picture of a variant other than the first is this much smaller at most, and lies anywhere in its place
_SMALLEST = 0.8


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is known of one picture. names: by language, "" where it has none; kind, colour: None where there is no
    single answer.

    group: pictures of one concept, which are never asked to be told apart."""

    uid: str
    names: dict[str, str]
    kind: str | None
    colour: str | None
    group: str

    @property
    def name(self) -> str:
        return self.names["en"]


class PictureSet:
    """Pictures that scenes are made of, in the order of their numbers, with the pixels they were drawn at."""

    def __init__(self, pictures: Sequence[Picture], pixels: Sequence[NDArray[np.uint8]]) -> None:
        if not pictures:
            raise UsageError("a set without pictures makes no scene; take another pool or a larger share of it")
        self.pictures = tuple(pictures)
        self.pixels = tuple(pixels)

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def by_kind(self) -> dict[str, list[int]]:
        """Numbers of the pictures of each kind, kinds sorted."""
        found: dict[str, list[int]] = {}
        for number, picture in enumerate(self.pictures):
            if picture.kind is not None:
                found.setdefault(picture.kind, []).append(number)
        return dict(sorted(found.items()))

    @cached_property
    def kinded(self) -> list[int]:
        """Numbers of the pictures that have a kind."""
        return [number for number, picture in enumerate(self.pictures) if picture.kind is not None]

    @cached_property
    def coloured(self) -> list[int]:
        """Numbers of the pictures that have a main colour."""
        return [number for number, picture in enumerate(self.pictures) if picture.colour is not None]


def picture_set(
    pool: str, fold: int, *, captions: float = 1.0, languages: Sequence[str] = LANGUAGES, limit: int | None = None
) -> PictureSet:
    """The built-in pictures of one pool of one fold, without flags, at 224 pixels.

    Args:
        pool: "teacher", "student" or "test" (`splits.pool_of`). captions: the share of concepts that keep their names
            (`splits.has_caption`); the pictures of others are left out.
        languages: of the names, English among them. limit: the first so many only, for a toy.

    Raises:
        MissingExtraError: a package of the extra `demo` is not installed.
        UnknownNameError: no such pool or language. UsageError: no such fold, or nothing is left.
    """
    samples = in_pool(openmoji_samples(languages=("en", *languages), flags="exclude"), pool, fold)
    kept = [sample for sample in samples if has_caption(group_of(sample), captions)][:limit]
    pixels = [decode_image(sample.image.read()) for sample in kept]
    return PictureSet([_picture(sample, drawn) for sample, drawn in zip(kept, pixels)], pixels)


def _picture(sample: Sample, pixels: NDArray[np.uint8]) -> Picture:
    return Picture(
        uid=sample.uid,
        names={caption.language: caption.text for caption in sample.captions},
        kind=kind_of(sample.uid.split("/")[1]),
        # a quarter of the pixels has the same shares
        colour=main_colour(pixels[::2, ::2]),
        group=group_of(sample),
    )


@dataclasses.dataclass(frozen=True)
class Scene:
    """grid: places a side; cells: the picture at each place, row by row, or `EMPTY`."""

    grid: int
    cells: tuple[int, ...]

    @property
    def placed(self) -> list[tuple[int, int]]:
        """(place, picture) of every place that is not empty, in reading order."""
        return [(place, number) for place, number in enumerate(self.cells) if number != EMPTY]


def draw_scene(pictures: PictureSet, rng: random.Random) -> Scene:
    """One scene: three in ten a single picture, the others two to four on four places or two to six on nine.

    Half of those take all pictures from one to three kinds, so that counts and comparisons are no guess; in one of five
    a picture comes twice or three times.
    """
    grid = rng.choices(GRIDS, (3, 4, 3))[0]
    if grid == 1:
        return Scene(1, (rng.randrange(len(pictures)),))
    count = rng.randint(2, 4 if grid == 2 else 6)
    kinds = list(pictures.by_kind)
    if kinds and rng.random() < 0.5:
        chosen_kinds = rng.sample(kinds, min(len(kinds), rng.randint(1, 3)))
        chosen = [rng.choice(pictures.by_kind[rng.choice(chosen_kinds)]) for _ in range(count)]
    else:
        chosen = [rng.randrange(len(pictures)) for _ in range(count)]
    if rng.random() < 0.2:
        for place in range(1, min(count, rng.randint(2, 3))):
            chosen[place] = chosen[0]
    cells = [EMPTY] * grid**2
    for place, number in zip(rng.sample(range(grid**2), count), chosen):
        cells[place] = number
    return Scene(grid, tuple(cells))


def scene_rng(seed: int, index: int, what: str = "scene") -> random.Random:
    """The generator of scene `index` of a stream; equal on every platform and independent of the others."""
    return random.Random(stable_hash(f"{what}:{seed}:{index}"))


@dataclasses.dataclass(frozen=True)
class SceneTable:
    """Every picture at every size that a scene needs, so that a scene is made by copying.

    side: of a scene in pixels. cells: by grid, uint8 [V, N + 1, side / grid, side / grid, 3]; picture N is white.
    """

    side: int
    cells: dict[int, NDArray[np.uint8]]

    @classmethod
    def build(cls, pictures: PictureSet, side: int, *, variants: int = 1, seed: int = 0) -> SceneTable:
        """Resize every picture (Pillow's antialiased bilinear filter).

        Variant 0 fills its place. Each further one is 80 to 100 % of that, somewhere in its place, drawn from `seed`.

        Raises:
            UsageError: a side that the grids do not divide, or no variant.
        """
        if side % SIDE_STEP or side < SIDE_STEP or variants < 1:
            raise UsageError(
                f"scenes of {side} pixels in {variants} variants cannot be made, as their places would not be whole; "
                f"give a multiple of {SIDE_STEP} and one variant or more"
            )
        cells = {}
        for grid in GRIDS:
            place = side // grid
            table = np.full((variants, len(pictures) + 1, place, place, 3), _WHITE, np.uint8)
            for number, (picture, pixels) in enumerate(zip(pictures.pictures, pictures.pixels)):
                drawn = Image.fromarray(pixels)
                rng = scene_rng(seed, grid, picture.uid)
                for variant in range(variants):
                    size = place if variant == 0 else round(place * rng.uniform(_SMALLEST, 1.0))
                    top, left = rng.randint(0, place - size), rng.randint(0, place - size)
                    resized = np.asarray(drawn.resize((size, size), Image.Resampling.BILINEAR))
                    table[variant, number, top : top + size, left : left + size] = resized
            cells[grid] = table
        return cls(side, cells)

    def compose(self, scene: Scene, variants: Sequence[int] | None = None) -> NDArray[np.uint8]:
        """The scene's pixels, uint8 [side, side, 3]; variants: of each place, all 0 where None."""
        table, place = self.cells[scene.grid], self.side // scene.grid
        picked = table[list(variants or [0] * len(scene.cells)), list(scene.cells)]
        rows = picked.reshape(scene.grid, scene.grid, place, place, 3).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(rows.reshape(self.side, self.side, 3))
