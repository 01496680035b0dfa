"""Lower ExecuTorch programs in a process of their own, while the caller writes other targets.

Lowering holds one core for half a minute. `python -m pocketvlm.export.targets.executorch_writer` is what the parent
starts; it imports the converters, then takes one JSON request per line from its standard input.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pocketvlm.edge.errors import UsageError

_SAID = 200  # last lines of what a failed child said


class BackgroundWriter:
    """Writes programs to files in a child process; `finish` waits for them. A context: leaving it ends the child.

    The bytes are those that the same call in this process gives (tested).
    """

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._errors = (Path(self._scratch.name) / "errors.txt").open("w+", encoding="utf-8", errors="replace")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "pocketvlm.export.targets.executorch_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        self._promised: list[tuple[Path, dict[str, Any]]] = []

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # after `finish` the child has ended already; without it something failed and its work is not wanted
        self._child.kill()
        self._child.communicate()
        self._errors.close()
        self._scratch.cleanup()

    def write(self, programs: dict[str, Any], precision: str, constants: dict[str, Any], path: Path) -> dict[str, Any]:
        """Hand over exported programs (method name -> `torch.export.ExportedProgram`) to be written to `path`.

        Returns:
            What `write_program` returns; `finish` fills it.
        """
        folder = Path(self._scratch.name) / str(len(self._promised))
        folder.mkdir()
        answer: dict[str, Any] = {}
        self._promised.append((folder / "answer.json", answer))
        for method, program in programs.items():
            torch.export.save(program, folder / f"{method}.pt2")
        request: dict[str, Any] = {"programs": {method: str(folder / f"{method}.pt2") for method in programs}}
        request |= {"precision": precision, "constants": constants, "path": str(path)}
        request["answer"] = str(folder / "answer.json")
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except OSError:
            self.finish()
            raise
        return answer

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            UsageError: the child failed; caused by an error with all that it said, where it said something.
        """
        self._child.communicate()
        if self._child.returncode < 0:
            raise UsageError(
                f"the process that lowers executorch was killed by signal {-self._child.returncode}, probably for want "
                "of memory; no bundle was written, so export with processes=1, or leave the target 'executorch' out"
            )
        if self._child.returncode != 0:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or [f"exit code {self._child.returncode}"]
            raise UsageError(
                f"executorch cannot express this model ({said[-1][:300]}); no bundle was written, so leave the target "
                "'executorch' out or choose another backbone"
            ) from RuntimeError("\n".join([said[-1], *said[-_SAID:]]))
        for file, answer in self._promised:
            answer |= json.loads(file.read_text(encoding="utf-8"))


def _main() -> None:
    # what takes seconds to import, before the first request is there; torchao's registers operators of quantized graphs
    for module in ("executorch.backends.xnnpack.partition.xnnpack_partitioner", "torchao.quantization.pt2e"):
        importlib.import_module(module)

    from pocketvlm.export.targets.executorch import write_program
    from pocketvlm.export.targets.onnx import quiet

    for line in sys.stdin:
        request = json.loads(line)
        programs = {method: torch.export.load(file) for method, file in request["programs"].items()}
        with quiet():
            found = write_program(programs, request["precision"], request["constants"], Path(request["path"]))
        Path(request["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
