"""Similarity matrices in blocks: the same values and gradients as the whole matrix, and none of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from objective_toys import OTHER, B, build, outputs, total
from test_objectives import CASES
from test_objectives_relation import CASES as RELATIONS

from pocketvlm.distill.objectives import Outputs, Widths, build_objective, objective_needs
from pocketvlm.distill.objectives.blocks import (
    Matches,
    Similarity,
    Taught,
    shared_rows,
    similarity_bytes,
    softmax_loss,
    summed_rows,
)
from pocketvlm.distill.objectives.contrastive import info_nce

# what holds its matrices, or has none
HELD = {"gradient", "rkd", "feature", "hint", "rafa", "vl2v", "masked-feature", "token-gram", "token-alignment"}
FOUND = [case for case in (*CASES, *RELATIONS) if case[0] not in HELD]
blocked_cases = pytest.mark.parametrize(
    ("name", "oracle", "options"), FOUND, ids=[f"{name}-{options}" for name, _, options in FOUND]
)
ROW = 8 * (B - 1)  # bytes of one row of the captioned rows' matrix in float64


def gradients(objective, student: Outputs, teacher: Outputs, *limits: int) -> dict[str, torch.Tensor]:
    """With the limits (default: those of every day) around the forward alone, as in the loop."""
    with similarity_bytes(*limits) if limits else nullcontext():
        value = total(objective, student, teacher)
    leaves = {name: getattr(student, name) for name in ("image", "text", "bank", "logit_scale", "logit_bias")}
    leaves |= dict(objective.named_parameters())
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {"value": value.detach(), **{k: g for k, g in zip(leaves, found) if g is not None}}


@blocked_cases
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_blocks_equal_the_loop_oracle(name, oracle, options, rows):
    objective, student, teacher = build(name, **options).double(), outputs(1), outputs(2)
    with similarity_bytes(0, rows * ROW):
        value = float(total(objective, student, teacher).detach())
    assert value == pytest.approx(oracle(objective, student, teacher), rel=1e-10)


@blocked_cases
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_blocks_have_the_gradients_of_the_whole_matrix(name, oracle, options, rows):
    widths = None if "widths" in options or objective_needs(name, options).momentum else OTHER
    objective = (build(name, **options) if widths is None else build(name, widths, **options)).double()
    dims = {} if widths is None else {"dim": OTHER.embedding, "features": OTHER.image_features}
    student, teacher = outputs(1, grad=True), outputs(2, **dims)
    whole = gradients(objective, student, teacher)
    blocks = gradients(objective, student, teacher, 0, rows * ROW)
    assert blocks.keys() == whole.keys()
    for part, wanted in whole.items():
        # sums of 25 products of size one in another order, twice
        torch.testing.assert_close(blocks[part], wanted, rtol=1e-11, atol=1e-13, msg=part)


@pytest.mark.parametrize("duplicates", ["ignore", "positives", "negatives"])
@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("group", [[0, 0, 0, 0, 0, 0, 0], [2, 1, 2, 1, 0, 2, 4], None])
def test_matches_of_any_groups(group, both_ways, duplicates):
    """A whole batch of one group leaves a column nothing but its own row, in whichever block that is."""
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(7, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    given = None if group is None else torch.tensor(group)
    logits = scale * queries @ keys.T
    wanted = info_nce(logits, given, duplicates)
    if both_ways:
        wanted = (wanted + info_nce(logits.T, given, duplicates)) / 2
    with similarity_bytes(0, 3 * 7 * 8):
        found = softmax_loss(Similarity(queries, keys, scale), Matches(given, duplicates), both_ways=both_ways)
    torch.testing.assert_close(found, wanted)
    leaves = (queries, keys, scale)
    for ours, theirs in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_large_logits_do_not_overflow():
    """exp(400) is no float32; whichever block holds a column's largest logit, the loss is a difference of logits."""
    axes = torch.eye(6)
    swapped = axes[[1, 0, 3, 2, 5, 4]]
    with similarity_bytes(0, 2 * 6 * 4):
        right = softmax_loss(Similarity(axes, axes, 400.0), Matches(None, "ignore"), both_ways=True)
        wrong = softmax_loss(Similarity(axes, swapped, 400.0), Matches(None, "ignore"), both_ways=True)
        taught = Taught(Similarity(axes, axes, 400.0), entropy=True)
        apart = softmax_loss(Similarity(axes, swapped, 400.0), taught, both_ways=True)
    assert (float(right), float(wrong), float(apart)) == pytest.approx((0.0, 400.0, 400.0), abs=1e-4)


def test_nothing_is_sent_to_keys_that_are_not_trained():
    queries, keys = torch.eye(4).requires_grad_(), torch.eye(4)
    with similarity_bytes(0, 4 * 4):
        softmax_loss(Similarity(queries, keys, 2.0), Matches(None, "ignore"), both_ways=False).backward()
    assert keys.grad is None
    assert queries.grad.abs().sum() > 0


def test_small_matrices_stay_whole_and_the_limit_comes_back():
    student = outputs(1)
    plain = build("clip")(student=student)["clip"]
    keep = student.has_text
    v, s = (torch.nn.functional.normalize(part[keep], dim=-1) for part in (student.image, student.text))
    logits = student.logit_scale * v @ s.T
    group = student.group[keep]
    assert torch.equal(plain, (info_nce(logits, group, "ignore") + info_nce(logits.T, group, "ignore")) / 2)
    small = Similarity(v, s, 1.0)
    assert small.held
    with similarity_bytes(0, ROW):
        assert not small.held
        assert [span.stop - span.start for span in small.spans()] == [1] * len(v)
    assert small.held
    assert Similarity(torch.zeros(4096, 1), torch.zeros(4096, 1), 1.0).held
    assert not Similarity(torch.zeros(4097, 1), torch.zeros(4097, 1), 1.0).held


@pytest.mark.parametrize("full", [0, 1 << 20])
def test_a_rank_without_a_row_has_its_share_in_the_sum(full, monkeypatch):
    """Three rows over four ranks, which are played one after the other: nobody answers when a sum is joined."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    queries, keys = (torch.randn(3, 2, dtype=torch.float64).requires_grad_() for _ in range(2))

    def mean_square(block: torch.Tensor, rows: slice) -> torch.Tensor:
        return len(block) * block.square().mean()  # no number over no row

    wanted = summed_rows(mean_square, Similarity(queries, keys, 2.0))
    slope = torch.autograd.grad(wanted, [queries, keys])
    parts, slopes = [], []
    for rank in range(4):
        with shared_rows(rank, 4, 0), similarity_bytes(full):
            parts.append(summed_rows(mean_square, Similarity(queries, keys, 2.0)))
        slopes.append(torch.autograd.grad(parts[-1], [queries, keys], allow_unused=True))
    assert 0.0 in [float(part.detach()) for part in parts]
    torch.testing.assert_close(torch.stack(parts).sum(), wanted)
    for place in range(2):
        found = [torch.zeros_like(slope[place]) if one[place] is None else one[place] for one in slopes]
        torch.testing.assert_close(torch.stack(found).mean(dim=0), slope[place])
    assert all(one[0] is not None for one in slopes)  # or that rank would stay away from the gather's backward


def test_in_float32_the_blocks_are_as_near_to_float64_as_the_whole_matrix():
    g = torch.Generator().manual_seed(0)
    image, text, theirs = (torch.randn(300, 16, generator=g) for _ in range(3))

    def loss(name: str, dtype: torch.dtype, blocks: bool) -> float:
        objective = build_objective(name, student=Widths(16), teacher=Widths(16))
        student = Outputs(image.to(dtype), text.to(dtype), logit_scale=torch.tensor(80.0, dtype=dtype))
        teacher = Outputs(theirs.to(dtype), text.to(dtype), logit_scale=torch.tensor(90.0, dtype=dtype))
        given = teacher if objective.needs.targets else None
        with similarity_bytes(0 if blocks else 1 << 30, 300 * 4 * 7):
            return float(sum(objective(student=student, teacher=given).values()))

    for name in ("clip", "crd"):
        exact = loss(name, torch.float64, False)
        for blocks in (True, False):
            # values near 10 are differences of log-sum-exps near 90, of 1e-5 each in float32, averaged over 300 rows
            assert loss(name, torch.float32, blocks) == pytest.approx(exact, rel=1e-6)


def test_a_step_at_4096_takes_little_memory():
    """A fresh process, so that its peak is its own. With the whole matrix the step takes 550 MiB and more."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "benchmarks.contrastive_memory", "--rows", "4096", "--limit-mib", "4"]
    found = subprocess.run(
        [*command, "--case", "clip", "--arm", "blocks"], cwd=root, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    row = json.loads(found.stdout.splitlines()[-1])
    # one matrix alone would be 64 MiB; embeddings and their gradients are 4096 x 384 x 4 = 6 MiB each, ten of these
    assert row["step_bytes"] < 110 << 20
