"""What each block of a student loses when it alone is quantized: on the task, on the embeddings, and what it weighs.

The rounding is the one that ships (`export.prepare`: int8 weights per output channel, ranges, corrected biases); all
other blocks stay in float. Nothing is exported, and what lies before a block is computed once for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.export.compare import drift
from pocketvlm.export.equalize import equalize, loudness, tied_values
from pocketvlm.export.fidelity import run_module
from pocketvlm.export.graphs import block_name, blocks_of, keep_all_but, path_of
from pocketvlm.export.prepare import (
    CONVOLUTIONS,
    LINEARS,
    STEM_LAYERS,
    Corrected,
    Prepared,
    Rounding,
    channel_mean,
    rounded_nodes,
    stem,
)
from pocketvlm.export.ranges import reach_of
from pocketvlm.export.rounding import round_weight
from pocketvlm.export.static import static_tower
from pocketvlm.export.token_tables import quantize_tables, quantized_tables
from pocketvlm.export.validation import Validation, changes, margins, ranks

# pictures (or texts) whose every inner value is held at once
_BATCH = 16
# calibration inputs that an alone block's biases are corrected with
_FIT = 48
_INT8 = Rounding(round_weight, "mixed")
_END = "embedding of the graph"

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Damage:
    """One block, quantized alone.

    weights: how many it has. extra_bytes: what a file grows by when it stays in float. macs: multiplications for one
    input (0 for a token table). lost, gained: queries of both directions whose hit at 5 went or came; r5_loss: their
    difference as a share, r5_bound and r5_floor: its one-sided 95 % bounds. margin_drop: mean loss of the margin to the
    fifth place (`validation.margins`); margin_noise: root mean square of its change. one_minus_cosine (mean), sqnr_db:
    of the tower's embeddings.
    """

    tower: str
    block: str
    weights: int
    extra_bytes: int
    macs: int
    lost: int
    gained: int
    r5_loss: float
    r5_bound: float
    r5_floor: float
    margin_drop: float
    margin_noise: float
    one_minus_cosine: float
    sqnr_db: float

    @property
    def name(self) -> str:
        """ "image blocks.3"."""
        return f"{self.tower} {self.block}"

    @property
    def per_byte(self) -> float:
        """What a byte spent on it takes from the task's noise: margin_noise squared (independent errors add in
        squares) over the extra bytes."""
        return self.margin_noise**2 / max(1, self.extra_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without tower and block."""
        numbers = {key: value for key, value in asdict(self).items() if key not in ("tower", "block")}
        return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}


def measure_blocks(
    towers: Mapping[str, tuple[nn.Module, Prepared]],
    validation: Validation,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Damage]:
    """Every block of both towers, by `Damage.per_byte`, most first.

    towers: "image" and "text" -> the float tower, and what `export.prepare` made of it. Convolutions at the
    input that are in float in int8 files too are no block here.
    """
    exact = {tower: run_module(module, validation.rows(tower)) for tower, (module, _) in towers.items()}
    found = []
    for tower, (module, ready) in towers.items():
        progress(f"quantizing each block of the {tower} tower alone")
        for block, weights, macs, base, rows in alone(module, ready, validation.rows(tower), exact[tower]):
            before, after = ({**exact, tower: each} for each in (base, rows))
            change = changes(*(ranks(both["image"], both["text"], validation) for both in (before, after)))[5]
            one, other = (margins(both["image"], both["text"], validation) for both in (before, after))
            error = drift(base, rows)
            found.append(
                Damage(
                    tower, block, weights, 3 * weights, macs, change.lost, change.gained, change.loss, change.bound,
                    change.floor, float((one - other).mean()), float(np.sqrt(np.square(one - other).mean())),
                    error.one_minus_cosine_mean, error.sqnr_db,
                )
            )  # fmt: skip
    return sorted(found, key=lambda one: -one.per_byte)


@torch.no_grad()
def alone(
    module: nn.Module, ready: Prepared, rows: NDArray[Any], exact: Rows
) -> Iterator[tuple[str, int, int, Rows, Rows]]:
    """Each block, its weights, multiplications for one input, and embeddings of `rows` without and with it in int8.

    exact: the float tower's. Token tables come first; for the other blocks they are in int8 already, on both sides.
    """
    tables = quantized_tables(module)
    for path in tables:
        table = module.get_submodule(path).weight
        assert isinstance(table, Tensor)
        rounded = quantize_tables(module, 8, [block_name(other) for other in tables if other != path])
        yield block_name(path), table.numel(), 0, exact, run_module(rounded, rows)
    graph, fixed, first = ready.balanced(), {}, STEM_LAYERS
    if ready.convolutional:
        chosen = static_tower(ready)
        first = chosen.settings.stem
        fixed = {name: reach_of(step) for name, step in chosen.steps.items()}
        if chosen.settings.alpha is not None:
            equalize(graph, loudness(graph, ready.fit, tied_values(graph)), chosen.settings.alpha)
    graph = _without_writing(graph)
    exempt = stem(graph, first) if ready.convolutional else []
    layers = [node for node in graph.graph.nodes if _is_layer(node) and node not in exempt and path_of(node)]
    blocks: dict[str, list[fx.Node]] = {}
    for node, block in zip(layers, blocks_of([path_of(node) for node in layers])):
        blocks.setdefault(block, []).append(node)
    fit = _everything(graph, ready.fit[:_FIT])
    costs = {block: _cost(nodes, fit) for block, nodes in blocks.items()}
    parts = {
        block: _Alone(graph, block, {node.name for node in nodes}, fit, fixed, first) for block, nodes in blocks.items()
    }
    del fit
    base: list[Tensor] = []
    outputs: dict[str, list[Tensor]] = {block: [] for block in blocks}
    for start in range(0, len(rows), _BATCH):
        values = _everything(graph, rows[start : start + _BATCH])
        base.append(values[_END])
        for block, part in parts.items():
            outputs[block].append(part(values))
    for block, found in outputs.items():
        yield block, *costs[block], torch.cat(base).numpy(), torch.cat(found).numpy()


class _Alone(Corrected):
    """A graph with one block rounded, run from the float values of everything before it.

    layers: names of the block's. fit: float values of calibration inputs (`_everything`), which its biases are
    corrected with. fixed: the files' ranges. first: so many convolutions at the input are in float.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        block: str,
        layers: set[str],
        fit: dict[str, Any],
        fixed: Mapping[str, tuple[float, float]],
        first: int,
    ) -> None:
        # shares every weight with the others
        own = fx.GraphModule(graph, copy.deepcopy(graph.graph))
        keep_all_but(own, block)
        rounded = rounded_nodes(own, first)
        ends: dict[str, tuple[Tensor, Tensor]] = {}
        for name in rounded:
            low, high = fixed.get(name) or torch.aminmax(fit[name])
            ends[name] = torch.as_tensor(low), torch.as_tensor(high)
        nodes = list(own.graph.nodes)
        means = {node.name: channel_mean(node, fit[node.name]) for node in nodes if node.name in layers}
        exempt = {node.name for node in nodes if _is_layer(node)} - layers
        super().__init__(own, means, {}, exempt, ends, rounded, _INT8)
        touched = layers | rounded
        for node in nodes:
            if touched & {other.name for other in node.all_input_nodes}:
                touched.add(node.name)
        self.rest = [node for node in nodes if node.name not in touched]
        self.touched = [node for node in nodes if node.name in touched and node.op != "output"]
        self.end = _end(own)
        self.fitting = True
        self(fit)
        self.fitting = False

    def correction(self, n: fx.Node, output: Tensor) -> Tensor:
        return super().correction(n, output) if self.fitting else self.found[n.name]

    def __call__(self, values: dict[str, Any]) -> Tensor:
        """The embeddings, given the float values of every operator."""
        self.env = {node: values[node.name] for node in self.rest if node.name in values}
        for node in self.touched:
            self.env[node] = self.run_node(node)
        found: Tensor = self.env.get(self.end, values[_END])
        return found


def _everything(graph: fx.GraphModule, rows: NDArray[Any]) -> dict[str, Any]:
    """The value of every operator in float, by name; the embeddings as `_END`."""
    walk = fx.Interpreter(graph, garbage_collect_values=False)
    walk.run(torch.from_numpy(np.ascontiguousarray(rows)))
    return {node.name: value for node, value in walk.env.items()} | {_END: walk.env[_end(graph)]}


def _end(graph: fx.GraphModule) -> fx.Node:
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    return output.all_input_nodes[0]


def _without_writing(graph: fx.GraphModule) -> fx.GraphModule:
    """Operators that write over their input become those that do not, in place: values are used more than once."""
    for node in graph.graph.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if node.op == "call_function" and name.endswith("_") and not name.endswith("__"):
            packet = getattr(torch.ops.aten, name.removeprefix("aten::").rstrip("_"))
            node.target = getattr(packet, node.target._overloadname)
    graph.recompile()
    return graph


def _is_layer(node: fx.Node) -> bool:
    """Whether it is a convolution or linear layer with a weight of its own."""
    if node.target not in (*CONVOLUTIONS, *LINEARS):
        return False
    return isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"


def _cost(layers: list[fx.Node], values: dict[str, Any]) -> tuple[int, int]:
    """Weights, and multiplications for one input."""
    weights = [values[str(node.args[1])] for node in layers]
    outputs = [values[node.name] for node in layers]
    macs = sum(out[0].numel() * weight.numel() // weight.shape[0] for out, weight in zip(outputs, weights))
    return sum(weight.numel() for weight in weights), macs
