"""Students on disk: safetensors weights, tokenizer.json and student.json with the hash of each."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import pocketvlm
from pocketvlm.edge.errors import IntegrityError, UsageError, VersionError
from pocketvlm.students.build import assemble
from pocketvlm.students.config import StudentConfig, parse_config
from pocketvlm.students.student import Student
from pocketvlm.students.task import Classes

SCHEMA_VERSION = "1.1"
MANIFEST, WEIGHTS, TOKENIZER = "student.json", "weights.safetensors", "tokenizer.json"


def save_student(student: Student, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write student.json, weights.safetensors and tokenizer.json; the manifest last, each file atomically.

    Raises:
        UsageError: the folder holds something already and `overwrite` is False.
    """
    folder = Path(folder)
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"folder {str(folder)!r} is not empty; its files would be replaced, so pass overwrite "
            "or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    contents = {WEIGHTS: save_tensors(state), TOKENIZER: student.tokenizer_json}
    contract = student.contract
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kit_version": pocketvlm.__version__,
        "config": student.config.model_dump(mode="json"),
        "contract": contract.to_dict(),
        "contract_sha256": contract.digest(),
        "own_space": student.space_id is None,
        "files": {name: {"sha256": _sha256(data), "bytes": len(data)} for name, data in contents.items()},
    }
    if student.heads is not None:
        # a classifier's contract says nothing of the embedding beneath it
        beneath = {"embed_dim": student.embed_dim, "space_id": student.space_id}
        manifest["task"] = student.heads.classes._asdict() | beneath
    # an old manifest must never stand beside new weights
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, data in contents.items():
        _write(folder / name, data)
    _write(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode("utf-8"))
    return folder


def load_student(folder: str | Path) -> Student:
    """Read a student written by `save_student` (or the run folder that holds it), in eval mode, on the CPU.

    Raises:
        UsageError: no student there. VersionError: written by a newer release.
        IntegrityError: a file, the weights or the contract is not what the manifest says.
    """
    folder, manifest = _found(Path(folder))
    files = {name: verified_bytes(folder, name, manifest["files"][name]["sha256"]) for name in (WEIGHTS, TOKENIZER)}
    config = parse_config(manifest["config"], source=f"saved student {str(folder)!r}")
    stored, task = manifest["contract"], manifest.get("task")
    student = assemble(
        config,
        (task or stored)["embed_dim"],
        files[TOKENIZER],
        seed=0,
        space_id=None if manifest["own_space"] else (task or stored)["space_id"],
        classes=None if task is None else Classes(tuple(task["labels"]), tuple(task["templates"]), task["mix"]),
        load_weights=False,
    )
    state = load_tensors(files[WEIGHTS])
    own = student.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or [n for n in own if own[n].shape != state[n].shape]
    if odd:
        raise IntegrityError(
            f"weights in {str(folder)!r} do not fit the configuration beside them (first at {odd[0]!r}); the model "
            "would be another one, so restore both files from the same save"
        )
    student.to(state["log_scale"].dtype).load_state_dict(state)
    if student.contract.digest() != manifest["contract_sha256"] or student.contract.to_dict() != stored:
        raise IntegrityError(
            f"the contract in {str(folder)!r} is not the one its weights and configuration give; embeddings could be "
            "compared with a foreign gallery, so restore student.json from the same save"
        )
    return student.eval()


def saved_config(folder: str | Path) -> StudentConfig:
    """The configuration of a saved student, without its weights; raises as `load_student` of a missing manifest."""
    folder, manifest = _found(Path(folder))
    return parse_config(manifest["config"], source=f"saved student {str(folder)!r}")


def _found(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The folder that holds the manifest (a run folder's is inside), and the manifest."""
    if not (folder / MANIFEST).is_file() and (folder / "student" / MANIFEST).is_file():
        folder = folder / "student"
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"folder {str(folder)!r} holds no {MANIFEST}; there is no student to load, so give a folder that "
            "save_student or a finished distillation run wrote"
        )
    return folder, _manifest(folder / MANIFEST)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = str(manifest["schema_version"])
        major, minor = (int(part) for part in version.split("."))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{str(path)!r} is not a student manifest ({error}); restore it from the original save"
        ) from error
    own_major, own_minor = (int(part) for part in SCHEMA_VERSION.split("."))
    if major != own_major or minor > own_minor:
        raise VersionError(
            f"student {str(path.parent)!r} has schema {version} but this release reads {SCHEMA_VERSION}; fields could "
            "be misread, so upgrade pocketvlm or save the student again"
        )
    return manifest


def verified_bytes(folder: Path, name: str, expected: str) -> bytes:
    """A file of a saved student, of the sha256 that its manifest promises.

    Raises:
        IntegrityError: it is missing or another one.
    """
    try:
        data = (folder / name).read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(
            f"student folder {str(folder)!r} lacks {name}, which its manifest lists; copy the whole folder again"
        ) from error
    if _sha256(data) != expected:
        raise IntegrityError(
            f"{name} in {str(folder)!r} has sha256 {_sha256(data)[:16]}… but its manifest says {expected[:16]}…; the "
            "file was changed or cut off, so copy the folder again or save the student anew"
        )
    return data


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
