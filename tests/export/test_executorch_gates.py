"""A gated convolution (squeeze-and-excitation) in int8: XNNPACK has to load it and to compute what PyTorch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch.exir")
pytest.importorskip("torchao")

from pocketvlm.export.prepare import capture
from pocketvlm.export.targets.executorch import _convert, write_program
from pocketvlm.export.targets.xnnpack_quantizer import TowerQuantizer


class Gated(nn.Module):
    """As RepViT: the mean of a convolution's output, through two small convolutions, gates that output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.last(x * gate).mean((2, 3))


def test_a_gate_and_what_it_gates_may_read_the_same_int8_value(tmp_path: Path) -> None:
    from executorch.runtime import Runtime, Verification

    rows = np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32)
    module = Gated().eval().requires_grad_(False)
    graph = _convert(capture(module, rows), TowerQuantizer(), rows)
    example = torch.from_numpy(rows[:1])
    path = tmp_path / "gated.pte"
    write_program({"encode_image": torch.export.export(graph, (example,))}, "int8", {}, path)
    method = Runtime.get().load_program(path, verification=Verification.Minimal).load_method("encode_image")
    for row in rows:
        x = torch.from_numpy(row[None])
        found, expected, exact = method.execute([x])[0], graph(x), module(x)
        assert found.dtype is torch.float32
        # a step of the last layer's output is a two-hundredth of its range; the mean of 36 places averages what differs
        assert float((found - expected).abs().max()) < 0.005 * float(exact.abs().max())
        assert float((found - exact).abs().max()) < 0.015 * float(exact.abs().max())
