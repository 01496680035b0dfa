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


ONLY = """
import sys

ALLOWED = {"numpy", "PIL", "tokenizers", "onnxruntime", "pocketvlm"}

class Only:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        top = name.split(".")[0]
        allowed = top in ALLOWED or top in sys.stdlib_module_names
        return self.finder.find_spec(name, *rest) if allowed else None

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Only, sys.meta_path)
import numpy
from pocketvlm.edge import EdgeModel, ZeroShotClassifier
model = EdgeModel.load(sys.argv[1], threads=1)
picture = numpy.full((8, 8, 3), (255, 0, 0), numpy.uint8)
assert ZeroShotClassifier(model, ["red", "blue"]).classify(picture)[0].label == "red"
assert next(model.stream_images([picture])).shape == (4,)
"""


def test_four_packages_are_enough(bundle_folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ONLY, str(bundle_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def processor_seconds(code: str) -> float:
    """The least of three, as other processes evict caches; wall time on a busy machine says nothing."""
    lines = f"import time\nstarted = time.process_time()\n{code}\nprint(time.process_time() - started)"
    runs = [
        subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    return min(float(run) for run in runs)


def test_importing_and_the_first_embedding_take_little(bundle_folder: Path) -> None:
    imported = "from pocketvlm.edge import EdgeModel"
    assert processor_seconds(imported) < 0.3
    first = (
        f"import numpy\nEdgeModel.load({str(bundle_folder)!r}, threads=1).embed_image(numpy.ones((8, 8, 3), 'uint8'))"
    )
    assert processor_seconds(f"{imported}\n{first}") < 1.0
