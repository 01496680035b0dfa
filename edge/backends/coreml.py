"""`.mlpackage` programs through coremltools, whose `predict` exists on macOS only."""

from __future__ import annotations

import platform
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.edge.backends import default_threads, no_tower, run_in_chunks
from pocketvlm.edge.errors import IntegrityError, UsageError, require


class CoreMLBackend:
    """One `MLModel` per tower, on whatever unit Core ML picks. `threads` is Core ML's own affair."""

    name = "coreml"

    def __init__(self, files: Mapping[str, Path], *, batch: str, threads: int | None) -> None:
        if platform.system() != "Darwin":
            raise UsageError(
                f"Core ML runs on macOS and iOS only and this system is {platform.system()}; the files can be checked "
                "here but not run, so use backend 'onnxruntime' or 'executorch'"
            )
        coremltools = require("coremltools", "coreml")
        self.threads = threads or default_threads()
        self._chunk = 1 if batch == "fixed-1" else None
        self._lock = threading.Lock()
        self._models: dict[str, tuple[Any, Any, str]] = {}
        for tower, path in files.items():
            try:
                model = coremltools.models.MLModel(str(path))
            except Exception as error:  # compilation errors come as bare RuntimeError
                raise IntegrityError(
                    f"Core ML cannot load {path.name} ({error}); nothing can run, so export it again"
                ) from error
            description = model.get_spec().description
            self._models[tower] = (model, description.input[0], description.output[0].name)

    def run_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._run("image", pixels)

    def run_text(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        return self._run("text", ids)

    def _run(self, tower: str, inputs: NDArray[Any]) -> NDArray[np.float32]:
        if tower not in self._models:
            raise no_tower(tower, self.name)
        model, entry, output = self._models[tower]

        def call(rows: NDArray[Any]) -> NDArray[np.float32]:
            with self._lock:
                result = model.predict({entry.name: as_feature(entry, rows)})[output]
            return np.asarray(result, np.float32).reshape(len(rows), -1)

        return run_in_chunks(call, inputs, self._chunk)


def as_feature(entry: Any, rows: NDArray[Any]) -> Any:
    """Rows in the type that a Core ML input declares: an image, or a multi-array of float32, float16 or int32.

    Core ML has no uint8 multi-array, so pixels travel as one of those with the same values 0..255.
    """
    if entry.type.WhichOneof("Type") == "imageType":
        return Image.fromarray(rows[0])
    # ArrayFeatureType.ArrayDataType of Core ML's Model.proto
    dtypes: dict[int, Any] = {65552: np.float16, 65568: np.float32, 65600: np.float64, 131104: np.int32}
    return rows.astype(dtypes[entry.type.multiArrayType.dataType])
