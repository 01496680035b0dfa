"""pocketvlm: distil a vision-language teacher into a student that runs on a phone, and prove it.

Importing this package loads nothing heavy. Public names resolve on first use::

    import pocketvlm
    model = pocketvlm.EdgeModel.load("bundle/")      # numpy + Pillow + tokenizers + one runtime
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it; loaded on first attribute access (PEP 562)
_LAZY = {
    "EdgeModel": "pocketvlm.edge.model",
    "EmbeddingIndex": "pocketvlm.edge.index",
    "ModelContract": "pocketvlm.edge.contract",
    "PocketvlmError": "pocketvlm.edge.errors",
    "Sample": "pocketvlm.data.sample",
    "open_data": "pocketvlm.data",
    "load_teacher": "pocketvlm.teachers",
    "load_student": "pocketvlm.students",
    "Recipe": "pocketvlm.distill.recipe",
    "distill_run": "pocketvlm.distill.loop",
    "export_bundle": "pocketvlm.export.bundle",
    "check_parity": "pocketvlm.export.parity",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pocketvlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
