"""Conversations about pictures as JSON Lines, in the layout that LLaVA's data has, read and written.

    {"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A dolphin."}]}

The marker stands once, in the first question; what a model puts in its place is the model's business, so the turns of a
`Sample` are without it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pocketvlm.data.readers.common import Collector
from pocketvlm.data.readers.manifest import Columns, read_manifest
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample, Turn
from pocketvlm.edge.errors import UsageError

MARKER = "<image>"
_FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def read_conversations(path: str | Path, report: BadSampleReport, *, columns: Columns | None = None) -> list[Sample]:
    """Samples with their conversations, the marker taken out of the first question.

    Bad rows are counted: "no-conversation", "wrong-turns" (not user and assistant in turn, after an optional system
    message), "missing-image-marker", "repeated-image-marker" (twice, or in a later turn or an answer),
    "empty-question", and the reasons of `readers.manifest.read_manifest`, with "not-utf8-text" and "empty-answer".

    Args:
        path: JSON Lines, or any other manifest with a column of conversations; pictures are relative to it.
        report: where bad rows are counted, or refused.

    Raises:
        UsageError: as `read_manifest`. BadSampleError: a bad row, where the report refuses.
    """
    path = Path(path)
    collector = Collector(path.stem, report)
    read_manifest(path, collector, columns)
    found = []
    for sample in collector.samples:
        turns = _checked(sample, report)
        if turns is not None:
            found.append(dataclasses.replace(sample, conversation=turns))
    return found


def _checked(sample: Sample, report: BadSampleReport) -> tuple[Turn, ...] | None:
    turns = sample.conversation
    if not turns:
        report.add("no-conversation", sample.uid, "the row has no conversation, so nothing is asked or answered")
        return None
    first = 1 if turns[0].role == "system" else 0
    roles = [turn.role for turn in turns[first:]]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        report.add("wrong-turns", sample.uid, "questions and answers do not alternate, from a question to an answer")
        return None
    markers = [turn.text.count(MARKER) for turn in turns]
    if not any(markers):
        report.add("missing-image-marker", sample.uid, f"no turn has {MARKER}, so the picture has no place in it")
        return None
    if sum(markers) > 1 or not markers[first]:
        report.add(
            "repeated-image-marker", sample.uid, f"{MARKER} must stand once, in the first question, for the one picture"
        )
        return None
    question = turns[first].text.replace(MARKER, "").strip()
    if not question:
        report.add("empty-question", sample.uid, "the first question holds nothing but the marker of the picture")
        return None
    return (*turns[:first], Turn("user", question), *turns[first + 1 :])


def write_conversations(path: str | Path, rows: Iterable[tuple[str, str, Sequence[Turn]]]) -> int:
    """Write (id, picture's path relative to the file, turns) as JSON Lines, the marker put before the first question.

    Returns how many. What is written is what `read_conversations` reads.

    Raises:
        UsageError: a text that holds the marker itself, or turns that do not begin with a question.
    """
    lines = []
    for uid, image, turns in rows:
        if any(MARKER in turn.text for turn in turns):
            raise UsageError(
                f"conversation {uid!r} holds {MARKER} in a text, where it would be taken for the picture's place; "
                "take it out, since it is added to the first question"
            )
        first = next((place for place, turn in enumerate(turns) if turn.role != "system"), None)
        if first is None or turns[first].role != "user":
            raise UsageError(
                f"conversation {uid!r} does not begin with a question, so {MARKER} has no place in it; put a user's "
                "turn first"
            )
        said = [
            {"from": _FROM[turn.role], "value": f"{MARKER}\n{turn.text}" if place == first else turn.text}
            for place, turn in enumerate(turns)
        ]
        lines.append(json.dumps({"id": uid, "image": image, "conversations": said}, ensure_ascii=False))
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)
