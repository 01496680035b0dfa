"""A run that is killed twenty times, anywhere, also in the middle of a checkpoint, ends with the same weights; so does
one that reads a stream by a process of its own.

One process imports torch and prepares the inputs; it forks a child for every attempt (for a stream, starts one), which
kills itself by SIGKILL at the n-th of the moments at which a kill could hurt: before a step, half-way through a file,
before a rename.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import make_world, toy_recipe, use_toy_teacher
from stream_toys import write_world
from test_stream_runs import stream_recipe

from pocketvlm.distill import checkpoint, loop
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.students import load_student

KILLS, STEPS = {"listed": 20, "stream": 2}, 24
STREAM = (
    f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=2", "student.overrides.text.dropout=0.2",
    "train.batch_size=4", "data.stream.workers=1",
)  # fmt: skip
CHANGES = (*STREAM[:-1], "eval.metrics=[retrieval]", "train.text_batch=8")


def wanted(folder: Path, kind: str) -> Recipe:
    if kind == "stream":
        return load_recipe(stream_recipe(folder / "shards"), STREAM)
    return load_recipe(toy_recipe(folder / "world" / "world.jsonl", folder / "cache"), CHANGES)


def train(folder: Path, kind: str, name: str, last: int) -> None:
    """Trains `name` and dies at this process's moment number `last`, if it is not 0."""
    if last:
        die_at(last, folder / "moment")
    loop.distill_run(wanted(folder, kind), folder / name, resume=True, progress=False)


def main(folder: Path, kind: str) -> None:
    """Trains "whole" at once and "killed" in pieces, and leaves the moments of the kills in kills.json."""
    if kind == "listed":
        prepared = loop.prepare(wanted(folder, kind), Reporter(False))
        loop.prepare = lambda recipe, report: prepared.with_recipe(recipe)  # type: ignore[assignment]

    def attempt(name: str, last: int) -> int:
        """How a child ended: the signal, or 0."""
        if kind == "stream":
            # the readers of a forked run would be the children of two
            command = [sys.executable, __file__, str(folder), kind, name, str(last)]
            return -subprocess.run(command, timeout=300).returncode
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(folder, kind, name, last)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

    assert attempt("whole", 0) == 0
    rng, kills = np.random.default_rng(0), []
    for _ in range(KILLS[kind]):
        ended = attempt("killed", int(rng.integers(1, 14)))
        kills.append([ended, (folder / "moment").read_text()])
    assert attempt("killed", 0) == 0
    (folder / "kills.json").write_text(json.dumps(kills))


def die_at(last: int, note: Path) -> None:
    """Count the moments of this process, and kill it at number `last`."""
    count = 0
    real_step, real_replace = loop.Trainer.one_step, os.replace

    def moment(what: str, before: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count == last:
            before()
            note.write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def one_step(self: Any, batch: Any) -> Any:
        moment("step")
        return real_step(self, batch)

    def write(path: Path, data: bytes | memoryview) -> None:
        moment("write", lambda: path.write_bytes(data[: len(data) // 2]))
        real_write(path, data)

    def replace(source: Any, target: Any) -> None:
        moment("rename")
        real_replace(source, target)

    real_write = checkpoint._write_and_sync
    loop.Trainer.one_step = one_step  # type: ignore[method-assign]
    checkpoint._write_and_sync = write
    os.replace = replace  # type: ignore[assignment]


@pytest.mark.parametrize("kind", KILLS)
def test_a_run_killed_many_times_ends_with_the_same_weights(tmp_path: Path, kind: str) -> None:
    make_world(tmp_path / "world")
    write_world(tmp_path / "shards")
    command = [sys.executable, __file__, str(tmp_path), kind]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert [ended for ended, _ in kills] == [signal.SIGKILL] * KILLS[kind]
    if kind == "listed":
        assert {what for _, what in kills} == {"step", "write", "rename"}
    ours, theirs = (load_student(tmp_path / name).contract.model_id for name in ("killed", "whole"))
    assert ours == theirs
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    steps = [[row["step"] for row in part if "loss" in row] for part in rows]
    assert steps[0] == steps[1] == [*range(1, STEPS + 1)]
    losses = [[row["loss"] for row in part if "loss" in row] for part in rows]
    assert losses[0] == losses[1]
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.suffix != ".sha256"}
    assert left == {f"step-{STEPS - 2:08d}.pt", f"step-{STEPS:08d}.pt"}


if __name__ == "__main__":
    use_toy_teacher()
    if len(sys.argv) == 3:
        main(Path(sys.argv[1]), sys.argv[2])
    else:
        train(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
