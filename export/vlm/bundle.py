"""`export_vlm`: a saved generative student becomes a bundle folder that runs without torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

import pocketvlm
from pocketvlm.edge.bundle import SCHEMA_VERSION, BundleVariant, describe_files, sha256_file
from pocketvlm.edge.bundle_write import check_out, staged
from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.edge.errors import PocketvlmError, UsageError, unknown_name
from pocketvlm.edge.vlm_bundle import Template, VlmBundle, VlmContract
from pocketvlm.students.vlm import Vlm, load_vlm
from pocketvlm.students.vlm.io import MANIFEST as SAVED
from pocketvlm.students.vlm.io import TOKENIZER
from pocketvlm.students.vlm.model import MARKER
from pocketvlm.students.vlm.tokenizer import ASSISTANT, BOS, EOS, PAD, SPECIAL, USER

# target -> what it writes, and what of it is written when no precision is asked for
TARGETS: dict[str, tuple[str, ...]] = {
    "onnx": ("fp32", "int8", "w4"),
    "executorch": ("fp32", "int8", "w4"),
    "coreml": ("fp16", "w8"),
}
DEFAULT_TARGETS = ("onnx", "executorch")
Resize = Literal["pad", "squash", "crop"]
Progress = Callable[[str], None]


def export_vlm(
    folder: str | Path,
    out: str | Path,
    targets: Sequence[str] = DEFAULT_TARGETS,
    precisions: Sequence[str] | None = None,
    *,
    resize: Resize = "pad",
    overwrite: bool = False,
    progress: Progress = lambda line: None,
) -> Path:
    """Write the bundle of a student that `save_vlm` wrote; the folder appears whole or not at all.

    Args:
        folder: of `save_vlm`. targets: any of "onnx", "executorch", "coreml". precisions: of those that have them
            ("fp32", "int8", "w4", for coreml "fp16", "w8"); None: all of each target.
        resize: how a picture that is not square meets the square that the student was trained on. "pad" scales the
            longer side and centres on white, which keeps proportions; scenes have a white ground, so that it is no
            stranger. "squash" keeps places and not proportions, "crop" looks at the middle alone.
        progress: called with a line for each file.

    Raises:
        UsageError: no such student, an output folder that may not be written, nothing to write, a decoder that the
            export does not know, or visual tokens left out in a way that cannot be exported (`Vlm.for_export`).
        UnknownNameError: no such target, or no target with such a precision.
        MissingExtraError: a converter is not installed. IntegrityError: see `load_vlm`.
    """
    folder, out = Path(folder), Path(out)
    wanted = plan_files(targets, precisions)
    check_out(out, overwrite)
    model = load_vlm(folder).for_export()
    contract = contract_of(model, identity(model.config.name, sha256_file(folder / SAVED)), resize)
    with staged(out, overwrite) as draft:
        (draft / contract.tokenizer).write_bytes(model.tokenizer.json)
        variants = write_variants(model, contract, wanted, draft, progress)
        _write_manifest(draft, model, contract, variants, folder)
        VlmBundle.load(draft)
    return out


def plan_files(targets: Sequence[str], precisions: Sequence[str] | None) -> list[tuple[str, str]]:
    """Pairs of target and precision.

    Raises:
        UnknownNameError: no such target, or no chosen target has such a precision. UsageError: none at all.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target of a generative student", target, TARGETS)
    offered = {name for target in targets for name in TARGETS[target]}
    for precision in precisions or ():
        if precision not in offered:
            raise unknown_name(f"precision of {', '.join(targets)}", precision, offered)
    found = [(t, p) for t in dict.fromkeys(targets) for p in TARGETS[t] if precisions is None or p in precisions]
    if not found:
        raise UsageError("no target was asked for, so the bundle would be empty; name onnx, executorch or coreml")
    return found


def contract_of(model: Vlm, model_id: str, resize: Resize = "pad") -> VlmContract:
    """What the exported model promises."""
    config, tower = model.config, model.vision
    mean, std = ((part.flatten() / 255).tolist() for part in (tower.shift, tower.spread))
    return VlmContract(
        kind="vlm",
        name=config.name,
        model_id=model_id,
        # scenes are made with the same filter
        image=ImageSpec(size=config.vision.size, resize=resize, filter="bilinear", mean=tuple(mean), std=tuple(std)),
        template=Template(
            begin=BOS, user=USER, assistant=ASSISTANT, end=EOS, pad=PAD, first_text=len(SPECIAL), marker=MARKER
        ),
        prefix=model.prefix,
        context_length=config.decoder.context_length,
        vocab_size=model.tokenizer.vocab_size,
        width=config.decoder.width,
        layers=config.decoder.layers,
        kv_heads=config.decoder.kv_heads,
        head_width=config.decoder.width // config.decoder.heads,
        tokenizer=TOKENIZER,
        tokenizer_sha256=hashlib.sha256(model.tokenizer.json).hexdigest(),
    )


def write_variants(
    model: Vlm, contract: VlmContract, wanted: Sequence[tuple[str, str]], folder: Path, progress: Progress
) -> list[BundleVariant]:
    """The files of each target and precision, under `folder`."""
    model.requires_grad_(False)
    variants = []
    writers: dict[str, Any] = {}
    for target, precision in wanted:
        progress(f"writing {target} {precision}")
        try:
            if target not in writers:
                writers[target] = _writer(target)(model, contract)
            files, notes = writers[target].write(precision, folder)
        except PocketvlmError:
            raise
        except Exception as error:  # converters raise whatever they like, often for one unknown operator
            raise UsageError(
                f"{target} {precision} cannot express {contract.name!r} ({type(error).__name__}: "
                f"{(str(error).splitlines() or ['?'])[0][:300]}); no bundle was written, so leave it out"
            ) from error
        sizes = {part: _bytes(folder / relative) for part, relative in files.items()}
        variants.append(BundleVariant(target, precision, files, "fixed-1", None, {**notes, "bytes": sizes}))
    return variants


def _writer(target: str) -> Callable[[Vlm, VlmContract], Any]:
    if target == "onnx":
        from pocketvlm.export.vlm.onnx_graph import OnnxWriter

        return OnnxWriter
    if target == "executorch":
        from pocketvlm.export.vlm.executorch_graph import ExecuTorchWriter

        return ExecuTorchWriter
    from pocketvlm.export.vlm.coreml_graph import CoreMLWriter

    return CoreMLWriter


def _bytes(path: Path) -> int:
    parts = [path] if path.is_file() else [part for part in path.rglob("*") if part.is_file()]
    return sum(part.stat().st_size for part in parts)


def _write_manifest(
    folder: Path, model: Vlm, contract: VlmContract, variants: list[BundleVariant], source: Path
) -> None:
    from pocketvlm.distill.environment import git_commit

    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kit_version": pocketvlm.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "contract": contract.to_dict(),
        "contract_sha256": contract.digest(),
        "variants": [asdict(variant) for variant in variants],
        "files": describe_files(folder),
        "tokenizer": contract.tokenizer,
        "provenance": {
            "student": contract.name,
            "student_sha256": sha256_file(source / SAVED),
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "commit": git_commit(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "torch": torch.__version__,
        },
        "parity": [],
        "licences": [
            {"what": what, "licence": licence, "attribution": attribution, "url": ""}
            for what, licence, attribution in dict.fromkeys(model.config.licences)
        ],
    }
    (folder / "bundle.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
