"""Checkpoints: round trip, damage noticed, a full disk survived, old ones dropped."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from pocketvlm.distill import checkpoint
from pocketvlm.distill.checkpoint import CheckpointWriteError, latest_checkpoint, load_checkpoint, save_checkpoint
from pocketvlm.edge.errors import IntegrityError, UsageError


def state(value: float) -> dict[str, object]:
    return {"weights": torch.full((300,), value), "step": int(value), "nested": {"rng": torch.get_rng_state()}}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 7, state(7.0))
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"], torch.full((300,), 7.0))
    assert loaded["step"] == 7
    assert torch.equal(loaded["nested"]["rng"], torch.get_rng_state())
    assert latest_checkpoint(tmp_path / "checkpoints") == path


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match=r"step 7 .* because Not a directory; there is no earlier one"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 7, state(7.0))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-00000004.pt",
        "step-00000004.pt.sha256",
        "step-00000030.pt",
        "step-00000030.pt.sha256",
    ]


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, state(1.0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="was damaged; delete it"):
        load_checkpoint(path)


def test_a_checkpoint_without_its_hash_is_not_used(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 1, state(1.0))
    second = save_checkpoint(tmp_path, 2, state(2.0))
    second.with_name(second.name + ".sha256").unlink()
    assert latest_checkpoint(tmp_path) == first
    with pytest.raises(IntegrityError, match="cannot be told whether it is whole"):
        load_checkpoint(second)
    with pytest.raises(UsageError, match="cannot be read"):
        load_checkpoint(tmp_path / "step-00000009.pt")


def test_nothing_but_data_is_loaded(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    path = save_checkpoint(tmp_path, 1, {"x": Code()})
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unsupported"):
        load_checkpoint(path)


def test_a_really_full_device_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save_checkpoint(tmp_path, 1, state(1.0))
    monkeypatch.setattr(checkpoint, "_temporary", lambda path: Path("/dev/full"))
    with pytest.raises(CheckpointWriteError, match=r"the disk is full; step-00000001\.pt is intact: free some space"):
        save_checkpoint(tmp_path, 2, state(2.0))
    assert load_checkpoint(before)["step"] == 1


@pytest.mark.parametrize("step", [1, 2])
def test_a_disk_that_fills_up_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Also when the same step is written again: the old file and the old hash still belong together."""
    before = save_checkpoint(tmp_path, 1, state(1.0))
    calls = 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointWriteError, match="the disk is full"):
        save_checkpoint(tmp_path, step, state(2.0))
    monkeypatch.undo()
    assert calls == 2
    assert latest_checkpoint(tmp_path) == before
    assert load_checkpoint(before)["step"] == 1
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]
