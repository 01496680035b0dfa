"""What a teacher makes of a user's pictures: answers that it writes down, and how probable it finds given ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample, Turn
from pocketvlm.distill.vlm.across import Heard, heard_answers
from pocketvlm.distill.vlm.conversations import vlm_image_spec
from pocketvlm.distill.vlm.teachers import BuiltinVlm
from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers.vlm import VlmTeacher

_T = TypeVar("_T")
_ASKED = 16
# pixels a side of what a Hugging Face teacher is shown, which its processor resizes
_SIDE = 448


def write_answers(
    teacher: VlmTeacher,
    samples: Sequence[Sample],
    ask: Sequence[str],
    path: Path,
    report: BadSampleReport,
    *,
    max_new_tokens: int = 64,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Ask about every picture and write the answers down, in the layout that `recorded_answers` reads.

    Of a conversation each question is asked alone, a system message before the first. A question that the teacher
    cannot take (too long, or with a marker of its own) is counted as "not-answered".

    Args:
        samples: pictures, with conversations unless `ask` has questions about all of them.
    """
    part_file = path.with_name(f".{path.name}.part")
    pairs = [(sample, text) for sample in samples for text in ask or [question for question, _ in _pairs(sample)]]
    with open(part_file, "w", encoding="utf-8") as file:
        for start in range(0, len(pairs), _ASKED):
            part = pairs[start : start + _ASKED]
            pixels, texts = _pixels(teacher, [sample for sample, _ in part]), [text for _, text in part]
            said = _tried(lambda at: teacher.answer(pixels[at], texts[at], max_new_tokens=max_new_tokens), len(part))  # noqa: B023
            for (sample, question), answer in zip(part, said):
                if answer is None:
                    report.add("not-answered", sample.uid, f"the teacher does not take the question {question[:60]!r}")
                    continue
                row = {"id": sample.uid, "question": question, "answer": answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            say(f"teacher's answers: {start + len(part)} of {len(pairs)}")
    # the file is there when all of them are
    part_file.replace(path)


def heard_samples(
    teacher: VlmTeacher,
    samples: Sequence[Sample],
    report: BadSampleReport,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Heard]:
    """By uid of samples with one turn each; those that the teacher cannot read are counted as "not-read".

    Raises:
        UsageError: it can read none. BadSampleError: as the report refuses.
    """
    found: dict[str, Heard] = {}
    for start in range(0, len(samples), _ASKED):
        part = samples[start : start + _ASKED]
        pixels, pairs = _pixels(teacher, part), [pair for sample in part for pair in _pairs(sample)]
        for sample, one in zip(part, _tried(lambda at: heard_answers(teacher, pixels[at], pairs[at]), len(part))):  # noqa: B023
            if one is None:
                report.add("not-read", sample.uid, "the teacher does not take this question with this answer")
            else:
                found[sample.uid] = one
        say(f"answers read by the teacher: {start + len(part)} of {len(samples)}")
    report.refuse_empty("answers that the teacher can read", len(found))
    return found


def _tried(call: Callable[[slice], Sequence[_T]], count: int) -> list[_T | None]:
    """What a call gives for all, or for each alone where it refuses that; None for what it refuses alone too."""
    try:
        return list(call(slice(0, count)))
    except UsageError:
        found: list[_T | None] = []
    for place in range(count):
        try:
            found += call(slice(place, place + 1))
        except UsageError:
            found.append(None)
    return found


def _pairs(sample: Sample) -> list[tuple[str, str]]:
    """Each question of a conversation with its answer, a system message before the first question."""
    turns = sample.conversation
    first = 1 if turns[0].role == "system" else 0
    texts = [turn.text for turn in turns[first:]]
    if first:
        texts[0] = f"{turns[0].text}\n{texts[0]}"
    return list(zip(texts[::2], texts[1::2]))


def single_turns(sample: Sample) -> list[Sample]:
    """A conversation of one turn for each of its questions."""
    return [
        dataclasses.replace(
            sample, uid=f"{sample.uid}/{number}", conversation=(Turn("user", question), Turn("assistant", answer))
        )
        for number, (question, answer) in enumerate(_pairs(sample))
    ]


def _pixels(teacher: VlmTeacher, samples: Sequence[Sample]) -> Tensor:
    """uint8 [N, S, S, 3], as the teacher takes them: whole, on white."""
    spec = vlm_image_spec(teacher.model.config.vision.size if isinstance(teacher, BuiltinVlm) else _SIDE)
    return torch.stack([torch.from_numpy(load_image(sample.image.read(), spec)) for sample in samples])
