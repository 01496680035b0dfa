"""Visual tokens left out or merged without training: pure functions, static shapes, so that they can be exported.

First a score for every token, then the places that stay. Everything here is read from the vision tower, before the
decoder. Sources are named at each function; what could not be checked there is called a "-style" of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.errors import UsageError


def cls_scores(attention: Tensor, prefix: int = 1) -> Tensor:
    """What the class token looks at, mean over heads: FasterVLM's score (arXiv:2412.01818), there of the layer before
    the last.

    Args:
        attention: probabilities [B, H, P + N, P + N] (query, key) of one layer. prefix: P tokens before the picture's,
            the class token first.

    Returns [B, N].
    """
    return attention[:, :, 0, prefix:].mean(dim=1)


def layer_scores(attentions: Sequence[Tensor], start: int, prefix: int = 1) -> Tensor:
    """`cls_scores` summed over layers from `start` (counted from 0) to the one before the last: VTC-CLS
    (arXiv:2412.05819).

    attentions: of every layer, first to last, as in `cls_scores`. Returns [B, N].

    Raises:
        UsageError: no layer between `start` and the last.
    """
    if not 0 <= start < len(attentions) - 1:
        raise UsageError(
            f"scores were to be summed from layer {start} to the one before the last of {len(attentions)}, which is no "
            f"layer; start from 0 to {len(attentions) - 2}"
        )
    return torch.stack([cls_scores(attention, prefix) for attention in attentions[start:-1]]).sum(dim=0)


def received_scores(attention: Tensor, prefix: int = 0) -> Tensor:
    """How much attention a token gets, mean over heads and over all tokens that look: FoPru-style (arXiv:2411.14164).

    That it ranks by the encoder's attention is from its abstract; mean and layer (that before the last) are ours.

    attention: as in `cls_scores`; prefix may be 0. Returns [B, N].
    """
    return attention[:, :, :, prefix:].mean(dim=(1, 2))


def distinct_scores(tokens: Tensor) -> Tensor:
    """1 - cosine of each token with the mean token, for towers that have no class token; a construction of ours.

    tokens: [B, N, C]. Returns [B, N] in 0..2; ground that looks alike everywhere is close to the mean where it is most
    of the picture.
    """
    return 1 - F.cosine_similarity(tokens, tokens.mean(dim=1, keepdim=True), dim=-1)


def keep_top(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` highest scores, in reading order: int64 [B, keep]; scores: [B, N].

    This is also FoPru's "rank" (arXiv:2411.14164).

    Raises:
        UsageError: keep outside 1..N.
    """
    _check(keep, scores.shape[1], "tokens")
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def keep_rows(scores: Tensor, rows: int) -> Tensor:
    """Places of the `rows` rows of a square grid that have the highest mean score, whole and in reading order.

    FoPru-style "row" (arXiv:2411.14164): that rows are kept whole is from its abstract, the row's score is ours.

    scores: [B, G * G]. Returns int64 [B, rows * G].

    Raises:
        UsageError: no square grid, or rows outside 1..G.
    """
    grid = round(scores.shape[1] ** 0.5)
    if grid**2 != scores.shape[1]:
        raise UsageError(
            f"rows were asked of {scores.shape[1]} tokens, which are no square grid, so there are no rows; use keep_top"
        )
    _check(rows, grid, "rows")
    best = keep_top(scores.unflatten(1, (grid, grid)).mean(dim=2), rows)
    return (best[:, :, None] * grid + torch.arange(grid, device=scores.device)).flatten(1)


def even_places(grid: int, side: int) -> Tensor:
    """Places of a square grid that are the middles of the cells of a coarser one, int64 [side^2], in reading order.

    Of an even cell the middle that comes first is not taken but the one behind it; cells need not be alike.

    Raises:
        UsageError: side outside 1..grid.
    """
    _check(side, grid, "places a side")
    at = (2 * torch.arange(side) + 1) * grid // (2 * side)
    return (at[:, None] * grid + at).flatten()


def kept(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens at these places: [B, N, C] and int64 [B, K] to [B, K, C]."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def energies(features: Tensor, margin: float) -> Tensor:
    """How much each token is one of many, PiToMe's energy (arXiv:2405.16148): mean_j ELU(cos_ij - margin), itself
    among the j.

    features: [B, N, D], the keys of a layer, averaged over heads, in the authors' code. Returns [B, N].
    """
    unit = F.normalize(features, dim=-1)
    return F.elu(unit @ unit.transpose(1, 2) - margin).mean(dim=2)


def merge_similar(
    tokens: Tensor, features: Tensor, remove: int, *, margin: float = 0.9, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge `remove` tokens into others that are alike, in PiToMe's way.

    The 2 * remove tokens of highest energy are sorted by it; every second one, from the second, receives, and each of
    the others is merged into the receiver of highest cosine, as a mean weighted by sizes. The rest stays as it is. A
    receiver keeps its place, and the result is in reading order (the authors' leaves the order open).

    Args:
        tokens: [B, N, C]. features: [B, N, D] to compare by. margin: of `energies`; 0.9 - 0.9 l / L in layer l of L.
        sizes: [B, N], how many tokens each already stands for; ones where None.

    Returns tokens [B, N - remove, C], sizes [B, N - remove] and places int64 [B, N - remove].

    Raises:
        UsageError: remove outside 1..N / 2.
    """
    batch, count, width = tokens.shape
    _check(remove, count // 2, "tokens to merge")
    sizes = tokens.new_ones(batch, count) if sizes is None else sizes
    order = energies(features, margin).argsort(dim=1, descending=True, stable=True)
    giving, receiving = order[:, 0 : 2 * remove : 2], order[:, 1 : 2 * remove : 2]
    unit = F.normalize(features, dim=-1)
    nearest = (kept(unit, giving) @ kept(unit, receiving).transpose(1, 2)).argmax(dim=2)
    goal = receiving.gather(1, nearest)
    heavy = tokens * sizes[:, :, None]
    total = heavy.scatter_add(1, goal[:, :, None].expand(-1, -1, width), kept(heavy, giving))
    weight = sizes.scatter_add(1, goal, sizes.gather(1, giving))
    places = torch.cat([receiving, order[:, 2 * remove :]], dim=1).sort(dim=1).values
    sizes = weight.gather(1, places)
    return kept(total, places) / sizes[:, :, None], sizes, places


def merge_alternating(tokens: Tensor, places: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Merge down to `keep` tokens before the decoder as AIM does (arXiv:2412.03248), which is ToMe without sizes.

    In each round every second token, from the first, may give, the others receive; those that are most alike (cosine)
    are merged into the receiver that they are most like, as a plain mean of all that meet there. As many rounds as it
    takes, of half of the tokens at most. A receiver keeps its place, and the result is in reading order (the authors'
    is not).

    tokens: [B, N, C]; places: int64 [B, N], rising. Returns [B, keep, C] and [B, keep].

    Raises:
        UsageError: keep outside 1..N.
    """
    _check(keep, tokens.shape[1], "tokens")
    while (count := tokens.shape[1]) > keep:
        remove = min(count - keep, count // 2)
        given, received = tokens[:, ::2], tokens[:, 1::2]
        alike = F.normalize(given, dim=-1) @ F.normalize(received, dim=-1).transpose(1, 2)
        best, goal = alike.max(dim=2)
        order = best.argsort(dim=1, descending=True, stable=True)
        giving, staying = order[:, :remove], order[:, remove:]
        index = goal.gather(1, giving)
        total = received.scatter_add(1, index[:, :, None].expand(-1, -1, tokens.shape[2]), kept(given, giving))
        number = torch.ones_like(best[:, : received.shape[1]])
        number = number.scatter_add(1, index, torch.ones_like(best[:, :remove]))
        tokens = torch.cat([kept(given, staying), total / number[:, :, None]], dim=1)
        places = torch.cat([places[:, ::2].gather(1, staying), places[:, 1::2]], dim=1)
        order = places.argsort(dim=1)
        tokens, places = kept(tokens, order), places.gather(1, order)
    return tokens, places


def pool_grid(tokens: Tensor, side: int) -> Tensor:
    """Means over the cells of a coarser square grid, M3's scales (arXiv:2405.17430): [B, G * G, C] to [B, side^2, C].

    Raises:
        UsageError: no square grid, or a side that does not divide it.
    """
    grid = round(tokens.shape[1] ** 0.5)
    if grid**2 != tokens.shape[1] or not 1 <= side <= grid or grid % side:
        raise UsageError(
            f"{tokens.shape[1]} tokens were to be pooled to {side} x {side} places, whose cells would differ in size; "
            "give a square grid and a side that divides it"
        )
    cell = grid // side
    return tokens.unflatten(1, (side, cell, side, cell)).mean(dim=(2, 4)).flatten(1, 2)


def _check(number: int, most: int, what: str) -> None:
    if not 1 <= number <= most:
        raise UsageError(
            f"{number} {what} of at most {most} were asked for, which leaves nothing to do; give 1 to {most}"
        )
