"""Core ML packages (`.mlpackage`, ML program) for iOS 17, macOS 14 and later: float32, float16, float16 with weights of
8 bits or from a table, and int8; batch 1."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import pocketvlm
from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, require
from pocketvlm.export.fidelity import fidelity
from pocketvlm.export.half import half_graph
from pocketvlm.export.mil.program import NAME, MilBackend
from pocketvlm.export.mixed import Plan, kept
from pocketvlm.export.prepare import Prepared
from pocketvlm.export.targets.base import Calibration, Precision, Towers, Variant, check_precision
from pocketvlm.export.targets.coreml_activations import ROWS, quantize_activations
from pocketvlm.export.targets.coreml_compress import compressed_graph, store_compressed, traceable
from pocketvlm.export.targets.onnx import (
    INPUTS,
    OUTPUT,
    Tower,
    example_rows,
    prepared_tower,
    present_towers,
    quiet,
)

DEPLOYMENT_TARGET = "iOS17"
_SPECIFICATION_VERSION = 8  # what iOS 17 and macOS 14 introduced
_RGB = 20  # ImageFeatureType.ColorSpace.RGB of Core ML's FeatureTypes.proto
_FLOAT32, _INT32 = 65568, 131104  # ArrayFeatureType.ArrayDataType
_NAMESPACE = uuid.UUID("6f1d3c1e-6d5b-4a52-9b0e-1f6d3f0c7a10")


class CoreMLTarget:
    """`coreml/image-fp16.mlpackage` and so on.

    The image input `pixels` is a Core ML image (RGB, S x S, a CVPixelBuffer in Swift), because Core ML has no uint8
    arrays; the values 0..255 reach the graph unscaled and are standardised inside it. Resize before the call by the
    contract's arithmetic: what Vision does with an image of another size is not specified. The text input `ids` is an
    int32 MLMultiArray [1, L]. The output `embedding` is a float32 MLMultiArray [1, D] at every precision.

    fp16: weights are rounded so that kernels keep their sums (`export.half`).
    w8: weights and token tables in int8 with a scale per output channel (row). palette8, palette6, palette4: each
    weight or table holds 256, 64 or 16 different values. mixed: w8 with the blocks of a plan in float16. w8a8-static:
    w8 with int8 inputs of convolutions and linear layers, in ranges that this kit's evaluator measures
    (`coreml_activations`). All else is computed in float16; constants below 2,048 elements stay float16.

    Conversion and saving work on any system, prediction needs macOS. Every package is read back from disk and its
    interface compared with the contract before the export counts as done.
    """

    name: ClassVar[str] = "coreml"
    precisions: ClassVar[tuple[str, ...]] = (
        *("fp16", "fp32", "w8", "mixed", "w8a8-static", "palette8", "palette6", "palette4"),
    )
    defaults: ClassVar[tuple[str, ...]] = ("fp16", "fp32")
    refused: ClassVar[dict[str, str]] = {
        "w4": "blocks of 32 need iOS 18 and these packages are for iOS 17: palette4 is its 4-bit format",
        "w8a8-dynamic": "Core ML sets no range when an input arrives",
        "int8": "the mix of schemes is made for the other runtimes' kernels, and what Core ML has of it is w8a8-static",
    }

    def __init__(self) -> None:
        with quiet():
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
        """Write one package per tower.

        Raises:
            UsageError: this backend has no such precision, or mixed without calibration data or a plan.
            IntegrityError: what was read back from disk does not have the contract's interface.
        """
        check_precision(self, precision, calibration, plan)
        files: dict[str, str] = {}
        notes: dict[str, object] = {
            "minimum_deployment_target": DEPLOYMENT_TARGET,
            "specification_version": _SPECIFICATION_VERSION,
            "numerics": "converted and read back; prediction was not run (it needs macOS)",
        }
        for tower, module in present_towers(towers):
            relative = f"{self.name}/{tower}-{precision}.mlpackage"
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            with quiet():
                facts: dict[str, object] = {}
                ready = None
                if precision != "fp32":
                    ready = prepared_tower(module, calibration, tower) if calibration else None
                    rows = example_rows(towers, tower)
                    if precision == "fp16":
                        graph, facts = half_graph(module, ready, rows)
                    else:
                        blocks = kept(plan, tower) if precision == "mixed" else ()
                        graph, facts = compressed_graph(module, ready, rows, precision, blocks)
                    module = traceable(graph)
                active = ready.fit[:ROWS] if ready and precision == "w8a8-static" else None
                _convert(module, towers, tower, precision, folder / relative, active)
                if ready and active is not None:
                    facts |= _evaluated(folder / relative, tower, ready, precision)
                notes[tower] = facts | check_package(folder / relative, towers.contract, tower)
            files[tower] = relative
        return Variant(self.name, precision, files, "fixed-1", towers.contract.embed_dim, notes)


class _FromPlanes(nn.Module):
    """Takes the planar float image [1, 3, S, S] that Core ML makes of a pixel buffer."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, planes: Tensor) -> Tensor:
        return self.tower(planes.permute(0, 2, 3, 1))


def _evaluated(path: Path, tower: Tower, ready: Prepared, precision: str) -> dict[str, object]:
    """Notes on how far the saved package is from float on held-out inputs, by this kit's evaluator."""
    backend = MilBackend({tower: path})
    found = (backend.run_image if tower == "image" else backend.run_text)(ready.held)
    facts: dict[str, object] = {"scheme": "weights-per-channel, inputs-per-tensor", "held_out_by": NAME}
    return facts | fidelity(found, ready.expected).notes(precision)


def _convert(
    module: nn.Module, towers: Towers, tower: Tower, precision: str, path: Path, active: NDArray[Any] | None = None
) -> None:
    """active: rows that set the ranges of int8 inputs."""
    import coremltools as ct

    example = torch.from_numpy(example_rows(towers, tower)[:1])
    if tower == "image":
        module, example = _FromPlanes(module), example.permute(0, 3, 1, 2).float()
        inputs = [ct.ImageType(INPUTS[tower], shape=tuple(example.shape), color_layout=ct.colorlayout.RGB)]
    else:
        inputs = [ct.TensorType(INPUTS[tower], shape=tuple(example.shape), dtype=np.int32)]
    fast = torch.backends.mha.get_fastpath_enabled()
    # the fused attention of nn.MultiheadAttention is one operator that no converter knows
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            traced = torch.jit.trace(module, example, check_trace=False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    model = ct.convert(
        traced,
        inputs=inputs,
        outputs=[ct.TensorType(OUTPUT, dtype=np.float32)],
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, DEPLOYMENT_TARGET),
        compute_precision=ct.precision.FLOAT32 if precision == "fp32" else ct.precision.FLOAT16,
        skip_model_load=True,
    )
    if active is not None:
        model = quantize_activations(model, active)
    if precision not in ("fp16", "fp32"):
        model = store_compressed(model, precision)
    model.short_description = f"{towers.contract.name}: {tower} tower, {precision}"
    model.version = pocketvlm.__version__
    model.user_defined_metadata["pocketvlm.contract_sha256"] = towers.contract.digest()
    model.save(str(path))
    fix_identifiers(path)


def fix_identifiers(path: Path) -> None:
    """Replace the random item identifiers of Manifest.json, so that equal models give equal files."""
    manifest = path / "Manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    names = {
        old: str(uuid.uuid5(_NAMESPACE, entry["path"])).upper() for old, entry in content["itemInfoEntries"].items()
    }
    content["itemInfoEntries"] = {names[old]: entry for old, entry in content["itemInfoEntries"].items()}
    content["rootModelIdentifier"] = names[content["rootModelIdentifier"]]
    manifest.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def check_package(path: Path, contract: ModelContract, tower: str) -> dict[str, object]:
    """Read a saved package and compare its inputs and outputs with the contract.

    Returns:
        Facts for `Variant.notes`: number of operations and the specification version found.

    Raises:
        IntegrityError: naming the first property that differs.
    """
    utils = require("coremltools.models.utils", "coreml")
    spec = utils.load_spec(str(path))
    description = spec.description
    found: dict[str, Any] = {
        "specification version": spec.specificationVersion,
        "inputs": [entry.name for entry in description.input],
        "outputs": [entry.name for entry in description.output],
    }
    expected: dict[str, Any] = {
        "specification version": _SPECIFICATION_VERSION,
        "inputs": [INPUTS["image" if tower == "image" else "text"]],
        "outputs": [OUTPUT],
    }
    _compare(path, found, expected)
    entry = description.input[0].type
    if tower == "image":
        assert contract.image is not None
        found = {"image": (entry.imageType.width, entry.imageType.height, entry.imageType.colorSpace)}
        expected = {"image": (contract.image.size, contract.image.size, _RGB)}
    else:
        assert contract.text is not None
        found = {"array": (list(entry.multiArrayType.shape), entry.multiArrayType.dataType)}
        expected = {"array": ([1, contract.text.context_length], _INT32)}
    output = description.output[0].type.multiArrayType
    found["embedding"], expected["embedding"] = output.dataType, _FLOAT32
    if output.shape:
        found["width"], expected["width"] = list(output.shape), [1, contract.embed_dim]
    _compare(path, found, expected)
    function = spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    return {"operations": len(operations), "kinds": sorted({operation.type for operation in operations})}


def _compare(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if found[key] != value:
            raise IntegrityError(
                f"{path.name}, read back from disk, has {key} {found[key]} where the contract asks for {value}; "
                "an app would feed it wrongly, so the export was stopped: report this with the student's name"
            )
