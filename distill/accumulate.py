"""A step in parts that fit into memory, with the gradient of the whole batch.

Gradient caching (GradCache; Gao, Zhang, Han, Callan 2021, 2101.06983, section 3): the towers run over the parts without
a graph; the objectives see the outputs of all parts together, and give a gradient with respect to these; then each part
runs again, with a graph, and its piece of that gradient goes back through it. The gradient is the whole batch's, to
rounding, for any objective over `Outputs`, and not the mean over parts, which for a contrastive loss is another loss.
The price is the second forward.

Dropout and drop-path drop what they would of the whole batch, in both forwards (`distill.dropout`); what else a
backbone draws from a generator is at least the same in both forwards of a part. Running statistics move in the first
forward alone. Not equal to the whole batch: batch norm in training mode, which normalises every part by its own rows
(`train.hold_statistics` or a frozen tower makes it exact).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.gather import LABELS, ROWS, Pair
from pocketvlm.distill.masking import statistics_kept
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.optim import rng_state, set_rng_state
from pocketvlm.distill.regions import Cells
from pocketvlm.distill.step import Step
from pocketvlm.students import Student

Forward = Callable[[Step], dict[str, Pair]]


def parts_of(batch: Step, size: int | None) -> list[Step]:
    """The step in parts of at most `size` pictures (or texts, in the text phase), each with its share of the texts."""
    count = 1 if size is None else math.ceil(batch.size / size)
    if count == 1:
        return [batch]
    return [_part(batch, place, count) for place in range(count)]


def _part(batch: Step, place: int, count: int) -> Step:
    def share(size: int) -> slice:
        return slice(size * place // count, size * (place + 1) // count)

    found: dict[str, Any] = {"size": 0}
    with_text, captions, captioned = batch.with_text, slice(0, 0), 0
    if batch.pixels is not None:
        rows = share(batch.size)
        found["size"] = rows.stop - rows.start
        names = ("pixels", "group", "teacher_image", "teacher_features", "teacher_tokens", "masked", "label")
        for name in (*names, "teacher_logits", "teacher_ids", "image_keys"):
            found[name] = None if (value := getattr(batch, name)) is None else value[rows]
        if with_text is not None:
            captioned = len(with_text)
            inside = ((with_text >= rows.start) & (with_text < rows.stop)).nonzero().flatten()
            captions = slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)
            found["with_text"] = with_text[captions] - rows.start
        if batch.cells is not None:
            counts = batch.cells.mask.sum(dim=1).cumsum(0).tolist()
            crops = slice(counts[rows.start - 1] if rows.start else 0, counts[rows.stop - 1])
            found["cells"] = Cells(batch.cells.boxes[rows], batch.cells.mask[rows], batch.cells.crops[crops])
    texts = share(batch.texts)
    if batch.ids is not None:
        own = torch.cat([batch.ids[:captioned][captions], batch.ids[captioned:][texts]])
        found["ids"] = own if len(own) else None
    if batch.text_keys is not None:
        found["text_keys"] = torch.cat([batch.text_keys[:captioned][captions], batch.text_keys[captioned:][texts]])
    for name, where in (("captions", captions), ("caption_features", captions), ("texts", texts)):
        found[f"teacher_{name}"] = None if (value := getattr(batch, f"teacher_{name}")) is None else value[where]
    if batch.teacher_text_features is not None:
        found["teacher_text_features"] = batch.teacher_text_features[texts]
    if batch.hidden is not None:
        found["hidden"] = batch.hidden[captions]
    found["texts"] = texts.stop - texts.start
    if batch.pixels is None:
        found["size"] = found["texts"]
    return dataclasses.replace(batch, **found)


class Parts:
    """One step over several parts.

    outputs: of the whole batch, leaves of a graph that begins here; give them to the objectives, call the loss's
    `backward`, and then `backward` of this.
    """

    def __init__(
        self, parts: list[Step], forward: Forward, student: Student, *, fixed_bank: bool, device: torch.device
    ) -> None:
        self.parts, self.forward, self.student, self.device = parts, forward, student, device
        self.states: list[dict[str, Any]] = []
        found = []
        with torch.no_grad():
            for part in parts:
                self.states.append(rng_state(device))
                found.append(forward(part))
        self.outputs = joined(found, fixed_bank=fixed_bank)
        self.leaves = {side: _rows(own, fixed_bank) for side, (own, _) in self.outputs.items()}
        for rows in self.leaves.values():
            for leaf in rows.values():
                leaf.requires_grad_()
        scale = student.logit_scale.float()
        for outputs, _ in self.outputs.values():
            outputs.logit_scale = scale  # of no part: its gradient goes straight to the parameter

    def backward(self) -> None:
        """Run each part again and send its piece of the outputs' gradients back through it."""
        after, rows, words = rng_state(self.device), 0, 0
        with statistics_kept(self.student):
            for part, state in zip(self.parts, self.states):
                set_rng_state(state, self.device)
                found = self.forward(part)
                texts = slice(words, words + part.texts)
                where = {"pairs": slice(rows, rows + part.size), "texts": texts}
                rows, words = rows + part.size, texts.stop
                tensors, slopes = [], []
                for side in found:
                    own = _rows(found[side][0], False)
                    for name, leaf in self.leaves[side].items():
                        if leaf.grad is not None and name in own and own[name].requires_grad:
                            tensors.append(own[name])
                            slopes.append(leaf.grad[texts if name == "bank" else where[side]])
                if tensors:
                    torch.autograd.backward(tensors, slopes)
        set_rng_state(after, self.device)


def joined(parts: Sequence[Mapping[str, Pair]], *, fixed_bank: bool) -> dict[str, Pair]:
    """The outputs of all parts, one behind the other; a part without texts has no "texts".

    fixed_bank: every part has the same bank, and not its own texts.
    """
    found: dict[str, Pair] = {}
    for side in dict.fromkeys(side for part in parts for side in part):
        students, teachers = zip(*(part[side] for part in parts if side in part))
        theirs = None if teachers[0] is None else _joined(teachers, fixed_bank)
        found[side] = (_joined(students, fixed_bank), theirs)
    return found


def _joined(parts: Sequence[Outputs], fixed_bank: bool) -> Outputs:
    changed: dict[str, Any] = {}
    for name in (*ROWS, *LABELS, *(() if fixed_bank else ("bank",))):
        values = [value for part in parts if (value := getattr(part, name)) is not None]
        changed[name] = torch.cat(values) if values else None
    taps = {name: torch.cat([part.taps[name] for part in parts]) for name in parts[0].taps}
    return dataclasses.replace(parts[0], taps=taps, **changed)


def _rows(outputs: Outputs, fixed_bank: bool) -> dict[str, Tensor]:
    """What has a row of each picture or text and may have a gradient, by name."""
    names = ROWS if fixed_bank else (*ROWS, "bank")
    found = {name: value for name in names if (value := getattr(outputs, name)) is not None}
    return found | {f"taps.{name}": value for name, value in outputs.taps.items()}
