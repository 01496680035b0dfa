"""Whether a teacher waits for its cache: building one against decoding and the teacher's forward alone.

    python -m benchmarks.cache_build

Pictures are those of the built-in data's student pool, the teacher is `openmoji-lit?fold=0`, four views of each in
batches of 32. Three jobs in turn, each over the same pictures, after one unmeasured round:

- `alone`: what no cache can do without, as fast as it goes here: pictures are decoded and views drawn by the threads
  that a build has, as many batches ahead, while the teacher works; nothing is kept.
- `build`: `teachers.cache_build.build_cache` in bfloat16 into an empty folder: the same, and hashes of the pictures,
  packed parameters, stacking, rounding, writing and syncing, the manifest.
- `serial`: decoding and forward by turns, for what the overlap is worth.

A round's ratio is alone / build of its seconds (1: the cache costs nothing; the floor is 0.95); the result is the
median over rounds, for wall and for CPU time, in benchmarks/results/cache_build.json with the machine and its load. CPU
time counts all threads. Disk: the folder for temporary files. About a minute on an idle machine.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results_folder import machine, write
from pocketvlm.data import open_data
from pocketvlm.data.augment import AugmentPolicy, apply_view, view_params
from pocketvlm.data.sample import Sample
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.cache_build import build_cache

PICTURES, VIEWS, BATCH, ROUNDS, FLOOR = 64, 4, 32, 5, 0.95
POLICY = AugmentPolicy()


def drawn(teacher: Teacher, sample: Sample) -> np.ndarray:
    """All views of one picture, [K, S, S, 3] uint8."""
    spec = teacher.image
    pixels = decode_image(sample.image.read(), background=spec.background)
    views = [view_params(sample.uid, view, 0, POLICY) for view in range(1, VIEWS)]
    return np.stack([resize_image(pixels, spec), *(apply_view(pixels, v, spec.size, spec.background) for v in views)])


def groups(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    step = BATCH // VIEWS
    return [samples[start : start + step] for start in range(0, len(samples), step)]


def alone(teacher: Teacher, samples: Sequence[Sample]) -> None:
    """Decoding and forward, overlapped."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        ahead, waiting = iter(groups(samples)), deque[list[Future[np.ndarray]]]()
        while True:
            while len(waiting) <= 2 and (group := next(ahead, None)) is not None:
                waiting.append([pool.submit(drawn, teacher, sample) for sample in group])
            if not waiting:
                return
            pixels = np.concatenate([one.result() for one in waiting.popleft()])
            teacher.encode_images(torch.from_numpy(pixels))


def serial(teacher: Teacher, samples: Sequence[Sample]) -> None:
    """Decoding and forward by turns."""
    for group in groups(samples):
        teacher.encode_images(torch.from_numpy(np.concatenate([drawn(teacher, sample) for sample in group])))


def build(teacher: Teacher, samples: Sequence[Sample]) -> None:
    """A whole cache."""
    with tempfile.TemporaryDirectory() as folder:
        build_cache(
            teacher, samples, [], Path(folder) / "cache", views=VIEWS, policy=POLICY, dtype="bfloat16",
            batch_size=BATCH, shard_size=64,
        )  # fmt: skip


def measure(teacher: Teacher, samples: Sequence[Sample], rounds: int) -> dict[str, Any]:
    """Median seconds of each job, and the median over rounds of the ratios to `build`."""
    jobs: dict[str, Callable[[Teacher, Sequence[Sample]], None]] = {"alone": alone, "build": build, "serial": serial}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for round_ in range(rounds + 1):
        # every round begins with another job, so that none always follows the same one
        names = [*jobs][round_ % 3 :] + [*jobs][: round_ % 3]
        for name in names:
            wall, cpu = time.perf_counter(), time.process_time()
            jobs[name](teacher, samples)
            if round_:
                taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    views = len(samples) * VIEWS
    found: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "cpu")):
        seconds = {name: statistics.median(row[place] for row in rows) for name, rows in taken.items()}
        ratios = {
            f"{name}_over_build": statistics.median(a[place] / b[place] for a, b in zip(taken[name], taken["build"]))
            for name in ("alone", "serial")
        }
        found[clock] = {
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "views_per_second": {name: round(views / value, 1) for name, value in seconds.items()},
            **{name: round(value, 4) for name, value in ratios.items()},
        }
    return found


def main() -> None:
    """Measure and write the result."""
    before = machine()
    samples = open_data("openmoji?pool=student&fold=0").samples[:PICTURES]
    teacher = load_teacher("openmoji-lit?fold=0")
    found = measure(teacher, samples, ROUNDS)
    facts = {
        "teacher": "openmoji-lit?fold=0",
        "pictures": len(samples),
        "views": VIEWS,
        "batch": BATCH,
        "rounds": ROUNDS,
        "threads": torch.get_num_threads(),
        "floor": FLOOR,
    }
    value = {**facts, **found, "machine": before, "load_after": [round(x, 2) for x in os.getloadavg()]}
    print(write("cache_build.json", value))
    for clock in ("wall", "cpu"):
        print(clock, found[clock])


if __name__ == "__main__":
    main()
