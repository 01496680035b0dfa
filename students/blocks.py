"""Transformer blocks of either tower as what pruning sees of them: heads, hidden units, and the layers that hold both.

Both families of blocks (timm's vision transformers and our text tower) read the residual stream through `qkv` and
`fc1` and write to it through `out` and `fc2`. A head owns rows of `qkv` (three stretches) and columns of `out`; a
hidden unit owns a row of `fc1` and a column of `fc2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block as VitBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.config import BlockWidths


@dataclass(frozen=True)
class Parts:
    """The layers of one block. qkv: [3 * heads * head_width, W]; out: [W, heads * head_width]; fc1: [hidden, W];
    fc2: [W, hidden]."""

    qkv: nn.Linear
    out: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    heads: int
    head_width: int

    @property
    def widths(self) -> BlockWidths:
        return BlockWidths(heads=self.heads, hidden=self.fc1.out_features)

    def head_columns(self, heads: Sequence[int]) -> Tensor:
        """int64: the columns of `out` that belong to these heads."""
        return (torch.tensor(heads)[:, None] * self.head_width + torch.arange(self.head_width)).flatten()

    def head_rows(self, heads: Sequence[int]) -> Tensor:
        """int64: the rows of `qkv` that belong to these heads, queries first."""
        columns = self.head_columns(heads)
        return torch.cat([columns + part * self.heads * self.head_width for part in range(3)])


def parts_of(block: nn.Module) -> Parts:
    """The layers of a block of a `VisionTransformer` or of our `TextTower`."""
    # Any, because modules keep their layers where no type checker sees them
    if isinstance(block, VitBlock):
        attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        return Parts(attention.qkv, attention.proj, mlp.fc1, mlp.fc2, attention.num_heads, attention.head_dim)
    ours = cast(Any, block)
    return Parts(ours.qkv, ours.out, ours.fc1, ours.fc2, ours.heads, ours.head_width)


def check_trunk(trunk: nn.Module, name: str) -> None:
    """Refuse image towers that are no plain vision transformer.

    Raises:
        UsageError: other blocks than timm's plain ones, or none at all.
    """
    if isinstance(trunk, VisionTransformer) and all(_plain(block) for block in trunk.blocks):
        return
    raise UsageError(
        f"image tower {name!r} ({type(trunk).__name__}) is not made of plain transformer blocks, so it has no heads "
        "and layers to prune; prune a vision transformer (vit-tiny, CLIP's), or the text tower alone (towers: text)"
    )


def _plain(block: nn.Module) -> bool:
    if type(block) is not VitBlock or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attention = block.attn
    return (
        isinstance(attention.norm, nn.Identity) and attention.gate is None and isinstance(block.mlp.norm, nn.Identity)
    )


def resize_blocks(trunk: nn.Module, blocks: Sequence[BlockWidths], name: str) -> None:
    """Give a vision transformer these blocks, in place, with the weights left as they fall (a state dict follows).

    Raises:
        UsageError: no plain vision transformer, or more blocks than it has.
    """
    check_trunk(trunk, name)
    own = list(trunk.blocks)  # type: ignore[arg-type]
    if len(blocks) > len(own):
        raise UsageError(
            f"image.blocks describes {len(blocks)} blocks but {name!r} has {len(own)}; pruning only takes blocks away, "
            "so restore image.backbone and image.backbone_args of the model that was pruned"
        )
    kept = own[: len(blocks)]
    trunk.blocks = nn.Sequential(*kept)
    for block, widths in zip(kept, blocks):
        parts = parts_of(block)
        width, inner = parts.qkv.in_features, widths.heads * parts.head_width
        set_parts(
            block,
            qkv=nn.Linear(width, 3 * inner, bias=parts.qkv.bias is not None),
            out=nn.Linear(inner, width, bias=parts.out.bias is not None),
            fc1=nn.Linear(width, widths.hidden, bias=parts.fc1.bias is not None),
            fc2=nn.Linear(widths.hidden, width, bias=parts.fc2.bias is not None),
            heads=widths.heads,
        )


def set_parts(block: nn.Module, *, qkv: nn.Linear, out: nn.Linear, fc1: nn.Linear, fc2: nn.Linear, heads: int) -> None:
    """Put these layers into a block, in place."""
    if isinstance(block, VitBlock):
        attention, mlp = cast(Any, block.attn), cast(Any, block.mlp)
        attention.qkv, attention.proj, mlp.fc1, mlp.fc2 = qkv, out, fc1, fc2
        attention.num_heads, attention.attn_dim = heads, heads * attention.head_dim
        return
    for name, value in {"qkv": qkv, "out": out, "fc1": fc1, "fc2": fc2, "heads": heads}.items():
        setattr(block, name, value)


@torch.no_grad()
def cut_block(block: nn.Module, heads: Sequence[int], units: Tensor) -> None:
    """Leave only these heads and hidden units (int64) in a block, in their order, in place.

    What is left computes what the whole block computed with the others' outputs at zero.
    """
    parts = parts_of(block)
    rows, columns = parts.head_rows(heads), parts.head_columns(heads)
    set_parts(
        block,
        qkv=_linear(parts.qkv, rows=rows),
        out=_linear(parts.out, columns=columns),
        fc1=_linear(parts.fc1, rows=units),
        fc2=_linear(parts.fc2, columns=units),
        heads=len(heads),
    )


def _linear(layer: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if rows is not None:
        weight, bias = weight[rows.to(weight.device)], None if bias is None else bias[rows.to(weight.device)]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made
