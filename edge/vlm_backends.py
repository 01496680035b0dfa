"""Runtimes of a model that answers in words, behind one interface; each is imported when it is opened."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.bundle import BundleVariant
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.vlm_bundle import VlmBundle, VlmContract

_BACKENDS = {
    "onnx": ("onnxruntime", "pocketvlm.edge.vlm_onnxruntime", "OnnxRuntimeVlm"),
    "executorch": ("executorch", "pocketvlm.edge.vlm_executorch", "ExecuTorchVlm"),
}


class Decoding(Protocol):
    """One answer being written: a key-value cache and what moves it on. For one thread at a time."""

    def prefill(self, prefix: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
        """Embeddings [1, P, W] and the prompt's ids into the cache; logits [V] of the first token of the answer.

        The array is overwritten by the next call.
        """
        ...

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        """One more token at this place of the cache; logits [V] of the next one, as `prefill`."""
        ...


class VlmBackend(Protocol):
    """Loaded graphs, safe to call from several threads. name: of the runtime. threads: of one call."""

    name: str
    threads: int

    def picture(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 [1, S, S, 3] to the embeddings of the places before the text, float32 [1, P, W]."""
        ...

    def begin(self) -> Decoding:
        """An empty cache."""
        ...


def open_vlm_backend(bundle: VlmBundle, variant: BundleVariant, threads: int | None = None) -> VlmBackend:
    """Load a variant's graphs.

    Raises:
        UsageError: no runtime of this machine runs the target, or `threads` is below 1.
        MissingExtraError: the runtime is not installed. IntegrityError: a file cannot be loaded, or does not take what
            the contract says.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads} and at least 1 is expected; nothing could run, so give 1 or more")
    if variant.target not in _BACKENDS:
        raise UsageError(
            f"this bundle's {variant.target} variant was asked for and only {', '.join(_BACKENDS)} files are run by "
            "this package; an app on a phone runs the others, so choose one of those"
        )
    _, module, name = _BACKENDS[variant.target]
    files = {part: bundle.path(relative) for part, relative in variant.files.items()}
    return getattr(importlib.import_module(module), name)(files, bundle.contract, threads)


def pick_target(bundle: VlmBundle) -> str:
    """The first target that the bundle has and this machine runs: onnx, executorch."""
    present = {variant.target for variant in bundle.variants}
    runnable = {"onnx": True, "executorch": importlib.util.find_spec("executorch") is not None}
    known = [target for target in runnable if target in present]
    # where none can run, opening the first one explains what is missing
    return next((target for target in known if runnable[target]), next(iter(known or sorted(present) or ["onnx"])))


def check_prefix(found: tuple[int, ...], contract: VlmContract, path: Path) -> None:
    """Raises:
    IntegrityError: the picture's graph gives something else than the contract says."""
    from pocketvlm.edge.errors import IntegrityError

    expected = (1, contract.prefix, contract.width)
    if found != expected:
        raise IntegrityError(
            f"{path.name} gives embeddings of shape {list(found)} and the contract promises {list(expected)}; they "
            "belong to another model, so export it again"
        )
