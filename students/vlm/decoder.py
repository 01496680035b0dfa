"""A compact Llama-type decoder: root-mean-square norms, rotary positions, grouped queries, gated MLP, tied embeddings.

Touvron et al. (arXiv:2302.13971); Su et al. (arXiv:2104.09864), in the half-split layout; Ainslie et al.
(arXiv:2305.13245). Parameters have the names of transformers' `LlamaModel`, so that its weights load as they are.
Plain operations on static shapes: the cache is an argument and a result, never state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.students.vlm.config import DecoderConfig

# hidden states, keys, values
Cached = tuple[Tensor, Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D], cos and sin [B, 1, T, D]; dimension i turns with i + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all positions, float32 [context_length, D] each."""
    half = config.width // config.heads // 2
    frequency = config.rope_theta ** -(torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(config.context_length, dtype=torch.float32)[:, None] * frequency
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_width = config.width // config.heads
        narrow = self.kv_heads * self.head_width
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, narrow, bias=False)
        self.v_proj = nn.Linear(config.width, narrow, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, Hkv, T, D], the first two rotated."""
        v = self._split(self.v_proj(x), self.kv_heads)
        return self.queries(x, cos, sin), self.keys(x, cos, sin), v

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, H, T, D], rotated."""
        q = self._split(self.q_proj(x), self.heads)
        return rotate(q, cos.to(q.dtype), sin.to(q.dtype))

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, Hkv, T, D], rotated."""
        k = self._split(self.k_proj(x), self.kv_heads)
        return rotate(k, cos.to(k.dtype), sin.to(k.dtype))

    def _split(self, x: Tensor, heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, heads, self.head_width).transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """q [B, H, T, D]; k, v [B, Hkv, C, D]; visible bool [B or 1, 1, T, C]. Returns [B, T, W]."""
        each = self.heads // self.kv_heads
        k, v = k.repeat_interleave(each, dim=1), v.repeat_interleave(each, dim=1)
        # the backward pass of torch's fused attention on a CPU takes 2.5 times as long in bfloat16 as in float32
        if self.training and q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=visible)
            mixed = wide.to(v.dtype)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn.attend(*self.self_attn.qkv(self.input_layernorm(x), cos, sin), visible)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(
        self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor, places: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` over a cache [B, Hkv, C, D], into which the new keys and values are put at `places` [B, T]."""
        q, k, v = self.self_attn.qkv(self.input_layernorm(x), cos, sin)
        index = places[:, None, :, None].expand_as(k)
        keys, values = keys.scatter(2, index, k.to(keys.dtype)), values.scatter(2, index, v.to(values.dtype))
        x = x + self.self_attn.attend(q, keys, values, visible)
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; `logits` reads them with the tied embedding.

    rope: [context_length, D] tables of cosines and sines.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._start()

    def _start(self) -> None:
        # rows of length 1, so that the tied output can be sure of a token from the start
        nn.init.normal_(self.embed_tokens.weight, std=self.embed_tokens.embedding_dim**-0.5)
        # every layer adds to the stream twice, and the sum of all should stay as large as one
        shrunk = 0.02 / (2 * len(self.layers)) ** 0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2 and name != "embed_tokens.weight":
                nn.init.normal_(weight, std=shrunk if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)

    def forward(self, x: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """x [B, T, W], positions int64 [B, T], visible bool [B or 1, 1, T, T] (query, key) to [B, T, W]."""
        cos, sin = self.tables(positions)
        for block in self.layers:
            x = block(x, cos, sin, visible)
        return self.norm(x)

    def step(
        self,
        x: Tensor,
        positions: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix: int = 0,
        *,
        back: Sequence[int] = (),
        renumber: bool = False,
    ) -> Cached:
        """`forward` over a static cache: a whole prompt, or one token at a time.

        A query at position p sees what the cache holds at positions up to p, and all up to `prefix`, which therefore
        has to come in one call. What lies behind is never seen before it is overwritten, so padding needs no mask.

        Args:
            x: [B, T, W]. positions: int64 [B, T], where the new keys go. keys, values: [L, B, Hkv, C, D].
            back: for each layer, how far before its position a token lies in the cache, because visual tokens were left
            out before or in it (`dropping.prefill`); 0 where empty. renumber: turn by the place in the cache, not by
            the position.

        Returns hidden states [B, T, W], and keys and values with the new ones in place.
        """
        shifts = tuple(back) or (0,) * len(self.layers)
        laid = {shift: self._laid(positions, shift, keys.shape[3], prefix, renumber) for shift in dict.fromkeys(shifts)}
        new_keys, new_values = [], []
        for layer, block in enumerate(self.layers):
            cos, sin, visible, places = laid[shifts[layer]]
            x, k, v = block.step(x, cos, sin, visible, places, keys[layer], values[layer])  # type: ignore[operator]
            new_keys.append(k)
            new_values.append(v)
        return self.norm(x), torch.stack(new_keys), torch.stack(new_values)

    def _laid(
        self, positions: Tensor, shift: int, room: int, prefix: int, renumber: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tables, what is visible, and places in the cache of a layer that lacks `shift` tokens."""
        places = positions - shift
        reach = places.clamp(min=prefix)[:, None, :, None]
        visible = torch.arange(room, device=places.device) <= reach
        return *self.tables(places if renumber else positions), visible, places

    def empty_cache(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a cache that nothing was put into, [L, B, Hkv, C, D] each."""
        config, weight = self.config, self.embed_tokens.weight
        shape = (config.layers, batch, config.kv_heads, config.context_length, config.width // config.heads)
        return torch.zeros(shape, dtype=weight.dtype, device=weight.device), torch.zeros(
            shape, dtype=weight.dtype, device=weight.device
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., W] to [..., V]."""
        return F.linear(hidden, self.embed_tokens.weight)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, T, D] of positions int64 [B, T]."""
        return self.cos[positions][:, None], self.sin[positions][:, None]
