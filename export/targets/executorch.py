"""ExecuTorch programs for the XNNPACK CPU backend (iOS, Android, desktop): float32 and int8, batch 1."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.errors import require
from pocketvlm.export.prepare import (
    CONVOLUTIONS,
    STEM_LAYERS,
    Scheme,
    capture,
    choose_scheme,
    correct_bias,
    fold_batchnorm,
    prune,
    quantize_tables,
    run_module,
    split_calibration,
)
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant
from pocketvlm.export.targets.onnx import Tower, calibration_rows, check_precision, example_rows, present_towers, quiet

METHODS: dict[Tower, str] = {"image": "encode_image", "text": "encode_text"}


class ExecuTorchTarget:
    """One file per precision, `executorch/model-int8.pte`, with the methods `encode_image` (uint8 [1, S, S, 3]) and
    `encode_text` (int32 [1, L]), each giving float32 [1, D], and the constant methods `embed_dim`, `image_size`,
    `context_length` and `contract_sha256`. Loading one method costs no memory for the other.

    The batch is fixed at 1: memory is planned ahead for the largest batch, which a phone would carry for nothing.
    int8: token tables are int8 rows with a scale each; convolutional towers are quantized statically with corrected
    biases (their first two convolutions in float where held-out inputs ask for it), transformers dynamically; where
    nothing meets the floor the other kind is tried, and the best is kept.
    """

    name: ClassVar[str] = "executorch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "int8")

    def __init__(self) -> None:
        for module in ("executorch.exir", "torchao"):
            require(module, "executorch")

    def lower(self, towers: Towers, *, precision: Precision, folder: Path, calibration: Calibration | None) -> Variant:
        """Write both towers into one program.

        Raises:
            UsageError: this backend has no such precision, or int8 without calibration data.
        """
        check_precision(self.name, self.precisions, precision, calibration)
        programs: dict[str, Any] = {}
        partitioners: dict[str, list[Any]] = {}
        notes: dict[str, object] = {"backend": "xnnpack"}
        with quiet():
            for tower, module in present_towers(towers):
                if precision == "int8":
                    inputs = calibration_rows(calibration, tower)
                    lowered, scheme, notes[tower] = _quantize(module, inputs, tower)
                else:
                    lowered, scheme = capture(module, example_rows(towers, tower)), "fp32"
                    prune(lowered)
                example = torch.from_numpy(example_rows(towers, tower)[:1])
                programs[METHODS[tower]] = torch.export.export(lowered, (example,))
                partitioners[METHODS[tower]] = _partitioners(scheme)
            relative = f"{self.name}/model-{precision}.pte"
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            _write(programs, partitioners, _constants(towers), folder / relative)
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


def _partitioners(scheme: str) -> list[Any]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )

    # the dynamic one goes first: the other would take its linear layers apart
    return ([XnnpackDynamicallyQuantizedPartitioner()] if scheme == "dynamic" else []) + [XnnpackPartitioner()]


def _write(programs: dict[str, Any], partitioners: dict[str, list[Any]], constants: dict[str, Any], path: Path) -> None:
    from executorch.exir import to_edge_transform_and_lower

    manager = to_edge_transform_and_lower(programs, partitioner=partitioners, constant_methods=constants)
    with open(path, "wb") as file:
        manager.to_executorch().write_to_file(file)


def _quantize(module: nn.Module, inputs: NDArray[Any], tower: Tower) -> tuple[nn.Module, str, dict[str, object]]:
    """The quantized graph, its kind, and notes; judged in eager mode, which XNNPACK matches to rounding."""
    fit, held = split_calibration(inputs)
    source = quantize_tables(module)
    operators = {str(node.target) for node in capture(source, fit).graph.nodes}
    attention = any("softmax" in name or "dot_product_attention" in name for name in operators)
    dynamic = Scheme("pt2e-dynamic", lambda: _dynamic(source, fit))
    static = Scheme("pt2e-static", lambda: _static(source, fit, 0))
    stem = Scheme("pt2e-static-float-stem", lambda: _static(source, fit, STEM_LAYERS))
    if any(str(target) in operators for target in CONVOLUTIONS):
        schemes = [static, stem, replace(dynamic, last_resort=True)]
    elif attention:
        schemes = [dynamic, replace(static, last_resort=True)]
    else:
        schemes = [static, replace(dynamic, last_resort=True)]
    graph, scheme, notes = choose_scheme(schemes, lambda graph: run_module(graph, held), run_module(module, held))
    return graph, "dynamic" if scheme.name == dynamic.name else "static", notes


def _static(module: nn.Module, fit: NDArray[Any], float_layers: int) -> nn.Module:
    from pocketvlm.export.targets.xnnpack_quantizer import StaticQuantizer

    graph = capture(copy.deepcopy(module), fit)
    fold_batchnorm(graph)
    correct_bias(graph, fit, float_layers)
    return _convert(graph, StaticQuantizer(float_layers), fit)


def _dynamic(module: nn.Module, fit: NDArray[Any]) -> nn.Module:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    configuration = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    graph = capture(copy.deepcopy(module), fit)
    fold_batchnorm(graph)
    return _convert(graph, XNNPACKQuantizer().set_global(configuration), fit[:2])


@torch.no_grad()
def _convert(graph: Any, quantizer: Any, fit: NDArray[Any]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(graph, quantizer)
    for index in range(0, len(fit), 16):
        prepared(torch.from_numpy(np.ascontiguousarray(fit[index : index + 16])))
    converted: nn.Module = convert_pt2e(prepared)
    return converted
