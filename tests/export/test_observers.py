"""Observers against loops over single values, written from their definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pocketvlm.export import observers, prepare
from pocketvlm.export.observers import BINS, METHODS, RATIOS, TAIL, Histogram, range_of
from pocketvlm.export.ranges import histograms, step_of, steps_by


def shapes() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    heavy = rng.laplace(size=20000)
    return {
        "heavy tails": heavy,
        "after a ReLU": np.maximum(heavy, 0),
        "mostly negative": -np.abs(heavy) + 0.3,
        "one loud value": np.append(rng.normal(size=4000), 90.0),
        "even": rng.uniform(-1, 2, 5000),
    }


def seen(values: Any) -> Histogram:
    """Every value moved to the middle of its bin, so that nothing is lost by counting."""
    counts, _ = np.histogram(values, BINS, (values.min(), values.max()))
    return Histogram(float(values.min()), float(values.max()), counts.astype(np.int64))


def expanded(histogram: Histogram) -> list[float]:
    width = (histogram.high - histogram.low) / BINS
    return [histogram.low + (i + 0.5) * width for i, count in enumerate(histogram.counts) for _ in range(count)]


def cuts(histogram: Histogram) -> list[tuple[float, float]]:
    reach = max(abs(histogram.low), abs(histogram.high))
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    return [(max(low, -ratio * reach), min(high, ratio * reach)) for ratio in RATIOS]


def level(value: float, low: float, high: float) -> tuple[int, float]:
    """The step of 0..255 and the value that it stands for."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    step = min(max(round(value / scale) + zero, 0), 255)
    return step, (step - zero) * scale


@pytest.mark.parametrize("name", list(shapes()))
def test_mse_against_a_loop_over_values(name: str) -> None:
    histogram = seen(shapes()[name])
    values, counts = np.unique(expanded(histogram), return_counts=True)
    errors = []
    for low, high in cuts(histogram):
        errors.append(sum(n * (v - level(v, low, high)[1]) ** 2 for v, n in zip(values.tolist(), counts.tolist())))
    found = range_of(histogram, "mse")
    assert found == pytest.approx(cuts(histogram)[int(np.argmin(errors))])
    assert min(errors) <= errors[0]
    if name == "heavy tails":
        assert found[1] < histogram.high, "it cuts at all"


@pytest.mark.parametrize("name", list(shapes()))
def test_entropy_against_a_loop_over_bins(name: str) -> None:
    histogram = seen(shapes()[name])
    width = (histogram.high - histogram.low) / BINS
    centres = [histogram.low + (i + 0.5) * width for i in range(BINS)]
    kept = [0 if abs(c) <= width / 2 * 1.0001 else int(n) for c, n in zip(centres, histogram.counts)]
    divergences = []
    for low, high in cuts(histogram):
        inside = [i for i in range(BINS) if low <= centres[i] <= high]
        target = {i: float(kept[i]) for i in inside}
        for i in range(BINS):
            if i < inside[0]:
                target[inside[0]] += float(kept[i])
            elif i > inside[-1]:
                target[inside[-1]] += float(kept[i])
        groups: dict[int, list[int]] = {}
        for i in inside:
            groups.setdefault(level(centres[i], low, high)[0], []).append(i)
        own = sum(float(kept[i]) for i in inside)
        total, divergence = sum(target.values()), 0.0
        for members in groups.values():
            filled = [i for i in members if target[i] > 0]
            for i in filled:
                q = sum(float(kept[j]) for j in members) / len(filled) / own
                divergence += target[i] / total * math.log(target[i] / total / max(q, 1e-12))
        divergences.append(divergence)
    assert range_of(histogram, "entropy") == pytest.approx(cuts(histogram)[int(np.argmin(divergences))])


@pytest.mark.parametrize("name", list(shapes()))
def test_percentile_leaves_a_ten_thousandth_on_either_side(name: str) -> None:
    values = shapes()[name]
    low, high = range_of(seen(values), "percentile")
    width = (values.max() - values.min()) / BINS
    assert low <= 0 <= high
    assert (values < low - width).mean() <= TAIL
    assert (values > high + width).mean() <= TAIL
    ordered, at = np.sort(values), int(TAIL * len(values))
    assert low <= min(ordered[at + 1], 0) + 2 * width
    assert low >= min(ordered[max(at - 1, 0)], 0) - 2 * width
    assert high >= max(ordered[-at - 2], 0) - 2 * width
    assert high <= max(ordered[min(-at, -1)], 0) + 2 * width


def test_minmax_is_the_whole_range_and_every_range_holds_zero() -> None:
    for values in shapes().values():
        histogram = seen(values)
        assert range_of(histogram, "minmax") == (min(values.min(), 0), max(values.max(), 0))
        for method in METHODS:
            low, high = range_of(histogram, method)
            assert low <= 0 <= high
            assert high - low > 0
    constant = Histogram(3.0, 3.0, np.zeros(BINS, np.int64))
    assert {range_of(constant, method) for method in METHODS} == {(0.0, 3.0)}


def test_a_step_holds_zero_and_the_ends() -> None:
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0)):
        step = step_of(low, high)
        least, most = -step.zero * step.scale, (255 - step.zero) * step.scale
        assert 0 <= step.zero <= 255
        assert least == pytest.approx(min(low, 0.0), abs=step.scale)
        assert most == pytest.approx(max(high, 0.0), abs=step.scale + 2**-8)


def test_histograms_count_every_value_of_every_batch() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).eval().requires_grad_(False)
    rows = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    graph = prepare.capture(module, rows)
    names = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    found = histograms(graph, rows, names)
    with torch.no_grad():
        first = module[0](torch.from_numpy(rows))
        values = {names[0]: first, names[1]: first.relu(), names[2]: module[2](first.relu())}
    for name, value in values.items():
        counts, _ = np.histogram(value.numpy(), BINS, (value.min().item(), value.max().item()))
        assert found[name].low == pytest.approx(value.min().item())
        assert found[name].high == pytest.approx(value.max().item())
        assert found[name].counts.sum() == value.numel()
        assert np.abs(found[name].counts - counts).sum() <= 4, "a value on an edge may fall to either side"
    assert set(steps_by(found, "minmax")) == set(names)
    assert observers.BINS == BINS
