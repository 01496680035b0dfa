"""CPU seconds of a rank for the losses of one batch, as their number grows: each makes its rows of every matrix.

    python -m benchmarks.shared_loss

One step as in benchmarks.contrastive_memory, over embeddings [8192, 384] of the whole batch, which every rank holds
once they are gathered: forward and backward down to these, at the shipped settings. Each rank is a process of one
thread with gloo. Not in it: gathering the embeddings and adding up their gradients, which a run does whether its losses
are shared out or not. "whole" is every rank computing all, as one rank does.

The value must be one rank's to 1e-6, and the mean over ranks of the gradients have its norm. The result,
benchmarks/results/shared_loss.json, holds the machine and its load. Two minutes on two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from benchmarks.contrastive_memory import CASES, DIM, embeddings, run
from pocketvlm.distill.objectives import Widths, build_objective
from pocketvlm.distill.objectives.blocks import shared_rows

ROWS, LIMIT = 8192, 64 << 20
RANKS, ROUNDS = (1, 2, 4), 3


def rank_step(case: str, rows: int, rank: int, count: int, whole: bool, rounds: int) -> dict[str, Any]:
    """This rank's step, once unmeasured and then `rounds` times."""
    widths = Widths(DIM)
    objectives = [build_objective(name, student=widths, teacher=widths) for name in CASES[case]]
    taken = []
    for _ in range(rounds + 1):
        student, teacher = embeddings(rows, 0, grad=True), embeddings(rows, 1, grad=False)
        if count > 1:
            dist.barrier()
        cpu = time.process_time()
        with shared_rows(rank, count, 1 << 62 if whole else None):
            loss = run(objectives, "blocks", student, teacher, LIMIT)
        taken.append(time.process_time() - cpu)
    gradient = student.image.grad
    assert gradient is not None, "the step reaches the embeddings"
    if count > 1:
        dist.all_reduce(gradient)
    return {
        "cpu_s": round(statistics.median(taken[1:]), 3),
        "loss": float(loss.detach()),
        "gradient_norm": float(gradient.norm()) / count,
    }


def started(case: str, rows: int, count: int, whole: bool, rounds: int) -> dict[str, Any]:
    """All ranks of one case, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.shared_loss", "--case", case, "--rows", str(rows)]
        command += ["--rounds", str(rounds), "--count", str(count), "--meet", str(Path(folder) / "meet")]
        command += ["--whole"] if whole else []
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        said = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"a rank of {case} with {count} failed; see above")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    return {
        "case": case, "rows": rows, "ranks": count, "losses": "whole" if whole else "shared",
        "cpu_s": max(one["cpu_s"] for one in found), "loss": found[0]["loss"],
        "gradient_norm": found[0]["gradient_norm"],
    }  # fmt: skip


def main(
    case: str = "", rows: int = ROWS, rounds: int = ROUNDS, rank: int = 0, count: int = 1, whole: bool = False,
    meet: str = "",
) -> None:  # fmt: skip
    """Without a case all of them, into the results folder. With one, this process is a rank of it."""
    if case:
        torch.set_num_threads(1)
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=count)
        print(json.dumps(rank_step(case, rows, rank, count, whole, rounds)))
        return
    from benchmarks.results_folder import machine, write

    found: list[dict[str, Any]] = []
    for name in ("clip", "fd+crd+icl"):
        for ranks, all_of_it in [*((n, False) for n in RANKS), (RANKS[-1], True)]:
            found.append(started(name, rows, ranks, all_of_it, rounds))
            one = next(row for row in found if row["case"] == name)
            for key in ("loss", "gradient_norm"):
                if abs(found[-1][key] - one[key]) > 1e-6 * abs(one[key]):
                    raise SystemExit(f"{key} of {name} with {ranks} ranks is {found[-1][key]} and {one[key]} with one")
            found[-1]["of_one_rank"] = round(found[-1]["cpu_s"] / one["cpu_s"], 3)
            print(found[-1], flush=True)
    write(
        "shared_loss.json",
        {"command": "python -m benchmarks.shared_loss", "machine": machine(), "rounds": rounds, "cases": found},
    )


if __name__ == "__main__":
    tyro.cli(main)
