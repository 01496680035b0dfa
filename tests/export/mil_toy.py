"""Building, running and judging the cases of `mil_cases`."""

from __future__ import annotations

from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import types

from pocketvlm.export.mil.program import MilProgram

FLOOR_DB = 100.0
_KINDS = {"fp32": np.float32, "fp16": np.float16}
_TYPES = {"fp32": types.fp32, "fp16": types.fp16}


def _numbers(value: Any, kind: str) -> Any:
    """Floats at the precision under test; integers and booleans as they are."""
    if isinstance(value, list):
        return [_numbers(v, kind) for v in value]
    array = np.asarray(value)
    return array.astype(_KINDS[kind]) if array.dtype.kind == "f" else array


def _spec(array: np.ndarray, kind: str) -> Any:
    dtypes = {"f": _TYPES[kind], "b": types.bool, "i": types.int8 if array.dtype == np.int8 else types.int32}
    return mb.TensorSpec(shape=array.shape, dtype=dtypes[array.dtype.kind])


def build(case: Any, kind: str) -> tuple[Any, dict[str, np.ndarray]]:
    """(MIL program of the one operation, what to feed it)."""
    feeds: dict[str, np.ndarray] = {}
    for name, value in case.inputs.items():
        for i, part in enumerate(value if isinstance(value, list) else [value]):
            feeds[f"{name}{i}" if isinstance(value, list) else name] = _numbers(part, kind)

    def body(**variables: Any) -> Any:
        arguments: dict[str, Any] = {}
        for name, value in case.inputs.items():
            several = isinstance(value, list)
            arguments[name] = [variables[f"{name}{i}"] for i in range(len(value))] if several else variables[name]
        arguments |= {name: _numbers(value, kind)[()] for name, value in case.weights.items()}
        return getattr(mb, case.operation)(**arguments, **case.attributes)

    names = list(feeds) or ["unused"]
    specs = [_spec(feeds[name], kind) for name in feeds] or [mb.TensorSpec(shape=(1,))]
    scope: dict[str, Any] = {"body": body}
    # the builder reads the names of the inputs from the signature
    exec(f"def main({', '.join(names)}): return body({', '.join(f'{n}={n}' for n in names if n in feeds)})", scope)
    target = {17: ct.target.iOS17, 18: ct.target.iOS18}[case.ios]
    program = mb.program(input_specs=specs, opset_version=target)(scope["main"])
    return program, feeds or {"unused": np.zeros(1, np.float32)}


def expected(case: Any, kind: str) -> list[torch.Tensor]:
    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(v) for v in value]
        array = _numbers(value, kind)
        if array.dtype == np.int8:
            return torch.from_numpy(array).double()
        return torch.from_numpy(np.asarray(array, np.float64) if array.dtype.kind == "f" else array)

    found = case.oracle(**{n: wide(v) for n, v in case.inputs.items()}, **{n: wide(v) for n, v in case.weights.items()})
    return list(found) if isinstance(found, (list, tuple)) else [found]


def run(case: Any, kind: str) -> list[torch.Tensor]:
    built, feeds = build(case, kind)
    program = MilProgram(built.functions["main"])
    outputs = program.run(feeds)
    return [outputs[name] for name in program.outputs]


def faults(case: Any, kind: str) -> str:
    """What is wrong with the evaluator's answer to a case; empty where it is right."""
    for found, right in zip(run(case, kind), expected(case, kind), strict=True):
        if found.shape != right.shape:
            return f"shape {list(found.shape)}, expected {list(right.shape)}"
        if not right.is_floating_point():
            if found.is_floating_point() or not torch.equal(found.long(), right.long()):
                return "other integers"
        elif kind == "fp32":
            if (level := decibel(right, found)) < FLOOR_DB:
                return f"{level:.1f} dB"
        elif message := _beyond_one_rounding(right.numpy(), found.numpy()):
            return message
    return ""


def decibel(right: torch.Tensor, found: torch.Tensor) -> float:
    right, noise = right.double(), (right.double() - found.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(right.square().sum() / noise))


def _beyond_one_rounding(right: np.ndarray, found: np.ndarray) -> str:
    if not np.array_equal(found, found.astype(np.float16).astype(found.dtype)):
        return "values that float16 does not have"
    # half a unit in the last place, and what float32 sums cost
    allowed = 0.5 * np.spacing(np.abs(right).astype(np.float16)).astype(np.float64) + 2e-6 * np.abs(right).max()
    worst = float((np.abs(found - right) / allowed).max())
    return f"{worst:.1f} times the rounding of float16" if worst > 1 else ""
