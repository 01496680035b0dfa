"""The student: two towers, a logit scale, and the contract that fixes what goes in and what comes out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec, ModelContract, TextSpec, identity
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.config import StudentConfig
from pocketvlm.students.image import ImageTower
from pocketvlm.students.inherit import text_licences
from pocketvlm.students.pretrained import weights_licences
from pocketvlm.students.task import ClassHeads
from pocketvlm.students.text import TextTower

# the tap that every tower has: its last map or token sequence before pooling
TOKENS = "tokens"
# the tap "exit.N" of a text tower is its embedding after N layers
EXIT = "exit."


class TowerOutput(NamedTuple):
    """One tower's outputs: embedding [B, D] (raw, in the joint space), features [B, F] (pooled, before the
    projection), and the inner activations asked for by name."""

    embedding: Tensor
    features: Tensor
    taps: dict[str, Tensor]


class Student(nn.Module):
    """A dual encoder. Made by `build_student` or `load_student`.

    config: what it was built from. image_spec, text_spec: its inputs. tokenizer_json: the tokenizer file's bytes.
    log_scale: logarithm of the cosine's multiplier (a trained parameter; `logit_scale` is its exponential).
    space_id: coordinate system of the embeddings; None means "its own", named after the weights.
    heads: the class heads of a task student, which is deployed as a classifier; None for a dual encoder.
    """

    log_scale: nn.Parameter

    def __init__(
        self,
        *,
        config: StudentConfig,
        image_tower: ImageTower,
        text_tower: TextTower,
        image_spec: ImageSpec,
        text_spec: TextSpec,
        tokenizer_json: bytes,
        embed_dim: int,
        space_id: str | None,
        heads: ClassHeads | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.image_spec = image_spec
        self.text_spec = text_spec
        self.tokenizer_json = tokenizer_json
        self.embed_dim = embed_dim
        self.space_id = space_id
        self.heads = heads
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.logit_scale)))

    @property
    def logit_scale(self) -> Tensor:
        """Positive scalar multiplier of the cosine, with gradient."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale_(self, maximum: float = 100.0) -> None:
        """Keep the multiplier in [1, maximum]; CLIP calls this after every optimizer step."""
        self.log_scale.clamp_(0.0, math.log(maximum))

    @property
    def contract(self) -> ModelContract:
        """Made afresh, because the weights' digest and the logit scale change with every optimizer step."""
        name = self.config.name
        model_id = identity(name, weights_digest(self))
        if self.heads is not None:
            labels = self.heads.classes.labels
            return ModelContract(
                kind="classifier",
                name=name,
                model_id=model_id,
                space_id=model_id,
                embed_dim=len(labels),
                dims=(len(labels),),
                image=self.image_spec,
                text=None,
                logit_scale=1.0,
                normalized=False,
                labels=labels,
            )
        return ModelContract(
            kind="dual",
            name=name,
            model_id=model_id,
            space_id=self.space_id or model_id,
            embed_dim=self.embed_dim,
            dims=tuple(dict.fromkeys((*self.config.dims, self.embed_dim))),
            image=self.image_spec,
            text=self.text_spec,
            # on the CPU, where the loaded student will be: a GPU's exponential differs in the last bit
            logit_scale=float(self.log_scale.detach().cpu().exp()),
        )

    @property
    def licences(self) -> tuple[tuple[str, str, str], ...]:
        """(what, licence, attribution) rows of the weights that this student started from."""
        config = self.config
        return (*config.licences, *weights_licences(config.image.weights), *text_licences(config.text.weights))

    def encode_image(self, pixels: Tensor, *, taps: Sequence[str] = ()) -> TowerOutput:
        """pixels: uint8 [B, S, S, 3] RGB, made by `edge.preprocess` under `image_spec`.

        taps: names of submodules of the image tower ("trunk.blocks.3") whose outputs are returned too, or "tokens":
        the last map before pooling ([B, C, H, W], or [B, N, W] without class and register tokens).

        Raises:
            UsageError: another shape or dtype, or a tap that takes no part. UnknownNameError: no such submodule.
        """
        size = self.image_spec.size
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != (size, size, 3):
            raise UsageError(
                f"image tower of {self.config.name!r} was given {pixels.dtype} {list(pixels.shape)} but takes "
                f"torch.uint8 [batch, {size}, {size}, 3]; the embedding would be meaningless, so prepare the pictures "
                "with edge.preprocess.load_image and this student's image_spec"
            )
        with recorded(self.image_tower, taps) as seen:
            embedding, features = self.image_tower(pixels)
        return TowerOutput(embedding, features, seen)

    def encode_text(self, ids: Tensor, *, taps: Sequence[str] = ()) -> TowerOutput:
        """ids: int32 [B, L], made by `edge.tokenizer` under `text_spec`; L is context_length, or less where only
        padding was cut off. taps: as in `encode_image`; "tokens" are the last layer's [B, L, W], padding included;
        "exit.N" is the embedding [B, D] after N layers.

        Raises:
            UsageError: another shape or dtype, or a tap that takes no part. UnknownNameError: no such submodule.
        """
        length = self.text_spec.context_length
        if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 2 or not 0 < ids.shape[1] <= length:
            raise UsageError(
                f"text tower of {self.config.name!r} was given {ids.dtype} {list(ids.shape)} but takes torch.int32 "
                f"[batch, {length}]; positions would be wrong, so encode the texts with this student's tokenizer"
            )
        with recorded(self.text_tower, taps) as seen:
            embedding, features = self.text_tower(ids)
        return TowerOutput(embedding, features, seen)

    def forward(
        self, pixels: Tensor | None = None, ids: Tensor | None = None
    ) -> tuple[TowerOutput | None, TowerOutput | None]:
        """Both towers in one call, which is what a data-parallel wrapper hooks; None in gives None out."""
        image = None if pixels is None else self.encode_image(pixels)
        return image, None if ids is None else self.encode_text(ids)


def weights_digest(module: nn.Module) -> str:
    """sha256 hex over names, dtypes, shapes and bytes of the whole state dict, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_widths(student_dim: int, teacher_dim: int, *, student: str = "student", teacher: str = "teacher") -> None:
    """Refuse a pair whose joint embeddings have different widths.

    Raises:
        UsageError: the widths differ.
    """
    if student_dim != teacher_dim:
        raise UsageError(
            f"{student!r} gives {student_dim}-wide embeddings but {teacher!r} gives {teacher_dim}-wide ones; they "
            f"could not be compared in one space, so build the student with embed_dim={teacher_dim} or use objectives "
            "that own a projector"
        )


@contextmanager
def recorded(tower: ImageTower | TextTower, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named submodules, and "tokens", during one forward, through hooks that are removed afterwards.

    Raises:
        UnknownNameError: no such submodule. UsageError: its output is not one tensor, or the forward did not call it.
    """
    seen: dict[str, Tensor] = {}
    known = dict(tower.named_modules()) if names else {}
    undo: list[Callable[[], None]] = []
    try:
        for name in names:
            if name == TOKENS:
                undo.append(tower.record_tokens(lambda tokens: seen.update({TOKENS: tokens})))
                continue
            if name.startswith(EXIT) and name.removeprefix(EXIT).isdigit():
                undo.append(_record_exit(tower, name, seen))
                continue
            if not name or name not in known:
                raise unknown_name("tap", name, [TOKENS, *(key for key in known if key)])
            undo.append(known[name].register_forward_hook(_keep(seen, name)).remove)
        yield seen
        for name in names:
            if name not in seen:
                raise UsageError(
                    f"tap {name!r} is a part of the tower that the forward never calls as a whole, so it has no "
                    "output; tap one of its parts, or 'tokens' for the last map"
                )
    finally:
        for action in undo:
            action()


def _record_exit(tower: ImageTower | TextTower, name: str, seen: dict[str, Tensor]) -> Callable[[], None]:
    if not isinstance(tower, TextTower):
        raise UsageError(
            f"tap {name!r} was asked of an image tower, whose stages have other widths than its projection takes; "
            "early exits are for the text tower, so tap a part of the image tower by its name"
        )
    return tower.record_exit(int(name.removeprefix(EXIT)), lambda value: seen.update({name: value}))


def _keep(seen: dict[str, Tensor], name: str):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            raise UsageError(f"tap {name!r} gives a {type(output).__name__}, not one tensor; tap a submodule of it")
        seen[name] = output

    return hook
