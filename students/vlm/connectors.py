"""Connectors: features of a picture's places to visual tokens of the decoder, as many as there are places or fewer.

`build_connector` makes the one that a configuration names. Each says how many tokens it gives: `tokens` without a wish,
`sizes` all numbers that it can be asked for, `span` the positions that the picture takes before the text, and
`gridded` whether token i is place i of the tower (so that `students.vlm.reduce` may choose among them). All shapes are
static at a fixed number of tokens.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.config import DecoderConfig, VlmConfig
from pocketvlm.students.vlm.decoder import Block, rope_tables
from pocketvlm.students.vlm.reduce import pool_grid
from pocketvlm.students.vlm.vision import VisionTower


class Connector(nn.Module):
    """Features [B, N, C] to N decoder embeddings [B, N, W]: standardised, two layers with GELU, a learnt place each.

    LLaVA's MLP (arXiv:2310.03744) after a layer norm, because levels of several depths differ in size; the norm and
    the places are ours.
    """

    gridded = True

    def __init__(self, width: int, hidden: int, out: int, tokens: int) -> None:
        super().__init__()
        self.tokens = self.span = tokens
        self.sizes: tuple[int, ...] = (tokens,)
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, out)
        self.places = nn.Parameter(torch.zeros(tokens, out))
        nn.init.normal_(self.places, std=0.02)

    def forward(self, features: Tensor, keep: int) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(features)))) + self.places


class Nested(Connector):
    """The MLP's tokens averaged over the cells of a coarser grid: M3 (arXiv:2405.17430), without further weights.

    sizes: the squares of the sides that divide the grid's. M3 trains on the mean loss over all scales; here a step
    draws one of them (`Vlm.hidden`), which costs one forward instead of all.
    """

    def __init__(self, width: int, hidden: int, out: int, tokens: int) -> None:
        super().__init__(width, hidden, out, tokens)
        grid = round(tokens**0.5)
        self.sizes = tuple(side**2 for side in range(1, grid + 1) if grid % side == 0)

    def forward(self, features: Tensor, keep: int) -> Tensor:
        """[B, keep, W]; keep: one of `sizes`."""
        return pool_grid(super().forward(features, self.tokens), round(keep**0.5))


class CrossAttention(nn.Module):
    """Multi-head attention with four projections: q [B, Q, E], k and v [B, N, E] to [B, Q, E]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise UsageError(
                f"connector_hidden {width} does not split into connector_heads {heads}, so no head would have a whole "
                "width; give heads that divide it"
            )
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = [
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        return self.o_proj(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


def _trunc_normal(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class TokenPacker(nn.Module):
    """Coarse to fine, TokenPacker (arXiv:2407.02392): each token of a coarse map asks the fine ones of its own cell.

    Query: LN(W_q x) of the last map, bilinearly made smaller by s. Keys and values: LN(MLP(x)) of all levels there, an
    MLP each. A query attends to its s x s cell alone; an MLP makes the result as wide as the decoder. There is no
    residual to the query. The layer norm of the features before all this is ours: levels of one tower differ in size.

    Features [B, G * G, C] to [B, (G / s)^2, W]; the last `last` of C channels are the last map's.
    """

    gridded = False

    def __init__(self, width: int, last: int, hidden: int, out: int, grid: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.side = round(tokens**0.5)
        if self.side**2 != tokens or grid % self.side:
            raise UsageError(
                f"connector 'tokenpacker' was asked for {tokens} tokens of a map of {grid} x {grid} places, whose "
                "cells would differ in size; give the square of a number that divides its side"
            )
        self.grid, self.last, self.tokens, self.span, self.sizes = grid, last, tokens, tokens, (tokens,)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(last, hidden)
        self.key, self.value = (
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(2)
        )
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.attention = CrossAttention(hidden, heads)
        self.out = nn.Sequential(nn.Linear(hidden, out), nn.GELU(), nn.Linear(out, out))
        _trunc_normal(self)

    def forward(self, features: Tensor, keep: int) -> Tensor:
        features = self.norm(features)
        fine = features[:, :, -self.last :].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        coarse = F.interpolate(fine, size=(self.side, self.side), mode="bilinear", align_corners=False)
        q = self.query_norm(self.query(coarse.flatten(2).transpose(1, 2)))
        k, v = self.key_norm(self.key(features)), self.value_norm(self.value(features))
        # every cell is a batch entry of one query
        found = self.attention(q.flatten(0, 1)[:, None], self._cells(k), self._cells(v))
        return self.out(found.view(q.shape))

    def _cells(self, x: Tensor) -> Tensor:
        """[B, G * G, E] to [B * side^2, s * s, E]."""
        cell = self.grid // self.side
        return x.unflatten(1, (self.side, cell, self.side, cell)).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def grid_sines(side: int, width: int, like: int) -> Tensor:
    """Sines and cosines of rows and columns of a square grid, float32 [side^2, width], in units of a grid of `like`.

    A quarter of the width each: sin and cos of the row, sin and cos of the column, at base 10,000.
    """
    at = (torch.arange(side, dtype=torch.float32) + 0.5) * like / side - 0.5
    angle = at[:, None] * 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float32) / (width // 4))
    each = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = each[:, None].expand(-1, side, -1), each[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


class Mqt(nn.Module):
    """Any number of query tokens: Matryoshka query transformer (arXiv:2405.19315).

    Learnt queries, of which the first `keep` are used: query = LN(q + position), key = LN(position), value = LN of the
    projected features. As in the authors' code the key holds nothing of the picture, so the weights are learnt pooling,
    the same for every picture. They resize the keys' positions bicubically; here they are computed where the places
    are. In training a step draws `keep` from `sizes` (`Vlm.hidden`; the authors: from the even ones).

    Features [B, N, C] to [B, keep, W].
    """

    gridded = False
    query_places: Tensor
    key_places: Tensor

    def __init__(self, width: int, hidden: int, out: int, grid: int, tokens: int, heads: int) -> None:
        super().__init__()
        if hidden % 4:
            raise UsageError(
                f"connector 'mqt' has connector_hidden {hidden}, but rows and columns take a quarter of it each for "
                "sines and for cosines; give a multiple of 4"
            )
        self.tokens = self.span = tokens
        self.sizes = tuple(range(1, tokens + 1))
        self.queries = nn.Parameter(torch.empty(tokens, hidden))
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, hidden, bias=False)
        self.query_norm, self.key_norm, self.value_norm = (nn.LayerNorm(hidden) for _ in range(3))
        self.attention = CrossAttention(hidden, heads)
        self.out = nn.Linear(hidden, out)
        _trunc_normal(self)
        nn.init.trunc_normal_(self.queries, std=0.02)
        side = next(side for side in range(1, tokens + 1) if side**2 >= tokens)
        self.register_buffer("query_places", grid_sines(side, hidden, side)[:tokens], persistent=False)
        self.register_buffer("key_places", grid_sines(grid, hidden, side), persistent=False)

    def forward(self, features: Tensor, keep: int) -> Tensor:
        batch = len(features)
        q = self.query_norm(self.queries[:keep] + self.query_places[:keep])
        k = self.key_norm(self.key_places)
        v = self.value_norm(self.first(self.norm(features)))
        found = self.attention(q.expand(batch, -1, -1), k.expand(batch, -1, -1), v)
        return self.out(found)


class Fusion(Connector):
    """One token, or few, and questions that have seen the picture: LLaVA-Mini-style (arXiv:2501.03895).

    Learnt queries with positions draw `tokens` out of the MLP's N embeddings by attention over them. Some blocks like
    the decoder's then run over the N embeddings, the drawn ones and the question; only the drawn ones and the
    question's tokens go on to the decoder, whose layers never see the N. As there, answers are embedded as they are.
    Ours: the drawing works on embeddings, not on features; picture tokens see each other both ways, as in our decoder.

    `forward` gives the drawn tokens [B, M, W]; `picture` also the blocks' keys and values, which `fuse` takes.
    """

    gridded = False
    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, hidden: int, tokens: int, places: int, layers: int, decoder: DecoderConfig) -> None:
        super().__init__(width, hidden, decoder.width, places)
        self.tokens, self.span, self.sizes = tokens, places + tokens, (tokens,)
        self.queries = nn.Parameter(torch.empty(tokens, decoder.width))
        nn.init.trunc_normal_(self.queries, std=0.02)
        self.key_norm = nn.RMSNorm(decoder.width, decoder.norm_eps)
        self.attention = CrossAttention(decoder.width, decoder.heads)
        self.blocks = nn.ModuleList(Block(decoder) for _ in range(layers))
        for name, weight in self.blocks.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                # the question should pass nearly unchanged at the start
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)
        cos, sin = rope_tables(decoder)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, features: Tensor, keep: int) -> Tensor:
        return self.picture(features)[0]

    def picture(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn tokens [B, M, W]; keys and values of every block over the N + M, [layers, B, Hkv, N + M, D]."""
        seen = super().forward(features, self.places.shape[0])
        known = self.key_norm(seen)
        drawn = self.attention(self.queries.expand(len(seen), -1, -1), known, known)
        x = torch.cat([seen, drawn], dim=1)
        cos, sin = self.cos[None, None, : self.span], self.sin[None, None, : self.span]
        visible = torch.ones(1, 1, self.span, self.span, dtype=torch.bool, device=x.device)
        keys, values = [], []
        for module in self.blocks:
            block = cast(Block, module)
            q, k, v = block.self_attn.qkv(block.input_layernorm(x), cos, sin)
            x = x + block.self_attn.attend(q, k, v, visible)
            x = x + block.mlp(block.post_attention_layernorm(x))
            keys.append(k)
            values.append(v)
        return x[:, -self.tokens :], torch.stack(keys), torch.stack(values)

    def fuse(self, keys: Tensor, values: Tensor, text: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Questions that have seen the picture, [B, T, W].

        Args:
            keys, values: of `picture`. text: embeddings [B, T, W]. positions: int64 [B, T] from the question's start.
            visible: bool [B or 1, T, T], which token (second) of the text a token (first) sees.
        """
        at = positions + self.span
        cos, sin = self.cos[at][:, None], self.sin[at][:, None]
        ahead = visible.new_ones(len(visible), visible.shape[1], self.span)
        whole = torch.cat([ahead, visible], dim=2)[:, None]
        for module, seen, shown in zip(self.blocks, keys, values):
            block = cast(Block, module)
            q, k, v = block.self_attn.qkv(block.input_layernorm(text), cos, sin)
            k, v = torch.cat([seen, k], dim=2), torch.cat([shown, v], dim=2)
            text = text + block.self_attn.attend(q, k, v, whole)
            text = text + block.mlp(block.post_attention_layernorm(text))
        return text


AnyConnector = Connector | TokenPacker | Mqt


def build_connector(config: VlmConfig, vision: VisionTower) -> AnyConnector:
    """The connector that `config.connector` names, for this tower.

    Raises:
        UsageError: tokens, heads or widths that do not go together, or numbers to draw that it does not give.
    """
    made = _build(config, vision)
    if not set(config.connector_drawn) <= set(made.sizes if len(made.sizes) > 1 else ()):
        raise UsageError(
            f"connector {config.connector!r} was told to draw {list(config.connector_drawn)} tokens in training but "
            f"gives {len(made.sizes)} numbers of them up to {made.sizes[-1]}; name some of those, or none"
        )
    return made


def _build(config: VlmConfig, vision: VisionTower) -> AnyConnector:
    width, hidden, out, places = vision.width, config.connector_hidden, config.decoder.width, vision.tokens
    kind, asked, heads = config.connector, config.connector_tokens, config.connector_heads
    if kind in ("mlp", "nested"):
        if asked is not None:
            raise UsageError(
                f"connector {kind!r} gives a token for each place and was told connector_tokens {asked}, which would "
                "be passed over; leave it out and give a reduction"
            )
        return (Connector if kind == "mlp" else Nested)(width, hidden, out, places)
    if kind == "tokenpacker":
        return TokenPacker(width, vision.last_width, hidden, out, vision.grid, asked or places // 4, heads)
    if kind == "mqt":
        return Mqt(width, hidden, out, vision.grid, asked or places, heads)
    return Fusion(width, hidden, asked or 1, places, config.connector_layers, config.decoder)
