"""Core ML packages of a generative student: converted, read back, refused where they cannot run, and the step without
states computed operation by operation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch

from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.edge.vlm_bundle import VlmBundle
from pocketvlm.edge.vlm_onnxruntime import cache_names
from pocketvlm.export.mil.program import MilProgram, load_package
from pocketvlm.export.targets.onnx import quiet
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.export.vlm.coreml_graph import check_package, convert
from pocketvlm.export.vlm.graphs import checked_step, empty_caches
from pocketvlm.students.vlm import save_vlm

_spec = importlib.util.spec_from_file_location("toy_vlm", Path(__file__).with_name("toy_vlm.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


def test_packages_take_give_and_keep_what_they_should(tmp_path: Path) -> None:
    save_vlm(toy.toy_vlm(layers=1), tmp_path / "student")
    out = export_vlm(tmp_path / "student", tmp_path / "bundle", ["coreml"], ["w8"])
    variant = VlmBundle.load(out).variant("coreml")
    assert set(variant.files) == {"picture", "words", "decoder"}
    assert all(count > 0 for count in variant.notes["operations"].values())
    decoder = out / variant.files["decoder"]
    check_package(decoder, ["embeddings", "positions"], ["logits"], ["key_0", "value_0"])
    with pytest.raises(IntegrityError, match=r"has states \['key_0', 'value_0'\] and \[\] is expected"):
        check_package(decoder, ["embeddings", "positions"], ["logits"], [])
    _, program = load_package(decoder)
    kinds = {operation.op_type for operation in program.functions["main"].operations}
    assert {"read_state", "coreml_update_state"} <= kinds
    with pytest.raises(UsageError, match="coreml variant was asked for and only onnx, executorch"):
        EdgeVLM.load(out)


def test_the_step_without_states_computes_what_torch_does(tmp_path: Path) -> None:
    model = toy.toy_vlm(layers=1)
    step, names = checked_step(model, products=True), cache_names(1)
    length, width = model.prefix + 3, model.config.decoder.width
    free = ct.RangeDim(1, 48, default=length)
    shape = tuple(empty_caches(model.decoder)[0].shape)
    inputs = [
        ct.TensorType("embeddings", shape=(free, width), dtype=np.float32),
        ct.TensorType("positions", shape=(free,), dtype=np.int32),
        *(ct.TensorType(name, shape=shape, dtype=np.float32) for name in names),
    ]
    outputs = ["hidden", *(f"new_{name}" for name in names)]
    x = torch.randn(length + 1, width, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length + 1, dtype=torch.int32)
    caches = empty_caches(model.decoder)
    with quiet():
        converted = convert(step, (x[:length], positions[:length], *caches), inputs, outputs, [], half=False)
        converted.save(str(tmp_path / "step.mlpackage"))
    _, program = load_package(tmp_path / "step.mlpackage")
    read = MilProgram(program.functions["main"])
    for part in (slice(0, length), slice(length, length + 1)):  # a prompt, and a token after it
        with torch.no_grad():
            expected = step(x[part], positions[part], *caches)
        found = read.run({"embeddings": x[part], "positions": positions[part], **dict(zip(names, caches))})
        for name, value in zip(outputs, expected):
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        caches = list(expected[1:])
