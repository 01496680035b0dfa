"""What each operation of an ML program computes, after Core ML's MIL operation reference (op sets iOS 15 to 18).

A float16 value travels as float32 that holds float16 numbers; the program rounds every result to its declared type, so
an operation here computes in float32 and rounds nothing itself. Integers of any width travel as int32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# these put their operations into the table
from pocketvlm.export.mil import shapes, windows  # noqa: F401
from pocketvlm.export.mil.arguments import OPERATIONS, Arguments, operation

# --- one or two tensors, value by value -----------------------------------------------------------------------------


def _unary(name: str, function: Callable[..., Tensor]) -> None:
    OPERATIONS[name] = lambda a: function(a.tensor())


def _binary(name: str, function: Callable[..., Tensor]) -> None:
    OPERATIONS[name] = lambda a: function(a.tensor("x"), a.tensor("y"))


_UNARY: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "cast": lambda x: x,  # the declared type of the result is the conversion
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "abs": torch.abs,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "cos": torch.cos,
    "sin": torch.sin,
    "logical_not": torch.logical_not,
}
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "real_div": torch.true_divide,
    "floor_div": torch.floor_divide,
    "mod": torch.remainder,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "equal": torch.eq,
    "not_equal": torch.ne,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
}
for _name, _function in _UNARY.items():
    _unary(_name, _function)
for _name, _function in _BINARY.items():
    _binary(_name, _function)


@operation("gelu")
def _gelu(a: Arguments) -> Tensor:
    x, mode = a.tensor(), a.text("mode", "EXACT")
    if mode == "EXACT":
        return F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"gelu mode {mode!r}")


@operation("clip")
def _clip(a: Arguments) -> Tensor:
    return a.tensor().clamp(a.number("alpha", 0.0), a.number("beta", 1.0))


@operation("log")
def _log(a: Arguments) -> Tensor:
    return torch.log(a.tensor() + a.number("epsilon", 1e-45))


@operation("rsqrt")
def _rsqrt(a: Arguments) -> Tensor:
    return torch.rsqrt(a.tensor() + a.number("epsilon", 1e-12))


@operation("inverse")
def _inverse(a: Arguments) -> Tensor:
    return 1 / (a.tensor() + a.number("epsilon", 1e-4))


@operation("leaky_relu")
def _leaky_relu(a: Arguments) -> Tensor:
    return F.leaky_relu(a.tensor(), a.number("alpha", 0.01))


@operation("thresholded_relu")
def _thresholded_relu(a: Arguments) -> Tensor:
    x = a.tensor()
    return torch.where(x >= a.number("alpha", 1.0), x, torch.zeros(()))


@operation("sigmoid_hard")
def _sigmoid_hard(a: Arguments) -> Tensor:
    return (a.number("alpha", 0.2) * a.tensor() + a.number("beta", 0.5)).clamp(0, 1)


@operation("prelu")
def _prelu(a: Arguments) -> Tensor:
    return F.prelu(a.tensor(), a.tensor("alpha"))


@operation("select")
def _select(a: Arguments) -> Tensor:
    return torch.where(a.tensor("cond").bool(), a.tensor("a"), a.tensor("b"))


# --- weights --------------------------------------------------------------------------------------------------------


@operation("linear")
def _linear(a: Arguments) -> Tensor:
    return F.linear(a.tensor(), a.tensor("weight"), a.maybe("bias"))


@operation("matmul")
def _matmul(a: Arguments) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.transpose(-1, -2) if a.flag("transpose_x") else x
    return x @ (y.transpose(-1, -2) if a.flag("transpose_y") else y)


@operation("einsum")
def _einsum(a: Arguments) -> Tensor:
    return torch.einsum(a.text("equation", ""), *a.tensors())


# --- normalisation and reduction ------------------------------------------------------------------------------------


@operation("softmax")
def _softmax(a: Arguments) -> Tensor:
    return torch.softmax(a.tensor(), a.integer("axis", -1))


@operation("layer_norm")
def _layer_norm(a: Arguments) -> Tensor:
    x = a.tensor()
    axes = sorted(axis % x.ndim for axis in a.ints("axes", range(x.ndim)))
    centred = x - x.mean(axes, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(axes, keepdim=True) + a.number("epsilon", 1e-5))
    gamma, beta = a.maybe("gamma"), a.maybe("beta")
    along = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    y = y if gamma is None else y * gamma.reshape(along)
    return y if beta is None else y + beta.reshape(along)


@operation("batch_norm")
def _batch_norm(a: Arguments) -> Tensor:
    return F.batch_norm(
        a.tensor(), a.tensor("mean"), a.tensor("variance"), a.maybe("gamma"), a.maybe("beta"),
        eps=a.number("epsilon", 1e-5),
    )  # fmt: skip


@operation("l2_norm")
def _l2_norm(a: Arguments) -> Tensor:
    x = a.tensor()
    # over the last three dimensions, whatever the rank
    total = x.square().sum((-3, -2, -1), keepdim=True)
    return x / torch.sqrt(total + a.number("epsilon", 1e-6))


def _reduction(name: str, function: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    def run(a: Arguments) -> Tensor:
        x = a.tensor()
        return function(x, a.ints("axes", range(x.ndim)), a.flag("keep_dims"))

    OPERATIONS[name] = run


_reduction("reduce_sum", lambda x, axes, keep: x.sum(axes, keepdim=keep))
_reduction("reduce_mean", lambda x, axes, keep: x.mean(axes, keepdim=keep))
_reduction("reduce_max", lambda x, axes, keep: x.amax(axes, keepdim=keep))
_reduction("reduce_min", lambda x, axes, keep: x.amin(axes, keepdim=keep))
_reduction("reduce_l1_norm", lambda x, axes, keep: x.abs().sum(axes, keepdim=keep))
_reduction("reduce_l2_norm", lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt())
_reduction("reduce_sum_square", lambda x, axes, keep: x.square().sum(axes, keepdim=keep))
_reduction("reduce_log_sum_exp", lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep))


@operation("reduce_argmax")
def _argmax(a: Arguments) -> Tensor:
    return a.tensor().argmax(a.integer("axis", -1), keepdim=a.flag("keep_dims"))


@operation("reduce_argmin")
def _argmin(a: Arguments) -> Tensor:
    return a.tensor().argmin(a.integer("axis", -1), keepdim=a.flag("keep_dims"))


@operation("cumsum")
def _cumsum(a: Arguments) -> Tensor:
    x, axis = a.tensor(), a.integer("axis", 0)
    x = x.flip(axis) if a.flag("reverse") else x
    y = x.cumsum(axis) - (x if a.flag("exclusive") else 0)
    return y.flip(axis) if a.flag("reverse") else y


# --- attention and activations in 8 bit -----------------------------------------------------------------------------


@operation("scaled_dot_product_attention")
def _attention(a: Arguments) -> Tensor:
    query, key, value, mask = (a.maybe(name) for name in ("query", "key", "value", "attn_mask"))
    assert query is not None
    assert key is not None
    assert value is not None
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value


def _along(a: Arguments, name: str, x: Tensor) -> Tensor:
    value = a.maybe(name)
    if value is None:
        return torch.zeros(())
    value = value.float()
    return value.reshape([-1 if i == a.integer("axis") % x.ndim else 1 for i in range(x.ndim)]) if value.ndim else value


_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@operation("quantize")
def _quantize(a: Arguments) -> Tensor:
    x, (low, high) = a.tensor("input"), _RANGES[a.text("output_dtype", "")]
    return (torch.round(x / _along(a, "scale", x)) + _along(a, "zero_point", x)).clamp(low, high)


@operation("dequantize")
def _dequantize(a: Arguments) -> Tensor:
    x = a.tensor("input").float()
    return (x - _along(a, "zero_point", x)) * _along(a, "scale", x)
