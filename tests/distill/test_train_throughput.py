"""The throughput benchmark: that both sides train one module, and how its numbers become floors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.train_throughput import ARMS, RATIOS, AsTheirs, summary
from pocketvlm.students import build_student, train_tokenizer


def test_both_sides_compute_the_same():
    student = build_student("mnv4-050", embed_dim=8, tokenizer_json=train_tokenizer(["a cat", "a dog"] * 9, 64), seed=0)
    student.eval()
    size = student.image_spec.size
    pixels = torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, 7], [8, 9, student.text_spec.pad_id]], dtype=torch.int32)
    with torch.no_grad():
        wanted = [student.encode_image(pixels).embedding, student.encode_text(ids).embedding]
        standard, scale = student.image_tower.standardised(pixels), float(student.logit_scale)
        model = AsTheirs(student)
        found = model(standard, ids)
    for name, embedding in zip(("image_features", "text_features"), wanted):
        torch.testing.assert_close(found[name], torch.nn.functional.normalize(embedding, dim=-1))
    assert float(found["logit_scale"]) == pytest.approx(scale)
    trained = {id(p) for p in model.parameters()} - {id(model.logit_scale)}
    assert trained == {id(p) for p in student.parameters()} - {id(student.log_scale)}


def test_ratios_are_held_to_their_floors():
    cpu = dict(zip(ARMS, (0.02, 0.04, 0.0205, 0.2, 0.25)))
    rounds = [{arm: {"cpu_s": value * k, "wall_s": 2 * value * k} for arm, value in cpu.items()} for k in (1, 3, 2)]
    found = summary(rounds)
    assert found["arms"]["ours"] == {"cpu_s_per_sample": 0.04, "samples_per_wall_s": 12.5}
    assert [row["median"] for row in found["ratios"].values()] == pytest.approx([1.025, 2.0, 1.25, 12.195])
    assert all(row["holds"] for row in found["ratios"].values())
    slow = [{arm: {"cpu_s": 1.0, "wall_s": 1.0} for arm in ARMS}]
    holds = [row["holds"] for row in summary(slow)["ratios"].values()]
    assert holds == [kind == "at most" for _, _, kind, _ in RATIOS.values()]
    assert list(summary([{"ours": {"cpu_s": 1.0, "wall_s": 1.0}}])["ratios"]) == []


def test_the_page_shows_the_committed_result():
    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks" / "results" / "train_throughput.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "throughput.md").read_text(encoding="utf-8")
    assert {"arms": result["arms"], "ratios": result["ratios"]} == summary(result["rounds"])
    for row in result["ratios"].values():
        assert f"| {row['median']:.2f} | {row['lowest']:.2f} to {row['highest']:.2f} |" in page
    for arm, row in result["arms"].items():
        assert f"| {arm} | {1e3 * row['cpu_s_per_sample']:.1f} | {row['samples_per_wall_s']:.1f} |" in page
