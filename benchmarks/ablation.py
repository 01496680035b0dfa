"""Which loss is worth its cost? Every recipe-usable objective and published sum, on one data set, under one protocol.

    python -m benchmarks.ablation --stage all

Arms (`ablation_arms.ARMS`) differ in their losses alone: a student has the same initial weights, pictures, views,
batches, steps and learning rate in all of them. The settings are those that served the base best, the contrastive loss
alone (`--stage tune`: base on fold 0). An objective beside the base has the weight at which its gradient is r times the
base's at the first step; r is chosen on fold 0, seed 0 (`--stage screen`), and what is reported comes from the other
folds, whose test concepts are others, and three seeds (`--stage final`).

Stages: prepare (starts and packs under --work; needs the extra `demo`), tune, screen, final, moving (losses
that have no arm there, with a trunk that moves: `ablation_moving`), summary (the table, the plot and docs/ablation.md,
from the result files alone), all (everything but tune). Each finished run is a line of
benchmarks/results/ablation/STAGE.jsonl with the digest of what it does; a run whose digest is there is not repeated, so
the command continues where it stopped. A second machine needs the tree, torch, timm, pydantic, tyro, and --work.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.ablation_arms import BASE, CANDIDATES, PROTOCOLS, TUNING, chosen
from benchmarks.results_folder import RESULTS, machine

Stage = Literal["prepare", "tune", "screen", "search", "final", "moving", "summary", "all"]
Row = dict[str, Any]
FOLDS, SEEDS = (1, 2, 3, 4), (0, 1, 2)
TUNED_ON = 0
"""The fold and the seed of the stages tune and screen; no final uses this fold."""


# --- result files


def read_rows(path: Path) -> list[Row]:
    """The lines of a result file. A last line that a kill cut short is no result, and is cut off."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return [json.loads(line) for line in data[:whole].splitlines()]


def append_row(path: Path, row: Row) -> None:
    """One line, on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write((json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


class Results:
    """Runs of one stage, by digest; the machine and the concepts of the queries stand once beside them."""

    def __init__(self, out: Path, stage: str) -> None:
        self.path = out / f"{stage}.jsonl"
        rows = read_rows(self.path)
        self.runs = {row["digest"]: row for row in rows if "digest" in row}
        self.known = {row["id"] for row in rows if "id" in row}
        self.machine = ""

    def keep(self, row: Row) -> None:
        if not self.machine:
            facts = machine()
            self.machine = f"machine-{len([name for name in self.known if name.startswith('machine-')])}"
            self._once(self.machine, {"machine": facts})
        if concepts := row.pop("concepts", None):
            self._once(row["queries"], {"concepts": concepts})
        row["machine"] = self.machine
        append_row(self.path, row)
        self.runs[row["digest"]] = row

    def _once(self, name: str, value: Row) -> None:
        if name not in self.known:
            append_row(self.path, {"id": name, **value})
            self.known.add(name)


# --- which runs


def quality(row: Row) -> float:
    """What runs are chosen by: mean reciprocal rank over both directions, in per cent; steadier than R@5."""
    if "ranks" not in row:
        return 0.0
    return 100 * float(np.mean([np.mean(1 / np.array(ranks)) for ranks in row["ranks"].values()]))


def tune_jobs(protocols: Sequence[str]) -> Iterator[Any]:
    """The base with one setting changed at a time, from those in use."""
    from benchmarks.ablation_runs import job_of

    variants = [{}, *({key: value} for key, values in TUNING.items() for value in values)]
    for protocol in protocols:
        for change in variants:
            yield job_of("tune", BASE, protocol, TUNED_ON, TUNED_ON, 1.0, None, **change)


def screen_jobs(arms: Sequence[Any], protocols: Sequence[str]) -> Iterator[Any]:
    from benchmarks.ablation_runs import job_of

    for protocol in protocols:
        for arm in arms:
            for ratio in arm.ratios:
                yield job_of("screen", arm, protocol, TUNED_ON, TUNED_ON, ratio, None)


def search_jobs(protocols: Sequence[str], seeds: Sequence[int]) -> Iterator[Any]:
    """Candidates for recipe `best`, on the fold that no final uses."""
    from benchmarks.ablation_runs import job_of

    for protocol in protocols:
        for arm in CANDIDATES:
            for seed in seeds:
                yield job_of("search", arm, protocol, TUNED_ON, seed, 1.0, 1.0)


def final_jobs(
    arms: Sequence[Any], protocols: Sequence[str], folds: Sequence[int], seeds: Sequence[int], screened: Results
) -> Iterator[Any]:
    """Every arm at the ratio that screened best, a candidate as it is; arms that were not screened whole are left out,
    and named."""
    from benchmarks.ablation_runs import job_of

    for protocol in protocols:
        for arm in arms:
            if arm in CANDIDATES:
                yield from (job_of("final", arm, protocol, fold, seed, 1.0, 1.0) for seed in seeds for fold in folds)
                continue
            rows = [screened.runs.get(job.digest) for job in screen_jobs([arm], [protocol])]
            if None in rows:
                print(f"{protocol} {arm.name}: not screened yet, no finals", flush=True)
                continue
            best = max((row for row in rows if row), key=quality)
            if "ranks" not in best:
                why = best.get("skipped", "diverged at every weight")
                print(f"{protocol} {arm.name}: {why}; no finals", flush=True)
                continue
            for seed in seeds:
                for fold in folds:
                    yield job_of("final", arm, protocol, fold, seed, best["ratio"], best["scale"])


# --- running them


def run_all(
    jobs: Sequence[Any],
    results: Results,
    work: Path,
    device: str,
    processes: int,
    deadline: float,
    how: tuple[Callable[..., None], Callable[[Any], Row], Callable[[Row, int, int, float], None]] | None = None,
) -> bool:
    """Run what has no result, on `processes` workers that stay with one pack while it has runs; True: none is left.

    how: what a worker does first, what it does for a job, and what is said of its row; None: those of the ablation.
    """
    from benchmarks.ablation_runs import enter, run_in_worker

    first, each, tell = how or (enter, run_in_worker, _tell)
    waiting = [job for job in jobs if job.digest not in results.runs]
    if not waiting:
        return True
    began, done, count = time.monotonic(), 0, min(processes, len(waiting))
    failed: list[str] = []

    def worker() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=first, initargs=(work, device))

    pools = [worker() for _ in range(count)]
    at: list[Any] = [None] * count
    running: dict[Future[Row], tuple[int, Any]] = {}
    try:
        free = list(range(count))
        while running or (waiting and time.monotonic() < deadline):
            while free and waiting and time.monotonic() < deadline:
                place = free.pop()
                job = _next(waiting, at, place)
                at[place] = job.group
                running[pools[place].submit(each, job)] = place, job
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                place, job = running.pop(future)
                free.append(place)
                try:
                    row = future.result()
                # one arm that cannot run shall not cost the others their machine
                except Exception as error:
                    failed.append(f"{job.stage} {job.protocol} {job.arm} f{job.fold} s{job.seed}: {error!r}")
                    print(f"failed, no result: {failed[-1]}", flush=True)
                    pools[place].shutdown(wait=False)
                    pools[place], at[place] = worker(), None
                    continue
                results.keep(row)
                done += 1
                tell(row, done, len(waiting) + len(running), time.monotonic() - began)
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        raise SystemExit(f"{len(failed)} runs failed: " + "; ".join(failed[:5]))
    if waiting:
        print(f"time is up: {len(waiting)} runs are left; give the same command again", flush=True)
    return not waiting


def _next(waiting: list[Any], at: list[Any], place: int) -> Any:
    """The worker's next job: of the pack it has open, else of the pack with the most jobs for each worker on it."""
    index = next((i for i, job in enumerate(waiting) if job.group == at[place]), None)
    if index is None:
        groups = [job.group for job in waiting]
        most = max(dict.fromkeys(groups), key=lambda group: groups.count(group) / (1 + at.count(group)))
        index = groups.index(most)
    return waiting.pop(index)


def _tell(row: Row, done: int, left: int, seconds: float) -> None:
    spent = row.get("seconds", {})
    parts = " ".join(f"{part} {value:.1f}" for part, value in spent.items())
    share = 100 * np.mean(np.array(row["ranks"]["image_to_text"]) <= 5) if "ranks" in row else float("nan")
    what = f"{row['stage']} {row['protocol']} {row['arm']} r={row['ratio']} f{row['fold']} s{row['seed']}"
    tuned = f" {row['tuned']}" if row["tuned"] else ""
    print(
        f"{what}{tuned}: R@5 {share:.1f} MRR {quality(row):.2f} | {parts} s, step {row.get('step_ms', 0):.0f} ms | "
        f"{done} done, {left} left, {seconds:.0f} s",
        flush=True,
    )


def prepare_all(
    work: Path,
    folds: Sequence[int],
    seeds: Sequence[int],
    protocols: Sequence[str],
    processes: int,
    moving: bool = False,
) -> None:
    """Starts of all seeds, then packs of all folds and protocols; moving: those with token maps."""
    from benchmarks.ablation_runs import SUPERSET, SUPERSET_MOVING, make_pack, make_start

    reads = SUPERSET_MOVING if moving else SUPERSET

    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        first = [pool.submit(make_start, work, seed) for seed in dict.fromkeys([TUNED_ON, *seeds])]
        for future in first:
            future.result()
        # protocols of one fold share its teacher, so folds are neighbours in this order
        packs = [pool.submit(make_pack, work, fold, protocol, reads) for protocol in protocols for fold in folds]
        for future in packs:
            future.result()


def answer_all(work: Path, out: Path, folds: Sequence[int]) -> None:
    """What the teachers of these folds answer themselves (teacher.jsonl)."""
    from benchmarks.ablation_runs import teacher_row

    known = {row["fold"] for row in read_rows(out / "teacher.jsonl")}
    for fold in folds:
        if fold not in known:
            append_row(out / "teacher.jsonl", teacher_row(work, fold))


def main(
    stage: Stage = "all",
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help="Only these (and the base).")] = (),
    protocols: tuple[Literal["few", "all"], ...] = tuple(PROTOCOLS),  # type: ignore[assignment]
    folds: Annotated[tuple[int, ...], tyro.conf.arg(help="Of the finals.")] = FOLDS,
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(help="Of the finals.")] = SEEDS,
    device: str = "auto",
    processes: Annotated[int, tyro.conf.arg(help="Single-threaded runs at a time.")] = 2,
    limit_seconds: Annotated[float, tyro.conf.arg(help="Begin no run after so many seconds.")] = float("inf"),
    work: Annotated[Path, tyro.conf.arg(help="Starts and packs.")] = Path("runs/ablation"),
    out: Annotated[Path, tyro.conf.arg(help="Result files.")] = RESULTS / "ablation",
) -> None:
    """Run what is missing of a stage."""
    deadline = time.monotonic() + limit_seconds
    work, wanted = work.resolve(), chosen(arms)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # of the workers, which begin afresh
    if stage in ("prepare", "all"):
        used = tuple(dict.fromkeys((TUNED_ON, *folds) if stage == "all" else folds))
        prepare_all(work, used, seeds, protocols, processes)
        answer_all(work, out, used)
    screened = Results(out, "screen")
    if stage == "tune":
        run_all([*tune_jobs(protocols)], Results(out, "tune"), work, device, processes, deadline)
    if stage in ("screen", "all"):
        run_all([*screen_jobs(wanted, protocols)], screened, work, device, processes, deadline)
    if stage == "search":
        run_all([*search_jobs(protocols, seeds)], Results(out, "search"), work, device, processes, deadline)
    if stage in ("final", "all"):
        jobs = [*final_jobs(wanted, protocols, folds, seeds, screened)]
        run_all(jobs, Results(out, "final"), work, device, processes, deadline)
    if stage in ("moving", "all"):
        from benchmarks.ablation_moving import moving_jobs

        prepare_all(work, (TUNED_ON,), seeds, protocols, processes, moving=True)
        run_all([*moving_jobs(protocols, seeds)], Results(out, "moving"), work, device, processes, deadline)
    if stage in ("summary", "all"):
        from benchmarks.ablation_summary import summarise

        summarise(out)


if __name__ == "__main__":
    tyro.cli(main)
