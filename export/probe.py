"""Run exported files in a process of their own: distance from the reference rows, and latency.

A fresh process, because ExecuTorch and onnxruntime fight over thread pools, and because what is read from disk is
then all that is left of the model. `python -m pocketvlm.export.probe REQUEST.json` is what the parent starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import IntegrityError

if TYPE_CHECKING:  # the child of the ONNX variants shall not load torch
    from pocketvlm.export.targets.base import Variant

_RUNS = 15
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Probe:
    """One variant as its runtime sees it.

    worst: tower -> largest |a - b|^2 / (2 |a| |b|) over the given rows, which is 1 - cosine at equal lengths (NaN: not
    finite). latency_ms: tower -> median of one input on one thread. mean_cosine: by tower. top1: share of the "judged"
    rows, if any, whose largest number is where it is expected.
    """

    worst: dict[str, float]
    latency_ms: dict[str, float]
    mean_cosine: dict[str, float]
    top1: float | None = None


def probe_variants(
    folder: Path, variants: Sequence[Variant], inputs: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]
) -> list[Probe]:
    """Probe variants of one target, in a child process.

    inputs, expected: tower -> rows of the graph's input, and reference embeddings [n, D]; "judged" for `Probe.top1`.

    Raises:
        IntegrityError: the files cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arrays = Path(scratch) / "rows.npz"
        rows: dict[str, Any] = {f"in_{k}": v for k, v in inputs.items()} | {f"out_{k}": v for k, v in expected.items()}
        np.savez(arrays, **rows)
        request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        content = {"folder": str(folder), "arrays": str(arrays), "answer": str(answer)}
        request.write_text(json.dumps(content | {"variants": [asdict(v) for v in variants]}), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pocketvlm.export.probe", str(request)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            check=False,
        )
        if done.returncode != 0 or not answer.is_file():
            names = ", ".join(f"{v.target} {v.precision}" for v in variants)
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise IntegrityError(
                f"the exported files of {names} do not run when read back from disk ({reason}); "
                "no bundle was written, so report this with the student's name"
            )
        return [Probe(**entry) for entry in json.loads(answer.read_text(encoding="utf-8"))]


def _measure(
    run: Callable[[Any], NDArray[np.float32]], rows: NDArray[Any], expected: NDArray[Any]
) -> tuple[float, float, float]:
    found = run(rows).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = (found * expected).sum(axis=1) / lengths
        # 1 - cosine at equal lengths; wrong lengths, which make other probabilities of logits, count too
        distance = np.square(found - expected).sum(axis=1) / (2 * lengths)
    times = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        run(rows[:1])
        times.append(time.perf_counter() - start)
    return float(np.max(distance)), float(np.median(times) * 1e3), float(np.mean(cosine))


def _main(request: Path) -> None:
    from pocketvlm.edge.backends import open_backend

    content = json.loads(request.read_text(encoding="utf-8"))
    arrays = np.load(content["arrays"])
    answers = []
    for entry in content["variants"]:
        variant = SimpleNamespace(**entry)
        backend = open_backend(variant.target, content["folder"], variant, threads=1)
        worst, latency, mean = {}, {}, {}
        for tower, run in (("image", backend.run_image), ("text", backend.run_text)):
            if tower in variant.files:
                worst[tower], latency[tower], mean[tower] = _measure(run, arrays[f"in_{tower}"], arrays[f"out_{tower}"])
        top1 = None
        if "in_judged" in arrays:
            # one at a time, as an app would: a batch may share what one picture alone would set
            found = np.concatenate([backend.run_image(row[None]) for row in arrays["in_judged"]])
            top1 = float((found.argmax(axis=1) == arrays["out_judged"].argmax(axis=1)).mean())
        answers.append(asdict(Probe(worst, latency, mean, top1)))
    Path(content["answer"]).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
