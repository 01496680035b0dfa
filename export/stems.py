"""Convolutions at the input, which compute in float: large weights of theirs are int8 in the file all the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, fx

# elements of a weight that is worth storing as int8: a transformer's patch embedding is a twentieth of its file, the
# first eight convolutions of a small MobileNet a fiftieth
STORED = 1024
_MARK = "pocketvlm_stored"


def float_entirely(stem: Iterable[fx.Node]) -> set[str]:
    """Names of those of these convolutions whose weight stays float too; the others are marked for `is_stored`."""
    found = set()
    for node in stem:
        if cast(Tensor, cast(fx.Node, node.args[1]).meta["val"]).numel() < STORED:
            found.add(node.name)
        else:
            node.meta[_MARK] = True
    return found


def is_stored(node: fx.Node) -> bool:
    """Whether a convolution computes in float with a weight from int8."""
    return bool(node.meta.get(_MARK))
