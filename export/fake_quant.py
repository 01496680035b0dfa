"""A prepared tower that rounds as its int8 (or 4-bit) file does, and that gradients pass through.

What rounds to integers has no useful gradient. A weight's rounding is passed through as if it were not there (the
straight-through estimator: Bengio, Léonard and Courville 2013, arXiv:1308.3432), at the places where integer files
round (Jacob et al. 2018, arXiv:1712.05877). The step of each activation with a fixed range is learnt: its gradient is
that of LSQ (Esser et al. 2020, arXiv:1902.08153). Ours: the step's logarithm is what is learnt, so that one rate fits
all of them; zero points stay those of the range seen first; a range behind a clamp never grows beyond the clamp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketvlm.export.prepare import CONVOLUTIONS, LINEARS, Rounding, stem
from pocketvlm.export.rounding import round_rows, round_weight
from pocketvlm.export.stems import float_entirely

LEVELS = 255
_aten = torch.ops.aten
_BOUNDED = (_aten.hardtanh.default, _aten.hardtanh_.default)


@dataclass(frozen=True)
class Step:
    """An activation's grid: scale * (q - zero) for q of 0..255 (as int8: q - 128 and zero - 128)."""

    scale: float
    zero: int


# what int8 rounds
INT8 = Rounding(round_weight, "mixed")


class _Through(torch.autograd.Function):
    """The rounded values forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return outer, None


class _Grid(torch.autograd.Function):
    """x on the grid of `Step`. Gradients: to x where it is on the grid's reach; to the scale, LSQ's equation 3, times
    1 / sqrt(255 N) of its section 2.2, N the elements of one row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: int) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.zero = zero
        return (x / scale).round_().clamp_(-zero, LEVELS - zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        low, high = -ctx.zero, LEVELS - ctx.zero
        exact = x / scale
        inside = (exact >= low) & (exact <= high)
        slope = exact.round().clamp_(low, high).sub_(exact.mul_(inside))
        balance = (LEVELS * max(1, x[0].numel())) ** -0.5
        return outer * inside, (outer * slope).sum() * balance, None


class FakeQuantized(nn.Module):
    """A prepared graph, run with the rounding of a precision at every place where its files round.

    steps: grids of the activations that are rounded in fixed ranges, by node. float_layers: convolutions at the input
    that stay in float. Its parameters are the graph's own, which training changes, and the grids' scales.
    """

    def __init__(
        self, graph: fx.GraphModule, steps: Mapping[str, Step], float_layers: int, rounding: Rounding | None = None
    ) -> None:
        super().__init__()
        self.graph_module, self.float_layers, self.rounding = graph, float_layers, rounding or INT8
        self._exempt = float_entirely(stem(graph, float_layers))
        self.zeros = {name: step.zero for name, step in steps.items()}
        self.log_scales = nn.ParameterDict(
            {name: nn.Parameter(torch.tensor(step.scale, dtype=torch.float64).log()) for name, step in steps.items()}
        )
        # the file's convolution clamps by its range alone
        ceilings = {node.name: _ceiling(node) for node in graph.graph.nodes if node.name in steps}
        self._bounds = {name: math.log(ceiling / LEVELS) for name, ceiling in ceilings.items() if ceiling}

    def forward(self, rows: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] or int32 [B, L] -> float32 [B, D], as the file gives it at batch 1."""
        found: Tensor = _Rounds(self).run(rows)
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.graph_module.parameters()).device

    def weights(self) -> dict[str, nn.Parameter]:
        """The float parameters that layers read: weights, biases, norms. Token tables are integers already."""
        return {name: value for name, value in self.graph_module.named_parameters() if value.is_floating_point()}

    def coarse_weights(self) -> set[str]:
        """Names of the weights, among the graph's parameters, that the files hold in fewer than 8 bits."""
        if self.rounding.linear is round_weight:
            return set()
        nodes = self.graph_module.graph.nodes
        return {str(node.args[1].target) for node in nodes if node.target in LINEARS and self.rounds_weight(node)}

    @torch.no_grad()
    def keep_within(self) -> None:
        """Draw back ranges that grew beyond their clamp."""
        for name, bound in self._bounds.items():
            self.log_scales[name].clamp_(max=bound)

    def steps(self) -> dict[str, Step]:
        """Node -> grid of its value, for the files."""
        return {name: Step(float(self._scale(name).detach()), zero) for name, zero in self.zeros.items()}

    def _scale(self, name: str) -> Tensor:
        return self.log_scales[name].exp().float()

    def rounds_weight(self, node: fx.Node) -> bool:
        """Whether the file has integers for this layer's weight."""
        return (
            node.name not in self._exempt
            and node.target in (*CONVOLUTIONS, *LINEARS)
            and isinstance(node.args[1], fx.Node)
            and node.args[1].op == "get_attr"
        )

    def grid(self, name: str, value: Tensor) -> Tensor:
        """A value on the grid of its node; the value itself where the node is not rounded."""
        if name not in self.zeros:
            return value
        found: Tensor = _Grid.apply(value, self._scale(name), self.zeros[name])
        return found

    @torch.no_grad()
    def frozen(self) -> fx.GraphModule:
        """The graph with the very weights that the files hold, as float values: each backend's own rounding of them is
        exact. It is the module's own graph; the module is done with."""
        for node in self.graph_module.graph.nodes:
            if self.rounds_weight(node):
                weight = self.graph_module.get_parameter(str(node.args[1].target))
                weight.copy_(self.rounding.weight(node, weight))
        self.graph_module.requires_grad_(False)
        return self.graph_module


def _ceiling(node: fx.Node) -> float:
    """The upper end of a bounded clamp; 0 for anything else."""
    return float(node.args[2]) if node.target in _BOUNDED and len(node.args) > 2 else 0.0  # type: ignore[arg-type]


class _Rounds(fx.Interpreter):
    def __init__(self, fake: FakeQuantized) -> None:
        super().__init__(fake.graph_module)
        self.fake = fake

    def run_node(self, n: fx.Node) -> Any:
        if self.fake.rounds_weight(n):
            (x, weight, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
            if n.target in LINEARS and self.fake.rounding.inputs in ("mixed", "rows"):
                x = _Through.apply(x, round_rows(x.detach()))
            weight = _Through.apply(weight, self.fake.rounding.weight(n, weight.detach()))
            output = n.target(x, weight, *rest, **kwargs)  # type: ignore[operator]
        else:
            output = super().run_node(n)
        return self.fake.grid(n.name, output) if isinstance(output, Tensor) else output

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if "device" in kwargs:  # as it was traced: the processor
            kwargs = {**kwargs, "device": self.fake.device}
        # what is kept for the backward pass must not be written over
        return super().call_function(_out_of_place(target), args, kwargs)


def _out_of_place(target: Any) -> Any:
    name, _, overload = str(target).removeprefix("aten.").partition(".")
    if not str(target).startswith("aten.") or not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(_aten, name[:-1], None)
    return getattr(packet, overload, target) if packet is not None else target
