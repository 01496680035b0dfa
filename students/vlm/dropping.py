"""Visual tokens dropped between the layers of the decoder: PyramidDrop and AIM, by schedules that are fixed beforehand.

How many tokens a layer sees follows from the setting alone, so that every shape is static. A layer's keys and values
lie in the cache without gaps: its dropped tokens shorten what it holds, and a later token lies at its position minus
the layer's `back`, a constant. The cache keeps its one shape [L, B, Hkv, C, D]; later layers leave its end unused. So
the exported step has the inputs it always had, and what is saved is the prefill's work, not the cache's memory.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.config import Reduction
from pocketvlm.students.vlm.decoder import Block, Cached, Decoder

# AIM's softmax is this much sharper, and its importance goes this many steps
_SHARP, _STEPS = 0.1, 5


class Asking(NamedTuple):
    """Which tokens of a text [B, T] decide what is dropped.

    places: int64 [B, A], the last tokens of instructions; weights: [B, A], summing to 1 in each row (PyramidDrop).
    valid: bool [B, T], the tokens of instructions, neither answers nor padding (AIM).
    """

    places: Tensor
    weights: Tensor
    valid: Tensor


def layer_counts(reduction: Reduction | None, tokens: int, layers: int) -> tuple[int, ...]:
    """Visual tokens in each layer of the decoder, of `tokens` that the connector gives.

    "pyramid": all of them up to a quarter of the layers, then N (keep / N)^(1/3), N (keep / N)^(2/3) and, from three
    quarters, keep: PyramidDrop's stages, and its halves where keep is N / 8. "aim": keep up to the middle layer, from
    there less by 7 / (2 L) of it with each, none behind about three quarters: the released schedule of 28 layers,
    stretched to L.

    Raises:
        UsageError: a schedule of another length, that grows, or that holds more than there are.
    """
    if reduction is None:
        return (tokens,) * layers
    keep, given = reduction.keep, reduction.schedule
    first = keep if reduction.method == "aim" else tokens
    if given is not None:
        falling = all(one >= two for one, two in itertools.pairwise(given))
        if len(given) != layers or given[0] != first or min(given) < 0 or not falling:
            raise UsageError(
                f"the schedule {list(given)} does not say how many of {first} visual tokens each of {layers} decoder "
                f"layers sees; give {layers} numbers that begin with {first} and never grow"
            )
        return given
    if reduction.method == "pyramid":
        share = keep / tokens
        # 36 * 0.5 must not become 17 by rounding of powers
        stages = [tokens, *(int(tokens * share ** (stage / 3) + 1e-9) for stage in (1, 2)), keep]
        # the first layer sees them all, of however few layers
        ends = [max(1, layers * stage // 4) for stage in (1, 2, 3)]
        return tuple(stages[sum(layer >= end for end in ends)] for layer in range(layers))
    if reduction.method == "aim":
        behind = (layer - layers // 2 for layer in range(layers))
        return tuple(max(0, int(keep * (1 - max(n, 0) * 3.5 / layers) + 1e-9)) for n in behind)
    return (keep,) * layers


def instruction_scores(block: Block, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, places: Tensor) -> Tensor:
    """What tokens at `places` int64 [B, A] look at in the attention that `block` is about to compute: PyramidDrop.

    Probabilities over all that they see, mean over heads; the norm, queries and keys are the block's own.

    x: hidden states [B, T, W]; visible: bool [B or 1, 1, T, T]. Returns [B, A, T], without gradient.
    """
    with torch.no_grad():
        attention = block.self_attn
        normed = block.input_layernorm(x)
        asking = places[:, :, None].expand(-1, -1, x.shape[2])
        turned = places[:, None, :, None].expand(-1, 1, -1, cos.shape[3])
        cos_all, sin_all = (table.expand(len(x), -1, -1, -1) for table in (cos, sin))
        q = attention.queries(normed.gather(1, asking), cos_all.gather(2, turned), sin_all.gather(2, turned))
        k = attention.keys(normed, cos, sin)
        seen = visible.expand(len(x), 1, -1, -1).gather(2, places[:, None, :, None].expand(-1, 1, -1, x.shape[1]))
        return _probabilities(q, k, seen, 1.0).mean(dim=1)


def importance(q: Tensor, k: Tensor, visible: Tensor, valid: Tensor) -> Tensor:
    """AIM's importance of every token, from one layer's attention.

    M = softmax(q k^T / sqrt(D) / 0.1) under the mask, for each head; s starts equal on all valid tokens, five times
    s <- s M; sqrt of the mean over heads of s^2. Answers are not valid, so that training drops what prefill drops.

    q: [B, H, T, D]; k: [B, Hkv, T, D]; visible: bool [B or 1, 1, T, T]; valid: bool [B, T]. Returns [B, T].
    """
    with torch.no_grad():
        walk = _probabilities(q, k, visible, _SHARP)
        share = valid / valid.sum(dim=1, keepdim=True)
        s = share[:, None, None].to(walk.dtype).expand(-1, q.shape[1], 1, -1)
        for _ in range(_STEPS):
            s = s @ walk
        return s[:, :, 0].square().mean(dim=1).sqrt()


def _probabilities(q: Tensor, k: Tensor, visible: Tensor, temperature: float) -> Tensor:
    """Attention of q [B, H, Q, D] over k [B, Hkv, T, D], in float32: [B, H, Q, T]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(2, 3)).float() / (q.shape[3] ** 0.5 * temperature)
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)


def seen_by(prefix: int, text: Tensor) -> Tensor:
    """bool [B or 1, 1, P + T, P + T]: all see the prefix, the prefix nothing else, text [B or 1, T, T] as it says."""
    batch, length, _ = text.shape
    ahead = text.new_ones(batch, prefix + length, prefix)
    behind = torch.cat([text.new_zeros(batch, prefix, length), text], dim=1)
    return torch.cat([ahead, behind], dim=2)[:, None]


def run(
    decoder: Decoder,
    x: Tensor,
    positions: Tensor,
    text: Tensor,
    counts: tuple[int, ...],
    asking: Asking | None,
    *,
    back: tuple[int, ...],
    method: str = "",
    renumber: bool = False,
    cached: bool = False,
) -> Cached:
    """The decoder over a beginning, visual tokens and texts, of which layer l sees counts[l] visual tokens.

    Tokens that go are gone for the layers behind; the others stay in order. Which of them: before a layer sees fewer,
    "pyramid" asks that layer's attention of the last instruction tokens, "aim" the importance in the layer before.

    Args:
        x: embeddings [B, 1 + counts[0] + T, W]; positions: int64 of the same. text: bool [B or 1, T, T], which token of
            the text sees which. asking: None where no layer sees fewer than the one before. back: for each layer, how
            far before its position a text token lies in the cache.
        renumber: turn tokens by their place among those that are there, not by their position.
        cached: also give keys and values, as `Decoder.empty_cache` lays them out, for `Decoder.step` to go on.

    Returns normalised hidden states [B, 1 + counts[-1] + T, W], keys and values (empty where not `cached`).
    """
    length = text.shape[1]
    room = decoder.config.context_length
    keys: list[Tensor] = []
    values: list[Tensor] = []
    looked = x.new_empty(0)
    count = counts[0]
    cos, sin = _turned(decoder, positions, count, back[0], renumber)
    visible = seen_by(1 + count, text)
    for layer, module in enumerate(decoder.layers):
        block = cast(Block, module)
        if counts[layer] < count:
            if method == "pyramid" and asking is not None:
                asked = instruction_scores(block, x, cos, sin, visible, asking.places + 1 + count)
                looked = (asked * asking.weights[:, :, None]).sum(dim=1)
            places = looked[:, 1 : 1 + count].topk(counts[layer], dim=1).indices.sort(dim=1).values
            x, positions = _without(x, places, count), _without(positions[:, :, None], places, count)[:, :, 0]
            count = counts[layer]
            cos, sin = _turned(decoder, positions, count, back[layer], renumber)
            visible = seen_by(1 + count, text)
        q, k, v = block.self_attn.qkv(block.input_layernorm(x), cos, sin)
        if asking is not None and method == "aim" and layer + 1 < len(counts) and counts[layer + 1] < count:
            ahead = asking.valid.new_ones(len(x), 1 + count)
            looked = importance(q, k, visible, torch.cat([ahead, asking.valid], dim=1))
        x = x + block.self_attn.attend(q, k, v, visible)
        x = x + block.mlp(block.post_attention_layernorm(x))
        if cached:
            behind = room - (1 + count + length)
            keys.append(F.pad(k, (0, 0, 0, behind)))
            values.append(F.pad(v, (0, 0, 0, behind)))
    empty = x.new_empty(0)
    return decoder.norm(x), torch.stack(keys) if cached else empty, torch.stack(values) if cached else empty


def _turned(decoder: Decoder, positions: Tensor, count: int, back: int, renumber: bool) -> tuple[Tensor, Tensor]:
    if renumber:
        ahead = torch.arange(1 + count, device=positions.device).expand(len(positions), -1)
        positions = torch.cat([ahead, positions[:, 1 + count :] - back], dim=1)
    return decoder.tables(positions)


def _without(x: Tensor, places: Tensor, count: int) -> Tensor:
    """x [B, 1 + count + T, C] with those of its visual tokens alone that are at `places` int64 [B, K]."""
    stay = x[:, 1 : 1 + count].gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))
    return torch.cat([x[:, :1], stay, x[:, 1 + count :]], dim=1)
