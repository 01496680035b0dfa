"""Greedy answers to every question of a fixed list of scenes, in the list's order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pocketvlm.data.scene_questions import CAPTIONS
from pocketvlm.distill.vlm.evaluate import Asked
from pocketvlm.distill.vlm.scene_list import SceneList
from pocketvlm.students.vlm.model import Vlm

_CAPTION_TOKENS, _TOKENS = 64, 16


@torch.no_grad()
def list_answers(
    model: Vlm, scenes: SceneList, seen: Callable[[Sequence[int]], Tensor], *, batch: int = 128
) -> list[Asked]:
    """What the model says. seen: of chosen scenes what its `picture` takes (`stages.Source.seen`)."""
    asked = [(index, place) for index, entry in enumerate(scenes.entries) for place in range(len(entry.questions))]

    def question(pair: tuple[int, int]) -> tuple[bool, int, int]:
        entry = scenes.entries[pair[0]]
        return entry.questions[pair[1]].type in CAPTIONS, len(entry.talks[pair[1]][0]), pair[0]

    # alike lengths together, so that little is padded and captions do not hold up short answers
    order = sorted(asked, key=question)
    said: dict[tuple[int, int], str] = {}
    was, vision = model.training, model.vision.training
    model.eval()
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = _CAPTION_TOKENS if any(question(pair)[0] for pair in part) else _TOKENS
        prompts = [scenes.entries[index].questions[place].text for index, place in part]
        shown = seen([index for index, _ in part]).to(model.device)
        answers = model.generate(shown, prompts, max_new_tokens=longest)
        said |= dict(zip(part, answers))
    model.train(was)
    model.vision.train(vision)
    return [Asked(index, scenes.entries[index].questions[place], said[index, place]) for index, place in asked]
