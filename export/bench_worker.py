"""One tower of one variant at one number of threads, in a process of its own, run when the parent asks.

`export.bench` starts `python -m pocketvlm.export.bench_worker` for each. See `export.workers` for the protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.backends import open_backend
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import require
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.preprocess import load_image, stack
from pocketvlm.export.workers import Answer, serve

WARM_UP = 3  # unmeasured runs of each turn: other workers have used the caches since the last one
_TOP = 10
_METHODS = {"image": "encode_image", "text": "encode_text"}
_ONNX_INPUTS = {"image": "pixels", "text": "ids"}
# what ExecuTorch's event tracer notes beside operators: whole methods, and the calls around what it also notes inside
_AROUND = re.compile(r"^(Method::|Program::|OPERATOR_CALL|DELEGATE_CALL)")


def start(request: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Load a tower and run it once.

    request: folder, variant (fields of `BundleVariant`), tower, threads, and `rows` (.npy of the graph's input; its
    first row is timed). `image` (a file of an encoded picture) or `text`, for a folder that is a bundle: time the way
    from there too.

    Returns:
        load_ms, first_ms, peak_mb and model_mb; and what answers the parent's requests by their key `do`.
    """
    tower: str = request["tower"]
    folder = Path(request["folder"])
    variant = BundleVariant(**request["variant"])
    variant = dataclasses.replace(variant, files={tower: variant.files[tower]})
    _import_runtime(variant.target)
    before = _memory("VmRSS")
    _reset_peak()
    began = time.perf_counter()
    backend = open_backend(variant.target, folder, variant, request["threads"])
    load_ms = _since(began)
    run = backend.run_image if tower == "image" else backend.run_text

    rows = np.load(request["rows"])
    one = rows[:1]
    began = time.perf_counter()
    run(one)
    first_ms = _since(began)
    for _ in range(WARM_UP):
        run(one)
    # before the tokenizer and the rest of the bundle are read: they are no part of the graph's memory
    peak = _memory("VmHWM")
    calls: dict[str, Callable[[], object]] = {}
    if "image" in request or "text" in request:
        calls = _end_to_end(EdgeModel(Bundle.load(folder, verify=False), variant, backend), tower, request)

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        if asked["do"] == "turn":
            return timed_turn(lambda: run(one), calls, asked["runs"])
        if asked["do"] == "embed":
            np.save(asked["out"], run(rows))
            return {}
        return {"operators": _profile(folder, variant, tower, one, request["threads"], asked["runs"])}

    opened = {
        "load_ms": load_ms,
        "first_ms": first_ms,
        "peak_mb": None if peak is None else peak / 1e6,
        "model_mb": None if peak is None or before is None else max(0.0, peak - before) / 1e6,
    }
    return opened, answer


def _end_to_end(model: EdgeModel, tower: str, request: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """Decoding and resizing or tokenizing alone, and the whole call that an app makes."""
    if tower == "image":
        data, spec = Path(request["image"]).read_bytes(), model.contract.image
        assert spec is not None, "only towers of the contract are asked for"
        return {"prepare": lambda: stack([load_image(data, spec)]), "whole": lambda: model.embed_image(data)}
    tokenizer, text = model.tokenizer, request["text"]
    assert tokenizer is not None, "a model with a text tower has a tokenizer"
    return {"prepare": lambda: tokenizer.encode(text), "whole": lambda: model.embed_text(text)}


def timed_turn(run: Callable[[], object], calls: dict[str, Callable[[], object]], runs: int) -> dict[str, Any]:
    """Milliseconds of each run of the graph, the preparation and the whole call, by the clock and on processors."""
    answer = {}
    for name, call in {"run": run, **calls}.items():
        answer[name], answer[f"{name}_processor"] = times(call, runs)
    return answer


def times(call: Callable[[], object], runs: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each of so many calls, after some that are not measured: by the clock, and on processors."""
    for _ in range(WARM_UP):
        call()
    wall, processor = [], []
    for _ in range(runs):
        spent, began = time.process_time(), time.perf_counter()
        call()
        wall.append(_since(began))
        processor.append((time.process_time() - spent) * 1e3)
    return wall, processor


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def _import_runtime(target: str) -> None:
    """Import what `open_backend` would import, so that load time and memory are the model's."""
    if target == "onnx":
        importlib.import_module("onnxruntime")
    elif target == "executorch":
        require("torch", "executorch")
        runtime = require("executorch.runtime", "executorch")
        require("executorch.extension.pybindings.portable_lib", "executorch")
        runtime.Runtime.get()
    else:
        require("coremltools", "coreml")


def _memory(field: str) -> float | None:
    """Bytes of this process by /proc/self/status ("VmRSS" now, "VmHWM" at most); None where there is no such file.

    Not `ru_maxrss`, which a child inherits from its parent.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1]) * 1024
    return None


def _reset_peak() -> None:
    # imports peak higher than they stay; where the kernel refuses, the peak counts them in
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


# --- the runtimes' own profilers ------------------------------------------------------------------------------------


def _profile(
    folder: Path, variant: BundleVariant, tower: str, rows: NDArray[Any], threads: int, runs: int
) -> list[dict[str, Any]]:
    path = folder / variant.files[tower]
    if variant.target == "onnx":
        found = _onnx_events(path, tower, rows, threads, runs)
    elif variant.target == "executorch":
        found = _executorch_events(path, tower, rows, runs)
    else:
        return []
    return summarize_operators(found)


def summarize_operators(events: Iterable[tuple[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """(operator type, its milliseconds in each run) for every operator of the graph, summed by type: the ten that take
    longest, and the rest as one row.

    share: of all operators' time. ms: of one run, by the mean of the middle half of each operator's runs, because one
    interruption is longer than many operators. calls: operators of this type.
    """
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, runs in events:
        spent[name] += _middle(runs)
        calls[name] += 1
    total = sum(spent.values()) or 1.0
    order = sorted(spent, key=lambda name: -spent[name])
    rows = [(name, spent[name], calls[name]) for name in order[:_TOP]]
    if rest := order[_TOP:]:
        rows.append((f"({len(rest)} others)", sum(spent[n] for n in rest), sum(calls[n] for n in rest)))
    return [{"operator": name, "share": ms / total, "ms": ms, "calls": count} for name, ms, count in rows]


def _middle(values: Sequence[float]) -> float:
    cut = len(values) // 4
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def _onnx_events(path: Path, tower: str, rows: NDArray[Any], threads: int, runs: int) -> list[tuple[str, list[float]]]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as scratch:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + runs):
            session.run(["embedding"], {_ONNX_INPUTS[tower]: rows})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    whole = sorted((e for e in events if e.get("name") == "model_run"), key=lambda event: event["ts"])
    since = whole[WARM_UP]["ts"]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= since:
            found[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    return [(operator, times) for (operator, _), times in found.items()]


def _executorch_events(path: Path, tower: str, rows: NDArray[Any], runs: int) -> list[tuple[str, list[float]]]:
    library = require("executorch.extension.pybindings.portable_lib", "executorch")
    torch = require("torch", "executorch")
    devtools = require("executorch.devtools", "executorch")
    module = library._load_for_executorch(str(path), enable_etdump=True)
    method = _METHODS[tower] if _METHODS[tower] in module.method_names() else "forward"
    tensor = torch.from_numpy(np.array(rows))
    for _ in range(WARM_UP + runs):
        module.run_method(method, [tensor])
    with tempfile.TemporaryDirectory() as scratch:
        dump = str(Path(scratch) / "events.etdump")
        module.write_etdump_result_to_file(dump)
        inspector = devtools.Inspector(etdump_path=dump)
    events = [event for block in inspector.event_blocks for event in block.events if event.perf_data is not None]
    inside = any(event.is_delegated_op for event in events)
    found = []
    for event in events:
        if _AROUND.match(event.name) and (inside or not event.name.startswith("DELEGATE_CALL")):
            continue
        raw = event.perf_data.raw[WARM_UP:]
        name = re.sub(r" #\d+$", "", event.name.removeprefix("native_call_"))
        if raw:
            found.append((name, [float(ms) for ms in raw]))
    return found


if __name__ == "__main__":
    serve(start)
