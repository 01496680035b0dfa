"""docs/scaling.md: its worked examples are what `pocketvlm plan` says today, and its commands can be started."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from benchmarks import scaling_examples

PAGE = scaling_examples.PAGE.read_text(encoding="utf-8")


def test_the_worked_examples_are_the_plans() -> None:
    (shown,) = re.findall(f"{scaling_examples.BEGIN}\n(.*?)\n{scaling_examples.END}", PAGE, re.S)
    assert shown == scaling_examples.block(), "run `python -m benchmarks.scaling_examples`"


def test_torchrun_can_start_the_command_line(tmp_path: Path) -> None:
    assert "-m pocketvlm distill" in PAGE
    assert "--no-python" not in PAGE
    done = subprocess.run(
        [sys.executable, "-m", "pocketvlm", "plan", "nothing-of-that-name"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("pocketvlm: unknown recipe"), done.stderr
