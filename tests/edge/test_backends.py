"""Backends on real artifacts: ONNX graphs written by hand, a `.pte` lowered to XNNPACK, a stand-in for Core ML."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.edge.backends import default_threads, open_backend, target_of
from pocketvlm.edge.backends import executorch as executorch_backend
from pocketvlm.edge.bundle import BundleVariant
from pocketvlm.edge.errors import IntegrityError, MissingExtraError, UnknownNameError, UsageError

RNG = np.random.default_rng(11)
PIXELS = RNG.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
IDS = RNG.integers(0, 10, (5, 6)).astype(np.int32)


def onnx_variant(batch: str = "dynamic", **files: str) -> BundleVariant:
    files = files or {"image": "onnx/image.onnx", "text": "onnx/text.onnx"}
    return BundleVariant("onnx", "fp32", files, batch)


def test_names() -> None:
    assert [target_of(name) for name in ("onnxruntime", "onnx", "executorch", "coreml")] == [
        "onnx",
        "onnx",
        "executorch",
        "coreml",
    ]
    with pytest.raises(UnknownNameError, match="onnxruntime"):
        target_of("onxruntime")


def test_onnxruntime_runs_both_towers(bundle_folder: Path, tools: Any) -> None:
    backend = open_backend("onnx", bundle_folder, onnx_variant(), 2)
    assert (backend.name, backend.threads) == ("onnxruntime", 2)
    image, text = backend.run_image(PIXELS), backend.run_text(IDS)
    assert image.dtype == text.dtype == np.float32
    assert np.allclose(image, tools.expected_image(PIXELS), atol=1e-6)
    assert np.allclose(text, tools.expected_text(IDS), atol=1e-6)


def test_threads_reach_the_session(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    seen: list[tuple[int, int]] = []
    real = onnxruntime.InferenceSession

    def spy(path: str, options: Any, **rest: Any) -> Any:
        seen.append((options.intra_op_num_threads, options.inter_op_num_threads))
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    open_backend("onnx", bundle_folder, onnx_variant(), 3)
    open_backend("onnx", bundle_folder, onnx_variant(), None)
    assert seen == [(3, 1)] * 2 + [(default_threads(), 1)] * 2
    assert 1 <= default_threads() <= 4
    with pytest.raises(UsageError, match="threads is 0"):
        open_backend("onnx", bundle_folder, onnx_variant(), 0)


def test_fixed_batch_of_one_is_looped(tmp_path: Path, tools: Any) -> None:
    folder = tools.write_bundle(tmp_path / "fixed", batch=1)
    backend = open_backend("onnx", folder, onnx_variant("fixed-1"), 1)
    assert np.allclose(backend.run_image(PIXELS), tools.expected_image(PIXELS), atol=1e-6)
    assert np.allclose(backend.run_text(IDS), tools.expected_text(IDS), atol=1e-6)


def test_a_missing_tower_is_named(bundle_folder: Path) -> None:
    backend = open_backend("onnx", bundle_folder, onnx_variant(image="onnx/image.onnx"), 1)
    with pytest.raises(UsageError, match="no text tower"):
        backend.run_text(IDS)


def test_onnx_files_that_cannot_be_right(bundle_folder: Path, tools: Any) -> None:
    tools.write_image_graph(bundle_folder / "onnx/renamed.onnx", name="input")
    (bundle_folder / "onnx/broken.onnx").write_bytes(b"not a model")
    for name, says in (("renamed", "takes"), ("broken", "cannot load"), ("text", "takes")):
        with pytest.raises(IntegrityError, match=f"{name}.onnx.*{says}|{says} {name}.onnx"):
            open_backend("onnx", bundle_folder, onnx_variant(image=f"onnx/{name}.onnx"), 1)


# --- ExecuTorch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`both.pte` with both methods at batch 1, `image.pte` with "forward" for up to 3 rows."""
    warnings.simplefilter("ignore")
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from torch import nn
    from torch.export import Dim, export

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8 * 8 * 3, 4)

        def forward(self, pixels: Any) -> Any:
            x = self.linear(pixels.float().flatten(1) / 255)
            return x / x.norm(dim=-1, keepdim=True)

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, ids: Any) -> Any:
            x = self.table(ids).mean(dim=1)
            return x / x.norm(dim=-1, keepdim=True)

    torch.manual_seed(0)
    image, text = Image().eval(), Text().eval()
    pixels, ids = torch.from_numpy(PIXELS), torch.from_numpy(IDS)
    folder = tmp_path_factory.mktemp("pte")
    programs = {
        "both.pte": {"encode_image": export(image, (pixels[:1],)), "encode_text": export(text, (ids[:1],))},
        "image.pte": {"forward": export(image, (pixels[:2],), dynamic_shapes=({0: Dim("b", min=1, max=3)},))},
        "other.pte": {"encode_sound": export(text, (ids[:1].long(),))},
    }
    for name, program in programs.items():
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
        with open(folder / name, "wb") as file:
            lowered.write_to_file(file)
    with torch.no_grad():
        np.save(folder / "image.npy", image(pixels).numpy())
        np.save(folder / "text.npy", text(ids).numpy())
    return folder


def pte_variant(batch: str, **files: str) -> BundleVariant:
    return BundleVariant("executorch", "fp32", files, batch)


def test_executorch_two_methods_of_one_file(pte_folder: Path) -> None:
    backend = open_backend("executorch", pte_folder, pte_variant("fixed-1", image="both.pte", text="both.pte"), None)
    image, text = backend.run_image(PIXELS), backend.run_text(IDS)
    assert image.dtype == text.dtype == np.float32
    assert np.allclose(image, np.load(pte_folder / "image.npy"), atol=1e-6)
    assert np.allclose(text, np.load(pte_folder / "text.npy"), atol=1e-6)


def test_executorch_forward_in_chunks_of_the_planned_batch(pte_folder: Path) -> None:
    backend = open_backend("executorch", pte_folder, pte_variant("dynamic", image="image.pte"), None)
    read_only = PIXELS.copy()
    read_only.setflags(write=False)
    first = backend.run_image(read_only)
    kept = first.copy()
    assert np.allclose(first, np.load(pte_folder / "image.npy"), atol=1e-6)
    backend.run_image(255 - PIXELS)
    assert np.array_equal(first, kept)  # results do not alias the runtime's memory
    with pytest.raises(UsageError, match="no text tower"):
        backend.run_text(IDS)


def test_executorch_from_several_threads(pte_folder: Path) -> None:
    backend = open_backend("executorch", pte_folder, pte_variant("fixed-1", image="both.pte", text="both.pte"), None)
    expected = np.load(pte_folder / "image.npy"), np.load(pte_folder / "text.npy")
    errors: list[float] = []

    def work() -> None:
        for _ in range(20):
            errors.append(float(np.abs(backend.run_image(PIXELS) - expected[0]).max()))
            errors.append(float(np.abs(backend.run_text(IDS) - expected[1]).max()))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(errors) == 160
    assert max(errors) < 1e-6


def test_executorch_files_that_cannot_be_right(pte_folder: Path) -> None:
    with pytest.raises(IntegrityError, match="encode_sound"):
        open_backend("executorch", pte_folder, pte_variant("fixed-1", image="other.pte"), None)
    with pytest.raises(IntegrityError, match=r"scalar type 0 and int32 \(3\)"):
        # a lone "forward" stands for whichever tower names it; its input type then tells text from image
        open_backend("executorch", pte_folder, pte_variant("fixed-1", text="image.pte"), None)
    (pte_folder / "broken.pte").write_bytes(b"not a program")
    with pytest.raises(IntegrityError, match=r"cannot load broken\.pte"):
        open_backend("executorch", pte_folder, pte_variant("fixed-1", image="broken.pte"), None)


def test_executorch_threads_are_set_before_the_first_method_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    library = types.SimpleNamespace(_threadpool_get_thread_count=lambda: 9, _unsafe_reset_threadpool=resets.append)
    monkeypatch.setattr(executorch_backend, "_pool_threads", None)
    assert executorch_backend.settle_threads(library, 3) == 3
    assert executorch_backend.settle_threads(library, 3) == 3
    assert executorch_backend.settle_threads(library, None) == 3
    with pytest.warns(RuntimeWarning, match="cannot change to 1"):
        assert executorch_backend.settle_threads(library, 1) == 3
    assert resets == [3]


@pytest.mark.parametrize("absent", ["torch", "executorch"])
def test_executorch_names_its_extra(absent: str, pte_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == absent:
            monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            if name.split(".")[0] == absent:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[executorch\]"):
        open_backend("executorch", pte_folder, pte_variant("fixed-1", image="both.pte"), None)


# --- Core ML ------------------------------------------------------------------------------------------------


def test_coreml_elsewhere_than_on_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    with pytest.raises(UsageError, match="runs on macOS and iOS only"):
        open_backend("coreml", tmp_path, BundleVariant("coreml", "fp16", {"image": "image.mlpackage"}), None)


def test_coreml_feeds_one_row_at_a_time_in_the_declared_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any, tuple[int, ...]]] = []

    class MLModel:
        def __init__(self, path: str) -> None:
            self.tower = Path(path).stem

        def get_spec(self) -> Any:
            name, code = {"image": ("pixels", 65568), "text": ("ids", 131104)}[self.tower]
            kind = types.SimpleNamespace(
                WhichOneof=lambda _: "multiArrayType", multiArrayType=types.SimpleNamespace(dataType=code)
            )
            return types.SimpleNamespace(
                description=types.SimpleNamespace(
                    input=[types.SimpleNamespace(name=name, type=kind)],
                    output=[types.SimpleNamespace(name="embedding")],
                )
            )

        def predict(self, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            ((name, value),) = features.items()
            calls.append((name, value.dtype, value.shape))
            return {"embedding": value.reshape(1, -1)[:, :4]}

    fake = types.ModuleType("coremltools")
    fake.models = types.SimpleNamespace(MLModel=MLModel)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    files = {"image": "image.mlpackage", "text": "text.mlpackage"}
    backend = open_backend("coreml", tmp_path, BundleVariant("coreml", "fp16", files, "fixed-1"), None)
    assert np.array_equal(backend.run_image(PIXELS[:2]), PIXELS[:2].reshape(2, -1)[:, :4].astype(np.float32))
    assert np.array_equal(backend.run_text(IDS[:1]), IDS[:1, :4].astype(np.float32))
    assert calls == [("pixels", np.float32, (1, 8, 8, 3))] * 2 + [("ids", np.int32, (1, 6))]
