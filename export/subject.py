"""What a reference is recorded of: our student, or somebody else's dual encoder by upstream's own forward.

Neither is the deploy copy and neither is a tower that `export.foreign` cut out: a mistake there must show.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.numerics import WideConstants
from pocketvlm.export.reference_run import sha256
from pocketvlm.students.student import weights_digest
from pocketvlm.teachers.hf import joint

Licences = tuple[tuple[str, str, str], ...]
_OWN_PREPROCESSING = (
    "upstream's own preprocessing was not run; this kit's decoding and resizing made the recorded pixels"
)


class Runner(Protocol):
    """A copy of the model in one dtype on one device, in eval mode.

    threads: several threads may call `encode` at once.
    """

    device: torch.device
    threads: bool

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        """Raw embeddings [B, D] of uint8 [B, S, S, 3] pixels ("image") or int32 [B, L] ids ("text")."""
        ...

    def blocks(self, tower: str) -> nn.Module:
        """The module under which taps of one tower are looked for."""
        ...


class Subject(Protocol):
    """A model to record.

    weights: digest of the model's weights. files: name -> sha256 of further files that made it. provenance: plain
    JSON facts. not_compared: stage -> why parity with this recording proves nothing about it.
    """

    contract: ModelContract
    tokenizer_json: bytes
    weights: str
    files: Mapping[str, str]
    licences: Licences
    provenance: Mapping[str, Any]
    not_compared: Mapping[str, str]

    def ids(self, texts: Sequence[Any]) -> NDArray[np.int32]:
        """Strings to int32 [n, L]. Raises BadSampleError where the kit's tokenizer refuses a text."""
        ...

    def runner(self, dtype: torch.dtype, device: torch.device) -> Runner:
        """A copy to run; the subject itself keeps its dtype, device and mode."""
        ...

    def weight_facts(self) -> dict[str, dict[str, Any]]:
        """Per weight, by which a converter's constants are recognised: see `facts_of`."""
        ...


def open_subject(source: Any, *, allow_download: bool = False, trust_remote_code: bool = False) -> Subject:
    """source: a `Subject`; a `Student` or its folder; "open_clip:..." or "hf:..."; such a teacher, loaded.

    Raises:
        UsageError: nothing there that could be recorded. MissingExtraError: the upstream package is absent.
    """
    from pocketvlm.export.foreign import is_foreign

    if hasattr(source, "runner"):
        return source
    if is_foreign(source):
        from pocketvlm.teachers import load_teacher

        source = load_teacher(source, allow_download=allow_download, trust_remote_code=trust_remote_code)
    if hasattr(source, "encode_texts"):
        return ForeignSubject(source)
    if isinstance(source, (str, Path)):
        from pocketvlm.students import load_student

        folder, files = Path(source), {}
        for recipe in (folder / "recipe.yaml", folder.parent / "recipe.yaml"):
            if recipe.is_file():
                files["recipe"] = sha256(recipe.read_bytes())
                break
        return StudentSubject(load_student(folder), files)
    return StudentSubject(source)


def facts_of(name: str, value: Tensor) -> dict[str, dict[str, Any]]:
    """{name: shape, L2 norm, smallest and largest value} of one weight; empty for integers and empty tensors."""
    if not value.is_floating_point() or not value.numel():
        return {}
    # on the CPU: sums on a GPU depend on where the tensor happens to lie
    wide = value.detach().cpu().double()
    return {
        name: {
            "shape": list(value.shape),
            "norm": float(wide.norm()),
            "min": float(wide.min()),
            "max": float(wide.max()),
        }
    }


# --- our student ----------------------------------------------------------------------------------------------------


class StudentSubject:
    """A `Student`, or anything with its `contract`, `tokenizer_json`, `encode_image`, `encode_text` and towers."""

    def __init__(self, student: Any, files: Mapping[str, str] | None = None) -> None:
        self.student = student
        self.contract: ModelContract = student.contract
        if self.contract.image is None or self.contract.text is None:
            raise UsageError(
                f"model {self.contract.name!r} is of kind {self.contract.kind!r}; a reference needs both towers for now"
            )
        self.tokenizer_json: bytes = student.tokenizer_json
        self.weights = weights_digest(student)
        self.files: Mapping[str, str] = dict(files or {})
        self.licences: Licences = tuple(student.licences)
        self.provenance: Mapping[str, Any] = {"kind": "student", "name": self.contract.name}
        self.not_compared: Mapping[str, str] = {}
        self._tokenizer = Tokenizer(self.tokenizer_json, self.contract.text)

    def ids(self, texts: Sequence[Any]) -> NDArray[np.int32]:
        return self._tokenizer.encode(texts)

    def runner(self, dtype: torch.dtype, device: torch.device) -> Runner:
        return _StudentRunner(copy.deepcopy(self.student).to(device=device, dtype=dtype).eval(), device)

    def weight_facts(self) -> dict[str, dict[str, Any]]:
        """Image weights are taken after batch norms were folded in, as every converter does."""
        from pocketvlm.export.prepare import capture, fold_batchnorm
        from pocketvlm.students.deploy import deploy_image

        student, size = self.student, self.student.image_spec.size
        graph = capture(deploy_image(student), np.zeros((2, size, size, 3), np.uint8))
        fold_batchnorm(graph)
        found = {f"image_tower.{name}": value for name, value in graph.state_dict().items()}
        found |= {name: value for name, value in student.state_dict().items() if not name.startswith("image_tower.")}
        return {key: fact for name, value in sorted(found.items()) for key, fact in facts_of(name, value).items()}


class _StudentRunner:
    threads = True

    def __init__(self, student: Any, device: torch.device) -> None:
        self.student, self.device = student, device

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        encode = self.student.encode_image if tower == "image" else self.student.encode_text
        return encode(rows.to(self.device)).embedding

    def blocks(self, tower: str) -> nn.Module:
        return self.student.image_tower if tower == "image" else self.student.text_tower


# --- somebody else's model ------------------------------------------------------------------------------------------


class ForeignSubject:
    """An open_clip or Hugging Face teacher (`teachers.dual.DualEncoderTeacher`) by upstream's tokenizer and forward.

    Pixels are made by this kit, so S0 compares the kit with itself; ids are upstream's own, so S1 does not.

    Raises:
        UsageError: a teacher without an upstream module, or whose tokenizer cannot travel.
    """

    def __init__(self, teacher: Any) -> None:
        from pocketvlm.export.foreign import foreign_contract
        from pocketvlm.teachers.dual import DualEncoderTeacher

        if not isinstance(teacher, DualEncoderTeacher):
            raise UsageError(
                f"teacher {teacher.name!r} is no open_clip or Hugging Face dual encoder, so no bundle of it can exist "
                "that a reference could judge; record a student, open_clip:NAME@WEIGHTS or hf:FOLDER"
            )
        self.teacher: Any = teacher
        self.contract = foreign_contract(teacher)
        self.tokenizer_json = teacher.tokenizer_json()
        self.weights = weights_digest(teacher.model)
        self.files: Mapping[str, str] = {"fingerprint": teacher.fingerprint}
        self.licences: Licences = tuple(teacher.licences)
        self.provenance: Mapping[str, Any] = {
            "kind": "upstream",
            "name": self.contract.name,
            "module": type(teacher.model).__name__,
            "packages": _versions("open_clip_torch", "transformers", "timm"),
            "forward": "upstream's own encode functions, not the exported towers",
            "ids": "upstream's own tokenizer",
        }
        self.not_compared: Mapping[str, str] = {"S0": _OWN_PREPROCESSING}
        self._tokenizer = Tokenizer(self.tokenizer_json, teacher.text)
        # upstream's attention mask, by the ids it came with: where padding and end token share an id, ids do not tell
        self._masks: dict[bytes, Tensor] = {}

    def ids(self, texts: Sequence[Any]) -> NDArray[np.int32]:
        ours = self._tokenizer.encode(texts)
        if not len(ours):
            return ours
        if not hasattr(self.teacher, "_batch"):
            return self.teacher.tokenize(texts).numpy().astype(np.int32)
        batch = self.teacher._batch(texts)
        ids = batch["input_ids"].numpy().astype(np.int32)
        for row, mask in zip(ids, batch.get("attention_mask", ())):
            self._masks[row.tobytes()] = mask
        return ids

    def runner(self, dtype: torch.dtype, device: torch.device) -> Runner:
        model = copy.deepcopy(self.teacher.model)
        if hasattr(model, "set_attn_implementation"):
            # transformers' "eager" takes its softmax in float32 whatever the model's dtype
            model.set_attn_implementation("sdpa")
        return _ForeignRunner(model.to(device=device, dtype=dtype).eval(), self.teacher.image, self._masks, device)

    def weight_facts(self) -> dict[str, dict[str, Any]]:
        facts: dict[str, dict[str, Any]] = {}
        for name, value in sorted(self.teacher.model.state_dict().items()):
            facts |= facts_of(f"{'image' if _sees(name) else 'text'}_tower.{name}", value)
        return facts


class _ForeignRunner:
    # upstream code promises nothing about threads, and transformers patches its modules while they run
    threads = False

    def __init__(self, model: Any, spec: Any, masks: Mapping[bytes, Tensor], device: torch.device) -> None:
        self.model, self.device, self.masks = model, device, masks
        self.dtype = next(model.parameters()).dtype
        # made in float64, so that no constant of the reference is a rounded one
        mean, std = (torch.tensor(v, dtype=torch.float64).reshape(1, 3, 1, 1) for v in (spec.mean, spec.std))
        self.mean, self.std = mean.to(device, self.dtype), std.to(device, self.dtype)

    def encode(self, tower: str, rows: Tensor) -> Tensor:
        with WideConstants() if self.dtype == torch.float64 else nullcontext():
            return self._image(rows) if tower == "image" else self._text(rows)

    def _image(self, rows: Tensor) -> Tensor:
        planes = rows.to(self.device).permute(0, 3, 1, 2).to(self.dtype) / 255
        planes = (planes - self.mean) / self.std
        if hasattr(self.model, "get_image_features"):
            return joint(self.model.get_image_features(pixel_values=planes))
        return self.model.encode_image(planes)

    def _text(self, rows: Tensor) -> Tensor:
        ids = rows.to(self.device, torch.int64)
        if not hasattr(self.model, "get_text_features"):
            return self.model.encode_text(ids)
        masks = {}
        if self.masks:
            kept = [self.masks[row.tobytes()] for row in rows.cpu().numpy()]
            masks["attention_mask"] = torch.stack(kept).to(self.device)
        return joint(self.model.get_text_features(input_ids=ids, **masks))

    def blocks(self, tower: str) -> nn.Module:
        children = dict(self.model.named_children())
        view = nn.Module()
        for name, child in children.items():
            if _sees(name) == (tower == "image") or not any(map(_sees, children)):
                view.add_module(name, child)
        return view


def _sees(name: str) -> bool:
    """Whether a module or weight is of the image half: `visual` (open_clip), `vision_model`, `visual_projection`."""
    return name.startswith("vis")


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
