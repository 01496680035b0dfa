"""The two graphs of a generative student, on static shapes: the picture, and one step over the key-value cache.

The step is `Decoder.step` for one conversation, arranged for speed: one matrix for queries, keys and values and one for
both halves of the MLP, rotary positions of queries and keys together, keys and values never repeated for the queries
that share them. It is checked against the decoder itself before anything is written.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.decoder import Block, Decoder, RMSNorm, rotate
from pocketvlm.students.vlm.model import Vlm
from pocketvlm.students.vlm.tokenizer import BOS

# of a place that may not be seen; its share is exactly 0 after softmax in every precision, and float16 holds it
_UNSEEN = -3e4
# the largest difference of hidden states that the order of sums in float64 explains
_ALLOWED = 1e-9


class Picture(nn.Module):
    """uint8 [1, S, S, 3] to the embeddings [1, P, W] of the places before the text."""

    def __init__(self, model: Vlm) -> None:
        super().__init__()
        # the same model with a decoder that knows `<BOS>` alone: no file of a picture needs the whole table
        self.model = copy.copy(model)
        self.model._modules = dict(model._modules)
        self.model.decoder = _Begin(model.decoder.embed_tokens.weight)  # type: ignore[assignment]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.picture(pixels)


class _Begin(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(table[: BOS + 1].detach().clone())


class Step(nn.Module):
    """Embeddings [T, W], positions int32 [T] and 2 * L caches [Hkv, C, D] (keys and values of each layer in turn) to
    the last hidden state [1, W] and the caches with the new keys and values in place. There is no batch, because phones
    have none and converters spend operators on it.

    A query at position p sees what the caches hold up to p and all before the text; what lies behind is never seen
    before it is overwritten, so that a prompt needs no padding mask and a cache no clearing. Of the last layer only the
    last token's output is asked for, so the others give it keys and values alone.

    products: for XNNPACK and Core ML, which neither slice nor scatter where a length is dynamic (and XNNPACK takes no
    means of rows): every projection by itself; rotating halves, means and writing into the caches as products, which
    cost less than leaving the delegate. Each is exact but for the means.
    """

    cos: Tensor
    sin: Tensor
    places: Tensor

    def __init__(self, decoder: Decoder, prefix: int, *, products: bool = False) -> None:
        super().__init__()
        self.last_of_prefix, self.products = prefix - 1, products
        final = len(decoder.layers) - 1
        self.layers = nn.ModuleList(
            _Layer(block, products, number == final)  # type: ignore[arg-type]
            for number, block in enumerate(decoder.layers)
        )
        self.norm = _Norm(decoder.norm, products)
        self.register_buffer("cos", decoder.cos.detach().clone())
        self.register_buffer("sin", decoder.sin.detach().clone())
        self.register_buffer("places", torch.arange(decoder.config.context_length, dtype=torch.int32))

    def forward(self, x: Tensor, positions: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        cos = self.cos.index_select(0, positions)[:, None]
        sin = self.sin.index_select(0, positions)[:, None]
        reach = positions.clamp(min=self.last_of_prefix)[:, None]
        unseen = (self.places > reach).to(x.dtype) * _UNSEEN
        where: tuple[Tensor, ...]
        if self.products:
            chosen = (self.places[:, None] == positions[None]).to(x.dtype)
            where = (chosen[None], 1 - chosen.sum(1, keepdim=True))
        else:
            where = (positions.long()[None, :, None].expand(caches[0].shape[0], -1, caches[0].shape[2]),)
        written: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            keys, values = caches[2 * number : 2 * number + 2]
            x, keys, values = layer(x, cos, sin, unseen, where, keys, values)
            written += [keys, values]
        return self.norm(x[-1:]), *written


class _Norm(nn.Module):
    """A root-mean-square norm as the operators that runtimes know as one."""

    average: Tensor
    least: Tensor

    def __init__(self, norm: RMSNorm, products: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.products = norm.weight, norm.eps, products
        self.register_buffer("average", torch.full_like(norm.weight.detach(), 1 / len(norm.weight))[None])
        self.register_buffer("least", torch.full_like(norm.weight.detach()[:1], norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        if self.products:
            return x / torch.sqrt(F.linear(x * x, self.average, self.least)) * self.weight
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _Layer(nn.Module):
    turn: Tensor

    def __init__(self, block: Block, products: bool, final: bool) -> None:
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        # products cannot be sliced before the end
        self.final = final and not products
        self.heads, self.kv_heads, self.head_width = attention.heads, attention.kv_heads, attention.head_width
        self.products = products
        self.before_attention = _Norm(block.input_layernorm, products)
        self.before_mlp = _Norm(block.post_attention_layernorm, products)
        self.out, self.down = attention.o_proj, mlp.down_proj
        if products:
            self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
            self.gate, self.up = mlp.gate_proj, mlp.up_proj
            half = self.head_width // 2
            one, nothing = (make(half, half, dtype=self.out.weight.dtype) for make in (torch.eye, torch.zeros))
            # (first, second) to (-second, first), exactly
            self.register_buffer("turn", torch.cat([torch.cat([nothing, -one], 1), torch.cat([one, nothing], 1)]))
        else:
            if self.final:
                self.q, self.kv = attention.q_proj, _stacked(attention.k_proj, attention.v_proj)
            else:
                self.qkv = _stacked(attention.q_proj, attention.k_proj, attention.v_proj)
            self.gate_up = _stacked(mlp.gate_proj, mlp.up_proj)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        unseen: Tensor,
        where: tuple[Tensor, ...],
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        each = self.heads // self.kv_heads
        q, k, v = self._projected(self.before_attention(x), cos, sin)
        keys, values = self._written(keys, k, where), self._written(values, v, where)
        if self.final:
            x, unseen = x[-1:], unseen[-1:]
        # queries that share keys as rows of one product: [Hkv, each * T, D]
        q = q.reshape(-1, self.kv_heads, each, self.head_width).permute(1, 2, 0, 3)
        q = q.reshape(self.kv_heads, -1, self.head_width)
        scores = torch.bmm(q, keys.transpose(1, 2)) * self.head_width**-0.5
        scores = scores.view(self.kv_heads, each, -1, keys.shape[1]) + unseen
        shares = torch.softmax(scores, dim=-1).view(self.kv_heads, -1, keys.shape[1])
        mixed = torch.bmm(shares, values).view(self.kv_heads, each, -1, self.head_width)
        x = x + self.out(mixed.permute(2, 0, 1, 3).reshape(-1, self.heads * self.head_width))
        return x + self._mlp(self.before_mlp(x)), keys, values

    def _projected(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D] ([1, H, D] of the last layer), keys and values [T, Hkv, D], the first two rotated."""
        if self.products:
            q, k, v = (layer(x).view(-1, count, self.head_width) for layer, count in self._each())
            q, k = (part * cos + F.linear(part, self.turn) * sin for part in (q, k))
            return q, k, v
        if self.final:
            q = self.q(x[-1:]).view(1, self.heads, self.head_width)
            k, v = self.kv(x).view(-1, 2 * self.kv_heads, self.head_width).chunk(2, dim=1)
            return rotate(q, cos[-1:], sin[-1:]), rotate(k, cos, sin), v
        heads = self.qkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_width)
        turned, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(turned, cos, sin).split([self.heads, self.kv_heads], dim=1)
        return q, k, v

    def _written(self, cache: Tensor, new: Tensor, where: tuple[Tensor, ...]) -> Tensor:
        """The cache [Hkv, C, D] with new rows [T, Hkv, D] at their places, by index or as a product."""
        if not self.products:
            return cache.scatter(1, where[0], new.transpose(0, 1))
        chosen, kept = where
        rows = torch.bmm(chosen, new.reshape(1, -1, self.kv_heads * self.head_width))
        return cache * kept + rows.view(-1, self.kv_heads, self.head_width).transpose(0, 1)

    def _each(self) -> tuple[tuple[nn.Linear, int], ...]:
        return (self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads)

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = (self.gate(x), self.up(x)) if self.products else self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def _stacked(*layers: nn.Linear) -> nn.Linear:
    weight = torch.cat([layer.weight.detach() for layer in layers])
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def empty_caches(decoder: Decoder) -> list[Tensor]:
    """2 * L zeros [Hkv, C, D], in the decoder's type."""
    config = decoder.config
    shape = (config.kv_heads, config.context_length, config.width // config.heads)
    return [torch.zeros(shape, dtype=decoder.embed_tokens.weight.dtype) for _ in range(2 * config.layers)]


@torch.no_grad()
def checked_step(model: Vlm, *, products: bool = False) -> Step:
    """The model's `Step`, after it was compared in float64 with `Decoder.step` on a prompt and two tokens more.

    Raises:
        UsageError: they differ, which means that the decoder is of a kind that this export does not know.
    """
    decoder, prefix = copy.deepcopy(model.decoder).double().eval(), model.prefix
    step = Step(decoder, prefix, products=products).eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, prefix + 5, decoder.config.width, generator=generator, dtype=torch.float64)
    caches, (keys, values) = empty_caches(decoder), decoder.empty_cache(1)
    for start, end in ((0, prefix + 3), (prefix + 3, prefix + 4), (prefix + 4, prefix + 5)):
        positions = torch.arange(start, end)
        expected, keys, values = decoder.step(x[:, start:end], positions[None], keys, values, prefix - 1)
        found, *caches = step(x[0, start:end], positions.int(), *caches)
        gap = float((found - expected[:, -1]).abs().max() / expected.abs().max().clamp(min=1))
        if not gap <= _ALLOWED:
            raise UsageError(
                f"the decoder of {model.config.name!r} computes otherwise than its exported step (by {gap:.1g}); the "
                "bundle would say other things, so export a student with the decoder of students.vlm"
            )
    return Step(model.decoder, prefix, products=products).eval()
