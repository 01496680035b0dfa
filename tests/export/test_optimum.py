"""What Hugging Face optimum exported or quantized, read into a bundle, embedded, benched and checked for parity."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pocketvlm.cli import main
from pocketvlm.edge.bundle import Bundle
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.export.bench import bench
from pocketvlm.export.bundle import export_bundle
from pocketvlm.export.optimum_files import OptimumFiles, precision_of
from pocketvlm.export.parity import check_parity
from pocketvlm.export.reference import record_reference


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_for_optimum", Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


foreign, toys = _load("test_foreign"), _load("toy_parity")
TEXTS = ["a red circle", "two dogs!", "naïve café", "the quick brown fox " * 12]


def exported(model: Path, out: Path) -> Path:
    from optimum.exporters.onnx import main_export

    main_export(str(model), output=out, task="zero-shot-image-classification", opset=18, device="cpu")
    return out


def quantize(folder: Path, *, static: bool) -> None:
    """By optimum's defaults: one scale for a whole tensor."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig, CalibrationConfig, CalibrationMethod

    quantizer = ORTQuantizer.from_pretrained(folder, file_name="model.onnx")
    config = AutoQuantizationConfig.avx512_vnni(is_static=static, per_channel=False)
    ranges = None
    if static:
        rng = np.random.default_rng(0)
        rows = [
            {
                "input_ids": rng.integers(3, 200, foreign.LENGTH).tolist(),
                "attention_mask": [1] * foreign.LENGTH,
                "pixel_values": rng.normal(size=(3, foreign.SIZE, foreign.SIZE)).astype(np.float32).tolist(),
            }
            for _ in range(8)
        ]
        # rows in a list have all that is asked of a data set; AutoCalibrationConfig would ask for its name
        chosen = CalibrationConfig("made-up", "", "", len(rows), CalibrationMethod.MinMax)
        data: Any = rows
        # by default it leaves this file where the test was started
        beside = str(folder.parent / "augmented_model.onnx")
        operators = config.operators_to_quantize
        ranges = quantizer.fit(data, chosen, beside, operators_to_quantize=operators)
    suffix = "static" if static else "dynamic"
    quantizer.quantize(
        config, folder, file_suffix=suffix, calibration_tensors_range=ranges, use_external_data_format=False
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model, and optimum's files: float32, dynamic and static int8."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("clip")
    (root / "model").mkdir()
    upstream = foreign.save_hf(root / "model", "hf_clip")
    files = exported(root / "model", root / "onnx")
    quantize(files, static=False)
    quantize(files, static=True)
    return upstream, files


@pytest.fixture(scope="module")
def bundle(clip: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    upstream, files = clip
    return export_bundle(upstream.spec, tmp_path_factory.mktemp("bundle") / "b", [OptimumFiles(files)])


@pytest.fixture(scope="module")
def recorded(clip: tuple[Any, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "reference"
    record_reference(clip[0].spec, folder, data=toys.toy_data(), device="cpu")
    return folder


def test_the_bundle_embeds_as_upstream_does(bundle: Path, clip: tuple[Any, Path]) -> None:
    opened, upstream = Bundle.load(bundle), clip[0]
    assert [(v.target, v.precision) for v in opened.variants] == [
        ("onnx", "fp32"),
        ("onnx", "w8a8-dynamic"),
        ("onnx", "w8a8-static"),
    ]
    model = EdgeModel.load(bundle)
    pixels = np.random.default_rng(0).integers(0, 256, (3, foreign.SIZE, foreign.SIZE, 3), dtype=np.uint8)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (upstream.mean, upstream.std))
    with torch.no_grad():
        image, text = upstream.image((planes - mean) / std).numpy(), upstream.text(TEXTS).numpy()
    np.testing.assert_allclose(model.embed_pixels(pixels), image, atol=1e-5)
    np.testing.assert_allclose(model.embed_text(TEXTS), text, atol=1e-5)
    assert opened.variant("onnx", "fp32").notes["made_by"] == "optimum"
    properties = {p.key: p.value for p in onnx.load(str(bundle / "onnx/image-fp32.onnx")).metadata_props}
    assert properties["pocketvlm.contract_sha256"] == opened.contract.digest()


def test_parity_takes_it_and_believes_the_tool_about_its_scales(bundle: Path, recorded: Path, tmp_path: Path) -> None:
    report = check_parity(bundle, recorded)
    exact = report.variant("onnx", "fp32")
    assert [s.stage for s in exact.stages if s.status == "fail"] == []
    for precision in ("w8a8-dynamic", "w8a8-static"):
        assert Bundle.load(bundle).variant("onnx", precision).notes["weights"] == "per-tensor"
        stage = next(s for s in report.variant("onnx", precision).stages if s.stage == "S3")
        assert "per_tensor_weights" not in {check.metric for check in stage.checks}
        assert stage.details["image, scales"]["per tensor"] > 0
        assert "one_minus_cosine_mean" in {check.metric for check in stage.checks}, "the answers are judged"
    # the same files as if they were ours are blamed for it
    other = Path(shutil.copytree(bundle, tmp_path / "ours"))
    raw = json.loads((other / "bundle.json").read_text())
    for variant in raw["variants"]:
        variant["notes"].pop("weights", None)
    (other / "bundle.json").write_text(json.dumps(raw))
    blamed = check_parity(other, recorded, targets=["onnx:w8a8-dynamic"]).variant("onnx", "w8a8-dynamic")
    stage = next(s for s in blamed.stages if s.stage == "S3")
    assert "weights with one scale for the whole tensor" in stage.message


def test_bench_takes_it(bundle: Path) -> None:
    report = bench([bundle], precisions=["fp32", "w8a8-dynamic"], rounds=1, runs=2)
    assert len(report.rows) == 4


def test_siglip_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    upstream = foreign.save_hf(tmp_path / "model", "hf_siglip")
    files = exported(tmp_path / "model", tmp_path / "onnx")
    main(["export", "--from", upstream.spec, "--optimum", str(files), "--out", str(tmp_path / "b")])
    assert "onnx/text-fp32.onnx" in capsys.readouterr().out
    with torch.no_grad():
        np.testing.assert_allclose(EdgeModel.load(tmp_path / "b").embed_text(TEXTS), upstream.text(TEXTS), atol=1e-5)
    with pytest.raises(SystemExit):
        main(["export", "--from", upstream.spec, "--optimum", str(files), "--precisions", "int8", "--out", "x"])
    assert "takes files as they are" in capsys.readouterr().err
    # files of another model of the same shape
    with torch.random.fork_rng():
        torch.manual_seed(7)
        import transformers

        model = transformers.SiglipModel.from_pretrained(tmp_path / "model")
        for parameter in model.parameters():
            if parameter.ndim:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / "model")
    with pytest.raises(IntegrityError, match="is allowed; no bundle was written"):
        export_bundle(upstream.spec, tmp_path / "c", [OptimumFiles(files)])


def test_folders_that_hold_no_towers_or_too_many(clip: tuple[Any, Path], tmp_path: Path) -> None:
    upstream, files = clip
    with pytest.raises(UsageError, match=r"0 \.onnx files"):
        OptimumFiles(tmp_path)
    model = onnx.load(str(files / "model.onnx"))
    onnx.save(model, str(tmp_path / "a.onnx"))
    onnx.save(model, str(tmp_path / "b.onnx"))
    with pytest.raises(UsageError, match=r"a\.onnx and b\.onnx are both fp32"):
        OptimumFiles(tmp_path)
    (tmp_path / "b.onnx").unlink()
    kept = [output for output in model.graph.output if output.name == "text_embeds"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(UsageError, match="lack the image tower"):
        OptimumFiles(tmp_path)
    model = onnx.load(str(files / "model.onnx"))
    shape = next(entry for entry in model.graph.input if entry.name == "pixel_values").type.tensor_type.shape
    shape.dim[0].dim_value = 2
    onnx.save(model, str(tmp_path / "a.onnx"))
    with pytest.raises(IntegrityError, match=r"fixed shape \[2, 0, 0, 0\]"):
        export_bundle(upstream.spec, tmp_path / "out", [OptimumFiles(tmp_path)])


def test_precision_is_read_from_the_operators(clip: tuple[Any, Path]) -> None:
    found = {path.name: precision_of(onnx.load(str(path))) for path in clip[1].glob("*.onnx")}
    assert found == {
        "model.onnx": "fp32",
        "model_dynamic.onnx": "w8a8-dynamic",
        "model_static.onnx": "w8a8-static",
    }
