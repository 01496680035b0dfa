"""`pocketvlm plan` as a user meets it: two tables or one JSON object, and one sentence for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def test_tables_at_any_width_and_json(cli: Cli, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for width in ("80", "120"):
        monkeypatch.setenv("COLUMNS", width)
        done = cli("plan", recipe, "train.device=cpu", "--device", "h100", "--count", 2, "--price", 2)
        assert done.code == 0, done.err
        assert "assumptions" in done.out
        assert max(map(len, done.out.splitlines())) <= int(width)
        assert all(word in done.out for word in ("optimizer", "objectives' memory", "cost", "h100: matrix_flops"))
    found = json.loads(cli("plan", recipe, "train.device=cpu", "--device", "h100", "--count", 2, "--json").out)
    assert {"run", "work", "memory", "disk", "time", "assumptions"} <= found.keys()
    assert found["count"] == 2


def test_this_machine_is_timed(cli: Cli, recipe: Path) -> None:
    done = cli("plan", recipe, "train.device=cpu", "train.threads=1", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["time"]["training_cpu_s"] > 0
    assert any("measured on this machine" in row["because"] for row in found["assumptions"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--samples", "0"), "--samples 0"),
        (("--samples", "-1e6"), "--samples -1e+06"),
        (("--count", "0"), "--count 0"),
        (("--device", "h10"), "'h100'"),
        (("--epochs", "0"), "--epochs 0"),
        (("--price", "-2"), "--price -2"),
    ],
)
def test_a_mistake_is_one_sentence(cli: Cli, recipe: Path, given: tuple[str, ...], said: str) -> None:
    assert said in cli("plan", recipe, *given).sentence()


def test_data_that_is_not_here_wants_a_number(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    sentence = cli("plan", recipe, f"data.train={tmp_path / 'none.jsonl'}", "--device", "cpu").sentence()
    assert "none.jsonl" in sentence
    assert "--samples" in sentence
