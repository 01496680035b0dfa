"""Export backends by name. Each is imported only when asked for, because each needs another extra."""

from __future__ import annotations

import importlib

from pocketvlm.edge.errors import unknown_name
from pocketvlm.export.targets.base import Calibration, Precision, Target, Towers, Variant, check_precision

# name -> (module, class)
_TARGETS = {
    "onnx": ("pocketvlm.export.targets.onnx", "OnnxTarget"),
    "executorch": ("pocketvlm.export.targets.executorch", "ExecuTorchTarget"),
    "coreml": ("pocketvlm.export.targets.coreml", "CoreMLTarget"),
}

__all__ = ["Calibration", "Precision", "Target", "Towers", "Variant", "check_precision", "get_target", "list_targets"]


def list_targets() -> list[str]:
    """Names that `get_target` takes."""
    return list(_TARGETS)


def get_target(name: str) -> Target:
    """The backend of that name.

    Raises:
        UnknownNameError: no such backend. MissingExtraError: the package it converts with is not installed.
    """
    if name not in _TARGETS:
        raise unknown_name("export target", name, _TARGETS)
    module, attribute = _TARGETS[name]
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
