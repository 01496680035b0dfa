"""Answers that a model gave earlier, from JSON Lines: the black box that is not on this machine.

    {"id": "cats/1.jpg", "question": "What is this?", "answer": "A cat."}

One line for each question about a picture. The id is a picture's uid, or what of it stands behind the data set's name.
Each line that is kept becomes a sample with a conversation of one turn; whatever is not kept is counted by reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.data.readers.manifest import json_lines
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample, Turn
from pocketvlm.edge.errors import UsageError

_FIELDS = ("id", "question", "answer")
_MARKER = "<image>"


@dataclass(frozen=True)
class RecordedAnswer:
    """One line of a file of answers. where: its place, for messages."""

    id: str
    question: str
    answer: str
    where: str = ""


def read_answers(path: str | Path, report: BadSampleReport) -> list[RecordedAnswer]:
    """Every usable line of a file, in order; nothing is matched with pictures yet.

    Bad lines are counted: "not-utf8-text", "invalid-json", "not-an-object", "missing-field" (id, question or answer
    absent or not a text), "empty-id", "empty-question", "empty-answer", "image-marker" (in a text, where it would be
    taken for a picture) and "duplicate-id" (the same question about the same picture again, whatever was answered; the
    first counts).

    Raises:
        UsageError: no such file. BadSampleError: a bad line, where the report refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(
            f"the file of recorded answers {path} does not exist; give JSON Lines with {', '.join(_FIELDS)}"
        )
    kept: dict[tuple[str, str], RecordedAnswer] = {}
    example = '{"id": …, "question": …, "answer": …}'
    for where, row in json_lines(path, report, path.name, example):
        found = _recorded(row, where, report)
        if found is None:
            continue
        if (found.id, found.question) in kept:
            report.add(
                "duplicate-id", where, f"id {found.id!r} was already asked {found.question[:60]!r} on an earlier line"
            )
            continue
        kept[found.id, found.question] = found
    return list(kept.values())


def recorded_answers(path: str | Path, samples: Sequence[Sample], report: BadSampleReport) -> list[Sample]:
    """Pictures with what was recorded about them: one sample for each answer, with a conversation of one turn.

    Beside the reasons of `read_answers`, "unknown-id" counts answers about no picture here. Pictures without any answer
    are noted as "no-recorded-answer", which is never refused, since a file may be about some of them.

    Args:
        path: JSON Lines. samples: the pictures. report: where bad lines are counted, or refused.

    Raises:
        UsageError: as `read_answers`, or no answer belongs to any picture. BadSampleError: as there.
    """
    by_id: dict[str, Sample] = {}
    short: dict[str, list[Sample]] = {}
    for sample in samples:
        by_id[sample.uid] = sample
        short.setdefault(sample.uid.partition("/")[2], []).append(sample)
    for name, found in short.items():
        # two data sets may each have a picture of that name
        if name and len(found) == 1:
            by_id.setdefault(name, found[0])
    made: list[Sample] = []
    answered: set[str] = set()
    for row in read_answers(path, report):
        known = by_id.get(row.id)
        if known is None:
            report.add("unknown-id", row.where, f"id {row.id!r} belongs to none of {len(samples)} pictures")
            continue
        answered.add(known.uid)
        turns = (Turn("user", row.question), Turn("assistant", row.answer))
        digest = hashlib.sha256(row.question.encode()).hexdigest()[:8]
        made.append(dataclasses.replace(known, uid=f"{known.uid}#{digest}", conversation=turns))
    for sample in samples:
        if sample.uid not in answered:
            report.note("no-recorded-answer", sample.uid)
    report.refuse_empty(Path(path).name, len(made))
    return made


def _recorded(row: dict[str, Any], where: str, report: BadSampleReport) -> RecordedAnswer | None:
    values: list[str] = []
    for field in _FIELDS:
        value = row.get(field)
        # ids of many collections are numbers
        if field == "id" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            report.add("missing-field", where, f"{field} is {value!r} and must be a text")
            return None
        if not value.strip():
            report.add(f"empty-{field}", where, f"the {field} is empty and would teach nothing")
            return None
        if field != "id" and _MARKER in value:
            report.add("image-marker", where, f"the {field} holds {_MARKER}, which stands for a picture")
            return None
        values.append(value.strip())
    uid, question, answer = values
    return RecordedAnswer(uid, question, answer, where)
