"""How fast a bundle's files are here: latency, load time, memory, and the whole way from JPEG bytes or a string.

Every tower of every variant at every number of threads has a process of its own (`export.bench_worker`), because thread
pools fight and because memory is counted per process. All are loaded first and then asked in turn, round after round,
for a few runs each: what the machine does meanwhile hits all alike. docs/bench.md says what each number is.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pocketvlm
from pocketvlm.edge.backends import BACKEND_NAMES, target_of
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.errors import IntegrityError, UsageError, require_installed, unknown_name
from pocketvlm.edge.preprocess import load_image, stack
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.workers import Worker, WorkerError

SCHEMA_VERSION = "1.0"
TOWERS = ("image", "text")
WORKER = "pocketvlm.export.bench_worker"
DEFAULT_TEXT = "a photo of a dog on the beach"
_PICTURE = (640, 480)
_BACKEND_OF = {target_of(name): name for name in BACKEND_NAMES}
# packages of a runtime -> the extra that brings them
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "onnx": ((), ""),
    "executorch": (("torch", "executorch"), "executorch"),
    "coreml": (("coremltools",), "coreml"),
}
_PACKAGES = ("numpy", "Pillow", "tokenizers", "onnxruntime", "executorch", "torch", "coremltools")
# what decides which kernels run, on x86 and on Arm
_FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
# below this share of a core, somebody else had a good part of the time
_OWN_CORE = 0.9

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchRow:
    """One tower of one variant at one number of threads, batch 1. Milliseconds, unless said.

    p50_ms, p90_ms: the graph alone; the median over rounds of each round's median, and the 90th percentile of all runs.
    rounds_ms: the smallest and largest of the rounds' medians. processor_ms, whole_processor_ms: on processors, of all
    threads.
    prepare_ms: decoding and resizing, or tokenizing. whole_ms: `EdgeModel.embed_image` of JPEG bytes, or `embed_text`.
    load_ms, first_ms: once, from the page cache; the first call after it. mb: 1e6 bytes of the variant's files, both
    towers. tower_mb: of the files that this tower needs. peak_mb: the process at most; model_mb: above what the runtime
    took before the model was loaded; None where the system does not tell. accuracy: from the bundle's parity summary,
    share of R@5 (image to text), or None.
    """

    bundle: str
    model: str
    backend: str
    precision: str
    tower: str
    threads: int
    p50_ms: float
    p90_ms: float
    rounds_ms: tuple[float, float]
    processor_ms: float
    prepare_ms: float
    whole_ms: float
    whole_processor_ms: float
    load_ms: float
    first_ms: float
    mb: float
    tower_mb: float
    peak_mb: float | None
    model_mb: float | None
    accuracy: float | None


@dataclass(frozen=True)
class LeftOut:
    """A variant that was not measured, and why."""

    bundle: str
    backend: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Profile:
    """Operators of one tower by its runtime's own profiler: rows of operator, share, ms and calls per run."""

    bundle: str
    backend: str
    precision: str
    tower: str
    threads: int
    operators: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class BenchReport:
    """What `bench` measured. machine: processor, flags, load averages, versions. settings: rounds, runs, inputs."""

    rows: tuple[BenchRow, ...]
    left_out: tuple[LeftOut, ...]
    warnings: tuple[str, ...]
    machine: dict[str, Any]
    settings: dict[str, Any]
    profiles: tuple[Profile, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types under `schema_version`; the fields are those of the classes above."""
        return {"schema_version": SCHEMA_VERSION, "kit_version": pocketvlm.__version__, **asdict(self)}


@dataclass(frozen=True)
class _Job:
    """A row before it is measured."""

    bundle: Bundle
    name: str
    variant: BundleVariant
    tower: str
    threads: int
    runs: dict[str, list[list[float]]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{_BACKEND_OF[self.variant.target]} {self.variant.precision} {self.tower}"


def bench(
    bundles: Sequence[str | Path],
    *,
    backends: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    towers: Sequence[str] = TOWERS,
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    runs: int = 20,
    image: str | Path | None = None,
    text: str = DEFAULT_TEXT,
    profile: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure bundles beside each other.

    Args:
        bundles: folders or zips of `pocketvlm export`.
        backends: of "onnxruntime", "executorch", "coreml"; None: all that the bundles and this machine have, and the
            rest is named in `left_out`.
        precisions: None: all of each bundle.
        towers: "image", "text" or both; a bundle without one is measured by the other.
        threads: numbers of threads to try.
        rounds, runs: how often each process has its turn, and runs in one turn, after three that are not measured.
        image: a picture file for the way from bytes; None: a made-up JPEG of 640 x 480. text: the string.
        profile: ask each runtime's own profiler too, afterwards.
        progress: called with one line per step.

    Raises:
        UsageError: threads, rounds or runs below 1; an unreadable bundle; nothing that can be measured.
        UnknownNameError: a bundle without that backend's files, without that precision, or no such tower.
        MissingExtraError: a runtime that was asked for by name is not installed.
        IntegrityError: a bundle that does not match its hashes, or files that do not run.
    """
    say = progress or (lambda line: None)
    for what, values in (("threads", threads), ("rounds", (rounds,)), ("runs", (runs,))):
        if not values or min(values) < 1:
            raise UsageError(
                f"{what} is {min(values, default=0)} and at least 1 is expected; nothing would be measured"
            )
    for tower in towers:
        if tower not in TOWERS:
            raise unknown_name("tower", tower, TOWERS)
    say("reading the bundles and checking their hashes")
    jobs, left_out = _plan(bundles, backends, precisions, towers, threads)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack_:
        picture = Path(image) if image is not None else made_up_jpeg(Path(scratch))
        workers = []
        for number, job in enumerate(jobs):
            say(f"loading {job} on {job.threads} thread{'s' * (job.threads > 1)}")
            request = _request(job, Path(scratch) / f"{number}.npy", picture, text)
            workers.append(stack_.enter_context(_opened(job, request)))
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            first = number % len(jobs)
            for job, worker in [*zip(jobs, workers)][first:] + [*zip(jobs, workers)][:first]:
                for what, times in _ask(job, worker, {"do": "turn", "runs": runs}).items():
                    job.runs.setdefault(what, []).append(times)
        profiles = []
        for job, worker in zip(jobs, workers) if profile else ():
            say(f"profiling {job}")
            operators = _ask(job, worker, {"do": "profile", "runs": runs})["operators"]
            profiles.append(Profile(*_key(job), tuple(operators)))
        rows = tuple(_row(job, worker.opened) for job, worker in zip(jobs, workers))
    machine["load_average_after"] = load_average()
    settings = {
        "rounds": rounds,
        "runs_per_round": runs,
        "picture": picture.name if image is not None else f"made up, {_PICTURE[0]} x {_PICTURE[1]}, JPEG quality 90",
        "text": text,
        "batch": 1,
    }
    return BenchReport(rows, tuple(left_out), tuple(_warnings(machine, rows)), machine, settings, tuple(profiles))


# --- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    bundles: Sequence[str | Path],
    backends: Sequence[str] | None,
    precisions: Sequence[str] | None,
    towers: Sequence[str],
    threads: Sequence[int],
) -> tuple[list[_Job], list[LeftOut]]:
    wanted = [target_of(name) for name in backends] if backends is not None else None
    for target in wanted or ():
        require_installed(*_NEEDS[target])
    if not bundles:
        raise UsageError("no bundle was given and at least one is expected; name what 'pocketvlm export' wrote")
    jobs: list[_Job] = []
    left_out: list[LeftOut] = []
    for name, path in zip(_short_names(bundles), bundles):
        bundle = Bundle.load(path)
        if bundle.contract.kind not in ("dual", "image-labels", "classifier"):
            raise UsageError(
                f"bundle {str(path)!r} holds a {bundle.contract.kind!r} model and embeddings and classifiers are "
                "measured; its inputs would be made up, so leave it out"
            )
        present = {variant.target for variant in bundle.variants}
        for target in wanted or ():
            if target not in present:
                raise unknown_name(f"target of bundle {name!r}", target, present)
        chosen = [v for v in bundle.variants if wanted is None or v.target in wanted]
        for precision in precisions or ():
            if precision not in {v.precision for v in chosen}:
                raise unknown_name(f"precision of bundle {name!r}", precision, {v.precision for v in chosen})
        for variant in chosen:
            if precisions is not None and variant.precision not in precisions:
                continue
            if reason := _cannot_run(variant.target):
                left_out.append(LeftOut(name, _BACKEND_OF[variant.target], variant.precision, reason))
                continue
            present_towers = [tower for tower in towers if tower in variant.files]
            jobs += [_Job(bundle, name, variant, tower, count) for tower in present_towers for count in threads]
    if not jobs:
        reasons = "; ".join(dict.fromkeys(f"{entry.backend}: {entry.reason}" for entry in left_out))
        raise UsageError(
            f"nothing in the bundles can be measured here ({reasons or 'no such tower'}); "
            "choose other backends, towers or bundles"
        )
    return jobs, left_out


def _cannot_run(target: str) -> str:
    """Why this machine cannot run a target; empty where it can."""
    if target not in _NEEDS:
        return "this release has no runtime for it"
    if target == "coreml" and platform.system() != "Darwin":
        return f"Core ML predicts on macOS only, and this system is {platform.system()}"
    packages, extra = _NEEDS[target]
    if any(importlib.util.find_spec(package) is None for package in packages):
        return f"not installed: pip install 'pocketvlm[{extra}]'"
    return ""


def _short_names(bundles: Sequence[str | Path]) -> list[str]:
    """The last folder of each, or as much as tells them apart."""
    paths = [Path(bundle) for bundle in bundles]
    for parts in range(1, max(len(path.parts) for path in paths) + 1) if paths else ():
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _request(job: _Job, rows: Path, picture: Path, text: str) -> dict[str, Any]:
    contract = job.bundle.contract
    request: dict[str, Any] = {
        "folder": str(job.bundle.folder),
        "variant": asdict(job.variant),
        "tower": job.tower,
        "threads": job.threads,
        "rows": str(rows),
    }
    if job.tower == "image":
        assert contract.image is not None, "a variant has files of the contract's towers only"
        np.save(rows, stack([load_image(picture, contract.image)]))
        return request | {"image": str(picture)}
    assert contract.text is not None, "a variant has files of the contract's towers only"
    if not job.bundle.raw.get("tokenizer"):
        raise IntegrityError(f"bundle {job.name!r} has a text tower and no tokenizer; export it again")
    np.save(rows, Tokenizer(job.bundle.path(job.bundle.raw["tokenizer"]), contract.text).encode(text))
    return request | {"text": text}


def _opened(job: _Job, request: dict[str, Any]) -> Worker:
    try:
        return Worker(WORKER, request)
    except WorkerError as error:
        raise _does_not_run(job, error) from error


def _ask(job: _Job, worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    try:
        return worker.ask(request)
    except WorkerError as error:
        raise _does_not_run(job, error) from error


def _does_not_run(job: _Job, error: WorkerError) -> IntegrityError:
    return IntegrityError(
        f"{job} of bundle {job.name!r} does not run ({error.reason.rstrip('.')}); nothing was measured, so leave it "
        "out with --backends, --precisions or --towers, or export the bundle again"
    )


# --- numbers --------------------------------------------------------------------------------------------------------


def _key(job: _Job) -> tuple[str, str, str, str, int]:
    return job.name, _BACKEND_OF[job.variant.target], job.variant.precision, job.tower, job.threads


def _row(job: _Job, opened: dict[str, Any]) -> BenchRow:
    medians = [float(np.median(times)) for times in job.runs["run"]]
    files = job.variant.files
    bundle, backend, precision, tower, threads = _key(job)
    return BenchRow(
        bundle=bundle,
        model=job.bundle.contract.name,
        backend=backend,
        precision=precision,
        tower=tower,
        threads=threads,
        p50_ms=float(np.median(medians)),
        p90_ms=float(np.percentile(np.concatenate(job.runs["run"]), 90)),
        rounds_ms=(min(medians), max(medians)),
        processor_ms=_over_rounds(job.runs["run_processor"]),
        **{f"{what}_ms": _over_rounds(job.runs[what]) for what in ("prepare", "whole", "whole_processor")},
        load_ms=opened["load_ms"],
        first_ms=opened["first_ms"],
        mb=sum(_bytes(job.bundle.folder / name) for name in set(files.values())) / 1e6,
        tower_mb=_bytes(job.bundle.folder / files[tower]) / 1e6,
        peak_mb=opened["peak_mb"],
        model_mb=opened["model_mb"],
        accuracy=_accuracy(job.bundle, job.variant),
    )


def _over_rounds(rounds: list[list[float]]) -> float:
    return float(np.median([np.median(times) for times in rounds]))


def _bytes(path: Path) -> int:
    return sum(part.stat().st_size for part in ([path] if path.is_file() else path.rglob("*")) if part.is_file())


def _accuracy(bundle: Bundle, variant: BundleVariant) -> float | None:
    for entry in bundle.parity:
        if (entry.get("target"), entry.get("precision")) == (variant.target, variant.precision):
            task = (entry.get("task") or {}).get("image-to-text") or {}
            return task.get("candidate") if task.get("k") == 5 else None
    return None


def _warnings(machine: dict[str, Any], rows: Sequence[BenchRow]) -> list[str]:
    found = []
    cores = machine["cores"]
    before, after = machine["load_average_before"], machine["load_average_after"]
    if before is not None and max(before, after) > cores:
        found.append(
            f"the load average was {before:.1f} before and {after:.1f} after on {cores} cores: others were computing, "
            "so these times are too long, those of longer calls most of all, and only their order beside each other "
            "means something; processor_ms and whole_processor_ms in the JSON are nearer to the truth"
        )
    shares = [row.processor_ms / row.p50_ms for row in rows if row.threads == 1 and row.p50_ms > 0]
    if shares and float(np.median(shares)) < _OWN_CORE:
        found.append(
            f"single threads had {100 * float(np.median(shares)):.0f} % of a core while they were timed; "
            "processor_ms in the JSON says what they used"
        )
    if most := max((row.threads for row in rows if row.threads > cores), default=0):
        found.append(
            f"{most} threads were asked for and this process may use {cores} cores; they waited for each other"
        )
    return found


# --- machine and inputs ---------------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Processor, its flags that choose kernels, cores that this process may use, load average, versions."""
    name, flags = platform.processor() or platform.machine(), set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                flags |= set(value.split())
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "cpu": name,
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average_before": load_average(),
    }


def load_average() -> float | None:
    """Of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def made_up_jpeg(folder: Path) -> Path:
    """A 640 x 480 JPEG with slopes, edges and texture, the same everywhere: about 70 kB, as a phone's small photos."""
    width, height = _PICTURE
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 90 * np.sin(x / (9 + 7 * c)) * np.cos(y / (13 + 5 * c)) for c in range(3)]
    pixels = np.stack(waves, axis=-1) + np.random.default_rng(0).normal(0, 12, (height, width, 3))
    pixels[(x - 320) ** 2 + (y - 240) ** 2 < 120**2] = (200, 60, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    path = folder / "picture.jpg"
    path.write_bytes(buffer.getvalue())
    return path
