"""A recorded reference run of a generative student: what the unpatched eager model answers, and how exact that is.

float64 on the CPU, float32 with every shortcut off on CUDA; the same code. The folder is written and verified as that
of any reference (`export.reference_run`). Reading one needs no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.errors import IntegrityError
from pocketvlm.export.reference_run import AGAIN, MANIFEST, read_npz, read_recording, sha256, sheet_pixels

KIND = "vlm"
SCHEMA_VERSION = "1.0"
CASES, LOGITS, TASK, PIXELS, NOISE = "cases.json", "logits.npz", "task.json", "pixels/pixels.json", "noise.json"
REQUIRED = (CASES, LOGITS, TASK, PIXELS, NOISE)


@dataclass(frozen=True)
class Case:
    """A prompt about a picture, and the student's greedy answer.

    pixels: uint8 [S, S, 3]. ids: of the prompt. said: of the answer, the end token included where it ended. text: that
    answer. logits: float64 [n, V] of every token of `said`, or None where only what follows was kept of them.
    best: int [n, 2], the two best tokens; best_logits: float64 [n, 2], theirs; log_sum: float64 [n], the logarithm of
    the sum of the exponentials.
    """

    prompt: str
    pixels: NDArray[np.uint8]
    ids: list[int]
    said: list[int]
    text: str
    logits: NDArray[np.float64] | None
    best: NDArray[np.int64]
    best_logits: NDArray[np.float64]
    log_sum: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        """Of each step, by how much the student's choice leads, [n]."""
        return self.best_logits[:, 0] - self.best_logits[:, 1]


@dataclass(frozen=True)
class TaskQuestion:
    """A question with a known answer. longest: tokens that an answer may have. right: whether the student's was."""

    pixels: NDArray[np.uint8]
    text: str
    type: str
    answer: str
    longest: int
    right: bool


@dataclass(frozen=True)
class VlmReference:
    """What a bundle is held to. manifest: None where the student answered just now. digest: sha256 of manifest.json.

    noise, noise_kl: what float32 costs the student, the largest difference of a logit from float64 and the mean KL in
    nats.
    """

    model_id: str
    fold: int
    cases: list[Case]
    task: list[TaskQuestion]
    noise: float
    noise_kl: float
    manifest: dict[str, Any] | None = None
    digest: str | None = None


def best_two(logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """`Case.best`, `.best_logits` and `.log_sum` of logits [n, V]."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :2].astype(np.int64)
    return best, np.take_along_axis(logits, best, axis=1), log_sum(logits)


def log_sum(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the sum of the exponentials of each row."""
    highest = logits.max(axis=1, keepdims=True)
    return (highest + np.log(np.exp(logits - highest).sum(axis=1, keepdims=True)))[:, 0]


def kl(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(softmax(expected) || softmax(found)) of each row, in nats."""
    p, q = (x - log_sum(x)[:, None] for x in (expected, found))
    return (np.exp(p) * (p - q)).sum(axis=1)


def load_vlm_reference(folder: str | Path) -> VlmReference:
    """Read and verify a folder that `record_vlm_reference` wrote.

    Raises:
        UsageError: there is none, or it is of a model that embeds. VersionError: written under a newer schema.
        IntegrityError: a file is missing or changed, no case is in it, an answer is not of its logits, or a value is
            not finite.
    """
    folder = Path(folder)
    manifest, files = read_recording(folder, KIND, SCHEMA_VERSION, REQUIRED)
    try:
        pictures = json.loads(files[PIXELS])
        pixels = sheet_pixels(pictures, files, [f"scene {number}" for number in range(len(pictures["pixels_sha256"]))])
        noise = json.loads(files[NOISE])["float32"]
        found = VlmReference(
            manifest["model_id"],
            int(manifest["data"]["fold"]),
            _cases(json.loads(files[CASES]), read_npz(files[LOGITS]), pixels),
            [
                TaskQuestion(
                    pixels[row["scene"]],
                    row["text"],
                    row["type"],
                    row["answer"],
                    int(row["longest"]),
                    bool(row["right"]),
                )
                for row in json.loads(files[TASK])
            ],
            float(noise["max_abs"]),
            float(noise["kl_mean"]),
            manifest,
            sha256((folder / MANIFEST).read_bytes()),
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, IntegrityError):
            raise
        raise IntegrityError(f"reference {folder.name!r} is incomplete ({error}); {AGAIN}") from error
    _check_complete(folder.name, found)
    return found


def _cases(rows: list[dict[str, Any]], arrays: dict[str, NDArray[Any]], pixels: NDArray[np.uint8]) -> list[Case]:
    ends = np.cumsum([len(row["said"]) for row in rows])
    # of some cases every logit was kept, in the order of the cases
    whole = [row["whole"] for row in rows]
    ends_whole = np.cumsum([len(row["said"]) * kept for row, kept in zip(rows, whole)])
    cases = []
    for number, row in enumerate(rows):
        steps = len(row["said"])
        own = slice(ends[number] - steps, ends[number])
        logits = arrays["logits"][ends_whole[number] - steps : ends_whole[number]] if whole[number] else None
        cases.append(
            Case(
                row["prompt"], pixels[row["scene"]], list(row["ids"]), list(row["said"]), row["text"],
                None if logits is None else logits.astype(np.float64), arrays["best"][own].astype(np.int64),
                arrays["best_logits"][own], arrays["log_sum"][own],
            )
        )  # fmt: skip
    return cases


def _check_complete(name: str, found: VlmReference) -> None:
    """Fail closed: no case would pass every comparison, and NaN compares as false with every limit."""
    if not any(case.logits is not None for case in found.cases):
        raise IntegrityError(f"reference {name!r} has no case with its logits, which would pass anything; {AGAIN}")
    for number, case in enumerate(found.cases):
        steps = len(case.said)
        kept = [case.best, case.best_logits, case.log_sum, *([] if case.logits is None else [case.logits])]
        if not steps or any(len(value) != steps for value in kept):
            raise IntegrityError(f"case {number} of reference {name!r} lacks a logit or its answer; {AGAIN}")
        if not all(np.isfinite(value).all() for value in kept):
            raise IntegrityError(f"case {number} of reference {name!r} is not finite; the model itself is broken")
        if case.best[:, 0].tolist() != case.said:
            raise IntegrityError(
                f"case {number} of reference {name!r} did not say what its logits say; the folder was put together "
                f"from two, so {AGAIN}"
            )
    if not np.isfinite([found.noise, found.noise_kl]).all():
        raise IntegrityError(f"reference {name!r} has a noise floor that is not finite; {AGAIN}")
