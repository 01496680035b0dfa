"""From the result files of `benchmarks.ablation` to its summary, its plot and docs/ablation.md. Trains nothing."""

from __future__ import annotations

import hashlib
import json
import textwrap
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation_arms import ARMS, BASE, BEST, CANDIDATES, PROTOCOLS, TRAIN, TUNING, arm_named
from benchmarks.ablation_pooled import DIRECTIONS, Row, percent, pooled, published
from benchmarks.results_folder import write_text

ROOT = Path(__file__).resolve().parents[1]
DOC, PLOT = ROOT / "docs" / "ablation.md", ROOT / "docs" / "images" / "ablation.svg"
STAGES = ("tune", "screen", "search", "final", "teacher", "moving")
NO_RESULTS = "No results are committed yet: this page has no numbers, and none should be quoted."


def summary_of(out: Path) -> dict[str, Any]:
    """The pooled finals of every arm that has the same folds and seeds as the base, and what was screened and tuned."""
    from benchmarks.ablation import read_rows
    from benchmarks.ablation_moving import moving_of

    rows = read_rows(out / "final.jsonl")
    concepts = {row["id"]: row["concepts"] for row in rows if "concepts" in row}
    machines = {row["id"]: row["machine"] for row in rows if "id" in row and "machine" in row}
    # of one run made twice under two definitions, the later line is the one that was asked for last
    runs: dict[str, dict[str, dict[tuple[int, int], Row]]] = {}
    for row in (row for row in rows if "digest" in row):
        runs.setdefault(row["protocol"], {}).setdefault(row["arm"], {})[row["fold"], row["seed"]] = row
    found: dict[str, Any] = {"protocols": {}}
    for protocol in [name for name in PROTOCOLS if name in runs]:
        base = runs[protocol].get(BASE.name)
        if not base:
            continue
        arms = {}
        for arm in (*ARMS, *CANDIDATES):
            own = runs[protocol].get(arm.name, {})
            if _every_fold(own, base):
                keys = sorted(own)
                arms[arm.name] = pooled([own[key] for key in keys], [base[key] for key in keys], concepts)
        teacher = _teacher(read_rows(out / "teacher.jsonl"), [fold for fold, _ in sorted(base)])
        for row in arms.values():
            for direction in [d for d in DIRECTIONS if teacher]:
                row[direction]["kept"] = round(100 * row[direction]["R@5"] / teacher[direction], 1)
        found["protocols"][protocol] = {
            "folds": sorted({fold for fold, _ in base}),
            "seeds": sorted({seed for _, seed in base}),
            "teacher": teacher,
            "arms": arms,
            "incomplete": sorted(name for name in runs[protocol] if name not in arms),
            "published": published(arms, {name: _in_order(runs[protocol][name]) for name in arms}, concepts),
        }
    tuned, screened = read_rows(out / "tune.jsonl"), read_rows(out / "screen.jsonl")
    found["screening"], found["tuning"] = _screening(screened), _tuning(tuned)
    found["search"] = _search(read_rows(out / "search.jsonl"))
    found["moving"] = moving_of(read_rows(out / "moving.jsonl"))
    if not found["protocols"]:
        rows = screened
        machines = {row["id"]: row["machine"] for row in rows if "id" in row and "machine" in row}
    used = {(row["device"], row["machine"]) for row in rows if "ranks" in row}
    found["devices"] = sorted({device for device, _ in used})
    found["machines"] = {name: machines[name] for name in sorted({name for _, name in used})}
    found["train"] = TRAIN
    found["sha256"] = {stage: digest_of(out / f"{stage}.jsonl") for stage in STAGES}
    return found


def _in_order(runs: dict[tuple[int, int], Row]) -> list[Row]:
    return [runs[key] for key in sorted(runs)]


def _every_fold(own: dict[tuple[int, int], Row], base: dict[tuple[int, int], Row]) -> bool:
    """Each seed that an arm has was run on all folds of the base, and the base has it too."""
    folds, seeds = {fold for fold, _ in base}, {seed for _, seed in own}
    return bool(own) and own.keys() == {(fold, seed) for fold in folds for seed in seeds} and own.keys() <= base.keys()


def _screening(rows: list[Row]) -> dict[str, Any]:
    """For each protocol every arm at the r that served it best, against the base, on the queries that chose r."""
    from benchmarks.ablation import quality

    concepts = {row["id"]: row["concepts"] for row in rows if "concepts" in row}
    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        of = {(row["arm"], row["ratio"]): row for row in rows if row.get("protocol") == protocol}
        best = {arm.name: [of[arm.name, r] for r in arm.ratios if (arm.name, r) in of] for arm in ARMS}
        chosen = {name: max(own, key=quality) for name, own in best.items() if own}
        if "ranks" not in chosen.get(BASE.name, {}):
            continue
        base = chosen[BASE.name]
        found[protocol] = {
            "fold": base["fold"],
            "seed": base["seed"],
            "queries": [len(base["ranks"][direction]) for direction in DIRECTIONS],
            "arms": {name: pooled([row], [base], concepts) for name, row in chosen.items() if not row.get("skipped")},
            "skipped": {name: row["skipped"] for name, row in chosen.items() if row.get("skipped")},
            "missing": [name for name, own in best.items() if not own],
        }
        own = {name: [row] for name, row in chosen.items()}
        found[protocol]["published"] = published(found[protocol]["arms"], own, concepts)
    return found


def _tuning(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """By the setting that was changed, by protocol: the base's mean reciprocal rank and R@5, over both directions."""
    from benchmarks.ablation import quality

    found: dict[str, dict[str, Any]] = {}
    for tuned in [{}, *({key: value} for key, values in TUNING.items() for value in values)]:
        name = ", ".join(f"{key} {value:g}" for key, value in tuned.items()) or "as used"
        for row in (row for row in rows if row.get("tuned") == tuned and "ranks" in row):
            hits = [np.mean(np.array(ranks) <= 5) for ranks in row["ranks"].values()]
            scores = {"MRR": round(quality(row), 2), "R@5": percent(float(np.mean(hits)))}
            found.setdefault(name, {})[row["protocol"]] = scores
    return found


def _search(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Of each candidate, by protocol: R@5 of both directions, mean over the seeds."""
    from benchmarks.ablation import SEEDS, search_jobs

    asked = {job.digest for job in search_jobs(tuple(PROTOCOLS), SEEDS)}
    rows = [row for row in rows if row.get("digest") in asked]
    found: dict[str, dict[str, Any]] = {}
    for arm in CANDIDATES:
        for protocol in PROTOCOLS:
            own = {row["seed"]: row for row in rows if row["arm"] == arm.name and row["protocol"] == protocol}
            hits = [[np.mean(np.array(row["ranks"][d]) <= 5) for d in DIRECTIONS] for row in own.values()]
            if hits:
                scores = {d: percent(value) for d, value in zip(DIRECTIONS, np.mean(hits, axis=0), strict=True)}
                found.setdefault(arm.name, {})[protocol] = scores | {"seeds": sorted(own)}
    return found


def _teacher(rows: list[Row], folds: list[int]) -> dict[str, float]:
    """R@5 of the teachers over the queries of these folds (with repetition), by direction; {} where one is missing."""
    ranks = {row["fold"]: row["ranks"] for row in rows}
    if not folds or not ranks.keys() >= set(folds):
        return {}
    asked = {d: np.concatenate([np.array(ranks[fold][d]) for fold in folds]) for d in DIRECTIONS}
    return {d: percent(float(np.mean(values <= 5))) for d, values in asked.items()}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


# --- the page


def page(found: dict[str, Any]) -> str:
    """docs/ablation.md."""
    from benchmarks.ablation_moving import moving_section

    lines = ["# Which loss is worth its cost?", ""]
    lines += [
        "Made by `python -m benchmarks.ablation --stage summary` from the files in `benchmarks/results/ablation`; edit",
        "`benchmarks/ablation_summary.py`, not this page.",
        "",
    ]
    finals = bool(found["protocols"])
    parts = found["protocols"] or found.get("screening", {})
    if not parts:
        return "\n".join([*lines, NO_RESULTS, "", *_method()]) + "\n"
    lines += [*([] if finals else _wrapped(SCREENING)), *_method()]
    lines += ["![Difference to the base, with 95 % intervals](images/ablation.svg)", ""]
    for protocol, part in parts.items():
        title = _title(protocol)
        if finals:
            lines += [f"## {title}", "", *_table(part["arms"]), ""]
            if part["teacher"]:
                told = ", ".join(f"{value:.1f} {DIRECTIONS[d]}" for d, value in part["teacher"].items())
                lines += [f'The teacher\'s own R@5: {told}. "kept" is of that, mean of both directions.', ""]
            some = part["arms"][BASE.name]["runs"]
            fewer = {name: row["runs"] for name, row in part["arms"].items() if row["runs"] < some}
            told = f"Folds {_listed(part['folds'])}, seeds {_listed(part['seeds'])}: {some} runs an arm"
            told += "".join(f"; `{name}`: {runs}, of the first seeds" for name, runs in fewer.items())
            lines += [*_wrapped(told + "."), ""][:-1]
            if part["incomplete"]:
                lines += [f"Unfinished, so not shown: {', '.join(part['incomplete'])}.", ""]
        else:
            lines += [f"## Screening: {title[0].lower()}{title[1:]}", "", *_screening_table(part), ""]
            asked = " and ".join(map(str, part["queries"]))
            lines += [f"Fold {part['fold']}, seed {part['seed']}, one run an r; {asked} queries in the directions.", ""]
            if part["missing"]:
                lines += [f"Not screened yet: {', '.join(f'`{name}`' for name in part['missing'])}.", ""]
        if part["published"]:
            lines += [f"### Against CLIP-KD, {title[0].lower()}{title[1:]}", ""]
            lines += ["| statement | published, points | here, points (95 %) | agree |", "|---|---|---|---|"]
            for row in part["published"]:
                verdict = f"**{row['agrees']}**" if row["agrees"] == "no" else row["agrees"]
                here = f"{row['here']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
                lines.append(f"| {row['statement']} | {row['published']:+.2f} | {here} | {verdict} |")
            lines.append("")
    if finals:
        lines += _why(found)
        lines += ["## The screening that chose r, and the arms that were screened alone", "", *_wrapped(SCREENED)]
        for protocol, part in found.get("screening", {}).items():
            lines += [f"### {_title(protocol)}", "", *_screening_table(part), ""]
    if found.get("moving"):
        lines += moving_section(found["moving"])
    if found.get("search"):
        lines += ["## The search for `best`", "", *_search_table(found["search"]), "", *_wrapped(SEARCHED)]
    if found.get("tuning"):
        lines += ["## Settings of the base", "", *_tuning_table(found["tuning"]), "", *_wrapped(TUNED)]
    lines += [f"Devices of the {'finals' if finals else 'screening'}: {', '.join(found['devices'])}.", ""]
    return "\n".join(lines)


SCREENED = """
    One fold, one seed, and of each arm with a weight the best of three r, chosen on the very queries that are shown:
    that flatters such arms against the base and the arms without r, and the intervals cover neither it nor the seed.
    On an H100, but `clip-long` and `icl-50`, which ran on a CPU. The finals are of arms named by hand: CLIP-KD's,
    published recipes, our own recipes' losses and starts, and candidates of the search. `order`, `masked-feature`,
    `hycd`, `gram-softmax` and `cross-kd` screened better than some of them and were left out for want of device time.
    `momentum`, which is what a student without any teacher can do for itself, gains next to nothing here."""
SCREENING = """
    **This is screening, not a result**: one fold, one seed, and of each arm with a weight the best of three r,
    chosen on the very queries that are shown. That flatters such arms against the base and the arms without r, and
    the intervals cover neither it nor the seed. The finals (`--stage final`) will add folds 1 to 4, whose test concepts
    are others, three seeds, r held as chosen here, and costs; step times of the screening are not comparable, as 15
    processes shared one GPU."""
TUNED = """
    One setting changed at a time, the base alone, fold 0, seed 0; MRR (mean reciprocal rank) and R@5 are means of both
    directions, in per cent. `lr` is the learning rate, `projection` and `trunk` factors on it, and `fit_projection` the
    strength of a ridge fit towards the student's own text tower in place of the random start. Both protocols share one
    setting, so neither has its best. A first regime, the projection at 0.1 times a learning rate of 3e-4, left all arms
    under-trained and was given up."""
SEARCHED = """
    R@5, fold 0, mean of seeds 0 to 2: chosen here, reported on the other folds. A candidate is a sum of plain weights
    in place of the base; `ours` are the losses of recipe `openmoji`, `ridge` starts at the teacher's ridge solution,
    numbers after `ridge` and `trunk` are factors on the rates of the image projection and of the trunk's upper blocks,
    `steps` is another number of steps than all arms have."""
METHOD = f"""
    Arms differ in their losses alone: one student (`lite0-minilm2`) from the same initial weights, with the same
    pictures, views, batches, learning rate ({TRAIN["lr"]:g}) and {TRAIN["steps"]} steps, chosen for the base, `clip`
    alone, on fold 0. The text tower starts from words (recipe `openmoji-text`) and the image trunk stands still. The
    image projection starts at random and trains at {TRAIN["lr_scale"]["image_tower.projection"]} times the learning
    rate; only `text-to-concept` and `openmoji-whole` start at the teacher's ridge solution. Beside the base, an arm
    has the weight at which its own gradient is r times the base's at the first step; r of 0.3, 1 and 3 is chosen on
    fold 0, seed 0, by mean reciprocal rank. In place of the base there is nothing to choose, as AdamW takes no scale. A
    sum keeps its published weights inside. R@5 is of both towers the student's, on concepts that neither teacher nor
    student has seen; differences have 95 % paired bootstrap intervals, base concepts resampled whole. A cost is the
    median step against the base's on the same machine: a step without the trunk that stands still, at B = 128, on a
    GPU shared by 15 processes, where many small kernels weigh more than beside whole towers (objectives.md has shares
    of a whole step at B = 256). Not among these: `hint`, which compares features before the
    projection, so that it teaches nothing while the trunk stands still; `token-gram`, `token-alignment`,
    `masked-language` and `region-self`, which read maps or need a forward of their own (these five were screened [with
    a trunk that moves](#screening-with-a-trunk-that-moves)); `multi-teacher` beside the base, which with one teacher is
    `crd`; `matryoshka-2d`, which makes smaller students; and `dho`, whose student is a classifier."""
COMPARED = """
    CLIP-KD's points are of ImageNet zero-shot accuracy after training from scratch on 15 million pairs; ours are of
    R@5 after a short training of pretrained towers, mean of both directions. Sign and order are compared, not size."""


WHY = """
    Where ours disagrees. ICL is behind CRD, by {icl_crd}. Not for its temperature: started at a scale of 50 in place of
    14.3, which 150 steps hardly move, it gains nothing on fold 0 (`icl-50` in the screening file, mean R@5 at its best
    r {icl_50}). CRD's target holds the teacher's whole similarity matrix, ICL's the match alone, which `clip` asks for
    too; and the student's text tower starts near the teacher's, both being MiniLM's, so that the teacher's keys tell it
    little that its own do not. CLIP-KD's students start from nothing, with batches of thousands. That part is a
    reading, not a measurement. The sum and FD alone differ by {sum_feature}, AFD and the base by {afd}: signs that
    these runs do not decide."""
ANSWERS = """
    `best` trains four times as long as the other arms and lets the upper blocks of the image trunk move. The base with
    both (`clip-long`; fold 0, seed 0, on a CPU, so not among the finals) gains {long} points over the base: less than a
    sixth of what `best` gains over it. At the same 150 steps the two other candidates in the tables are ahead of every
    published sum. The learning rate was chosen for the base over both protocols; with captions for all, a third of it
    serves the base better (`clip-slow`), so that what arms gain over the base there is about a point too much."""


def _why(found: dict[str, Any]) -> list[str]:
    """What stands behind the statements that do not agree, and behind the length of `best`."""
    screened, parts = found["screening"], found["protocols"]

    def of(name: str) -> str:
        return " and ".join(f"{_gain(part['arms'][name]):.1f} ({protocol})" for protocol, part in screened.items())

    if not {"icl-50", "clip-long"} <= {name for part in screened.values() for name in part["arms"]}:
        return []

    def gaps(statement: str) -> str:
        rows = {p: row for p, part in parts.items() for row in part["published"] if row["statement"] == statement}
        return " and ".join(f"{abs(row['here']):.1f} ({protocol})" for protocol, row in rows.items())

    told = WHY.format(
        icl_crd=gaps("icl > crd"),
        icl_50=f"{of('icl-50')} against {of('icl')}",
        sum_feature=gaps("clip-kd > feature"),
        afd=gaps("afd > 0"),
    )
    long = {protocol: part["arms"]["clip-long"]["both"] for protocol, part in screened.items()}
    gained = [f"{b['difference']:+.1f} ({b['low']:+.1f} to {b['high']:+.1f}; {p})" for p, b in long.items()]
    answers = ANSWERS.format(long=" and ".join(gained))
    return ["## What stands behind it", "", *_wrapped(told), *_wrapped(answers)]


def _method() -> list[str]:
    return [*_wrapped(METHOD), *_wrapped(COMPARED)]


def _wrapped(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 118, break_on_hyphens=False), ""]


def _screening_table(part: dict[str, Any]) -> list[str]:
    heads = "".join(f" R@5 {name} |" for name in DIRECTIONS.values())
    lines = [f"| arm | | r |{heads} mean, to base (95 %) |", "|---|---|---|---|---|---|"]
    for name, row in sorted(part["arms"].items(), key=lambda item: -_gain(item[1])):
        arm, both = arm_named(name), row["both"]
        cells = [f"`{name}`", arm.what, f"{row['r']:g}" if len(arm.ratios) > 1 else "–"]
        cells += [f"{row[direction]['R@5']:.1f}" for direction in DIRECTIONS]
        shown = f"{both['difference']:+.1f} ({both['low']:+.1f} to {both['high']:+.1f})"
        lines.append("| " + " | ".join([*cells, "–" if arm is BASE else shown]) + " |")
    for name, why in part["skipped"].items():
        lines.append(f"| `{name}` | {arm_named(name).what} | – | – | – | skipped: {why} |")
    return lines


def _tuning_table(tuning: dict[str, Any]) -> list[str]:
    lines = [
        "| setting |" + "".join(f" {name}: MRR | R@5 |" for name in PROTOCOLS),
        "|---|" + "---|---|" * len(PROTOCOLS),
    ]
    for name, scores in tuning.items():
        cells = [f"{scores[p][k]:.1f}" if p in scores else "–" for p in PROTOCOLS for k in ("MRR", "R@5")]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _search_table(search: dict[str, Any]) -> list[str]:
    heads = "".join(f" {protocol}: {name} |" for protocol in PROTOCOLS for name in DIRECTIONS.values())
    lines = [f"| candidate |{heads}", "|---|" + "---|" * len(PROTOCOLS) * len(DIRECTIONS)]

    def total(item: tuple[str, dict[str, Any]]) -> float:
        return -sum(scores[direction] for scores in item[1].values() for direction in DIRECTIONS)

    for name, scores in sorted(search.items(), key=total):
        cells = [f"{scores[p][d]:.1f}" if p in scores else "–" for p in PROTOCOLS for d in DIRECTIONS]
        lines.append("| " + " | ".join([_shown(name), *cells]) + " |")
    return lines


def _shown(name: str) -> str:
    return f"**`best`** ({name})" if name == BEST else f"`{name}`"


def _title(protocol: str) -> str:
    return {"few": "Captions for a tenth of the pictures", "all": "Captions for all pictures"}[protocol]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _table(arms: dict[str, Any]) -> list[str]:
    heads = "".join(f" R@5 {name} | to base (95 %) |" for name in DIRECTIONS.values())
    lines = [f"| arm | | r |{heads} kept | step |", "|---|---|---|" + "---|---|" * len(DIRECTIONS) + "---|---|"]
    for name, row in sorted(arms.items(), key=lambda item: -_gain(item[1])):
        arm = arm_named(name)
        cells = [_shown(name), arm.what, f"{row['r']:g}" if len(arm.ratios) > 1 else "–"]
        for direction in DIRECTIONS:
            part = row[direction]
            shown = f"{part['difference']:+.1f} ({part['low']:+.1f} to {part['high']:+.1f})"
            cells += [f"{part['R@5']:.1f}", "–" if arm is BASE else shown]
        kept = [row[direction]["kept"] for direction in DIRECTIONS if "kept" in row[direction]]
        cells.append(f"{np.mean(kept):.0f} %" if kept else "–")
        cells.append("–" if row["step_cost"] is None else f"{row['step_cost']:.2f}×")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gain(row: Row) -> float:
    return float(np.mean([row[direction]["R@5"] for direction in DIRECTIONS]))


# --- the plot


def plot(found: dict[str, Any]) -> str:
    """One row an arm, one column a protocol: the mean difference of both directions' R@5, each with its interval."""
    row_height, width, label, gap = 18, 300, 150, 24
    parts_by = found["protocols"] or found["screening"]
    shown = {name for part in parts_by.values() for name in part["arms"]}
    names = [arm.name for arm in (*ARMS, *CANDIDATES) if arm is not BASE and arm.name in shown]
    first = next(iter(parts_by.values()))["arms"]
    names.sort(key=lambda name: -_gain(first[name]) if name in first else 0)
    ends = [
        part["arms"][name][d][end] for part in parts_by.values() for name in names if name in part["arms"]
        for d in DIRECTIONS for end in ("low", "high")
    ]  # fmt: skip
    low, high = min([*ends, 0.0]) - 1, max([*ends, 0.0]) + 1
    total_width, total_height = label + len(parts_by) * (width + gap), 64 + row_height * len(names)
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" '
        'font-family="sans-serif" font-size="11" role="img" aria-label="R@5 of each arm minus the base">',
        f'<rect width="{total_width}" height="{total_height}" fill="#ffffff"/>',
    ]
    for row, name in enumerate(names):
        y = 44 + row_height * row
        told = escape("best" if name == BEST else name)
        svg.append(f'<text x="{label - 8}" y="{y + 4}" text-anchor="end" fill="#222222">{told}</text>')
    colours = {"image_to_text": "#1f6feb", "text_to_image": "#d9730d"}
    for column, (protocol, part) in enumerate(parts_by.items()):
        left = label + column * (width + gap)

        def x(value: float, left: int = left) -> float:
            return round(left + (value - low) / (high - low) * width, 1)

        svg.append(f'<text x="{left}" y="16" fill="#222222" font-weight="bold">{escape(_title(protocol))}</text>')
        bottom = total_height - 16
        for tick in range(int(np.ceil(low / 5)) * 5, int(high) + 1, 5):
            colour = "#444444" if tick == 0 else "#dddddd"
            svg.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="28" y2="{bottom}" stroke="{colour}"/>')
            svg.append(
                f'<text x="{x(tick)}" y="{total_height - 3}" text-anchor="middle" fill="#555555">{tick:+d}</text>'
            )
        for row, name in enumerate(names):
            for shift, direction in ((-3, "image_to_text"), (3, "text_to_image")):
                if name not in part["arms"]:
                    continue
                value, y = part["arms"][name][direction], 44 + row_height * row + shift
                colour = colours[direction]
                svg.append(
                    f'<line x1="{x(value["low"])}" x2="{x(value["high"])}" y1="{y}" y2="{y}" stroke="{colour}" '
                    f'stroke-width="2"/><circle cx="{x(value["difference"])}" cy="{y}" r="3" fill="{colour}"/>'
                )
    for place, (direction, name) in enumerate(DIRECTIONS.items()):
        x_key = label + place * 130
        svg.append(f'<circle cx="{x_key + 4}" cy="25" r="3" fill="{colours[direction]}"/>')
        svg.append(f'<text x="{x_key + 12}" y="29" fill="#222222">R@5 {name}</text>')
    return "\n".join([*svg, "</svg>"]) + "\n"


def summarise(out: Path) -> None:
    """Write summary.json beside the result files and, for the committed ones, the page and the plot."""
    found = summary_of(out)
    write_text(out / "summary.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    page_at, plot_at = (
        (DOC, PLOT) if out.resolve().is_relative_to(ROOT) else (out / "ablation.md", out / "ablation.svg")
    )
    write_text(page_at, page(found))
    if found["protocols"] or found["screening"]:
        write_text(plot_at, plot(found))
    print(page(found))
