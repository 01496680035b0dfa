"""The command under torchrun: a rank is killed, torchrun starts all again, and the weights are an undisturbed run's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from distill_toys import make_world, toy_recipe, use_toy_teacher

from pocketvlm import cli
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.students import load_student

CHANGES = (
    "train.log_every=1", "checkpoint.every=2", "student.overrides.text.dropout=0.2", "eval.metrics=[retrieval]",
)  # fmt: skip


def main(folder: Path, port: str) -> None:
    use_toy_teacher()
    real = Trainer.one_step
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def one_step(self: Trainer, batch: Any) -> Any:
        if first and self.ranks.rank == 1 and self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, batch)

    Trainer.one_step = one_step  # type: ignore[method-assign]
    cli.main(["distill", str(folder / "recipe.yaml"), "--out", str(folder / "killed"), "--overwrite"])
    # the same without a kill, by the same processes, which meet elsewhere
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_RESTART_COUNT": "0"}
    distill_run(load_recipe(folder / "recipe.yaml"), folder / "whole", progress=False)


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Its --overwrite holds for the first start alone."""
    recipe = load_recipe(toy_recipe(make_world(tmp_path / "world"), tmp_path / "cache"), CHANGES)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1",
            __file__, str(tmp_path), port,
        ],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing after step 4 from step-00000004.pt" in done.stderr
    assert done.stdout.count("student: ") == 1
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")]
    assert [row["step"] for row in rows[0]] == [*range(1, 9), 8]
    assert rows[0][7]["loss"] == pytest.approx(rows[1][7]["loss"], rel=1e-6)
    ours, theirs = (load_student(tmp_path / name).contract.model_id for name in ("killed", "whole"))
    assert ours == theirs


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
