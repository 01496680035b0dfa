"""What all objectives share: checks, full precision, caption rows, projectors, divergences."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.distill.objectives.base import Needs, Objective, Outputs
from pocketvlm.distill.objectives.once import embeddings, once
from pocketvlm.distill.objectives.once import unit as unit
from pocketvlm.edge.errors import UsageError, unknown_name

_T = TypeVar("_T")


@dataclass(frozen=True)
class Widths:
    """Widths of one model's outputs. image_features, text_features: pooled, before the projection; None = none.
    taps: channels of each inner activation, by its name in `Outputs.taps`.
    parts: (width, logit scale) of each teacher whose embeddings lie side by side; empty: not known to be several.
    token_table: of the text tower's token embedding; text_blocks: how many blocks that tower has."""

    embedding: int
    image_features: int | None = None
    text_features: int | None = None
    taps: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[tuple[int, float], ...] = ()
    token_table: int | None = None
    text_blocks: int = 0

    def tap(self, objective: str, side: str, name: str) -> int:
        """Channels of one tap.

        Raises:
            UsageError: no taps at all. UnknownNameError: none of that name.
        """
        _refuse_absent(objective, side, name, self.taps)
        return self.taps[name]


@dataclass(frozen=True)
class Pairs:
    """The rows that have a caption: raw student and (if there is one) teacher embeddings [P, D], groups [P].
    keep: bool [B], which rows these are; None = all."""

    image: Tensor
    text: Tensor
    teacher_image: Tensor | None
    teacher_text: Tensor | None
    group: Tensor | None
    keep: Tensor | None = None

    def taught(self) -> tuple[Tensor, Tensor]:
        """The teacher's raw image and text embeddings [P, D], for a caller that gave `pairs` a teacher."""
        assert self.teacher_image is not None, "pairs() was given no teacher"
        assert self.teacher_text is not None, "pairs() was given no teacher"
        return self.teacher_image, self.teacher_text


class BatchObjective(Objective):
    """An objective over a gathered batch; subclasses write `terms`.

    Before `terms` runs: the teacher's presence and the batch size are checked, the teacher is detached, half-precision
    tensors become float32 and autocast is switched off, because similarities times a logit scale of 100 lose their
    order in bfloat16.

    name: as registered. formula, paper: the loss and its source in a line, as docs/objectives.md has them.
    minimum_rows: with fewer rows the value and the gradient are identically zero.
    coordinates: whether equally wide embeddings of student and teacher are compared number by number.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    coordinates: ClassVar[bool] = False
    minimum_rows: int = 1

    @classmethod
    def needs_with(cls, options: Mapping[str, Any]) -> Needs:
        """What it must be given when built with these options."""
        return cls.needs

    @abstractmethod
    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Named terms of a checked batch. For an objective without a teacher, `teacher` is the student again."""

    def forward(self, *, student: Outputs, teacher: Outputs | None = None) -> dict[str, Tensor]:
        """Named scalar terms; the objective's loss is their sum.

        Raises:
            UsageError: no teacher where one is needed, or fewer rows than `minimum_rows`.
        """
        rows = student.image.shape[0]
        if self.needs.momentum and teacher is None:
            raise UsageError(
                f"objective {self.name!r} was given no outputs of the momentum model, so its targets would be the "
                "student's own; give the moving average's outputs for the same batch as `teacher`"
            )
        if self.needs.teacher and teacher is None:
            raise UsageError(
                f"objective {self.name!r} was given no teacher outputs but learns from them; name a teacher in the "
                "recipe or leave the objective out"
            )
        if rows < self.minimum_rows:
            raise UsageError(
                f"objective {self.name!r} was given a batch of {rows} but compares the rows of a batch with each "
                f"other; its value and gradient would be identically zero, so use a batch of at "
                f"least {self.minimum_rows}"
            )
        with torch.autocast(student.image.device.type, enabled=False):
            wide = once(lambda: _converted(student, detach=False), "student", student)
            if teacher is None:
                return self.terms(wide, wide)
            return self.terms(wide, once(lambda: _converted(teacher, detach=True), "teacher", teacher))

    def zero(self, student: Outputs) -> Tensor:
        """Exactly 0, connected to everything that the objective could have trained, so that no parameter is unused."""
        parts = [student.image, student.text, student.bank, student.image_features, student.masked_image]
        parts += [student.logit_scale, student.logit_bias, student.masked_words, student.token_table, student.regions]
        parts += [student.class_logits, student.taught_logits]
        tensors: Iterable[Tensor] = [part for part in (*parts, *self.parameters()) if part is not None]
        total = student.image.new_zeros(())
        for tensor in tensors:
            total = total + tensor.reshape(-1)[:0].sum()
        return total

    def pairs(self, student: Outputs, teacher: Outputs | None) -> Pairs | None:
        """Captioned rows, or None when fewer than `minimum_rows` of them take part.

        Raises:
            UsageError: the student has texts and the teacher has none.
        """
        if student.text is None:
            return None
        if teacher is not None and teacher.text is None:
            raise UsageError(
                f"objective {self.name!r} was given student texts but no teacher texts; there is no target for "
                "them, so use a teacher with a text tower (or cached text embeddings)"
            )
        found = once(lambda: _captioned(student, teacher), "pairs", student, teacher)
        return None if found is None or len(found.image) < self.minimum_rows else found


def tap_of(objective: str, outputs: Outputs, side: str, name: str) -> Tensor:
    """The inner activation `name` of "student" or "teacher".

    Raises:
        UsageError: no taps at all. UnknownNameError: none of that name.
    """
    _refuse_absent(objective, side, name, outputs.taps)
    return outputs.taps[name]


def _refuse_absent(objective: str, side: str, name: str, taps: Mapping[str, object]) -> None:
    if name not in taps:
        if not taps:
            raise UsageError(
                f"objective {objective!r} was given {side} outputs without any tap; there are no token maps to "
                f"compare, so put the map into Outputs.taps[{name!r}]"
            )
        raise unknown_name(f"{side} tap of objective {objective!r}", name, taps)


def seeded_generator(seed: int, tag: str) -> torch.Generator:
    """Of train-only parameters: its stream depends on (seed, tag) alone."""
    stream = int.from_bytes(hashlib.sha256(f"projector/{seed}/{tag}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(stream)


class Projector(nn.Module):
    """Train-only map from the student's width to the teacher's, [B, in] -> [B, out].

    Its start depends on (seed, tag) alone, never on the global generators: equal on every rank, and rebuilt equal on
    resume. It is part of the objective's state dict, and never of the exported student.

    kind: "linear", or "mlp" (Linear, GELU, Linear, `in` hidden units). Weights are drawn from N(0, 1/in), biases 0.
    """

    def __init__(self, width_in: int, width_out: int, *, seed: int, tag: str, kind: str = "linear") -> None:
        super().__init__()
        choice("projector", kind, ("linear", "mlp"))
        generator = seeded_generator(seed, tag)
        widths = [width_in, width_out] if kind == "linear" else [width_in, width_in, width_out]
        pairs = list(itertools.pairwise(widths))
        self.weights = nn.ParameterList(torch.randn(o, i, generator=generator) * i**-0.5 for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(o) for _, o in pairs)

    def forward(self, x: Tensor) -> Tensor:
        width = self.weights[0].shape[1]
        if x.shape[-1] != width:
            raise UsageError(
                f"a projector built for {width}-wide student outputs was given {x.shape[-1]}-wide ones; build the "
                "objective with the widths of this very student"
            )
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = F.linear(F.gelu(x) if index else x, weight.to(x.dtype), bias.to(x.dtype))
        return x


def projector_if_needed(width_in: int, width_out: int, *, seed: int, tag: str) -> nn.Module:
    """A linear `Projector` where the widths differ, else the identity without parameters."""
    return nn.Identity() if width_in == width_out else Projector(width_in, width_out, seed=seed, tag=tag)


def kl_rows(target_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target_logits) || softmax(logits)) over the last axis, mean over the other rows."""
    target = target_logits.log_softmax(dim=-1)
    return (target.exp() * (target - logits.log_softmax(dim=-1))).sum(dim=-1).mean()


def cross_entropy_rows(target_logits: Tensor, logits: Tensor) -> Tensor:
    """-sum softmax(target_logits) log softmax(logits) over the last axis, mean over the other rows."""
    return -(target_logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def own_scale(log_scale: nn.Parameter) -> Tensor:
    """Exponential of a trained log scale, which is first put back into [1, 100]."""
    with torch.no_grad():
        log_scale.clamp_(0.0, math.log(100.0))
    return log_scale.exp()


def inverse_temperature(temperature: float | None, outputs: Outputs) -> Tensor | float:
    """1 / temperature, or the model's own logit scale when no temperature is set."""
    return outputs.logit_scale if temperature is None else 1.0 / temperature


def share(option: str, value: float) -> float:
    """Check a number that must lie in [0, 1].

    Raises:
        UsageError: outside, or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UsageError(
            f"objective option {option!r} is {value!r} but must be a number from 0 to 1; it mixes two targets, so give "
            "the part of one of them"
        )
    return value


def choice(option: str, value: str, allowed: Iterable[str]) -> str:
    """Check an option given by name.

    Raises:
        UnknownNameError: `value` is not one of `allowed`.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise unknown_name(f"value of objective option {option!r}", str(value), allowed)
    return value


def positive(option: str, value: float | None) -> float | None:
    """Check a number that must be above zero (None stays None).

    Raises:
        UsageError: zero, negative, infinite, or not a number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        raise UsageError(
            f"objective option {option!r} is {value!r} but must be a number above 0; the loss would not be defined, so "
            "give a positive one"
        )
    return value


def not_negative(option: str, value: float) -> float:
    """Check a weight, which may be 0.

    Raises:
        UsageError: negative, infinite, or not a number.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UsageError(
            f"objective option {option!r} is {value!r} but must be a number from 0; the student would be pushed away "
            "from what it shall learn, so give 0 or a positive weight"
        )
    return value


def whole_number(option: str, value: int, least: int) -> int:
    """Check a count, which must be at least `least`.

    Raises:
        UsageError: fewer, or not a whole number.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(
            f"objective option {option!r} is {value!r} but must be a whole number from {least}; nothing could be "
            "compared with fewer, so correct it"
        )
    return value


def _captioned(student: Outputs, teacher: Outputs | None) -> Pairs | None:
    """The rows with a caption for the student, and for the teacher if there is one; None without any."""
    assert student.text is not None, "its caller has looked"
    keep, image = student.has_text, student.image
    theirs = None if teacher is None else teacher.has_text
    if theirs is not None and (keep is None or not torch.equal(keep, theirs)):
        keep = theirs if keep is None else keep & theirs
    count = len(image) if keep is None else int(keep.sum())
    if count == 0:
        return None
    all_of_them = count == len(image)  # then nothing is copied

    def rows(value: _T) -> _T:
        if all_of_them or not isinstance(value, Tensor):
            return value
        return once(lambda: value[keep], "rows", value, keep)  # type: ignore[return-value]

    found = Pairs(
        image=rows(image),
        text=rows(student.text),
        teacher_image=rows(teacher.image) if teacher is not None else None,
        teacher_text=rows(teacher.text) if teacher is not None else None,
        group=rows(student.group),
        keep=keep,
    )
    embeddings(found.image, found.text, found.teacher_image, found.teacher_text)
    return found


def _converted(outputs: Outputs, *, detach: bool) -> Outputs:
    def convert(value: object) -> object:
        if isinstance(value, dict):
            return {name: convert(inner) for name, inner in value.items()}
        if not isinstance(value, Tensor):
            return value
        if detach:
            value = value.detach()
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    changed = {field.name: convert(getattr(outputs, field.name)) for field in dataclasses.fields(outputs)}
    found = Outputs(**changed)  # type: ignore[arg-type]
    embeddings(found.image, found.text, found.bank, found.masked_image)
    return found
