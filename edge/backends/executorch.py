"""`.pte` programs on the ExecuTorch runtime (its Python binding brings torch along as the tensor carrier)."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends import default_threads, no_tower, run_in_chunks
from pocketvlm.edge.errors import IntegrityError, require

_EXTRA = "executorch"
# tower -> (method, scalar type code of its input, that type's name)
_METHODS = {"image": ("encode_image", 0, "uint8"), "text": ("encode_text", 3, "int32")}

_pool_lock = threading.Lock()
_pool_threads: int | None = None


class ExecuTorchBackend:
    """One loaded method per tower, found as "encode_image" / "encode_text", or "forward" of a one-method file.

    The thread pool belongs to the process, and resizing it after a method was loaded corrupts memory: the first
    backend of a process decides `threads`, and a later one that asks for another number is told by a warning.
    """

    name = "executorch"

    def __init__(self, files: Mapping[str, Path], *, batch: str, threads: int | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the binding announces on import that it is experimental
            self._torch = require("torch", _EXTRA)
            runtime = require("executorch.runtime", _EXTRA)
            library = require("executorch.extension.pybindings.portable_lib", _EXTRA)
        self.threads = settle_threads(library, threads)
        # methods of one program share their planned memory, so calls take turns
        self._lock = threading.Lock()
        self._programs: dict[Path, Any] = {}
        self._methods: dict[str, Any] = {}
        self._chunks: dict[str, int] = {}
        for tower, path in files.items():
            if path not in self._programs:
                self._programs[path] = load_program(runtime, path)
            self._methods[tower], largest = _load_method(self._programs[path], tower, path)
            self._chunks[tower] = 1 if batch == "fixed-1" else max(1, largest)

    def run_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run("image", pixels)

    def run_text(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._run("text", ids)

    def _run(self, tower: str, inputs: NDArray[Any]) -> NDArray[np.float32]:
        if tower not in self._methods:
            raise no_tower(tower, self.name)
        method = self._methods[tower]

        def call(rows: NDArray[Any]) -> NDArray[np.float32]:
            # a copy, because torch warns about arrays that it may not write to
            tensor = self._torch.from_numpy(np.array(rows))
            with self._lock:
                return np.array(method.execute([tensor])[0].float().numpy())

        return run_in_chunks(call, inputs, self._chunks[tower])


def settle_threads(library: Any, threads: int | None) -> int:
    """How many threads the process's pool has from now on: as many as its first model asked for."""
    global _pool_threads
    with _pool_lock:
        if _pool_threads is None:
            _pool_threads = threads or default_threads()
            if library._threadpool_get_thread_count() != _pool_threads:
                library._unsafe_reset_threadpool(_pool_threads)
        elif threads not in (None, _pool_threads):
            warnings.warn(
                f"ExecuTorch runs on {_pool_threads} thread(s) since its first model of this process was loaded and "
                f"cannot change to {threads}; speed will differ from what you asked, so start a new process for it",
                RuntimeWarning,
                stacklevel=4,
            )
        return _pool_threads


def load_program(runtime: Any, path: Path) -> Any:
    """Raises:
    IntegrityError: the file is no program."""
    try:
        return runtime.Runtime.get().load_program(path, verification=runtime.Verification.InternalConsistency)
    except Exception as error:  # the binding raises bare RuntimeError with a code
        raise unloadable(path, error) from error


def _load_method(program: Any, tower: str, path: Path) -> tuple[Any, int]:
    """The method and the largest batch that it was planned for."""
    name, code, dtype = _METHODS[tower]
    if name not in program.method_names:
        if program.method_names != {"forward"}:
            raise IntegrityError(
                f"{path.name} has the methods {sorted(program.method_names)} and {name!r} is expected; "
                f"there is no {tower} tower to run, so export it with this kit"
            )
        name = "forward"
    info = program.metadata(name).input_tensor_meta(0)
    if info.dtype() != code:
        raise IntegrityError(
            f"method {name!r} of {path.name} takes scalar type {info.dtype()} and {dtype} ({code}) is expected; "
            "its inputs would be misread, so export it with this kit"
        )
    try:
        return program.load_method(name), int(info.sizes()[0])
    except Exception as error:
        raise unloadable(path, error) from error


def unloadable(path: Path, error: Exception) -> IntegrityError:
    """The error for a program or method that the runtime refuses."""
    return IntegrityError(
        f"ExecuTorch cannot load {path.name} ({error}); nothing can run, so export it again or upgrade executorch"
    )
