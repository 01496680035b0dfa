"""Run every command of the README in full, as a newcomer types it, in an empty folder.

    python benchmarks/readme_road.py

The quick demo, the five lines of Python on what it made, and the blocks of the road, in the README's order. Where the
README says `pairs.jsonl`, `weights.safetensors`, `FOLDER` or `photo.png`, files of that kind are made from the built-in
pictures and a small random model first. Written to benchmarks/results/readme.json: seconds, exit status and the last
lines of each. A command that fails ends the script with an error, after the result is written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from results_folder import machine, write

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
LAST_LINES = 12


def blocks(language: str) -> list[str]:
    """Code blocks of the README in one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    """Lines of the shell blocks that start with `pocketvlm`, and the demo behind the `&&` of the install line."""
    lines = [
        line.partition("#")[0].replace("\\", "").strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("pocketvlm ")]


def run(command: list[str], folder: Path) -> dict[str, Any]:
    """Run in `folder`; what the result file keeps of it."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})
    output = [line for line in (done.stdout + done.stderr).replace(str(folder), ".").splitlines() if line.strip()]
    return {
        "seconds": round(time.perf_counter() - started, 1), "exit": done.returncode, "last": output[-LAST_LINES:]
    }  # fmt: skip


def main() -> None:
    """Walk the README."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for line in commands():
            row = run([sys.executable, "-m", "pocketvlm.cli", *shlex.split(line)[1:]], folder)
            rows.append({"command": line} | row)
            print(f"{row['seconds']:7.1f} s  exit {row['exit']}  {line}", flush=True)
            if line.startswith("pocketvlm demo"):
                (code,) = blocks("python")
                # as on a device: without torch
                row = run([sys.executable, "-c", "import sys; sys.modules['torch'] = None\n" + code], folder)
                rows.append({"command": "the five lines of Python"} | row)
                print(f"{row['seconds']:7.1f} s  exit {row['exit']}  the five lines of Python", flush=True)
    print(write("readme.json", {"commands": rows, "machine": machine()}))
    if failed := [row["command"] for row in rows if row["exit"] != 0]:
        raise SystemExit(f"{len(failed)} of {len(rows)} commands of the README failed: {json.dumps(failed)}")


def prepare(folder: Path) -> None:
    """The files of their own that the README's readers have."""
    from pocketvlm.data.openmoji import openmoji_samples

    samples = {sample.captions[0].text: sample for sample in openmoji_samples(flags="exclude")}
    (folder / "photo.png").write_bytes(samples["dolphin"].image.read())


if __name__ == "__main__":
    main()
