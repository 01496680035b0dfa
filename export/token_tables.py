"""Token tables in 8 and 4 bits, written out of basic operators that every backend has."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor, nn

from pocketvlm.export.graphs import block_name, inside

_WEIGHT_MAX = 127
# below this many rows a table is positions, not tokens: it costs nothing and every token would suffer
_TABLE_ROWS = 256
# weights that share a 4-bit scale
BLOCK = 32


class Int8Embedding(nn.Module):
    """A token table in int8 with one scale per row; a quarter of the bytes, lookups by plain gather and multiply.

    Backends leave `nn.Embedding` in float32 when they quantize, and it is the largest part of a small text tower.
    Written out of basic operators, so that it needs no quantized kernel on any device.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _WEIGHT_MAX
        self.register_buffer("table", torch.round(weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = self.table.index_select(0, flat).to(self.scale.dtype) * self.scale.index_select(0, flat)
        return rows.reshape(*ids.shape, self.table.shape[1])


class Int4Embedding(nn.Module):
    """A token table in 4 bits, two values a byte, with a float16 scale for each 32 of a row: 4.5 bits a weight.

    Values are -8..7; the largest of a block in magnitude becomes -8, so that all sixteen steps are in use. As
    `Int8Embedding` of basic operators only. The width must be a multiple of 32.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        blocks = weight.detach().unflatten(1, (-1, BLOCK))
        extreme = blocks.gather(2, blocks.abs().argmax(dim=2, keepdim=True))
        scale = (extreme / -8).to(torch.float16)
        wide = torch.where(scale == 0, torch.ones_like(scale), scale).to(blocks.dtype)
        levels = (torch.round(blocks / wide).clamp(-8, 7) + 8).flatten(1).to(torch.uint8)
        self.width = weight.shape[1]
        self.register_buffer("table", levels[:, : self.width // 2] * 16 + levels[:, self.width // 2 :])
        self.register_buffer("scale", scale.squeeze(2))

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        pairs = self.table.index_select(0, flat).to(torch.float32)
        scale = self.scale.index_select(0, flat).to(torch.float32)
        high = torch.floor(pairs * 0.0625)
        levels = torch.cat((high, pairs - high * 16.0), dim=1) - 8.0
        rows = levels.reshape(-1, self.width // BLOCK, BLOCK) * scale.unsqueeze(2)
        return rows.reshape(*ids.shape, self.width)


def quantized_tables(module: nn.Module, in_float: Collection[str] = ()) -> list[str]:
    """Paths of the token tables that `quantize_tables` replaces: not small ones (positions), and none that is or lies
    in one of the blocks `in_float`."""
    return [
        path
        for path, child in module.named_modules()
        if isinstance(child, nn.Embedding)
        and child.num_embeddings >= _TABLE_ROWS
        and not inside(block_name(path), in_float)
    ]


def quantize_tables(module: nn.Module, bits: Literal[4, 8] = 8, in_float: Collection[str] = ()) -> nn.Module:
    """A copy whose token tables are `Int8Embedding`, or of 4 bits where their width is a multiple of 32."""
    module = copy.deepcopy(module)
    for path in quantized_tables(module, in_float):
        child = module.get_submodule(path)
        assert isinstance(child, nn.Embedding)
        four = bits == 4 and child.embedding_dim % BLOCK == 0
        module.set_submodule(path, (Int4Embedding if four else Int8Embedding)(child.weight))
    return module
