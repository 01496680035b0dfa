"""The edge room stays light: nothing heavy is loaded by importing it, nor by using it with onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ["torch", "torchvision", "timm", "transformers", "onnx", "executorch", "coremltools", "pydantic", "scipy"]
MODULES = [
    "",
    ".contract",
    ".errors",
    ".preprocess",
    ".tokenizer",
    ".bundle",
    ".backends",
    ".model",
    ".conformance",
    ".index",
]
REPORT = f"import sys, json; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"


def heavy_after(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_probe_sees_a_heavy_module() -> None:
    assert heavy_after("import onnx") == ["onnx"]


def test_importing_every_module_loads_nothing_heavy() -> None:
    lines = [f"import pocketvlm.edge{module}" for module in MODULES]
    assert heavy_after("\n".join([*lines, "import pocketvlm.edge.backends.onnxruntime"])) == []


def test_importing_the_executorch_and_coreml_backends_loads_nothing_heavy() -> None:
    assert heavy_after("import pocketvlm.edge.backends.executorch, pocketvlm.edge.backends.coreml") == []


def test_the_lazy_names_and_importing_the_model_do_not_start_a_runtime() -> None:
    code = "import pocketvlm, sys; pocketvlm.EdgeModel; pocketvlm.edge.Bundle; assert 'onnxruntime' not in sys.modules"
    assert heavy_after(code) == []


def test_classifying_with_onnxruntime_loads_nothing_heavy(bundle_folder: Path) -> None:
    code = f"""
import numpy, pocketvlm
model = pocketvlm.EdgeModel.load({str(bundle_folder)!r}, threads=1)
picture = numpy.full((8, 8, 3), (255, 0, 0), numpy.uint8)
assert model.classify(picture, ["red", "blue"])[0].label == "red"
"""
    assert heavy_after(code) == []


def test_a_second_copy_under_the_bare_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", "import edge"], capture_output=True, text=True, cwd=root)
    assert done.returncode != 0
    assert "import this package as pocketvlm.edge" in done.stderr
