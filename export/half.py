"""Weights in float16 that add up to what they did in float32.

A float16 has eleven digits, and rounding to nearest keeps each weight; but where large weights of a kernel nearly
cancel, as in the first depthwise layers of a network, their rounding errors do not, and on an even ground every pixel
makes the same error. So each kernel is rounded to the float16 values, up or down, whose sum is nearest to its own,
which costs nothing at run time. Choosing directions by what a layer computes is AdaRound's idea (Nagel et al. 2020,
arXiv:2004.10568); the sum as the criterion, which needs no data, is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from pocketvlm.export.fidelity import fidelity, run_module
from pocketvlm.export.prepare import Prepared, Rounding, capture, correct_bias, fold_batchnorm, round_weights

_LARGEST = torch.finfo(torch.float16).max


def round_half(weight: Tensor) -> Tensor:
    """float16 values for a convolution's weight [out, in, ...], each kernel keeping its sum; same dtype as given.

    Every value is one of the two float16 neighbours of the weight. Beyond float16's range it is cut to it.
    """
    wide = weight.detach().clamp(-_LARGEST, _LARGEST)
    nearest = wide.half()
    if weight.ndim < 3 or weight[0, 0].numel() == 1:
        return nearest.to(weight.dtype)
    exact, chosen = wide.double().flatten(2), nearest.double().flatten(2)
    infinity = torch.full_like(nearest, torch.inf)
    beyond = torch.where(wide > nearest, infinity, -infinity)
    other = torch.nextafter(nearest, beyond).clamp(-_LARGEST, _LARGEST).double().flatten(2)
    step = torch.where(exact == chosen, 0.0, other - chosen)
    for _ in range(exact.shape[-1]):
        error = (chosen - exact).sum(-1, keepdim=True)
        gain = error.abs() - (error + step).abs()
        best = gain.argmax(-1, keepdim=True)
        taken = torch.where(gain.gather(-1, best) > 0, step.gather(-1, best), 0.0)
        if not taken.any():
            break
        chosen = chosen.scatter_add(-1, best, taken)
        # turned once, a weight may turn back
        step = step.scatter_add(-1, best, -2 * taken)
    return chosen.reshape(weight.shape).to(weight.dtype)


def _plain(weight: Tensor) -> Tensor:
    return weight.clamp(-_LARGEST, _LARGEST).half().to(weight.dtype)


HALF = Rounding(_plain, "none", round_half)


@torch.no_grad()
def half_graph(
    module: nn.Module, ready: Prepared | None, rows: NDArray[Any]
) -> tuple[fx.GraphModule, dict[str, object]]:
    """The tower with batch norms folded and float16 weights, as float32 values, and notes.

    ready: where there are calibration inputs; biases are then corrected for the rounded weights. rows: for tracing.
    """
    graph = capture(module, ready.fit if ready else rows)
    fold_batchnorm(graph)
    if ready:
        correct_bias(graph, ready.fit, 0, HALF)
    round_weights(graph, HALF)
    notes: dict[str, object] = {
        "scheme": "half, kernels keep their sums",
        "biases": "corrected" if ready else "as they were, for want of calibration data",
    }
    if ready:
        notes |= fidelity(run_module(graph, ready.held), ready.expected).notes("fp16")
        notes["held_out_by"] = "the rounded weights in eager float32"
    return graph, notes
