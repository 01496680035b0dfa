"""Reading bundles: what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.edge.bundle import Bundle, check_schema_version, describe_files, sha256_file
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UnknownNameError, UsageError, VersionError


def refusal(path: Path, kind: type[PocketvlmError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        Bundle.load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(folder: Path, change: Any) -> None:
    raw = json.loads((folder / "bundle.json").read_text())
    change(raw)
    (folder / "bundle.json").write_text(json.dumps(raw))


def zip_of(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def test_a_good_bundle(bundle_folder: Path) -> None:
    bundle = Bundle.load(str(bundle_folder))
    assert bundle.folder == bundle_folder
    assert bundle.contract.embed_dim == 4
    assert [(v.target, v.precision, v.batch) for v in bundle.variants] == [("onnx", "fp32", "dynamic")]
    assert bundle.parity[0]["status"] == "passed"
    assert (bundle.licences[0].licence, bundle.licences[0].url) == ("CC0-1.0", "")
    assert bundle.provenance == {"command": "by hand"}
    assert bundle.path("onnx/text.onnx").is_file()
    assert bundle.path("onnx").is_dir()
    assert set(describe_files(bundle_folder)) == {"onnx/image.onnx", "onnx/text.onnx", "tokenizer.json"}


def test_a_changed_byte_is_found(bundle_folder: Path) -> None:
    model = bundle_folder / "onnx/image.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert "onnx/image.onnx" in refusal(bundle_folder, IntegrityError)
    assert Bundle.load(bundle_folder, verify=False).contract.name == "tiny"


def test_a_missing_file_is_found_even_without_hashing(bundle_folder: Path) -> None:
    (bundle_folder / "onnx/text.onnx").unlink()
    for verify in (True, False):
        assert "'onnx/text.onnx' is listed" in refusal(bundle_folder, IntegrityError, verify=verify)


def test_an_unlisted_file_is_refused_but_desktop_litter_is_not(bundle_folder: Path) -> None:
    (bundle_folder / ".DS_Store").write_bytes(b"x")
    (bundle_folder / "onnx/._image.onnx").write_bytes(b"x")
    Bundle.load(bundle_folder)
    (bundle_folder / "onnx/image.onnx.data").write_bytes(b"weights that nobody vouches for")
    assert "'onnx/image.onnx.data' is not listed" in refusal(bundle_folder, IntegrityError)
    with pytest.raises(IntegrityError, match="does not list"):
        Bundle.load(bundle_folder, verify=False).path("onnx/image.onnx.data")


def test_a_link_does_not_stand_in_for_a_file(bundle_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    shutil.move(bundle_folder / "tokenizer.json", outside)
    (bundle_folder / "tokenizer.json").symlink_to(outside)
    assert "tokenizer.json" in refusal(bundle_folder, IntegrityError)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("1.1", "upgrade pocketvlm"),
        ("2.0", "upgrade pocketvlm"),
        ("1.10", "upgrade pocketvlm"),
        ("0.9", "export it again with this release"),
        ("1", "one like '1.0' is expected"),
        (1.0, "one like '1.0' is expected"),
        ("1.x", "one like '1.0' is expected"),
        (None, "one like '1.0' is expected"),
    ],
)
def test_versions(bundle_folder: Path, version: Any, says: str) -> None:
    edit(bundle_folder, lambda raw: raw.update(schema_version=version, contract={"of": "the future"}))
    assert says in refusal(bundle_folder, VersionError, verify=False)


def test_an_older_minor_version_is_read() -> None:
    check_schema_version("1.2", "bundle", supported="1.3")
    check_schema_version("1.3", "bundle", supported="1.3")
    with pytest.raises(VersionError):
        check_schema_version("1.4", "bundle", supported="1.3")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "c:\\x", "a\\..\\b", "", "./a", "a//b"])
def test_paths_that_leave_the_folder(bundle_folder: Path, name: str) -> None:
    edit(bundle_folder, lambda raw: raw["files"].update({name: {"sha256": "0", "bytes": 1}}))
    assert "not a plain path" in refusal(bundle_folder, IntegrityError)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.pop("contract"), "contract"),
        (lambda raw: raw["contract"].pop("name"), "name"),
        (lambda raw: raw.pop("variants"), "variants"),
        (lambda raw: raw.update(files=[]), "items"),
        (lambda raw: raw["files"].update({"tokenizer.json": {}}), "sha256"),
        (lambda raw: raw["variants"][0].pop("files"), "files"),
        (lambda raw: raw.update(licences=[{"what": "x"}]), "licence"),
        (lambda raw: raw["variants"][0]["files"].update(image="onnx/other.onnx"), "onnx/other.onnx"),
    ],
)
def test_malformed_manifests(bundle_folder: Path, change: Any, says: str) -> None:
    edit(bundle_folder, change)
    assert says in refusal(bundle_folder, IntegrityError)


def test_no_json_no_bundle_no_path(bundle_folder: Path, tmp_path: Path) -> None:
    (bundle_folder / "bundle.json").write_text("{")
    assert "not JSON" in refusal(bundle_folder, IntegrityError)
    (bundle_folder / "bundle.json").unlink()
    assert "has no bundle.json" in refusal(bundle_folder, UsageError)
    assert "does not exist" in refusal(tmp_path / "absent", UsageError)


def test_variant_choice(bundle_folder: Path) -> None:
    def more(raw: dict[str, Any]) -> None:
        first = raw["variants"][0]
        raw["variants"] = [
            {**first, "precision": "int8"},
            {**first, "dim": 2},
            first,
            {**first, "target": "executorch", "precision": "int4"},
        ]

    edit(bundle_folder, more)
    bundle = Bundle.load(bundle_folder)
    assert (bundle.variant("onnx").precision, bundle.variant("onnx").dim) == ("fp32", None)
    assert bundle.variant("onnx", "int8").precision == "int8"
    assert bundle.variant("onnx", dim=2).dim == 2
    assert bundle.variant("onnx", dim=4).dim is None
    assert bundle.variant("executorch").precision == "int4"
    with pytest.raises(UnknownNameError, match=r"target of this bundle 'coreml'.*executorch.*onnx"):
        bundle.variant("coreml")
    with pytest.raises(UnknownNameError, match="did you mean 'fp32'"):
        bundle.variant("onnx", "fp16")
    with pytest.raises(UnknownNameError, match=r"'int8'.*fp32"):
        bundle.variant("onnx", "int8", 2)
    with pytest.raises(UnknownNameError, match=r"width .* '3'.*known: 2, 4"):
        bundle.variant("onnx", dim=3)


def test_conformance_must_exist(bundle_folder: Path) -> None:
    with pytest.raises(IntegrityError, match="no conformance vectors"):
        Bundle.load(bundle_folder).conformance()


@pytest.mark.parametrize("prefix", ["", "tiny-bundle/"])
def test_zip_is_unpacked_and_cleaned_up(bundle_folder: Path, tmp_path: Path, prefix: str) -> None:
    bundle = Bundle.load(zip_of(bundle_folder, tmp_path / "bundle.zip", prefix))
    folder = bundle.folder
    assert sha256_file(folder / "tokenizer.json") == sha256_file(bundle_folder / "tokenizer.json")
    del bundle
    assert not folder.exists()


def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", ["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "..\\escaped.txt"])
def test_zip_member_outside_the_folder(
    bundle_folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = temporary_folder(tmp_path, monkeypatch)
    path = zip_of(bundle_folder, tmp_path / "bundle.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "gotcha")
    assert "would land outside" in refusal(path, IntegrityError)
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not list(temporary.iterdir())


def test_other_hostile_or_broken_zips(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = temporary_folder(tmp_path, monkeypatch)
    link = zip_of(bundle_folder, tmp_path / "link.zip")
    with zipfile.ZipFile(link, "a") as archive:
        member = zipfile.ZipInfo("link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    assert "is a link" in refusal(link, IntegrityError)

    twice = zip_of(bundle_folder, tmp_path / "twice.zip")
    with zipfile.ZipFile(twice, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("Tokenizer.json", "{}")
    assert "twice" in refusal(twice, IntegrityError)

    broken = tmp_path / "broken.zip"
    data = zip_of(bundle_folder, tmp_path / "whole.zip").read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    assert "neither a bundle folder nor a readable zip" in refusal(broken, IntegrityError)
    flipped = bytearray(data)
    flipped[data.index(b"[PAD]") + 1] ^= 1  # inside a stored member: the archive's checksum notices
    broken.write_bytes(flipped)
    assert "cannot be unpacked" in refusal(broken, IntegrityError)

    empty = tmp_path / "empty.zip"
    zipfile.ZipFile(empty, "w").close()
    assert "no bundle.json" in refusal(empty, IntegrityError)

    monkeypatch.setattr("pocketvlm.edge.bundle.UNZIPPED_LIMIT", 10)
    assert "more than the limit" in refusal(tmp_path / "whole.zip", IntegrityError)
    monkeypatch.undo()
    assert not list(temporary.iterdir())


def test_zip_with_a_changed_model_is_refused_and_removed(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = temporary_folder(tmp_path, monkeypatch)
    (bundle_folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refusal(zip_of(bundle_folder, tmp_path / "bundle.zip"), IntegrityError)
    assert not list(temporary.iterdir())
