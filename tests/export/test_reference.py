"""What a recording holds, that it repeats, that it is read back only when whole, and that bad input is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm.cli import main
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.export import numerics
from pocketvlm.export.cases import golden_texts, nasty_images
from pocketvlm.export.numerics import EmulatedTF32, reference_device, round_mantissa, strict_numerics, tf32
from pocketvlm.export.reference import load_reference, record_reference, show
from pocketvlm.export.reference_check import replay
from pocketvlm.export.reference_run import sha256
from pocketvlm.export.reference_show import describe
from pocketvlm.export.reference_write import tap_modules
from pocketvlm.students import save_student

_spec = importlib.util.spec_from_file_location("toy_parity", Path(__file__).with_name("toy_parity.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)


@pytest.fixture(scope="module")
def recorded(student: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "run"
    record_reference(student, folder, data=toy.toy_data(), device="cpu", command="the tests")
    return folder


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def _resign(folder: Path, name: str) -> None:
    """Make the manifest vouch for a changed file, so that only the check under test can notice."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / name).read_bytes()
    manifest["files"][name] = {"sha256": sha256(data), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _rewrite(folder: Path, name: str, **changed: np.ndarray) -> None:
    with np.load(folder / name) as arrays:
        values = {key: arrays[key] for key in arrays.files} | changed
    np.savez_compressed(folder / name, **values)
    _resign(folder, name)


# --- content ------------------------------------------------------------------------------------------------------


def test_outputs_are_the_eager_students_in_float64(student: Any, recorded: Path) -> None:
    run = load_reference(recorded)
    model = toy.toy_student().double()
    with torch.no_grad():
        image = model.encode_image(torch.from_numpy(run.arrays["pixels"])).embedding.numpy()
        text = model.encode_text(torch.from_numpy(run.arrays["ids"])).embedding.numpy()
    np.testing.assert_allclose(run.arrays["image_raw"], image, rtol=0, atol=1e-12)
    np.testing.assert_allclose(run.arrays["text_raw"], text, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(run.arrays["image"], axis=1), 1, atol=1e-12)
    scale = student.contract.logit_scale
    np.testing.assert_allclose(run.arrays["logits"], scale * run.arrays["image"] @ run.arrays["text"].T, atol=1e-9)
    assert run.manifest["numerics"]["dtype"] == "float64"
    # the caller's student is left as it was
    assert next(student.parameters()).dtype == torch.float32


def test_cases_are_real_and_nasty_and_replayable(recorded: Path) -> None:
    run = load_reference(recorded)
    assert run.contract.image is not None
    names = {record.name for record in run.images}
    assert {"real-00", "exif-6", "rgba", "cmyk", "gray-16-bit", "1xN", "very-large", "truncated"} <= names
    assert {record.error for record in run.images} >= {None, "truncated-image", "not-an-image", "empty-image"}
    assert {record.error for record in run.texts} == {None, "empty-text", "not-a-string"}
    for record in run.images:
        if record.row is not None:
            made = load_image(run.image_bytes(record), run.contract.image)
            assert sha256(made.tobytes()) == record.pixels_sha256


def test_task_holds_pixels_positives_and_unit_embeddings(recorded: Path) -> None:
    task = load_reference(recorded).task
    source = {sample.uid: sample for sample in toy.toy_data().samples}
    spec = load_reference(recorded).contract.image
    assert spec is not None
    for row, uid in enumerate(task.uids):
        np.testing.assert_array_equal(task.pixels[row], load_image(source[uid].image.read(), spec))
        assert [task.texts[i] for i in np.flatnonzero(task.positives[row])] == [source[uid].captions[0].text]
        assert task.labels[task.label_of[row]] == source[uid].label
    assert len(task.prompts) == len(task.labels) == len(set(task.labels))
    np.testing.assert_allclose(np.linalg.norm(task.image, axis=1), 1, atol=1e-9)


def test_taps_cover_every_block_and_case(student: Any, recorded: Path) -> None:
    run = load_reference(recorded)
    names, values = run.taps["text"]
    assert names == ["token", "blocks.0", "norm", "projection"]
    assert values.shape == (len(run.arrays["ids"]), 4, 7)
    # the last tap is the raw embedding, whose statistics are known
    raw = run.arrays["text_raw"]
    np.testing.assert_allclose(values[:, -1, 0], raw.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(values[:, -1, 3], np.sqrt((raw**2).mean(axis=1)), atol=1e-12)
    assert run.taps["image"][0][-1] == "projection"
    assert len(tap_modules(student.image_tower)) >= len(run.taps["image"][0]) > 5


def test_noise_floor_orders_the_precisions(recorded: Path) -> None:
    noise = load_reference(recorded).noise
    worst = {key: entry["image"]["one_minus_cosine_max"] for key, entry in noise.items() if "image" in entry}
    assert worst["rerun"] == 0
    assert worst["batch"] < 1e-11
    assert 0 < worst["float32"] < 1e-10 < worst["tf32"] < worst["bfloat16"] < 1e-2
    assert noise["float32"]["scores"]["score_max_abs"] < 1e-5
    assert noise["tf32"]["made"] == "emulated"


def test_recording_twice_gives_the_same_files(student: Any, recorded: Path, tmp_path: Path) -> None:
    again = record_reference(student, tmp_path / "again", data=toy.toy_data(), device="cpu").manifest["files"]
    first = load_reference(recorded).manifest["files"]
    assert again == first


def test_manifest_names_no_machine_and_is_small(recorded: Path) -> None:
    run = load_reference(recorded)
    text = (recorded / "manifest.json").read_text()
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text
    assert sum(entry["bytes"] for entry in run.manifest["files"].values()) < 1_000_000
    assert run.manifest["environment"]["cpu"]["model"]
    assert run.manifest["numerics"]["tf32_matmul"] is False


def test_show_and_describe(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = load_reference(recorded)
    show(run)
    assert run.contract.model_id in capsys.readouterr().out.replace("\n", "")
    assert math.isfinite(describe(run)["fp16_headroom"]["image"]["factor"])


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_tf32_rounding_is_to_ten_bits_ties_to_even() -> None:
    x = torch.tensor([1.0, 1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-10), 3.14159265, float("inf")])
    found = round_mantissa(x)
    assert found[:4].tolist() == [1.0, 1.0, 1 + 2**-9, -(1 + 2**-10)]
    assert abs(found[4] - x[4]) <= 2**-10
    assert torch.isinf(found[5])


def test_tf32_emulation_reaches_inside_linear_layers() -> None:
    layer, x = torch.nn.Linear(64, 64), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = round_mantissa(x) @ round_mantissa(layer.weight).T + layer.bias
        with EmulatedTF32():
            found = layer(x)
        assert not torch.equal(found, layer(x))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_strict_flags_are_set_and_put_back() -> None:
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32)
    with strict_numerics(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.is_inference_mode_enabled()
    assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.allow_tf32) == before


def test_tf32_by_hardware_where_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    for capability, wanted in (((9, 0), "hardware"), ((7, 5), "emulated")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        made, inside = tf32(torch.device("cuda"))
        assert made == wanted
        with inside():
            found = matmul.allow_tf32, cudnn.allow_tf32
        assert found == ((True, True) if made == "hardware" else before)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == before
    assert tf32(torch.device("cpu"))[0] == "emulated"


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Tue Feb 18 10:00:00 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (root@builder)",
    ],
)
def test_the_driver_is_found_without_its_tools(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_run", lambda *command: None)
    monkeypatch.setattr(Path, "read_text", lambda self: line + "\n")
    assert numerics._driver() == "570.124.06"

    def absent(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert numerics._driver() is None


def test_only_reproducible_devices() -> None:
    with pytest.raises(UsageError, match="deterministic full precision"):
        reference_device("mps")


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_full_folder_is_kept_unless_asked(student: Any, recorded: Path, tmp_path: Path) -> None:
    before = (recorded / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        record_reference(student, recorded, data=toy.toy_data())
    assert (recorded / "manifest.json").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a reference run"):
        record_reference(student, tmp_path, data=toy.toy_data(), overwrite=True)
    assert (tmp_path / "thesis.txt").exists()


def test_too_few_captions_are_refused_and_leave_nothing(student: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="10 distinct captions"):
        record_reference(student, tmp_path / "run", data=toy.toy_data(10))
    assert not list(tmp_path.iterdir())


def test_data_without_captions_is_refused() -> None:
    with pytest.raises(UsageError, match="no caption"):
        golden_texts([], count=4, context_length=12)


def test_a_diverged_student_is_refused(tmp_path: Path) -> None:
    broken = toy.toy_student()
    with torch.no_grad():
        list(broken.text_tower.parameters())[-1].view(-1)[0] = float("nan")
    with pytest.raises(IntegrityError, match="NaN or Inf"):
        record_reference(broken, tmp_path / "run", data=toy.toy_data())
    assert not list(tmp_path.iterdir())


def test_generated_pictures_are_the_same_every_time() -> None:
    assert [case.data for case in nasty_images(3)] == [case.data for case in nasty_images(3)]


# --- fails closed -------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was proved"):
        load_reference(tmp_path)


@pytest.mark.parametrize("name", ["noise.json", "cases/arrays.npz", "taps/statistics.npz", "task/pixels-000.webp"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        load_reference(copy)


def test_a_changed_file_is_named(copy: Path) -> None:
    path = copy / "cases/arrays.npz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"cases/arrays.npz .* changed after recording"):
        load_reference(copy)


def test_a_file_left_out_of_the_manifest_is_missed(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["taps/taps.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match=r"does not list taps/taps\.json"):
        load_reference(copy)


def test_an_empty_case_set_is_no_pass(copy: Path) -> None:
    (copy / "cases/cases.json").write_text(json.dumps({"images": [], "texts": []}))
    _resign(copy, "cases/cases.json")
    with pytest.raises(IntegrityError, match="no image case"):
        load_reference(copy)


def test_a_missing_tap_is_no_pass(copy: Path) -> None:
    run = load_reference(copy)
    _rewrite(copy, "taps/statistics.npz", image=run.taps["image"][1][:, 1:])
    with pytest.raises(IntegrityError, match="misses image taps"):
        load_reference(copy)


@pytest.mark.parametrize(("name", "key"), [("cases/arrays.npz", "text"), ("taps/statistics.npz", "image")])
def test_a_non_finite_value_is_no_pass(copy: Path, name: str, key: str) -> None:
    with np.load(copy / name) as arrays:
        value = arrays[key]
    value.flat[5] = np.nan
    _rewrite(copy, name, **{key: value})
    with pytest.raises(IntegrityError, match="non-finite"):
        load_reference(copy)


def test_a_newer_schema_asks_for_an_upgrade(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["schema_version"] = "1.9"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VersionError, match="upgrade"):
        load_reference(copy)


def test_a_recording_is_replayed_from_encoded_pictures_and_strings_on(student: Any, recorded: Path, copy: Path) -> None:
    found = replay(load_reference(recorded), student, device="cpu")
    assert found.same
    assert found.answers["image"]["one_minus_cosine_max"] < 1e-12
    assert found.answers["text"]["rows"] == len(load_reference(recorded).arrays["ids"]) + len(
        load_reference(recorded).task.ids
    )
    # a picture whose recorded pixels are not those of its file
    arrays = {"pixels": load_reference(copy).arrays["pixels"].copy()}
    arrays["pixels"][0] = 255 - arrays["pixels"][0]
    _rewrite(copy, "cases/arrays.npz", **arrays)
    _resign(copy, "cases/arrays.npz")
    found = replay(load_reference(copy), student, device="cpu")
    assert not found.same
    assert found.inputs[0].startswith("1 pictures have other pixels here")


def test_a_replay_says_that_the_model_is_another(recorded: Path) -> None:
    found = replay(load_reference(recorded), toy.toy_student(seed=1), device="cpu")
    assert not found.same
    assert found.model[0].startswith("sha256 of the weights")
    assert found.answers["image"]["one_minus_cosine_max"] > 0.01
    assert found.lines()[-1] == "DIFFERENT"


def test_the_command_checks_and_replays(
    student: Any, recorded: Path, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reference", "check", str(recorded)])
    assert capsys.readouterr().out.startswith("whole and unchanged")
    save_student(student, tmp_path / "student")
    with pytest.raises(SystemExit) as left:
        main(["reference", "check", str(recorded), "--model", str(tmp_path / "student"), "--device", "cpu"])
    assert left.value.code == 0
    (copy / "noise.json").write_text("{}")
    with pytest.raises(SystemExit) as left:
        main(["reference", "check", str(copy)])
    assert left.value.code == 2
    assert "was changed after recording" in capsys.readouterr().err.replace("\n", " ")
