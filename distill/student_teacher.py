"""The teachers of a recipe, and a trained student as one: "student:FOLDER" beside the specs of `teachers.load_teacher`.

That lives here because teachers and students know nothing of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.progress import Reporter, Stages
from pocketvlm.distill.recipe import Recipe
from pocketvlm.edge.contract import TextSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import Student, TowerOutput, load_student
from pocketvlm.students.student import TOKENS, weights_digest
from pocketvlm.teachers.base import Teacher, TeacherOutput
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.ensemble import Ensemble, load_ensemble
from pocketvlm.teachers.files import make_fingerprint

KIND = "student"


def open_teacher(
    spec: str,
    *,
    device: str = "cpu",
    allow_download: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Teacher:
    """`teachers.load_teacher`, and "student:FOLDER" for a run or student folder.

    Raises:
        as `load_teacher` and `students.load_student`.
    """
    kind, _, folder = spec.partition(":")
    if kind == KIND:
        if not folder:
            raise UsageError(f"teacher {spec!r} does not say which one; write student:FOLDER")
        return StudentTeacher(load_student(folder), name=spec, device=device)
    from pocketvlm.teachers import load_teacher

    return load_teacher(
        spec, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code, progress=progress
    )


def open_teachers(
    recipe: Recipe, report: Reporter, opener: Callable[..., Teacher] = open_teacher
) -> tuple[list[Teacher], Ensemble | None]:
    """The teachers of a recipe, and the one that they are together; none of either without the section.

    opener: in place of `open_teacher`.

    Raises:
        as `open_teacher` does.
    """
    section = recipe.teacher
    if section is None:
        return [], None
    with Stages(report, "teacher") as progress:
        return load_ensemble(
            section.specs,
            opener,
            device=recipe.train.device,
            allow_download=section.allow_download,
            trust_remote_code=section.trust_remote_code,
            progress=progress,
        )


class StudentTeacher:
    """A student, frozen and in eval mode, behind the `Teacher` protocol; see `teachers.base` for the members."""

    def __init__(self, student: Student, *, name: str, device: str = "cpu") -> None:
        self.device = pick_device(device)
        self.student = student.to(self.device).eval().requires_grad_(False)
        contract = student.contract
        self.name = name
        self.space_id = contract.space_id
        self.dim = student.embed_dim
        self.logit_scale, self.logit_bias = contract.logit_scale, 0.0
        self.image, self.licences = student.image_spec, student.licences
        self.fingerprint = make_fingerprint(
            weights=weights_digest(student), image=self.image, tokenizer=student.text_spec.tokenizer_sha256
        )
        self._tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)

    @property
    def text(self) -> TextSpec:
        return self.student.text_spec

    def tokenizer_json(self) -> bytes:
        return self.student.tokenizer_json

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        with full_float32():
            return _output(self.student.encode_image(pixels.to(self.device)))

    @torch.no_grad()
    def encode_image_tokens(self, pixels: Tensor) -> TeacherOutput:
        """As `encode_images`, and taps["tokens"] [B, N, W]: the last map before pooling, row by row.

        Raises:
            UsageError: the tower's tokens are no square grid.
        """
        with full_float32():
            out = self.student.encode_image(pixels.to(self.device), taps=(TOKENS,))
        tokens = out.taps[TOKENS].float()
        tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
        if math.isqrt(tokens.shape[1]) ** 2 != tokens.shape[1]:
            raise UsageError(
                f"objectives on token maps were asked of {self.name}, whose {tokens.shape[1]} tokens are no square "
                "grid, so they have no places to compare; leave these objectives out"
            )
        found = _output(out)
        return TeacherOutput(found.embedding, found.features, {TOKENS: tokens})

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        ids = torch.from_numpy(self._tokenizer.encode(list(texts))).to(self.device)
        with full_float32():
            return _output(self.student.encode_text(ids))


def _output(out: TowerOutput) -> TeacherOutput:
    return TeacherOutput(F.normalize(out.embedding.float(), dim=-1), out.features.float())
