"""What a piece of work costs: multiply-accumulates, bytes that autograd keeps, seconds."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """What one piece of a step does. convolution, matrix: multiply-accumulates. saved: bytes kept for the backward."""

    convolution: float = 0.0
    matrix: float = 0.0
    saved: float = 0.0

    @property
    def macs(self) -> float:
        return self.convolution + self.matrix

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def times(self, factor: float) -> Work:
        return Work(*(factor * value for value in dataclasses.astuple(self)))


@dataclass(frozen=True)
class Growth:
    """Work of the objectives at s times the rehearsal's batch: fixed + linear s + pairs s^2."""

    fixed: Work
    linear: Work
    pairs: Work

    @classmethod
    def through(cls, one: Work, two: Work, four: Work) -> Growth:
        """The parabola through s = 1, 2 and 4; what is hardly quadratic is taken as linear, as rounding looks alike."""
        parts = [_parabola(*values) for values in zip(*map(dataclasses.astuple, (one, two, four)))]
        return cls(*(Work(*values) for values in zip(*parts)))

    def at(self, s: float) -> Work:
        return self.fixed + self.linear.times(s) + self.pairs.times(s * s)


def _parabola(one: float, two: float, four: float) -> tuple[float, float, float]:
    pairs = (four - 3 * two + 2 * one) / 6
    if 16 * pairs < 0.02 * four:
        slope = (four - one) / 3
        return max(0.0, one - slope), min(slope, four / 4) if slope > 0 else 0.0, 0.0
    linear = two - one - 3 * pairs
    return one - linear - pairs, linear, pairs


def _convolution_backward(
    grad_shape: Any, x_shape: Any, w_shape: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int, output_mask: Sequence[bool], out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    """Gradient of input and of weights cost what the forward did; torch's own count forgets that groups divide it."""
    base, inner = (x_shape if transposed else grad_shape), w_shape
    positions = int(np.prod(base[2:]))
    forward = 2 * base[0] * positions * int(np.prod(inner))
    return forward * (bool(output_mask[0]) + bool(output_mask[1]))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The scores again, then gradients of scores, values, queries and keys."""
    return q[0] * q[1] * q[2] * k[2] * (6 * q[3] + 4 * v[3])


_FORMULAS = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
_CONVOLUTIONS = ("convolution", "_convolution", "cudnn_convolution", "_slow_conv2d_forward", "convolution_backward")


def count(job: Callable[[], object]) -> Work:
    """Multiply-accumulates of all that `job` runs, forward and backward, and the bytes that autograd kept in it.

    Convolutions, matrix products and fused attention count; everything elementwise is free. The bytes are those of the
    distinct storages saved for a backward, without parameters (they are there anyway).
    """
    seen: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter) and not isinstance(getattr(value, "_base", None), nn.Parameter):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter,
    ):
        job()
    flops = {str(op).removeprefix("aten."): value for op, value in counter.get_flop_counts().get("Global", {}).items()}
    convolution = sum(value for op, value in flops.items() if op in _CONVOLUTIONS)
    return Work(convolution / 2, (sum(flops.values()) - convolution) / 2, sum(seen.values()))


@dataclass(frozen=True)
class Seconds:
    """Of one piece of work: processor seconds of this process, and of the clock on the wall."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s)

    def __sub__(self, other: Seconds) -> Seconds:
        """Never below 0: what is taken away was timed apart."""
        return Seconds(max(0.0, self.cpu_s - other.cpu_s), max(0.0, self.wall_s - other.wall_s))

    def times(self, factor: float) -> Seconds:
        return Seconds(factor * self.cpu_s, factor * self.wall_s)


def timing(job: Callable[[], object], rounds: int = 3) -> Seconds:
    """The median of some rounds, by either clock, after one that is not timed."""
    taken = []
    for _ in range(rounds + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    return Seconds(statistics.median(cpu for cpu, _ in taken[1:]), statistics.median(wall for _, wall in taken[1:]))
