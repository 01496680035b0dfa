"""The losses that `benchmarks.ablation` has no place for, on a trunk that moves: its stage `moving`.

    python -m benchmarks.ablation --stage moving

`hint` compares what lies before the projection, and so teaches nothing while the trunk stands still; `token-gram` and
`hint` on maps read the teacher's token maps, `token-alignment` the student's, `masked-language` and `region-self` run a
forward of their own. All have the settings of `MOVED` here, the base and `feature` too, and one weight: that at which
their gradient is the base's at the first step. Of these arms nothing is chosen by the queries that are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.ablation import TUNED_ON
from benchmarks.ablation_arms import BASE, MOVING, PROTOCOLS
from benchmarks.ablation_pooled import DIRECTIONS, Row, pooled
from benchmarks.ablation_runs import Job, job_of
from benchmarks.ablation_summary import (
    _every_fold,
    _listed,
    _screening_table,
    _title,
    _wrapped,
)

MOVED: dict[str, Any] = {"trunk": 3.0, "fit_projection": 0.1, "batch_size": 64, "steps": 100}
"""Changes from the ablation's settings: the rate of the trunk's upper blocks is recipe `best`'s. The projection starts
at its ridge solution towards the captions, as in recipes `clipself` and `lightclip-mlm-style`: from a random one,
`region-self` would hold the student to what nobody said. Fewer and smaller steps: one of them costs several times the
ablation's."""

METHOD = f"""
    The losses that have no place in the tables above, beside the same base and `feature` beside it, all under settings
    of their own: the upper blocks of the image trunk move at {MOVED["trunk"]:g} times the learning rate, as in `best`;
    the image projection starts at its ridge solution towards the captions (strength {MOVED["fit_projection"]:g}), so
    that `region-self` has a start to learn from; {MOVED["steps"]} steps of {MOVED["batch_size"]} pictures. The
    teacher's maps are those of its image network's last layer, 5 × 5 places. Options are the defaults, and r is 1 in
    every arm: at the first step its gradient is as large as the base's. That need not be an arm's best; nothing was
    chosen by these queries but the learning rate (for the base) and the trunk's (for `best`). Fold {TUNED_ON} alone,
    whose test concepts neither teacher nor student has seen; the intervals resample concepts, and cover
    neither another fold or seed nor the choice of r and of the settings."""
READ = """
    Above the base, 0 outside the interval: {above}. Below it: {below}. The others are within noise. Of {compared}
    comparisons without any difference about {chance:.1g} would stand there too, so that an interval whose end is close
    to 0 decides nothing."""


def moving_jobs(protocols: Sequence[str], seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        for protocol in protocols:
            for arm in MOVING:
                yield job_of("moving", arm, protocol, TUNED_ON, seed, 1.0, None, **MOVED)


def moving_of(rows: list[Row]) -> dict[str, Any]:
    """By protocol: every arm against the base, pooled over the seeds that it has."""
    concepts = {row["id"]: row["concepts"] for row in rows if "concepts" in row}
    found: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        runs: dict[str, dict[tuple[int, int], Row]] = {arm.name: {} for arm in MOVING}
        for row in rows:
            # of one run made twice under two definitions, the later line is the one that was asked for last
            if row.get("protocol") == protocol and row["tuned"] == MOVED and row["arm"] in runs:
                runs[row["arm"]][row["fold"], row["seed"]] = row
        base = runs[BASE.name]
        arms = {
            name: pooled([own[key] for key in sorted(own)], [base[key] for key in sorted(own)], concepts)
            for name, own in runs.items()
            if _every_fold(own, base)
        }
        if arms:
            found[protocol] = {
                "seeds": sorted(seed for _, seed in base),
                "queries": [len(next(iter(base.values()))["ranks"][direction]) for direction in DIRECTIONS],
                "arms": arms,
                "skipped": {},
                "missing": [name for name in runs if name not in arms],
            }
    return found


def moving_section(found: dict[str, Any]) -> list[str]:
    """Of docs/ablation.md."""
    lines = ["## Screening with a trunk that moves", "", *_wrapped(METHOD)]
    above, below, compared = [], [], 0
    for protocol, part in found.items():
        lines += [f"### {_title(protocol)}, trunk moving", "", *_screening_table(part), ""]
        most = part["arms"][BASE.name]["runs"]
        fewer = [f"`{name}` {row['runs']}" for name, row in part["arms"].items() if row["runs"] < most]
        told = f"Runs of seed {_listed(part['seeds'])}; {' and '.join(map(str, part['queries']))} queries a direction."
        told += f" Of the first seeds alone: {', '.join(fewer)} runs." if fewer else ""
        told += f" Not run: {', '.join(f'`{name}`' for name in part['missing'])}." if part["missing"] else ""
        lines += _wrapped(told)
        for name, row in part["arms"].items():
            compared += name != BASE.name
            above += [f"`{name}` ({protocol})"] if row["both"]["low"] > 0 else []
            below += [f"`{name}` ({protocol})"] if row["both"]["high"] < 0 else []
    told = READ.format(
        compared=compared,
        chance=compared * 0.05,
        above=", ".join(above) or "none",
        below=", ".join(below) or "none",
    )
    return [*lines, *_wrapped(told)]
