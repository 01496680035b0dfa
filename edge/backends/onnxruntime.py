"""ONNX graphs on onnxruntime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pocketvlm.edge.backends import default_threads, no_tower, run_in_chunks
from pocketvlm.edge.errors import IntegrityError

# tower -> (input name, onnxruntime type); the output is always called "embedding"
_INPUTS = {"image": ("pixels", "tensor(uint8)"), "text": ("ids", "tensor(int32)")}


class OnnxRuntimeBackend:
    """One session per tower, each with `threads` intra-op threads and no inter-op parallelism."""

    name = "onnxruntime"

    def __init__(self, files: Mapping[str, Path], *, batch: str, threads: int | None) -> None:
        self.threads = threads or default_threads()
        self._chunk = 1 if batch == "fixed-1" else None
        self._sessions = {tower: self._open(tower, path) for tower, path in files.items()}

    def run_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run("image", pixels)

    def run_text(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._run("text", ids)

    def _run(self, tower: str, inputs: NDArray[Any]) -> NDArray[np.float32]:
        if tower not in self._sessions:
            raise no_tower(tower, self.name)
        session = self._sessions[tower]

        def call(rows: NDArray[Any]) -> NDArray[np.float32]:
            (output,) = session.run(["embedding"], {_INPUTS[tower][0]: rows})
            return np.asarray(output, np.float32)

        return run_in_chunks(call, inputs, self._chunk)

    def _open(self, tower: str, path: Path) -> onnxruntime.InferenceSession:
        session = open_session(path, self.threads)
        found_in = [(entry.name, entry.type) for entry in session.get_inputs()]
        found_out = [entry.name for entry in session.get_outputs()]
        if found_in != [_INPUTS[tower]] or "embedding" not in found_out:
            raise IntegrityError(
                f"{path.name} takes {found_in} and gives {found_out}, but an {tower} graph takes {[_INPUTS[tower]]} "
                "and gives ['embedding']; its inputs would be misread, so export it with this kit"
            )
        return session


def open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A graph on the processor, with this many threads for one operator.

    Raises:
        IntegrityError: onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no other base
        raise IntegrityError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path.name} ({error}); "
            "nothing can run, so export it again or upgrade onnxruntime"
        ) from error
