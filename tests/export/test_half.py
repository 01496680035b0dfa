"""Weights in float16 whose kernels keep their sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pocketvlm.export.half import half_graph, round_half
from pocketvlm.export.prepare import Prepared


def neighbours(value: float) -> set[float]:
    nearest = np.float16(value)
    up, down = np.nextafter(nearest, np.float16(np.inf)), np.nextafter(nearest, np.float16(-np.inf))
    below = nearest if float(nearest) <= value else down
    above = nearest if float(nearest) >= value else up
    return {float(below), float(above)}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_each_weight_is_a_neighbour_and_each_kernel_keeps_its_sum(scale: float) -> None:
    weight = scale * torch.randn(6, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    rounded = round_half(weight)
    nearest = weight.half().float()
    for kernel, found, plain in zip(weight.flatten(0, 1), rounded.flatten(0, 1), nearest.flatten(0, 1)):
        values, total = kernel.flatten().tolist(), kernel.double().sum().item()
        assert all(f in neighbours(v) for v, f in zip(values, found.flatten().tolist()))
        best = min(abs(sum(choice) - total) for choice in itertools.product(*map(neighbours, values)))
        assert abs(found.double().sum().item() - total) <= abs(plain.double().sum().item() - total)
        # greedy is not the best of all choices, but never far from it
        assert abs(found.double().sum().item() - total) <= best + max(abs(v) for v in values) * 2**-11
    error = (rounded.double() - weight.double()).sum((2, 3)).abs().mean()
    assert error < 0.5 * (nearest.double() - weight.double()).sum((2, 3)).abs().mean()


def test_matrices_are_rounded_to_nearest_and_nothing_overflows() -> None:
    matrix = torch.tensor([[1.0002, -7e4], [3e-9, 2.0]])
    assert torch.equal(round_half(matrix), torch.tensor([[1.0, -65504.0], [0.0, 2.0]]))
    kernels = torch.full((1, 1, 3, 3), 1e5)
    assert torch.equal(round_half(kernels), torch.full((1, 1, 3, 3), 65504.0))
    exact = torch.arange(18.0).reshape(1, 2, 3, 3)
    assert torch.equal(round_half(exact), exact)


def test_large_weights_that_cancel_stay_true_on_an_even_ground() -> None:
    class Edges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=False)
            with torch.no_grad():
                weight = 20 * torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
                weight -= weight.mean((2, 3), keepdim=True) - 0.01
                self.conv.weight.copy_(weight)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(self.conv(pixels.permute(0, 3, 1, 2).float()).mean((2, 3)), dim=-1)

    module = Edges().eval()
    generator = np.random.default_rng(0)
    rows = np.broadcast_to(generator.integers(40, 255, (32, 1, 1, 3), dtype=np.uint8), (32, 8, 8, 3)).copy()
    pixels = torch.from_numpy(rows)
    plain = Edges().eval()
    plain.conv.weight.data = module.conv.weight.data.half().float()
    graph, notes = half_graph(module, None, rows[:2])
    corrected, judged = half_graph(module, Prepared(module, rows), rows[:2])
    with torch.no_grad():
        worst = [float((1 - (m(pixels) * module(pixels)).sum(-1)).max()) for m in (plain, graph, corrected)]
    assert worst[1] < worst[0] / 4
    assert worst[2] < worst[0] / 4
    assert str(notes["biases"]).startswith("as they were")
    assert judged["biases"] == "corrected"
    assert judged["meets_floor"] is True
