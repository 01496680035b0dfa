"""What an ExecuTorch backend took over is counted, what it left is named by module, and so is an unknown operator."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.export.bundle import VariantRow, export_bundle, format_table
from pocketvlm.export.delegation import all_warnings, delegation_lines
from pocketvlm.export.matrix import matrix_table
from pocketvlm.export.source import Exportable
from pocketvlm.export.targets import executorch, list_targets
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.targets.executorch import ExecuTorchTarget, write_program
from pocketvlm.export.unlowered import find_operator, lowering_error

_spec = importlib.util.spec_from_file_location("toy_export_delegation", Path(__file__).with_name("toy_export.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.head = nn.ModuleDict({"projection": nn.Linear(8, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head["projection"](self.stem(x).relu().mean((2, 3))), dim=-1)


def lowered(path: Path) -> dict[str, Any]:
    program = torch.export.export(Small().eval(), (torch.rand(1, 3, 12, 12),))
    return write_program({"encode_image": program}, "fp32", {}, path)["encode_image"]


def test_operators_are_counted_and_those_left_have_their_module(tmp_path: Path) -> None:
    found = lowered(tmp_path / "a.pte")
    assert found["delegates"] >= 1
    assert found["delegated"] >= 4, "convolution, relu, mean, linear"
    assert found["outside"] == sum(row["count"] for row in found["left"]) > 0
    assert {row["module"] for row in found["left"]} == {"the tower itself"}, "the sum of the normalisation"
    assert any(row["operator"].startswith("aten.sum") for row in found["left"])
    assert found["warnings"] == []
    (line,) = delegation_lines("executorch fp32", {"encode_image": found})
    assert f"{found['delegated']} operators in {found['delegates']} delegates, {found['outside']} outside" in line


def test_a_linear_layer_that_was_left_out_is_said_with_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    monkeypatch.setattr(
        executorch, "_partitioners", lambda precision: [XnnpackPartitioner(configs=[ConvolutionConfig])]
    )
    found = lowered(tmp_path / "a.pte")
    (warning,) = found["warnings"]
    assert warning.startswith(("aten.linear.default in head.projection", "aten.addmm.default in head.projection"))
    assert "left outside the backend" in warning
    assert found["left"][0]["module"] == "head.projection", "heavy ones go first"
    row = VariantRow("executorch", "int8", ("a.pte",), 1.0, 0.3, {}, None, None, {"encode_image": found})
    assert "WARNING: executorch int8 encode_image: aten." in format_table([row])


def test_a_backend_that_took_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "_partitioners", lambda precision: [])
    found = lowered(tmp_path / "a.pte")
    assert (found["delegates"], found["delegated"]) == (0, 0)
    assert found["warnings"] == ["the backend took nothing over; every operator runs on reference kernels"]
    assert all_warnings({"encode_image": found})[0].startswith("encode_image: the backend took nothing")
    assert all_warnings(None) == []


def test_a_variant_and_the_matrix_hold_it(tmp_path: Path) -> None:
    towers = toy.toy_towers()
    contract = replace(towers.contract, kind="image-labels", text=None)
    image = Towers(towers.image, None, contract)
    how: dict[str, Any] = {"folder": tmp_path, "calibration": toy.toy_calibration()}
    variant = ExecuTorchTarget().lower(image, precision="int8", **how)
    found: Any = variant.notes["delegation"]
    assert set(found) == {"encode_image"}
    assert found["encode_image"]["warnings"] == [], "no quantized layer is left outside"
    assert found["encode_image"]["delegates"] > 0
    row = {
        "student": "toy", "weights": "given", "target": "executorch", "precision": "int8", "status": "works",
        "mb": 1.0, "of_float": 0.3,
        "towers": {}, "seconds": 3.0, "session": 0, "delegation": found,
    }  # fmt: skip
    one = found["encode_image"]
    shown = matrix_table({"rows": [row], "sessions": []})
    assert f"| {one['outside']} of {one['outside'] + one['delegated']} | 3 |" in shown


# --- operators that a converter does not have -----------------------------------------------------------------------


class Odd(nn.Module):
    """No converter has Bessel's function."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class OddToy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4)
        self.blocks = nn.ModuleList([nn.ReLU(), Odd()])
        self.projection = nn.Linear(8, toy.DIM)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.permute(0, 3, 1, 2).to(self.projection.weight.dtype) / 255)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.projection(x.mean((2, 3))), dim=-1)


@pytest.fixture(scope="module")
def odd() -> Exportable:
    towers = toy.toy_towers()
    contract = replace(towers.contract, kind="image-labels", text=None)
    return Exportable(Towers(OddToy().eval().requires_grad_(False), None, contract), None)


@pytest.mark.parametrize(
    ("target", "upstream"),
    [
        ("onnx", "No ONNX function"),
        ("executorch", "not in Core ATen opset"),
        ("coreml", "not implemented"),
    ],
)
def test_the_error_names_operator_module_and_remedy(
    odd: Exportable, tmp_path: Path, target: str, upstream: str
) -> None:
    with pytest.raises(UsageError) as caught:
        export_bundle(odd, tmp_path / "out", [f"{target}:fp32"])
    said = str(caught.value)
    assert said.startswith(target + " fp32 cannot express 'toy': it has no ")
    assert "bessel_j0, which is in blocks.1 of the image tower" in said
    assert upstream in said
    assert "leave the target" in said
    assert "write that module with other operators" in said
    assert "\n" not in said
    assert "\x1b" not in said
    assert not list(tmp_path.iterdir())


def test_the_process_that_lowers_executorch_names_it_too(odd: Exportable, tmp_path: Path) -> None:
    from pocketvlm.export.targets.executorch_writer import BackgroundWriter

    with BackgroundWriter() as writer:
        target = ExecuTorchTarget(writer.write)
        target.lower(odd.towers, precision="fp32", folder=tmp_path, calibration=None)
        with pytest.raises(UsageError) as caught:
            writer.finish()
    said = str(lowering_error(caught.value, "executorch", odd.towers))
    assert "special_bessel_j0, which is in blocks.1 of the image tower" in said


def test_names_are_matched_whole_before_in_part(odd: Exportable) -> None:
    towers = odd.towers
    assert find_operator("no aten::special_bessel_j0 here", towers) == (
        "aten.special_bessel_j0, which is in blocks.1 of the image tower"
    )
    assert find_operator("prims.bessel_j0.default is missing", towers) == (
        "aten.special_bessel_j0, which is in blocks.1 of the image tower"
    )
    assert "stem" in str(find_operator("aten::strange, then `conv2d` op", towers))
    assert find_operator("out of memory", towers) is None
    assert find_operator("aten::strange", towers) is None
    error = lowering_error(MemoryError("out of memory"), "onnx fp32", towers)
    assert "(MemoryError: out of memory)" in str(error)
    assert "it has no" not in str(error)


# --- the Core ML delegate, which no machine but Apple's runs ----------------------------------------------------------


def test_the_core_ml_delegate_takes_all_but_the_cast_of_the_pixels(tmp_path: Path) -> None:
    towers = toy.toy_towers()
    image = Towers(towers.image, None, replace(towers.contract, kind="image-labels", text=None))
    out = export_bundle(Exportable(image, None), tmp_path / "b", ["executorch-coreml"])
    opened = Bundle.load(out)
    (variant,) = opened.variants
    assert (variant.target, variant.precision) == ("executorch-coreml", "fp16")
    found = variant.notes["delegation"]["encode_image"]
    assert found["delegates"] == 1
    assert [row["operator"] for row in found["left"]] == ["dim_order_ops._to_dim_order_copy.default"]
    assert "vectors_worst_1_minus_cosine" not in variant.notes, "nobody has run it"
    with pytest.raises(UsageError, match="there is nothing to load"):
        EdgeModel.load(opened)
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(out / variant.files["image"])
    assert "encode_image" in program.method_names
    with pytest.raises(UsageError, match="target 'coreml' writes them"):
        export_bundle(Exportable(image, None), tmp_path / "c", ["executorch-coreml:w8"])
    assert "executorch-coreml" not in list_targets()
