"""Building a teacher cache: shares of it, kills, full disks, and what is written beside the outputs."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pocketvlm.data.augment import VIEW_NUMBERS, AugmentPolicy, ViewParams, view_params
from pocketvlm.data.sample import Caption, Sample
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers import cache as cache_module
from pocketvlm.teachers import files
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import CacheBuild, build_cache
from pocketvlm.teachers.cache_format import CacheWriteError, write_shard

from .conftest import TinyTeacher, make_samples

POLICY = AugmentPolicy()
TEXTS = ["a cat", "a dog", "three birds"]
HOW: dict[str, Any] = {"views": 3, "policy": POLICY, "shard_size": 2, "batch_size": 3}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class WideTeacher(TinyTeacher):
    """384 numbers of pictures and texts, and no features, as CLIP-like teachers of that width."""

    dim = 384

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(16 * 16 * 3, 384, generator=generator)
        self.letters = torch.randn(128, 384, generator=generator)

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        return TeacherOutput(F.normalize((pixels.flatten(1).float() / 255 - 0.5) @ self.weight, dim=-1))


# ---------------------------------------------------------------------------------------------- augmentation parameters


@pytest.mark.parametrize("policy", [POLICY, AugmentPolicy(scale=(1e-6, 1.0), ratio=(0.01, 100.0), rotate=180.0)])
def test_a_packed_view_is_that_very_view(policy: AugmentPolicy) -> None:
    drawn = [view_params(f"uid/{i}", view, 7, policy) for i in range(300) for view in range(4)]
    packed = torch.tensor([one.packed() for one in drawn], dtype=torch.int32)
    assert packed.shape == (1200, VIEW_NUMBERS)
    assert [ViewParams.unpacked(row) for row in packed.tolist()] == drawn


def test_a_view_that_no_32_bits_hold_is_refused() -> None:
    with pytest.raises(UsageError, match="beyond 2147"):
        ViewParams(ratio=2148.0).packed()


def test_what_the_teacher_was_shown_lies_beside_its_outputs(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder, seed=5, **HOW)
    cache = TeacherCache.open(folder)
    assert cache.view("p/4", 0) == ViewParams(identity=True)
    assert cache.view("p/4", 2) == view_params("p/4", 2, 5, POLICY)
    assert cache.view("p/4", 1) != cache.view("p/5", 1)
    with pytest.raises(UsageError, match="view 3 was asked for"):
        cache.view("p/4", 3)


def test_views_that_this_release_draws_otherwise_are_refused(
    samples: list[Sample], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_cache(TinyTeacher(), samples, [], folder, **HOW)

    def other(uid: str, view: int, seed: int, policy: AugmentPolicy) -> ViewParams:
        drawn = view_params(uid, view, seed, policy)
        return replace(drawn, angle=drawn.angle + 1e-6) if view == 2 else drawn

    monkeypatch.setattr(cache_module, "view_params", other)
    with pytest.raises(IntegrityError, match=r"other views than this release draws: view 2 of 'p/\d' had angle"):
        TeacherCache.open(folder).load()


def test_a_cache_without_written_views_is_still_read(samples: list[Sample], folder: Path) -> None:
    """As releases before schema 1.2 wrote it."""
    new = build_cache(TinyTeacher(), samples, TEXTS, folder, **HOW)
    expected, drawn = new.image(["p/3"], 2), new.view("p/3", 2)
    manifest = json.loads((folder / "cache.json").read_text())
    for row in manifest["shards"]:
        with safe_open(folder / row["file"], framework="pt") as handle:
            tensors = {key: handle.get_tensor(key).clone() for key in handle.keys() if key != "views"}  # noqa: SIM118
            meta = json.loads(handle.metadata()["pocketvlm"])
        row["sha256"] = write_shard(folder / row["file"], tensors, meta)
    (folder / "cache.json").write_text(json.dumps({**manifest, "schema_version": "1.1"}))
    old = TeacherCache.open(folder)
    assert torch.equal(old.image(["p/3"], 2), expected)
    assert old.view("p/3", 2) == drawn
    again = TinyTeacher()
    build_cache(again, samples, TEXTS, folder, **HOW)
    assert again.seen == 1


@pytest.mark.parametrize("views", [1, 4])
def test_a_view_of_384_numbers_takes_at_most_2200_bytes(folder: Path, views: int) -> None:
    """Image and text in bfloat16, parameters, name and hash; the cost that is told before is what it then takes."""
    samples = make_samples(96)
    texts = [caption.text for sample in samples for caption in sample.captions]
    how: dict[str, Any] = {"views": views, "policy": POLICY, "dtype": "bfloat16", "shard_size": 48}
    build = CacheBuild(WideTeacher(), samples, texts, folder, **how)
    cost = build.cost()
    build.run()
    taken = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert cost.views == 96 * views
    assert cost.view == 768 + (4 * VIEW_NUMBERS if views > 1 else 0)
    assert taken / cost.views <= 2200
    assert taken == pytest.approx(cost.total, rel=0.02)


# ------------------------------------------------------------------------------------------------------- many processes


def test_shares_give_the_same_bytes_as_one_process(samples: list[Sample], tmp_path: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "alone", **HOW)
    for world in (2, 3, 9):
        folder = tmp_path / str(world)
        found = [
            CacheBuild(TinyTeacher(), samples, TEXTS, folder, **HOW).run(rank=rank, world=world)
            for rank in reversed(range(world))
        ]
        assert [cache is not None for cache in found] == [False] * (world - 1) + [True]
        assert contents(folder) == contents(tmp_path / "alone")


def test_shares_at_once_give_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    """Also where two of them find all shards there and both write the manifest."""
    build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "alone", **HOW)
    for turn in range(5):
        builds = [CacheBuild(TinyTeacher(), samples, TEXTS, tmp_path / str(turn), **HOW) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda rank: builds[rank].run(rank=rank, world=4), range(4)))  # noqa: B023
        assert any(cache is not None for cache in found)
        assert contents(tmp_path / str(turn)) == contents(tmp_path / "alone")


class SlowTeacher(TinyTeacher):
    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        time.sleep(0.02)
        return super().encode_images(pixels)


def slow_build(folder: Path) -> None:
    torch.set_num_threads(1)
    build_cache(SlowTeacher(), make_samples(11), TEXTS, folder, **HOW)


def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(samples: list[Sample], tmp_path: Path) -> None:
    """SIGKILL a little later after each new shard; every restart goes on."""
    build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "whole", **HOW)
    folder, killed = tmp_path / "cut", 0

    def made() -> int:
        return len(list(folder.glob("*.safetensors")))

    for turn in range(20):
        before = made()
        process = multiprocessing.get_context("fork").Process(target=slow_build, args=(folder,))
        process.start()
        while process.exitcode is None and made() == before:
            time.sleep(0.002)
        process.join(0.004 * turn)
        killed += process.exitcode is None
        process.kill()
        process.join()
        assert made() >= before
        if process.exitcode == 0:
            break
    assert killed >= 3
    assert process.exitcode == 0
    files.remove_leftovers(folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(samples: list[Sample], folder: Path) -> None:
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    folder.mkdir()
    names = [f".shard-00000.safetensors.{files._machine()}.{number}.1.tmp" for number in (gone.pid, os.getpid())]
    for name in names:
        (folder / name).write_bytes(b"half")
    build_cache(TinyTeacher(), samples, [], folder)
    assert [(folder / name).exists() for name in names] == [False, True]


# ------------------------------------------------------------------------------------------------------------ full disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, tmp_path / "whole", **HOW)
    folder, real, calls = tmp_path / "cut", os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        # each file is synced once, and its folder once: the plan, two shards, and then no more
        if len(calls) == 7:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    why = "Permission denied" if number == errno.EACCES else "the disk is full"
    with pytest.raises(CacheWriteError, match=rf"shard-00002.safetensors \(.* MB\) .*because {why}; .* start the same"):
        build_cache(TinyTeacher(), samples, TEXTS, folder, **HOW)
    assert sorted(contents(folder)) == ["build.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    monkeypatch.undo()
    build_cache(TinyTeacher(), samples, TEXTS, folder, **HOW)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_full_disk_at_the_manifest_leaves_an_unfinished_build(
    samples: list[Sample], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "cache.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CacheWriteError, match=r"cache\.json of a teacher cache could not be written"):
        build_cache(TinyTeacher(), samples, [], folder)
    assert sorted(contents(folder)) == ["build.json", "shard-00000.safetensors"]


# ------------------------------------------------------------------------------------------------------------- pipeline


def test_the_next_pictures_are_decoded_while_the_teacher_works(
    samples: list[Sample], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher waits, in its first batch, for pictures of the batch after it and of the shard after that."""
    loaded: dict[str, threading.Event] = {sample.uid: threading.Event() for sample in samples}
    real = CacheBuild._load

    def load(self: CacheBuild, sample: Sample) -> Any:
        found = real(self, sample)
        loaded[sample.uid].set()
        return found

    class Waiting(TinyTeacher):
        def encode_images(self, pixels: Tensor) -> TeacherOutput:
            if len(pixels) > 1:
                assert loaded["p/3"].wait(20), "the batch after this one was not begun"
                assert loaded["p/5"].wait(20), "the shard after this one was not begun"
            return super().encode_images(pixels)

    monkeypatch.setattr(CacheBuild, "_load", load)
    assert len(build_cache(Waiting(), samples, [], folder, batch_size=2, shard_size=4)) == 11


# ---------------------------------------------------------------------------------------------------------- data shards


class CaptionTeacher(TinyTeacher):
    """Shows features of texts too."""

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        found = super().encode_texts(texts).embedding
        return TeacherOutput(found, found[:, :3] * 2)


def data_shards(samples: list[Sample]) -> dict[str, Any]:
    parts = {"000": samples[:5], "001": samples[5:6], "002": samples[6:]}
    return {name: (lambda part=part: part) for name, part in parts.items()}


def test_rows_of_a_data_shard_are_read_without_the_others(samples: list[Sample], folder: Path) -> None:
    samples = [*samples[:10], replace(samples[10], captions=(*samples[10].captions, Caption("thing number 7")))]
    build = CacheBuild(CaptionTeacher(), [], ["a word"], folder, data_shards=data_shards(samples), **HOW)
    whole = build.run()
    assert whole is not None
    assert whole.data_shards == ("000", "001", "002")
    assert whole.uids == tuple(sample.uid for sample in samples)
    assert len(whole) == 11
    listed = build_cache(
        CaptionTeacher(), samples, [c.text for s in samples for c in s.captions], folder.parent / "listed", **HOW
    )
    uids, texts = ["p/8", "p/10"], ["thing number 7", "thing number 10"]
    for name in ("shard-00000", "shard-00001", "text-00000"):
        (folder / f"{name}.safetensors").unlink()
    part = TeacherCache.open(folder).of_shard("002")
    assert part.uids == ("p/6", "p/7", "p/8", "p/9", "p/10")
    torch.testing.assert_close(part.image(uids, [1, 2]), listed.image(uids, [1, 2]))
    torch.testing.assert_close(part.features(uids), listed.features(uids))
    torch.testing.assert_close(part.text(texts), listed.text(texts))
    torch.testing.assert_close(part.text_features(texts), listed.text_features(texts))
    assert part.view("p/8", 1) == listed.view("p/8", 1)
    with pytest.raises(UsageError, match=r"data shard '009' is not in the cache .* \(it holds 3 others\)"):
        TeacherCache.open(folder).of_shard("009")
    with pytest.raises(UsageError, match="it holds no shards named by data"):
        listed.of_shard("000")


def test_texts_of_data_shards_and_lists_are_found_in_the_whole(samples: list[Sample], folder: Path) -> None:
    cache = CacheBuild(CaptionTeacher(), [], ["a word"], folder, data_shards=data_shards(samples), **HOW).run()
    assert cache is not None
    # texts of a list are found without opening a data shard
    hidden = (folder / "shard-00000.safetensors").rename(folder / "hidden")
    alone = TeacherCache.open(folder)
    assert alone.missing_texts(["a word"]) == []
    assert alone.text(["a word"]).shape == (1, 8)
    hidden.rename(folder / "shard-00000.safetensors")
    assert alone.missing_texts(["a word", "thing number 3", "nothing"]) == ["nothing"]
    assert cache.texts == ("a word", *(f"thing number {i}" for i in range(11)))
    expected = CaptionTeacher().encode_texts(["thing number 9", "a word"])
    torch.testing.assert_close(cache.text(["thing number 9", "a word"]), expected.embedding)
    torch.testing.assert_close(cache.text_features(["thing number 9", "a word"]), expected.features)


def test_data_shards_are_continued_without_being_opened_again(samples: list[Sample], tmp_path: Path) -> None:
    CacheBuild(CaptionTeacher(), [], [], tmp_path / "whole", data_shards=data_shards(samples), **HOW).run()
    for rank in (0, 1):
        opened: list[str] = []

        def watched(name: str, load: Any, opened: list[str] = opened) -> Any:
            return lambda: (opened.append(name), load())[1]

        shards = {name: watched(name, load) for name, load in data_shards(samples).items()}
        CacheBuild(CaptionTeacher(), [], [], tmp_path / "cut", data_shards=shards, **HOW).run(rank=rank, world=2)
        assert opened == (["000", "002"] if rank == 0 else ["001"])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_opening_reads_no_shard(samples: list[Sample], folder: Path) -> None:
    build_cache(TinyTeacher(), samples, TEXTS, folder, **HOW)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert len(TeacherCache.open(folder)) == 11


def test_samples_and_data_shards_are_not_mixed(samples: list[Sample], folder: Path) -> None:
    with pytest.raises(UsageError, match="samples and data shards were both given"):
        CacheBuild(TinyTeacher(), samples, [], folder, data_shards=data_shards(samples))
