"""What bench says is what was measured; what cannot be measured is named; what does not run stops it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.cli import main
from pocketvlm.edge.bundle import Bundle, describe_files
from pocketvlm.edge.errors import IntegrityError, MissingExtraError, UnknownNameError, UsageError
from pocketvlm.export import bench as module
from pocketvlm.export.bench import BenchReport, Profile, bench, describe_machine, made_up_jpeg
from pocketvlm.export.bench_report import WIDTH, bench_tables, plot, save_report
from pocketvlm.export.bench_worker import summarize_operators
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.source import Exportable
from pocketvlm.export.workers import Worker, WorkerError
from pocketvlm.students import train_tokenizer

_spec = importlib.util.spec_from_file_location("toy_export", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

QUICK: dict[str, Any] = {"rounds": 3, "runs": 4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX in two precisions, ExecuTorch's image tower in one, and a parity summary that names an R@5."""
    towers = toy.toy_towers()
    data = train_tokenizer(["a photo of a dog on the beach"] * 3, 300)
    text = replace(towers.contract.text, vocab_size=toy.VOCAB, tokenizer_sha256="")
    model = Exportable(replace(towers, contract=replace(towers.contract, text=text)), data)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("bench") / "toy-bundle"
    try:
        export_bundle(model, out, ("onnx", "executorch:fp32"), calibration_data=toy.toy_calibration())
    finally:
        torch.set_num_threads(before)
    raw = json.loads((out / "bundle.json").read_text())
    task = {"image-to-text": {"k": 5, "candidate": 0.25}}
    raw["parity"] = [{"target": "onnx", "precision": "int8", "task": task}]
    del raw["variants"][-1]["files"]["text"]  # each process of ExecuTorch imports torch, which takes seconds
    (out / "bundle.json").write_text(json.dumps(raw))
    return out


def with_manifest(source: Path, out: Path, change: Any) -> Path:
    """A copy of a bundle whose bundle.json was changed, with hashes of what lies there now."""
    shutil.copytree(source, out)
    raw = json.loads((out / "bundle.json").read_text())
    change(raw)
    raw["files"] = describe_files(out)
    (out / "bundle.json").write_text(json.dumps(raw))
    return out


@pytest.fixture(scope="module")
def with_coreml(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a Core ML variant, whose files nobody opens here."""

    def add(raw: dict[str, Any]) -> None:
        raw["variants"].append({"target": "coreml", "precision": "fp16", "files": {"image": "onnx/image-fp32.onnx"}})

    return with_manifest(bundle, tmp_path_factory.mktemp("coreml") / "apple", add)


@pytest.fixture(scope="module")
def report(with_coreml: Path) -> BenchReport:
    return bench([with_coreml], **QUICK, profile=True)


def test_every_tower_of_every_variant_has_a_row(report: BenchReport) -> None:
    names = {(row.backend, row.precision, row.tower) for row in report.rows}
    onnx = {("onnxruntime", precision, tower) for precision in ("fp32", "int8") for tower in ("image", "text")}
    assert names == onnx | {("executorch", "fp32", "image")}
    for row in report.rows:
        low, high = row.rounds_ms
        assert 0 < low <= row.p50_ms <= high
        assert row.p50_ms <= row.p90_ms * 1.5, "a 90th percentile is no median"
        assert row.prepare_ms > 0
        assert row.whole_ms > 0
        assert row.load_ms > 0
        assert row.first_ms > 0
        assert row.accuracy == (0.25 if (row.backend, row.precision) == ("onnxruntime", "int8") else None)
        assert row.tower_mb <= row.mb
    prepared = {row.tower: row.prepare_ms for row in report.rows}
    assert prepared["image"] > 10 * prepared["text"], "a JPEG of 640 x 480 takes longer than six words"


def test_sizes_are_those_of_the_files(report: BenchReport, with_coreml: Path) -> None:
    onnx = {path.name: path.stat().st_size / 1e6 for path in (with_coreml / "onnx").iterdir()}
    for row in report.rows:
        if row.backend == "onnxruntime":
            assert row.tower_mb == pytest.approx(onnx[f"{row.tower}-{row.precision}.onnx"])
            assert row.mb == pytest.approx(sum(mb for name, mb in onnx.items() if row.precision in name))
        else:
            assert (
                row.mb
                == row.tower_mb
                == pytest.approx((with_coreml / "executorch/model-fp32.pte").stat().st_size / 1e6)
            )


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_of_each_process_and_the_model_a_part_of_it(report: BenchReport) -> None:
    peaks: dict[str, list[float]] = {}
    for row in report.rows:
        assert row.peak_mb is not None
        assert row.model_mb is not None
        assert 0 < row.model_mb < row.peak_mb / 2, "the runtime itself is no part of the model"
        peaks.setdefault(row.backend, []).append(row.peak_mb)
    # ExecuTorch's binding brings torch; a child that inherited the parent's figure would show it for ONNX too
    assert max(peaks["onnxruntime"]) < min(peaks["executorch"]) / 2


def test_core_ml_is_left_out_with_its_reason(report: BenchReport) -> None:
    assert [(entry.backend, entry.precision) for entry in report.left_out] == [("coreml", "fp16")]
    assert "macOS" in report.left_out[0].reason
    assert "left out: apple, coreml fp16" in bench_tables(report)


def test_profiles_name_the_operators(report: BenchReport) -> None:
    found = {(p.backend, p.precision, p.tower): p.operators for p in report.profiles}
    assert len(found) == len(report.rows)
    for operators in found.values():
        assert sum(row["share"] for row in operators) == pytest.approx(1)
    assert "Conv" in {row["operator"] for row in found["onnxruntime", "fp32", "image"]}
    lowered = {row["operator"] for row in found["executorch", "fp32", "image"]}
    assert any(name.startswith("Convolution") for name in lowered), "what XNNPACK runs, not one delegate"
    assert not any(name.startswith(("Method", "OPERATOR", "DELEGATE")) for name in lowered), "counted twice"


def test_the_tables_fit_a_terminal_and_the_files_are_written(report: BenchReport, tmp_path: Path) -> None:
    text = bench_tables(report)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "onnxruntime int8 image" in text
    save_report(report, tmp_path / "out")
    written = json.loads((tmp_path / "out/bench.json").read_text())
    assert written["schema_version"] == "1.0"
    assert written["rows"][0].keys() == report.to_dict()["rows"][0].keys()
    assert written["machine"]["cores"] >= 1
    assert (tmp_path / "out/bench.png").stat().st_size > 1000
    # a toy's graph is a hair beside the decoding of its picture
    even = [replace(row, p50_ms=5.0, prepare_ms=5.0, rounds_ms=(4.0, 6.0)) for row in report.rows]
    plot(replace(report, rows=tuple(even)), tmp_path / "even.png")
    with Image.open(tmp_path / "even.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0xBB, 0xBB, 0xBB)):
        assert (pixels == colour).all(axis=1).sum() > 500, "bars of both runtimes and of what comes before"


def test_rounds_are_summed_up_by_medians(bundle: Path) -> None:
    opened = Bundle.load(bundle)
    job = module._Job(opened, "toy", opened.variant("onnx", "int8"), "image", 1)
    job.runs["run"] = [[1.0, 9.0, 2.0], [4.0, 5.0, 90.0], [3.0, 3.0, 3.0]]
    for name in ("run_processor", "prepare", "whole", "whole_processor"):
        job.runs[name] = [[7.0], [8.0], [100.0]]
    row = module._row(job, {"load_ms": 5.0, "first_ms": 6.0, "peak_mb": None, "model_mb": None})
    assert row.p50_ms == 3.0  # of 2, 5, 3
    assert row.rounds_ms == (2.0, 5.0)
    # of 1 2 3 3 3 4 5 9 90, at place 0.9 x 8 = 7.2: 9 + 0.2 x 81
    assert row.p90_ms == pytest.approx(25.2)
    assert row.whole_ms == 8.0
    assert "-" in bench_tables(
        BenchReport((row,), (), (), describe_machine() | {"load_average_after": 0.0}, QUICK_NOTES)
    )


QUICK_NOTES = {"rounds": 3, "runs_per_round": 3, "picture": "none", "text": "none", "batch": 1}


def test_a_busy_machine_is_said(report: BenchReport) -> None:
    row = replace(report.rows[0], p50_ms=10.0, processor_ms=9.9, threads=1)
    quiet = {"cores": 4, "load_average_before": 1.0, "load_average_after": 4.0}
    assert module._warnings(quiet, [row]) == []
    (loud,) = module._warnings(quiet | {"load_average_before": 4.1}, [row])
    assert "4.1 before" in loud
    (waited,) = module._warnings(quiet, [replace(row, processor_ms=5.0)])
    assert "50 % of a core" in waited
    (many,) = module._warnings(quiet, [replace(row, threads=5)])
    assert "5 threads" in many
    shown = bench_tables(replace(report, warnings=(loud,)))
    assert "WARNING: the load average was 4.1" in " ".join(shown.split())


def test_operators_are_summed_by_type() -> None:
    events = [("Conv", [2.0, 2.0, 2.0, 900.0]), ("Add", [1.0]), ("Conv", [1.0, 3.0, 5.0, 7.0])]
    events += [(f"op{i}", [0.1, 0.1]) for i in range(10)]
    rows = summarize_operators(events)
    # one run of four that was interrupted changes nothing: 2 + (3 + 5) / 2
    assert rows[0] == {"operator": "Conv", "share": pytest.approx(6 / 8), "ms": 6.0, "calls": 2}
    assert rows[1]["operator"] == "Add"
    assert len(rows) == 11
    assert rows[-1]["operator"] == "(2 others)"
    assert rows[-1]["ms"] == pytest.approx(0.2)
    assert rows[-1]["calls"] == 2
    assert summarize_operators([]) == []


def test_a_profile_of_nothing_says_so(report: BenchReport) -> None:
    shown = bench_tables(replace(report, profiles=(Profile("toy", "coreml", "fp16", "image", 2, ()),)))
    assert "coreml fp16 image, 2 threads, by operator: this runtime has no profiler here" in shown


def test_the_made_up_picture_is_the_same_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert made_up_jpeg(tmp_path).read_bytes() == made_up_jpeg(tmp_path / "a").read_bytes()
    with Image.open(tmp_path / "picture.jpg") as picture:
        assert (picture.format, picture.size) == ("JPEG", (640, 480))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"threads": (0,)}, UsageError, "threads is 0"),
        ({"threads": ()}, UsageError, "threads is 0"),
        ({"rounds": 0}, UsageError, "rounds is 0"),
        ({"runs": -1}, UsageError, "runs is -1"),
        ({"towers": ("picture",)}, UnknownNameError, "tower 'picture'"),
        ({"backends": ("onnxruntme",)}, UnknownNameError, "did you mean 'onnxruntime'"),
        ({"precisions": ("fp16",)}, UnknownNameError, "precision of bundle 'toy-bundle' 'fp16'"),
        ({"backends": ("executorch",), "precisions": ("int8",)}, UnknownNameError, "known: fp32|did you mean"),
    ],
)
def test_what_makes_no_sense_is_refused(bundle: Path, options: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        bench([bundle], **options)


def test_bundles_that_cannot_be_measured_are_refused(bundle: Path, with_coreml: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no bundle\.json"):
        bench([tmp_path])
    with pytest.raises(UsageError, match="no bundle was given"):
        bench([])
    only = with_manifest(bundle, tmp_path / "two", lambda raw: raw["variants"].pop())
    with pytest.raises(UnknownNameError, match="target of bundle 'two' 'executorch'"):
        bench([only], backends=["executorch"])
    if sys.platform != "darwin":
        with pytest.raises(UsageError, match="macOS only"):
            bench([with_coreml], backends=["coreml"])


def test_a_missing_runtime_is_named_or_left_out(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "executorch" else found(name))
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[executorch\]"):
        bench([bundle], backends=["executorch"])
    jobs, left_out = module._plan([bundle], None, None, ("image",), (1, 2))
    assert [(job.variant.target, job.threads) for job in jobs] == [("onnx", 1), ("onnx", 2)] * 2
    assert [(entry.backend, entry.reason) for entry in left_out] == [
        ("executorch", "not installed: pip install 'pocketvlm[executorch]'")
    ]


def test_a_file_that_does_not_run_stops_it(bundle: Path, tmp_path: Path) -> None:
    def spoil(raw: dict[str, Any]) -> None:
        (tmp_path / "spoilt/onnx/text-int8.onnx").write_bytes(b"no graph")

    spoilt = with_manifest(bundle, tmp_path / "spoilt", spoil)
    with pytest.raises(IntegrityError, match="onnxruntime int8 text of bundle 'spoilt' does not run"):
        bench([spoilt], backends=["onnxruntime"], precisions=["int8"], **QUICK)


def test_bundles_of_one_name_are_told_apart() -> None:
    assert module._short_names(["runs/a/bundle", "runs/b/bundle"]) == ["a/bundle", "b/bundle"]
    assert module._short_names(["runs/a/bundle"]) == ["bundle"]
    assert module._short_names(["runs/a", "runs/a"]) == ["runs/a", "runs/a"]


def test_a_child_that_dies_or_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(
        "import os, signal, sys, time\n"
        "from pocketvlm.export.workers import serve\n"
        "def answer(asked):\n"
        "    if asked['do'] == 'raise': raise KeyError('lost')\n"
        "    if asked['do'] == 'hang': time.sleep(60)\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        "def start(request):\n"
        "    print('a line of a runtime')\n"
        "    return {'ok': True}, answer\n"
        "serve(start)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(module.__file__).parents[2]}")
    with Worker("dying", {}) as worker:
        assert worker.opened == {"ok": True}, "what a runtime prints is no answer"
        with pytest.raises(WorkerError, match="KeyError") as caught:
            worker.ask({"do": "raise"})
        assert not caught.value.ended
        with pytest.raises(WorkerError, match="ended by signal 11") as caught:
            worker.ask({"do": "die"})
        assert caught.value.ended
    with Worker("dying", {}, timeout_s=2) as worker, pytest.raises(WorkerError, match="ended by signal 9"):
        worker.ask({"do": "hang"})


def test_measuring_onnx_loads_no_torch() -> None:
    code = "import sys, pocketvlm.export.bench, pocketvlm.export.bench_worker as w; w._import_runtime('onnx'); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_command_prints_json_and_keeps_earlier_results(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main(["bench", str(bundle), "--precisions", "fp32", "--towers", "text", "--rounds", "1", *arguments])
        except SystemExit as stop:
            return (int(stop.code or 0), *capsys.readouterr())
        return (0, *capsys.readouterr())

    out = tmp_path / "results"
    code, printed, _ = run("--backends", "onnxruntime", "--runs", "2", "--json", "--out", str(out))
    assert code == 0
    assert json.loads(printed) == json.loads((out / "bench.json").read_text())
    code, _, error = run("--out", str(out))
    assert code == 2
    assert "which would be lost" in error
    code, _, error = run("--threads", "0")
    assert code == 2
    assert error.startswith("pocketvlm: threads is 0")
