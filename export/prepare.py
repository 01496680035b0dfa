"""What every int8 backend needs done to a tower first: folded batch norm, corrected biases, an int8 token table.

Rounding the weights of a convolution shifts the mean of its output, and such shifts add up over depth. They are
measured on calibration data and taken back through the bias, layer by layer (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2; here with measured means). On
EfficientNet-Lite0 with its ImageNet weights this turns a cosine of .990 (1st percentile .973) into .998 (.993).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

# weights are rounded to -127..127 per output channel, as onnxruntime and XNNPACK do it
_WEIGHT_MAX = 127
# below this many rows a table is positions, not tokens: it costs nothing and every token would suffer
_TABLE_ROWS = 256

# floors for int8 on real data (shared with the parity check), and what a few dozen held-out rows must show for a
# scheme to be taken without a look at the next one: their 1st percentile is little more than their worst row, and on
# EfficientNet-Lite0 .993 of 48 rows went with .977 of 400
FLOOR_MEAN, FLOOR_P1 = 0.99, 0.98
_COMFORT_MEAN, _COMFORT_P1 = 0.997, 0.995

# convolutions at the input that the second static scheme leaves in float: a thousandth of the weights, and where
# rounding hurts most (their few channels carry everything that follows)
STEM_LAYERS = 2
# pixels (or ids) that pass through the float graph in one batch while biases are corrected; bounds memory
_CORRECTION_LIMIT = 192 * 128 * 128

_aten = torch.ops.aten
CONVOLUTIONS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.conv1d.default)
LINEARS = (_aten.linear.default,)


@dataclass(frozen=True)
class Fidelity:
    """Cosine of int8 against float32 rows on pictures or texts that were not used for calibration."""

    mean: float
    p1: float
    minimum: float
    cases: int

    @property
    def comfortable(self) -> bool:
        """Far enough above the floors that no other scheme needs to be tried."""
        return self.mean >= _COMFORT_MEAN and self.p1 >= _COMFORT_P1

    @property
    def meets_floor(self) -> bool:
        return self.mean >= FLOOR_MEAN and self.p1 >= FLOOR_P1

    def notes(self) -> dict[str, object]:
        """For `Variant.notes`; `meets_floor` is False where the parity check must be expected to fail."""
        return {
            "held_out_cosine_mean": round(self.mean, 6),
            "held_out_cosine_p1": round(self.p1, 6),
            "held_out_cases": self.cases,
            "meets_floor": self.meets_floor,
        }


def fidelity(found: NDArray[Any], expected: NDArray[Any]) -> Fidelity:
    """Row-wise cosine of two [n, D] arrays; a row that is not finite counts as -1."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    cosine = np.where(np.isfinite(cosine), cosine, -1.0)
    return Fidelity(float(cosine.mean()), float(np.percentile(cosine, 1)), float(cosine.min()), len(cosine))


T = TypeVar("T")


@dataclass(frozen=True)
class Scheme(Generic[T]):
    """A way to quantize. make: builds the candidate. last_resort: only for when nothing else meets the floor, because
    it leaves much of the tower in float (or, for transformers, rarely helps)."""

    name: str
    make: Callable[[], T]
    last_resort: bool = False


def choose_scheme(
    schemes: Sequence[Scheme[T]], run: Callable[[T], NDArray[Any]], expected: NDArray[Any]
) -> tuple[T, Scheme[T], dict[str, object]]:
    """Try schemes in order until one is comfortably faithful; else take the one with the best 1st percentile.

    run: the candidate's rows for the held-out inputs. expected: the float rows.

    Returns:
        The candidate, its scheme, and notes for `Variant.notes`.
    """
    tried: list[tuple[Fidelity, Scheme[T], T]] = []
    for scheme in schemes:
        if scheme.last_resort and any(result.meets_floor for result, _, _ in tried):
            continue
        candidate = scheme.make()
        result = fidelity(run(candidate), expected)
        tried.append((result, scheme, candidate))
        if result.comfortable:
            break
    result, scheme, candidate = max(tried, key=lambda entry: (entry[0].comfortable, entry[0].p1))
    notes = {"scheme": scheme.name, **result.notes(), "tried": [entry.name for _, entry, _ in tried]}
    return candidate, scheme, notes


def split_calibration(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Three quarters to calibrate with, one quarter (at least one row) to judge the result on."""
    held = np.arange(len(rows)) % 4 == 3
    if not held.any():
        return rows, rows
    return rows[~held], rows[held]


@torch.no_grad()
def run_module(module: Callable[[Tensor], Tensor], rows: NDArray[Any], batch: int = 32) -> NDArray[np.float32]:
    """Eager forward over [n, ...] rows in batches; float32 [n, D]."""
    parts = [module(torch.from_numpy(rows[i : i + batch])) for i in range(0, len(rows), batch)]
    return torch.cat(parts).float().numpy()


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
def correct_bias(graph_module: fx.GraphModule, rows: NDArray[Any], float_layers: int = 0) -> int:
    """Give every convolution and linear layer the bias that restores its mean output under int8 weights, in place.

    rows: calibration inputs, the more the better; they pass through in one batch, cut to what memory allows.
    float_layers: convolutions at the input whose weights stay in float.

    Returns:
        The number of layers corrected.
    """
    most = max(16, _CORRECTION_LIMIT // max(1, int(np.prod(rows.shape[1:3]))))
    inputs = torch.from_numpy(np.ascontiguousarray(rows[:most]))
    exempt = {node.name for node in stem(graph_module, float_layers)}
    expected: dict[str, Tensor] = {}
    _Means(graph_module, expected).run(inputs)
    corrections: dict[str, Tensor] = {}
    _Corrected(graph_module, expected, corrections, exempt).run(inputs)
    for node in list(graph_module.graph.nodes):
        if node.name in corrections:
            old = _constant(graph_module, node.args[2]) if len(node.args) > 2 else None
            bias = corrections[node.name] + (0.0 if old is None else old)
            _set_parameter(graph_module, node, 2, bias, "corrected_bias")
    prune(graph_module)
    return len(corrections)


def stem(graph_module: fx.GraphModule, layers: int) -> list[fx.Node]:
    """The first `layers` convolutions of a graph."""
    return [node for node in graph_module.graph.nodes if node.target in CONVOLUTIONS][:layers]


def round_weight(weight: Tensor) -> Tensor:
    """The values that a weight [out, ...] takes after symmetric int8 rounding per output channel."""
    flat = weight.flatten(1)
    scale = flat.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _WEIGHT_MAX
    return (torch.round(flat / scale) * scale).reshape(weight.shape)


class _Means(fx.Interpreter):
    """Records the mean output per channel of every weighted layer."""

    def __init__(self, graph_module: fx.GraphModule, means: dict[str, Tensor]) -> None:
        super().__init__(graph_module)
        self.means = means

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if _weighted(self.module, n):
            self.means[n.name] = _channel_mean(n, output)
        return output


class _Corrected(fx.Interpreter):
    """Runs with rounded weights and corrects each layer before the next one sees its output."""

    def __init__(
        self, graph_module: fx.GraphModule, expected: dict[str, Tensor], found: dict[str, Tensor], exempt: set[str]
    ) -> None:
        super().__init__(graph_module)
        self.exempt = exempt
        self.expected = expected
        self.found = found

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.exempt or not _weighted(self.module, n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        output = cast(Any, n.target)(args[0], round_weight(args[1]), *args[2:], **kwargs)
        delta = self.expected[n.name] - _channel_mean(n, output)
        self.found[n.name] = delta
        return output + (delta if n.target in LINEARS else delta.reshape(-1, *[1] * (output.ndim - 2)))


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
