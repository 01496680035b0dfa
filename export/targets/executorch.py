"""ExecuTorch programs for the XNNPACK CPU backend (iOS, Android, desktop): float32 and int8, batch 1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.errors import require
from pocketvlm.export.fidelity import Scheme, choose_scheme, run_module
from pocketvlm.export.prepare import Prepared, capture, prune
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant
from pocketvlm.export.targets.onnx import Tower, check_precision, example_rows, prepared_tower, present_towers, quiet

METHODS: dict[Tower, str] = {"image": "encode_image", "text": "encode_text"}


class ExecuTorchTarget:
    """One file per precision, `executorch/model-int8.pte`, with the methods `encode_image` (uint8 [1, S, S, 3]) and
    `encode_text` (int32 [1, L]), each giving float32 [1, D], and the constant methods `embed_dim`, `image_size`,
    `context_length` and `contract_sha256`. Loading one method costs no memory for the other.

    The batch is fixed at 1: memory is planned ahead for the largest batch, which a phone would carry for nothing.
    int8: token tables are int8 rows with a scale each; linear layers are balanced and dynamic, convolutions static but
    for the first three, biases corrected (`export.prepare`). Where a convolutional tower does not meet the floor, one
    with all convolutions in float is tried, and the better is kept.
    """

    name: ClassVar[str] = "executorch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def __init__(self, write: Callable[[dict[str, Any], str, dict[str, Any], Path], None] | None = None) -> None:
        """write: how programs become a file; `write_program` unless given."""
        for module in ("executorch.exir", "torchao"):
            require(module, "executorch")
        self._write = write or write_program

    def lower(self, towers: Towers, *, precision: Precision, folder: Path, calibration: Calibration | None) -> Variant:
        """Write both towers into one program.

        Raises:
            UsageError: this backend has no such precision, or int8 without calibration data.
        """
        check_precision(self.name, self.precisions, precision, calibration)
        programs: dict[str, Any] = {}
        notes: dict[str, object] = {"backend": "xnnpack"}
        with quiet():
            for tower, module in present_towers(towers):
                if precision == "int8":
                    lowered, notes[tower] = _quantize(prepared_tower(module, calibration, tower))
                else:
                    lowered = capture(module, example_rows(towers, tower))
                    prune(lowered)
                example = torch.from_numpy(example_rows(towers, tower)[:1])
                programs[METHODS[tower]] = torch.export.export(lowered, (example,))
            relative = f"{self.name}/model-{precision}.pte"
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            self._write(programs, precision, _constants(towers), folder / relative)
        files: dict[str, str] = {tower: relative for tower, _ in present_towers(towers)}
        return Variant(self.name, precision, files, "fixed-1", towers.contract.embed_dim, notes)


def _constants(towers: Towers) -> dict[str, Any]:
    contract = towers.contract
    constants: dict[str, Any] = {"embed_dim": contract.embed_dim, "contract_sha256": contract.digest()}
    if contract.image is not None:
        constants["image_size"] = contract.image.size
    if contract.text is not None:
        constants["context_length"] = contract.text.context_length
    return constants


def _partitioners(precision: str) -> list[Any]:
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    rest = XnnpackPartitioner()
    if precision != "int8":
        return [rest]
    # dynamic linear layers go first, as the other would take them apart; and only they, because a partitioner for all
    # that can be dynamic takes the static convolutions too and cuts the network at every residual sum
    dynamic = ConfigPrecisionType.DYNAMIC_QUANT
    return [XnnpackPartitioner(configs=[LinearConfig, AddmmConfig], config_precisions=dynamic), rest]


def write_program(programs: dict[str, Any], precision: str, constants: dict[str, Any], path: Path) -> None:
    """Lower exported programs (method name -> `torch.export.ExportedProgram`) to one file."""
    from executorch.exir import to_edge_transform_and_lower

    partitioners = {method: _partitioners(precision) for method in programs}
    manager = to_edge_transform_and_lower(programs, partitioner=partitioners, constant_methods=constants)
    with open(path, "wb") as file:
        manager.to_executorch().write_to_file(file)


def _quantize(ready: Prepared) -> tuple[nn.Module, dict[str, object]]:
    """The quantized graph and notes; judged in eager mode, which XNNPACK matches to rounding."""
    static = Scheme("pt2e-static", lambda: _lowerable(ready, static=True))
    dynamic = Scheme("pt2e-dynamic", lambda: _lowerable(ready, static=False), last_resort=ready.convolutional)
    schemes = [static, dynamic] if ready.convolutional else [dynamic]
    # one row at a time, as the file runs: dynamic ranges are those of the whole batch in eager mode
    graph, _, notes = choose_scheme(schemes, lambda graph: run_module(graph, ready.held, 1), ready.expected)
    return graph, notes


def _lowerable(ready: Prepared, *, static: bool) -> nn.Module:
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    graph, float_layers = ready.graph(static=static)
    # without static ranges to observe, two rows are enough to run the graph once
    return _convert(graph, TowerQuantizer(float_layers), ready.fit if static else ready.fit[:2])


@torch.no_grad()
def _convert(graph: Any, quantizer: Any, fit: NDArray[Any]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, quantizer)
    for index in range(0, len(fit), 16):
        prepared(torch.from_numpy(np.ascontiguousarray(fit[index : index + 16])))
    converted: nn.Module = convert_pt2e(prepared)
    return converted
