"""Searches across models: one model's queries in the other's gallery, which nobody has to embed again.

A phone embeds the query with the student; the server keeps the gallery that the teacher embedded. That works only where
both embed into one space, which is what their `space_id` says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketvlm.data.splits import group_of
from pocketvlm.distill import metrics
from pocketvlm.distill.board import FEWEST, KS, Board, interval
from pocketvlm.distill.questions import Array, Embedded

WAYS = {
    "model_query_teacher_gallery": ("model", "teacher"),
    "teacher_query_model_gallery": ("teacher", "model"),
    "model_query_model_gallery": ("model", "model"),
    "teacher_query_teacher_gallery": ("teacher", "teacher"),
}
"""Whose queries, whose gallery; the last two are what the first two are compared with."""
SYMMETRIC = {"model": "model_query_model_gallery", "teacher": "teacher_query_teacher_gallery"}


def score_asymmetric(board: Board) -> dict[str, Any] | None:
    """Recall of every mix of query and gallery: {way: {direction: summary}}; the mixed ways have under "difference"
    paired intervals of R@5 to the model alone ("to_model") and to the teacher alone ("to_teacher").

    Directions: image_to_text, text_to_image, and image_to_image: a picture finds the other pictures of its group, as
    the other model embedded them; its own picture is not in the gallery. Per-query ranks go to `board.queries` under
    "asymmetric/WAY/DIRECTION/rank". None, with a reason in `board.not_scored`, where the two share no space.
    """
    if board.teacher is None:
        board.not_scored["asymmetric"] = "there is no teacher whose gallery could be searched"
        return None
    sides = {"model": board.model, "teacher": board.teacher}
    if not board.one_space():
        board.not_scored["asymmetric"] = (
            f"{board.model.name} and {board.teacher.name} embed into different spaces, so a cosine between them means "
            "nothing; distil into the teacher's space at its full width"
        )
        return None
    ranks: dict[str, dict[str, metrics.QueryResults]] = {way: {} for way in WAYS}
    units: dict[str, Array] = {}
    for way, (query, gallery) in WAYS.items():
        to_text = board.search(sides[query], sides[gallery], board.headline, board.questions.language)
        to_image = board.search(sides[gallery], sides[query], board.headline, board.questions.language)
        if to_text is not None and to_image is not None:
            ranks[way] = {"image_to_text": to_text.forward, "text_to_image": to_image.reverse}
            units |= board.searched(to_text)
        if alike := image_to_image(board, sides[query], sides[gallery]):
            ranks[way]["image_to_image"], units["image_to_image"] = alike
    if not any(ranks.values()):
        return None
    if "image_to_image" not in units:
        reason = f"fewer than {FEWEST} pictures have another one of their group to find"
        board.not_scored["asymmetric/image_to_image"] = reason
    board.queries |= {
        f"asymmetric/{way}/{direction}/rank": result.rank
        for way, own in ranks.items()
        for direction, result in own.items()
    }
    found: dict[str, Any] = {}
    for way, (query, gallery) in WAYS.items():
        found[way] = {direction: result.summary(KS) for direction, result in ranks[way].items()}
        if query == gallery:
            continue
        found[way]["difference"] = {
            direction: {
                f"to_{side}": interval(result.hits(5), ranks[alone][direction].hits(5), units[direction])
                for side, alone in SYMMETRIC.items()
            }
            for direction, result in ranks[way].items()
        }
    return found


def image_to_image(board: Board, query: Embedded, gallery: Embedded) -> tuple[metrics.QueryResults, Array] | None:
    """Ranks of the nearest other picture of the same group, of pictures that have one, and their groups."""
    groups = np.array([group_of(sample) for sample in board.headline])
    names, counts = np.unique(groups, return_counts=True)
    asked = np.flatnonzero(np.isin(groups, names[counts > 1]))
    if len(asked) < FEWEST:
        return None
    x, y = (metrics.normalize(board.images(side, board.headline)) for side in (query, gallery))
    scores = x[asked] @ y.T
    scores[np.arange(len(asked)), asked] = -2.0  # its own picture: below every cosine, and no match
    match = groups[asked, None] == groups[None, :]
    match[np.arange(len(asked)), asked] = False
    return metrics.retrieval_from_scores(scores, match), groups[asked]


def rows_of_asymmetric(found: dict[str, Any] | None) -> list[tuple[str, str, str, str, str, str]]:
    """The mixed ways as rows of `evaluate.rows_of`: (part, metric, value, teacher, retention, difference to it)."""
    rows = []
    for way, (query, gallery) in WAYS.items():
        if found is None or query == gallery:
            continue
        for direction, values in found[way].items():
            if direction == "difference":
                continue
            theirs = found[SYMMETRIC["teacher"]][direction]["R@5"]
            gap = found[way]["difference"][direction]["to_teacher"]
            shown = " to ".join(f"{100 * gap[end]:+.1f}" for end in ("low", "high"))
            rows.append(
                (
                    f"{query} query, {gallery} gallery", f"{direction.replace('_', ' ')} R@5",
                    f"{100 * values['R@5']:.1f}", f"{100 * theirs:.1f}",
                    f"{100 * values['R@5'] / theirs:.0f} %" if theirs else "–",
                    f"{100 * gap['difference']:+.1f} ({shown})",
                )
            )  # fmt: skip
    return rows
