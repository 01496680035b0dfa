from __future__ import annotations

import os

import pytest
import torch

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.teachers.device import describe_device, full_float32, pick_device


@pytest.mark.parametrize("name", ["cpu", "meta", torch.device("cpu")])
def test_named_devices(name: str | torch.device) -> None:
    device = pick_device(name)
    assert torch.ones(2, device=device).device == device == torch.device(name)


@pytest.fixture(autouse=True)
def _cublas_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    # set first, so that what `pick_device` sets is taken back
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_choosing_cuda_asks_cublas_to_be_reproducible(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first matmul, after which torch no longer looks; a user's own value stays."""
    pick_device("cpu")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    pick_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    pick_device(name)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


def test_a_missing_device_is_refused_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"'cuda' was asked for, but torch sees 0"):
        pick_device("cuda")
    with pytest.raises(UsageError, match="no Apple GPU"):
        pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(UsageError, match="cuda:1"):
        pick_device("cuda:1")


@pytest.mark.parametrize("name", ["cudda", "gpu", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown device"):
        pick_device(name)


@pytest.mark.parametrize("name", ["cpu:1", "cuda:x", "meta:0"])
def test_bad_index(name: str) -> None:
    with pytest.raises(UsageError, match="index"):
        pick_device(name)


def test_full_float32_restores_what_it_found() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        with full_float32():
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_describe() -> None:
    assert describe_device(torch.device("cpu")).startswith("cpu (")
    assert describe_device(torch.device("meta")) == "meta"
