"""Fewer visual tokens: each function against loops over plain numbers, in float64, and as an exported graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm.reduce import (
    cls_scores,
    distinct_scores,
    energies,
    keep_rows,
    keep_top,
    kept,
    layer_scores,
    merge_similar,
    pool_grid,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


@pytest.mark.parametrize("prefix", [1, 5])
def test_class_token_scores_are_head_means_of_its_row(prefix: int) -> None:
    layers = [_random(2, 3, prefix + 4, prefix + 4, seed=layer).softmax(-1) for layer in range(5)]
    for batch in range(2):
        for token in range(4):
            seen = [sum(float(a[batch, head, 0, prefix + token]) for head in range(3)) / 3 for a in layers]
            assert float(cls_scores(layers[1], prefix)[batch, token]) == pytest.approx(seen[1])
            # layers 2 and 3 of 0..4: the last is never one of them
            assert float(layer_scores(layers, 2, prefix)[batch, token]) == pytest.approx(seen[2] + seen[3])
    for start in (-1, 4):
        with pytest.raises(UsageError, match="which is no layer"):
            layer_scores(layers, start)


def test_distinct_tokens_are_those_unlike_the_mean() -> None:
    tokens = _random(2, 6, 4)
    for batch in range(2):
        rows = tokens[batch].tolist()
        mean = [sum(row[c] for row in rows) / 6 for c in range(4)]
        for token, row in enumerate(rows):
            assert float(distinct_scores(tokens)[batch, token]) == pytest.approx(1 - _cosine(row, mean))


def test_the_best_stay_in_reading_order() -> None:
    scores = _random(3, 9)
    for batch in range(3):
        values = scores[batch].tolist()
        best = sorted(sorted(range(9), key=lambda i: -values[i])[:4])
        assert keep_top(scores, 4)[batch].tolist() == best
        means = [sum(values[3 * row : 3 * row + 3]) / 3 for row in range(3)]
        rows = sorted(sorted(range(3), key=lambda row: -means[row])[:2])
        assert keep_rows(scores, 2)[batch].tolist() == [3 * row + column for row in rows for column in range(3)]
    tokens = _random(3, 9, 5, seed=1)
    places = keep_top(scores, 4)
    for batch in range(3):
        assert torch.equal(kept(tokens, places)[batch], tokens[batch][places[batch]])
    assert torch.equal(keep_top(scores, 9), torch.arange(9).expand(3, -1))
    with pytest.raises(UsageError, match="no square grid"):
        keep_rows(scores[:, :8], 1)
    for number in (0, 10):
        with pytest.raises(UsageError, match="leaves nothing to do"):
            keep_top(scores, number)
    with pytest.raises(UsageError, match="4 rows of at most 3"):
        keep_rows(scores, 4)


def _merged(
    tokens: list[list[float]], features: list[list[float]], remove: int, margin: float, sizes: list[float]
) -> tuple[list[list[float]], list[float], list[int]]:
    """PiToMe on one picture, by its definition."""
    count = len(tokens)
    energy = []
    for i in range(count):
        total = 0.0
        for j in range(count):
            x = _cosine(features[i], features[j]) - margin
            total += x if x > 0 else math.exp(x) - 1
        energy.append(total / count)
    order = sorted(range(count), key=lambda i: -energy[i])
    members = {i: [i] for i in order[2 * remove :]}
    receiving = [order[k] for k in range(1, 2 * remove, 2)]
    members |= {b: [b] for b in receiving}
    for k in range(0, 2 * remove, 2):
        best = max(receiving, key=lambda b: _cosine(features[order[k]], features[b]))
        members[best].append(order[k])
    places = sorted(members)
    new_sizes = [sum(sizes[i] for i in members[place]) for place in places]
    new = [
        [sum(sizes[i] * tokens[i][c] for i in members[place]) / size for c in range(len(tokens[0]))]
        for place, size in zip(places, new_sizes)
    ]
    return new, new_sizes, places


@pytest.mark.parametrize("remove", [1, 3, 5])
@pytest.mark.parametrize("margin", [0.9, 0.1])
def test_merging_is_pitome_by_its_definition(remove: int, margin: float) -> None:
    tokens, features = _random(3, 10, 4), _random(3, 10, 6, seed=1)
    sizes = _random(3, 10, seed=2).abs() + 1
    found, found_sizes, places = merge_similar(tokens, features, remove, margin=margin, sizes=sizes)
    assert found.shape == (3, 10 - remove, 4)
    for batch in range(3):
        parts = (tokens[batch].tolist(), features[batch].tolist(), remove, margin, sizes[batch].tolist())
        expected, expected_sizes, expected_places = _merged(*parts)
        assert places[batch].tolist() == expected_places
        torch.testing.assert_close(found[batch], torch.tensor(expected, dtype=torch.float64))
        torch.testing.assert_close(found_sizes[batch], torch.tensor(expected_sizes, dtype=torch.float64))
    # nothing is lost: the sum of what tokens stand for stays
    torch.testing.assert_close((found * found_sizes[..., None]).sum(1), (tokens * sizes[..., None]).sum(1))


def test_tokens_of_which_there_are_many_are_merged_and_single_ones_protected() -> None:
    ground, thing = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    features = torch.stack([ground, ground, thing, ground, ground])[None]
    assert int(energies(features, 0.5)[0].argmin()) == 2
    tokens, sizes, places = merge_similar(features, features, 2)
    single = places[0].tolist().index(2)
    assert torch.equal(tokens[0, single], thing)
    assert (sizes[0, single], sizes.sum()) == (1, 5)
    for remove in (0, 3):
        with pytest.raises(UsageError, match="tokens to merge"):
            merge_similar(features, features, remove)


def test_pooling_takes_the_mean_of_each_cell() -> None:
    tokens = _random(2, 36, 3)
    for side in (1, 2, 3, 6):
        found, cell = pool_grid(tokens, side), 6 // side
        assert found.shape == (2, side**2, 3)
        for place in range(side**2):
            row, column = divmod(place, side)
            inside = [
                6 * r + c
                for r in range(row * cell, (row + 1) * cell)
                for c in range(column * cell, (column + 1) * cell)
            ]
            torch.testing.assert_close(found[:, place], sum(tokens[:, i] for i in inside) / cell**2)
    for wrong, side in ((tokens, 4), (tokens, 0), (tokens[:, :30], 5)):
        with pytest.raises(UsageError, match="would differ in size"):
            pool_grid(wrong, side)


class _Reduce(nn.Module):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        merged, _, _ = merge_similar(tokens, tokens, 4)
        return kept(tokens, keep_top(distinct_scores(tokens), 5)), merged


def test_shapes_are_static_so_that_a_graph_can_be_captured() -> None:
    tokens = _random(2, 16, 8)
    program = torch.export.export(_Reduce(), (tokens,))
    other = _random(2, 16, 8, seed=5)
    for found, expected in zip(program.module()(other), _Reduce()(other)):
        assert torch.equal(found, expected)
