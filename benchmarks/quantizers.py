"""Our int8 beside that of other tools: the same trained student, the same calibration inputs, one run.

    pip install nncf==3.4.0 openvino==2026.4.1
    python -m benchmarks.quantizers

Beside ours: onnxruntime's own dynamic and static quantization with their defaults, NNCF for onnxruntime and for
OpenVINO (preset "mixed"; told that the tower is a transformer where it is one), and ExecuTorch with XNNPACK's own
quantizer. Every file embeds the test concepts of the fold in its own runtime; losses are those of R@5 against the float
model. Milliseconds are processor time of one thread at batch 1: median of rounds in which each file has its turn. The
tools get what they ask for and no tuning by hand. Written to benchmarks/results/quantizers.json and into
docs/quantization.md. Ten minutes for a student.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.held_out import changes, distance, held_out
from benchmarks.named_students import train
from benchmarks.results_folder import RESULTS, machine, write, write_between
from pocketvlm.data import open_data
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.bench import WORKER
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.calibration import build_calibration
from pocketvlm.export.compare import paired_change
from pocketvlm.export.targets.base import Calibration
from pocketvlm.export.targets.executorch import METHODS, write_program
from pocketvlm.export.targets.onnx import INPUTS, Tower, _batches, _forget_initializer_shapes
from pocketvlm.export.targets.onnx_ladder import Batches
from pocketvlm.export.workers import Worker
from pocketvlm.students import deploy_image, deploy_text, load_student

ROUNDS, RUNS = 15, 15
OURS = ("onnx:fp32", "onnx:int8", "executorch:fp32", "executorch:int8")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"


def onnxruntime_dynamic(source: Path, target: Path, _: Any, __: str) -> None:
    """`quantize_dynamic`, weights per channel; convolutions too, as it does by itself."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(_clean(source, target)), str(target), weight_type=QuantType.QInt8, per_channel=True)


def onnxruntime_dynamic_linear(source: Path, target: Path, _: Any, __: str) -> None:
    """The same for linear layers only, as its documentation advises for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    kinds = ["MatMul", "Gemm"]
    clean = _clean(source, target)
    quantize_dynamic(str(clean), str(target), weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=kinds)


def onnxruntime_static(source: Path, target: Path, rows: Any, tower: Tower) -> None:
    """`quantize_static`, QDQ, per channel, ranges by minimum and maximum, after its own preprocessing."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = target.with_suffix(".ready.onnx")
    quant_pre_process(str(_clean(source, target)), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(target), Batches(_batches(rows, tower)), per_channel=True, weight_type=QuantType.QInt8
    )


def nncf_onnx(source: Path, target: Path, rows: Any, tower: str) -> None:
    """NNCF on the ONNX graph, for onnxruntime."""
    nncf, onnx = import_module("nncf"), import_module("onnx")
    model = onnx.load(str(_clean(source, target)))
    data = nncf.Dataset([{INPUTS[tower]: row[None]} for row in rows])
    with contextlib.redirect_stdout(io.StringIO()):
        onnx.save(nncf.quantize(model, data, **_nncf_options(nncf, model, len(rows))), str(target))


def nncf_openvino(source: Path, target: Path, rows: Any, _: str) -> None:
    """NNCF on OpenVINO's own graph."""
    nncf, openvino, onnx = (import_module(name) for name in ("nncf", "openvino", "onnx"))
    model = openvino.convert_model(str(source))
    with contextlib.redirect_stdout(io.StringIO()):
        done = nncf.quantize(
            model, nncf.Dataset([row[None] for row in rows]), **_nncf_options(nncf, onnx.load(str(source)), len(rows))
        )
    openvino.save_model(done, str(target), compress_to_fp16=False)


def openvino_float(source: Path, target: Path, _: Any, __: str) -> None:
    """The float graph."""
    openvino = import_module("openvino")
    openvino.save_model(openvino.convert_model(str(source)), str(target), compress_to_fp16=False)


# name -> runtime, file suffix, what makes it
OTHERS: dict[str, tuple[str, str, Callable[[Path, Path, Any, str], None]]] = {
    "onnxruntime, dynamic": ("onnxruntime", ".onnx", onnxruntime_dynamic),
    "onnxruntime, dynamic, linear layers": ("onnxruntime", ".onnx", onnxruntime_dynamic_linear),
    "onnxruntime, static": ("onnxruntime", ".onnx", onnxruntime_static),
    "NNCF": ("onnxruntime", ".onnx", nncf_onnx),
    "NNCF ": ("openvino", ".xml", nncf_openvino),
    "float": ("openvino", ".xml", openvino_float),
}


def _nncf_options(nncf: Any, model: Any, rows: int) -> dict[str, Any]:
    transformer = any(node.op_type == "Softmax" for node in model.graph.node)
    return {
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": rows,
        **({"model_type": nncf.ModelType.TRANSFORMER} if transformer else {}),
    }


def _clean(source: Path, target: Path) -> Path:
    """Without the inferred shapes of initializers, which every one of these tools stumbles over."""
    onnx = import_module("onnx")
    model = onnx.load(str(source))
    _forget_initializer_shapes(model)
    clean = target.with_name(f"{target.stem}.clean.onnx")
    onnx.save(model, str(clean))
    return clean


def xnnpack_plain(run: Path, calibration: Calibration, path: Path) -> None:
    """Both towers by ExecuTorch's `XNNPACKQuantizer`, static, per channel."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    student = load_student(run / "student")
    programs = {}
    rows = {"image": calibration.pixels, "text": calibration.ids}
    for tower, module in (("image", deploy_image(student)), ("text", deploy_text(student))):
        inputs = torch.from_numpy(rows[tower])
        graph = torch.export.export(module, (inputs[:1],)).module(check_guards=False)
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for index in range(len(inputs)):
                prepared(inputs[index : index + 1])
        programs[METHODS[tower]] = torch.export.export(convert_pt2e(prepared), (inputs[:1],))  # type: ignore[index]
    write_program(programs, "w8a8-static", {}, path)


def compare(run: Path, fold: int, work: Path) -> list[dict[str, Any]]:
    """One row per tool and runtime."""
    pool = held_out(run, fold)
    folder = work / "bundle"
    data = open_data(f"openmoji?pool=student&fold={fold}")
    student = load_student(run / "student")
    contract = student.contract
    tokenizer = Tokenizer(student.tokenizer_json, contract.text)
    calibration = build_calibration(data, contract, tokenizer)
    rows = {"image": calibration.pixels, "text": calibration.ids}
    export_bundle(run, folder, OURS, calibration_data=calibration)
    bundle = Bundle.load(folder)
    candidates: dict[tuple[str, str], dict[str, Any]] = {}
    failed: list[dict[str, Any]] = []
    inputs = {tower: work / f"rows-{tower}.npy" for tower in pool.rows}
    for tower, path in inputs.items():
        np.save(path, pool.rows[tower])

    def served(variant: BundleVariant, where: Path) -> dict[str, Any]:
        files = {tower: str(where / file) for tower, file in variant.files.items()}
        request = {"folder": str(where), "variant": asdict(variant), "threads": 1}
        return {t: ((WORKER, request | {"tower": t, "rows": str(inputs[t])}), files[t]) for t in files}

    for variant in bundle.variants:
        runtime = "onnxruntime" if variant.target == "onnx" else variant.target
        tool = "float" if variant.precision == "fp32" else "pocketvlm"
        candidates[tool, runtime] = served(variant, folder)
    full = {tower: folder / file for tower, file in bundle.variant("onnx", "fp32").files.items()}
    for index, (name, (runtime, suffix, make)) in enumerate(OTHERS.items()):
        made = work / f"other-{index}"
        made.mkdir()
        try:
            files = {}
            for tower, source in full.items():
                files[tower] = f"{tower}{suffix}"
                make(source, made / files[tower], rows[tower], tower)
        except Exception as error:  # what another tool cannot do is a row of the table
            failed.append({"tool": name.strip(), "runtime": runtime, "failed": _first_line(error)})
            continue
        if runtime == "openvino":
            candidates[name.strip(), runtime] = {
                t: (
                    ("benchmarks.openvino_worker", {"model": str(made / f), "rows": str(inputs[t]), "threads": 1}),
                    str(made / f),
                )
                for t, f in files.items()
            }
        else:
            candidates[name, runtime] = served(BundleVariant("onnx", "int8", files, "dynamic", None, {}), made)
    try:
        plain = work / "plain.pte"
        xnnpack_plain(run, calibration, plain)
        variant = BundleVariant("executorch", "int8", {"image": "plain.pte", "text": "plain.pte"}, "fixed-1", None, {})
        candidates["XNNPACK's quantizer", "executorch"] = served(variant, work)
    except Exception as error:
        failed.append({"tool": "XNNPACK's quantizer", "runtime": "executorch", "failed": _first_line(error)})
    return [*_measured(candidates, pool, work, failed), *failed]


def _measured(
    candidates: dict[tuple[str, str], dict[str, Any]], pool: Any, work: Path, failed: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    workers: dict[tuple[str, str], dict[str, Worker]] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        for (tool, runtime), towers in candidates.items():
            try:
                opened = {tower: Worker(module, request) for tower, ((module, request), _) in towers.items()}
                rows = {}
                for tower, worker in opened.items():
                    worker.ask({"do": "embed", "out": str(work / "embedded.npy")})
                    rows[tower] = np.load(work / "embedded.npy")
            except Exception as error:
                failed.append({"tool": tool, "runtime": runtime, "failed": _first_line(error)})
                continue
            workers[tool, runtime], found[tool, runtime] = opened, rows
        times: dict[tuple[tuple[str, str], str], list[float]] = {}
        order = [(key, tower) for key, towers in workers.items() for tower in towers]
        for turn in range(ROUNDS):
            for key, tower in order[turn % len(order) :] + order[: turn % len(order)]:
                answer = workers[key][tower].ask({"do": "turn", "runs": RUNS})
                times.setdefault((key, tower), []).append(statistics.median(answer["run_processor"]))
    finally:
        for towers in workers.values():
            for worker in towers.values():
                worker.close()
    exact = found["float", "onnxruntime"]
    before = pool.hits(exact)
    table = []
    for (tool, runtime), rows in found.items():
        after = changes(before, pool.hits(rows))
        files = {file for _, file in candidates[tool, runtime].values()}
        weights = {str(Path(file).with_suffix(".bin")) for file in files if file.endswith(".xml")}
        queries = "".join(after.values())
        change = paired_change(queries.count("-"), queries.count("+"), len(queries))
        medians = {tower: statistics.median(times[(tool, runtime), tower]) for tower in rows}
        table.append(
            {
                "tool": tool,
                "runtime": runtime,
                "megabytes": round(sum(Path(file).stat().st_size for file in files | weights) / 1e6, 2),
                "ms": {tower: round(value, 4) for tower, value in medians.items()},
                "rounds_ms": {
                    tower: [round(f(times[(tool, runtime), tower]), 4) for f in (min, max)] for tower in rows
                },
                "one_minus_cosine": {tower: distance(exact[tower], rows[tower]) for tower in rows},
                "loss_points": round(100 * change.loss, 2),
                "bound_points": round(100 * change.bound, 2),
                "changes": after,
            }
        )
    return table


def markdown(students: dict[str, Any]) -> str:
    """One row per student, runtime and tool."""
    lines = [
        "| student | runtime | tool | MB | picture, ms | text, ms | 1 − cosine, picture | text | loss of R@5, points "
        "| bound |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for student, entry in students.items():
        for row in sorted(entry["rows"], key=lambda row: row["runtime"]):
            head = f"| `{student}` | {row['runtime']} | {row['tool']} "
            if "failed" in row:
                lines.append(f"{head}| {row['failed'][:80].replace('|', '/')} |" + " |" * 6)
                continue
            far = [f"{row['one_minus_cosine'][tower]['mean']:.1e}" for tower in ("image", "text")]
            lines.append(
                f"{head}| {row['megabytes']:.1f} | {row['ms']['image']:.2f} | {row['ms']['text']:.2f} | {far[0]} "
                f"| {far[1]} | {row['loss_points']:+.2f} | {row['bound_points']:+.2f} |"
            )
    return "\n".join(lines) + "\n"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def main(
    work: Path = Path("runs/named"),
    students: tuple[str, ...] = ("lite0-minilm2", "effnet-lite0", "vit-tiny", "repvit-m0.9"),
    fold: int = 0,
) -> None:
    """Compare, student by student; each finished student is written."""
    for package in ("nncf", "openvino"):
        import_module(package)
    known = RESULTS / "quantizers.json"
    results: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))["students"] if known.is_file() else {}
    for student in students:
        run = train(student, fold, work.resolve())
        scratch = Path(tempfile.mkdtemp(prefix="quantizers-"))
        try:
            results[student] = {"rows": compare(run, fold, scratch), "fold": fold, "machine": machine()}
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        facts = {"rounds": ROUNDS, "runs": RUNS, "students": results}
        print(write("quantizers.json", facts), flush=True)
        write_between(PAGE, "quantizers", markdown(results))


if __name__ == "__main__":
    tyro.cli(main)
