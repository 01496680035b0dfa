"""Toys of other rooms, a minute student's export, and the compiled Kotlin core."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


def _load(path: Path) -> Any:
    # pytest's importlib mode gives test files no package to import them from
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def edge_toys() -> Any:
    return _load(TESTS / "edge" / "conftest.py")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute student's bundle, onnx fp32, with its conformance vectors. Read only."""
    from pocketvlm.export.bundle import export_bundle

    student = _load(TESTS / "export" / "toy_parity.py").toy_student()
    return export_bundle(student, tmp_path_factory.mktemp("export") / "bundle", ["onnx:fp32"])


@pytest.fixture(scope="session")
def kotlin() -> Any:
    """Module kotlin.py; `kotlin.classes` is the class path of the compiled core."""
    module = _load(TESTS / "mobile_demo" / "kotlin.py")
    module.classes = module.compile_core()
    return module
