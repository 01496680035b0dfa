"""A fixed list of scenes with their questions: what a teacher answers once, and a student then sees again and again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pocketvlm.data.scene_questions import Question, ask_about
from pocketvlm.data.scenes import GRIDS, PictureSet, Scene, SceneTable, scene_rng
from pocketvlm.distill.vlm.batches import Composer, Drawn, drawn_scenes
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.model import Rows, rows_of
from pocketvlm.students.vlm.tokenizer import VlmTokenizer

# rows are cut to the longest of a batch, in these steps
_STEP = 8


class Entry(NamedTuple):
    """One scene, its questions, and each of them as ids of question and answer; variants: of each place's picture."""

    scene: Scene
    questions: tuple[Question, ...]
    talks: tuple[tuple[list[int], list[int]], ...]
    variants: tuple[int, ...]


class SceneList:
    """Scenes with questions that all fit into a row, the same on every machine.

    Answer tokens of the whole list are numbered scene by scene and question by question: those of scene i are
    `starts[i]` to `starts[i + 1]`, in the order in which `rows` has them.
    """

    def __init__(self, pictures: PictureSet, entries: Sequence[Entry], tokenizer_json: bytes, length: int) -> None:
        if not entries:
            raise UsageError("a list without scenes teaches nothing; ask for one scene or more")
        self.pictures, self.entries, self.length = pictures, tuple(entries), length
        self.tokenizer_json = tokenizer_json
        self.starts = [0]
        for entry in self.entries:
            self.starts.append(self.starts[-1] + sum(len(answer) for _, answer in entry.talks))

    @classmethod
    def draw(
        cls,
        pictures: PictureSet,
        tokenizer_json: bytes,
        *,
        scenes: int,
        questions: int,
        seed: int,
        length: int = 123,
        variants: int = 1,
    ) -> SceneList:
        """The first `scenes` scenes of stream `seed` (`ask_about`) about which anything can be asked, with up to
        `questions` about each; of a picture alone of which nothing is known there is nothing.

        length: tokens of a row; questions past it are left out. variants: of each picture's table, one drawn a place.
        """
        tokenizer = VlmTokenizer(tokenizer_json)
        entries: list[Entry] = []
        index = -1
        while len(entries) < scenes:
            index += 1
            scene, asked = ask_about(pictures, seed, index, questions)
            if not asked:  # three scenes in ten at most, as those of several pictures can be counted
                continue
            rng = scene_rng(seed, index, "variants")
            shown = tuple(rng.randrange(variants) if variants > 1 else 0 for _ in scene.cells)
            entries.append(_entry(scene, asked, shown, tokenizer, length))
        return cls(pictures, entries, tokenizer_json, length)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def tokens(self) -> int:
        """Answer tokens of the whole list."""
        return self.starts[-1]

    @cached_property
    def digest(self) -> str:
        """sha256 of pictures, scenes, questions, answers and tokenizer."""
        whole = hashlib.sha256(self.tokenizer_json)
        whole.update(json.dumps([picture.uid for picture in self.pictures.pictures]).encode())
        for entry in self.entries:
            whole.update(json.dumps([entry.scene.grid, entry.scene.cells, entry.variants, entry.talks]).encode())
        return whole.hexdigest()

    @cached_property
    def scene_digest(self) -> str:
        """sha256 of what can be seen: pictures and scenes, without questions."""
        seen = [[entry.scene.grid, entry.scene.cells, entry.variants] for entry in self.entries]
        return hashlib.sha256(
            json.dumps([[picture.uid for picture in self.pictures.pictures], seen]).encode()
        ).hexdigest()

    def rows(self, chosen: Sequence[int]) -> Rows:
        """Questions and answers of these scenes, in rows as long as the longest needs."""
        talks = [self.entries[index].talks for index in chosen]
        longest = max(sum(len(q) + len(a) - 1 for q, a in row) for row in talks)
        return rows_of(talks, min(-(-longest // _STEP) * _STEP, self.length))

    def token_places(self, chosen: Sequence[int]) -> Tensor:
        """int64, the numbers of these scenes' answer tokens in the order of `rows(chosen)`."""
        return torch.cat([torch.arange(self.starts[index], self.starts[index + 1]) for index in chosen])

    def pixels(self, chosen: Sequence[int], composer: Composer) -> Tensor:
        """uint8 [B, S, S, 3], in the order of `chosen`. composer: of a table of these pictures (`composer_of`)."""
        order = sorted(range(len(chosen)), key=lambda place: self.entries[chosen[place]].scene.grid)
        made = composer(self._drawn([chosen[place] for place in order]))
        found = torch.empty_like(made)
        found[torch.tensor(order)] = made
        return found

    def _drawn(self, chosen: Sequence[int]) -> Drawn:
        parts = []
        for index in chosen:
            entry, count = self.entries[index], len(self.pictures)
            (cells,) = (part for part in drawn_scenes([entry.scene], count, 1, None).cells if len(part))
            parts.append(cells + torch.tensor(entry.variants) * (count + 1))
        return Drawn(
            tuple(
                torch.cat([torch.zeros(0, grid**2, dtype=torch.int64), *(p for p in parts if p.shape[1] == grid**2)])
                for grid in GRIDS
            )
        )

    def only(self, keep: Callable[[int, int], bool]) -> tuple[SceneList, list[int]]:
        """The list with those questions for which `keep(scene, question)` holds, and the numbers of the scenes that
        have any; the others are left out.

        Raises:
            UsageError: nothing is kept.
        """
        entries, numbers = [], []
        for index, entry in enumerate(self.entries):
            places = [place for place in range(len(entry.talks)) if keep(index, place)]
            if places:
                numbers.append(index)
                entries.append(
                    entry._replace(
                        questions=tuple(entry.questions[place] for place in places),
                        talks=tuple(entry.talks[place] for place in places),
                    )
                )
        return SceneList(self.pictures, entries, self.tokenizer_json, self.length), numbers


def _entry(
    scene: Scene, asked: Sequence[Question], variants: tuple[int, ...], tokenizer: VlmTokenizer, length: int
) -> Entry:
    questions, talks, used = [], [], 0
    for question in asked:
        talk = (tokenizer.question(question.text), tokenizer.answer(question.answer))
        size = len(talk[0]) + len(talk[1]) - 1
        if used + size <= length:
            questions.append(question)
            talks.append(talk)
            used += size
    if not talks:
        raise UsageError(
            f"no question about a scene fits into a row of {length} tokens, so nothing of it could be learnt; raise "
            "the length"
        )
    return Entry(scene, tuple(questions), tuple(talks), variants)


def composer_of(pictures: PictureSet, side: int, *, variants: int = 1, device: str | torch.device = "cpu") -> Composer:
    """Tables of these pictures for scenes of `side` pixels; `variants` as the list was drawn with."""
    return Composer(SceneTable.build(pictures, side, variants=variants), torch.device(device))
