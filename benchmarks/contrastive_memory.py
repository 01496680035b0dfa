"""Peak memory and time of a contrastive step over many rows: the matrix whole, in blocks, and in checkpointed blocks.

    python -m benchmarks.contrastive_memory

One step: raw embeddings of student and teacher [B, 384] that lie in memory (a tiny student's forward would add its
activations of one micro-batch), the objectives' forward, and the backward down to the student's embeddings. Every case
runs in a fresh process with one thread. Its peak is the kernel's VmHWM, so everything counts: interpreter, libraries,
embeddings, gradients. `step_bytes` is that less what the process held when the step began.

Arms: "whole" holds the matrices, as small batches do. "blocks" is what large batches do (`objectives.blocks`).
"checkpoint" is the same loss by torch.utils.checkpoint over blocks of rows, once for each direction: the alternative
that was not taken.

The result, benchmarks/results/contrastive_memory.json, is written after each case and holds the machine and its
load. Five minutes on one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from pocketvlm.distill.objectives import Outputs, Widths, build_objective
from pocketvlm.distill.objectives.blocks import Similarity, similarity_bytes, summed_rows
from pocketvlm.distill.objectives.once import made_once, unit

DIM, FLOOR_BYTES, FLOOR_ROWS = 384, 1.5e9, 32_768
CASES = {
    "clip": ("clip",),
    "fd+crd+icl": ("feature", "crd", "icl"),
    "clip+fd+crd+icl": ("clip", "feature", "crd", "icl"),
}
PLAN = [
    ("clip", "whole", 8192),
    ("clip", "checkpoint", 8192),
    ("clip", "blocks", 8192),
    ("fd+crd+icl", "whole", 8192),
    ("fd+crd+icl", "blocks", 8192),
    ("clip", "blocks", FLOOR_ROWS),
    ("fd+crd+icl", "blocks", FLOOR_ROWS),
]


def held() -> tuple[int, int]:
    """(bytes in memory now, most ever) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "VmHWM"))}
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


def embeddings(rows: int, seed: int, *, grad: bool) -> Outputs:
    g = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(rows, DIM, generator=g).requires_grad_(grad) for _ in range(2))
    return Outputs(
        image=image,
        text=text,
        has_text=torch.ones(rows, dtype=torch.bool),
        logit_scale=torch.tensor(50.0, requires_grad=grad),
        # one caption in four is another row's too
        group=torch.arange(rows) % (rows - rows // 8),
    )


def checkpointed_clip(student: Outputs) -> Tensor:
    """`clip` without duplicates by checkpoints, a pass for each direction."""
    image, text = unit(student.image), unit(student.text)  # type: ignore[arg-type]
    total = torch.zeros(())
    for queries, keys in ((image, text), (text, image)):

        def loss(block: Tensor, rows: slice) -> Tensor:
            return -block.log_softmax(dim=-1).diagonal(rows.start).sum()

        total = total + summed_rows(loss, Similarity(queries, keys, student.logit_scale)) / (2 * len(image))
    return total


def run(objectives: Sequence[Any], arm: str, student: Outputs, teacher: Outputs, limit: int) -> Tensor:
    """Forward and backward of the objectives' sum."""
    with similarity_bytes(1 << 62 if arm == "whole" else limit), made_once():
        if arm == "checkpoint":
            loss = checkpointed_clip(student)
        else:
            loss = torch.zeros(())
            for objective in objectives:
                given = teacher if objective.needs.targets else None
                loss = loss + sum(objective(student=student, teacher=given).values())
    loss.backward()
    return loss


def step(case: str, arm: str, rows: int, limit: int) -> dict[str, Any]:
    """Run one case in this process."""
    student, teacher = embeddings(rows, 0, grad=True), embeddings(rows, 1, grad=False)
    widths = Widths(DIM)
    objectives = [build_objective(name, student=widths, teacher=widths) for name in CASES[case]]
    run(objectives, arm, embeddings(8, 2, grad=True), embeddings(8, 3, grad=False), limit)  # loads libraries
    before = held()[0]
    cpu, wall = time.process_time(), time.perf_counter()
    loss = run(objectives, arm, student, teacher, limit)
    peak = held()[1]
    assert student.image.grad is not None, "the step reaches the embeddings"
    return {
        "case": case, "arm": arm, "rows": rows, "dim": DIM, "limit_mib": limit / 2**20,
        "peak_bytes": peak, "step_bytes": peak - before,
        "cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - wall, 2),
        "loss": float(loss.detach()), "gradient_norm": float(student.image.grad.norm()),
    }  # fmt: skip


def main(
    case: Literal["all", "clip", "fd+crd+icl"] = "all",
    arm: Literal["whole", "blocks", "checkpoint"] = "blocks",
    rows: int = FLOOR_ROWS,
    limit_mib: Annotated[float, tyro.conf.arg(help="matrices above this are made in blocks")] = 64,
) -> None:
    """One case, printed; or all of the plan, each in a process of its own, into the results folder."""
    if case != "all":
        torch.set_num_threads(1)
        print(json.dumps(step(case, arm, rows, int(limit_mib * 2**20))))
        return
    # not above: it loads the image models' libraries, and the measured processes need none of these
    from benchmarks.results_folder import machine, write

    found, before = [], os.getloadavg()[0]
    for name, kind, count in PLAN:
        command = [sys.executable, "-m", "benchmarks.contrastive_memory", "--case", name, "--arm", kind]
        ran = subprocess.run([*command, "--rows", str(count)], check=True, capture_output=True, text=True)
        found.append(json.loads(ran.stdout.splitlines()[-1]))
        print({key: found[-1][key] for key in ("case", "arm", "rows", "peak_bytes", "cpu_s")}, flush=True)
        large = [row for row in found if row["rows"] == FLOOR_ROWS]
        result = {
            "command": "python -m benchmarks.contrastive_memory",
            "machine": machine(),
            "load_average_before_and_after": [round(before, 2), round(os.getloadavg()[0], 2)],
            "floor": {"rows": FLOOR_ROWS, "peak_bytes": FLOOR_BYTES},
            "above_floor": [row["case"] for row in large if row["peak_bytes"] > FLOOR_BYTES],
            "not_run": PLAN[len(found) :],
            "cases": found,
        }
        write("contrastive_memory.json", result)


if __name__ == "__main__":
    tyro.cli(main)
