"""Generative teachers by name, and the kit's own models as such: one protocol for both (`teachers.vlm.VlmTeacher`).

teacher = load_vlm_teacher("vlm:runs/talking-teacher")     what save_vlm wrote
teacher = load_vlm_teacher("hf-vlm:FOLDER")                what transformers' save_pretrained wrote
teacher = open_vlm_teacher("recorded:answers.jsonl")       those, or what a teacher said that is not here
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketvlm.distill.vlm.kept_teacher import SHIPPED, KeptTeacher, said_path, shipped_folder
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students.vlm.io import MANIFEST, TOKENIZER, load_vlm
from pocketvlm.students.vlm.model import Vlm, rows_of
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.files import tensors_sha256
from pocketvlm.teachers.vlm.base import Pair, Scored, VlmTeacher, check_asked, completed, vocabulary_id
from pocketvlm.teachers.vlm.hf import load_hf_vlm

KINDS = ("vlm:FOLDER", "hf-vlm:FOLDER", "hf-vlm:ORG/NAME")
ALL_KINDS = (SHIPPED, "FOLDER", "recorded:FILE.jsonl", *KINDS)


def student_vocabulary(model: Vlm) -> str:
    """`vocabulary_id` of a student's tokenizer."""
    return vocabulary_id({piece: number for number, piece in enumerate(model.tokenizer.pieces())})


def answer_ends(model: Vlm, answer: str) -> tuple[int, ...]:
    """`Scored.ends` of an answer in a student's tokens."""
    return completed(model.tokenizer.offsets(answer), len(answer))


def require_same_vocabulary(student: Vlm, teacher: VlmTeacher) -> None:
    """Before losses over distributions (`losses.token_divergence`): equal sizes alone are no proof.

    Raises:
        UsageError: token i of the teacher is another one than token i of the student.
    """
    if student_vocabulary(student) != teacher.vocabulary:
        raise UsageError(
            f"teacher {teacher.name!r} has another vocabulary ({teacher.vocab_size} tokens) than the student "
            f"({student.tokenizer.vocab_size}); entry i of their distributions would mean different tokens, so build "
            "the student with the teacher's tokenizer, or learn across tokenizers: distill.vlm.aligned compares spans "
            "of the answer, distill.vlm.genrecal recalibrates hidden states"
        )


class BuiltinVlm:
    """A frozen `Vlm`. batch: pairs to a forward pass."""

    def __init__(self, model: Vlm, name: str, *, batch: int = 64) -> None:
        self.model, self.name, self.batch = model.eval().requires_grad_(False), name, batch
        self.vocabulary = student_vocabulary(model)
        self.vocab_size, self.width = model.tokenizer.vocab_size, model.config.decoder.width
        whole = hashlib.sha256(model.config.model_dump_json().encode() + model.tokenizer.json)
        self.fingerprint = hashlib.sha256(
            f"{whole.hexdigest()}:{tensors_sha256(model.state_dict())}".encode()
        ).hexdigest()
        self.licences = model.config.licences

    @property
    def device(self) -> torch.device:
        return self.model.device

    def answer(self, pixels: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """As `Vlm.generate`, for any number of pictures of the model's size.

        Raises:
            UsageError: as there, or pixels that are no pictures.
        """
        self._check(pixels, prompts)
        said: list[str] = []
        with full_float32():
            for start in range(0, len(prompts), self.batch):
                part = slice(start, start + self.batch)
                said += self.model.generate(pixels[part].to(self.device), prompts[part], max_new_tokens=max_new_tokens)
        return said

    @torch.no_grad()
    def read(self, pixels: Tensor, pairs: Sequence[Pair]) -> list[Scored]:
        """As `VlmTeacher.read`, for pictures of the model's size.

        Raises:
            UsageError: pixels that are no pictures of this size, an empty answer, or a pair longer than the context.
        """
        self._check(pixels, [question for question, _ in pairs])
        scored: list[Scored] = []
        for start in range(0, len(pairs), self.batch):
            part = slice(start, start + self.batch)
            scored += self._read(pixels[part].to(self.device), pairs[part])
        return scored

    def _read(self, pixels: Tensor, pairs: Sequence[Pair]) -> list[Scored]:
        model, tokenizer = self.model, self.model.tokenizer
        talks = [(tokenizer.question(question), tokenizer.answer(answer)) for question, answer in pairs]
        for (asked, _), (_, ids) in zip(pairs, talks):
            if len(ids) < 2:
                raise UsageError(
                    f"the answer to {asked[:60]!r} is empty, so there is nothing to read; leave the pair out"
                )
        length = max(len(question) + len(answer) - 1 for question, answer in talks)
        rows = rows_of([[talk] for talk in talks], length).to(self.device)
        with full_float32():
            hidden = model.hidden(pixels, rows).float()
        before = hidden.shape[1] - length
        scored = []
        for place, (question, answer) in enumerate(talks):
            whole = hidden[place, : before + len(question) + len(answer) - 1]
            scored.append(
                Scored(
                    ids=torch.tensor(answer, device=self.device),
                    ends=answer_ends(model, pairs[place][1]),
                    logits=self.head(whole[len(whole) - len(answer) :]),
                    hidden=whole,
                    visual=torch.arange(1, before, device=self.device),
                )
            )
        return scored

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] to logits [..., V]; gradients pass through to `hidden`."""
        with full_float32():
            return self.model.decoder.logits(hidden.to(self.model.decoder.embed_tokens.weight.dtype)).float()

    def _check(self, pixels: Tensor, texts: Sequence[str]) -> None:
        check_asked(pixels, texts)
        side = self.model.config.vision.size
        if tuple(pixels.shape[1:3]) != (side, side):
            raise UsageError(
                f"pictures of {pixels.shape[1]} x {pixels.shape[2]} pixels were given to {self.name!r}, which takes "
                f"{side} x {side}; places would be mistaken, so resize them first"
            )


@dataclasses.dataclass(frozen=True)
class RecordedTeacher:
    """Answers about a user's pictures that a model gave earlier: JSON Lines, as `teachers.vlm.recorded` reads them."""

    path: Path


AnyTeacher = VlmTeacher | KeptTeacher | RecordedTeacher


def open_vlm_teacher(spec: str | Path, *, device: str | torch.device = "cpu", **options: Any) -> AnyTeacher:
    """A teacher of any kind by its name: what `load_vlm_teacher` takes, "recorded:FILE.jsonl", "openmoji-talking", or a
    bare folder of `save_vlm` or of what a teacher said in a run (its folder `kept`).

    device, options: of a model, as `load_vlm_teacher`.

    Raises:
        UnknownNameError: none of these. UsageError: as `load_vlm_teacher`, or no such file of answers.
    """
    name = str(spec)
    kind, _, target = name.partition(":")
    if kind == "hf-vlm" and target:
        return load_vlm_teacher(name, device=device, **options)
    folder = shipped_folder() if name == SHIPPED else Path(target if kind == "vlm" else name)
    if (folder / MANIFEST).is_file():
        return load_vlm_teacher(f"vlm:{folder}", device=device, **options)
    if options:
        raise _only_hf(name, options)
    if kind == "recorded" and target:
        if not Path(target).is_file():
            raise UsageError(
                f"teacher {name!r} names no file; give JSON Lines with id, question and answer (docs/vlm-teachers.md)"
            )
        return RecordedTeacher(Path(target))
    if (folder / TOKENIZER).is_file() and said_path(folder) is not None:
        return KeptTeacher(folder)
    if (folder / "config.json").is_file():
        raise UsageError(
            f"teacher {name!r} is a folder of a Hugging Face model, which is named hf-vlm:FOLDER; write "
            f"'hf-vlm:{folder}'"
        )
    raise unknown_name("generative teacher", name, ALL_KINDS)


def load_vlm_teacher(
    spec: str, *, device: str | torch.device = "cpu", batch: int | None = None, **options: Any
) -> VlmTeacher:
    """A generative teacher by name: "vlm:FOLDER", "hf-vlm:FOLDER" or "hf-vlm:ORG/NAME".

    batch: pairs to a forward pass; None takes each kind's own. options: as `load_hf_vlm`; "vlm" takes none.

    Raises:
        UnknownNameError: no such kind. UsageError: an option that the kind does not take, or as the loaders.
        MissingExtraError: transformers is not installed. IntegrityError: damaged files.
    """
    kind, colon, target = spec.partition(":")
    if kind not in ("vlm", "hf-vlm") or not colon or not target:
        raise unknown_name("generative teacher", spec, KINDS)
    size: dict[str, Any] = {} if batch is None else {"batch": batch}
    if kind == "hf-vlm":
        return load_hf_vlm(target, device=device, **size, **options)
    if options:
        raise _only_hf(spec, options)
    return BuiltinVlm(load_vlm(Path(target)).to(pick_device(device)), spec, **size)


def _only_hf(spec: str, options: Mapping[str, Any]) -> UsageError:
    return UsageError(
        f"teacher {spec!r} was given {', '.join(sorted(options))}, which only hf-vlm takes; it would be ignored, so "
        "leave it out"
    )
