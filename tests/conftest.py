"""One torch thread per test process: the suite runs in several processes, and results must not depend on the count."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items) -> None:  # type: ignore[no-untyped-def]
    import torch

    if not torch.cuda.is_available():
        cuda = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=cuda)
        items[:] = [item for item in items if item not in cuda]


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_was() -> Iterator[None]:
    """A global that leaks out of one test fails that test, and not a hundred later ones."""
    import torch

    def state() -> dict[str, object]:
        return {
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "fused attention": torch.backends.mha.get_fastpath_enabled(),
        }

    before = state()
    yield
    after = state()
    torch.set_default_dtype(torch.float32)
    assert after == before, "the test, or what it called, changed a global of torch"
