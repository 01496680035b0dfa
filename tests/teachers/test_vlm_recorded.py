"""Recorded answers: what is kept belongs to its picture, what is not is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.teachers.vlm import read_answers, recorded_answers

SAMPLES = [Sample(uid=f"set/{name}.jpg", image=ImageRef(data=b"x")) for name in "abc"]


def _write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def _row(uid: object = "a.jpg", question: object = "What?", answer: object = "A cat.") -> dict[str, object]:
    return {"id": uid, "question": question, "answer": answer}


def test_every_answer_becomes_a_sample_of_its_picture(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "r.jsonl",
        _row(),
        _row(question="Wo?", answer=" Auf dem Bär \n"),
        b"",
        _row("set/b.jpg", answer="犬"),
    )
    report = BadSampleReport()
    found = recorded_answers(path, SAMPLES, report)
    assert [sample.uid.partition("#")[0] for sample in found] == ["set/a.jpg", "set/a.jpg", "set/b.jpg"]
    assert len({sample.uid for sample in found}) == 3
    turns = [[(turn.role, turn.text) for turn in sample.conversation] for sample in found]
    assert turns[1] == [("user", "Wo?"), ("assistant", "Auf dem Bär")]
    assert turns[2][1] == ("assistant", "犬")
    assert report.counts == {"no-recorded-answer": 1}
    assert report.examples["no-recorded-answer"] == ["set/c.jpg"]


BAD = {
    "unknown-id": _row("z.jpg"),
    "empty-answer": _row(answer="  "),
    "empty-question": _row(question=""),
    "empty-id": _row(" "),
    "not-utf8-text": b'{"id": "a.jpg", "question": "What?", "answer": "B\xe4r"}',
    "duplicate-id": _row(answer="Another."),
    "invalid-json": b'{"id": "a.jpg", ',
    "not-an-object": ["a.jpg", "What?", "A cat."],
    "missing-field": {"id": "a.jpg", "question": "Why?"},
    "image-marker": _row(question="<image> What?"),
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_lines_are_counted_or_refused(tmp_path: Path, reason: str) -> None:
    path = _write(tmp_path / "r.jsonl", _row(), BAD[reason], _row("b.jpg"), _row("c.jpg"))
    report = BadSampleReport()
    assert len(recorded_answers(path, SAMPLES, report)) == 3
    assert report.counts == {reason: 1}
    assert "r.jsonl:2" in report.examples[reason][0]
    with pytest.raises(BadSampleError, match=r"r\.jsonl:2") as refused:
        recorded_answers(path, SAMPLES, BadSampleReport("refuse"))
    assert refused.value.reason == reason


def test_nothing_that_matches_is_an_error_even_where_bad_lines_are_skipped(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 x unknown-id"):
        recorded_answers(_write(tmp_path / "r.jsonl", _row("x"), _row("y")), SAMPLES, BadSampleReport())
    with pytest.raises(UsageError, match="does not exist"):
        read_answers(tmp_path / "none.jsonl", BadSampleReport())


def test_a_short_name_of_two_pictures_means_neither(tmp_path: Path) -> None:
    twice = [*SAMPLES, Sample(uid="other/a.jpg", image=ImageRef(data=b"y"))]
    report = BadSampleReport()
    found = recorded_answers(_write(tmp_path / "r.jsonl", _row(), _row("other/a.jpg"), _row("b.jpg")), twice, report)
    assert [sample.uid.partition("#")[0] for sample in found] == ["other/a.jpg", "set/b.jpg"]
    assert report.counts["unknown-id"] == 1


def test_numbers_are_ids_too(tmp_path: Path) -> None:
    samples = [Sample(uid="set/7", image=ImageRef(data=b"x"))]
    assert len(recorded_answers(_write(tmp_path / "r.jsonl", _row(7)), samples, BadSampleReport("refuse"))) == 1
