"""What `quantize` found as a table, as JSON and as a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pocketvlm
from pocketvlm.edge.errors import require
from pocketvlm.export.compare import finite
from pocketvlm.export.quantize_points import points

if TYPE_CHECKING:
    from pocketvlm.export.quantize import Quantized
    from pocketvlm.export.quantize_points import Point

JSON_FILE, PLOT = "quantize.json", "quantize"
SCHEMA_VERSION = "1.0"
_KINDS = {"fp32": "#555555", "int8": "#1f77b4", "mixed": "#d95f02"}
_OTHER = "#7570b3"
# a wider range than this is drawn in logarithms
_WIDE = 8.0
# width and height that a point's name takes, as shares of the axes
_NAME = (0.2, 0.05)


def as_dict(found: Quantized) -> dict[str, Any]:
    """Everything, in plain JSON types."""
    entries = []
    for point in found.points:
        entry = {key: value for key, value in asdict(point).items() if key not in ("changes", "recall")}
        entry["recall"] = {f"r@{k}": value for k, value in point.recall.items()}
        entry["changes"] = {f"r@{k}": asdict(change) for k, change in point.changes.items()}
        standing = _standing(found, point)
        entries.append(entry | {"budget": standing, "on_front": point.name in found.front})
    blocks = [{"tower": one.tower, "block": one.block, **one.to_dict()} for one in found.damages]
    content = {
        "schema_version": SCHEMA_VERSION, "kit_version": pocketvlm.__version__, "student": found.student, **found.facts,
        "chosen": found.chosen.name if found.chosen else None, "nearest": found.nearest.name, "points": entries,
        "blocks": blocks,
    }  # fmt: skip
    result: dict[str, Any] = finite(content)
    return result


def table(found: Quantized) -> str:
    """The points, smallest first, the blocks that cost the most, and the verdict, as lines of text."""
    head = ["point", "in float", "MB", "of fp32", "image ms", "text ms", "cos image", "cos text", "R@5", "at worst"]
    lines = [[*head, "margin noise", "budget", ""]]
    for point in sorted(found.points, key=lambda point: (bool(point.failed), point.mb)):
        if point.failed:
            lines.append([point.name, f"fails: {point.failed[:90]}"])
            continue
        change = point.changes[5]
        marks = [*(["front"] if point.name in found.front else []), *(["chosen"] if point == found.chosen else [])]
        lines.append(
            [
                point.name, str(point.kept or "-"), f"{point.mb:.2f}", f"{point.ratio:.3f}",
                *(f"{point.ms[tower]:.2f}" for tower in ("image", "text")),
                *(f"{point.cosine[tower]:.5f}" for tower in ("image", "text")),
                points(-change.loss), points(-change.bound), f"{point.margin_noise:.5f}",
                _standing(found, point), ", ".join(marks),
            ]
        )  # fmt: skip
    widths = [max(len(line[at]) for line in lines if len(line) > 2) for at in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([*rows, "", verdict(found)])


def _standing(found: Quantized, point: Point) -> str:
    if not found.judge.meets(point):
        return "missed"
    if found.judge.goal.kind != "recall":
        return "met"
    return "proved" if found.judge.proved(point) else "estimated"


def verdict(found: Quantized) -> str:
    """One or two sentences: what was judged how, and what came of it."""
    said = f"budget {found.judge.goal.text}, judged {found.judge.why}."
    if found.chosen is None:
        near = found.nearest
        return (
            f"{said}\nNo point meets it; the nearest is {near.name} with {found.judge.sentence(near)}, "
            f"{near.mb:.2f} MB: ask for that, or train on (quantization-aware, or a larger student)."
        )
    kept = [f"{tower} {block}" for tower, blocks in found.chosen.keep.items() for block in blocks]
    floats = f" In float: {', '.join(kept)}." if kept else ""
    return f"{said}\nChosen: {found.chosen.name}, {found.judge.sentence(found.chosen)}.{floats}"


def save_report(found: Quantized, out: Path) -> None:
    """quantize.json, quantize.png and quantize.svg in `out`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "distill")
    (out / JSON_FILE).write_text(json.dumps(as_dict(found), indent=1) + "\n", encoding="utf-8")
    plot(found, [out / f"{PLOT}.png", out / f"{PLOT}.svg"])


def plot(found: Quantized, paths: list[Path]) -> None:
    """Size and latency against accuracy, the front as a line, the chosen point ringed; and what each block costs."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    (size, time), (blocks, recall) = figure.subplots(2, 2)
    good = [point for point in found.points if not point.failed]
    _cloud(size, found, [(point.mb, point) for point in good], "MB of both files", "Size against accuracy")
    _cloud(
        time,
        found,
        [(point.total_ms, point) for point in good],
        "ms of processor time, one picture and one text",
        "Latency against accuracy",
    )
    _blocks(blocks, found)
    _recall(recall, found, good)
    figure.suptitle(f"{found.student}: budget {found.judge.goal.text}", fontsize=13)
    figure.supxlabel(f"{found.facts['validation']}; {found.facts['machine']['cpu']}", fontsize=8.5, color="#555")
    with matplotlib.rc_context({"svg.hashsalt": "pocketvlm"}):
        for path in paths:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def _colour(point: Point) -> str:
    return _KINDS.get(point.precision, _OTHER)


def _cloud(axes: Any, found: Quantized, places: list[tuple[float, Point]], label: str, title: str) -> None:
    """Lower left is better: the change of margins that a file makes, over what it takes."""
    front: list[tuple[float, float]] = []
    for x, point in sorted(places, key=lambda entry: (entry[0], entry[1].margin_noise)):
        if not front or point.margin_noise < front[-1][1]:
            front.append((x, point.margin_noise))
    axes.step(*zip(*front), where="post", color="#999999", linewidth=1.2, zorder=1)
    for x, point in places:
        axes.scatter(x, point.margin_noise, s=46, color=_colour(point), zorder=3)
        if point == found.chosen:
            axes.scatter(
                x, point.margin_noise, s=190, facecolors="none", edgecolors="#000000", linewidths=1.4, zorder=4
            )
    axes.set_xlabel(label)
    axes.set_ylabel("noise of the margin to the 5th place (cosine)")
    top = max(point.margin_noise for _, point in places) or 1.0
    axes.set_ylim(-0.07 * top, 1.17 * top)
    least, most = min(x for x, _ in places), max(x for x, _ in places)
    if least > 0 and most > _WIDE * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.3, most * 1.6)
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, most * 1.14)
    axes.set_title(title, fontsize=10.5)
    _plain(axes)
    # many lists lie close together: the panel of recall names them all
    _label(axes, [(x, point) for x, point in places if point.precision != "mixed" or point == found.chosen])


def _label(axes: Any, places: list[tuple[float, Point]]) -> None:
    """Names beside their points, moved up where another name is, with a line to the point."""
    share = axes.transData + axes.transAxes.inverted()
    taken: list[tuple[float, float]] = []
    spots = [(share.transform((x, point.margin_noise)), point) for x, point in places]
    for (x, y), point in sorted(spots, key=lambda spot: (spot[0][1], spot[0][0])):
        height = y + 0.03
        while any(abs(x - other) < _NAME[0] and abs(height - level) < _NAME[1] for other, level in taken):
            height += 0.005
        taken.append((x, height))
        axes.annotate(
            point.name, (x, y), (x + 0.035, height), xycoords="axes fraction", textcoords="axes fraction", size=8,
            va="center", color=_colour(point), arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
        )  # fmt: skip


def _blocks(axes: Any, found: Quantized) -> None:
    kept = {
        f"{tower} {block}" for tower, blocks in (found.chosen.keep if found.chosen else {}).items() for block in blocks
    }
    shown = sorted(found.damages, key=lambda one: -one.margin_noise)[:16]
    for place, one in enumerate(shown):
        colour = _KINDS["mixed"] if one.name in kept else "#bbbbbb"
        axes.barh(place, one.margin_noise, color=colour, height=0.66)
        axes.annotate(
            f"{one.extra_bytes / 1e6:.2f} MB", (one.margin_noise, place), (4, 0), textcoords="offset points",
            va="center", size=7.5,
        )  # fmt: skip
    axes.set_yticks(range(len(shown)), [one.name for one in shown], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_title("Each block alone in int8" + ("; coloured: in float where chosen" if kept else ""), fontsize=10.5)
    axes.set_xlabel("noise of the margin; beside it: bytes that keeping the block in float costs")
    _plain(axes)


def _recall(axes: Any, found: Quantized, good: list[Point]) -> None:
    """Change of recall with its one-sided 95 % bounds."""
    k = found.judge.goal.k or 5
    shown = sorted((point for point in good if point.precision != "fp32"), key=lambda point: point.mb)
    for place, point in enumerate(shown):
        change = point.changes[k]
        axes.errorbar(
            -100 * change.loss, place, fmt="o", color=_colour(point), capsize=3,
            xerr=[[100 * (change.bound - change.loss)], [100 * (change.loss - change.floor)]],
        )  # fmt: skip
        if point == found.chosen:
            axes.scatter(-100 * change.loss, place, s=190, facecolors="none", edgecolors="#000000", linewidths=1.4)
    axes.axvline(0, color="#999999", linewidth=0.8)
    limit = "; dashed: the budget" if found.judge.goal.kind == "recall" else ""
    if limit:
        axes.axvline(-100 * found.judge.goal.limit, color="#aa0000", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(shown)), [f"{point.name}, {point.mb:.1f} MB" for point in shown], fontsize=8)
    axes.margins(y=0.08)
    axes.set_title(f"Change of R@{k}", fontsize=10.5)
    axes.set_xlabel("points against float; bars: one-sided 95 % bounds" + limit)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
