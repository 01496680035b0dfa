"""ExecuTorch programs for Apple devices whose towers run inside Core ML: lowered anywhere, run on a device only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pocketvlm.edge.errors import require
from pocketvlm.export.delegation import delegation
from pocketvlm.export.mixed import Plan
from pocketvlm.export.precision import PRECISIONS
from pocketvlm.export.prepare import capture, prune
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant, check_precision
from pocketvlm.export.targets.executorch import METHODS, constants
from pocketvlm.export.targets.onnx import example_rows, present_towers, quiet

_CAST = "dim_order_ops._to_dim_order_copy.default"


class ExecuTorchCoreMLTarget:
    """`executorch-coreml/model-fp16.pte`: methods, inputs and constants as of `ExecuTorchTarget`, batch 1, computed by
    ExecuTorch's Core ML delegate (iOS 17, macOS 14; on the CPU, GPU or Neural Engine, as Core ML chooses).

    Nothing here can run it, and no Mac has: what the export checks is that the delegate took everything but the cast of
    the pixels (`notes["delegation"]`), and parity says of such a variant that nothing was proved.
    """

    name: ClassVar[str] = "executorch-coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    defaults: ClassVar[tuple[str, ...]] = ("fp16",)
    refused: ClassVar[dict[str, str]] = {
        precision: "nothing off a device could judge quantized weights of this delegate; target 'coreml' writes them"
        for precision in PRECISIONS
        if precision not in ("fp16", "fp32")
    }

    def __init__(self) -> None:
        require("executorch.exir", "executorch")
        require("coremltools", "coreml")

    def lower(
        self,
        towers: Towers,
        *,
        precision: Precision,
        folder: Path,
        calibration: Calibration | None,
        plan: Plan | None = None,
    ) -> Variant:
        """Write both towers into one program.

        Raises:
            UsageError: another precision than fp16 and fp32.
        """
        from executorch.exir import to_edge_transform_and_lower

        check_precision(self, precision, calibration)
        relative = f"{self.name}/model-{precision}.pte"
        with quiet():
            programs, partitioners = {}, {}
            for tower, module in present_towers(towers):
                rows = example_rows(towers, tower)
                graph = capture(_FloatFirst(module) if tower == "image" else module, rows)
                prune(graph)
                programs[METHODS[tower]] = torch.export.export(graph, (torch.from_numpy(rows[:1]),))
                partitioners[METHODS[tower]] = [_partitioner(precision, [_CAST] if tower == "image" else [])]
            manager = to_edge_transform_and_lower(
                programs, partitioner=partitioners, constant_methods=constants(towers)
            )
            notes: dict[str, object] = {"backend": "coreml", "delegation": delegation(manager, programs)}
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            with open(folder / relative, "wb") as file:
                manager.to_executorch().write_to_file(file)
        files: dict[str, str] = {tower: relative for tower, _ in present_towers(towers)}
        return Variant(self.name, precision, files, "fixed-1", towers.contract.embed_dim, notes)


class _FloatFirst(nn.Module):
    """The delegate has no uint8 ("KeyError: torch.uint8"): the cast stays outside, so it has to be the first step."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels.to(torch.float32))


def _partitioner(precision: str, skipped: list[str]) -> Any:
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    exact = coremltools.precision.FLOAT32 if precision == "fp32" else coremltools.precision.FLOAT16
    specs = CoreMLBackend.generate_compile_specs(
        minimum_deployment_target=coremltools.target.iOS17, compute_precision=exact
    )
    return CoreMLPartitioner(skip_ops_for_coreml_delegation=skipped, compile_specs=specs)
