"""One tower in OpenVINO, in a process of its own: what `export.bench_worker` is for this kit's runtimes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from pocketvlm.export.bench_worker import timed_turn
from pocketvlm.export.workers import Answer, serve


def start(request: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """request: `model` (.xml or .onnx), `rows` (.npy), `threads`. The batch is fixed at 1, which is fastest there."""
    core = import_module("openvino").Core()
    model = core.read_model(request["model"])
    rows = np.load(request["rows"])
    model.reshape([1, *rows.shape[1:]])
    options = {"INFERENCE_NUM_THREADS": request["threads"], "PERFORMANCE_HINT": "LATENCY"}
    # float32 arithmetic where the file says so: processors with bfloat16 are used for it otherwise
    compiled = core.compile_model(model, "CPU", options | {"INFERENCE_PRECISION_HINT": "f32"})
    asked = compiled.create_infer_request()

    def run(row: Any) -> Any:
        return next(iter(asked.infer([row]).values()))

    def answer(wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["do"] == "turn":
            return timed_turn(lambda: run(rows[:1]), {}, wanted["runs"])
        np.save(wanted["out"], np.concatenate([run(rows[i : i + 1]).copy() for i in range(len(rows))]))
        return {}

    return {}, answer


if __name__ == "__main__":
    serve(start)
