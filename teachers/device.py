"""Where tensors live: the one place that turns a user's device name into a `torch.device`.

Everything else in the kit takes a `torch.device` (or calls `pick_device`) and moves tensors with `.to(device)`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from pocketvlm.edge.errors import UsageError, counted, unknown_name

_NAMES = ("auto", "cpu", "cuda", "mps", "meta")


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Under torchrun (LOCAL_RANK in the environment) CUDA without an index is this process's own device.

    name: "auto", "cpu", "cuda", "cuda:1", "mps", or "meta" (shapes without data, for counting parameters).

    Raises:
        UsageError: the name is unknown, or this machine has no such device. Only "auto" ever falls back.
    """
    if isinstance(name, torch.device):
        name = str(name)
    local = os.environ.get("LOCAL_RANK", "")
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        if not local.isdigit():
            reproducible_cublas()
            return torch.device("cuda")
        name = "cuda"
    if name == "cuda" and local.isdigit():
        name = f"cuda:{local}"
    kind, _, index = name.partition(":")
    if kind not in _NAMES or kind == "auto":
        raise unknown_name("device", name, _NAMES)
    if index and not (kind == "cuda" and index.isdigit()):
        raise UsageError(f"device {name!r} has an index that {kind!r} does not take; write 'cuda:0' or plain {kind!r}")
    if kind == "cuda":
        present = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= present:
            raise UsageError(
                f"device {name!r} was asked for, but torch sees {present} CUDA devices here; "
                "use device 'auto' or 'cpu' (or no more processes a machine than it has devices), or install a CUDA "
                "build of torch"
            )
        reproducible_cublas()
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' was asked for, but torch sees no Apple GPU here; use device 'auto' or 'cpu'")
    return torch.device(name)


def reproducible_cublas() -> str:
    """Sets CUBLAS_WORKSPACE_CONFIG to :4096:8 unless it is set, and returns what it is now.

    torch reads it once, at the first matmul on a GPU; without it cuBLAS may sum in another order from run to run, and
    a reference recorded later in this process could not promise its bits.
    """
    return os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def describe_device(device: torch.device) -> str:
    """A short human name, such as "cuda (NVIDIA H100)" or "cpu (8 threads)"."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({counted(torch.get_num_threads(), 'thread')})"
    return device.type


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matmuls and convolutions in true float32 while inside (TF32 off), restored afterwards.

    Teachers, runs and scores stand under it: float32 means float32, so that what a GPU gives agrees with what a CPU
    gives to rounding (torch lets cuDNN's convolutions use TF32 by default). Speed is `train.precision`'s business.
    """
    matmul, conv = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, conv
