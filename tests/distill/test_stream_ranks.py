"""Two ranks over one stream: a bad batch of one is skipped by both, and a signal to one or to both saves once.

The ranks are two processes that run this very file as a script, with the environment that torchrun sets; one pair of
processes serves all tests.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import use_toy_teacher
from rank_toys import free_ports, two_processes
from stream_toys import write_world
from test_stream_runs import stream_recipe

from pocketvlm import cli
from pocketvlm.distill import loop
from pocketvlm.distill.guards import STOPPED
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.distill.stream_feed import StreamFeed
from pocketvlm.students import load_student

# which ranks are told to stop in the third step, and how many processes read for each
STOPPED_RUNS = {"one is told": ((1,), 0), "all and their readers are told": ((0, 1), 1)}


def main(rank: int, folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    use_toy_teacher()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    starts, saved = iter(ports), []
    real_step, real_make, real_save = Trainer.one_step, StreamFeed.make, loop.save_checkpoint

    def run(name: str, *more: str) -> int:
        os.environ["MASTER_PORT"] = next(starts)
        try:
            cli.main(["distill", str(folder / "recipe.yaml"), "--out", str(folder / name), *more])
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    def save(*args: Any, **options: Any) -> Path:
        saved.append(args[1])
        return real_save(*args, **options)

    loop.save_checkpoint = save  # type: ignore[attr-defined]
    found: dict[str, Any] = {"whole": run("whole")}
    for name, (told, readers) in STOPPED_RUNS.items():
        change = f"data.stream.workers={readers}"

        def one_step(self: Trainer, batch: Any, told: tuple[int, ...] = told) -> Any:
            if self.step == 2 and rank in told:
                # Slurm and a terminal tell all processes of a group, also those that read
                os.killpg(os.getpgrp(), signal.SIGTERM)
            return real_step(self, batch)

        saved.clear()
        Trainer.one_step = one_step  # type: ignore[method-assign]
        code = run(name, change)
        Trainer.one_step = real_step  # type: ignore[method-assign]
        found[name] = {"code": code, "saved": list(saved), "again": run(name, change, "--resume")}
    found["poisoned"] = rows = []

    def make(self: StreamFeed, step: int) -> Any:
        batch = real_make(self, step)
        if step == 1 and rank == 1:
            assert batch.teacher_image is not None
            batch.teacher_image[0, 0] = float("nan")
        return batch

    def watched(self: Trainer, batch: Any) -> Any:
        before = {name: value.clone() for name, value in self.student.state_dict().items()}
        row = real_step(self, batch)
        same = all(torch.equal(value, before[name]) for name, value in self.student.state_dict().items())
        rows.append((row["step"], self.guard.skipped, same, "loss" in row))
        return row

    StreamFeed.make, Trainer.one_step = make, watched  # type: ignore[method-assign]
    found["poisoned run"] = run("poisoned")
    torch.save(found, folder / f"{rank}.pt")


# ------------------------------------------------------------------------------------------------ in the test's process


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("stream-ranks")
    value = stream_recipe(write_world(folder / "cc"))
    changes = ("train.log_every=1", "train.steps=5", "student.overrides.text.dropout=0.1", "checkpoint.every=100")
    (folder / "recipe.yaml").write_text(load_recipe(value, changes).to_yaml())
    ports = free_ports(2 + 2 * len(STOPPED_RUNS))
    return folder, two_processes(__file__, folder, *ports, own_sessions=True)


@pytest.mark.parametrize("name", STOPPED_RUNS)
def test_a_signal_saves_once_and_the_stream_goes_on_where_it_was(two: Any, name: str) -> None:
    """Resumed, the student is the one of a run that nobody stopped, to the bit."""
    folder, ranks = two
    assert [found[name]["code"] for found in ranks] == [STOPPED, STOPPED] == [75, 75]
    assert [found[name]["saved"] for found in ranks] == [[3], []]
    assert [found["whole"] for found in ranks] == [found[name]["again"] for found in ranks] == [0, 0]
    assert [row["step"] for row in read_metrics(folder / name / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    ours, theirs = (load_student(folder / run).contract.model_id for run in (name, "whole"))
    assert ours == theirs


def test_a_bad_batch_of_one_rank_of_a_stream_is_skipped_by_all(two: Any) -> None:
    folder, ranks = two
    for found in ranks:
        assert found["poisoned run"] == 0
        # step, skipped so far, whether the student is as before, whether there was a loss
        rows = [(1, 0, False, True), (2, 1, True, False), *((step, 1, False, True) for step in (3, 4, 5))]
        assert found["poisoned"] == rows
    rows = read_metrics(folder / "poisoned" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 1, 1, 1]
    assert "the loss is not finite (in " in rows[1]["skipped_because"]
    good = torch.load(folder / "poisoned" / "checkpoints" / "step-00000005.pt", weights_only=True)
    assert good["guard"] == {"skipped": 1, "in_a_row": 0}
    assert len(good["data"]) == 2, "where the stream of each rank stands"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
