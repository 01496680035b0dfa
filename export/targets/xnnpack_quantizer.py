"""Where XNNPACK may compute in int8: the annotations that PT2E turns into quantize and dequantize pairs.

ExecuTorch's own `XNNPACKQuantizer` puts a pair between a convolution and the ReLU6 that follows it. The convolution's
whole range, most of which ReLU6 cuts away, then has to fit 8 bits: on EfficientNet-Lite0 the cosine drops to .925. Here
the pair comes after the clamp, which XNNPACK fuses into the convolution. Residual sums are quantized in convolutional
towers and left in float in transformers, where they carry outliers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e.observer import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from pocketvlm.export.prepare import CONVOLUTIONS, LINEARS, stem

_aten = torch.ops.aten
_CLAMPS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_ATTENTION = (_aten.softmax.int, _aten._softmax.default, _aten.scaled_dot_product_attention.default)

_ACTIVATION = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-128,
    quant_max=127,
    qscheme=torch.per_tensor_affine,
    observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-16),
)
_WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
    observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-24),
)


class StaticQuantizer(Quantizer):
    """Static int8: activations per tensor, weights per output channel, biases float (int32 in XNNPACK).

    float_layers: convolutions at the input that stay in float.
    """

    def __init__(self, float_layers: int = 0) -> None:
        super().__init__()
        self.float_layers = float_layers

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        nodes = [node for node in model.graph.nodes if node.op == "call_function"]
        attention = any(node.target in _ATTENTION for node in nodes)
        exempt = stem(model, self.float_layers)
        for node in nodes:
            if node in exempt:
                continue
            if node.target in (*CONVOLUTIONS, *LINEARS) and _is_constant(node.args[1]):
                _annotate(node, {node.args[0]: _ACTIVATION, node.args[1]: _WEIGHT})
            elif node.target in _SUMS and not attention and _is_residual(node):
                _annotate(node, dict.fromkeys(node.args, _ACTIVATION))
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Every annotation above is one that XNNPACK takes."""


def _annotate(node: fx.Node, inputs: dict[Any, QuantizationSpec]) -> None:
    """Quantize the node's inputs and its output, or the output of the clamp that alone consumes it."""
    users = list(node.users)
    clamp = users[0] if len(users) == 1 and users[0].target in _CLAMPS else None
    node.meta["quantization_annotation"] = QuantizationAnnotation(
        input_qspec_map=inputs, output_qspec=None if clamp is not None else _ACTIVATION, _annotated=True
    )
    if clamp is not None:
        clamp.meta["quantization_annotation"] = QuantizationAnnotation(output_qspec=_ACTIVATION, _annotated=True)


def _is_constant(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def _is_residual(node: fx.Node) -> bool:
    """Both terms are activations of the network, not constants and not the pixels' standardisation."""
    return len(node.args) == 2 and all(
        isinstance(argument, fx.Node) and argument.op == "call_function" and _below_convolution(argument)
        for argument in node.args
    )


def _below_convolution(node: fx.Node) -> bool:
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current.target in CONVOLUTIONS:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False
