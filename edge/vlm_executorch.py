"""A model that answers in words on the ExecuTorch runtime (its Python binding brings torch along as the carrier)."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends.executorch import load_program, settle_threads, unloadable
from pocketvlm.edge.errors import IntegrityError, require
from pocketvlm.edge.vlm_backends import check_prefix
from pocketvlm.edge.vlm_bundle import VlmContract

_EXTRA = "executorch"
_METHODS = {"picture": ("picture",), "decoder": ("prefill", "decode")}


class ExecuTorchVlm:
    """The methods `picture`, `prefill` and `decode`. The thread pool is the process's: see `ExecuTorchBackend`."""

    name = "executorch"

    def __init__(self, files: Mapping[str, Path], contract: VlmContract, threads: int | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the binding announces on import that it is experimental
            self.torch = require("torch", _EXTRA)
            runtime = require("executorch.runtime", _EXTRA)
            library = require("executorch.extension.pybindings.portable_lib", _EXTRA)
        self.threads = settle_threads(library, threads)
        self.contract = contract
        self._path = files["picture"]
        # methods of one program share their planned memory, so calls take turns
        self.lock = threading.Lock()
        self.methods: dict[str, Any] = {}
        for part, names in _METHODS.items():
            program = load_program(runtime, files[part])
            if not set(names) <= program.method_names:
                raise IntegrityError(
                    f"{files[part].name} has the methods {sorted(program.method_names)} and {' and '.join(names)} are "
                    "expected; nothing can be asked, so export it with this kit"
                )
            for name in names:
                try:
                    self.methods[name] = program.load_method(name)
                except Exception as error:  # the binding raises bare RuntimeError with a code
                    raise unloadable(files[part], error) from error
        shapes = {tuple(self._cache(place).sizes()) for place in range(2 * contract.layers)}
        if shapes != {contract.cache_shape}:
            raise IntegrityError(
                f"{files['decoder'].name} has caches of shapes {sorted(shapes)} and the contract promises "
                f"{contract.cache_shape}; its inputs would be misread, so export it with this kit"
            )

    def picture(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        # a copy, because torch warns about arrays that it may not write to
        tensor = self.torch.from_numpy(np.array(pixels))
        with self.lock:
            prefix = np.array(self.methods["picture"].execute([tensor])[0].numpy())
        check_prefix(prefix.shape, self.contract, self._path)
        return prefix

    def begin(self) -> _Decoding:
        return _Decoding(self)

    def _cache(self, place: int) -> Any:
        return self.methods["decode"].metadata.input_tensor_meta(2 + place)


class _Decoding:
    def __init__(self, backend: ExecuTorchVlm) -> None:
        self._backend, self._torch = backend, backend.torch
        shape = backend.contract.cache_shape
        self._caches = [self._torch.zeros(shape) for _ in range(2 * backend.contract.layers)]

    def prefill(self, prefix: NDArray[np.float32], ids: list[int]) -> NDArray[np.float32]:
        carried = self._torch.from_numpy(np.array(prefix))
        return self._run("prefill", carried, self._torch.tensor([ids]))

    def decode(self, token: int, position: int) -> NDArray[np.float32]:
        return self._run("decode", self._torch.tensor([[token]]), self._torch.tensor([position]))

    def _run(self, method: str, *inputs: Any) -> NDArray[np.float32]:
        with self._backend.lock:
            logits, *self._caches = self._backend.methods[method].execute([*inputs, *self._caches])
        return logits.numpy()[0]
