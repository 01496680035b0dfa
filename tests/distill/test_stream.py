"""Batches from tar shards: exact continuation, several ranks and workers, deaths, and refusals."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import NAMES
from stream_toys import SAMPLES, SHARDS, picture, write_shard, write_world

from pocketvlm.data.augment import AugmentPolicy, apply_view, view_params
from pocketvlm.data.shards import list_shards
from pocketvlm.data.stream import Position
from pocketvlm.distill.stream import Made, StreamLoader, StreamSettings, WorkerError
from pocketvlm.edge.contract import ImageSpec, TextSpec
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError
from pocketvlm.edge.preprocess import decode_image, load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import train_tokenizer

BATCH = 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("tars") / "cc")


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer([f"{name} thing" for name in NAMES], 300)


@pytest.fixture
def settings(shards: Path, tokenizer: bytes) -> StreamSettings:
    size = len(json.loads(tokenizer)["model"]["vocab"])
    text = TextSpec(context_length=8, vocab_size=size, tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest())
    return StreamSettings(
        shards=list_shards(str(shards)),
        batch_size=BATCH,
        specs=(ImageSpec(size=8),),
        tokenizer_json=tokenizer,
        text_spec=text,
        buffer=3,
        views=3,
        draft=False,
    )


@contextmanager
def loading(settings: StreamSettings, **how: Any) -> Iterator[StreamLoader]:
    loader = StreamLoader(settings, **how)
    try:
        yield loader
    finally:
        loader.close()


def take(loader: StreamLoader, count: int) -> list[Made]:
    return [next(loader) for _ in range(count)]


def ids_of(batches: list[Made]) -> list[list[tuple[str, int]]]:
    return [list(zip(made.uids, made.views)) for made in batches]


# --- exactness ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 2), (1, 1), (2, 2)])
def test_a_continued_run_repeats_and_misses_nothing(settings: StreamSettings, workers: int, ranks: int) -> None:
    draw, total = random.Random(10 * workers + ranks), 16
    for rank in range(ranks):
        how = {"rank": rank, "ranks": ranks, "workers": workers}
        with loading(settings, **how) as whole:
            row = take(whole, total)
            end = whole.state_dict()
        stops = sorted(draw.sample(range(1, total), 2 if workers else 6))
        found: list[Made] = []
        state: dict[str, Any] | None = None
        for begin, stop in zip([0, *stops], [*stops, total]):
            with loading(settings, **how) as part:
                if state is not None:
                    part.load_state_dict(json.loads(json.dumps(state)))
                found += take(part, stop - begin)
                state = part.state_dict()
        assert ids_of(found) == ids_of(row)
        assert all(torch.equal(a.pixels[0], b.pixels[0]) for a, b in zip(found, row))
        assert state == end
    # no position is older than two shards: what was read is not kept
    assert len(json.dumps(end)) < 1000


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (0, 2), (2, 2)])
def test_ranks_and_workers_share_an_epoch_without_overlap(settings: StreamSettings, workers: int, ranks: int) -> None:
    seen: Counter[str] = Counter()
    for rank in range(ranks):
        with loading(replace(settings, batch_size=1), rank=rank, ranks=ranks, workers=workers) as loader:
            slots = ranks * max(1, workers)
            while True:
                made = next(loader)
                slot = made.worker * ranks + rank
                number = made.position.turn * slots + slot
                if number < SHARDS:  # the first epoch
                    seen[made.uids[0]] += 1
                if min(p.turn * slots + w * ranks + rank for w, p in enumerate(loader.positions)) >= SHARDS:
                    break
    assert seen == Counter({f"cc/s-{n:03}/{n:03}{i:03}": 1 for n in range(SHARDS) for i in range(SAMPLES)})


def test_no_worker_and_one_worker_make_the_same_batches(settings: StreamSettings) -> None:
    with loading(settings) as here, loading(settings, workers=1) as there:
        a, b = take(here, 9), take(there, 9)
        assert ids_of(a) == ids_of(b)
        assert [made.captions for made in a] == [made.captions for made in b]
        assert here.state_dict() == there.state_dict()
        there.load_state_dict(here.state_dict())


def test_what_workers_made_ahead_is_no_part_of_the_state(settings: StreamSettings) -> None:
    with loading(settings, workers=2) as loader:
        take(loader, 3)
        time.sleep(0.3)  # both workers are ahead by now
        assert loader.positions == [Position(1, 1), Position(0, 4)]


# --- what a batch holds ---------------------------------------------------------------------------------------


def test_views_are_those_of_the_pictures_to_the_bit(settings: StreamSettings, shards: Path) -> None:
    policy = AugmentPolicy()
    teacher = ImageSpec(size=16, resize="squash", filter="bicubic")
    settings = replace(settings, specs=(settings.specs[0], teacher), policy=policy, view_seed=5)
    with loading(settings) as loader:
        batches = take(loader, 8)
    assert {view for made in batches for view in made.views} == {0, 1, 2}
    for made in batches:
        for place, (uid, view) in enumerate(zip(made.uids, made.views)):
            index = int(uid[-3:]) + SAMPLES * int(uid[-6:-3])
            data = picture(NAMES[index % len(NAMES)])
            for spec, pixels in zip(settings.specs, made.pixels):
                # an independent road: the cache's own way from bytes to a view
                params = view_params(uid, view, 5, policy)
                wanted = load_image(data, spec) if view == 0 else apply_view(decode_image(data), params, spec.size)
                assert np.array_equal(pixels[place].numpy(), wanted)


def test_captions_are_drawn_by_weight_and_too_long_ones_left_out(tmp_path: Path, settings: StreamSettings) -> None:
    told = {"captions": [{"text": "red", "weight": 3.0}, {"text": "blue", "source": "rewrite"}, "red " * 30]}
    for number in range(10):
        members = [(f"{number}{i}{end}", data) for i in range(40) for end, data in
                   ((".jpg", picture("red")), (".json", json.dumps(told).encode()))]  # fmt: skip
        write_shard(tmp_path / "cc" / f"{number}.tar", members)
    settings = replace(settings, shards=list_shards(str(tmp_path / "cc")), batch_size=20)
    with loading(settings) as loader:
        batches = take(loader, 20)
        assert loader.tally.report.counts == {"too-long-text": 400}
        assert loader.tally.bad_samples == 0
    drawn = Counter(text for made in batches for text in made.captions)
    # 5 standard deviations of 400 draws with probability 3/4
    assert set(drawn) == {"red", "blue"}
    assert abs(drawn["red"] - 300) < 5 * (400 * 0.75 * 0.25) ** 0.5
    groups = {
        text: {g for made in batches for g, c in zip(made.group.tolist(), made.captions) if c == text} for text in drawn
    }
    assert [len(found) for found in groups.values()] == [1, 1]
    tokens = Tokenizer(settings.tokenizer_json, settings.text_spec)
    assert np.array_equal(batches[0].ids.numpy(), tokens.encode([text for text in batches[0].captions if text]))
    with loading(replace(settings, caption_weights={"rewrite": 0.0})) as loader:
        assert {text for made in take(loader, 3) for text in made.captions} == {"red"}


def test_pictures_without_captions_are_bad_or_stay(tmp_path: Path, settings: StreamSettings) -> None:
    members = [(f"{i}.jpg", picture("red")) for i in range(8)] + [("8.jpg", picture("red")), ("8.txt", b"red")]
    write_shard(tmp_path / "cc" / "s.tar", members)
    settings = replace(settings, shards=list_shards(str(tmp_path / "cc")), batch_size=9, order="sequential")
    with loading(replace(settings, captions="optional", buffer=0)) as loader:
        made = next(loader)
    assert made.captions == [None] * 8 + ["red"]
    assert made.ids.shape == (1, 8)
    assert len(set(made.group.tolist())) == 9
    assert all(group < 0 for group in made.group.tolist()[:8])
    with (
        loading(replace(settings, on_bad_sample="refuse")) as loader,
        pytest.raises(BadSampleError, match="no caption"),
    ):
        next(loader)


def test_corrupt_pictures_are_counted_and_too_many_stop_the_run(tmp_path: Path, settings: StreamSettings) -> None:
    for number in range(10):
        members = []
        for index in range(40):
            data = picture("red")
            bad = index % 10 == 0
            members += [(f"{number}{index:02}.jpg", data[: len(data) // 2] if bad else data)]
            members += [(f"{number}{index:02}.txt", b"red")]
        write_shard(tmp_path / "cc" / f"{number}.tar", members)
    settings = replace(settings, shards=list_shards(str(tmp_path / "cc")), batch_size=12)
    with loading(replace(settings, max_bad_share=0.2)) as loader:
        batches = take(loader, 30)  # 360 good ones, and all 40 bad ones but those at the end
        assert not any(uid.endswith(("00", "10", "20", "30")) for made in batches for uid in made.uids)
        assert set(loader.tally.report.counts) == {"truncated-image"}
        assert loader.tally.samples - loader.tally.bad_samples == 360
        state = loader.state_dict()
    with loading(settings) as loader:
        loader.load_state_dict(state)
        assert loader.tally.to_dict() == state["tally"], "a continued run goes on counting"
    for workers in (0, 1):
        with (
            loading(settings, workers=workers) as loader,
            pytest.raises(
                UsageError, match=r"samples were of no use \(\d+ x truncated-image; first cc/.*max_bad_share"
            ),
        ):
            take(loader, 30)


def test_a_stream_of_nothing_ends_with_a_sentence(tmp_path: Path, settings: StreamSettings) -> None:
    (tmp_path / "cc").mkdir()
    (tmp_path / "cc" / "s.tar").write_bytes(b"not a tar at all" * 100)
    settings = replace(settings, shards=list_shards(str(tmp_path / "cc")), max_bad_share=1.0)
    with loading(settings) as loader, pytest.raises(UsageError, match=r"20 of 20 shards .*truncated-archive"):
        next(loader)


# --- refusals and deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ranks": 2}, "ranks 1 then and 2 now"),
        ({"workers": 2}, "workers 1 then and 2 now"),
        ({"ranks": 2, "rank": 1}, "rank 0 then and 1 now"),
        ({"seed": 1}, "seed 0 then and 1 now"),
        ({"buffer": 4}, "buffer 3 then and 4 now"),
        ({"order": "sequential"}, "order 'shuffled' then and 'sequential' now"),
        ({"fewer": True}, r"shards '5 \(.*\)' then and '4 \("),
    ],
)
def test_a_state_of_another_stream_is_refused(settings: StreamSettings, change: dict[str, Any], named: str) -> None:
    with loading(settings) as loader:
        take(loader, 2)
        state = loader.state_dict()
    how = {key: change.pop(key) for key in ("rank", "ranks", "workers") if key in change}
    if change.pop("fewer", False):
        change["shards"] = settings.shards[1:]
    other = StreamLoader(replace(settings, **change), **how)
    with pytest.raises(IntegrityError, match=rf"saved with other settings \(.*{named}"):
        other.load_state_dict(state)
    with pytest.raises(IntegrityError, match="saved under schema 99"):
        other.load_state_dict({**state, "schema": 99})


def test_a_dying_worker_is_named_with_its_shard(settings: StreamSettings, shards: Path) -> None:
    with loading(settings, workers=2) as loader:
        take(loader, 2)
        victim = int(loader._status[1, 0])
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(
            WorkerError, match=rf"data worker 1 \(process {victim}\) of rank 0 ended while it read"
        ) as told:
            take(loader, 20)
        assert time.monotonic() - began < 20
        assert str(shards) in str(told.value)


def _reads(settings: StreamSettings, told: Any) -> None:
    loader = StreamLoader(settings, workers=2)
    take(loader, 2)
    told.send([*loader._status[:, 0].tolist(), forkserver._forkserver._forkserver_pid])
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are the run's own children")
def test_a_killed_run_leaves_no_worker_behind(settings: StreamSettings) -> None:
    """Nor the server process that they come from."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    run = context.Process(target=_reads, args=(settings, theirs))
    run.start()
    assert mine.poll(120)
    left = [Path(f"/proc/{pid}") for pid in mine.recv()]
    assert all(place.exists() for place in left)
    run.kill()
    run.join()
    until = time.monotonic() + 30
    # who waits for an adopted process may take its time: one that has ended has no command any more
    while left := [place for place in left if place.exists() and (place / "cmdline").read_bytes()]:
        assert time.monotonic() < until, left
        time.sleep(0.1)
