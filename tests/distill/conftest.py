"""Shared toys of the distillation tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# the toys are also used by subprocesses, so they are a plain module beside the tests
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def toy_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    from distill_toys import use_toy_teacher

    use_toy_teacher(monkeypatch)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill_toys import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def teacher_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of a session, as one user's runs share theirs."""
    return tmp_path_factory.mktemp("teacher")


@pytest.fixture(scope="session")
def hf_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random LLaVA of a few thousand weights."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "teachers"))
    from hf_vlm_toys import save_toy

    return save_toy("llava", tmp_path_factory.mktemp("hf") / "llava")
