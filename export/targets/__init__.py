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
# lowered here and never run: known by name, and tried only where they are asked for
_UNPROVED = {
    "executorch-coreml": ("pocketvlm.export.targets.executorch_coreml", "ExecuTorchCoreMLTarget"),
}

__all__ = ["Calibration", "Precision", "Target", "Towers", "Variant", "check_precision", "get_target", "list_targets"]


def list_targets() -> list[str]:
    """Names that `get_target` takes, but for those whose files nothing of this kit runs."""
    return list(_TARGETS)


def get_target(name: str) -> Target:
    """The backend of that name.

    Raises:
        UnknownNameError: no such backend. MissingExtraError: the package it converts with is not installed.
    """
    known = _TARGETS | _UNPROVED
    if name not in known:
        raise unknown_name("export target", name, known)
    module, attribute = known[name]
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
