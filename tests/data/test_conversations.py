"""Conversations in LLaVA's layout: what is written is read, and every kind of bad row is counted for its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pocketvlm.data.conversations import read_conversations, write_conversations
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Turn
from pocketvlm.edge.errors import BadSampleError, UsageError

from .conftest import encode

TALK = (Turn("user", "What is this?"), Turn("assistant", "Un café."), Turn("user", "Sure?"), Turn("assistant", "Yes."))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(encode(seed=ord(name)))
    return tmp_path


def _said(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"image": "a.jpg", "conversations": [{"from": who, "value": value} for who, value in turns]}


def test_what_is_written_is_read(folder: Path) -> None:
    path = folder / "talk.jsonl"
    system = (Turn("system", "Be brief."), *TALK[:2])
    assert write_conversations(path, [("1", "a.jpg", TALK), ("2", "b.jpg", system)]) == 2
    report = BadSampleReport()
    samples = read_conversations(path, report)
    assert [sample.conversation for sample in samples] == [TALK, system]
    assert report.total == 0
    # the layout itself, which others read too
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert first["conversations"][0] == {"from": "human", "value": "<image>\nWhat is this?"}
    assert first["conversations"][1] == {"from": "gpt", "value": "Un café."}


BAD = {
    "missing-image-marker": _said(("human", "What is this?"), ("gpt", "a dog")),
    "repeated-image-marker": _said(("human", "<image> <image> What?"), ("gpt", "a dog")),
    "repeated-image-marker ": _said(
        ("human", "What?"), ("gpt", "a dog"), ("human", "<image>\nAnd this?"), ("gpt", "a cat")
    ),
    "empty-answer": _said(("human", "<image>\nWhat?"), ("gpt", "  ")),
    "empty-question": _said(("human", "<image>\n"), ("gpt", "a dog")),
    "wrong-turns": _said(("human", "<image>\nWhat?"), ("human", "Well?"), ("gpt", "a dog")),
    "wrong-turns ": _said(("human", "<image>\nWhat?")),
    "bad-conversation": _said(("somebody", "<image>\nWhat?"), ("gpt", "a dog")),
    "no-conversation": {"image": "a.jpg", "caption": "a dog"},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_counted_for_its_reason_and_the_others_are_kept(folder: Path, reason: str) -> None:
    path = folder / "talk.jsonl"
    good = _said(("human", "<image>\nWhat?"), ("gpt", "a dog")) | {"image": "b.jpg"}
    path.write_text(f"{json.dumps(BAD[reason])}\n{json.dumps(good)}\n", encoding="utf-8")
    report = BadSampleReport()
    (sample,) = read_conversations(path, report)
    assert sample.uid.startswith("talk/b.jpg")
    assert dict(report.counts) == {reason.strip(): 1}
    with pytest.raises(BadSampleError):
        read_conversations(path, BadSampleReport("refuse"))


def test_a_line_that_is_not_utf8_is_counted(folder: Path) -> None:
    path = folder / "talk.jsonl"
    write_conversations(path, [("1", "a.jpg", TALK[:2])])
    path.write_bytes(path.read_bytes() + path.read_bytes().replace("é".encode(), b"\xe9"))
    report = BadSampleReport()
    assert len(read_conversations(path, report)) == 1
    assert dict(report.counts) == {"not-utf8-text": 1}


def test_writing_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds <image> in a text"):
        write_conversations(tmp_path / "t.jsonl", [("1", "a.jpg", (Turn("user", "<image> what?"), TALK[1]))])
    with pytest.raises(UsageError, match="does not begin with a question"):
        write_conversations(tmp_path / "t.jsonl", [("1", "a.jpg", (Turn("assistant", "hello"),))])
    assert not (tmp_path / "t.jsonl").exists()
