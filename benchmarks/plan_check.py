"""What `pocketvlm plan` says of a run by measured constants, beside what the run takes.

    python -m benchmarks.plan_check --device cuda --out FOLDER

after `python -m benchmarks.device_constants` with the same --device and --out, whose constants it plans with. Each case
trains 60 steps by the loop (bfloat16 on a GPU) over 2,048 made-up pictures and random teacher embeddings, so that the
later steps find all pictures decoded. Of the 50 last steps: the median of a step, of its wait for data, and pictures a
second; of all: the most that the device had allocated. Then the same step alone, over a batch that is there already,
and the making of a batch alone. Two plans stand beside it: by the constants, and `here`, timed on this device.

The result is plan_check_NAME.json in the folder, written after each case; nothing further is begun after `--limit-s`
seconds. About a minute on a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.device_constants import SETTINGS, median, short_name
from benchmarks.made_up_run import OVERRIDES, STUDENT, make_inputs, recipe
from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.distill.counting import timing
from pocketvlm.distill.devices import Device, load_devices
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.plan import HERE, Plan, make_plan
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.run_folder import METRICS, read_metrics
from pocketvlm.teachers.device import full_float32, pick_device

PICTURES, STEPS, FIRST = 2048, 60, 10
# (student, overrides, batch): the one whose towers gave the constants, and others
CASES: tuple[tuple[str, dict[str, Any], int], ...] = (
    (STUDENT, OVERRIDES, 1024),
    (STUDENT, OVERRIDES, 64),
    ("vit-tiny", {}, 1024),
    ("repvit-m0.9", {}, 512),
)


def main(device: Literal["cpu", "cuda"] = "cuda", out: Path = RESULTS, limit_s: float = 70) -> None:
    """Run the cases, and write the result into the folder `out`."""
    began = time.monotonic()
    place = pick_device(device)
    name = short_name(torch.cuda.get_device_name()) if device == "cuda" else device
    measured = out / ("device_constants.json" if device == "cpu" else f"device_constants_{name}.json")
    constants = measured_device(name, json.loads(measured.read_text(encoding="utf-8")))
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.plan_check --device {device}", "machine": machine(),
        "constants": {key: getattr(constants, key) for key in constants.sources}, "pictures": PICTURES, "steps": STEPS,
        "cases": [],
    }  # fmt: skip
    file, cases = f"plan_check_{name}.json", result["cases"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_inputs(work, PICTURES)

        def asked(student: str, overrides: dict[str, Any], batch: int) -> Recipe:
            return recipe(work, student=student, overrides=overrides, batch=batch, steps=STEPS, device=device)

        # what a machine may be lent for briefly comes first: all runs, then the plans that are timed
        for case in CASES:
            if time.monotonic() - began > limit_s:
                break
            row: dict[str, Any] = dict(zip(("student", "overrides", "batch"), case))
            row["measured"] = ran(asked(*case), place, work / f"run-{len(cases)}")
            row["planned"] = {"by constants": says(make_plan(asked(*case), device=constants))}
            cases.append(compared(row))
            write(file, result, out)
        for row, case in zip(cases, CASES):
            if time.monotonic() - began > limit_s:
                break
            row["planned"][HERE] = says(make_plan(asked(*case), device=HERE))
            compared(row)
            write(file, result, out)


def compared(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what its plans say over what was measured, where it was; printed."""
    taken = row["measured"]
    row["planned_over_measured"] = {
        name: {key: round(value / taken[key], 3) for key, value in said.items() if taken.get(key)}
        for name, said in row["planned"].items()
    }
    print(json.dumps(row), flush=True)
    return row


def measured_device(name: str, result: dict[str, Any]) -> Device:
    """The constants of a result of `benchmarks.device_constants`, with the table's where it has none."""
    table = load_devices()
    base, found = table.get(name, table["h100"]), result["constants"]
    if "gpu" in result:
        found = found | {"memory_gb": result["gpu"]["memory_bytes"] / 1e9, "cores": result["gpu"]["cores_beside"]}
    sources = base.sources | dict.fromkeys(found, ("measured", result["command"]))
    return dataclasses.replace(base, name=name, sources=sources, **found)


def says(plan: Plan) -> dict[str, float]:
    """Of a plan, under the names that `ran` gives to what it measured."""
    time, run, memory = (plan.values[part] for part in ("time", "run", "memory"))
    step = time["compute_s"] / run["steps"]
    return {
        "step_s": step, "alone_s": step, "samples_per_s": run["batch"] / step, "decode_s": time["decode_s"],
        "peak_bytes": memory["device_bytes"], "whole_s": time["training_s"],
    }  # fmt: skip


def ran(asked: Recipe, device: torch.device, out: Path) -> dict[str, float | None]:
    """step_s, wait_s, samples_per_s: of the later steps; alone_s: of a step whose batch is there; feed_s: of making one
    of pictures that are decoded. whole_s: of all steps. peak_bytes: the most allocated in them beyond what was there
    before; None on a CPU."""
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    out.mkdir()
    with full_float32():
        trainer = Trainer(prepare(asked, Reporter(False)), device)
        trainer.start()
        trainer.train(out, Reporter(False))
        peak = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else None
        batch = trainer.feed.make(0)

        def step() -> None:
            trainer.step = 1  # the schedule ends where the run did
            trainer.one_step(batch)

        alone = median(step, *SETTINGS[device.type][1:])
        feed = timing(lambda: trainer.feed.make(0))
    rows = [row for row in read_metrics(out / METRICS) if "step_s" in row]
    later = rows[FIRST:]
    step_s = statistics.median(row["step_s"] for row in later)
    return {
        "step_s": step_s,
        "wait_s": statistics.median(row["data_wait_s"] for row in later),
        "alone_s": alone.wall_s,
        "feed_s": feed.wall_s,
        "samples_per_s": trainer.order.batch_size / step_s,
        "whole_s": sum(row["step_s"] for row in rows),
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    tyro.cli(main)
