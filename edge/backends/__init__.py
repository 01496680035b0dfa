"""Runtimes behind one interface. Each lives in its own module and is imported only when it is opened."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import UsageError, unknown_name

# target name in a bundle -> (backend name that users type, module, class)
_BACKENDS = {
    "onnx": ("onnxruntime", "pocketvlm.edge.backends.onnxruntime", "OnnxRuntimeBackend"),
    "executorch": ("executorch", "pocketvlm.edge.backends.executorch", "ExecuTorchBackend"),
    "coreml": ("coreml", "pocketvlm.edge.backends.coreml", "CoreMLBackend"),
}
BACKEND_NAMES = tuple(backend for backend, _, _ in _BACKENDS.values())


class Backend(Protocol):
    """A loaded pair of towers. Safe to call from several threads.

    name: "onnxruntime", "executorch" or "coreml". threads: how many the runtime uses for one call.
    """

    name: str
    threads: int

    def run_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [B, S, S, 3] to float32 [B, D], as the graph gives it.

        Raises:
            UsageError: the variant has no image tower.
        """
        ...

    def run_text(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """int32 [B, L] to float32 [B, D], as the graph gives it.

        Raises:
            UsageError: the variant has no text tower.
        """
        ...


class VariantFiles(Protocol):
    """What a backend reads of a variant (`edge.bundle.BundleVariant` and `export.targets.base.Variant` have it)."""

    @property
    def files(self) -> Mapping[str, str]: ...
    @property
    def batch(self) -> str: ...


def target_of(backend: str) -> str:
    """The bundle target that a backend runs: "onnxruntime" -> "onnx". A target's own name is accepted too.

    Raises:
        UnknownNameError: no such backend.
    """
    for target, (name, _, _) in _BACKENDS.items():
        if backend in (name, target):
            return target
    raise unknown_name("backend", backend, BACKEND_NAMES)


def open_backend(target: str, folder: str | Path, variant: VariantFiles, threads: int | None = None) -> Backend:
    """Load a variant's model files.

    Args:
        target: "onnx", "executorch" or "coreml" (or the backend's name).
        folder: the bundle folder that `variant.files` is relative to.
        variant: its files and batch rule; a "fixed-1" graph is called once per row.
        threads: for one call; None means `default_threads()`.

    Raises:
        MissingExtraError: the runtime is not installed.
        UsageError: it cannot run on this system, or `threads` is below 1.
        IntegrityError: a model file cannot be loaded, or does not take what the contract says.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads} and at least 1 is expected; nothing could run, so give 1 or more")
    _, module, name = _BACKENDS[target_of(target)]
    files = {tower: Path(folder) / relative for tower, relative in variant.files.items()}
    return getattr(importlib.import_module(module), name)(files, batch=variant.batch, threads=threads)


def default_threads() -> int:
    """Up to 4 of the processors that this process may use: what a phone spends on one model."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, available))


def run_in_chunks(
    run: Callable[[NDArray[Any]], NDArray[np.float32]], inputs: NDArray[Any], chunk: int | None
) -> NDArray[np.float32]:
    """Call `run` on at most `chunk` rows at a time (None: all at once) and join the results."""
    if chunk is None or len(inputs) <= chunk:
        return run(inputs)
    return np.concatenate([run(inputs[at : at + chunk]) for at in range(0, len(inputs), chunk)])


def no_tower(tower: str, name: str) -> UsageError:
    """The error for a variant without this tower."""
    return UsageError(
        f"this bundle's {name} variant has no {tower} tower; it cannot embed {tower}s, "
        f"so use a variant or bundle that was exported with one"
    )
