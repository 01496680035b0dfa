"""A `Reduction` at work before the decoder: which tokens stay or are merged, and the places that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.config import Reduction
from pocketvlm.students.vlm.connectors import AnyConnector
from pocketvlm.students.vlm.dropping import layer_counts
from pocketvlm.students.vlm.reduce import (
    cls_scores,
    distinct_scores,
    even_places,
    keep_rows,
    keep_top,
    kept,
    layer_scores,
    merge_alternating,
    merge_similar,
    pool_grid,
    received_scores,
)
from pocketvlm.students.vlm.vision import VisionTower


def possible_scores(vision: VisionTower) -> tuple[str, ...]:
    """The scores that this tower can give."""
    if not vision.has_attention:
        return ("distinct",)
    return ("cls", "cls-layers", "received", "distinct") if vision.has_class_token else ("received", "distinct")


def check_reduction(reduction: Reduction, vision: VisionTower, connector: AnyConnector, layers: int) -> None:
    """Refuse what the model cannot do.

    Raises:
        UsageError: more tokens than there are, a number that the grid or the connector does not give, a score that the
            tower does not have, or a schedule that does not fit the decoder.
    """
    method, keep, tokens = reduction.method, reduction.keep, connector.tokens
    if keep > tokens:
        raise UsageError(
            f"reduction {method!r} was to keep {keep} visual tokens but the connector gives {tokens}; nothing would be "
            "left out, so keep fewer or give no reduction"
        )
    if method == "connector":
        if len(connector.sizes) == 1 or keep not in connector.sizes:
            raise UsageError(
                f"the connector was asked for {keep} tokens but gives {_some(connector.sizes)}; choose one of them, or "
                "a connector that gives any number"
            )
    elif method in ("top", "rows", "even", "pool") and not connector.gridded:
        raise UsageError(
            f"reduction {method!r} chooses among the places of the picture, which the tokens of this connector are "
            "not; use connector 'mlp' or 'nested', or the methods 'merge', 'pyramid', 'aim' or 'connector'"
        )
    elif keep not in possible_keeps(method, tokens):
        raise UsageError(
            f"reduction {method!r} cannot keep {keep} of {tokens} tokens, as rows and cells are whole; keep one of "
            f"{_some(possible_keeps(method, tokens))}"
        )
    if reduction.scored and reduction.score not in possible_scores(vision):
        raise UsageError(
            f"score {reduction.score!r} was asked of a tower that gives {_some(possible_scores(vision))}, since it has "
            "no such attention; use one of these"
        )
    if reduction.schedule is not None and not reduction.inside:
        raise UsageError(
            f"reduction {method!r} was given a schedule, which only 'pyramid' and 'aim' follow; it would be passed "
            "over, so leave it out"
        )
    layer_counts(reduction, tokens, layers)


def possible_keeps(method: str, tokens: int) -> tuple[int, ...]:
    """All numbers of tokens that `method` can keep of `tokens`, which are a square grid where it matters."""
    grid = round(tokens**0.5)
    if method == "rows":
        return tuple(grid * rows for rows in range(1, grid + 1))
    if method == "even":
        return tuple(side**2 for side in range(1, grid + 1))
    if method == "pool":
        return tuple(side**2 for side in range(1, grid + 1) if grid % side == 0)
    return tuple(range(1, tokens + 1))


def _some(values: tuple[object, ...]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{values[0]} to {values[-1]}"


def look(vision: VisionTower, pixels: Tensor, scores: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Features [B, N, C] of the tower and the scores asked for, [B, N] each; attention is only made where needed."""
    found: dict[str, Tensor] = {}
    if any(name != "distinct" for name in scores):
        features, attentions = vision.watch(pixels)
        # FasterVLM's layer; where there is one alone, that one
        late = attentions[max(len(attentions) - 2, 0)]
        for name in scores:
            if name == "cls":
                found[name] = cls_scores(late, vision.prefix)
            elif name == "cls-layers":
                # which layer VTC-CLS starts from for which number of tokens is not known; the second half is ours
                found[name] = layer_scores(attentions, min(len(attentions) // 2, len(attentions) - 2), vision.prefix)
            elif name == "received":
                found[name] = received_scores(late, vision.prefix)
    else:
        features = vision(pixels)
    if "distinct" in scores:
        found["distinct"] = distinct_scores(features)
    return features, found


def condense(reduction: Reduction, tokens: Tensor, scores: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What of the tokens [B, N, W] goes into the decoder, [B, K, W], and the place of each, int64 [B, K], rising.

    A merged token has its receiver's place, a pooled one the middle of its cell.
    """
    batch, count, _ = tokens.shape
    method, keep = reduction.method, reduction.keep
    grid = round(count**0.5)
    whole = torch.arange(count, device=tokens.device).expand(batch, -1)
    if method in ("even", "pool"):
        places = even_places(grid, round(keep**0.5)).to(tokens.device).expand(batch, -1)
        return (kept(tokens, places) if method == "even" else pool_grid(tokens, round(keep**0.5))), places
    if reduction.scored:
        score = scores[reduction.score]
        places = keep_top(score, keep) if method == "top" else keep_rows(score, keep // grid)
        return kept(tokens, places), places
    if method == "aim":
        return merge_alternating(tokens, whole, keep)
    if method == "merge":
        return _merged(tokens, whole, keep)
    return tokens, whole


def _merged(tokens: Tensor, places: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """PiToMe in rounds of half of the tokens at most, which compares them as they are given to the decoder."""
    sizes = tokens.new_ones(tokens.shape[:2])
    while (count := tokens.shape[1]) > keep:
        tokens, sizes, found = merge_similar(tokens, tokens, min(count - keep, count // 2), sizes=sizes)
        places = places.gather(1, found)
    return tokens, places
