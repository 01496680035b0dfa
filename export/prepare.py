"""What every quantizing backend needs done to a tower first: an integer token table, folded batch norm, balanced linear
layers (where their inputs are rounded) and corrected biases.

Balancing: the inputs of a linear layer share one scale, so that a loud channel drowns the quiet ones. Dividing each
input channel by s_j and multiplying the weight's column by it changes nothing in float and much in int8 (Xiao et al.
2022, "SmoothQuant", arXiv:2211.10438).

Bias correction: rounding shifts the mean of a layer's output, and such shifts add up over depth. They are measured on
calibration data and taken back through the bias, layer by layer (Nagel et al. 2019, "Data-Free Quantization Through
Weight Equalization and Bias Correction", section 4.2; here with measured means, of weights and activations rounded).

Everywhere linear layers are dynamic (each input row sets its own range when it arrives) and convolutions are static.
`Prepared` does all this once per tower, for every backend.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.export.depthwise import make_depthwise
from pocketvlm.export.fidelity import run_module, split_calibration
from pocketvlm.export.graphs import constant, in_float, mark_float, pool_by_mean, prune, set_parameter
from pocketvlm.export.rounding import (
    EXPONENTS,
    balancing_scales,
    round_kernels,
    round_rows,
    round_tensor,
    round_weight,
    turn_down,
)
from pocketvlm.export.stems import float_entirely, is_stored
from pocketvlm.export.token_tables import quantize_tables, quantized_tables

# begins the names that `round_weights` gives to weights which stay in float
FLOAT_WEIGHT = "in_float_weight"
# convolutions at the input that stay in float: a thousandth of the weights, and where rounding hurts most (their few
# channels carry everything that follows)
STEM_LAYERS = 3
# pixels (or ids) that pass through the float graph in one batch; bounds memory
_BATCH_LIMIT = 192 * 128 * 128

_aten = torch.ops.aten
CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.conv1d.default)
LINEARS = (_aten.linear.default,)
_CLAMPS = (_aten.relu.default, _aten.relu_.default, _aten.hardtanh.default, _aten.hardtanh_.default)
_SUMS = (_aten.add.Tensor, _aten.add_.Tensor)
_LAYER_NORM = _aten.layer_norm.default
_ATTENTION = (_aten.softmax.int, _aten._softmax.default, _aten.scaled_dot_product_attention.default)

# by how much the loudest channels of the best candidate are turned down further (a few channels with huge values are
# usual in transformers)
_LIMITS = (1.0, 2.0, 4.0, 8.0)
# vectors (tokens, pictures) that candidates are judged by
_JUDGED = 1024
# how far the error must fall for a balance to be worth one more operator
_BALANCE_GAIN = 0.8
# in a graph's meta: balanced value -> exponent of its scales ("rms": the candidate that has none)
BALANCE = "balance"


def capture(module: nn.Module, rows: NDArray[Any]) -> fx.GraphModule:
    """The tower as a graph of ATen operators with a free batch size. rows: at least two example inputs."""
    example = torch.from_numpy(np.ascontiguousarray(np.resize(rows, (2, *rows.shape[1:]))))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    return pool_by_mean(cast(fx.GraphModule, program.module(check_guards=False)))


def weight_only_graph(
    module: nn.Module, rows: NDArray[Any], bits: Literal[4, 8] = 8, blocks: Collection[str] = ()
) -> fx.GraphModule:
    """What needs no real inputs: integer token tables (but those of `blocks`), folded batch norm, `make_depthwise`."""
    return _plain(quantize_tables(module, bits, blocks), rows)


def _plain(module: nn.Module, rows: NDArray[Any]) -> fx.GraphModule:
    graph = capture(module, rows)
    fold_batchnorm(graph)
    make_depthwise(graph)
    return graph


def fold_batchnorm(graph_module: fx.GraphModule) -> int:
    """Fold every batch norm that follows a convolution into it, in place; returns how many were folded."""
    folded = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _aten.batch_norm.default:
            continue
        conv = node.args[0]
        if conv.target not in CONVOLUTIONS or len(conv.users) != 1:
            continue
        gamma, beta, mean, variance = (constant(graph_module, argument) for argument in node.args[1:5])
        weight = constant(graph_module, conv.args[1])
        bias = constant(graph_module, conv.args[2]) if len(conv.args) > 2 else None
        if weight is None or mean is None or variance is None:
            continue
        # in float64, or the rounding of each fold would show against the float32 budget
        factor = (variance.double() + node.args[7]).rsqrt() * (1.0 if gamma is None else gamma.double())
        shift = (0.0 if bias is None else bias.double()) - mean.double()
        new_bias = shift * factor + (0.0 if beta is None else beta.double())
        new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        set_parameter(graph_module, conv, 1, new_weight.to(weight.dtype), "folded_weight")
        set_parameter(graph_module, conv, 2, new_bias.to(weight.dtype), "folded_bias")
        node.replace_all_uses_with(conv)
        graph_module.graph.erase_node(node)
        folded += 1
    prune(graph_module)
    return folded


@torch.no_grad()
def balance_linears(graph_module: fx.GraphModule, rows: NDArray[Any]) -> int:
    """Balance the linear layers that int8 then computes with less error, in place.

    x W^T = (x / s) (W s)^T for any s > 0; of some candidates the one is taken that gives the smallest error of the
    layer's output when both factors are rounded. Layers that share an input share s. The division goes into the
    LayerNorm before them where nothing else reads that, else it is one multiplication. Returns how many inputs.
    """
    found: dict[fx.Node, tuple[list[fx.Node], Tensor]] = {}
    _Balance(graph_module, found).run(_one_batch(rows))
    for node, (linears, scale) in found.items():
        for linear in linears:
            weight = constant(graph_module, linear.args[1])
            assert weight is not None
            set_parameter(graph_module, linear, 1, weight * scale, "balanced_weight")
        if set(node.users) == set(linears) and _divide_norm(graph_module, node, scale):
            continue
        name = f"balance_{node.name}"
        graph_module.register_parameter(name, nn.Parameter(1 / scale, requires_grad=False))
        with graph_module.graph.inserting_after(node):
            factor = graph_module.graph.get_attr(name)
        with graph_module.graph.inserting_after(factor):
            product = graph_module.graph.call_function(_aten.mul.Tensor, (node, factor))
        factor.meta["val"] = 1 / scale
        product.meta = {key: node.meta[key] for key in ("val", "tensor_meta") if key in node.meta}
        for linear in linears:
            linear.replace_input_with(node, product)
    prune(graph_module)
    return len(found)


@dataclass(frozen=True)
class Rounding:
    """What a precision rounds, for `correct_bias`.

    linear, convolution: the values that a weight of such a layer takes. inputs: "mixed", linear layers by the row and
    convolutions and residual sums by a fixed range (int8); "rows", linear layers by the row only; "fixed", everything
    by a fixed range; "none", weights only. smallest: weights of fewer elements stay in float.
    """

    linear: Callable[[Tensor], Tensor]
    inputs: Literal["mixed", "rows", "fixed", "none"]
    convolution: Callable[[Tensor], Tensor] = field(default_factory=lambda: round_weight)
    smallest: int = 0

    def weight(self, node: fx.Node, weight: Tensor) -> Tensor:
        """The values that the weight of a convolution or linear layer takes."""
        if weight.numel() < self.smallest or in_float(node):
            return weight
        if is_stored(node):
            return round_kernels(weight)
        return self.linear(weight) if node.target in LINEARS else self.convolution(weight)


@torch.no_grad()
def correct_bias(
    graph_module: fx.GraphModule,
    rows: NDArray[Any],
    float_layers: int = 0,
    rounding: Rounding | None = None,
    expected: dict[str, Tensor] | None = None,
    ranges: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> int:
    """Give every convolution and linear layer the bias that restores its mean output under rounding, in place.

    rows: calibration inputs, the more the better; they pass through in one batch, cut to what memory allows.
    float_layers: convolutions at the input that stay in float. rounding: that of int8 unless given. expected: layer ->
    mean output per channel to restore, `mean_outputs` of another graph; those of this graph in float unless given.
    ranges: of the values that are rounded; the whole range of `rows` unless given. Returns the number of layers.
    """
    rounding = rounding or Rounding(round_weight, "mixed")
    inputs = _one_batch(rows)
    exempt = float_entirely(stem(graph_module, float_layers))
    rounded = rounded_nodes(graph_module, float_layers) if rounding.inputs in ("mixed", "fixed") else set()
    observed = set(rounded)
    if rounding.inputs == "fixed":
        observed |= {str(node.args[0]) for node in graph_module.graph.nodes if node.target in LINEARS}
    own: dict[str, Tensor] = {}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    _Observed(graph_module, own, observed, seen).run(inputs)
    ranges = seen | (ranges or {})
    corrections: dict[str, Tensor] = {}
    Corrected(graph_module, expected or own, corrections, exempt, ranges, rounded, rounding).run(inputs)
    for node in list(graph_module.graph.nodes):
        if node.name in corrections:
            old = constant(graph_module, node.args[2]) if len(node.args) > 2 else None
            bias = corrections[node.name] + (0.0 if old is None else old)
            set_parameter(graph_module, node, 2, bias, "corrected_bias")
    prune(graph_module)
    return len(corrections)


@torch.no_grad()
def round_weights(graph_module: fx.GraphModule, rounding: Rounding) -> None:
    """Give every convolution and linear layer the weight that a rounding makes of it, in place, as float values."""
    for node in list(graph_module.graph.nodes):
        if _weighted(graph_module, node):
            weight = cast(Tensor, constant(graph_module, node.args[1]))
            how = FLOAT_WEIGHT if in_float(node) else "rounded_weight"
            set_parameter(graph_module, node, 1, rounding.weight(node, weight), how)
    prune(graph_module)


@torch.no_grad()
def mean_outputs(graph_module: fx.GraphModule, rows: NDArray[Any]) -> dict[str, Tensor]:
    """The mean output per channel of every weighted layer, by the layer's name in the graph."""
    means: dict[str, Tensor] = {}
    _Observed(graph_module, means, set(), {}).run(_one_batch(rows))
    return means


def _one_batch(rows: NDArray[Any]) -> Tensor:
    most = max(16, _BATCH_LIMIT // max(1, int(np.prod(rows.shape[1:3]))))
    return torch.from_numpy(np.ascontiguousarray(rows[:most]))


def stem(graph_module: fx.GraphModule, layers: int) -> list[fx.Node]:
    """The first `layers` convolutions of a graph."""
    return [node for node in graph_module.graph.nodes if node.target in CONVOLUTIONS][:layers]


def has_attention(graph_module: fx.GraphModule) -> bool:
    """Whether the tower is a transformer, at least in part."""
    return any(node.target in _ATTENTION for node in graph_module.graph.nodes)


def residual_sums(graph_module: fx.GraphModule, *, every: bool = False) -> list[fx.Node]:
    """The sums that static int8 rounds: of two activations below convolutions. In transformers none, because they
    carry outliers there, and none that `mark_float` has exempted unless `every` is asked for."""
    if has_attention(graph_module):
        return []
    sums = [n for n in graph_module.graph.nodes if n.target in _SUMS and (every or not in_float(n))]
    return [node for node in sums if _is_residual(node)]


def clamp_of(node: fx.Node) -> fx.Node | None:
    """The clamp that alone consumes this node; kernels fuse it, and rounding comes after it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _CLAMPS else None


def rounded_nodes(graph_module: fx.GraphModule, float_layers: int) -> set[str]:
    """Names of the nodes whose values static int8 rounds: what convolutions and residual sums read and write."""
    exempt = stem(graph_module, float_layers)
    convolutions = [n for n in graph_module.graph.nodes if n.target in CONVOLUTIONS and _weighted(graph_module, n)]
    found = set()
    int8 = (n for n in convolutions if n not in exempt and not in_float(n))
    for node in (*int8, *residual_sums(graph_module)):
        inputs = node.args[:1] if node.target in CONVOLUTIONS else node.args[:2]
        found |= {node.name for node in (*cast("tuple[fx.Node, ...]", inputs), clamp_of(node) or node)}
    return found


class _Balance(fx.Interpreter):
    """Finds, for every value that linear layers read, the scale that suits them best."""

    def __init__(self, graph_module: fx.GraphModule, found: dict[fx.Node, tuple[list[fx.Node], Tensor]]) -> None:
        super().__init__(graph_module)
        self.found = found

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        linears = [u for u in n.users if u.target in LINEARS and u.args[0] is n and _weighted(self.module, u)]
        if linears:
            weights = [cast(Tensor, constant(self.module, linear.args[1])) for linear in linears]
            best = _best_scale(output, torch.cat(weights))
            if best is not None:
                self.found[n] = (linears, best[0])
                cast(fx.GraphModule, self.module).meta.setdefault(BALANCE, {})[n.name] = best[1]
        return output


def _best_scale(x: Tensor, weight: Tensor) -> tuple[Tensor, str] | None:
    """s [in] for inputs x [n, ..., in] and a weight [out, in], and which it is; None where balancing gains too little.

    The candidates are made of the even rows and judged on the odd ones: some fit the loudest inputs seen and fail on
    the next.
    """
    seen, judged = x[::2], x[1::2]
    judged = judged[: max(4, _JUDGED // (x[0].numel() // x.shape[-1]))]
    exact = judged @ weight.T

    def error(scale: Tensor) -> float:
        return float((round_rows(judged / scale) @ round_weight(weight * scale).T - exact).square().mean())

    shapes = balancing_scales(seen, weight)
    errors = [error(scale) for scale in shapes]
    best = int(np.argmin(errors))
    limited = [errors[best], *(error(turn_down(seen, shapes[best], limit)) for limit in _LIMITS[1:])]
    if not min(limited) < _BALANCE_GAIN * error(torch.ones(x.shape[-1])):
        return None
    scale = turn_down(x, balancing_scales(x, weight)[best], _LIMITS[int(np.argmin(limited))])
    # only ratios matter to int8; this keeps the largest input as large as it was
    return scale * ((x / scale).abs().max() / x.abs().max()), [*map(str, EXPONENTS), "rms"][best]


def _divide_norm(graph_module: fx.GraphModule, node: fx.Node, scale: Tensor) -> bool:
    """Fold the division into a LayerNorm's weight and bias; False where the node is none."""
    weight = constant(graph_module, node.args[2]) if node.target is _LAYER_NORM and len(node.args) > 2 else None
    if weight is None or weight.shape != scale.shape:
        return False
    bias = constant(graph_module, node.args[3]) if len(node.args) > 3 else None
    set_parameter(graph_module, node, 2, weight / scale, "balanced_norm")
    if bias is not None:
        set_parameter(graph_module, node, 3, bias / scale, "balanced_shift")
    return True


class _Observed(fx.Interpreter):
    """Records the mean output per channel of every weighted layer, and the range of every value to be rounded."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        means: dict[str, Tensor],
        rounded: set[str],
        ranges: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(graph_module)
        self.means = means
        self.rounded = rounded
        self.ranges = ranges

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if _weighted(self.module, n):
            self.means[n.name] = channel_mean(n, output)
        if n.name in self.rounded:
            self.ranges[n.name] = torch.aminmax(output)
        return output


class Corrected(fx.Interpreter):
    """Runs with rounded weights and activations and corrects each layer before the next one sees its output.

    expected: layer -> mean output per channel. found: gets the corrections. exempt: layers left alone. ranges, rounded:
    of the values that get a fixed range, all by names of nodes.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        expected: dict[str, Tensor],
        found: dict[str, Tensor],
        exempt: set[str],
        ranges: dict[str, tuple[Tensor, Tensor]],
        rounded: set[str],
        rounding: Rounding,
    ) -> None:
        super().__init__(graph_module)
        self.exempt = exempt
        self.expected = expected
        self.found = found
        self.ranges = ranges
        self.rounded = rounded
        self.rounding = rounding

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.exempt or not _weighted(self.module, n):
            output = super().run_node(n)
        else:
            (x, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
            linear = n.target in LINEARS
            if in_float(n):
                pass
            elif linear and self.rounding.inputs in ("mixed", "rows"):
                x = round_rows(x)
            elif linear and self.rounding.inputs == "fixed":
                x = round_tensor(x, *self.ranges[str(n.args[0])])
            output = cast(Any, n.target)(x, self.rounding.weight(n, weight), *rest, **kwargs)
            delta = self.correction(n, output)
            output = output + (delta if n.target in LINEARS else delta.reshape(-1, *[1] * (output.ndim - 2)))
        return round_tensor(output, *self.ranges[n.name]) if n.name in self.rounded else output

    def correction(self, n: fx.Node, output: Tensor) -> Tensor:
        """What a layer's output lacks to its expected mean, [channels]."""
        self.found[n.name] = self.expected[n.name] - channel_mean(n, output)
        return self.found[n.name]


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


def _weighted(owner: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (*CONVOLUTIONS, *LINEARS):
        return False
    return isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"


def channel_mean(node: fx.Node, output: Tensor) -> Tensor:
    """The mean of a layer's output over everything but channels."""
    if node.target in LINEARS:
        return output.reshape(-1, output.shape[-1]).mean(dim=0)
    return output.transpose(0, 1).flatten(1).mean(dim=1)


class Prepared:
    """One tower made ready for int8, for every backend.

    fit, held: the calibration inputs to quantize with and to judge with. expected: the float tower's rows for `held`.
    convolutional: it has convolutions beyond those that stay in float. blocks: of the tower that stay in float.
    """

    def __init__(self, module: nn.Module, rows: NDArray[Any], blocks: Collection[str] = ()) -> None:
        self._module, self._rows = module, rows
        self.fit, self.held = split_calibration(rows)
        self.expected = run_module(module, self.held)
        self._balanced = weight_only_graph(module, self.fit, 8, blocks)
        mark_float(self._balanced, blocks)
        balance_linears(self._balanced, self.fit)
        self._convolutions = len(stem(self._balanced, len(self._balanced.graph.nodes)))
        self.convolutional = self._convolutions > STEM_LAYERS
        self.attention = has_attention(self._balanced)
        self._corrected: dict[int, fx.GraphModule] = {}
        self.settings: Any = None  # these two are of `export.static`; settings hold for `keeping` too
        self.static: Any = None

    def keeping(self, blocks: Collection[str]) -> Prepared:
        """The same with these blocks in float (names as in `export.graphs`)."""
        if quantized_tables(self._module, blocks) != quantized_tables(self._module):
            return Prepared(self._module, self._rows, blocks)
        other = copy.copy(self)
        other._balanced, other._corrected, other.static = copy.deepcopy(self._balanced), {}, None
        mark_float(other._balanced, blocks)
        return other

    def balanced(self) -> fx.GraphModule:
        """A copy of the graph before biases are corrected."""
        return copy.deepcopy(self._balanced)

    def graph(self, *, static: bool) -> tuple[fx.GraphModule, int]:
        """A copy of the prepared graph, and how many convolutions at the input its biases expect in float.

        static: with convolutions in int8; else all of them stay in float.
        """
        float_layers = STEM_LAYERS if static else self._convolutions
        if float_layers not in self._corrected:
            graph = copy.deepcopy(self._balanced)
            correct_bias(graph, self.fit, float_layers)
            self._corrected[float_layers] = graph
        return copy.deepcopy(self._corrected[float_layers]), float_layers

    def rounded(self, rounding: Rounding, bits: Literal[4, 8] = 8) -> fx.GraphModule:
        """The graph with biases corrected for a rounding, and with balanced linear layers if it rounds their inputs.

        bits: of the token tables. `STEM_LAYERS` convolutions are expected to stay in float.
        """
        balanced = rounding.inputs != "none" and bits == 8
        graph = copy.deepcopy(self._balanced) if balanced else weight_only_graph(self._module, self.fit, bits)
        correct_bias(graph, self.fit, STEM_LAYERS, rounding, mean_outputs(_plain(self._module, self.fit), self.fit))
        return graph


def prepared(module: nn.Module, rows: NDArray[Any], memo: MutableMapping[nn.Module, Any]) -> Prepared:
    """`Prepared`, made once for the same module with the same weights. memo: lives and dies with `rows`."""
    digest = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    known, found = memo.get(module, (None, None))
    if known != digest.digest():
        found = Prepared(module, rows)
        memo[module] = (digest.digest(), found)
    return cast(Prepared, found)
