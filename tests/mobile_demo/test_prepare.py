"""`pocketvlm mobile prepare`: the right files, a manifest that vouches for them, and sentences for what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.cli import main
from pocketvlm.edge.bundle import SCHEMA_VERSION, Bundle, describe_files
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.vlm_bundle import Template, VlmBundle, VlmContract
from pocketvlm.mobile import PLATFORMS, prepare

PACKAGE = "coreml/image-fp16.mlpackage"


def variant(target: str, precision: str, image: str, text: str) -> dict[str, Any]:
    return {"target": target, "precision": precision, "dim": None, "files": {"image": image, "text": text}}


@pytest.fixture
def bundle(edge_toys: Any, tmp_path: Path) -> Path:
    """onnx fp32 and int8 that share the text graph, one .pte, one .mlpackage, and files that belong to no variant."""
    folder: Path = edge_toys.write_bundle(tmp_path / "bundle")
    shutil.copy(folder / "onnx/image.onnx", folder / "onnx/image-int8.onnx")
    (folder / PACKAGE / "Data").mkdir(parents=True)
    (folder / PACKAGE / "Data/weight.bin").write_bytes(b"weights")
    (folder / PACKAGE / "Manifest.json").write_text("{}")
    (folder / "executorch").mkdir()
    (folder / "executorch/model-int8.pte").write_bytes(b"program")
    (folder / "conformance").mkdir()
    (folder / "conformance/vectors.json").write_text('{"schema": "1.0"}')
    edge_toys.write_manifest(
        folder,
        conformance="conformance/vectors.json",
        variants=[
            variant("onnx", "fp32", "onnx/image.onnx", "onnx/text.onnx"),
            variant("onnx", "int8", "onnx/image-int8.onnx", "onnx/text.onnx"),
            variant("executorch", "int8", "executorch/model-int8.pte", "executorch/model-int8.pte"),
            variant("coreml", "fp16", PACKAGE, PACKAGE),
        ],
        parity=[{"target": "onnx", "precision": name, "status": "pass"} for name in ("fp32", "int8")],
    )
    return folder


COMMON = {"bundle.json", "tokenizer.json", "conformance/vectors.json"}


@pytest.mark.parametrize(
    ("platform", "model"),
    [
        ("web", {"onnx/image-int8.onnx", "onnx/text.onnx"}),
        ("android", {"executorch/model-int8.pte"}),
        ("ios", {f"{PACKAGE}/Data/weight.bin", f"{PACKAGE}/Manifest.json"}),
    ],
)
def test_a_platform_gets_its_variant_and_what_all_need(
    bundle: Path, tmp_path: Path, platform: str, model: set[str]
) -> None:
    done = prepare(platform, bundle, tmp_path / "out")
    found = {p.relative_to(done.folder).as_posix() for p in done.folder.rglob("*") if p.is_file()}
    assert found == COMMON | model
    copied = Bundle.load(done.folder)  # every file is listed and has its hash
    assert [(v.target, v.precision) for v in copied.variants] == [(done.variant.target, done.variant.precision)]
    assert copied.contract == Bundle.load(bundle).contract
    assert [row["precision"] for row in copied.parity] == (["int8"] if platform == "web" else [])
    assert copied.licences == Bundle.load(bundle).licences


def test_the_copy_runs(bundle: Path, tmp_path: Path) -> None:
    done = prepare("web", bundle, tmp_path / "out", "fp32")
    before, after = (
        EdgeModel.load(b, "onnxruntime", "fp32").embed_text("a red picture") for b in (bundle, done.folder)
    )
    assert (before == after).all()


def test_a_platform_without_its_usual_precision_takes_the_most_faithful(
    bundle: Path, edge_toys: Any, tmp_path: Path
) -> None:
    edge_toys.write_manifest(bundle, variants=[variant("onnx", "fp32", "onnx/image.onnx", "onnx/text.onnx")])
    assert prepare("web", bundle, tmp_path / "out").variant.precision == "fp32"


def test_a_zip_is_taken(bundle: Path, tmp_path: Path) -> None:
    archive = tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in bundle.rglob("*"):
            file.write(path, path.relative_to(bundle))
    assert prepare("android", archive, tmp_path / "out").files["executorch/model-int8.pte"] == len(b"program")


@pytest.mark.parametrize("platform", list(PLATFORMS))
def test_in_a_checkout_the_app_is_found_from_below_and_its_old_bundle_replaced(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    below = tmp_path / "checkout/docs"
    below.mkdir(parents=True)
    (tmp_path / "checkout/mobile_demo" / platform).mkdir(parents=True)
    monkeypatch.chdir(below)
    for _ in range(2):
        done = prepare(platform, bundle)
        assert done.folder == tmp_path / "checkout" / PLATFORMS[platform].place  # type: ignore[index]
    assert [p.name for p in done.folder.parent.iterdir()] == ["bundle"]  # no scratch folder is left


@pytest.mark.parametrize(
    ("platform", "precision", "message"),
    [
        ("android", "fp32", r"has onnx fp32, .* app runs executorch fp32; .* --targets executorch:fp32 "),
        ("web", "w4", r"the web app runs onnx w4; .*: pocketvlm export RUN --targets onnx:w4 --out DIR"),
        ("tv", "auto", r"unknown platform 'tv'; there are apps for ios, android and web"),
    ],
)
def test_what_the_bundle_lacks_is_said_with_the_export_that_brings_it(
    bundle: Path, tmp_path: Path, platform: str, precision: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare(platform, bundle, tmp_path / "out", precision)
    assert not (tmp_path / "out").exists()


def test_a_missing_target_names_the_usual_precision(bundle: Path, edge_toys: Any, tmp_path: Path) -> None:
    edge_toys.write_manifest(bundle, variants=[variant("onnx", "fp32", "onnx/image.onnx", "onnx/text.onnx")])
    with pytest.raises(UsageError, match=r"the ios app runs coreml; .* --targets coreml:fp16 --out DIR"):
        prepare("ios", bundle, tmp_path / "out")


def test_a_damaged_bundle_leaves_the_old_copy(bundle: Path, tmp_path: Path) -> None:
    prepare("android", bundle, tmp_path / "out")
    (bundle / "executorch/model-int8.pte").write_bytes(b"tampered")
    with pytest.raises(IntegrityError, match=r"executorch/model-int8.pte"):
        prepare("android", bundle, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out/executorch/model-int8.pte").read_bytes() == b"program"


def test_a_copy_that_went_wrong_takes_no_place(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketvlm.mobile.shutil.copyfile", lambda source, target: Path(target).write_bytes(b"cut"))
    with pytest.raises(IntegrityError):
        prepare("android", bundle, tmp_path / "new/out")
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_of_others_is_overwritten(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="not empty"):
        prepare("web", bundle, tmp_path / "mine")
    with pytest.raises(UsageError, match="not a bundle and is not deleted"):
        prepare("web", bundle, tmp_path / "mine", overwrite=True)
    for inside in (bundle, bundle / "web", bundle.parent):
        with pytest.raises(UsageError, match="lie in one another"):
            prepare("web", bundle, inside, overwrite=True)


def test_outside_a_checkout_out_is_asked_for(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"run this in a checkout or pass --out DIR"):
        prepare("ios", bundle)


def test_a_classifier_is_for_an_app_of_ones_own(
    bundle: Path, edge_toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contract = edge_toys.make_contract(kind="classifier", text=None, labels=tuple("abcd"))
    edge_toys.write_manifest(bundle, contract=contract.to_dict())
    (tmp_path / "mobile_demo/web").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="of kind 'classifier' and the demo apps ask in words"):
        prepare("web", bundle)
    assert prepare("web", bundle, tmp_path / "out").folder.is_dir()


@pytest.fixture
def talker(edge_toys: Any, tmp_path: Path) -> Path:
    """A bundle of kind "vlm", onnx fp32 and int8; its files are no graphs."""
    folder = tmp_path / "talker"
    (folder / "onnx").mkdir(parents=True)
    names = {"picture": "onnx/picture-{}.onnx", "decoder": "onnx/decoder-{}.onnx"}
    for name in names.values():
        for precision in ("fp32", "int8"):
            (folder / name.format(precision)).write_bytes(name.encode())
    (folder / "tokenizer.json").write_text("{}")
    contract = VlmContract(
        kind="vlm",
        name="talker",
        model_id="talker@1",
        image=ImageSpec(size=32, resize="pad", filter="bilinear"),
        template=Template(begin=1, user=3, assistant=4, end=2, pad=0, first_text=6),
        prefix=2,
        context_length=40,
        vocab_size=300,
        width=32,
        layers=1,
        kv_heads=1,
        head_width=8,
    )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kit_version": "0",
        "created": "2026-01-01T00:00:00+00:00",
        "contract": contract.to_dict(),
        "contract_sha256": contract.digest(),
        "variants": [
            {"target": "onnx", "precision": p, "files": {part: name.format(p) for part, name in names.items()}}
            for p in ("fp32", "int8")
        ],
        "files": describe_files(folder),
        "tokenizer": "tokenizer.json",
    }
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def test_a_model_that_answers_lies_beside_and_the_manifest_vouches_for_it(
    bundle: Path, talker: Path, tmp_path: Path
) -> None:
    done = prepare("web", bundle, tmp_path / "out", vlm=talker)
    inside = {"bundle.json", "tokenizer.json", "onnx/picture-int8.onnx", "onnx/decoder-int8.onnx"}
    assert {name for name in done.files if name.startswith("vlm/")} == {f"vlm/{name}" for name in inside}
    assert [v.precision for v in VlmBundle.load(done.folder / "vlm").variants] == ["int8"]
    assert EdgeModel.load(done.folder, "onnxruntime").embed_text("a red picture").shape[0] == 1
    (done.folder / "vlm/bundle.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"vlm/bundle.json"):
        Bundle.load(done.folder)
    # prepared again without it, nothing of it is left
    again = prepare("web", bundle, tmp_path / "out", overwrite=True)
    assert not [name for name in again.files if name.startswith("vlm/")]


def test_what_cannot_lie_beside_is_refused(bundle: Path, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--vlm was given and the android app has no screen that asks"):
        prepare("android", bundle, tmp_path / "out", vlm=talker)
    with pytest.raises(UsageError, match=r"holds a 'dual' model and one that answers in words"):
        prepare("web", bundle, tmp_path / "out", vlm=bundle)
    with pytest.raises(UsageError, match="lie in one another"):
        prepare("web", bundle, talker / "out", vlm=talker)
    raw = json.loads((talker / "bundle.json").read_text())
    for row in raw["variants"]:
        row["target"] = "executorch"
    (talker / "bundle.json").write_text(json.dumps(raw))
    with pytest.raises(
        UsageError, match=r"export it: pocketvlm vlm export FOLDER --targets onnx --precisions int8 --out"
    ):
        prepare("web", bundle, tmp_path / "out", vlm=talker)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_went_where(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["mobile", "prepare", "web", str(bundle), "--out", str(out)])
    assert f"bundle: {out}" in capsys.readouterr().out
    main(["mobile", "prepare", "web", str(bundle), "--out", str(out), "--overwrite", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["target"], told["precision"], told["folder"]) == ("onnx", "int8", str(out))
    assert set(told["files"]) == {
        "tokenizer.json",
        "conformance/vectors.json",
        "onnx/image-int8.onnx",
        "onnx/text.onnx",
    }
    with pytest.raises(SystemExit):
        main(["mobile", "prepare", "ios", str(bundle), "--out", str(out)])
    assert capsys.readouterr().err.count("\n") == 1


def test_preparing_needs_no_torch(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pocketvlm.mobile import prepare; prepare(*sys.argv[1:]); "
        "print([m for m in ('torch', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, "web", str(bundle), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr
