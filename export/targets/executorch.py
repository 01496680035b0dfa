"""ExecuTorch programs for the XNNPACK CPU backend (iOS, Android, desktop): float32 and four ways to quantize; batch
1."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.edge.errors import require
from pocketvlm.export import observers
from pocketvlm.export.delegation import delegation
from pocketvlm.export.depthwise import is_depthwise
from pocketvlm.export.fidelity import Scheme, choose_scheme, fidelity, run_module
from pocketvlm.export.graphs import constant, in_float, prune, set_parameter
from pocketvlm.export.mixed import Plan
from pocketvlm.export.observers import Method
from pocketvlm.export.prepare import (
    LINEARS,
    STEM_LAYERS,
    Prepared,
    Rounding,
    capture,
    rounded_nodes,
    weight_only_graph,
)
from pocketvlm.export.ranges import histograms, output_losses, steps_by
from pocketvlm.export.rounding import round_blocks_evenly, round_kernels, round_weight
from pocketvlm.export.static import balance_notes, static_tower
from pocketvlm.export.stems import is_stored
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant, check_precision
from pocketvlm.export.targets.onnx import Tower, example_rows, prepared_tower, present_towers, quiet
from pocketvlm.export.token_tables import BLOCK
from pocketvlm.export.tuned import tuning_notes

METHODS: dict[Tower, str] = {"image": "encode_image", "text": "encode_text"}
# mean 1 - cosine that rounding the output of one linear layer may cost for the layer to be static, and the rows that
# tell
_LOST = (0.01, 0.001)
_JUDGED = 16


class ExecuTorchTarget:
    """One file per precision, `executorch/model-int8.pte`, with the methods `encode_image` (uint8 [1, S, S, 3]) and
    `encode_text` (int32 [1, L]), each giving float32 [1, D], and the constant methods `embed_dim`, `image_size`,
    `context_length` and `contract_sha256`. Loading one method costs no memory for the other.

    The batch is fixed at 1: memory is planned ahead for the largest batch, which a phone would carry for nothing.
    w8a8-dynamic: linear layers and ordinary convolutions set their range when an input arrives, depthwise convolutions
    stay in float. w8a8-static: ranges set ahead of time; linear layers whose
    output does not bear that stay dynamic. w4: linear layers in 4 bits and blocks
    of 32 with such dynamic inputs ("8da4w": XNNPACK has no 4-bit kernel with float inputs), where the width is a
    multiple of 32; token tables in 4 bits; the rest as w8a8-dynamic. All have the first three convolutions in float.

    int8: token tables are int8 rows with a scale each; linear layers are balanced and dynamic, convolutions static but
    for the first three, biases corrected (`export.prepare`). Where a convolutional tower does not meet the floor, one
    with all convolutions in float is tried, and the better is kept. mixed: int8 with the blocks of a plan in float.
    """

    name: ClassVar[str] = "executorch"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "mixed", "w8a8-dynamic", "w8a8-static", "int8", "w4")
    defaults: ClassVar[tuple[str, ...]] = ("fp32", "int8")
    refused: ClassVar[dict[str, str]] = {
        "fp16": "XNNPACK computes in float16 on few processors, so the file could not be checked",
        "w8": "XNNPACK has no kernel for int8 weights with float inputs",
        **dict.fromkeys(("palette8", "palette6", "palette4"), "XNNPACK looks no weights up in a table"),
    }

    def __init__(
        self, write: Callable[[dict[str, Any], str, dict[str, Any], Path], dict[str, Any] | None] | None = None
    ) -> None:
        """write: how programs become a file, with what `write_program` returns, which it is unless given."""
        for module in ("executorch.exir", "torchao"):
            require(module, "executorch")
        self._write = write or write_program

    def lower(
        self,
        towers: Towers,
        *,
        precision: Precision,
        folder: Path,
        calibration: Calibration | None,
        plan: Plan | None = None,
    ) -> Variant:
        """Write both towers into one program.

        Raises:
            UsageError: this backend has no such precision, or one that needs calibration data, or a plan, without it.
        """
        check_precision(self, precision, calibration, plan)
        programs: dict[str, Any] = {}
        notes: dict[str, object] = {"backend": "xnnpack"}
        with quiet():
            for tower, module in present_towers(towers):
                rows = example_rows(towers, tower)
                if precision == "fp32":
                    graph = capture(module, rows)
                    prune(graph)
                    lowered: nn.Module = graph
                elif precision in ("int8", "mixed"):
                    ready = prepared_tower(module, calibration, tower, plan if precision == "mixed" else None)
                    lowered, notes[tower] = _quantize(ready)
                else:
                    judge = prepared_tower(module, calibration, tower) if calibration else None
                    lowered, notes[tower] = _rung(module, judge, rows, precision)
                example = torch.from_numpy(example_rows(towers, tower)[:1])
                programs[METHODS[tower]] = torch.export.export(lowered, (example,))
            relative = f"{self.name}/model-{precision}.pte"
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            taken_over = self._write(programs, precision, constants(towers), folder / relative)
            if taken_over is not None:
                notes["delegation"] = taken_over
        files: dict[str, str] = {tower: relative for tower, _ in present_towers(towers)}
        return Variant(self.name, precision, files, "fixed-1", towers.contract.embed_dim, notes)


def constants(towers: Towers) -> dict[str, Any]:
    """Constant methods of a program, by which an app checks what it was given."""
    contract = towers.contract
    found: dict[str, Any] = {"embed_dim": contract.embed_dim, "contract_sha256": contract.digest()}
    if contract.image is not None:
        found["image_size"] = contract.image.size
    if contract.text is not None:
        found["context_length"] = contract.text.context_length
    return found


def _partitioners(precision: str) -> list[Any]:
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, ConvolutionConfig, LinearConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    rest = XnnpackPartitioner()
    if precision == "fp32":
        return [rest]
    # dynamic linear layers go first, as the other would take them apart; and only they, because a partitioner for all
    # that can be dynamic takes the static convolutions too and cuts the network at every residual sum
    dynamic = ConfigPrecisionType.DYNAMIC_QUANT
    static = precision in ("int8", "mixed", "w8a8-static")
    configs = [LinearConfig, AddmmConfig, *([] if static else [ConvolutionConfig])]
    return [XnnpackPartitioner(configs=configs, config_precisions=dynamic), rest]


def write_program(programs: dict[str, Any], precision: str, constants: dict[str, Any], path: Path) -> dict[str, Any]:
    """Lower exported programs (method name -> `torch.export.ExportedProgram`) to one file; returns `delegation`."""
    from executorch.exir import to_edge_transform_and_lower

    partitioners = {method: _partitioners(precision) for method in programs}
    manager = to_edge_transform_and_lower(programs, partitioner=partitioners, constant_methods=constants)
    taken_over = delegation(manager, programs)
    with open(path, "wb") as file:
        manager.to_executorch().write_to_file(file)
    return taken_over


def _quantize(ready: Prepared) -> tuple[nn.Module, dict[str, object]]:
    """The quantized graph and notes; judged in eager mode, which XNNPACK matches to rounding."""
    static = Scheme("pt2e-static", lambda: _lowerable(ready, static=True))
    dynamic = Scheme("pt2e-dynamic", lambda: _lowerable(ready, static=False), last_resort=ready.convolutional)
    schemes = [static, dynamic] if ready.convolutional else [dynamic]
    # one row at a time, as the file runs: dynamic ranges are those of the whole batch in eager mode
    graph, scheme, notes = choose_scheme(schemes, lambda graph: run_module(graph, ready.held, 1), ready.expected)
    notes |= tuning_notes(ready) | balance_notes(ready)
    return graph, notes | (static_tower(ready).settings.notes() if scheme is static else {})


def _rung(
    module: nn.Module, ready: Prepared | None, rows: NDArray[Any], precision: str
) -> tuple[nn.Module, dict[str, object]]:
    """The quantized graph of the other precisions, and notes. ready: where there are calibration inputs."""
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    bits: Literal[4, 8] = 4 if precision == "w4" else 8
    if ready is None:
        graph, fit = weight_only_graph(module, rows, bits), rows
    else:
        graph, fit = ready.rounded(ROUNDINGS[precision], bits), ready.fit
    if precision == "w8a8-static":
        assert ready is not None, "check_precision has refused it without calibration inputs"
        lowered, _, facts = choose_scheme(
            _fixed_schemes(graph, ready), lambda graph: run_module(graph, ready.held, 1), ready.expected
        )
        return lowered, {**facts, "biases": "corrected"}
    else:
        lowered = _convert(
            graph, TowerQuantizer(STEM_LAYERS, "rows", linears=_no_blocks if bits == 4 else None), fit[:2]
        )
    scheme = {"w8a8-dynamic": "pt2e-dynamic", "w4": "8da4w-blocks-of-32"}[precision]
    if bits == 4:
        _quantize_blocks(lowered)
    notes: dict[str, object] = {
        "scheme": scheme,
        "biases": "corrected" if ready else "as they were, for want of calibration data",
    }
    if ready:
        notes |= fidelity(run_module(lowered, ready.held, 1), ready.expected).notes(precision)
    return lowered, notes | tuning_notes(ready, ROUNDINGS[precision])


def _fixed_schemes(graph: Any, ready: Prepared) -> list[Scheme[nn.Module]]:
    """Every layer static; then without the linear layers whose output suffers most from 8 bits, by each observer.

    XNNPACK's static linear layer gives int8, one range for all channels. Transformers have channels that are a hundred
    times louder than the rest (in the residual stream, where nothing can balance them): such a layer stays dynamic,
    which gives float.
    """
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    names = rounded_nodes(graph, STEM_LAYERS)
    for node in graph.graph.nodes:
        if node.target in LINEARS:
            names |= {node.name, str(node.args[0])}
    seen = histograms(graph, ready.fit, names)
    lost: dict[str, float] = {}

    def fixed(observer: Method, limit: float | None) -> nn.Module:
        if limit is not None and not lost:
            lost.update(output_losses(graph, ready.held[:_JUDGED], steps_by(seen, "minmax")))
        by_row = [name for name, loss in lost.items() if limit is not None and loss > limit]
        quantizer = TowerQuantizer(STEM_LAYERS, "fixed", steps=steps_by(seen, observer), by_row=by_row)
        return _convert(copy.deepcopy(graph), quantizer, ready.fit[:2])

    few, most = _LOST
    ladder: list[tuple[Method, float | None]] = [("minmax", None), ("minmax", few), ("minmax", most)]
    ladder += [(observer, most) for observer in observers.METHODS[1:]]
    return [
        Scheme(
            f"pt2e-static-{observer}" + ("" if limit is None else f", outputs losing {limit:g} dynamic"),
            partial(fixed, observer, limit),
        )
        for observer, limit in ladder
    ]


def _no_blocks(shape: torch.Size) -> bool:
    return shape[1] % BLOCK != 0


def _linear_weight(weight: Tensor) -> Tensor:
    return round_weight(weight) if _no_blocks(weight.shape) else round_blocks_evenly(weight)


def _dense_weight(weight: Tensor) -> Tensor:
    return weight if is_depthwise(weight.shape) else round_weight(weight)


ROUNDINGS = {
    "w8a8-dynamic": Rounding(round_weight, "rows", _dense_weight),
    "w8a8-static": Rounding(round_weight, "fixed"),
    "w4": Rounding(_linear_weight, "rows", _dense_weight),
}


def _quantize_blocks(graph: Any) -> None:
    """Linear layers whose weight is still float become torchao's 4-bit ones, in place."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    for node in list(graph.graph.nodes):
        if node.target not in LINEARS or node.args[1].op != "get_attr":
            continue
        weight = graph.get_parameter(str(node.args[1].target))
        bias = node.args[2] if len(node.args) > 2 else None
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = nn.Parameter(weight.data)
        if bias is not None:
            layer.bias = nn.Parameter(graph.get_parameter(str(bias.target)).data)
        graph.add_submodule(f"blocks_{node.name}", layer)
        with graph.graph.inserting_after(node):
            call = graph.graph.call_module(f"blocks_{node.name}", (node.args[0],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    four_bits: Any = torch.int4  # type: ignore[attr-defined]
    quantize_(graph, Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=PerGroup(BLOCK)))


def _lowerable(ready: Prepared, *, static: bool) -> nn.Module:
    from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer

    # without ranges to observe, two rows are enough to run the graph once
    if not static:
        graph, float_layers = ready.graph(static=False)
        return _convert(graph, TowerQuantizer(float_layers), ready.fit[:2])
    chosen = static_tower(ready)
    quantizer = TowerQuantizer(chosen.settings.stem, steps=chosen.steps)
    return _convert(copy.deepcopy(chosen.graph), quantizer, ready.fit[:2])


@torch.no_grad()
def _convert(graph: Any, quantizer: Any, fit: NDArray[Any]) -> nn.Module:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    # as every other backend has them, and biases are corrected for them; here they are stored as float
    for node in list(graph.graph.nodes):
        weight = constant(graph, node.args[1]) if is_stored(node) and not in_float(node) else None
        if weight is not None:
            set_parameter(graph, node, 1, round_kernels(weight), "stored_weight")
    prune(graph)
    prepared = prepare_pt2e(graph, quantizer)
    for index in range(0, len(fit), 16):
        prepared(torch.from_numpy(np.ascontiguousarray(fit[index : index + 16])))
    return _unshare_dequantized(convert_pt2e(prepared))


def _unshare_dequantized(graph: fx.GraphModule) -> nn.Module:
    """The graph, changed in place: every operator reads a dequantize of its own, as XNNPACK's partitioner expects.

    It drops the dequantize before an operator that it computes in int8 (here the mean of squeeze-and-excitation). Any
    other that reads the same one, as the product with the gate, is handed int8 beside float, which does not load.
    """
    fixed = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(graph.graph.nodes):
        if node.target is not fixed:
            continue
        for reader in list(node.users)[1:]:
            with graph.graph.inserting_before(reader):
                reader.replace_input_with(node, graph.graph.node_copy(node))
    graph.recompile()
    return graph
