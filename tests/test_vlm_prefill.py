"""What the prefill benchmark counts and times, on models of a few thousand weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vlm_prefill
from pocketvlm.students.vlm import build_vlm
from pocketvlm.students.vlm.config import VlmConfig

_spec = importlib.util.spec_from_file_location("vlm_toys", Path(__file__).parent / "distill" / "vlm_toys.py")
assert _spec
assert _spec.loader
toys: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toys)


def made(width: int = 32) -> Any:
    config = {
        "name": "toy",
        "vision": {
            "backbone": "vit_tiny_patch16_224",
            "size": 64,
            "backbone_args": {"depth": 1, "embed_dim": 32, "num_heads": 2},
        },
        "connector_hidden": 16,
        "decoder": {"width": width, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 64},
    }
    return build_vlm(VlmConfig.model_validate(config), toys.TOKENIZER).eval()


def test_longer_questions_leave_less_to_gain() -> None:
    ratios = list(vlm_prefill.flops_by_text(made(), (1, 9, 40)).values())
    assert ratios == sorted(ratios, reverse=True)
    # sixteen tokens against four, and what both have
    assert 1 < ratios[-1] < ratios[0] < 17 / 5 + 1
    shares = vlm_prefill.operators(made(), 2)
    assert [row["tokens"] for row in shares] == [16, 4]
    assert all(0 < row["products"] + row["attention"] < 1 for row in shares)


def test_decoders_and_drafts_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm_prefill, "PRECISIONS", ("fp32",))
    prefills, steps = vlm_prefill.decoders(made(), tmp_path, 2)
    assert [row["tokens"] for row in prefills] == [16, 4]
    assert [row["at_once"] for row in steps] == [1, 2, 4, 8]
    assert prefills[0]["times_faster_cpu"] == steps[0]["times_faster"] == 1
    drafts = vlm_prefill.drafting(made(16), tmp_path, 2)
    assert set(drafts["fp32"]) == {"picture", "prefill", "token"}
    rows = vlm_prefill.needed(steps, drafts, {"long": 1e6})
    assert [row["drafted"] for row in rows] == [1, 3, 7]


def test_the_acceptance_that_drafting_needs() -> None:
    # three drafted tokens at a tenth of a step each and a verification of 1.5 steps: 1.8 tokens a round
    least = vlm_prefill.acceptance_needed(100, 0, 1.8, 3)
    assert least is not None
    assert sum(least**power for power in range(4)) == pytest.approx(1.8, abs=0.05)
    begun = vlm_prefill.acceptance_needed(100, 10, 1.8, 3)
    assert begun is not None
    assert begun > least
    assert vlm_prefill.acceptance_needed(1.5, 3, 1.8, 3) is None


def test_lengths_are_of_questions_and_captions_apart() -> None:
    found = vlm_prefill.lengths(toys.PICTURES, made().tokenizer, 200)
    assert set(found) == {"captions", "questions"}
    assert found["captions"]["answer"] > found["questions"]["answer"] > 1
    assert all(row["longest"] >= row["answer"] for row in found.values())
