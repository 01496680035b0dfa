"""An ONNX tower cut into blocks at the recorded taps, so that drift can be followed over depth.

A file names its values by operators, not by modules, so each tap is found by what it computes: in a full-precision file
by the recorded statistics of several cases, in a quantized file by its likeness to the full-precision value of that
tap. Showing inner values keeps the runtime from fusing across them; what a fused kernel rounds otherwise is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import require
from pocketvlm.export.reference_run import STATISTICS

# statistics of a tap that are compared: all but the counts of NaN and Inf
_COMPARED = STATISTICS[:5]
# a value whose statistics differ by more than this share of its peak is another value
MATCH = 1e-2
# a quantized value less like the full-precision one than this cosine is another value
LIKE = 0.5
# and so is one whose norm is outside this share of it
SIZE = (0.8, 1.25)
# operators with weights: where a cut leaves one of them on a second way from the input, it is no cut
_WEIGHTED = ("Conv", "ConvInteger", "QLinearConv", "MatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "Gemm")
_FLOAT = 1

Rows = NDArray[Any]


class OnnxBlocks:
    """One tower's file. names: its float values in the order of computation; input: the graph's own input."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._onnx = require("onnx", "onnx")
        self._runtime = onnxruntime
        self._bytes = path.read_bytes()
        graph = self._onnx.load_from_string(self._bytes).graph
        self.input = str(graph.input[0].name)
        self.output = str(graph.output[0].name)
        self._producer = {name: node for node in graph.node for name in node.output if name}
        self._order = {name: index for index, node in enumerate(graph.node) for name in node.output}
        self._everything = self._session([], list(self._producer), strict=False)
        self.names = [value.name for value in self._everything.get_outputs() if value.type == "tensor(float)"]

    def values(self, row: Rows) -> dict[str, Rows]:
        """Every float value for one input row [1, ...]."""
        return dict(zip(self.names, self._everything.run(self.names, {self.input: row})))

    def segment(self, start: str | None, end: str) -> Any:
        """A callable (rows, value of `start`) -> value of `end`; `start` None runs from the input."""
        session = self._session([start] if start else [], [end])
        wanted = {entry.name for entry in session.get_inputs()}

        def run(rows: Rows, value: Rows | None) -> Rows:
            feed = {self.input: rows} | ({start: value} if start else {})
            return session.run([end], {name: given for name, given in feed.items() if name in wanted})[0]

        return run

    def is_cut(self, start: str, end: str) -> bool:
        """Whether every weighted operator before `end` that `start` does not feed lies before `start`."""
        before = self._behind(end, {start})
        return start in before and not any(
            name in self._producer and self._producer[name].op_type in _WEIGHTED and self._reaches_input(name)
            for name in before - {start} - self._fed(start)
        )

    def _behind(self, end: str, stop: set[str]) -> set[str]:
        seen: set[str] = set()
        stack = [end]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            if name not in stop and name in self._producer:
                stack += self._producer[name].input
        return seen

    def _fed(self, start: str) -> set[str]:
        found = {start}
        for name, node in sorted(self._producer.items(), key=lambda item: self._order[item[0]]):
            if found & set(node.input):
                found.add(name)
        return found

    def _reaches_input(self, name: str) -> bool:
        return self.input in self._behind(name, set())

    def _session(self, inputs: list[str], outputs: list[str], *, strict: bool = True) -> Any:
        model = self._onnx.load_from_string(self._bytes)
        graph, make = model.graph, self._onnx.helper.make_value_info
        for name in inputs:
            for node in graph.node:
                for index, made in enumerate(node.output):
                    if made == name:
                        node.output[index] = f"{name}_cut"
            graph.input.append(self._onnx.helper.make_tensor_value_info(name, _FLOAT, None))
        del graph.output[:]
        for name in outputs:
            graph.output.append(make(name, self._onnx.TypeProto()))
        options = self._runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        if not strict:
            level = self._runtime.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_DISABLE_ALL
        return self._runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def find_by_statistics(blocks: OnnxBlocks, rows: Sequence[Rows], recorded: Rows) -> list[tuple[str | None, float]]:
    """For each recorded tap [cases, taps, 7] the value that computes it, and by how much its statistics differ.

    The difference is the largest over the cases, as a share of the tap's largest magnitude. None where no value is
    within `MATCH`; the difference is then that of the nearest.
    """
    table = np.stack([np.stack([_statistics(v) for v in blocks.values(row).values()]) for row in rows])
    found: list[tuple[str | None, float]] = []
    for tap in range(recorded.shape[1]):
        expected = recorded[: len(rows), tap, : len(_COMPARED)]
        peak = np.maximum(np.abs(expected).max(axis=1), 1e-30)
        gap = (np.abs(table - expected[:, None, :]).max(axis=2) / peak[:, None]).max(axis=0)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        # reshaped copies have the same statistics: the first is the one that was computed
        best = int(np.flatnonzero(gap <= gap.min() + 1e-9)[0])
        found.append((blocks.names[best] if gap[best] <= MATCH else None, float(gap[best])))
    return found


def _statistics(value: Rows) -> Rows:
    flat = np.asarray(value, np.float64).ravel()
    if not flat.size or not np.isfinite(flat).all():
        return np.full(len(_COMPARED), np.inf)
    size = np.abs(flat)
    return np.array([flat.min(), flat.max(), size.max(), np.sqrt(np.square(flat).mean()), np.quantile(size, 0.99)])


def find_by_likeness(blocks: OnnxBlocks, rows: Sequence[Rows], wanted: list[list[Rows]]) -> list[str | None]:
    """For each tap, given by its values for each row, the value of its shape that is most like it; None if none."""
    total = np.zeros((len(wanted), len(blocks.names)))
    for case, row in enumerate(rows):
        values = list(blocks.values(row).values())
        for tap, expected in enumerate(wanted):
            target = expected[case].ravel().astype(np.float64)
            for index, value in enumerate(values):
                if value.shape != expected[case].shape:
                    total[tap, index] = -np.inf
                    continue
                flat = value.ravel().astype(np.float64)
                one, other = np.linalg.norm(target), np.linalg.norm(flat)
                # a balanced layer's input has the direction and not the size
                alike = one > 0 and SIZE[0] <= other / one <= SIZE[1]
                total[tap, index] += float(flat @ target / (one * other)) / len(rows) if alike else -np.inf
    best = total.argmax(axis=1)
    return [blocks.names[index] if total[tap, index] >= LIKE else None for tap, index in enumerate(best)]
