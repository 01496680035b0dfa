"""What every int8 backend needs done to a tower first: an int8 token table, folded batch norm, balanced linear layers,
corrected biases.

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
from collections.abc import MutableMapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.export.fidelity import run_module, split_calibration

# weights are rounded to -127..127 per output channel, as onnxruntime and XNNPACK do it
_WEIGHT_MAX = 127
# steps between the ends of an activation's range
_STEPS = 255
# below this many rows a table is positions, not tokens: it costs nothing and every token would suffer
_TABLE_ROWS = 256

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

# exponents a of s_j = max|x_j|^a / max|W_:j|^(1-a) that are tried for each layer, and by how much the loudest channels
# of the best candidate are turned down further (a few channels with huge values are usual in transformers)
_EXPONENTS = (0.25, 0.5, 0.75)
_LIMITS = (1.0, 2.0, 4.0, 8.0)
# vectors (tokens, pictures) that candidates are judged by
_JUDGED = 1024
# a channel this much quieter than the loudest counts as that loud: it may be silent on calibration data only
_QUIET = 1e-3
# how far the error must fall for a balance to be worth one more operator
_BALANCE_GAIN = 0.8


class Int8Embedding(nn.Module):
    """A token table in int8 with one scale per row; a quarter of the bytes, lookups by plain gather and multiply.

    Backends leave `nn.Embedding` in float32 when they quantize, and it is the largest part of a small text tower.
    Written out of basic operators, so that it needs no quantized kernel on any device.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scale = weight.detach().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _WEIGHT_MAX
        self.register_buffer("table", torch.round(weight.detach() / scale).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = self.table.index_select(0, flat).to(self.scale.dtype) * self.scale.index_select(0, flat)
        return rows.reshape(*ids.shape, self.table.shape[1])


def quantize_tables(module: nn.Module) -> nn.Module:
    """A copy whose token tables are `Int8Embedding`; small tables (positions) stay as they are."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding) and child.num_embeddings >= _TABLE_ROWS:
                setattr(parent, name, Int8Embedding(child.weight))
    return module


def capture(module: nn.Module, rows: NDArray[Any]) -> fx.GraphModule:
    """The tower as a graph of ATen operators with a free batch size. rows: at least two example inputs."""
    example = torch.from_numpy(np.ascontiguousarray(np.resize(rows, (2, *rows.shape[1:]))))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    return cast(fx.GraphModule, program.module(check_guards=False))


def fold_batchnorm(graph_module: fx.GraphModule) -> int:
    """Fold every batch norm that follows a convolution into it, in place; returns how many were folded."""
    folded = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not _aten.batch_norm.default:
            continue
        conv = node.args[0]
        if conv.target not in CONVOLUTIONS or len(conv.users) != 1:
            continue
        gamma, beta, mean, variance = (_constant(graph_module, argument) for argument in node.args[1:5])
        weight = _constant(graph_module, conv.args[1])
        bias = _constant(graph_module, conv.args[2]) if len(conv.args) > 2 else None
        if weight is None or mean is None or variance is None:
            continue
        # in float64, or the rounding of each fold would show against the float32 budget
        factor = (variance.double() + node.args[7]).rsqrt() * (1.0 if gamma is None else gamma.double())
        shift = (0.0 if bias is None else bias.double()) - mean.double()
        new_bias = shift * factor + (0.0 if beta is None else beta.double())
        new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        _set_parameter(graph_module, conv, 1, new_weight.to(weight.dtype), "folded_weight")
        _set_parameter(graph_module, conv, 2, new_bias.to(weight.dtype), "folded_bias")
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
    LayerNorm before them where nothing else reads that, else it becomes one multiplication.

    Returns:
        The number of inputs that were balanced.
    """
    found: dict[fx.Node, tuple[list[fx.Node], Tensor]] = {}
    _Balance(graph_module, found).run(_one_batch(rows))
    for node, (linears, scale) in found.items():
        for linear in linears:
            weight = _constant(graph_module, linear.args[1])
            assert weight is not None
            _set_parameter(graph_module, linear, 1, weight * scale, "balanced_weight")
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


@torch.no_grad()
def correct_bias(graph_module: fx.GraphModule, rows: NDArray[Any], float_layers: int = 0) -> int:
    """Give every convolution and linear layer the bias that restores its mean output under int8, in place.

    rows: calibration inputs, the more the better; they pass through in one batch, cut to what memory allows.
    float_layers: convolutions at the input that stay in float.

    Returns:
        The number of layers corrected.
    """
    inputs = _one_batch(rows)
    exempt = {node.name for node in stem(graph_module, float_layers)}
    rounded = _rounded(graph_module, float_layers)
    expected: dict[str, Tensor] = {}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}
    _Observed(graph_module, expected, rounded, ranges).run(inputs)
    corrections: dict[str, Tensor] = {}
    _Corrected(graph_module, expected, corrections, exempt, ranges).run(inputs)
    for node in list(graph_module.graph.nodes):
        if node.name in corrections:
            old = _constant(graph_module, node.args[2]) if len(node.args) > 2 else None
            bias = corrections[node.name] + (0.0 if old is None else old)
            _set_parameter(graph_module, node, 2, bias, "corrected_bias")
    prune(graph_module)
    return len(corrections)


def _one_batch(rows: NDArray[Any]) -> Tensor:
    most = max(16, _BATCH_LIMIT // max(1, int(np.prod(rows.shape[1:3]))))
    return torch.from_numpy(np.ascontiguousarray(rows[:most]))


def stem(graph_module: fx.GraphModule, layers: int) -> list[fx.Node]:
    """The first `layers` convolutions of a graph."""
    return [node for node in graph_module.graph.nodes if node.target in CONVOLUTIONS][:layers]


def round_weight(weight: Tensor) -> Tensor:
    """The values that a weight [out, ...] takes after symmetric int8 rounding per output channel."""
    flat = weight.flatten(1)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _WEIGHT_MAX
    return (torch.round(flat / scale) * scale).reshape(weight.shape)


def round_tensor(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The values that activations take after affine 8-bit rounding of [low, high], of which zero is always part."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / _STEPS).clamp(min=1e-12)
    zero = torch.round(-low / scale)
    return (x / scale).round_().add_(zero).clamp_(0, _STEPS).sub_(zero).mul_(scale)


def round_rows(x: Tensor) -> Tensor:
    """`round_tensor` with a range for each row of the batch, as dynamic quantization has it at batch 1."""
    axes = list(range(1, x.ndim))
    return round_tensor(x, x.amin(dim=axes, keepdim=True), x.amax(dim=axes, keepdim=True))


def has_attention(graph_module: fx.GraphModule) -> bool:
    """Whether the tower is a transformer, at least in part."""
    return any(node.target in _ATTENTION for node in graph_module.graph.nodes)


def residual_sums(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The sums that static int8 rounds: of two activations below convolutions. In transformers none, because they
    carry outliers there."""
    if has_attention(graph_module):
        return []
    return [node for node in graph_module.graph.nodes if node.target in _SUMS and _is_residual(node)]


def clamp_of(node: fx.Node) -> fx.Node | None:
    """The clamp that alone consumes this node; kernels fuse it, and rounding comes after it."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target in _CLAMPS else None


def _rounded(graph_module: fx.GraphModule, float_layers: int) -> set[str]:
    """Names of the nodes whose values static int8 rounds: what convolutions and residual sums read and write."""
    exempt = stem(graph_module, float_layers)
    convolutions = [n for n in graph_module.graph.nodes if n.target in CONVOLUTIONS and _weighted(graph_module, n)]
    found = set()
    for node in (*(n for n in convolutions if n not in exempt), *residual_sums(graph_module)):
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
            weights = [cast(Tensor, _constant(self.module, linear.args[1])) for linear in linears]
            scale = _best_scale(output, torch.cat(weights))
            if scale is not None:
                self.found[n] = (linears, scale)
        return output


def _best_scale(x: Tensor, weight: Tensor) -> Tensor | None:
    """s [in] for inputs x [n, ..., in] and a weight [out, in]; None where balancing gains too little.

    The candidates are made of the even rows and judged on the odd ones: some fit the loudest inputs seen and fail on
    the next.
    """
    seen, judged = x[::2], x[1::2]
    judged = judged[: max(4, _JUDGED // (x[0].numel() // x.shape[-1]))]
    exact = judged @ weight.T

    def error(scale: Tensor) -> float:
        return float((round_rows(judged / scale) @ round_weight(weight * scale).T - exact).square().mean())

    shapes = _scales(seen, weight)
    errors = [error(scale) for scale in shapes]
    best = int(np.argmin(errors))
    limited = [errors[best], *(error(_turn_down(seen, shapes[best], limit)) for limit in _LIMITS[1:])]
    if not min(limited) < _BALANCE_GAIN * error(torch.ones(x.shape[-1])):
        return None
    scale = _turn_down(x, _scales(x, weight)[best], _LIMITS[int(np.argmin(limited))])
    # only ratios matter to int8; this keeps the largest input as large as it was
    return scale * ((x / scale).abs().max() / x.abs().max())


def _scales(x: Tensor, weight: Tensor) -> list[Tensor]:
    """SmoothQuant's s for each exponent, then the one with the least sum of both rounding errors where no channel is
    loud: s_j = sqrt(rms x_j / rms W_:j)."""
    x = x.flatten(0, -2)
    loud, reach = _not_quiet(x.abs().amax(dim=0)), _not_quiet(weight.abs().amax(dim=0))
    power, gain = (_not_quiet(value.square().mean(dim=0).sqrt()) for value in (x, weight))
    return [*(loud**a / reach ** (1 - a) for a in _EXPONENTS), (power / gain).sqrt()]


def _turn_down(x: Tensor, scale: Tensor, limit: float) -> Tensor:
    """`scale` raised where max|x_j| / s_j is above 1 / `limit` of the largest."""
    left = _not_quiet(x.flatten(0, -2).abs().amax(dim=0)) / scale
    return scale * (left / left.max() * limit).clamp(min=1.0)


def _not_quiet(loudness: Tensor) -> Tensor:
    return loudness.clamp(min=max(float(loudness.max()) * _QUIET, 1e-12))


def _divide_norm(graph_module: fx.GraphModule, node: fx.Node, scale: Tensor) -> bool:
    """Fold the division into a LayerNorm's weight and bias; False where the node is none."""
    weight = _constant(graph_module, node.args[2]) if node.target is _LAYER_NORM and len(node.args) > 2 else None
    if weight is None or weight.shape != scale.shape:
        return False
    bias = _constant(graph_module, node.args[3]) if len(node.args) > 3 else None
    _set_parameter(graph_module, node, 2, weight / scale, "balanced_norm")
    if bias is not None:
        _set_parameter(graph_module, node, 3, bias / scale, "balanced_shift")
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
            self.means[n.name] = _channel_mean(n, output)
        if n.name in self.rounded:
            self.ranges[n.name] = torch.aminmax(output)
        return output


class _Corrected(fx.Interpreter):
    """Runs with rounded weights and activations and corrects each layer before the next one sees its output."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        expected: dict[str, Tensor],
        found: dict[str, Tensor],
        exempt: set[str],
        ranges: dict[str, tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(graph_module)
        self.exempt = exempt
        self.expected = expected
        self.found = found
        self.ranges = ranges

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.exempt or not _weighted(self.module, n):
            output = super().run_node(n)
        else:
            (x, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
            x = round_rows(x) if n.target in LINEARS else x
            output = cast(Any, n.target)(x, round_weight(weight), *rest, **kwargs)
            delta = self.expected[n.name] - _channel_mean(n, output)
            self.found[n.name] = delta
            output = output + (delta if n.target in LINEARS else delta.reshape(-1, *[1] * (output.ndim - 2)))
        return round_tensor(output, *self.ranges[n.name]) if n.name in self.ranges else output


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


def _channel_mean(node: fx.Node, output: Tensor) -> Tensor:
    if node.target in LINEARS:
        return output.reshape(-1, output.shape[-1]).mean(dim=0)
    return output.transpose(0, 1).flatten(1).mean(dim=1)


def _constant(owner: nn.Module, argument: Any) -> Tensor | None:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    value: Any = owner
    for part in str(argument.target).split("."):
        value = getattr(value, part)
    return value.detach()


def _set_parameter(graph_module: fx.GraphModule, node: fx.Node, position: int, value: Tensor, stem: str) -> None:
    """Make argument `position` of `node` a new parameter, so that a weight shared with another node stays as it is."""
    name = f"{stem}_{node.name}"
    graph_module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    with graph_module.graph.inserting_before(node):
        attribute = graph_module.graph.get_attr(name)
    attribute.meta["val"] = value
    arguments = list(node.args)
    while len(arguments) <= position:
        arguments.append(None)
    arguments[position] = attribute
    node.args = tuple(arguments)


def prune(graph_module: fx.GraphModule) -> None:
    """Drop operators, parameters and buffers that the output does not depend on, in place.

    ExecuTorch writes every parameter of the module it is given, so a projector left over from training would ship.
    """
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*graph_module.named_parameters(), *graph_module.named_buffers()]:
        if name not in used:
            owner: Any = graph_module
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            delattr(owner, last)
    graph_module.recompile()


class Prepared:
    """One tower made ready for int8, for every backend.

    fit, held: the calibration inputs to quantize with and to judge with. expected: the float tower's rows for `held`.
    convolutional: it has convolutions beyond those that stay in float.
    """

    def __init__(self, module: nn.Module, rows: NDArray[Any]) -> None:
        self.fit, self.held = split_calibration(rows)
        self.expected = run_module(module, self.held)
        self._balanced = capture(quantize_tables(module), self.fit)
        fold_batchnorm(self._balanced)
        balance_linears(self._balanced, self.fit)
        self._convolutions = len(stem(self._balanced, len(self._balanced.graph.nodes)))
        self.convolutional = self._convolutions > STEM_LAYERS
        self.attention = has_attention(self._balanced)
        self._corrected: dict[int, fx.GraphModule] = {}

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
