"""The hand-made bundle of the edge tests, with a file for every platform."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def edge_toys() -> Any:
    spec = importlib.util.spec_from_file_location("edge_conftest", TESTS / "edge" / "conftest.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
