"""How fast a generative student writes on this processor, beside transformers' eager Llama on the same weights.

    python -m benchmarks.vlm_decode --model runs/student --bundle runs/bundle
    python -m benchmarks.vlm_decode --random vlm-8m --tokenizer runs/talking-words/tokenizer.json

Every way runs in a process of its own with `threads` threads; the processes take turns, so that a busy machine slows
all of them. Of each are told the median time to the first token (picture and prompt of ten tokens, from pixels), the
median time of a token after it by the clock, its inverse, and on processors (on a busy machine the clock also counts
what others do, more so in long steps), and the most memory that its process held. --random times a named size with
random weights, whose answers mean nothing and cost the same.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.results_folder import machine, write
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.vlm_bundle import VlmBundle
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.export.workers import Worker
from pocketvlm.table import emit

_WORKER = "benchmarks.vlm_decode_worker"
_BACKENDS = {"onnx": "onnxruntime", "executorch": "executorch"}


def ways(model: Path, bundle: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Name -> what its process is started with."""
    found: dict[str, dict[str, Any]] = {
        "transformers eager": {"kind": "transformers", "model": str(model), "threads": threads},
        "student eager": {"kind": "student", "model": str(model), "threads": threads},
    }
    for variant in VlmBundle.load(bundle).variants:
        if variant.target in _BACKENDS:
            backend = _BACKENDS[variant.target]
            found[f"{backend} {variant.precision}"] = {
                "kind": "edge", "bundle": str(bundle), "backend": backend, "precision": variant.precision,
                "threads": threads,
            }  # fmt: skip
    return found


def measure(started: dict[str, dict[str, Any]], rounds: int, answers: int, tokens: int) -> dict[str, dict[str, float]]:
    """Medians of each way over all rounds."""
    told: dict[str, dict[str, list[float]]] = {
        name: {"first_ms": [], "token_ms": [], "token_processor_ms": []} for name in started
    }
    facts: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(_WORKER, request)) for name, request in started.items()}
        for worker in workers.values():  # not measured
            worker.ask({"answers": 1, "tokens": 3})
        for turn in range(rounds):
            # another order each time, as what ran before warms or cools the caches of the next
            names = list(workers)[turn % len(workers) :] + list(workers)[: turn % len(workers)]
            for name in names:
                found = workers[name].ask({"answers": answers, "tokens": tokens})
                for key, values in told[name].items():
                    values += found[key]
                facts[name] = {"peak_mb": found["peak_mb"], "load_ms": workers[name].opened["load_ms"]}
    return {
        name: {
            "first_token_ms": statistics.median(values["first_ms"]),
            "token_ms": statistics.median(values["token_ms"]),
            "token_processor_ms": statistics.median(values["token_processor_ms"]),
            "tokens_per_second": 1e3 / statistics.median(values["token_ms"]),
            **facts[name],
        }
        for name, values in told.items()
    }


def random_student(name: str, tokenizer: Path, folder: Path) -> Path:
    """A named size with random weights, saved; its vision tower is random too."""
    from pocketvlm.students.vlm import build_vlm, load_vlm_config, save_vlm

    config = load_vlm_config(name)
    return save_vlm(build_vlm(config, tokenizer.read_bytes(), load_weights=False), folder)


def main(
    model: Annotated[Path | None, tyro.conf.arg(help="A saved student.")] = None,
    bundle: Annotated[Path | None, tyro.conf.arg(help="Its bundle; left out: made for this run.")] = None,
    random: Annotated[str | None, tyro.conf.arg(help="A named size with random weights instead.")] = None,
    tokenizer: Annotated[Path | None, tyro.conf.arg(help="tokenizer.json for --random.")] = None,
    threads: int = 1,
    rounds: int = 10,
    answers: int = 2,
    tokens: int = 32,
    result: Annotated[str, tyro.conf.arg(help="Name of the file under benchmarks/results.")] = "vlm_decode.json",
) -> None:
    if (model is None) == (random is None) or (random is not None and tokenizer is None):
        raise UsageError("give a saved student by --model, or a named size by --random with --tokenizer")
    with tempfile.TemporaryDirectory() as scratch:
        if random is not None and tokenizer is not None:
            model = random_student(random, tokenizer, Path(scratch) / "student")
        assert model is not None, "one of both is there"
        made = bundle or export_vlm(model, Path(scratch) / "bundle", progress=print)
        opened = VlmBundle.load(made)
        before = machine()
        found = measure(ways(model, made, threads), rounds, answers, tokens)
        files = {
            f"{v.target} {v.precision}": {part: v.notes["bytes"][part] for part in ("picture", "decoder")}
            for v in opened.variants
        }
    eager = found["transformers eager"]
    for values in found.values():
        values["times_eager"] = eager["token_ms"] / values["token_ms"]
        values["times_eager_processor"] = eager["token_processor_ms"] / values["token_processor_ms"]
    path = write(
        result,
        {
            "student": opened.contract.name,
            "weights": "random" if random else opened.contract.model_id,
            "vocabulary": opened.contract.vocab_size,
            "threads": threads,
            "rounds": rounds,
            "answers": answers,
            "tokens": tokens,
            "bytes": files,
            "ways": {name: {key: round(value, 3) for key, value in values.items()} for name, values in found.items()},
            "machine": before,
            "machine_after": machine(),
        },
    )
    rows = [{"way": name} | {key: f"{value:.2f}" for key, value in values.items()} for name, values in found.items()]
    emit(rows, False, title=f"{opened.contract.name}, {threads} thread(s); {path.name}")


if __name__ == "__main__":
    tyro.cli(main)
