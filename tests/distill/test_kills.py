"""A run that is killed twenty times, anywhere, also in the middle of a checkpoint, ends with the same weights.

One process imports torch and prepares the inputs; it forks a child for every attempt, which kills itself by SIGKILL at
the n-th of the moments at which a kill could hurt: before a step, half-way through a file, before a rename.
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

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import make_world, toy_recipe, use_toy_teacher

from pocketvlm.distill import checkpoint, loop
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.students import load_student

KILLS, STEPS = 20, 24
CHANGES = (
    f"train.steps={STEPS}", "train.log_every=1", "checkpoint.every=2", "student.overrides.text.dropout=0.2",
    "eval.metrics=[retrieval]", "train.batch_size=4", "train.text_batch=8",
)  # fmt: skip


def main(folder: Path) -> None:
    """Trains "whole" at once and "killed" in pieces, and leaves the moments of the kills in kills.json."""
    use_toy_teacher()
    wanted = load_recipe(toy_recipe(folder / "world" / "world.jsonl", folder / "cache"), CHANGES)
    prepared = loop.prepare(wanted, Reporter(False))
    loop.prepare = lambda recipe, report: prepared.with_recipe(recipe)  # type: ignore[assignment]

    def attempt(name: str, last: int | None) -> int:
        """How a child ended that trains `name` and dies at its moment number `last`: the signal, or 0."""
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if last is not None:
                    die_at(last, folder / "moment")
                loop.distill_run(wanted, folder / name, resume=True, progress=False)
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

    assert attempt("whole", None) == 0
    rng, kills = np.random.default_rng(0), []
    for _ in range(KILLS):
        ended = attempt("killed", int(rng.integers(1, 14)))
        kills.append([ended, (folder / "moment").read_text()])
    assert attempt("killed", None) == 0
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


def test_a_run_killed_twenty_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    make_world(tmp_path / "world")
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads((tmp_path / "kills.json").read_text())
    assert [ended for ended, _ in kills] == [signal.SIGKILL] * KILLS
    assert {what for _, what in kills} == {"step", "write", "rename"}
    ours, theirs = (load_student(tmp_path / name).contract.model_id for name in ("killed", "whole"))
    assert ours == theirs
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    assert [row["step"] for row in rows[0]] == [*range(1, STEPS + 1), STEPS]
    losses = [[row["loss"] for row in part if "loss" in row] for part in rows]
    assert losses[0] == losses[1]
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.suffix != ".sha256"}
    assert left == {f"step-{STEPS - 2:08d}.pt", f"step-{STEPS:08d}.pt"}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
