"""Masked captions: which pieces are masked, and the text tower's forward with a train-only fusion module in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from pocketvlm.data.splits import stable_hash
from pocketvlm.distill.objectives import objective_options
from pocketvlm.distill.objectives.masked_language import MaskedLanguage, checked_stages, masked_count
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.taps import text_length
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Student
from pocketvlm.students.student import TOKENS

Ids = NDArray[Any]


class PieceMasking:
    """Which pieces of a caption are masked: a function of (seed, step, uid) alone.

    ratio: share of a caption's pieces. special: ids that are never masked. slots: as many as any caption has masked.
    """

    def __init__(self, ratio: float, student: Student) -> None:
        self.ratio, self.slots = ratio, masked_count(ratio, student.text_spec.context_length)
        added = Tokenizer.from_str(student.tokenizer_json.decode("utf-8")).get_added_tokens_decoder()
        self.special = np.array([student.text_spec.pad_id, *(i for i, token in added.items() if token.special)])

    def places(self, ids: Ids, seed: int, step: int, uids: Sequence[str]) -> Tensor:
        """int64 [C, slots]: the masked places of each row of ids [C, L] in order, then -1."""
        found = np.full((len(ids), self.slots), -1, np.int64)
        for row, (pieces, uid) in enumerate(zip(ids, uids)):
            open_to = np.flatnonzero(~np.isin(pieces, self.special))
            key = stable_hash(f"words/{seed}/{step}/{uid}")
            order = np.random.Generator(np.random.PCG64(key)).permutation(open_to)
            chosen = np.sort(order[: masked_count(self.ratio, len(open_to))])
            found[row, : len(chosen)] = chosen
        return torch.from_numpy(found)


def asked_pieces(recipe: Recipe) -> Any:
    """The share of pieces that the recipe's objectives want masked, or None.

    Raises:
        UsageError: two objectives ask, or one for blocks that the student's text tower has not.
    """
    from pocketvlm.students.config import load_config

    asking = [spec for spec in recipe.objectives if spec.name == MaskedLanguage.name]
    if len(asking) > 1:
        raise UsageError(
            f"objective {MaskedLanguage.name!r} is listed {len(asking)} times, and a step masks the captions once; "
            "keep one of them"
        )
    for spec in asking:
        try:
            layers = load_config(recipe.student.name, recipe.student.overrides).text.layers
        except UsageError:
            break  # said where the student is checked
        checked_stages(spec.options.get("stages"), layers)
    return (objective_options(MaskedLanguage.name) | asking[0].options)["ratio"] if asking else None


def fusion_of(objectives: nn.ModuleList) -> MaskedLanguage | None:
    """The objective whose fusion module the text tower is to be run with."""
    return next((cast(MaskedLanguage, o) for o in objectives if isinstance(o, MaskedLanguage)), None)


@contextmanager
def fused(tower: Any, fusion: MaskedLanguage, hidden: Tensor, image: Tensor) -> Iterator[None]:
    """The text tower with the pieces under `hidden` (bool [C, L]) masked and the pictures image [C, D] fused in.

    Through hooks, which are gone afterwards: the tower itself, and what is exported, knows nothing of it.
    """
    undo: list[Callable[[], None]] = []

    def mask(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return torch.where(hidden[..., None], fusion.mask.to(output.dtype), output)

    def after(place: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda module, inputs, output: fusion.fuse(place, output, image)

    try:
        undo.append(tower.token.register_forward_hook(mask).remove)
        for place, stage in enumerate(fusion.stages):
            undo.append(tower.blocks[stage].register_forward_hook(after(place)).remove)
        yield
    finally:
        for action in undo:
            action()


def masked_words(
    student: Student, fusion: MaskedLanguage, ids: Tensor, places: Tensor, image: Tensor
) -> tuple[Tensor, Tensor]:
    """(last features at the masked places, [C, K, W] float32; the pieces that stood there, int64 [C, K], -1 for none).

    ids: int32 [C, L]. places: int64 [C, K], -1 for none. image: [C, D], the student's own, raw.
    """
    ids, at = ids[:, : text_length(ids, student.text_spec.pad_id)], places.clamp(min=0)
    none = places < 0
    counts = torch.zeros(ids.shape, dtype=torch.int64, device=ids.device).scatter_add(1, at, (~none).long())
    with fused(student.text_tower, fusion, counts > 0, image):
        words = student.encode_text(ids, taps=(TOKENS,)).taps[TOKENS].float()
    pieces = ids.long().gather(1, at).masked_fill(none, -1)
    return words.gather(1, at[..., None].expand(-1, -1, words.shape[2])), pieces
