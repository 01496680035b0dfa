"""`benchmarks.elastic`: what differs between arms, how runs are pooled, and that the page is the committed result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ablation, elastic, elastic_summary
from benchmarks.elastic import ARMS, DIMS, FULL, arm_named, cut, job_of, recipe_for
from pocketvlm.distill.asymmetric import WAYS
from pocketvlm.distill.questions import Embedded
from pocketvlm.edge.errors import UnknownNameError

ROOT = Path(__file__).resolve().parents[1]
ASKED = 20


def _row(arm: elastic.Elastic, protocol: str, fold: int, found: dict[str, int], others: int = 12) -> dict[str, Any]:
    """A made-up result: of 20 queries each way, `found` says how many a view answers."""
    job = job_of(arm, protocol, fold, 0)
    views = [str(m) for m in DIMS if arm.width == FULL] or [str(arm.width)]
    views += [f"{m}@{elastic.TURNED}" for m in DIMS if arm.name == "plain"]
    views += [f"1x{m}" for m in elastic.EXIT_DIMS if arm.name in ("plain", "starbucks")]
    mixed = list(WAYS) if arm.width == FULL and arm.axes == "own" else []
    digits = {view: "1" * (n := found.get(view, others)) + "0" * (ASKED - n) for view in [*views, *mixed]}
    return {
        "arm": arm.name, "protocol": protocol, "fold": fold, "seed": 0, "digest": job.digest, "device": "toy",
        "hits": {
            view: dict.fromkeys(elastic.ACROSS if view in mixed else elastic_summary.DIRECTIONS, text)
            for view, text in digits.items()
        },
        "queries": f"q{fold}", "step_ms": 10.0,
        "concepts": {way: [f"c{fold}-{place // 2}" for place in range(ASKED)] for way in elastic.ACROSS},
    }  # fmt: skip


def test_arms_differ_in_losses_width_and_coordinates_alone() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)
    base = recipe_for(arm_named("plain"), "few", 2, 1)
    assert [(spec.name, spec.weight) for spec in base.objectives] == [("clip", 1.0), ("feature", 13.0)]
    for arm in ARMS:
        own = recipe_for(arm, "few", 2, 1)
        for part in ("data", "views", "teacher", "train", "eval"):
            assert getattr(own, part) == getattr(base, part), arm.name
        assert own.student.embed_dim == arm.width
        if arm.name not in ("icl", "cross-kd"):
            inner = [spec.options.get("inner", {}).get("name", spec.name) for spec in own.objectives]
            assert list(zip(inner, [spec.weight for spec in own.objectives])) == [("clip", 1.0), ("feature", 13.0)]
    assert len({job_of(arm, "few", 1, 0).digest for arm in ARMS}) == len(ARMS)
    with pytest.raises(UnknownNameError, match="mrl-principal"):
        arm_named("mrl-principle")


def test_a_cut_is_of_the_turned_embedding() -> None:
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(3, 6)).astype(np.float32), rng.normal(size=(2, 6)).astype(np.float32)
    embedded = Embedded("toy", "", ["a", "b", "c"], images, texts)
    assert np.allclose(cut(embedded, 4).images, images[:, :4])
    turn = elastic.torch.linalg.qr(elastic.torch.from_numpy(rng.normal(size=(6, 6)))).Q
    assert np.allclose(cut(embedded, 2, turn).texts, texts @ turn.numpy()[:, :2], atol=1e-6)


def test_the_summary_pools_and_holds_the_floors_against_the_best(tmp_path: Path) -> None:
    results = ablation.Results(tmp_path, "runs")
    answered = {"32": 10, "64": 11}
    for fold in (1, 2):
        plain = {"32": 4, "64": 5, "384": 12, "model_query_teacher_gallery": 9}
        results.keep(_row(arm_named("plain"), "few", fold, plain))
        results.keep(_row(arm_named("mrl-principal"), "few", fold, answered))
        results.keep(_row(arm_named("starbucks"), "few", fold, {"1x64": 9, "1x384": 11}))
        results.keep(_row(arm_named("one-layer-64"), "few", fold, {"64": 10}))
        results.keep(_row(arm_named("icl"), "few", fold, {"model_query_teacher_gallery": 13}))
        for m in DIMS[:-1]:
            results.keep(_row(arm_named(f"principal-{m}"), "few", fold, {}, others=12 if m == 32 else 11))
            results.keep(_row(arm_named(f"prefix-{m}"), "few", fold, {}, others=6))
    results.keep(_row(arm_named("mrl"), "few", 1, answered))
    elastic_summary.summarise(tmp_path)
    part = json.loads((tmp_path / "elastic.json").read_text())["protocols"]["few"]
    assert part["incomplete"] == ["mrl"]
    own = part["elastic"]["mrl-principal"]
    assert own["widths"]["64"]["kept"] == pytest.approx(100 * 11 / 12, abs=0.05)
    assert own["floor_kept"] == {"value": 91.7, "met": False}
    assert own["widths"]["32"]["best_separate"] == "principal-32"
    assert own["widths"]["32"]["to_separate"]["difference"] == -10.0
    assert own["widths"]["32"]["to_separate"]["low"] < -10.0 < own["widths"]["32"]["to_separate"]["high"]
    assert own["widths"]["32"]["to_cut"]["difference"] == 30.0
    assert own["floor_within"] == {"value": -10.0, "widths": len(DIMS), "met": False}
    gaps = part["asymmetric"]["icl"]["model_query_teacher_gallery"]["image_to_image"]
    assert gaps["to_plain"]["difference"] == 20.0
    assert gaps["to_student"]["difference"] == 5.0
    assert part["exits"]["1 x 64"]["to_separate"]["difference"] == -5.0
    assert part["exits"]["1 x 384"]["kept"] == pytest.approx(91.7)
    assert "separate" not in part["exits"]["1 x 128"]
    assert part["exits"]["2 x 64"]["separate"] == "principal-64"
    page = (tmp_path / "elastic.md").read_text()
    assert "| 32 | 50.0 | 83 % | 60.0 (principal) | -10.0 (" in page
    assert "At 64 numbers 91.7 % of full width (wanted: 92 %): **missed**." in page
    assert "| student, teacher | 45.0 / 45.0 / 45.0 | 65.0 / 65.0 / 65.0 |" in page
    assert "| `icl` | `plain` | +20.0 (" in page
    assert "| 1 × 64 | 45.0 | 75 % | 50.0 | -5.0 (" in page
    assert "Unfinished, so not shown: mrl." in page


def test_the_page_is_the_committed_result() -> None:
    """docs/elastic.md quotes benchmarks/results/elastic.json, which is of the committed runs and of today's arms."""
    runs = ROOT / "benchmarks" / "results" / "elastic"
    found = elastic_summary.summary_of(runs)
    assert elastic_summary.DOC.read_text() == elastic_summary.page(found)
    if not found["protocols"]:
        assert elastic_summary.NOTHING in elastic_summary.DOC.read_text()
        return
    assert json.loads((ROOT / "benchmarks" / "results" / "elastic.json").read_text()) == found
    rows = [row for row in ablation.read_rows(runs / "runs.jsonl") if "digest" in row]
    for row in rows:
        job = job_of(arm_named(row["arm"]), row["protocol"], row["fold"], row["seed"])
        assert job.digest == row["digest"], row["arm"]
