"""The text tower: a compact transformer over token ids, written so that every exporter takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.config import BlockWidths, TextConfig
from pocketvlm.students.image import ProjectionHead

# finite and inside float16: -inf or finfo(float32).min turn into NaN in half-precision runtimes
_MASKED = -1e4


class Block(nn.Module):
    """Attention and MLP, each with its norm before it or (BERT) after its residual sum.

    x: [B, L, W]; bias: additive, broadcast to [B, heads, L, L].
    """

    def __init__(self, config: TextConfig, widths: BlockWidths) -> None:
        super().__init__()
        self.norm_last = config.block == "bert"
        width, hidden = config.width, widths.hidden
        self.heads = widths.heads
        self.head_width = width // config.heads
        self.norm1 = _norm(config)
        self.qkv = nn.Linear(width, 3 * self.heads * self.head_width)
        self.out = nn.Linear(self.heads * self.head_width, width)
        self.norm2 = _norm(config)
        self.fc1 = nn.Linear(width, hidden)
        self.act = QuickGelu() if config.activation == "quick_gelu" else nn.GELU()
        self.fc2 = nn.Linear(hidden, width)
        # one each, so that neither's place in the tower is ambiguous
        self.drop1 = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.drop2 = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.norm_last:
            x = self.norm1(x + self._attend(x, bias))
            return self.norm2(x + self._mlp(x))
        x = x + self._attend(self.norm1(x), bias)
        return x + self._mlp(self.norm2(x))

    def _attend(self, x: Tensor, bias: Tensor) -> Tensor:
        length = x.shape[1]
        qkv = self.qkv(x).reshape(-1, length, 3, self.heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # written out instead of scaled_dot_product_attention: one arithmetic on every device and dtype
        scores = torch.matmul(q * self.head_width**-0.5, k.transpose(-2, -1)) + bias
        mixed = torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2)
        return self.drop1(self.out(mixed.reshape(-1, length, self.heads * self.head_width)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.act(self.fc1(x))))


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _norm(config: TextConfig) -> nn.LayerNorm:
    # BERT's epsilon is far below LayerNorm's usual one, and its embeddings are small enough to notice
    return nn.LayerNorm(config.width, eps=1e-12 if config.block == "bert" else 1e-5)


class TextTower(nn.Module):
    """int32 ids [B, L] -> (embedding [B, D], features [B, W]), both not normalised; L is at most context_length.

    Padding is whatever equals `pad_id`: it takes no part in attention or pooling, so trailing padding never changes
    a result, and training cuts columns that hold nothing else. Pooling "mean" averages the real tokens after the last
    norm; "eot" takes the last real token. With `end_id` the real tokens are those up to the first one of that id.
    embed_norm and norm: after the embedding ("bert" only) and after the last block ("pre-norm" only).
    """

    positions: Tensor
    causal: Tensor | None
    earlier: Tensor | None

    def __init__(self, config: TextConfig, spec: TextSpec, embed_dim: int) -> None:
        super().__init__()
        self.pad_id, self.end_id = spec.pad_id, config.end_id
        self.pool = config.pool
        inner = config.embedding_width or config.width
        self.token = nn.Embedding(spec.vocab_size, inner)
        self.widen = nn.Linear(inner, config.width, bias=False) if inner != config.width else nn.Identity()
        self.position = nn.Parameter(torch.empty(config.context_length, config.width))
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        bert = config.block == "bert"
        self.embed_norm = _norm(config) if bert else nn.Identity()
        whole = BlockWidths(heads=config.heads, hidden=int(config.width * config.mlp_ratio))
        self.blocks = nn.ModuleList(Block(config, widths) for widths in config.blocks or (whole,) * config.layers)
        self.norm = nn.Identity() if bert else _norm(config)
        self.projection = ProjectionHead(config.projection, config.width, embed_dim)
        self.register_buffer("positions", torch.arange(config.context_length), persistent=False)
        mask = torch.full((config.context_length,) * 2, _MASKED).triu(1) if config.attention == "causal" else None
        self.register_buffer("causal", mask, persistent=False)
        # [L, L], 1 where the row's position comes before the column's
        earlier = torch.ones((config.context_length,) * 2).triu(1) if config.end_id is not None else None
        self.register_buffer("earlier", earlier, persistent=False)
        self._initialise(config)

    def record_tokens(self, keep: Callable[[Tensor], None]) -> Callable[[], None]:
        """Have `keep` called with the last layer's [B, L, W] in every forward; returns what undoes it."""

        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            keep(output)

        return self.norm.register_forward_hook(hook).remove

    def record_exit(self, layers: int, keep: Callable[[Tensor], None]) -> Callable[[], None]:
        """Have `keep` called with the embedding [B, D] after `layers` layers, through the tower's own final norm,
        pooling and projection, in every forward; returns what undoes it.

        Raises:
            UsageError: the tower has no such layer.
        """
        if not 1 <= layers <= len(self.blocks):
            raise UsageError(
                f"an exit after {layers} layers was asked of a text tower of {len(self.blocks)}; it would never be "
                f"reached, so name one from 1 to {len(self.blocks)}"
            )
        inner: list[Tensor] = []

        def leave(module: nn.Module, inputs: tuple[Tensor], output: object) -> None:
            # not through __call__: hooks on the norm are there for the last layer alone
            x, real = self.norm.forward(inner.pop()), (inputs[0] != self.pad_id)
            keep(self.projection(self._pool(x, real.to(x.dtype))))

        block = self.blocks[layers - 1]
        seen = block.register_forward_hook(lambda module, inputs, output: inner.append(output))
        left = self.register_forward_hook(leave)

        def undo() -> None:
            seen.remove()
            left.remove()

        return undo

    def _initialise(self, config: TextConfig) -> None:
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)
        deep = (2 * max(config.layers, 1)) ** -0.5
        for name, module in self.blocks.named_modules():
            if isinstance(module, nn.Linear):
                # residual branches start smaller with depth, as in GPT-2 and CLIP
                residual = name.endswith(("out", "fc2"))
                nn.init.normal_(module.weight, std=module.in_features**-0.5 * (deep if residual else 1.0))
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length = ids.shape[1]
        # cut only where there is something to cut: a slice in the exported graph is an alias Core ML cannot convert
        position: Tensor = self.position
        causal, earlier = self.causal, self.earlier
        if length != len(position):
            position = position[:length]
            causal = causal[:length, :length] if causal is not None else None
            earlier = earlier[:length, :length] if earlier is not None else None
        x = self.drop(self.embed_norm(self.widen(self.token(ids)) + position))
        known = ids != self.pad_id
        if earlier is not None and self.end_id is not None:
            known = torch.matmul(torch.eq(ids, self.end_id).to(x.dtype), earlier) == 0
        real = known.to(x.dtype)
        bias = (1.0 - real)[:, None, None, :] * _MASKED
        if causal is not None:
            bias = bias + causal
        for block in self.blocks:
            x = block(x, bias)
        features = self._pool(self.norm(x), real)
        return self.projection(features), features

    def _pool(self, x: Tensor, real: Tensor) -> Tensor:
        """[B, W] of tokens x [B, L, W]; real: 1 for a token, 0 for padding, [B, L] in x's dtype."""
        count = real.sum(dim=1, keepdim=True).clamp(min=1.0)
        if self.pool == "mean":
            weight = real / count
        else:
            positions = self.positions if x.shape[1] == len(self.positions) else self.positions[: x.shape[1]]
            weight = (positions == (count - 1.0)).to(x.dtype)
        return (x * weight[:, :, None]).sum(dim=1)
