"""The arithmetic of a reference run: strict flags, reduced-precision emulation, and a description of the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pocketvlm
from pocketvlm.distill.environment import command_line as command_line
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.device import reproducible_cublas

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_WORKSPACES = (":4096:8", ":16:8")
# operator -> positions of the factors; a bias is added in full precision by the hardware, so it is left alone
_FACTORS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "matmul": (0, 1),
    "linear": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "convolution": (0, 1),
    "_convolution": (0, 1),
    "mkldnn_convolution": (0, 1),
    "cudnn_convolution": (0, 1),
}


def reference_device(name: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; other accelerators have no deterministic full-precision mode.

    Raises:
        UsageError: a device that is absent or cannot hold a reference.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"device {str(device)!r} was given for the reference, which runs on 'cpu' or 'cuda' only; "
            "elsewhere deterministic full precision is not promised, so choose one of them"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was given for the reference, but torch sees no CUDA device here; use 'cpu'")
    return device


@contextlib.contextmanager
def strict_numerics(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms, TF32 off, cudnn.benchmark off, math attention, autocast off; all restored afterwards.

    On the CPU also a single thread for each sum, whose last bits would otherwise depend on how many cores there are;
    `spread` uses the cores all the same. Enter it on the main thread.

    Raises:
        UsageError: on CUDA, when CUBLAS_WORKSPACE_CONFIG holds a value that cuBLAS does not treat as deterministic.
    """
    if device.type == "cuda":
        workspace = reproducible_cublas()
        if workspace not in _WORKSPACES:
            raise UsageError(
                f"CUBLAS_WORKSPACE_CONFIG is {workspace!r} and a reproducible reference needs one of "
                f"{', '.join(_WORKSPACES)}; unset it or set it before torch starts"
            )
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    threads, fused = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = False, False, False, True
        torch.use_deterministic_algorithms(True)
        # nn.MultiheadAttention's fused kernel is not math attention, and emulated TF32 could not see into it
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH), torch.autocast(device.type, enabled=False), torch.inference_mode():
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = saved
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_num_threads(threads)


def strict_facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `strict_numerics` sets, for a manifest; called inside it."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace_config": os.environ.get("CUBLAS_WORKSPACE_CONFIG") if device.type == "cuda" else None,
        "attention": "math",
        "autocast": torch.is_autocast_enabled(device.type),
        "threads": torch.get_num_threads(),
    }


def spread(step: Callable[[_Item], _Result], items: Sequence[_Item], *, threads: bool = True) -> list[_Result]:
    """[step(item) for item in items], over the cores if `threads`.

    An item runs whole on one thread, with as many threads inside as torch has now: under `strict_numerics` one, so
    that the results have the bits of a plain loop. Inference mode and dispatch modes belong to a thread: `step` enters
    the ones it needs.
    """
    workers = min(len(items), _cores()) if threads else 1
    if workers < 2:
        return [step(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(step, items))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def round_mantissa(x: Tensor, bits: int = 10) -> Tensor:
    """float32 rounded to `bits` explicit mantissa bits, ties to even (10 is what TF32 keeps of a factor)."""
    drop = 23 - bits
    raw = x.contiguous().view(torch.int32)
    kept = (raw + ((1 << (drop - 1)) - 1) + ((raw >> drop) & 1)) & ~((1 << drop) - 1)
    return torch.where(torch.isfinite(x), kept.view(torch.float32), x)


class EmulatedTF32(TorchDispatchMode):
    """Inside, every float32 factor of a matmul or convolution is rounded to TF32 first; sums stay float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        positions = _FACTORS.get(func.overloadpacket.__name__)
        if positions:
            args = [
                round_mantissa(value)
                if index in positions and isinstance(value, Tensor) and value.dtype == torch.float32
                else value
                for index, value in enumerate(args)
            ]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _hardware_tf32() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    saved = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = saved


def tf32(device: torch.device) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """("hardware" or "emulated", a context inside which float32 factors count as TF32): by tensor cores if it has any.

    On hardware torch and cuDNN choose per operator whether TF32 pays; emulation rounds the factors of all of them.
    """
    # TF32 came with compute capability 8.0 (NVIDIA A100)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "hardware", _hardware_tf32
    return "emulated", EmulatedTF32


class WideConstants(TorchFunctionMode):
    """`torch.full` of a float makes float64 where no dtype is given.

    transformers fills its causal mask with the lowest number of the model's dtype, in a tensor of torch's default
    dtype, which cannot hold float64's. Setting that default instead would reach every thread.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.full and isinstance(kwargs["fill_value"] if "fill_value" in kwargs else args[1], float):
            kwargs.setdefault("dtype", torch.float64)
        return func(*args, **kwargs)


class NarrowOperators(TorchDispatchMode):
    """Collects the operators that answer in less than float64 (`found`: "softmax float32"), scalars aside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64 and value.ndim:
                name = func.overloadpacket.__name__.strip("_")
                self.found.add(f"{name} {str(value.dtype).removeprefix('torch.')}")
        return result


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, processor and commit, without any path or user name."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else _processor()["model"],
        "cpu": _processor(),
        "kit": pocketvlm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _driver() if cuda else None,
        "compute_capability": list(torch.cuda.get_device_capability(device)) if cuda else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() == "flags":
                wanted = ("avx", "fma", "f16c", "amx")
                flags = sorted(flag for flag in value.split() if flag.startswith(wanted))
                break
    except OSError:
        pass  # not Linux: the name alone has to do
    return {"model": model, "flags": flags}


def _run(*command: str, folder: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str | None:
    # resolve(): the import package reaches its rooms through links into the repository
    root = Path(__file__).resolve().parent.parent
    commit = _run("git", "rev-parse", "HEAD", folder=root) if (root / ".git").exists() else None
    if commit and _run("git", "status", "--porcelain", folder=root):
        commit += " with local changes"
    return commit


def _driver() -> str | None:
    out = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if out:
        return out.splitlines()[0]
    try:
        # a container may have the driver and not its tools
        found = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None
