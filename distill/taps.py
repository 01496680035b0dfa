"""Inner activations that objectives read: which ones a recipe asks for, whether they can be had, and their widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.distill.objectives import Widths, objective_taps
from pocketvlm.distill.objectives.matryoshka import listed_dims
from pocketvlm.distill.objectives.matryoshka_2d import exit_tap, listed_layers, listed_pairs
from pocketvlm.distill.recipe import ObjectiveSection, Recipe
from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.students import Student, TowerOutput
from pocketvlm.students.student import TOKENS, recorded


@dataclass(frozen=True)
class Taps:
    """Names of taps, each once. image, text: parts of the student's towers. teacher: of its cache."""

    image: tuple[str, ...]
    text: tuple[str, ...]
    teacher: tuple[str, ...]


def asked_taps(recipe: Recipe) -> Taps:
    """What the recipe's objectives ask for together, as `objective_taps` says of each."""
    found: dict[str, dict[str, None]] = {"student_tap": {}, "text_tap": {}, "teacher_tap": {}}
    for spec in recipe.objectives:
        for option, name in objective_taps(spec.name, spec.options).items():
            found[option][name] = None
        if spec.name == "matryoshka-2d":
            found["text_tap"] |= dict.fromkeys(map(exit_tap, listed_layers(spec.options)))
    return Taps(*(tuple(found[option]) for option in ("student_tap", "text_tap", "teacher_tap")))


def stand_in_widths(spec: ObjectiveSection) -> Widths:
    """Widths to build an objective with before anything is loaded: wide enough for every listed prefix.

    Raises:
        UsageError: options that cannot work.
    """
    asked = objective_taps(spec.name, spec.options)
    taps = {f"text.{name}" if option == "text_tap" else name: 8 for option, name in asked.items()}
    width = min(max([8, *listed_dims(spec.options), *(m for _, m in listed_pairs(spec.options))]), 1 << 14)
    if spec.name == "matryoshka-2d":
        taps |= {f"text.{exit_tap(layer)}": width for layer in listed_layers(spec.options)}
    return Widths(width, 8, 8, taps, token_table=8, text_blocks=48)


def tap_problems(spec: ObjectiveSection, here: str) -> Iterator[str]:
    """What is wrong with the taps of one objective of a recipe, before anything is loaded."""
    try:
        asked = objective_taps(spec.name, spec.options)
    except UsageError:
        return  # said when it is built
    if asked and spec.batch == "texts":
        yield f"{here} reads inner activations of pictures, which a text-only batch has not; use batch: pairs"
    teacher = asked.get("teacher_tap", TOKENS)
    if teacher != TOKENS:
        yield f"{here}: " + str(unknown_name("teacher tap", teacher, [TOKENS])).rstrip(".")


def shared_problems(recipe: Recipe) -> Iterator[str]:
    """What is wrong with the objectives of a recipe together."""
    from pocketvlm.distill.fusion import asked_pieces
    from pocketvlm.distill.masking import asked_masking
    from pocketvlm.distill.regions import asked_regions

    try:
        taps = asked_taps(recipe)
    except UsageError:
        return  # said of the objective itself
    for asked in (asked_masking, asked_pieces, asked_regions):
        try:
            asked(recipe)
        except UsageError as error:
            yield str(error).rstrip(".")
    if recipe.teacher is not None and recipe.teacher.token_grid is not None and not taps.teacher:
        yield "teacher.token_grid is set and no objective reads the teacher's tokens; leave it out"


def encode_image(student: Student, x: Tensor, cut: int | None, taps: Sequence[str] = ()) -> TowerOutput:
    """The image tower on pixels, or on what lies below `cut` (`train.cut_after_block`), with its taps."""
    if cut is None:
        return student.encode_image(x, taps=taps)
    with recorded(student.image_tower, taps) as seen:
        embedding, features = student.image_tower.from_block(x, cut)
    return TowerOutput(embedding, features, seen)


@torch.no_grad()
def tap_widths(student: Student, taps: Taps, cut: int | None) -> dict[str, int]:
    """Channels of each tap of the student by its name in `Outputs.taps`, asked by running it on one gray picture.

    Raises:
        UnknownNameError: no such part. UsageError: a part that lies below the cut, or that the forward never calls.
    """
    if not (taps.image or taps.text):
        return {}
    for name in taps.image:
        if cut is not None and _below(name, cut):
            raise UsageError(
                f"tap {name!r} lies below train.cut_after_block {cut}, where activations are computed once and their "
                "parts are not kept, so there would be nothing to read; tap a later part, or cut earlier"
            )
    training, device = student.training, student.log_scale.device
    student.eval()
    try:
        x = gray(student)
        x = x if cut is None else student.image_tower.until_block(x, cut)
        seen: dict[str, Tensor] = dict(encode_image(student, x, cut, taps.image).taps)
        if taps.text:
            ids = torch.ones(1, student.text_spec.context_length, dtype=torch.int32, device=device)
            seen |= text_taps(student.encode_text(ids, taps=taps.text).taps, student.text_spec.context_length)
    finally:
        student.train(training)
    return {name: value.shape[2] if value.ndim == 3 else value.shape[1] for name, value in seen.items()}


def text_length(ids: Tensor, pad_id: int) -> int:
    """Places that hold every token of ids [N, L], at least 1: up to the last that is no padding, because CLIP's padding
    is also the token of "!", inside a text."""
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return max(1, int(((ids != pad_id) * places).max()))


def text_taps(seen: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Token sequences of the text tower under their names in `Outputs.taps`, padded with zeros to `length`.

    All ranks and steps then hold one shape, however far a batch's padding was cut.
    """
    return {
        f"text.{name}": F.pad(value, (0, 0, 0, length - value.shape[1])) if value.ndim == 3 else value
        for name, value in seen.items()
    }


def gray(student: Student) -> Tensor:
    """One picture, to ask a student for its shapes: uint8 [1, S, S, 3]."""
    size = student.image_spec.size
    return torch.full((1, size, size, 3), 128, dtype=torch.uint8, device=student.log_scale.device)


def _below(name: str, cut: int) -> bool:
    part = name.split(".")
    if part[0] != "trunk" or len(part) < 2:
        return False
    return part[1] in ("conv_stem", "bn1") or (part[1] == "blocks" and part[2:3] != [] and int(part[2]) <= cut)
