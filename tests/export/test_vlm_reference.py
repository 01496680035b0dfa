"""Recorded runs of generative students: what is kept, what it proves without torch, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pocketvlm import cli
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.export.reference import load_reference
from pocketvlm.export.reference_run import sha256
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.export.vlm.parity import check_vlm_parity, compare, write_vlm_summary
from pocketvlm.export.vlm.reference import load_vlm_reference
from pocketvlm.export.vlm.reference_write import record_vlm_reference
from pocketvlm.students.vlm import load_vlm, save_vlm

_spec = importlib.util.spec_from_file_location("toy_vlm", Path(__file__).with_name("toy_vlm.py"))
assert _spec
assert _spec.loader
toy: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toy)

SMALL = {"prompts": 3, "questions": 6, "limit": 12}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(toy.toy_vlm(layers=1), tmp_path_factory.mktemp("vlm") / "student")


@pytest.fixture(scope="module")
def bundle(saved: Path) -> Path:
    return export_vlm(saved, saved.parent / "bundle", ["onnx"])


@pytest.fixture(scope="module")
def recorded(saved: Path) -> Path:
    """Of three cases only the first keeps every logit."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pocketvlm.export.vlm.reference_write.WHOLE_BYTES", 1)
        record_vlm_reference(saved, saved.parent / "reference", device="cpu", **SMALL)  # type: ignore[arg-type]
    return saved.parent / "reference"


def test_a_recording_holds_the_students_answers(recorded: Path, saved: Path) -> None:
    found, model = load_vlm_reference(recorded), load_vlm(saved)
    wide = load_vlm(saved).double()
    assert [case.logits is not None for case in found.cases] == [True, False, False]
    assert len(found.task) == 6
    rows = json.loads((recorded / "cases.json").read_text())
    for case, row in zip(found.cases, rows, strict=True):
        pixels = torch.from_numpy(case.pixels)[None]
        assert case.text == model.generate(pixels, [case.prompt], max_new_tokens=row["longest"])[0]
        assert case.ids == model.prompt_ids(case.prompt)
        with torch.no_grad():
            last, *_ = wide.prefill(
                wide.show(wide.look(pixels)), torch.tensor([case.ids]), torch.tensor([len(case.ids)])
            )
            first = wide.decoder.logits(last)[0]
        best = first.sort(descending=True)
        assert case.best[0].tolist() == best.indices[:2].tolist()
        np.testing.assert_allclose(case.best_logits[0], best.values[:2].numpy(), rtol=1e-12)
        assert case.margins[0] == pytest.approx(float(best.values[0] - best.values[1]))
        assert case.log_sum[0] == pytest.approx(float(first.logsumexp(0)), rel=1e-12)
        if case.logits is not None:
            np.testing.assert_allclose(case.logits[0], first.numpy(), rtol=1e-6)
    for question in found.task:
        said = model.generate(torch.from_numpy(question.pixels)[None], [question.text], max_new_tokens=question.longest)
        assert question.right == (said[0].strip().lower() == question.answer.strip().lower())


def test_the_manifest_and_the_noise_say_how_it_was_made(recorded: Path, saved: Path) -> None:
    manifest, noise = (json.loads((recorded / name).read_text()) for name in ("manifest.json", "noise.json"))
    assert manifest["kind"] == "vlm"
    assert manifest["sha256"]["vlm.json"] == sha256((saved / "vlm.json").read_bytes())
    assert {"tokenizer.json", "weights-1.safetensors"} <= set(manifest["sha256"])
    numerics = manifest["numerics"]
    assert (numerics["dtype"], numerics["deterministic_algorithms"], numerics["batch_size"]) == ("float64", True, 32)
    assert not any(numerics[key] for key in ("tf32_matmul", "tf32_cudnn", "cudnn_benchmark", "autocast"))
    assert manifest["environment"]["device"] == "cpu"
    assert manifest["counts"]["questions"] == 6
    assert manifest["data"] == {"pool": "test", "fold": 0, "limit": 12}
    assert noise["rerun"]["max_abs"] == 0
    assert 0 < noise["float32"]["max_abs"] < 1e-3 < noise["tf32"]["max_abs"] < 1
    assert noise["tf32"]["made"] == "emulated"
    assert [noise[key]["same_answers"] for key in ("float32", "rerun", "batch")] == [3, 3, 3]


def test_files_are_held_to_a_recording_as_to_the_student(bundle: Path, recorded: Path, saved: Path) -> None:
    found = check_vlm_parity(bundle, reference=recorded, precisions=["fp32"], threads=1)
    live = check_vlm_parity(bundle, saved, precisions=["fp32"], threads=1, **SMALL)  # type: ignore[arg-type]
    assert (found.status, live.status) == ("pass", "pass")
    one, two = found.variants[0], live.variants[0]
    assert (one.identical, one.prompts, one.questions) == (3, 3, 6)
    assert (one.steps, one.accuracy, one.lost) == (two.steps, two.accuracy, two.lost)
    assert 0 < one.kl_steps < two.kl_steps == two.steps
    # the two best logits and the log-sum-exp are some of all logits
    assert 0 < one.max_abs <= two.max_abs * (1 + 1e-3)
    assert found.reference["recorded"]
    assert found.reference["dtype"] == "float64"
    assert not live.reference["recorded"]


def test_a_recording_is_enough_without_torch(bundle: Path, recorded: Path) -> None:
    code = (
        "import sys; from pocketvlm.export.vlm.parity import check_vlm_parity; "
        f"found = check_vlm_parity({str(bundle)!r}, reference={str(recorded)!r}, precisions=['fp32'], threads=1); "
        "print(found.status, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "pass False", done.stdout + done.stderr


def _copy(recorded: Path, folder: Path) -> Path:
    return Path(shutil.copytree(recorded, folder / "copy"))


def _rewrite(folder: Path, name: str, data: bytes) -> None:
    """A file that the manifest vouches for all the same."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": sha256(data), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["cases.json", "logits.npz", "task.json", "noise.json", "pixels/pixels-000.webp"])
def test_a_damaged_or_missing_file_is_refused(name: str, recorded: Path, tmp_path: Path) -> None:
    folder = _copy(recorded, tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError, match="was changed after recording"):
        load_vlm_reference(folder)
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match="lacks"):
        load_vlm_reference(folder)


def test_what_cannot_prove_anything_is_refused(recorded: Path, tmp_path: Path) -> None:
    cases = json.loads((recorded / "cases.json").read_text())
    plain = [{**case, "whole": False} for case in cases]
    swapped = [{**cases[0], "said": [cases[0]["said"][0] + 1, *cases[0]["said"][1:]]}, *cases[1:]]
    arrays = dict(np.load(recorded / "logits.npz"))
    broken = {**arrays, "best_logits": arrays["best_logits"] * np.nan}
    for number, (name, value, said) in enumerate(
        [
            ("cases.json", [], "incomplete|no case with its logits"),
            ("cases.json", plain, "no case with its logits"),
            ("cases.json", swapped, "did not say what its logits say"),
            ("cases.json", cases[:1] * 9, "lacks a logit"),
            ("cases.json", [{}], "incomplete"),
            ("noise.json", {"float32": {"max_abs": float("nan"), "kl_mean": 0.0}}, "noise floor that is not finite"),
            ("noise.json", {}, "incomplete"),
            ("logits.npz", broken, "is not finite"),
        ]
    ):
        folder = _copy(recorded, tmp_path / str(number))
        if name.endswith(".npz"):
            np.savez(folder / name, **value)  # type: ignore[arg-type]
            data = (folder / name).read_bytes()
        else:
            data = json.dumps(value).encode()
        _rewrite(folder, name, data)
        with pytest.raises(IntegrityError, match=said):
            load_vlm_reference(folder)


def test_a_recording_of_something_else_is_refused(bundle: Path, recorded: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no manifest\.json.*vlm reference record"):
        check_vlm_parity(bundle, reference=tmp_path)
    for given in ({}, {"model": saved, "reference": recorded}):
        with pytest.raises(UsageError, match="give --model FOLDER or --reference FOLDER"):
            check_vlm_parity(bundle, **given)  # type: ignore[arg-type]
    other = save_vlm(toy.toy_vlm(layers=1, seed=9), tmp_path / "other")
    record_vlm_reference(other, tmp_path / "reference", device="cpu", prompts=1, questions=0, limit=12)
    with pytest.raises(IntegrityError, match="two models"):
        check_vlm_parity(bundle, reference=tmp_path / "reference")
    embeddings = Path(__file__).parent.parent / "fixtures" / "cuda_reference" / "run"
    with pytest.raises(UsageError, match="of kind 'embeddings' and 'vlm' is expected"):
        load_vlm_reference(embeddings)
    with pytest.raises(UsageError, match="of kind 'vlm' and 'embeddings' is expected"):
        load_reference(recorded)
    manifest = json.loads((recorded / "manifest.json").read_text())
    newer = _copy(recorded, tmp_path)
    (newer / "manifest.json").write_text(json.dumps({**manifest, "schema_version": "2.0"}))
    with pytest.raises(VersionError, match="upgrade pocketvlm"):
        load_vlm_reference(newer)


def test_a_recording_is_replaced_only_on_purpose(recorded: Path, saved: Path, tmp_path: Path) -> None:
    for prompts, out, said in ((1, recorded, "is not empty"), (0, tmp_path / "new", "nothing would be compared")):
        with pytest.raises(UsageError, match=said):
            record_vlm_reference(saved, out, device="cpu", prompts=prompts)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="is not a reference run"):
        record_vlm_reference(saved, tmp_path / "mine", device="cpu", overwrite=True)
    broken = toy.toy_vlm(layers=1)
    with torch.no_grad():
        broken.decoder.norm.weight.fill_(float("inf"))
    save_vlm(broken, tmp_path / "broken")
    with pytest.raises(IntegrityError, match="NaN or infinite"):
        record_vlm_reference(tmp_path / "broken", tmp_path / "new", device="cpu", **SMALL)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*.part"))


def test_record_and_parity_by_the_command(
    bundle: Path,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "reference"
    small = ["--prompts", "2", "--questions", "4", "--limit", "12"]
    record = ["vlm", "reference", "record", str(saved), "--out", str(out), "--device", "cpu", *small]
    monkeypatch.setattr("sys.argv", ["pocketvlm", *record])
    cli.main(record)
    said = capsys.readouterr().out
    assert "float64 on" in said
    assert "2 prompts, " in said
    common = ["vlm", "parity", str(bundle), "--reference", str(out), "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--precisions", "fp32", "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "pass"
    assert found["reference"]["sha256"] == sha256((out / "manifest.json").read_bytes())
    assert json.loads((out / "manifest.json").read_text())["command"].startswith(
        "pocketvlm vlm reference record student --out reference"
    )
    for arguments, sentence in [
        (["--model", str(saved)], "both of a model and a reference"),
        (["--prompts", "5"], "--reference was given with --prompts"),
    ]:
        with pytest.raises(SystemExit) as ended:
            cli.main([*common, *arguments])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err


def test_the_verdict_travels_with_the_bundle(
    bundle: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    common = ["vlm", "parity", str(copy), "--reference", str(recorded), "--threads", "1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--into-bundle"])
    # six questions show nothing about int8 and w4, and nothing against them
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "onnx int8 undecided: loss" in said
    assert "fewer than the 268 questions that this budget needs" in said
    edge = EdgeVLM.load(copy, precision="fp32", threads=1)
    assert edge.parity is not None
    assert (edge.parity["status"], edge.parity["identical"], edge.parity["prompts"]) == ("pass", 3, 3)
    assert edge.parity["reference"]["sha256"] == sha256((recorded / "manifest.json").read_bytes())
    assert [row["status"] for row in edge.bundle.parity] == ["pass", "undecided", "undecided"]
    Image.fromarray(toy.picture(1)).save(tmp_path / "a.png")
    asked = ["vlm", "ask", str(copy), str(tmp_path / "a.png"), "bus", "--max-new-tokens", "2", "--precision", "int8"]
    cli.main([*asked, "--json"])
    assert json.loads(capsys.readouterr().out)["parity"]["status"] == "undecided"
    cli.main(asked)
    assert "onnxruntime int8 (parity undecided): first token" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--precisions", "int8", "--strict"])
    assert ended.value.code == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--into-bundle", "--precisions", "fp32"])
    assert ended.value.code == 2
    assert "writes the verdict on every variant" in capsys.readouterr().err


def test_a_verdict_on_other_files_is_not_written(bundle: Path, recorded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    report = check_vlm_parity(copy, reference=recorded, precisions=["fp32"], threads=1)
    before = (copy / "bundle.json").read_bytes()
    with pytest.raises(UsageError, match="says nothing about onnx int8, onnx w4"):
        write_vlm_summary(copy, report)
    raw = json.loads(before)
    raw["variants"] = raw["variants"][:1]
    name = raw["variants"][0]["files"]["decoder"]
    raw["files"][name]["sha256"] = "0" * 64
    (copy / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(UsageError, match="changed since it was checked"):
        write_vlm_summary(copy, report)
    with pytest.raises(UsageError, match=r"has no bundle\.json"):
        write_vlm_summary(tmp_path, report)


@pytest.mark.parametrize(
    ("lost", "gained", "asked", "status", "said"),
    [
        (0, 0, 300, "pass", "exact match loses no more than 1 point"),
        (0, 0, 200, "undecided", "fewer than the 268 questions"),
        (5, 5, 300, "undecided", "ask more of them to decide"),
        (9, 3, 300, "undecided", "lower bound"),
        (20, 0, 300, "fail", "the task loses more than 1 point"),
        (0, 0, 0, "undecided", "no questions were asked"),
    ],
)
def test_a_reduced_precision_is_judged_by_what_is_shown(
    lost: int, gained: int, asked: int, status: str, said: str, bundle: Path, recorded: Path
) -> None:
    reference = load_vlm_reference(recorded)
    edge = EdgeVLM.load(bundle, precision="int8", threads=1)
    expected = [True] * lost + [False] * (asked - lost)
    right = [False] * lost + [True] * gained + [False] * (asked - lost - gained)
    checked = compare(edge, reference.cases[:1], reference.noise, (expected, right))
    assert (checked.status, checked.lost, checked.gained) == (status, lost, gained)
    assert said in checked.message


def test_full_precision_may_change_no_answer(bundle: Path, recorded: Path) -> None:
    reference, edge = load_vlm_reference(recorded), EdgeVLM.load(bundle, precision="fp32", threads=1)
    for expected, right in (([True] * 1000, [True] * 999 + [False]), ([False] * 9, [False] * 8 + [True])):
        checked = compare(edge, reference.cases[:1], reference.noise, (expected, right))
        assert checked.status == "fail"
        assert "and none may change" in checked.message
    assert compare(edge, reference.cases[:1], reference.noise, ([], [])).status == "pass"
