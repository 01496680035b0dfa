"""Core ML packages with int8 activations, made without a Mac: this kit's evaluator of ML programs sets the ranges.

coremltools sets them by running the model, which needs macOS. Its passes that write `quantize` and `dequantize` into a
program take ranges from anywhere, and `export.mil.program` computes every intermediate result on any system.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pocketvlm.export.mil.program import MilProgram, as_input
from pocketvlm.export.prepare import STEM_LAYERS

# what Core ML computes on integers; sums of branches and means stay float16
_KINDS = ("conv", "linear")
ROWS = 48


def measure_ranges(model: Any, rows: NDArray[Any]) -> dict[str, dict[str, np.float32]]:
    """Least and largest value of the input and of every intermediate result over `rows`, by name: "rmin" and "rmax".

    model: a converted `coremltools.models.MLModel`, not yet compressed. rows: as the edge runtime gets them.
    """
    (entry,) = model.get_spec().description.input
    program = MilProgram(model._mil_program.functions["main"], "the converted program")
    found: dict[str, tuple[float, float]] = {}

    def widen(name: str, low: float, high: float) -> None:
        before = found.get(name, (low, high))
        found[name] = (min(low, before[0]), max(high, before[1]))

    def see(_: str, name: str, value: Tensor) -> None:
        if value.is_floating_point() and value.numel():
            widen(name, float(value.min()), float(value.max()))

    for start in range(len(rows)):
        given = as_input(entry, rows[start : start + 1])
        widen(entry.name, float(given.min()), float(given.max()))
        program.run({entry.name: given}, see)
    return {name: {"rmin": np.float32(low), "rmax": np.float32(high)} for name, (low, high) in found.items()}


def quantize_activations(model: Any, rows: NDArray[Any]) -> Any:
    """The model with int8 inputs of linear layers, and of convolutions but the first `STEM_LAYERS`: one scale and zero
    point for each tensor, from the least to the largest value that `rows` give it. Weights stay as they are.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.frontend.milproto import load as milproto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils
    from coremltools.optimize.coreml.experimental import OpActivationLinearQuantizerConfig

    operations = model._mil_program.functions["main"].operations
    stem = [op.name for op in operations if op.op_type == "conv"][:STEM_LAYERS]
    # with a zero point: outputs of ReLU and GELU would leave half of a symmetric range empty
    config = OpActivationLinearQuantizerConfig(mode="linear", dtype=np.int8)
    insert = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
    insert.set_options(
        [
            PassOption(
                "config",
                cto.OptimizationConfig(
                    op_type_configs=dict.fromkeys(_KINDS, config), op_name_configs=dict.fromkeys(stem)
                ),
            ),
            PassOption("activation_stats", measure_ranges(model, rows)),
        ]
    )
    return utils._apply_graph_pass(
        model,
        [insert, PASS_REGISTRY["common::dequantize_quantize_pair_elimination"]],
        spec_version=model.get_spec().specificationVersion,
        pymil_load_func=milproto.load,
        skip_model_load=True,
    )
