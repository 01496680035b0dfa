"""The edge API beside bare onnxruntime, fastembed and open_clip, and the runtimes beside each other.

    python -m benchmarks.edge BUNDLE --fastembed PYTHON

BUNDLE has onnx and executorch files at fp32 and int8 (`pocketvlm export RUN --targets onnx executorch`); PYTHON is an
interpreter that has fastembed (`python -m venv`, `pip install fastembed`), given the bundle's own ONNX graph and a
preprocessor_config.json of the same arithmetic. open_clip runs a ViT-S-32-alt of random weights eagerly, and this kit
the export of the same weights. Each runs in a process of its own; they take turns in rounds, and ratios are taken
within a round. Processor seconds are those of one pinned core with one thread; wall seconds are of the defaults of each
on all cores. Results: benchmarks/results/edge.json and the table of docs/edge.md.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import tyro
from numpy.typing import NDArray
from PIL import Image
from tyro.conf import Positional

from benchmarks.results_folder import RESULTS, machine, write, write_between
from pocketvlm.data import open_data
from pocketvlm.edge.bundle import Bundle, sha256_file
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.preprocess import load_image

RESULT = "edge.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "edge.md"
WORKER = Path(__file__).with_name("edge_worker.py")
DATA = "openmoji?pool=test&fold=0&flags=exclude"
OPEN_CLIP = "ViT-S-32-alt"
_PREPARING = {"Transpose", "Cast", "Sub", "Div", "Mul", "Add"}
_QUERIES, _TOP = 100, 5


@dataclass
class Runner:
    """One runtime in its process."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    @classmethod
    def start(cls, name: str, python: str, kind: str, request: dict[str, Any], work: Path) -> Runner:
        file = work / f"{name}.json"
        file.write_text(json.dumps(request))
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if request["threads"] == 1 else {}
        environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
        process = subprocess.Popen(
            [python, str(WORKER), kind, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file.with_suffix(".log").open("w"),
            text=True,
            env=environment | one,
        )
        runner = cls(name, process, file.with_suffix(".log"))
        if runner._line() != "ready":
            raise RuntimeError(f"{name} did not start: {runner.log.read_text()[-2000:]}")
        return runner

    def ask(self, order: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        answer = self._line()
        if not answer:
            raise RuntimeError(f"{self.name} broke: {self.log.read_text()[-2000:]}")
        return json.loads(answer)

    def rows(self, order: str, work: Path) -> NDArray[np.float64]:
        self.ask(order)
        path = work / f"{self.name}-{order}.npy"
        self.ask(f"save {path}")
        rows = np.load(path).astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


# --- inputs ---------------------------------------------------------------------------------------------------------


def pictures(work: Path) -> dict[str, list[str]]:
    """JPEG files by size: the test pictures at 224 px, and a photograph at 512 x 600 and at 12 megapixels."""
    import matplotlib.cbook

    samples = [sample for sample in open_data(DATA) if sample.captions]
    small = []
    for index, sample in enumerate(samples[:64]):
        with Image.open(io.BytesIO(sample.image.read())) as image:
            small.append(_jpeg(work / f"small-{index}.jpg", image.convert("RGB")))
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        photo = image.convert("RGB")
    turns = [photo.rotate(degrees, expand=True) for degrees in (0, 90, 180, 270)]
    large = [turn.resize((turn.width * 6, turn.height * 6), Image.Resampling.BICUBIC) for turn in turns[:2]]
    return {
        "224 px": small,
        "photograph": [_jpeg(work / f"photo-{index}.jpg", turns[index % 4]) for index in range(32)],
        "12 megapixels": [_jpeg(work / f"large-{index}.jpg", large[index % 2]) for index in range(2)],
    }


def _jpeg(path: Path, image: Image.Image) -> str:
    image.save(path, "JPEG", quality=90)
    return str(path)


def fastembed_folder(bundle: Bundle, precision: str, folder: Path) -> Path:
    """The bundle's image graph without its first steps, which fastembed does itself: normalised planes in."""
    folder.mkdir()
    model = onnx.load(str(bundle.path(bundle.variant("onnx", precision).files["image"])))
    graph, tensor = model.graph, "pixels"
    while True:
        users = [node for node in graph.node if node.input and node.input[0] == tensor and node.op_type in _PREPARING]
        if not users:
            break
        tensor = users[0].output[0]
        graph.node.remove(users[0])
    for node in graph.node:
        # the batch size is read off the input
        node.input[:] = ["pixel_values" if name in ("pixels", tensor) else name for name in node.input]
    spec = bundle.contract.image
    assert spec is not None
    shape = ["batch", 3, spec.size, spec.size]
    del graph.input[:]
    graph.input.append(onnx.helper.make_tensor_value_info("pixel_values", onnx.TensorProto.FLOAT, shape))
    onnx.save(model, str(folder / "model.onnx"))
    if spec.resize != "crop" or spec.crop_fraction != 1:
        raise ValueError("fastembed is told to crop the middle; this bundle does something else")
    config = {
        "do_resize": True, "size": {"shortest_edge": spec.size}, "resample": 2 if spec.filter == "bilinear" else 3,
        "do_center_crop": True, "crop_size": {"height": spec.size, "width": spec.size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": spec.mean, "image_std": spec.std,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def open_clip_weights(work: Path) -> tuple[str, Path]:
    """Random weights of a small open_clip model, and the bundle that this kit makes of them."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from pocketvlm.export.bundle import export_bundle

    torch.manual_seed(0)
    model = open_clip.create_model(OPEN_CLIP)
    weights = work / "open_clip.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
    return str(weights), export_bundle(f"open_clip:{OPEN_CLIP}@{weights}", work / "open_clip", ["onnx"], ["fp32"])


# --- measurements ---------------------------------------------------------------------------------------------------


def _ratio(a: list[float], b: list[float]) -> dict[str, float]:
    each = sorted(x / y for x, y in zip(a, b))
    return {"median": round(statistics.median(each), 3), "least": round(each[0], 3), "most": round(each[-1], 3)}


def throughput(
    ours: dict[str, Any], theirs: tuple[str, str, dict[str, Any]], inputs: dict[str, list[str]], rounds: int, work: Path
) -> dict[str, Any]:
    """Pictures a second of both, in turns, by set of pictures; and how near their embeddings are."""
    kind, python, request = theirs
    found: dict[str, Any] = {}
    core = sorted(os.sched_getaffinity(0))[-1]
    for how, setting in (("processor", {"threads": 1, "core": core}), ("wall", {"threads": None, "core": None})):
        common = {"inputs": inputs, "batch": 16, **setting}
        pair = [
            Runner.start("pocketvlm", sys.executable, "pocketvlm", {**common, **ours}, work),
            Runner.start(kind, python, kind, {**common, **request}, work),
        ]
        for order, files in inputs.items():
            for runner in pair:
                runner.ask(order)
            times: list[list[float]] = [[], []]
            for turn in range(rounds):
                for place in (0, 1) if turn % 2 else (1, 0):
                    times[place].append(pair[place].ask(order)[how] / len(files))
            found.setdefault(order, {"pictures": len(files)})[how] = {
                "ms": [round(1e3 * statistics.median(each), 3) for each in times],
                "ratio": _ratio(times[1], times[0]),
            }
            if how == "processor":
                a, b = (runner.rows(order, work) for runner in pair)
                found[order]["cosine_least"] = round(float((a * b).sum(1).min()), 5)
        for runner in pair:
            runner.stop()
    return found


def overhead(bundle: Path, precision: str, picture: bytes, rounds: int) -> dict[str, Any]:
    """Processor time of one picture through `EdgeModel` beside a bare `InferenceSession.run` on prepared pixels."""
    import onnxruntime

    model = EdgeModel.load(bundle, "onnxruntime", precision, 1)
    spec = model.contract.image
    assert spec is not None
    pixels = load_image(picture, spec)[None]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = model.bundle.path(model.variant.files["image"])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    calls: dict[str, Callable[[], object]] = {
        "session.run": lambda: session.run(["embedding"], {"pixels": pixels}),
        "embed_pixels": lambda: model.embed_pixels(pixels),
        "load_image": lambda: load_image(picture, spec),
        "embed_image": lambda: model.embed_image(picture),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            started = time.thread_time()
            calls[name]()
            if turn >= 20:
                times[name].append(time.thread_time() - started)
    usual = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    bare = usual["session.run"]
    return {
        "calls": rounds - 20,
        "ms": {name: round(value, 4) for name, value in usual.items()},
        "embed_pixels over session.run": round(usual["embed_pixels"] / bare, 3),
        # the times of runs differ by more than this code takes, so it is timed without them
        "embed_image without decode, resize and run, in session.run": round(_own_ms(model, pixels) / bare, 4),
    }


def _own_ms(model: EdgeModel, pixels: NDArray[np.uint8]) -> float:
    """Processor time of `embed_image` where the runtime answers at once, less that of `load_image`."""
    answer = model.embed_pixels(pixels)
    run, model.backend.run_image = model.backend.run_image, lambda _: answer  # type: ignore[method-assign]
    assert model.contract.image is not None
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for _ in range(2000):
            for place, call in enumerate(
                (model.embed_image, lambda picture: load_image(picture, model.contract.image))
            ):
                started = time.thread_time()
                call(pixels[0])
                times[place].append(time.thread_time() - started)
    finally:
        model.backend.run_image = run  # type: ignore[method-assign]
    return 1e3 * (statistics.median(times[0]) - statistics.median(times[1]))


def start(bundle: Path, precision: str, picture: str, runs: int) -> dict[str, Any]:
    """Seconds of a fresh process: the import alone, and from nothing to the first embedding; processor and wall."""
    imported = "import time; t, c = time.perf_counter(), time.process_time(); from pocketvlm.edge import EdgeModel"
    embedded = (
        f"model = EdgeModel.load({str(bundle)!r}, 'onnxruntime', {precision!r}); model.embed_image({picture!r}); "
        "import sys; assert 'torch' not in sys.modules"
    )
    told = "print(time.perf_counter() - t, time.process_time() - c)"
    found = {}
    for name, code in (("import", f"{imported}; {told}"), ("first embedding", f"{imported}; {embedded}; {told}")):
        rows = []
        for _ in range(runs):
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            rows.append([float(value) for value in done.stdout.split()])
        wall, processor = (statistics.median(column) for column in zip(*rows))
        found[name] = {"wall_s": round(wall, 3), "processor_s": round(processor, 3)}
    return found


def agreement(bundle: Path, precision: str, work: Path) -> dict[str, Any]:
    """onnxruntime and ExecuTorch on the same encoded pictures and strings; both files are of this precision."""
    samples = [sample for sample in open_data(DATA) if sample.captions]
    files = []
    for index, sample in enumerate(samples):
        path = work / f"whole-{index}.bin"
        path.write_bytes(sample.image.read())
        files.append(str(path))
    inputs = {"image": files, "text": [sample.captions[0].text for sample in samples]}
    found = {}
    for backend in ("onnxruntime", "executorch"):
        request = {"bundle": str(bundle), "backend": backend, "precision": precision, "threads": 1, "core": None}
        runner = Runner.start(backend, sys.executable, "pocketvlm", {**request, "batch": 1, "inputs": inputs}, work)
        found[backend] = {tower: runner.rows(tower, work) for tower in inputs}
        runner.stop()
    tops = {
        backend: np.argsort(-(rows["text"][:_QUERIES] @ rows["image"].T), axis=1, kind="stable")[:, :_TOP]
        for backend, rows in found.items()
    }
    a, b = tops["onnxruntime"], tops["executorch"]
    return {
        "pictures": len(files),
        "queries": _QUERIES,
        "cosine_least": {
            tower: round(float((found["onnxruntime"][tower] * found["executorch"][tower]).sum(1).min()), 8)
            for tower in inputs
        },
        "same_top5_in_order": round(float((a == b).all(1).mean()), 4),
        "overlap_of_5": round(float(np.mean([len(set(x) & set(y)) for x, y in zip(a, b)])), 3),
    }


# --- result ---------------------------------------------------------------------------------------------------------


def main(
    bundle: Annotated[Positional[Path], tyro.conf.arg(metavar="BUNDLE")],
    fastembed: Annotated[str, tyro.conf.arg(metavar="PYTHON")],
    rounds: int = 9,
) -> None:
    """Measure everything again and write it."""
    opened = Bundle.load(bundle)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        inputs = pictures(work)
        photo = Path(inputs["photograph"][0])
        version = subprocess.run(
            [fastembed, "-c", "import fastembed, onnxruntime; print(fastembed.__version__, onnxruntime.__version__)"],
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        result: dict[str, Any] = {
            "machine": machine(),
            "bundle": {"name": opened.contract.name, "model_id": opened.contract.model_id,
                       "onnx_int8_sha256": sha256_file(opened.path(opened.variant("onnx", "int8").files["image"]))},
            "fastembed": dict(zip(("version", "onnxruntime"), version)),
        }  # fmt: skip
        result["start"] = {name: start(bundle, name, str(photo), 7) for name in ("int8", "fp32")}
        result["overhead"] = {name: overhead(bundle, name, photo.read_bytes(), 620) for name in ("int8", "fp32")}
        result["agreement"] = {name: agreement(bundle, name, work) for name in ("fp32", "int8")}
        result["beside_fastembed"] = {}
        for precision in ("int8", "fp32"):
            ours = {"bundle": str(bundle), "backend": "onnxruntime", "precision": precision}
            folder = fastembed_folder(opened, precision, work / f"fastembed-{precision}")
            theirs = ("fastembed", fastembed, {"fastembed": str(folder)})
            result["beside_fastembed"][precision] = throughput(ours, theirs, inputs, rounds, work)
        weights, exported = open_clip_weights(work)
        ours = {"bundle": str(exported), "backend": "onnxruntime", "precision": "fp32"}
        theirs = ("open_clip", sys.executable, {"name": OPEN_CLIP, "weights": weights})
        few = {name: files[:16] for name, files in inputs.items()}
        result["beside_open_clip"] = {OPEN_CLIP: throughput(ours, theirs, few, max(3, rounds // 2), work)}
        result["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    write(RESULT, result)
    write_between(PAGE, "edge", table(result))
    print(RESULTS / RESULT)


def table(result: dict[str, Any]) -> str:
    """The tables of docs/edge.md."""
    lines = [
        "| JPEG to embedding | model | pictures | ms of one core: theirs / ours | ratio (least to most) "
        "| ms of wall time, defaults | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    beside = [("fastembed", f"{result['bundle']['name']} {p}", sets) for p, sets in result["beside_fastembed"].items()]
    beside += [("open_clip, eager", f"{name} fp32", sets) for name, sets in result["beside_open_clip"].items()]
    for other, model, sets in beside:
        for order, row in sets.items():
            one, all_ = row["processor"], row["wall"]
            ratio = f"**{one['ratio']['median']:.2f}** ({one['ratio']['least']:.2f} to {one['ratio']['most']:.2f})"
            lines.append(
                f"| {other} | {model} | {order} | {one['ms'][1]:.2f} / {one['ms'][0]:.2f} | {ratio} "
                f"| {all_['ms'][1]:.2f} / {all_['ms'][0]:.2f} | {all_['ratio']['median']:.2f} |"
            )
    lines += ["", "| | int8 | fp32 | floor |", "|---|---|---|---|"]
    over, began, agree = result["overhead"], result["start"], result["agreement"]
    both = ("int8", "fp32")

    def line(name: str, values: list[str], floor: str) -> None:
        lines.append(f"| {name} | {' | '.join(values)} | {floor} |")

    pixels, image = "embed_pixels over session.run", "embed_image without decode, resize and run, in session.run"
    line(
        "one picture over bare `InferenceSession.run`, prepared",
        [f"{over[p][pixels]:.3f}" for p in both],
        "1.05",
    )
    line("the same from JPEG, less decode and resize", [f"{1 + over[p][image]:.3f}" for p in both], "1.05")
    for name, floor in (("import", "0.3"), ("first embedding", "1")):
        told = [f"{began[p][name]['processor_s']:.2f} / {began[p][name]['wall_s']:.2f}" for p in both]
        line(f"{name}, seconds of processor / wall", told, floor)
    line(
        "onnxruntime and ExecuTorch: least cosine, pictures",
        [f"{agree[p]['cosine_least']['image']:.6f}" for p in both],
        "0.9999 (fp32)",
    )
    line("the same, texts", [f"{agree[p]['cosine_least']['text']:.6f}" for p in both], "0.9999 (fp32)")
    line("same five of 100 queries, in order", [f"{agree[p]['same_top5_in_order']:.0%}" for p in both], "all (fp32)")
    line("overlap of the best five", [f"{agree[p]['overlap_of_5']:.2f}" for p in both], "4.9 (one file)")
    before, after = result["machine"]["load_average"][0], result["load_average_after"][0]
    versions = f"fastembed {result['fastembed']['version']} on onnxruntime {result['fastembed']['onnxruntime']}"
    lines += ["", f"{versions}; load average {before} before and {after} after, on {os.cpu_count()} cores."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
