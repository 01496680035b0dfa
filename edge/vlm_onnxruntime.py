"""A model that answers in words on onnxruntime's CPU provider.

The cache is bound both as input and as output, so that the graph's scatter writes into it: nothing is copied from step
to step, and a step costs what its weights cost to read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pocketvlm.edge.backends import default_threads
from pocketvlm.edge.backends.onnxruntime import open_session
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.edge.vlm_backends import check_prefix
from pocketvlm.edge.vlm_bundle import VlmContract

_EXPORT_AGAIN = "its inputs would be misread, so export it with this kit"


class OnnxRuntimeVlm:
    """Two sessions with `threads` intra-op threads each."""

    name = "onnxruntime"

    def __init__(self, files: Mapping[str, Path], contract: VlmContract, threads: int | None) -> None:
        self.threads = threads or default_threads()
        self.contract = contract
        self._picture_path = files["picture"]
        self._picture = self._open(files["picture"], {"pixels": "tensor(uint8)"}, {"prefix"})
        caches = cache_names(contract.layers)
        taken = {"prefix": "tensor(float)", "ids": "tensor(int32)", "positions": "tensor(int32)"}
        given = {"logits", *(f"new_{name}" for name in caches)}
        self.decoder = self._open(files["decoder"], taken | dict.fromkeys(caches, "tensor(float)"), given)
        shapes = {entry.name: tuple(entry.shape) for entry in self.decoder.get_inputs() if entry.name in caches}
        if set(shapes.values()) != {contract.cache_shape}:
            raise IntegrityError(
                f"{files['decoder'].name} has caches of shapes {sorted(set(shapes.values()))} and the contract "
                f"promises {contract.cache_shape}; {_EXPORT_AGAIN}"
            )

    def picture(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        (prefix,) = self._picture.run(["prefix"], {"pixels": pixels})
        check_prefix(np.shape(prefix), self.contract, self._picture_path)
        return np.asarray(prefix, np.float32)

    def begin(self) -> _Decoding:
        return _Decoding(self.decoder, self.contract)

    def _open(self, path: Path, taken: dict[str, str], given: set[str]) -> onnxruntime.InferenceSession:
        session = open_session(path, self.threads)
        found = {entry.name: entry.type for entry in session.get_inputs()}
        outputs = {entry.name for entry in session.get_outputs()}
        if found != taken or outputs != given:
            raise IntegrityError(
                f"{path.name} takes {sorted(found.items())} and gives {sorted(outputs)}, but {sorted(taken.items())} "
                f"and {sorted(given)} are expected; {_EXPORT_AGAIN}"
            )
        return session


def cache_names(layers: int) -> list[str]:
    """Names of the caches in a decoder's file, in order; what it gives for them has "new_" before."""
    return [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]


class _Decoding:
    def __init__(self, session: onnxruntime.InferenceSession, contract: VlmContract) -> None:
        self._session = session
        shape = contract.cache_shape
        self._caches = {name: _bound(np.zeros(shape, np.float32)) for name in cache_names(contract.layers)}
        self._logits = np.zeros((1, contract.vocab_size), np.float32)
        self._token, self._position = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
        self._nothing = np.zeros((1, 0, contract.width), np.float32)
        self._bound_logits = _bound(self._logits)
        # every array that is bound is kept, because a binding holds its memory and not the array
        self._one = self._binding(self._nothing, self._token, self._position)
        self._options = onnxruntime.RunOptions()

    def prefill(self, prefix: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
        prefix, row = np.ascontiguousarray(prefix), np.array([ids], np.int32)
        positions = np.arange(prefix.shape[1] + len(ids), dtype=np.int32)
        self._session.run_with_iobinding(self._binding(prefix, row, positions), self._options)
        return self._logits[0]

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        self._token[0, 0], self._position[0] = token, position
        self._session.run_with_iobinding(self._one, self._options)
        return self._logits[0]

    def _binding(self, prefix: NDArray[Any], ids: NDArray[Any], positions: NDArray[Any]) -> onnxruntime.IOBinding:
        binding = self._session.io_binding()
        for name, value in (("prefix", prefix), ("ids", ids), ("positions", positions)):
            binding.bind_ortvalue_input(name, _bound(value))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(f"new_{name}", cache)
        binding.bind_ortvalue_output("logits", self._bound_logits)
        return binding


def _bound(array: NDArray[Any]) -> onnxruntime.OrtValue:
    """Shares the array's memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
