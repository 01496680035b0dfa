"""What commands print at 80 columns: no line is wider, nothing is cut, and JSON stays whole."""

from __future__ import annotations

import json
import re

import pytest

from pocketvlm.edge.errors import counted
from pocketvlm.listing import listing
from pocketvlm.table import emit, emit_record

LONG = " ".join(f"word{place}" for place in range(60))
ROWS = [
    {"name": "first", "steps": 100, "where": "here", "description": LONG},
    {"name": "second-one", "steps": 2_000, "where": "a/" + "far/" * 12, "description": "short"},
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def test_long_values_stand_under_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, False, title="things", below=["description"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert words(" ".join(lines)) == words(
        "things name steps where first 100 here " + LONG + f" second-one 2,000 {ROWS[1]['where']} short"
    )
    (head,) = [line for line in lines if line.startswith("name")]
    (first,) = [line for line in lines if line.startswith("first")]
    # numbers end under their name's end, texts begin under its beginning
    assert head.index("steps") + len("steps") == first.index("100") + len("100")
    assert head.index("where") == first.index("here")
    assert "    short" in lines


def test_json_knows_nothing_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    emit(ROWS, True, title="things", below=["description"])
    assert json.loads(capsys.readouterr().out) == ROWS


def test_no_rows_are_a_title(capsys: pytest.CaptureFixture[str]) -> None:
    emit([], False, title="things", below=["description"])
    assert capsys.readouterr().out.startswith("things\n")


@pytest.mark.parametrize("what", ["recipes", "objectives", "students", "teachers"])
def test_shipped_lists_fit_80_columns(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = listing(what)
    below = [key for key in ("objectives", "formula", "paper", "description") if key in rows[0]]
    emit(rows, False, title=what, below=below)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 9 * len(rows)


def test_a_record_spells_out_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "state": "finished",
        "bytes_per_view": 135.7,
        "policy": {"flip": 0.5, "ratio": [0.8, 1.25]},
        "skipped": {},
        "fingerprint": "f" * 70,
        "licences": [["toy", "CC0-1.0", "nobody"], ["words", "MIT", "all"]],
    }
    emit_record(record, title="0-toy")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0-toy"
    assert lines[1] == "  state           finished"
    assert lines[2] == "  bytes per view  135.7"
    assert lines[3] == "  policy          flip 0.5, ratio (0.8, 1.25)"
    assert lines[4] == "  skipped         none"
    assert lines[5] == "  fingerprint     " + "f" * 70  # whole, to be copied
    assert lines[6] == "  licences        toy, CC0-1.0, nobody; words, MIT, all"


def test_one_of_a_thing_has_no_s() -> None:
    assert [counted(number, "thread") for number in (0, 1, 2, 1024)] == [
        "0 threads",
        "1 thread",
        "2 threads",
        "1,024 threads",
    ]


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[31mred\x07\x9b.png"
    emit([{"path": name}], False, title="x")
    emit_record({"path": name, "several": [name]}, title="x")
    out = capsys.readouterr().out
    assert out.count("a\ufffd[31mred\ufffd\ufffd.png") == 3
    assert not set(out) & set("\x1b\x07\x9b")


def test_what_is_piped_keeps_a_path_in_one_piece(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/a/" + "very-long-folder/" * 20 + "dolphin.png"
    monkeypatch.delenv("COLUMNS", raising=False)
    emit([{"rank": 1, "path": path}], False, title="found")
    assert path in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    emit([{"rank": 1, "path": path}], False, title="found")
    told = capsys.readouterr().out
    assert path not in told
    assert max(map(len, told.splitlines())) <= 60
