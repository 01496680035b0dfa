"""From a trained student and a budget to files: what int8, 4 bits and mixtures cost, and the point to ship.

Blocks are ranked by what they do to the task when they alone are quantized (`export.sensitivity`), for each byte that
keeping them costs. The shortest prefix of that ranking which meets the budget is found by halving, then members are
dropped that turn out not to be needed. Every list is tried on real files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pocketvlm.data import DataSource, open_data
from pocketvlm.edge.bundle import MANIFEST
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.export.bench import describe_machine, load_average
from pocketvlm.export.bundle import data_of_run, export_bundle
from pocketvlm.export.calibration import DEFAULT_SIZE, build_calibration
from pocketvlm.export.mixed import Plan
from pocketvlm.export.quantize_points import Goal, Judge, Lab, Point, Verdict, make_judge, parse_goal
from pocketvlm.export.quantize_report import JSON_FILE, save_report
from pocketvlm.export.sensitivity import Damage, measure_blocks
from pocketvlm.export.source import Source, open_source
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.onnx import prepared_tower
from pocketvlm.export.validation import DEFAULT_PICTURES, build_validation

BUNDLE, PLAN = "bundle", "plan.json"
# pictures that blocks are ranked on; lists are judged on all
RANKED_ON = 192
# members of the shortest prefix that are tried to be dropped, those that cost the most bytes first
_DROPS = 4
# what is measured beside float, int8 and mixtures, in the order of what it takes to write
_OTHERS = ("w8a8-dynamic", "w4", "w8a8-static")
Prefer = Literal["both", "size", "latency"]


@dataclass(frozen=True)
class Quantized:
    """What `quantize` found. points: all, with times. chosen: the one that meets the budget; None where none does.
    nearest: then, the one that misses it least. front: names of the points that no other beats in size, time and
    accuracy. damages: of every block. facts: about sample and machine."""

    student: str
    judge: Judge
    points: tuple[Point, ...]
    chosen: Point | None
    nearest: Point
    front: tuple[str, ...]
    damages: tuple[Damage, ...]
    facts: dict[str, Any]


def quantize(
    run: Source,
    out: str | Path,
    *,
    budget: str,
    data: str | Path | DataSource | None = None,
    target: str = "onnx",
    precisions: Sequence[str] | None = None,
    verdict: Verdict = "auto",
    prefer: Prefer = "both",
    pictures: int = DEFAULT_PICTURES,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Quantized:
    """Measure the ways to quantize a student and export the one that a budget asks for.

    Args:
        run: a `Student`, a run or student folder, or an `Exportable`.
        out: gets quantize.json, its plot (png and svg) and, where a point meets the budget, plan.json (of a mixed one)
            and the bundle.
        budget: see `quantize_points.FORMS`.
        data: captioned pictures, of which a calibration sample and others to judge on are taken; None: the training
            data of the run. Never those of a test that you will report.
        target: "onnx" or "executorch", whose files run here; a plan made with one serves all.
        precisions: beside fp32, int8 and mixed. None: those of w8a8-dynamic, w4 and w8a8-static that the target writes.
        verdict: "bound" counts a loss by its one-sided 95 % bound, "estimate" as measured; "auto" takes the bound where
            the sample can prove the budget.
        prefer: which of the points within the budget is taken: the least size, latency, or product of both. Under a
            size budget it is the most accurate.
        pictures: at most so many to judge on.

    Raises:
        UsageError: a budget that cannot be read, no data or too little, a target whose files cannot run here, a student
            without both towers, or an `out` that is not empty. UnknownNameError: no such target or precision.
    """
    say, out = progress or (lambda line: None), Path(out)
    goal = parse_goal(budget)
    if target == "coreml":
        raise UsageError(
            "target coreml was given, whose files run on macOS only, so no point could be measured; quantize for onnx "
            "and give its plan to 'pocketvlm export --targets coreml --precisions mixed --plan'"
        )
    opened = get_target(target)
    others = [p for p in _OTHERS if p in opened.precisions] if precisions is None else list(precisions)
    for precision in others:
        if precision not in opened.precisions or precision == "mixed":
            raise unknown_name(f"precision of target {target}", precision, {*opened.precisions} - {"mixed"})
    _check_out(out, overwrite)
    spec = data or data_of_run(run)
    if spec is None:
        raise UsageError(
            "the model comes from no run folder, which would name its training data, so there is nothing to calibrate "
            "and judge on; give captioned pictures by --data"
        )
    model = open_source(run)
    tokenizer, contract = model.tokenizer(), model.towers.contract
    if model.towers.image is None or model.towers.text is None or tokenizer is None:
        raise UsageError(
            f"{contract.name!r} has not both an image and a text tower, and points are judged by finding pictures and "
            "captions by each other; export it at a precision of your choice instead"
        )
    say("reading data")
    source = spec if isinstance(spec, DataSource) else open_data(str(spec))
    calibration = build_calibration(source, contract, tokenizer, size=DEFAULT_SIZE)
    validation = build_validation(source, contract, tokenizer, calibration=DEFAULT_SIZE, size=pictures)
    before = load_average()
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(model.towers, opened, calibration, validation, Path(scratch), say)
        plain = lab.measure("int8", "int8")
        if plain.failed:
            raise UsageError(f"int8 files cannot be written ({plain.failed}), of which mixed ones are made")
        for precision in others:
            lab.measure(precision, precision)
        judge = make_judge(goal, plain, verdict)
        say(f"judged {judge.why}")
        modules = {"image": model.towers.image, "text": model.towers.text}
        ready = {tower: (each, prepared_tower(each, calibration, tower)) for tower, each in modules.items()}  # type: ignore[arg-type]
        damages = measure_blocks(ready, validation.first(RANKED_ON), say)
        search(lab, judge, damages)
        points = lab.timed(lab.points)
    meeting = [point for point in points if judge.meets(point)]
    chosen = min(meeting, key=lambda point: _cost(goal, prefer, point, points)) if meeting else None
    nearest = max(points, key=lambda point: (judge.value(point), -point.ratio))
    facts = {
        "budget": goal.text,
        "target": target,
        "prefer": prefer,
        "judged": judge.why,
        "calibration": calibration.description,
        "validation": validation.description,
        "blocks_ranked_on": f"the first {min(RANKED_ON, len(validation.pixels))} of these pictures",
        "queries": plain.changes[5].queries,
        "machine": {**describe_machine(), "load_average_before": before, "load_average_after": load_average()},
    }
    found = Quantized(contract.name, judge, tuple(points), chosen, nearest, tuple(front(points)), tuple(damages), facts)
    out.mkdir(parents=True, exist_ok=True)
    for name in (PLAN, JSON_FILE):
        (out / name).unlink(missing_ok=True)
    if chosen is not None:
        plan = None
        if chosen.precision == "mixed":
            plan = _plan(chosen, found, contract.model_id, contract.digest())
            plan.save(out / PLAN)
        say(f"exporting {chosen.name}")
        wanted = [f"{target}:{p}" for p in dict.fromkeys(("fp32", chosen.precision))]
        export_bundle(model, out / BUNDLE, wanted, calibration_data=source, overwrite=overwrite, plan=plan)
    save_report(found, out)
    return found


def search(lab: Lab, judge: Judge, ranked: Sequence[Damage]) -> Point | None:
    """Try lists of blocks in float, ranked most worthwhile first, until the fewest are found that meet the goal.

    Where int8 meets it already, some growing lists are measured all the same, to show what they would give.

    Returns:
        The mixed point found; None where even all blocks in float do not meet the goal, or none need to be.
    """

    def trial(blocks: Sequence[Damage]) -> Point:
        keep: dict[str, list[str]] = {"image": [], "text": []}
        for one in blocks:
            keep[one.tower].append(one.block)
        return lab.measure(f"mixed {len(blocks)}", "mixed", keep)

    plain, full = lab.measure("int8", "int8"), lab.full
    if judge.goal.kind == "size":
        room = judge.goal.limit * full.mb * 1e6 - plain.mb * 1e6
        chosen = [one for index, one in enumerate(ranked) if sum(x.extra_bytes for x in ranked[: index + 1]) <= room]
        while chosen:
            if judge.meets(fitting := trial(chosen)):
                return fitting
            chosen = chosen[:-1]
        return None
    if judge.meets(plain):
        for count in sorted({max(1, len(ranked) // 5), max(1, len(ranked) // 2)}):
            trial(ranked[:count])
        return None
    point: Point | None = None
    low, high = 0, len(ranked)
    while high - low > 1:
        middle = (low + high) // 2
        if judge.meets(tried := trial(ranked[:middle])):
            point, high = tried, middle
        else:
            low = middle
    # all in float are large files, so they are tried last
    if point is None and not judge.meets(point := trial(ranked)):
        return None
    kept = list(ranked[:high])
    # the last one is needed: without it the prefix failed
    for one in sorted(kept[:-1], key=lambda one: -one.extra_bytes)[:_DROPS]:
        fewer = [other for other in kept if other is not one]
        if judge.meets(tried := trial(fewer)):
            point, kept = tried, fewer
    return point


def front(points: Sequence[Point]) -> list[str]:
    """Names of the points that no other beats: as small, fast and accurate (by `margin_noise`), and better in one."""

    def numbers(point: Point) -> tuple[float, float, float]:
        return point.mb, point.total_ms, point.margin_noise

    good = [point for point in points if not point.failed]
    return [
        point.name
        for point in good
        if not any(
            all(a <= b for a, b in zip(numbers(other), numbers(point))) and numbers(other) != numbers(point)
            for other in good
        )
    ]


def _cost(goal: Goal, prefer: Prefer, point: Point, points: Sequence[Point]) -> float:
    if goal.kind == "size":
        return point.margin_noise
    if prefer == "size":
        return point.mb
    return point.total_ms if prefer == "latency" else point.mb * point.total_ms


def _plan(chosen: Point, found: Quantized, student: str, digest: str) -> Plan:
    why: dict[str, Any] = {"judged": found.judge.why, "result": found.judge.sentence(chosen), "blocks": {}}
    for one in found.damages:
        why["blocks"].setdefault(one.tower, {})[one.block] = one.to_dict()
    measured = f"{found.facts['validation']}; blocks ranked on {found.facts['blocks_ranked_on']}"
    return Plan(chosen.keep, student, digest, found.judge.goal.text, why, measured)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise UsageError(f"output {str(out)!r} is a file and a folder is needed; name another path")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"output folder {str(out)!r} is not empty and its files would be replaced; pass overwrite (--overwrite) or "
            "choose another folder"
        )
    if not (out / JSON_FILE).is_file() or ((out / BUNDLE).exists() and not (out / BUNDLE / MANIFEST).is_file()):
        raise UsageError(
            f"output folder {str(out)!r} holds files and no {JSON_FILE} of this command, so nothing in it is replaced; "
            "choose another folder"
        )
