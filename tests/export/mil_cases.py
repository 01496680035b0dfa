"""Single operations of ML programs over random shapes, and what torch says of them in float64.

`Case.operation` is built by coremltools' own builder, so that its type inference has its say on the shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

Oracle = Callable[..., Any]
MAKERS: dict[str, Callable[[Generator], Case]] = {}


@dataclass
class Case:
    """operation: MIL name. oracle: takes `inputs` and `weights` by name (float64 tensors, ints, bools).

    inputs: arrays (or a list of them) that the program is fed. weights: float arrays that are constants of it.
    attributes: everything else, as the builder takes it. ios: the op set.
    """

    operation: str
    oracle: Oracle
    inputs: dict[str, Any]
    weights: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    ios: int = 17


def case(*names: str) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """One maker for each name; a maker of several operations is told which."""

    def register(maker: Callable[..., Case]) -> Callable[..., Case]:
        for name in names:
            MAKERS[name] = (lambda rng, name=name: maker(rng, name)) if len(names) > 1 else maker
        return maker

    return register


def cases(operation: str | None = None, seeds: int = 4) -> Iterator[Case]:
    for number, (_name, maker) in enumerate(MAKERS.items()):
        for seed in range(seeds):
            made = maker(np.random.default_rng(1000 * number + seed))
            if operation in (None, made.operation):
                yield made


def normal(rng: Generator, *shape: int) -> np.ndarray:
    # off zero, so that a sum does not cancel to nothing
    return rng.normal(0.3, 1.0, shape)


def shape(rng: Generator, low: int = 1, high: int = 4) -> list[int]:
    return [int(v) for v in rng.integers(2, 6, rng.integers(low, high + 1))]


def axis_of(rng: Generator, rank: int) -> int:
    return int(rng.integers(-rank, rank))


def axes_of(rng: Generator, rank: int) -> list[int]:
    chosen = rng.permutation(rank)[: rng.integers(1, rank + 1)]
    return [int(v) - rank * int(rng.integers(0, 2)) for v in chosen]


# --- value by value -------------------------------------------------------------------------------------------------

UNARY: dict[str, Oracle] = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "relu6": lambda x: x.clamp(0, 6),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "erf": torch.special.erf,
    "exp": torch.exp,
    "square": lambda x: x * x,
    "abs": lambda x: torch.where(x < 0, -x, x),
    "sign": lambda x: (x > 0).double() - (x < 0).double(),
    "floor": lambda x: x - x.remainder(1),
    "ceil": lambda x: -(-x).floor(),
    "round": torch.round,
    "cos": torch.cos,
    "sin": torch.sin,
}


@case(*UNARY)
def unary(rng: Generator, name: str) -> Case:
    return Case(name, UNARY[name], {"x": 2 * normal(rng, *shape(rng))})


POSITIVE: dict[str, tuple[Oracle, dict[str, float]]] = {
    "sqrt": (lambda x: x**0.5, {}),
    "log": (lambda x, epsilon: torch.log(x + epsilon), {"epsilon": 0.03125}),
    "rsqrt": (lambda x, epsilon: (x + epsilon) ** -0.5, {"epsilon": 0.03125}),
    "inverse": (lambda x, epsilon: 1 / (x + epsilon), {"epsilon": 0.03125}),
}


@case(*POSITIVE)
def positive(rng: Generator, name: str) -> Case:
    oracle, numbers = POSITIVE[name]
    return Case(name, oracle, {"x": rng.uniform(0.1, 3, shape(rng))}, numbers)


BINARY: dict[str, Oracle] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: torch.where(x > y, x, y),
    "minimum": lambda x, y: torch.where(x < y, x, y),
    "equal": lambda x, y: x == y,
    "not_equal": lambda x, y: x != y,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "floor_div": lambda x, y: (x / y).floor(),
    "mod": lambda x, y: x - y * (x / y).floor(),
    "pow": lambda x, y: x**y,
}


@case(*BINARY)
def binary(rng: Generator, name: str) -> Case:
    full = shape(rng)
    other = [1 if rng.random() < 0.4 else size for size in full][int(rng.integers(0, len(full))) :]
    # halves, so that equality and whole quotients happen
    x, y = (rng.integers(1, 8, size) / 2 for size in (full, other))
    return Case(name, BINARY[name], {"x": y, "y": x} if rng.random() < 0.5 else {"x": x, "y": y})


@case("logical_and", "logical_or")
def logical(rng: Generator, name: str) -> Case:
    size = shape(rng)
    oracle = (lambda x, y: x & y) if name == "logical_and" else (lambda x, y: x | y)
    return Case(name, oracle, {"x": rng.random(size) < 0.5, "y": rng.random(size) < 0.5})


@case("logical_not")
def logical_not(rng: Generator) -> Case:
    return Case("logical_not", lambda x: ~x, {"x": rng.random(shape(rng)) < 0.5})


@case("cast")
def cast(rng: Generator) -> Case:
    kind = str(rng.choice(["int32", "bool", "fp32"]))
    oracle = {"int32": lambda x: x.trunc().long(), "bool": lambda x: x != 0, "fp32": lambda x: x}[kind]
    return Case("cast", oracle, {"x": (3 * normal(rng, *shape(rng))).round(1)}, attributes={"dtype": kind})


@case("gelu")
def gelu(rng: Generator) -> Case:
    oracles: dict[str, Oracle] = {
        "EXACT": lambda x: x / 2 * (1 + torch.special.erf(x / 2**0.5)),
        "TANH_APPROXIMATION": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "SIGMOID_APPROXIMATION": lambda x: x / (1 + torch.exp(-1.702 * x)),
    }
    mode = str(rng.choice(list(oracles)))
    return Case("gelu", oracles[mode], {"x": 2 * normal(rng, *shape(rng))}, attributes={"mode": mode})


@case("clip")
def clip(rng: Generator) -> Case:
    low, high = sorted(float(v) for v in rng.integers(-8, 9, 2) / 4)
    oracle: Oracle = lambda x, alpha, beta: torch.minimum(torch.maximum(x, alpha), beta)  # noqa: E731
    return Case("clip", oracle, {"x": 2 * normal(rng, *shape(rng))}, {"alpha": low, "beta": high + 0.5})


@case("leaky_relu")
def leaky_relu(rng: Generator) -> Case:
    oracle: Oracle = lambda x, alpha: torch.where(x < 0, alpha * x, x)  # noqa: E731
    return Case("leaky_relu", oracle, {"x": normal(rng, *shape(rng))}, {"alpha": 0.125})


@case("thresholded_relu")
def thresholded_relu(rng: Generator) -> Case:
    oracle: Oracle = lambda x, alpha: x * (x >= alpha)  # noqa: E731
    return Case("thresholded_relu", oracle, {"x": normal(rng, *shape(rng))}, {"alpha": 0.5})


@case("sigmoid_hard")
def sigmoid_hard(rng: Generator) -> Case:
    oracle: Oracle = lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1)  # noqa: E731
    return Case("sigmoid_hard", oracle, {"x": 2 * normal(rng, *shape(rng))}, {"alpha": 0.25, "beta": 0.5})


@case("prelu")
def prelu(rng: Generator) -> Case:
    x = normal(rng, 2, *(int(v) for v in rng.integers(2, 5, 3)))
    oracle: Oracle = lambda x, alpha: torch.where(x < 0, x * alpha.reshape(-1, 1, 1), x)  # noqa: E731
    return Case("prelu", oracle, {"x": x}, {"alpha": normal(rng, x.shape[1])})


@case("select")
def select(rng: Generator) -> Case:
    size = shape(rng)
    inputs = {"cond": rng.random(size) < 0.5, "a": normal(rng, *size), "b": normal(rng, *size)}
    return Case("select", lambda cond, a, b: a * cond + b * ~cond, inputs)


# --- weights --------------------------------------------------------------------------------------------------------


@case("linear")
def linear(rng: Generator) -> Case:
    # square more often than not: a transposed weight must not be found by its shape alone
    width = int(rng.integers(2, 7))
    out = width if rng.random() < 0.7 else width + 1
    weights = {"weight": normal(rng, out, width), "bias": normal(rng, out)}
    oracle: Oracle = lambda x, weight, bias: (x.unsqueeze(-2) * weight).sum(-1) + bias  # noqa: E731
    return Case("linear", oracle, {"x": normal(rng, *shape(rng, 1, 2), width)}, weights)


@case("matmul")
def matmul(rng: Generator) -> Case:
    batch, (rows, inner, columns) = shape(rng, 0, 2), (int(v) for v in rng.integers(2, 5, 3))
    inner = columns = rows if rng.random() < 0.5 else inner
    first, second = bool(rng.integers(0, 2)), bool(rng.integers(0, 2))
    x = normal(rng, *batch, *([inner, rows] if first else [rows, inner]))
    y = normal(rng, *batch, *([columns, inner] if second else [inner, columns]))

    def oracle(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.mT if first else x, y.mT if second else y
        return (x.unsqueeze(-1) * y.unsqueeze(-3)).sum(-2)

    return Case("matmul", oracle, {"x": x, "y": y}, attributes={"transpose_x": first, "transpose_y": second})


@case("einsum")
def einsum(rng: Generator) -> Case:
    b, c, h, w = (int(v) for v in rng.integers(2, 5, 4))
    values = [normal(rng, b, c, h, w), normal(rng, b, w, h, 3)]
    oracle: Oracle = lambda values: torch.einsum("bchw,bwhu->bchu", *values)  # noqa: E731
    return Case("einsum", oracle, {"values": values}, attributes={"equation": "nchw,nwhu->nchu"})


def _padded(x: Tensor, weight_span: list[int], strides: list[int], kind: str, pad: list[int], fill: float) -> Tensor:
    """Padding by MIL's rules, written out: "same" splits what is needed and puts an odd one behind."""
    for i, (span, stride) in enumerate(zip(weight_span, strides)):
        size = x.shape[2 + i]
        if kind == "custom":
            before, after = pad[2 * i], pad[2 * i + 1]
        elif kind == "valid":
            before = after = 0
        else:
            out = (size + stride - 1) // stride
            need = max(0, (out - 1) * stride + span - size)
            before, after = need // 2, need - need // 2
            if kind == "same_lower":
                before, after = after, before
        blocks = [torch.full([*x.shape[: 2 + i], n, *x.shape[3 + i :]], fill, dtype=x.dtype) for n in (before, after)]
        x = torch.cat([blocks[0], x, blocks[1]], 2 + i)
    return x


@case("conv")
def conv(rng: Generator) -> Case:
    count, groups = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    kernel = [int(v) for v in rng.integers(1, 4, count)]
    strides, dilations = ([int(v) for v in rng.integers(1, 3, count)] for _ in range(2))
    kind = str(rng.choice(["valid", "custom", "same", "same_lower"]))
    pad = [int(v) for v in rng.integers(0, 3, 2 * count)] if kind == "custom" else [0] * (2 * count)
    x = normal(rng, 2, 2 * groups, *(int(v) for v in rng.integers(6, 9, count)))
    weights = {"weight": normal(rng, 3 * groups, 2, *kernel), "bias": normal(rng, 3 * groups)}
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]

    def oracle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = _padded(x, span, strides, kind, pad, 0.0)
        run = F.conv1d if count == 1 else F.conv2d
        return run(x, weight, bias, strides, 0, dilations, groups)

    attributes = {"strides": strides, "dilations": dilations, "pad_type": kind, "groups": groups}
    return Case("conv", oracle, {"x": x}, weights, attributes | ({"pad": pad} if kind == "custom" else {}))


@case("conv_transpose")
def conv_transpose(rng: Generator) -> Case:
    groups, pad = int(rng.integers(1, 3)), [int(v) for v in rng.integers(0, 2, 2)]
    strides = [int(v) for v in rng.integers(1, 3, 2)]
    weights = {"weight": normal(rng, 2 * groups, 3, 3, 2), "bias": normal(rng, 3 * groups)}
    attributes = {"strides": strides, "groups": groups, "pad_type": "custom", "pad": [pad[0], pad[0], pad[1], pad[1]]}
    oracle: Oracle = lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, strides, pad, 0, groups)  # noqa: E731
    return Case("conv_transpose", oracle, {"x": normal(rng, 2, 2 * groups, 4, 5)}, weights, attributes)


@case("max_pool", "avg_pool")
def pool(rng: Generator, name: str) -> Case:
    kernel = [int(v) for v in rng.integers(2, 4, 2)]
    # a stride past the window may leave one that sees nothing, which coremltools and torch count differently
    strides = [int(rng.integers(1, k + 1)) for k in kernel]
    ceil, exclude = bool(rng.integers(0, 2)), bool(rng.integers(0, 2))
    pad = [int(v) for v in rng.integers(0, 2, 2)]
    x = normal(rng, 2, 3, *(int(v) for v in rng.integers(5, 9, 2)))
    attributes: dict[str, Any] = {
        "kernel_sizes": kernel, "strides": strides, "pad_type": "custom", "pad": [pad[0], pad[0], pad[1], pad[1]],
        "ceil_mode": ceil,
    }  # fmt: skip
    if name == "max_pool":
        return Case(name, lambda x: F.max_pool2d(x, kernel, strides, pad, 1, ceil), {"x": x}, {}, attributes)
    attributes["exclude_padding_from_average"] = exclude
    return Case(name, lambda x: F.avg_pool2d(x, kernel, strides, pad, ceil, not exclude), {"x": x}, {}, attributes)


# --- normalisation and reduction ------------------------------------------------------------------------------------


@case("softmax")
def softmax(rng: Generator) -> Case:
    size = shape(rng, 2, 4)
    axis = axis_of(rng, len(size))
    oracle: Oracle = lambda x: torch.exp(x) / torch.exp(x).sum(axis, keepdim=True)  # noqa: E731
    return Case("softmax", oracle, {"x": normal(rng, *size)}, attributes={"axis": axis})


@case("layer_norm")
def layer_norm(rng: Generator) -> Case:
    size = shape(rng, 2, 4)
    start = int(rng.integers(1, len(size)))
    along = size[start:]
    weights = {"gamma": normal(rng, *along), "beta": normal(rng, *along), "epsilon": float(rng.choice([0.125, 1e-3]))}

    def oracle(x: Tensor, gamma: Tensor, beta: Tensor, epsilon: Tensor) -> Tensor:
        return F.layer_norm(x, along, gamma, beta, float(epsilon))

    axes = [i - len(size) * int(rng.integers(0, 2)) for i in range(start, len(size))]
    return Case("layer_norm", oracle, {"x": normal(rng, *size)}, weights, {"axes": axes})


@case("batch_norm")
def batch_norm(rng: Generator) -> Case:
    x = normal(rng, 2, 3, *shape(rng, 1, 2))
    weights = {name: normal(rng, 3) for name in ("mean", "gamma", "beta")}
    weights |= {"variance": rng.uniform(0.2, 2, 3), "epsilon": 0.125}

    def oracle(x: Tensor, epsilon: Tensor, **parts: Tensor) -> Tensor:
        wide = {name: part.reshape(-1, *[1] * (x.ndim - 2)) for name, part in parts.items()}
        return (x - wide["mean"]) / (wide["variance"] + epsilon) ** 0.5 * wide["gamma"] + wide["beta"]

    return Case("batch_norm", oracle, {"x": x}, weights)


@case("l2_norm")
def l2_norm(rng: Generator) -> Case:
    oracle: Oracle = lambda x, epsilon: x / (x.pow(2).sum((-1, -2, -3), keepdim=True) + epsilon) ** 0.5  # noqa: E731
    return Case("l2_norm", oracle, {"x": normal(rng, 2, *shape(rng, 3, 3))}, {"epsilon": 0.5})


REDUCTIONS: dict[str, Oracle] = {
    "reduce_sum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "reduce_mean": lambda x, axes, keep: x.sum(axes, keepdim=keep) / (x.numel() / x.sum(axes).numel()),
    "reduce_max": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "reduce_min": lambda x, axes, keep: -torch.amax(-x, axes, keepdim=keep),
    "reduce_l1_norm": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keepdim=keep),
    "reduce_l2_norm": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keepdim=keep),
    "reduce_sum_square": lambda x, axes, keep: (x**2).sum(axes, keepdim=keep),
    "reduce_log_sum_exp": lambda x, axes, keep: x.exp().sum(axes, keepdim=keep).log(),
}


@case(*REDUCTIONS)
def reduction(rng: Generator, name: str) -> Case:
    size = shape(rng, 2, 4)
    axes, keep = axes_of(rng, len(size)), bool(rng.integers(0, 2))
    oracle: Oracle = lambda x: REDUCTIONS[name](x, axes, keep)  # noqa: E731
    return Case(name, oracle, {"x": normal(rng, *size) + 2}, attributes={"axes": axes, "keep_dims": keep})


@case("reduce_argmax", "reduce_argmin")
def argument(rng: Generator, name: str) -> Case:
    size = shape(rng, 2, 4)
    axis, keep = axis_of(rng, len(size)), bool(rng.integers(0, 2))
    sign = 1 if name == "reduce_argmax" else -1
    oracle: Oracle = lambda x: (sign * x).max(axis, keepdim=keep).indices  # noqa: E731
    return Case(name, oracle, {"x": normal(rng, *size)}, attributes={"axis": axis, "keep_dims": keep})


@case("cumsum")
def cumsum(rng: Generator) -> Case:
    size, exclusive, reverse = shape(rng, 2, 3), bool(rng.integers(0, 2)), bool(rng.integers(0, 2))
    axis = int(rng.integers(0, len(size)))

    def oracle(x: Tensor) -> Tensor:
        rows = list(x.unbind(axis))[:: -1 if reverse else 1]
        sums = [sum(rows[: i + (not exclusive)], torch.zeros_like(rows[0])) for i in range(len(rows))]
        return torch.stack(sums[:: -1 if reverse else 1], axis)

    attributes = {"axis": axis, "exclusive": exclusive, "reverse": reverse}
    return Case("cumsum", oracle, {"x": normal(rng, *size)}, attributes=attributes)


# --- shape ----------------------------------------------------------------------------------------------------------


@case("shape")
def shape_of(rng: Generator) -> Case:
    return Case("shape", lambda x: torch.tensor(x.shape), {"x": normal(rng, *shape(rng))})


@case("fill")
def fill(rng: Generator) -> Case:
    size = shape(rng)
    oracle: Oracle = lambda value: value.expand(size)  # noqa: E731
    return Case("fill", oracle, {}, {"value": 1.5}, {"shape": size})


@case("range_1d")
def range_1d(rng: Generator) -> Case:
    start, step = (int(v) for v in rng.integers(1, 4, 2))
    oracle: Oracle = lambda: torch.tensor(list(range(start, 12, step)))  # noqa: E731
    return Case("range_1d", oracle, {}, attributes={"start": start, "end": 12, "step": step})


@case("reshape")
def reshape(rng: Generator) -> Case:
    a, b, c = (int(v) for v in rng.integers(2, 6, 3))
    # 0 takes the dimension over, where the rank stays
    target, right = ([0, c, -1], (a, c, b)) if rng.random() < 0.5 else ([-1, c], (a * b, c))
    return Case("reshape", lambda x: x.reshape(right), {"x": normal(rng, a, b, c)}, attributes={"shape": target})


@case("transpose")
def transpose(rng: Generator) -> Case:
    size = shape(rng, 2, 4)
    perm = [int(v) for v in rng.permutation(len(size))]
    return Case("transpose", lambda x: x.permute(perm), {"x": normal(rng, *size)}, attributes={"perm": perm})


@case("expand_dims")
def expand_dims(rng: Generator) -> Case:
    first = int(rng.integers(0, 2))
    oracle: Oracle = lambda x: x.unsqueeze(first).unsqueeze(-1)  # noqa: E731
    return Case("expand_dims", oracle, {"x": normal(rng, *shape(rng, 2, 3))}, attributes={"axes": [first, -1]})


@case("squeeze")
def squeeze(rng: Generator) -> Case:
    a, b = shape(rng, 2, 2)
    axes = [-2] if rng.random() < 0.5 else [0, 2]
    oracle: Oracle = lambda x: x.reshape(1, a, b) if axes == [-2] else x.reshape(a, b)  # noqa: E731
    return Case("squeeze", oracle, {"x": normal(rng, 1, a, 1, b)}, attributes={"axes": axes})


@case("tile")
def tile(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    reps = [int(v) for v in rng.integers(1, 4, len(size))]
    oracle: Oracle = lambda x: torch.from_numpy(np.tile(x.numpy(), reps))  # noqa: E731
    return Case("tile", oracle, {"x": normal(rng, *size)}, attributes={"reps": reps})


@case("concat")
def concat(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    axis, interleave = axis_of(rng, len(size)), bool(rng.integers(0, 2))
    values = [normal(rng, *size) for _ in range(3)]

    def oracle(values: list[Tensor]) -> Tensor:
        if not interleave:
            return torch.cat(values, axis)
        return torch.cat([v.narrow(axis, i, 1) for i in range(size[axis]) for v in values], axis)

    return Case("concat", oracle, {"values": values}, attributes={"axis": axis, "interleave": interleave})


@case("stack")
def stack(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    axis = axis_of(rng, len(size) + 1)
    oracle: Oracle = lambda values: torch.cat([v.unsqueeze(axis) for v in values], axis)  # noqa: E731
    return Case("stack", oracle, {"values": [normal(rng, *size) for _ in range(3)]}, attributes={"axis": axis})


@case("split")
def split(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    axis = int(rng.integers(0, len(size)))
    size[axis] = 6
    even = bool(rng.integers(0, 2))
    sizes = [2, 2, 2] if even else [1, 3, 2]
    ends = np.cumsum(sizes)
    oracle: Oracle = lambda x: [x.narrow(axis, int(e - n), n) for e, n in zip(ends, sizes)]  # noqa: E731
    attributes = {"num_splits": 3} if even else {"split_sizes": sizes}
    return Case("split", oracle, {"x": normal(rng, *size)}, attributes={"axis": axis, **attributes})


@case("pad")
def pad(rng: Generator) -> Case:
    size = [int(v) for v in rng.integers(3, 6, rng.integers(2, 4))]
    widths = [(int(a), int(b)) for a, b in rng.integers(0, 3, (2, 2))]
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    mode = str(rng.choice(list(modes)))
    whole = [(0, 0)] * (len(size) - 2) + widths
    more = {"constant_values": 0.75} if mode == "constant" else {}
    oracle: Oracle = lambda x, **_: torch.from_numpy(np.pad(x.numpy(), whole, modes[mode], **more))  # noqa: E731
    attributes = {"pad": [v for pair in widths for v in pair], "mode": mode}
    weights = {"constant_val": 0.75} if mode == "constant" else {}
    return Case("pad", oracle, {"x": normal(rng, *size)}, weights, attributes)


@case("slice_by_index")
def slice_by_index(rng: Generator) -> Case:
    size = [int(v) for v in rng.integers(4, 8, 3)]
    begin, end, stride = [1, int(rng.integers(-3, 2)), 0], [-1, 4, 3], [int(rng.integers(1, 3)), 1, 2]
    squeeze, begin_mask, end_mask = [False, True, False], [False, False, True], [bool(rng.integers(0, 2)), False, True]
    oracle: Oracle = lambda x: x[  # noqa: E731
        slice(1, None if end_mask[0] else -1, stride[0]), begin[1], :: stride[2]
    ]
    attributes = {"begin": begin, "end": end, "stride": stride, "squeeze_mask": squeeze}
    attributes |= {"begin_mask": begin_mask, "end_mask": end_mask}
    return Case("slice_by_index", oracle, {"x": normal(rng, *size)}, attributes=attributes)


@case("slice_by_index, backwards")
def slice_backwards(rng: Generator) -> Case:
    size = [int(v) for v in rng.integers(4, 8, 2)]
    attributes = {"begin": [-1, 0], "end": [0, 0], "stride": [-2, 1], "end_mask": [True, True]}
    oracle: Oracle = lambda x: x.flip(0)[::2]  # noqa: E731
    return Case("slice_by_index", oracle, {"x": normal(rng, *size)}, attributes=attributes)


@case("slice_by_size")
def slice_by_size(rng: Generator) -> Case:
    x = normal(rng, *(int(v) for v in rng.integers(4, 8, 2)))
    oracle: Oracle = lambda x: x[1:3, 2:]  # noqa: E731
    return Case("slice_by_size", oracle, {"x": x}, attributes={"begin": [1, 2], "size": [2, -1]})


@case("gather")
def gather(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    axis = axis_of(rng, len(size))
    indices = rng.integers(0, size[axis], shape(rng, 1, 2)).astype(np.int32)
    oracle: Oracle = lambda x, indices: torch.from_numpy(np.take(x.numpy(), indices.numpy(), axis))  # noqa: E731
    return Case("gather", oracle, {"x": normal(rng, *size), "indices": indices}, attributes={"axis": axis})


@case("gather, rows of a batch")
def gather_batch(rng: Generator) -> Case:
    rows, length, width, wanted = (int(v) for v in rng.integers(2, 5, 4))
    indices = rng.integers(0, length, (rows, wanted)).astype(np.int32)
    oracle: Oracle = lambda x, indices: x[torch.arange(rows)[:, None], indices]  # noqa: E731
    attributes = {"axis": 1, "batch_dims": 1}
    return Case("gather", oracle, {"x": normal(rng, rows, length, width), "indices": indices}, attributes=attributes)


@case("gather_nd")
def gather_nd(rng: Generator) -> Case:
    size, skip = shape(rng, 3, 4), int(rng.integers(0, 2))
    depth, count = int(rng.integers(1, len(size) - skip + 1)), int(rng.integers(2, 5))
    places = [rng.integers(0, size[skip + i], [*size[:skip], count]) for i in range(depth)]
    indices = np.stack(places, -1).astype(np.int32)

    def oracle(x: Tensor, indices: Tensor) -> Tensor:
        rows = [(x, indices)] if not skip else list(zip(x, indices))
        found = [torch.stack([row[tuple(at)] for at in wanted]) for row, wanted in rows]
        return torch.stack(found) if skip else found[0]

    inputs = {"x": normal(rng, *size), "indices": indices}
    return Case("gather_nd", oracle, inputs, attributes={"batch_dims": skip})


@case("gather_along_axis")
def gather_along_axis(rng: Generator) -> Case:
    size = shape(rng, 2, 3)
    axis = axis_of(rng, len(size))
    indices = rng.integers(0, size[axis], size).astype(np.int32)
    oracle: Oracle = lambda x, indices: torch.from_numpy(  # noqa: E731
        np.take_along_axis(x.numpy(), indices.numpy(), axis)
    )
    inputs = {"x": normal(rng, *size), "indices": indices}
    return Case("gather_along_axis", oracle, inputs, attributes={"axis": axis})


# --- attention and 8 bits -------------------------------------------------------------------------------------------


@case("scaled_dot_product_attention")
def attention(rng: Generator) -> Case:
    batch, queries, keys, width = shape(rng, 1, 2), *(int(v) for v in rng.integers(2, 6, 3))
    inputs: dict[str, Any] = {"query": normal(rng, *batch, queries, width), "key": normal(rng, *batch, keys, width)}
    inputs["value"] = normal(rng, *batch, keys, width + 1)
    kind = int(rng.integers(0, 3))
    if kind == 1:
        inputs["attn_mask"] = rng.normal(size=(queries, keys))
    elif kind == 2:
        inputs["attn_mask"] = (rng.random((queries, keys)) < 0.7) | np.eye(queries, keys, dtype=bool)
        inputs["attn_mask"][:, 0] = True
    oracle: Oracle = lambda query, key, value, attn_mask=None: F.scaled_dot_product_attention(  # noqa: E731
        query, key, value, attn_mask
    )
    return Case("scaled_dot_product_attention", oracle, inputs, ios=18)


def _eight_bits(rng: Generator, rank: int, size: int) -> tuple[int, np.ndarray, np.ndarray]:
    """axis, scale, zero point; scales are powers of two, so that halves are halves in any precision."""
    return int(rng.integers(0, rank)), 2.0 ** -rng.integers(2, 6, size), rng.integers(-9, 10, size).astype(np.int8)


@case("quantize")
def quantize(rng: Generator) -> Case:
    size = [4] * int(rng.integers(2, 4))
    axis, scale, zero = _eight_bits(rng, len(size), 4)
    along = [-1 if i == axis else 1 for i in range(len(size))]

    def oracle(input: Tensor, scale: Tensor) -> Tensor:
        steps = input / scale.reshape(along)
        even = torch.where((steps - steps.floor()) == 0.5, 2 * (steps / 2).round(), (steps + 0.5).floor())
        return (even + torch.from_numpy(zero).double().reshape(along)).clamp(-128, 127).long()

    x = rng.integers(-300, 300, size) / 16
    attributes = {"zero_point": zero, "axis": axis, "output_dtype": "int8"}
    return Case("quantize", oracle, {"input": x}, {"scale": scale}, attributes)


@case("dequantize")
def dequantize(rng: Generator) -> Case:
    size = [4] * int(rng.integers(2, 4))
    axis, scale, zero = _eight_bits(rng, len(size), 4)
    along = [-1 if i == axis else 1 for i in range(len(size))]

    def oracle(input: Tensor, scale: Tensor) -> Tensor:
        return (input - torch.from_numpy(zero).double().reshape(along)) * scale.reshape(along)

    x = rng.integers(-128, 128, size).astype(np.int8)
    return Case("dequantize", oracle, {"input": x}, {"scale": scale}, {"zero_point": zero, "axis": axis})
