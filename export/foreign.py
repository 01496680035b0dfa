"""Somebody else's dual encoder (open_clip, Hugging Face CLIP or SigLIP) down the same export road, undistilled.

The towers are cut out of the upstream module without changing its arithmetic, and before anything is exported they
are compared with the upstream forward on pictures and on strings that went through the travelling tokenizer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec, ModelContract, identity
from pocketvlm.edge.errors import IntegrityError, UsageError, unknown_name
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.numerics import WideConstants
from pocketvlm.export.source import Exportable
from pocketvlm.export.targets.base import Towers

KINDS = ("open_clip", "hf")
# largest difference of any coordinate of a unit vector; float32 rounding through a deep tower stays below
_SAME = 1e-5
_PROBES = ("a photo of a cat", "It's a dog, isn't it?", "日本語の写真", "naïve café 🐱", "long " * 200)


def is_foreign(source: object) -> bool:
    """Whether `source` names an existing dual encoder ("open_clip:...", "hf:...") rather than something on disk."""
    return isinstance(source, str) and source.split(":")[0] in KINDS and not Path(source).exists()


def load_foreign(spec: str, *, allow_download: bool = False, trust_remote_code: bool = False) -> Exportable:
    """A dual encoder named as `teachers.load_teacher` names it ("open_clip:NAME@WEIGHTS", "hf:FOLDER").

    Raises:
        UnknownNameError: another kind of model. UsageError: files or a tokenizer that cannot travel.
        MissingExtraError: the upstream package is not installed.
        IntegrityError: the cut-out towers do not compute what upstream computes.
    """
    kind = spec.partition(":")[0]
    if kind not in KINDS:
        raise unknown_name("source of an existing model", kind, KINDS)
    from pocketvlm.teachers import load_teacher

    loaded: Any = load_teacher(spec, allow_download=allow_download, trust_remote_code=trust_remote_code)
    return from_teacher(loaded)


def from_teacher(teacher: Any) -> Exportable:
    """An open_clip or Hugging Face teacher (`teachers.dual.DualEncoderTeacher`) as an `Exportable`; raises as above."""
    # a copy, because the towers are changed below and the teacher is the caller's
    model = copy.deepcopy(teacher.model)
    text = teacher.text
    if hasattr(model, "visual"):
        image_tower, text_tower = _open_clip_towers(model)
    elif hasattr(model, "vision_model") and hasattr(model, "text_model"):
        masked = "attention_mask" in teacher._batch(["a"])
        image_tower, text_tower = _hf_towers(model, text.pad_id, masked)
    else:
        raise UsageError(
            f"{type(model).__name__} has no separate image and text towers that this release knows how to cut out; "
            "export an open_clip, CLIP or SigLIP model, or distil from it instead"
        )
    contract = foreign_contract(teacher)
    towers = Towers(_frozen(ForeignImage(image_tower, teacher.image)), _frozen(ForeignText(text_tower)), contract)
    exportable = Exportable(
        towers,
        teacher.tokenizer_json(),
        teacher.licences,
        {"source": contract.name, "source_fingerprint": teacher.fingerprint, "distilled": False},
    )
    _refuse_difference(exportable, teacher)
    return exportable


def foreign_contract(teacher: Any) -> ModelContract:
    """The contract of such a teacher; what is exported and what is recorded of one model share it."""
    # a path in the name would tell everybody where it lay
    head, _, rest = teacher.name.partition(":")
    return ModelContract(
        kind="dual",
        name=f"{head}:{Path(rest.partition('@')[0]).name or rest}",
        model_id=identity(head, teacher.fingerprint),
        space_id=teacher.space_id,
        embed_dim=teacher.dim,
        dims=(teacher.dim,),
        image=teacher.image,
        text=teacher.text,
        logit_scale=teacher.logit_scale,
        logit_bias=teacher.logit_bias,
    )


class ForeignImage(nn.Module):
    """uint8 [B, S, S, 3] -> standardised planes -> upstream tower -> unit-length [B, D]."""

    shift: Tensor
    spread: Tensor

    def __init__(self, tower: nn.Module, spec: ImageSpec) -> None:
        super().__init__()
        self.tower = tower
        self.register_buffer("shift", torch.tensor(spec.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spec.std).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 3, 1, 2).to(self.shift.dtype) / 255
        return F.normalize(self.tower((x - self.shift) / self.spread), dim=-1)


class ForeignText(nn.Module):
    """int32 [B, L] -> upstream tower -> unit-length [B, D]."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.tower(ids), dim=-1)


class _OpenClipImage(nn.Module):
    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, x: Tensor) -> Tensor:
        return _first(self.visual(x))


class _OpenClipText(nn.Module):
    """The whole model without its image tower: open_clip's CLIP class keeps the text parts at the top level."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Any, self.model).encode_text(ids)


def _open_clip_towers(model: Any) -> tuple[nn.Module, nn.Module]:
    rest = copy.copy(model)
    rest._modules = {name: child for name, child in model._modules.items() if name != "visual"}
    return _OpenClipImage(model.visual), _OpenClipText(rest)


class _HfImage(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_model = model.vision_model
        # SigLIP's attention pooling ends in the joint space
        self.projection = getattr(model, "visual_projection", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(cast(Any, self.vision_model)(pixel_values=x).pooler_output)


class _HfText(nn.Module):
    """masked: upstream hides padding from attention (a causal tower without a mask gives the same)."""

    def __init__(self, model: Any, pad_id: int, masked: bool) -> None:
        super().__init__()
        self.text_model = model.text_model
        self.projection = getattr(model, "text_projection", None) or nn.Identity()
        self.pad_id = pad_id
        self.masked = masked

    def forward(self, ids: Tensor) -> Tensor:
        if next(self.text_model.parameters()).dtype != torch.float64:
            return self._embed(ids)
        with WideConstants():  # for the conformance vectors; never while a graph is traced
            return self._embed(ids)

    def _embed(self, ids: Tensor) -> Tensor:
        mask = (ids != self.pad_id).long() if self.masked else None
        return self.projection(cast(Any, self.text_model)(input_ids=ids, attention_mask=mask).pooler_output)


def _hf_towers(model: Any, pad_id: int, masked: bool) -> tuple[nn.Module, nn.Module]:
    # written-out attention traces and exports everywhere; the fused kernels do not
    model.set_attn_implementation("eager")
    causal = hasattr(model, "text_projection")  # CLIP; SigLIP's text tower sees both ways and has a head instead
    return _HfImage(model), _HfText(model, pad_id, masked and not causal)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _frozen(tower: nn.Module) -> nn.Module:
    return tower.float().eval().requires_grad_(False)


@torch.no_grad()
def _refuse_difference(exportable: Exportable, teacher: Any) -> None:
    """The towers fed as an app feeds them against the upstream forward fed as upstream feeds it."""
    towers, spec = exportable.towers, exportable.towers.contract.text
    assert towers.image is not None
    assert towers.text is not None
    assert spec is not None
    assert exportable.tokenizer_json is not None
    size = teacher.image.size
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8))
    ids = torch.from_numpy(Tokenizer(exportable.tokenizer_json, spec).encode(list(_PROBES)))
    pairs = {
        "image": (towers.image(pixels), teacher.encode_images(pixels).embedding),
        "text": (towers.text(ids), teacher.encode_texts(list(_PROBES)).embedding),
    }
    for tower, (found, expected) in pairs.items():
        difference = float((found - expected.cpu()).abs().max())
        if not difference <= _SAME:
            raise IntegrityError(
                f"the {tower} tower cut out of {teacher.name} differs from the upstream model by {difference:.2g} and "
                f"at most {_SAME:.0e} is allowed; a bundle would be another model, so report this with the model's name"
            )
