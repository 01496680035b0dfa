"""One torch thread per test process: the suite runs in several processes, and results must not depend on the count."""

from __future__ import annotations

import os

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
