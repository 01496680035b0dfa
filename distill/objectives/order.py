"""The teacher's nearest neighbours stay in front, in the teacher's order: what retrieval asks of an embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pocketvlm.distill.objectives.base import Needs, Outputs
from pocketvlm.distill.objectives.blocks import Similarity, summed_rows
from pocketvlm.distill.objectives.common import BatchObjective, Widths, choice, inverse_temperature, positive, unit
from pocketvlm.distill.objectives.ranking import list_mle
from pocketvlm.distill.objectives.within import reads_pictures, without_own
from pocketvlm.edge.errors import UsageError

SEARCHES = ("image", "text", "image-to-text", "text-to-image")


def neighbour_order(own: Similarity, theirs: Similarity, top: int, *, within: bool) -> Tensor:
    """Mean over rows and places of the likelihood that the first `top` of a row are the teacher's, in its order.

    own, theirs: the student's cosines over tau and the teacher's cosines [R, N]. within: of one list with itself, so
    that the diagonal is left out. N is then at least 3, else 2. top is at most the list less one: the last place of a
    full list is certain. Formula: see `NeighbourOrder`.
    """
    top = min(top, len(own.keys) - (2 if within else 1))

    def loss(block: Tensor, rows: slice) -> Tensor:
        scores, target = block, theirs.whole(rows)
        if within:
            scores, target = without_own(scores, rows), without_own(target, rows)
        return list_mle(scores, target, top=top).sum()

    return summed_rows(loss, own) / (len(own.queries) * top)


class NeighbourOrder(BatchObjective):
    """order: the rows that the teacher finds nearest come first for the student too, in the teacher's order.

    Formula: for query i, gallery items j in C_i, x_ij = cos^S_ij / tau, and j_1, ..., j_k the k items of the largest
        cos^T_ij in this order,
        L = mean_i 1/k sum_{r=1..k} [ log sum_{j in C_i \\ {j_1..j_(r-1)}} exp(x_ij) - x_i,j_r ],
        the negative log likelihood of the teacher's first k places under the student (Plackett-Luce).
    of: one or several of "image" (default; pictures search pictures, C_i without i itself), "text" (captions search
    captions), "image-to-text", "text-to-image" (C_i = all captioned rows, the own pair included).
    k = `neighbours` (default 10), at most |C_i| - 1. Teacher items that tie share a place (`ranking.list_mle`).
    Inputs: image and/or text [B, D] of both models (widths may differ). Output: {"order_image"}, one for each of `of`.
    Reduction: mean over queries and places. Temperature: tau = `temperature` (default 0.1); None takes the student's
    logit scale 1/tau, and trains it.
    Direction: the teacher gives the order and nothing else, so that teachers of any scale or calibration teach alike.
    The minimum is not 0: a student in perfect order still gains by wider gaps, which tau bounds in practice; use it
    beside a loss that fixes the geometry (`feature`, `crd`).
    This is our construction: the top-k form of ListMLE (Xia et al. 2008) on a batch's similarities; RankCLIP
    (2404.09387) uses ListMLE without a teacher. At least 3 rows (2 where only image and text search each other); fewer
    captioned rows in a larger batch give 0.
    Related: `gram` "softmax" and `crd` match the teacher's distribution, gaps included; `rankclip` has no teacher.
    Cost: one sort of B lists for each search, memory O(B^2). Only neighbours inside a batch are seen: large batches.
    """

    name = "order"
    formula = "likelihood of the teacher's first k neighbours, in order, under the student"
    paper = "our construction on ListMLE, Xia et al. 2008"
    needs = Needs()
    minimum_rows = 3

    def __init__(
        self,
        *,
        student: Widths,
        teacher: Widths | None = None,
        seed: int = 0,
        of: Sequence[str] | str = "image",
        neighbours: int = 10,
        temperature: float | None = 0.1,
    ) -> None:
        super().__init__()
        self.of = tuple(choice("of", part, SEARCHES) for part in ([of] if isinstance(of, str) else of))
        if not self.of:
            raise UsageError(f"objective 'order' was given an empty 'of'; nothing would be learned, so name {SEARCHES}")
        if not isinstance(neighbours, int) or isinstance(neighbours, bool) or neighbours < 1:
            raise UsageError(
                f"objective option 'neighbours' is {neighbours!r} but must be a whole number from 1; no place would "
                "be taught, so give how many neighbours count"
            )
        self.neighbours, self.temperature = neighbours, positive("temperature", temperature)
        if not {"image", "text"} & set(self.of):
            self.minimum_rows = 2

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        return dataclasses.replace(cls.needs, teacher_image=reads_pictures(options))

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        scale = inverse_temperature(self.temperature, student)
        found = {}
        rows = self.pairs(student, teacher) if self.of != ("image",) else None
        for part in self.of:
            if part == "image":
                searched = (student.image, student.image), (teacher.image, teacher.image)
            elif rows is None:
                found[f"order_{part}"] = self.zero(student)
                continue
            else:
                of_student, of_teacher = (rows.image, rows.text), rows.taught()
                query, key = {"text": (1, 1), "image-to-text": (0, 1), "text-to-image": (1, 0)}[part]
                searched = (of_student[query], of_student[key]), (of_teacher[query], of_teacher[key])
            own, theirs = (tuple(unit(side) for side in model) for model in searched)
            found[f"order_{part}"] = neighbour_order(
                Similarity(own[0], own[1], scale), Similarity(theirs[0], theirs[1], 1.0), self.neighbours,
                within=part in ("image", "text"),
            )  # fmt: skip
        return found
