"""What the summary of `benchmarks.ablation` compares: arms over pooled queries, and with what CLIP-KD published."""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketvlm.distill.metrics import paired_bootstrap

DIRECTIONS = {"image_to_text": "picture → text", "text_to_image": "text → picture"}
PUBLISHED = {"clip-kd": 4.35, "feature": 3.7, "icl": 2.6, "crd": 1.4, "gradient": 1.0, "afd": 0.9}
"""CLIP-KD (2307.12732): points of ImageNet zero-shot top-1 over a base of 30.55, ViT-B/16 into ViT-T/16, CC15M."""
PAIRS = (("clip-kd", "feature"), ("feature", "icl"), ("icl", "crd"))

Row = dict[str, Any]


def pooled(own: list[Row], base: list[Row], concepts: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": len(own), "diverged": sum("diverged" in row for row in own)}
    result |= {"r": own[0]["ratio"], "scale": own[0]["scale"], "objectives": own[0].get("objectives")}
    for name, directions in {**{one: [one] for one in DIRECTIONS}, "both": [*DIRECTIONS]}.items():
        ours, theirs, groups = [], [], []
        for mine, other in zip(own, base):
            assert mine.get("queries", other["queries"]) == other["queries"], "the arms answered the same queries"
            for direction in directions:
                hits = np.array(other["ranks"][direction]) <= 5
                theirs.append(hits)
                # a student that diverged finds nothing
                ours.append(np.array(mine["ranks"][direction]) <= 5 if "ranks" in mine else np.zeros_like(hits))
                groups += concepts[other["queries"]][direction]
        interval = paired_bootstrap(np.concatenate(ours), np.concatenate(theirs), clusters=groups).to_dict()
        result[name] = {"R@5": percent(interval["a"])}
        result[name] |= {key: percent(interval[key]) for key in ("difference", "low", "high")}
    costs = [mine["step_ms"] / other["step_ms"] for mine, other in zip(own, base) if "step_ms" in mine]
    result["step_cost"] = round(float(np.median(costs)), 3) if costs else None
    result["step_ms"] = (
        round(float(np.median([row["step_ms"] for row in own if "step_ms" in row])), 2) if costs else None
    )
    return result


def percent(value: float) -> float:
    return round(100 * float(value), 2)


def published(arms: dict[str, Any], runs: dict[str, list[Row]], concepts: dict[str, Any]) -> list[dict[str, Any]]:
    """CLIP-KD's statements, and whether these runs agree: the mean difference over both directions and its interval.

    runs: of each arm, in one order of folds and seeds.
    """
    said = [
        (f"{name} > 0", points, arms[name]["both"])
        for name, points in PUBLISHED.items()
        if name in arms and not arms[name]["diverged"]
    ]
    for more, less in PAIRS:
        if more in arms and less in arms:
            points = round(PUBLISHED[more] - PUBLISHED[less], 2)
            said.append((f"{more} > {less}", points, pooled(runs[more], runs[less], concepts)["both"]))
    return [
        {"statement": statement, "published": points, "here": both["difference"]}
        | {"low": both["low"], "high": both["high"]}
        | {"agrees": "yes" if both["low"] > 0 else "no" if both["high"] < 0 else "undecided"}
        for statement, points, both in said
    ]
