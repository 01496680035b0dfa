"""Where XNNPACK may compute in int8: the annotations that PT2E turns into quantize and dequantize pairs.

ExecuTorch's own `XNNPACKQuantizer` puts a pair between a convolution and the ReLU6 that follows it. The convolution's
whole range, most of which ReLU6 cuts away, then has to fit 8 bits: on EfficientNet-Lite0 the cosine drops to .925. Here
the pair comes after the clamp, which XNNPACK fuses into the convolution. Residual sums are quantized in convolutional
towers and left in float in transformers, where they carry outliers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import fx
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver, PlaceholderObserver
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
)

from pocketvlm.export.depthwise import is_depthwise
from pocketvlm.export.fake_quant import Step
from pocketvlm.export.graphs import in_float
from pocketvlm.export.prepare import CONVOLUTIONS, LINEARS, clamp_of, residual_sums, stem

_ACTIVATION = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-16),
)
# XNNPACK sets the range for each row when it arrives
_ROW = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_tensor_affine,
    is_dynamic=True,
    observer_or_fake_quant_ctr=PlaceholderObserver.with_args(eps=2**-24),
)
_WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-24),
)


class TowerQuantizer(Quantizer):
    """Linear layers dynamic, convolutions and residual sums static: activations per tensor, weights per output channel,
    biases float (int32 in XNNPACK).

    float_layers: convolutions at the input that stay in float, besides what `mark_float` has exempted. ranges: "mixed"
    is the above; "rows" makes ordinary convolutions dynamic too and leaves depthwise ones in float, for which XNNPACK
    has no such kernel; "fixed" makes linear layers static. linears: which linear layers, by the shape of their weight;
    all unless given. steps: grids of activations that are known ahead, by node; the others are observed. by_row: names
    of linear layers that stay dynamic where ranges are "fixed".
    """

    def __init__(
        self,
        float_layers: int = 0,
        ranges: Literal["mixed", "rows", "fixed"] = "mixed",
        linears: Callable[[torch.Size], bool] | None = None,
        steps: Mapping[str, Step] | None = None,
        by_row: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.float_layers = float_layers
        self.ranges = ranges
        self.linears = linears or (lambda shape: True)
        self.steps = steps or {}
        self.by_row = by_row

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        exempt = {*stem(model, self.float_layers), *(node for node in model.graph.nodes if in_float(node))}
        convolutions = [n for n in model.graph.nodes if n.target in CONVOLUTIONS and n not in exempt]
        for node in model.graph.nodes:
            if node.target not in LINEARS or node in exempt or not _is_constant(node.args[1]):
                continue
            if self.linears(node.args[1].meta["val"].shape):
                fixed = self.ranges == "fixed" and node.name not in self.by_row
                _annotate_input(node, self._spec(node.args[0]) if fixed else _ROW)
                if fixed:
                    # XNNPACK's static linear layer gives int8
                    node.meta["quantization_annotation"].output_qspec = self._spec(node)
        for node in convolutions:
            if not _is_constant(node.args[1]):
                continue
            if self.ranges != "rows":
                self._annotate(node, {node.args[0]: self._spec(node.args[0]), node.args[1]: _WEIGHT})
            elif not is_depthwise(node.args[1].meta["val"].shape):
                _annotate_input(node, _ROW)
        for node in residual_sums(model) if convolutions and self.ranges != "rows" else []:
            self._annotate(node, {argument: self._spec(argument) for argument in node.args})
        return model

    def _spec(self, node: Any) -> QuantizationSpecBase:
        step = self.steps.get(node.name)
        if step is None:
            return _ACTIVATION
        return FixedQParamsQuantizationSpec(
            dtype=torch.int8,
            scale=step.scale,
            zero_point=step.zero - 128,
            quant_min=-128,
            quant_max=127,
            qscheme=torch.per_tensor_affine,
        )

    def _annotate(self, node: fx.Node, inputs: dict[Any, QuantizationSpecBase]) -> None:
        """Quantize the node's inputs and its output, or the output of the clamp that alone consumes it."""
        clamp = clamp_of(node)
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=None if clamp is not None else self._spec(node), _annotated=True
        )
        if clamp is not None:
            clamp.meta["quantization_annotation"] = QuantizationAnnotation(
                output_qspec=self._spec(clamp), _annotated=True
            )

    def validate(self, model: fx.GraphModule) -> None:
        """Every annotation above is one that XNNPACK takes."""


def _annotate_input(node: fx.Node, spec: QuantizationSpecBase) -> None:
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map={node.args[0]: spec, node.args[1]: _WEIGHT},  # type: ignore[dict-item]
        _annotated=True,
    )


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"
