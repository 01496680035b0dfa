"""An index under SIGKILL, a second writer, and readers beside a writer: real processes, real signals."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.index import EmbeddingIndex

DIM = 16
# Announces each operation, does it, and says so; what is announced is drawn from the numbers that are there.
WRITER = """
import json, random, sys
import numpy as np
import pocketvlm.edge.index as module
from pocketvlm.edge.index import EmbeddingIndex
module.CACHE_FROM, module.TAIL = 300, 50
folder, seed = sys.argv[1], int(sys.argv[2])
draw = random.Random(seed)
index = EmbeddingIndex.load(folder)
there = set(map(int, index.keys()))
def say(word):
    print(json.dumps(word), flush=True)
while True:
    kind = draw.choice(["add", "add", "replace", "remove", "save", "compact"])
    if kind == "add":
        first = max(there, default=0) + 1
        some = list(range(first, first + draw.randint(1, 400)))
    else:
        some = draw.sample(sorted(there), min(len(there), draw.randint(1, 200)))
    if not some and kind in ("replace", "remove"):
        continue
    say([kind, some if kind in ("add", "remove") else []])
    rows = np.sin(np.outer(some, np.arange(1, 17)))
    if kind in ("add", "replace"):
        index.add([str(n) for n in some], rows, [{"n": n} for n in some], space="s", replace=kind == "replace")
        there |= set(some)
    elif kind == "remove":
        index.remove([str(n) for n in some])
        there -= set(some)
    else:
        index.save(compact=kind == "compact", threads=1)
    say("done")
"""
HOLDER = """
import sys
from pocketvlm.edge.index import EmbeddingIndex
index = EmbeddingIndex.load(sys.argv[1])
with index._store.writing():
    print("holding", flush=True)
    sys.stdin.readline()
"""


def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True, **options
    )


def expected(numbers: list[int]) -> np.ndarray:
    rows = np.sin(np.outer(numbers, np.arange(1, 17)))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["f32", "binary"])
def test_a_kill_at_any_moment_loses_nothing_that_was_done_and_halves_nothing(tmp_path: Path, dtype: Any) -> None:
    folder, draw = tmp_path / "kill.index", random.Random(dtype)
    EmbeddingIndex.create(folder, "s", DIM, dtype=dtype).close()
    there: set[int] = set()
    cut = 0
    for attempt in range(8):
        writer = start(WRITER, folder, attempt)
        assert writer.stdout is not None
        first = [writer.stdout.readline() for _ in range(draw.randint(1, 12))]
        time.sleep(draw.random() * 0.02)
        writer.send_signal(signal.SIGKILL)
        words = [json.loads(line) for line in [*first, *writer.stdout.read().splitlines()]]
        writer.wait()
        pending: set[int] | None = None
        for word in words:
            if word == "done":
                there, pending = pending if pending is not None else there, None
            else:
                kind, some = word
                pending = there | set(some) if kind == "add" else there - set(some)
        cut += pending is not None
        with EmbeddingIndex.load(folder, verify=True) as index:
            found = set(map(int, index.keys()))
            assert found in (there, pending), f"{len(found ^ there)} rows differ"
            there = found
            assert len(index) == len(there)
            numbers = sorted(there)
            np.testing.assert_allclose(
                index.get([str(n) for n in numbers]), expected(numbers), atol=1e-6 + 0.01 * (dtype == "binary")
            )
            for n in numbers[:: max(1, len(numbers) // 5)]:
                hit = index.search(expected([n]), 1, space="s", where={"n": n})[0][0]
                assert (hit.key, hit.metadata) == (str(n), {"n": n})
                assert hit.score > 0.99
            stray = {path.name.split("-")[0] for path in folder.iterdir()} - {
                "index.sqlite",
                "writer.lock",
                "vectors",
                "cache",
            }
            assert stray <= {"index.sqlite"}
    assert cut >= 3, "the kills came between operations"


def test_a_second_writer_is_told_and_a_search_is_not_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "two.index"
    index = EmbeddingIndex.create(folder, "s", DIM)
    index.add(["1", "2"], expected([1, 2]), space="s")
    holder = start(HOLDER, folder, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holding\n"
    for write in (lambda: index.add("3", expected([3]), space="s"), lambda: index.remove("1"), index.save):
        with pytest.raises(UsageError, match="being written by another process"):
            write()
    assert index.search(expected([2]), 1, space="s")[0][0].key == "2"
    holder.communicate("\n")
    index.add("3", expected([3]), space="s")
    assert len(index) == 3
    index.close()


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "lock.index"
    index = EmbeddingIndex.create(folder, "s", DIM)
    holder = start(HOLDER, folder, stdin=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    index.add("1", expected([1]), space="s")
    assert "1" in index
    index.close()


def test_a_reader_sees_whole_states_while_another_process_writes(tmp_path: Path) -> None:
    """Adds come in one transaction each, so the highest number that is there says which others must be."""
    folder = tmp_path / "reader.index"
    reader = EmbeddingIndex.create(folder, "s", DIM)
    writer = start(WRITER, folder, 5)
    assert writer.stdout is not None
    writer.stdout.readline()
    sizes = set()
    until = time.monotonic() + 30
    while len(sizes) < 8 and time.monotonic() < until:
        hits = reader.search(expected([1]), 5, space="s", exact=bool(len(sizes) % 2))[0]
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        for hit in hits:
            np.testing.assert_allclose(
                hit.score,
                (expected([1]) @ expected([hit.metadata["n"]]).T).item(),
                atol=2e-3,  # type: ignore[list-item]
            )
        sizes.add(len(reader))
    writer.kill()
    writer.wait()
    assert len(sizes) == 8
    reader.close()
