"""What a sweep over visual tokens found, as rows of a table, as JSON and as a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pocketvlm
from pocketvlm.distill.vlm.sweep import Point
from pocketvlm.edge.errors import require

JSON_FILE, PLOT = "tokens.json", "tokens"
SCHEMA_VERSION = "1.0"
_COLOURS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")


def rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row for each point; speed-ups are over the first, which has all tokens."""
    first = points[0]
    return [
        {
            "method": point.name,
            "keep": point.keep,
            "tokens a layer": f"{point.mean_tokens:.1f}",
            "accuracy": f"{point.accuracy:.3f}",
            "of all tokens": f"{point.kept:.1%} ({point.interval[0]:.1%} to {point.interval[1]:.1%})",
            "GFLOPs": f"{point.flops['decoder'] / 1e9:.2f}",
            "with picture": f"{point.flops['whole'] / 1e9:.2f}",
            "ms": f"{point.ms['decoder']:.1f}",
            "faster": f"{first.ms['decoder'] / point.ms['decoder']:.2f}x",
            "whole ms": f"{point.ms['whole']:.1f}",
            "whole faster": f"{first.ms['whole'] / point.ms['whole']:.2f}x",
        }
        for point in points
    ]


def as_dict(points: Sequence[Point], facts: dict[str, Any]) -> dict[str, Any]:
    """Everything, in plain JSON types."""
    head = {"schema_version": SCHEMA_VERSION, "kit_version": pocketvlm.__version__}
    return head | facts | {"points": [point.to_dict() for point in points]}


def save_report(points: Sequence[Point], facts: dict[str, Any], out: Path) -> None:
    """tokens.json, tokens.png and tokens.svg in `out`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "distill")
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON_FILE).write_text(json.dumps(as_dict(points, facts), indent=1) + "\n", encoding="utf-8")
    title = f"{facts.get('model', 'model')}, {facts.get('pool', '')} pool".strip()
    plot(points, [out / f"{PLOT}.png", out / f"{PLOT}.svg"], title)


def plot(points: Sequence[Point], paths: Sequence[Path], title: str) -> None:
    """Accuracy, and operations of the decoder's prefill, against visual tokens a layer; a line for each method."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, flops = figure.subplots(1, 2)
    first, names = points[0], list(dict.fromkeys(point.name for point in points[1:]))
    for place, name in enumerate(names):
        line = sorted((point for point in points if point.name == name), key=lambda point: point.mean_tokens)
        style = {"color": _COLOURS[place % len(_COLOURS)], "marker": "os^Dv"[place % 5], "markersize": 5, "label": name}
        accuracy.plot([one.mean_tokens for one in line], [one.accuracy for one in line], **style)
        flops.plot([one.mean_tokens for one in line], [one.flops["decoder"] / 1e9 for one in line], **style)
    for axes, value, label in (
        (accuracy, first.accuracy, "accuracy of short answers"),
        (flops, first.flops["decoder"] / 1e9, "GFLOPs of the decoder's prefill"),
    ):
        axes.axhline(value, color="#999999", linewidth=0.8, linestyle="--")
        axes.plot([first.mean_tokens], [value], "k*", markersize=11, label=first.name)
        axes.set_xlabel("visual tokens a decoder layer, mean")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    accuracy.axhline(0.95 * first.accuracy, color="#cc3333", linewidth=0.8, linestyle=":", label="95 % of all tokens'")
    accuracy.legend(fontsize=8)
    figure.suptitle(title, fontsize=12)
    with matplotlib.rc_context({"svg.hashsalt": "pocketvlm"}):
        for path in paths:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
