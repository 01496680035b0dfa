"""From the runs of `benchmarks.elastic` to benchmarks/results/elastic.json and the tables in docs/students.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation import read_rows
from benchmarks.ablation_summary import digest_of
from benchmarks.elastic import ACROSS, ARMS, DIMS, FULL, LAYERS, PAIRS, REDUCTIONS, TURNED
from benchmarks.results_folder import RESULTS, write_text
from pocketvlm.distill.asymmetric import SYMMETRIC, WAYS
from pocketvlm.distill.metrics import paired_bootstrap

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "elastic.md"
DIRECTIONS = ("image_to_text", "text_to_image")
ELASTIC = ("mrl", "mrl-principal")
ASYMMETRIC = ("plain", "icl", "cross-kd")
KEPT_AT, KEPT, WITHIN = 64, 92.0, 2.0
"""The floors: at 64 numbers, per cent of the full width's R@5; points below a separately trained student."""

Row = dict[str, Any]
Runs = dict[str, dict[tuple[int, int], Row]]


def summary_of(out: Path) -> dict[str, Any]:
    """Pooled R@5 of every complete arm and width, with paired intervals over resampled base concepts."""
    rows = read_rows(out / "runs.jsonl")
    concepts = {row["id"]: row["concepts"] for row in rows if "concepts" in row}
    machines = {row["id"]: row["machine"] for row in rows if "id" in row and "machine" in row}
    by_protocol: dict[str, Runs] = {}
    for row in (row for row in rows if "digest" in row):
        by_protocol.setdefault(row["protocol"], {}).setdefault(row["arm"], {})[row["fold"], row["seed"]] = row
    found: dict[str, Any] = {"dims": [*DIMS], "floors": {"kept_at": KEPT_AT, "kept": KEPT, "within": WITHIN}}
    found["protocols"] = {
        protocol: _protocol(by_protocol[protocol], concepts) for protocol in ("few", "all") if protocol in by_protocol
    }
    used = {(row["device"], row["machine"]) for row in rows if "hits" in row}
    found["devices"] = sorted({device for device, _ in used})
    found["machines"] = {name: machines[name] for name in sorted({name for _, name in used})}
    found["sha256"] = digest_of(out / "runs.jsonl")
    return found


def _protocol(runs: Runs, concepts: dict[str, Any]) -> dict[str, Any]:
    # the arm with the most runs says which folds and seeds an arm needs
    first = max(runs, key=lambda name: len(runs[name]))
    whole = runs[first].keys()
    complete = {name: own for name, own in runs.items() if own.keys() == whole}
    found: dict[str, Any] = {
        "folds": sorted({fold for fold, _ in whole}),
        "seeds": sorted({seed for _, seed in whole}),
        "incomplete": sorted(runs.keys() - complete.keys()),
        "recall": {},
    }

    def hits(arm: str, view: str, direction: str) -> Any:
        own = complete[arm]
        return np.concatenate([[c == "1" for c in own[key]["hits"][view][direction]] for key in sorted(own)])

    units: dict[str, list[str]] = {direction: [] for direction in ACROSS}
    for key in sorted(whole):
        for direction in ACROSS:
            # runs of before picture -> picture was scored have none
            units[direction] += concepts[runs[first][key]["queries"]].get(direction, [])

    def interval(a: tuple[str, str], b: tuple[str, str], directions: tuple[str, ...] = DIRECTIONS) -> Row:
        """Of R@5 over all queries of these directions, in points."""
        ours, theirs = (np.concatenate([hits(*one, direction) for direction in directions]) for one in (a, b))
        asked = [concept for direction in directions for concept in units[direction]]
        values = paired_bootstrap(ours, theirs, clusters=asked).to_dict()
        return {key: _percent(values[key]) for key in ("difference", "low", "high", "lower_bound")}

    for arm in [arm.name for arm in ARMS if arm.name in complete]:
        views = next(iter(complete[arm].values()))["hits"]
        shares = {view: {d: _percent(hits(arm, view, d).mean()) for d in views[view]} for view in views}
        found["recall"][arm] = {view: own | {"mean": _mean(hits, arm, view)} for view, own in shares.items()}
    found["reductions"] = [r for r in REDUCTIONS if any(name.startswith(f"{r}-") for name in complete)]
    found["elastic"] = {name: _elastic(name, found["recall"], interval) for name in ELASTIC if name in complete}
    found["exits"] = _exits(found["recall"], interval) if {"plain", "starbucks"} <= complete.keys() else {}
    found["asymmetric"] = {arm: _across(arm, found["recall"], interval) for arm in ASYMMETRIC if arm in complete}
    costs = {arm: float(np.median([row["step_ms"] for row in own.values()])) for arm, own in complete.items()}
    found["step_ms"] = {arm: round(value, 1) for arm, value in costs.items()}
    return found


def _exits(recall: dict[str, Any], interval: Any) -> Row:
    """Each smaller student inside `starbucks`: against one trained for that size alone, and the same cut of `plain`."""
    found: Row = {}
    for layers, m in (*PAIRS, (LAYERS, FULL)):
        view = str(m) if layers == LAYERS else f"{layers}x{m}"
        rival, cut = (f"principal-{m}" if m < FULL else "plain"), (f"{m}@{TURNED}" if layers == LAYERS else view)
        if layers != LAYERS:
            rival = f"one-layer-{m}"
        row = {"mean": recall["starbucks"][view]["mean"], "to_cut": interval(("starbucks", view), ("plain", cut))}
        row |= {"kept": round(100 * row["mean"] / recall["starbucks"][str(FULL)]["mean"], 1), "cut": cut}
        if rival in recall:
            row |= {"separate": rival, "to_separate": interval(("starbucks", view), (rival, str(m)))}
        found[f"{layers} x {m}"] = row
    return found


def _across(arm: str, recall: dict[str, Any], interval: Any) -> Row:
    """Each mixed way of an arm, in each direction: against the student alone, and against the same way of `plain`."""
    found: Row = {}
    for way in [way for way in WAYS if way not in SYMMETRIC.values()]:
        asked = [direction for direction in ACROSS if direction in recall[arm][way]]
        found[way] = {d: {"to_student": interval((arm, way), (arm, SYMMETRIC["model"]), (d,))} for d in asked}
        if arm != "plain":
            for d in asked:
                found[way][d]["to_plain"] = interval((arm, way), ("plain", way), (d,))
    return found


def _mean(hits: Any, arm: str, view: str) -> float:
    return _percent(np.mean([hits(arm, view, direction).mean() for direction in DIRECTIONS]))


def _elastic(name: str, recall: dict[str, Any], interval: Any) -> Row:
    """An elastic arm at each width: its share of its own full width, and against the best separately trained student
    and the cut embeddings of the plain one."""
    found: Row = {"widths": {}}
    full = recall[name][str(FULL)]["mean"]
    for m in DIMS:
        own = recall[name][str(m)]["mean"]
        rivals = {f"{r}-{m}": recall[f"{r}-{m}"][str(m)]["mean"] for r in REDUCTIONS if f"{r}-{m}" in recall}
        if m == FULL and "plain" in recall:
            rivals = {"plain": recall["plain"][str(FULL)]["mean"]}
        row: Row = {"mean": own, "kept": round(100 * own / full, 1)}
        if rivals:
            best = max(rivals, key=lambda arm: rivals[arm])
            row["best_separate"] = best
            row["to_separate"] = interval((name, str(m)), (best, str(m)))
        if "plain" in recall:
            row["to_cut"] = interval((name, str(m)), ("plain", str(m)))
            row["to_turned_cut"] = interval((name, str(m)), ("plain", f"{m}@{TURNED}"))
        found["widths"][str(m)] = row
    rows = found["widths"].values()
    compared = [row["to_separate"]["difference"] for row in rows if "to_separate" in row]
    kept = found["widths"][str(KEPT_AT)]["kept"]
    found["floor_kept"] = {"value": kept, "met": kept >= KEPT}
    found["floor_within"] = {
        "value": min(compared, default=None),
        "widths": len(compared),
        "met": len(compared) == len(DIMS) and min(compared) >= -WITHIN,
    }
    return found


def _percent(value: Any) -> float:
    return round(100 * float(value), 2)


# --- the page

TITLES = {"few": "Captions for a tenth of the pictures", "all": "Captions for all pictures"}
SHOWN = {
    "model_query_model_gallery": "student, student",
    "model_query_teacher_gallery": "student, teacher",
    "teacher_query_model_gallery": "teacher, student",
    "teacher_query_teacher_gallery": "teacher, teacher",
}
HEAD = """# Elastic and asymmetric students, measured

Made by `python -m benchmarks.elastic --stage summary` from [its runs](../benchmarks/results/elastic/runs.jsonl); edit
`benchmarks/elastic_summary.py`, not this page. [All numbers](../benchmarks/results/elastic.json).

R@5 in per cent, mean of both directions unless said, on concepts that neither teacher nor student has seen; `clip` and
`feature` in every arm, and the data, start, steps and settings of the [ablation](ablation.md). The weight of
`feature` is at r = 3, which its fold 0 chose with few captions; with all of them it chose r = 0.3, a tenth of that
weight. Intervals: 95 %, paired, base concepts resampled whole.

**One elastic student** (`matryoshka` over both losses, all seven widths) against students trained for one width
alone. These need a teacher of that width: its first numbers (*prefix*), its first principal axes (*principal*), or all
of it behind a learned projector (*projector*); each row compares with the best of those that were run, on these very
queries, which flatters them. "Cut" is the student trained at full width alone, cut; "turned, cut" the same after
`students.change_axes` to the teacher's principal axes, which needs no training. "Principal axes" is
`teacher.axes: principal` ([recipes.md](recipes.md)).
"""
NOTHING = "No results are committed yet: this page has no numbers, and none should be quoted."


def page(found: Row) -> str:
    """docs/elastic.md."""
    lines = [HEAD]
    if not found["protocols"]:
        lines.append(NOTHING)
    for protocol, part in found["protocols"].items():
        lines += [f"## {TITLES[protocol]}", ""]
        folds, seeds = (", ".join(map(str, part[key])) for key in ("folds", "seeds"))
        ways = ", ".join(f"*{name}*" for name in part["reductions"]) or "none"
        lines += [
            f"Folds {folds}, seeds {seeds}. Ways to a teacher of a student's width that have results: {ways}.",
            "",
        ]
        for name, elastic in part["elastic"].items():
            lines += _elastic_table(name, elastic, part)
        if part["exits"]:
            lines += _exits_table(part)
        if part["asymmetric"]:
            lines += _asymmetric_table(part)
        if part["incomplete"]:
            lines += [f"Unfinished, so not shown: {', '.join(part['incomplete'])}.", ""]
    if found["devices"]:
        lines += [f"Devices: {', '.join(found['devices'])}.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _elastic_table(name: str, elastic: Row, part: Row) -> list[str]:
    what = next(arm.what for arm in ARMS if arm.name == name)
    lines = [f"### {what[0].upper()}{what[1:]}", ""]
    lines += ["| numbers | elastic | kept | separate, best | elastic − separate (95 %) | cut | turned, cut |"]
    lines += ["|---:|---:|---:|---:|---:|---:|---:|"]
    for m, row in elastic["widths"].items():
        rival = "–"
        if "best_separate" in row:
            label = row["best_separate"].rsplit("-", 1)[0]
            rival = f"{part['recall'][row['best_separate']][m]['mean']:.1f} ({label})"
        cells = [m, f"{row['mean']:.1f}", f"{row['kept']:.0f} %", rival, shown(row.get("to_separate"))]
        plain = part["recall"].get("plain", {})
        cells += [f"{plain[view]['mean']:.1f}" if view in plain else "–" for view in (m, f"{m}@{TURNED}")]
        lines.append("| " + " | ".join(cells) + " |")
    kept, within = elastic["floor_kept"], elastic["floor_within"]
    lines += ["", f"At {KEPT_AT} numbers {kept['value']:.1f} % of full width (wanted: {KEPT:.0f} %): {_met(kept)}."]
    if within["value"] is not None:
        lines[-1] += f" Worst width against a separate student {within['value']:+.1f} points (wanted: −{WITHIN:.0f})"
        missing = len(DIMS) - within["widths"]
        lines[-1] += f", {missing} widths not compared." if missing else f": {_met(within)}."
    return [*lines, ""]


def _exits_table(part: Row) -> list[str]:
    lines = ["### Text layers and numbers", ""]
    lines += [
        "`matryoshka-2d` over both losses (recipe `starbucks-style`), all sizes in one student, the image tower whole."
    ]
    lines += [
        "“Separate” has that many text layers and numbers from the start; “cut” is `plain`, turned, left as early.",
        "",
    ]
    lines += [
        "| text layers × numbers | R@5 | kept | separate | difference to it (95 %) | cut | difference to it (95 %) |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    for size, row in part["exits"].items():
        rival = "–"
        if "separate" in row:
            rival = f"{part['recall'][row['separate']][size.split(' x ')[1]]['mean']:.1f}"
        cells = [size.replace("x", "×"), f"{row['mean']:.1f}", f"{row['kept']:.0f} %", rival]
        cells += [shown(row.get("to_separate")), f"{part['recall']['plain'][row['cut']]['mean']:.1f}"]
        lines.append("| " + " | ".join([*cells, shown(row["to_cut"])]) + " |")
    return [*lines, ""]


def _asymmetric_table(part: Row) -> list[str]:
    names, way = list(part["asymmetric"]), "model_query_teacher_gallery"
    asked = [direction for direction in ACROSS if direction in part["asymmetric"][names[0]][way]]
    said = [direction.replace("image", "picture").replace("_to_", " → ") for direction in asked]
    lines = ["### Student queries, teacher gallery", ""]
    lines += [f"R@5 {' / '.join(said)}. `plain` is `clip` and `feature`; the others add a loss."]
    if "image_to_image" in asked:
        lines += ["Picture → picture is of the pictures whose concept has others, which are the answers."]
    lines += ["", "| queries, gallery of | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines += ["|---|" + "---:|" * len(names)]
    for key, what in SHOWN.items():
        cells = [" / ".join(f"{part['recall'][name][key][d]:.1f}" for d in asked) for name in names]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    lines += ["", f"Differences of “{SHOWN[way]}”, with intervals:", ""]
    lines += ["| arm | to | " + " | ".join(said) + " |", "|---|---|" + "---|" * len(said)]
    for name, ways in part["asymmetric"].items():
        for key, what in (("to_student", "the student alone"), ("to_plain", "`plain`")):
            gaps = [ways[way][d].get(key) for d in asked]
            if gaps[0] is not None:
                lines.append(f"| `{name}` | {what} | " + " | ".join(map(shown, gaps)) + " |")
    return [*lines, ""]


def shown(interval: Row | None) -> str:
    if interval is None:
        return "–"
    return f"{interval['difference']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"


def _met(floor: Row) -> str:
    return "met" if floor["met"] else "**missed**"


def summarise(out: Path) -> None:
    """Write the summary and, for the committed runs, the page."""
    found = summary_of(out)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    committed = out.resolve().is_relative_to(ROOT)
    write_text(RESULTS / "elastic.json" if committed else out / "elastic.json", text)
    write_text(DOC if committed else out / "elastic.md", page(found))
    print(page(found))
