"""A toy student, its reference run and its bundle for the tests of parity; some files have their own instead."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.export.reference import record_reference

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(scope="module")
def student() -> Any:
    return toy.toy_student()


@pytest.fixture(scope="module")
def reference(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "reference"
    record_reference(student, folder, data=toy.toy_data(), device="cpu")
    return folder


@pytest.fixture(scope="module")
def good(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.make_bundle(student, tmp_path_factory.mktemp("parity") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))
