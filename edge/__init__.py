"""The runtime a device needs: contract, preprocessing, backends, `EdgeModel`. Never imports torch."""

from __future__ import annotations

import importlib
from typing import Any

if __name__ != "pocketvlm.edge":
    raise ImportError("import this package as pocketvlm.edge; a second copy under 'edge' would duplicate every class")

_LAZY = {
    "EdgeModel": "pocketvlm.edge.model",
    "EmbeddingIndex": "pocketvlm.edge.index",
    "ZeroShotClassifier": "pocketvlm.edge.zero_shot",
    "ModelContract": "pocketvlm.edge.contract",
    "ImageSpec": "pocketvlm.edge.contract",
    "TextSpec": "pocketvlm.edge.contract",
    "Bundle": "pocketvlm.edge.bundle",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pocketvlm.edge' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
