"""What `pocketvlm bench` shows: two tables of at most 80 columns, profiles, and a plot."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocketvlm.edge.errors import require
from pocketvlm.export.bench import BenchReport, BenchRow, Profile

WIDTH = 80
JSON_FILE, PLOT_FILE = "bench.json", "bench.png"
# of a palette that colour-blind people tell apart (Okabe and Ito 2008)
_COLOURS = {"onnxruntime": "#0072B2", "executorch": "#D55E00", "coreml": "#009E73"}
_MARKERS = "osD^vP*X"
_POINTS = 6.0  # least height of the accuracy axis


def bench_tables(report: BenchReport) -> str:
    """Latency first, costs after it, then profiles, what was left out, the machine and warnings."""
    parts = []
    for bundle in dict.fromkeys(row.bundle for row in report.rows):
        rows = [row for row in report.rows if row.bundle == bundle]
        parts.append(f"{bundle} ({rows[0].model}), batch 1, milliseconds")
        parts.append(_latency(rows))
        parts.append(_costs(rows))
    parts += [_profile(profile) for profile in report.profiles]
    parts.append(_foot(report))
    return "\n\n".join(parts)


def save_report(report: BenchReport, out: str | Path) -> Path:
    """Write bench.json and bench.png into a folder.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "distill")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / JSON_FILE).write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    plot(report, out / PLOT_FILE)
    return out


def _latency(rows: Sequence[BenchRow]) -> str:
    lines: list[tuple[str, ...]] = [
        ("runtime", "prec", "tower", "thr", "p50", "rounds", "p90", "prepare", "whole", "first")
    ]
    for row in rows:
        low, high = row.rounds_ms
        times = (_ms(row.p50_ms), f"{_ms(low)}-{_ms(high)}", _ms(row.p90_ms), _ms(row.prepare_ms), _ms(row.whole_ms))
        lines.append((row.backend, row.precision, row.tower, str(row.threads), *times, _ms(row.first_ms)))
    return _aligned(lines, left=3)


def _costs(rows: Sequence[BenchRow]) -> str:
    lines: list[tuple[str, ...]] = [
        ("runtime", "prec", "tower", "thr", "load ms", "model MB", "process MB", "files MB", "R@5 %")
    ]
    for row in rows:
        accuracy = "-" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
        memory = ("-" if mb is None else f"{mb:.0f}" for mb in (row.model_mb, row.peak_mb))
        key = (row.backend, row.precision, row.tower, str(row.threads))
        lines.append((*key, f"{row.load_ms:.0f}", *memory, f"{row.mb:.1f}", accuracy))
    return _aligned(lines, left=3)


def _profile(profile: Profile) -> str:
    threads = f"{profile.threads} thread" + "s" * (profile.threads > 1)
    title = f"{profile.bundle}: {profile.backend} {profile.precision} {profile.tower}, {threads}, by operator"
    if not profile.operators:
        return f"{title}: this runtime has no profiler here"
    lines = [("share", "ms", "calls", "operator")]
    for row in profile.operators:
        lines.append((f"{100 * row['share']:.1f} %", f"{row['ms']:.3f}", f"{row['calls']:.0f}", row["operator"]))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [" ".join([*(cell.rjust(width) for cell, width in zip(line, widths)), line[3]]) for line in lines]
    return "\n".join([title, *(line[:WIDTH].rstrip() for line in text)])


def _foot(report: BenchReport) -> str:
    machine, settings = report.machine, report.settings
    lines = [
        f"left out: {entry.bundle}, {entry.backend} {entry.precision}: {entry.reason}" for entry in report.left_out
    ]
    lines.append(
        "p50: median over rounds of each round's median; rounds: the smallest and largest of them; whole: from "
        f"JPEG bytes ({settings['picture']}) or the string to the embedding, prepare: its part before the graph. model "
        "MB: memory above what the runtime takes without a model. R@5: image to text, of the bundle's parity summary."
    )
    lines.append(
        f"{settings['rounds']} rounds of {settings['runs_per_round']} runs; {machine['cpu']}, {machine['cores']} cores "
        f"({' '.join(machine['flags']) or 'flags unknown'}); load average {machine['load_average_before']} before, "
        f"{machine['load_average_after']} after"
    )
    lines += [f"WARNING: {warning}" for warning in report.warnings]
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _aligned(lines: Sequence[tuple[str, ...]], *, left: int) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        " ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


# --- plot -----------------------------------------------------------------------------------------------------------


def plot(report: BenchReport, path: Path) -> None:
    """Bars of the whole way, the graph and what comes before it; and size against latency, with R@5 where known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(report.rows, key=lambda row: row.tower)
    figure = Figure(figsize=(12, max(4.2, 1.9 + 0.34 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    bars, cloud = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _bars(bars, rows)
    _cloud(cloud, rows)
    machine = report.machine
    facts = (
        f"{machine['cpu']}, {machine['cores']} cores, load average {machine['load_average_before']} before and "
        f"{machine['load_average_after']} after; {report.settings['rounds']} rounds of "
        f"{report.settings['runs_per_round']} runs, batch 1"
    )
    figure.suptitle("Latency, size and accuracy of " + ", ".join(dict.fromkeys(row.model for row in rows)), fontsize=13)
    busy = bool(report.warnings)
    text = f"{facts}\nNot a quiet machine: these times are too long" if busy else facts
    figure.supxlabel(text, fontsize=8.5, color="#a00" if busy else "#555")
    figure.savefig(path, dpi=130)


def _bars(axes: Any, rows: Sequence[BenchRow]) -> None:
    several = len({row.bundle for row in rows}) > 1
    threads = len({row.threads for row in rows}) > 1
    labels = []
    for place, row in enumerate(rows):
        colour = _COLOURS[row.backend]
        # what embed_image and embed_text do besides preparing and running is in the whole and small
        axes.barh(place, row.prepare_ms, color="#bbbbbb", height=0.62)
        axes.barh(place, row.p50_ms, left=row.prepare_ms, color=colour, height=0.62)
        low, high = row.rounds_ms
        errors = [[row.p50_ms - low], [high - row.p50_ms]]
        axes.errorbar(
            row.prepare_ms + row.p50_ms, place, xerr=errors, fmt="none", ecolor="#222222", elinewidth=1, capsize=3
        )
        axes.annotate(
            f"{_ms(row.p50_ms)}",
            (row.prepare_ms + high, place),
            (5, 0),
            textcoords="offset points",
            va="center",
            size=8.5,
        )
        name = f"{row.tower}, {row.backend} {row.precision}"
        name += f", {row.threads} thr" if threads else ""
        labels.append(f"{row.bundle}: {name}" if several else name)
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("ms: decoding or tokenizing (gray), then the graph (number; whiskers: its rounds)")
    axes.set_title("From JPEG bytes or a string to the embedding", fontsize=10.5)
    _plain(axes)


def _cloud(axes: Any, rows: Sequence[BenchRow]) -> None:
    """One point per variant: its image tower, or its text tower where it has no other."""
    fewest = min(row.threads for row in rows)
    points: dict[tuple[str, str, str], BenchRow] = {}
    for row in rows:
        if row.threads == fewest:
            key = (row.bundle, row.backend, row.precision)
            points[key] = row if row.tower == "image" else points.get(key, row)
    scored = [row for row in points.values() if row.accuracy is not None]
    by_accuracy = len(scored) > 1
    shown = scored if by_accuracy else list(points.values())
    bundles = list(dict.fromkeys(row.bundle for row in shown))
    for row in shown:
        height = 100 * (row.accuracy or 0.0) if by_accuracy else row.mb
        area = 30 + 12 * row.mb if by_accuracy else 90
        marker = _MARKERS[bundles.index(row.bundle) % len(_MARKERS)]
        axes.scatter(row.p50_ms, height, s=area, color=_COLOURS[row.backend], alpha=0.75, marker=marker, linewidths=0)
        name = f"{row.backend} {row.precision}, {row.mb:.1f} MB"
        # points of two runtimes often lie side by side: the names of one go above, of the other below
        above = (6 + area**0.5 / 2) * (1 if row.backend == "onnxruntime" else -1)
        place = {"xytext": (0, above), "ha": "center", "va": "bottom" if above > 0 else "top"}
        axes.annotate(name, (row.p50_ms, height), textcoords="offset points", size=8.5, **place)
    axes.margins(0.28)
    axes.set_xlim(left=0)
    if by_accuracy:
        # a few hundred queries move in steps of a quarter of a point; an axis of one point would make that look large
        low, high = axes.get_ylim()
        room = max(0.0, _POINTS - (high - low)) / 2
        axes.set_ylim(low - room, high + room)
    towers = "/".join(dict.fromkeys(row.tower for row in shown))
    axes.set_xlabel(f"ms of the graph, {towers} tower, {fewest} thread" + "s" * (fewest > 1))
    axes.set_ylabel("R@5 of the parity summary, %" if by_accuracy else "MB of files, both towers")
    axes.set_title("Accuracy against latency; area: size" if by_accuracy else "Size against latency", fontsize=10.5)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
