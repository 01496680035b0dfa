"""Batches out of tar shards, made by worker processes, from an exact position.

Each batch is made whole by one worker from its own shards (`data.shards.ShardOrder`) and carries that worker's position
after it. The state of a run is what the batches that were trained on carried, so what workers made ahead and nobody
used is made again, and no sample is repeated or missed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pocketvlm.data.augment import AugmentPolicy, view_params
from pocketvlm.data.near import decoded_views
from pocketvlm.data.sample import Caption, Sample
from pocketvlm.data.shards import Shard, ShardOrder, digest_shards
from pocketvlm.data.source import unfit
from pocketvlm.data.splits import draw_caption, stable_hash
from pocketvlm.data.stream import BEGINNING, Drawn, Position, SampleStream, Tally
from pocketvlm.edge.contract import ImageSpec, TextSpec
from pocketvlm.edge.errors import BadSampleError, IntegrityError, PocketvlmError, UsageError
from pocketvlm.edge.tokenizer import Tokenizer

_STATE_SCHEMA = 1
# batches that each worker makes ahead
_AHEAD = 2


class WorkerError(PocketvlmError, RuntimeError):
    """A worker process ended before its time."""


@dataclass(frozen=True)
class StreamSettings:
    """What a batch is made of; the same in every worker.

    shards, order, buffer, seed: see `data.shards` and `data.stream`. batch_size: pictures in each batch.
    specs: the preprocessing of every model that sees the pictures, the student's first. views, policy, view_seed: of
    the augmentation (`data.augment`). caption_weights: source of a caption -> factor on its weight, as in
    `DataSource.weighed`. captions, language, on_bad_sample: as in `SampleStream`. draft: see `data.near`.
    max_bad_share: see `Tally.check`. tokenizer_json, text_spec: of the student's text tower; captions that it could not
    read whole are left out and counted.
    """

    shards: Sequence[Shard]
    batch_size: int
    specs: tuple[ImageSpec, ...]
    tokenizer_json: bytes
    text_spec: TextSpec
    order: str = "shuffled"
    buffer: int = 1000
    seed: int = 0
    views: int = 1
    policy: AugmentPolicy = field(default_factory=AugmentPolicy)
    view_seed: int = 0
    caption_weights: Mapping[str, float] = field(default_factory=dict)
    captions: Literal["required", "optional"] = "required"
    language: str = "en"
    on_bad_sample: str = "skip"
    draft: bool = True
    max_bad_share: float = 0.05


@dataclass
class Made:
    """One batch. Samples of no use are counted in `tally` (since this worker's last batch) and not in the batch.

    worker: who made it. position: of that worker after it. uids, shards: of each picture, and its shard's name.
    views: which view is shown. captions: the one drawn, or None. group: int64 [B], equal for equal captions (up to case
    and spaces). ids: int32 [C, L], token ids of the captions there are, in order.
    pixels: for each of `StreamSettings.specs` uint8 [B, size, size, 3].
    error: (kind, sentence) in place of all that, where the worker had to stop.
    """

    worker: int
    position: Position
    tally: Tally
    uids: list[str]
    shards: list[str]
    views: list[int]
    captions: list[str | None]
    group: Tensor
    ids: Tensor
    pixels: list[Tensor]
    error: tuple[str, str] | None = None

    def pin_memory(self) -> Made:
        """Into page-locked memory, from which a GPU copies faster; called by torch's loader."""
        return replace(self, pixels=[pixels.pin_memory() for pixels in self.pixels])


class BatchMaker:
    """The endless row of batches of reader `slot` of `slots`, from `start`.

    status: int64 [2] that is kept at (process id, turn), for whoever wants to know what this reader is doing.
    """

    def __init__(
        self,
        settings: StreamSettings,
        *,
        worker: int,
        slot: int,
        slots: int,
        start: Position = BEGINNING,
        status: Tensor | None = None,
    ) -> None:
        self.settings, self.worker, self.status = settings, worker, status
        order = ShardOrder(len(settings.shards), slot=slot, slots=slots, order=settings.order, seed=settings.seed)
        self.stream = SampleStream(
            settings.shards,
            order,
            buffer=settings.buffer,
            start=start,
            captions=settings.captions,
            language=settings.language,
            on_bad_sample=settings.on_bad_sample,
            max_bad_share=settings.max_bad_share,
        )
        self.tokenizer = Tokenizer(settings.tokenizer_json, settings.text_spec)

    def __iter__(self) -> Iterator[Made]:
        """Raises PocketvlmError: too much is of no use, or the first bad sample where that is refused."""
        rows: list[tuple[Drawn, Sample, int, Caption | None, list[np.ndarray[Any, Any]]]] = []
        self._tell(self.stream.start.turn)
        for drawn in self.stream:
            self._tell(drawn.position.turn)
            row = self._row(drawn)
            if row is not None:
                rows.append(row)
            if len(rows) == self.settings.batch_size:
                yield self._batch(rows, self.stream.take_tally())
                rows = []

    def _tell(self, turn: int) -> None:
        if self.status is not None:
            self.status[0], self.status[1] = os.getpid(), turn

    def _row(self, drawn: Drawn) -> Any:
        sample, settings = drawn.sample, self.settings
        if sample is None:
            return None
        # the same sample has another view and caption in another epoch
        key = f"{settings.seed}/{sample.uid}/{drawn.number}"
        try:
            captions = self._captions(sample)
            if captions is None:
                return None
            view = stable_hash(f"view/{key}") % settings.views
            params = view_params(sample.uid, view, settings.view_seed, settings.policy)
            pixels = decoded_views(sample.image.read(), params, settings.specs, draft=settings.draft)
        except BadSampleError as error:
            self.stream.refuse(error, sample.uid)
            return None
        return drawn, sample, view, draw_caption(captions, f"caption/{key}"), pixels

    def _captions(self, sample: Sample) -> list[Caption] | None:
        """Those that can be drawn; None where none is left of a sample that must have one."""
        weights, tally = self.settings.caption_weights, self.stream.tally
        heavy = [replace(c, weight=c.weight * weights.get(c.source, 1.0)) for c in sample.captions]
        bad = unfit(self.tokenizer, [caption.text for caption in heavy]) if heavy else {}
        for error in bad.values():
            tally.report.add_error(error, sample.uid)
        kept = [caption for caption in heavy if caption.weight and caption.text not in bad]
        if kept or self.settings.captions == "optional":
            return kept
        tally.bad_samples += 1
        return None

    def _batch(self, rows: Sequence[Any], tally: Tally) -> Made:
        drawn, samples, views, captions, pixels = zip(*rows)
        texts = [caption.text for caption in captions if caption is not None]
        shards = self.settings.shards
        return Made(
            worker=self.worker,
            position=drawn[-1].position,
            tally=tally,
            uids=[sample.uid for sample in samples],
            shards=[shards[self.stream.order.shard(one.position.turn)[1]].name for one in drawn],
            views=list(views),
            captions=[None if caption is None else caption.text for caption in captions],
            group=torch.tensor([_group(s, c) for s, c in zip(samples, captions)], dtype=torch.int64),
            ids=torch.from_numpy(self.tokenizer.encode(texts)) if texts else torch.zeros(0, 1, dtype=torch.int32),
            pixels=[torch.from_numpy(np.stack(one)) for one in zip(*pixels)],
        )


def _group(sample: Sample, caption: Caption | None) -> int:
    """Equal for equal captions of all pictures there are, and negative where there is none."""
    if caption is None:
        return -1 - (stable_hash(sample.uid) >> 1)
    return stable_hash(" ".join(caption.text.casefold().split())) >> 1


class _Workers(IterableDataset[Made]):
    """What torch's loader runs in each worker process."""

    def __init__(self, loader: StreamLoader, status: Tensor) -> None:
        self.settings, self.rank, self.ranks = loader.settings, loader.rank, loader.ranks
        self.count, self.first, self.positions = loader.readers, loader.next, list(loader.positions)
        self.status = status

    def __iter__(self) -> Iterator[Made]:
        info = get_worker_info()
        # torch asks its workers in turn and begins with its first, which is here whoever's turn it is
        worker = (self.first + (info.id if info is not None else 0)) % self.count
        start = self.positions[worker]
        try:
            yield from BatchMaker(
                self.settings,
                worker=worker,
                slot=worker * self.ranks + self.rank,
                slots=self.count * self.ranks,
                start=start,
                status=self.status[worker],
            )
        except PocketvlmError as error:
            # torch would hand on a traceback in place of the sentence
            kind = "sample" if isinstance(error, BadSampleError) else "usage"
            empty = torch.zeros(0, dtype=torch.int64)
            yield Made(worker, start, Tally(), [], [], [], [], empty, empty, [], (kind, str(error)))


class StreamLoader:
    """An endless iterator of batches, whose state is small, exact and JSON.

    rank, ranks: this process among those of the run. workers: processes that make batches; 0 makes them here, in the
    same order as 1 does. pin: hand batches over in page-locked memory.

    Worker processes start from a clean server process ("forkserver", elsewhere than on Linux "spawn"): to fork a
    process in which threads of torch and CUDA run can hang. A script that trains with workers therefore needs the usual
    `if __name__ == "__main__":`.
    """

    def __init__(
        self, settings: StreamSettings, *, rank: int = 0, ranks: int = 1, workers: int = 0, pin: bool = False
    ) -> None:
        self.settings, self.rank, self.ranks, self.workers, self.pin = settings, rank, ranks, workers, pin
        self.readers = max(1, workers)
        self.positions = [BEGINNING] * self.readers
        self.next = self._first = 0
        self.tally = Tally()
        self.opened: Iterator[Made] | None = None
        self._status = torch.zeros(self.readers, 2, dtype=torch.int64)

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> Made:
        """The next batch.

        Raises:
            UsageError: too much of the data is of no use. BadSampleError: the first bad sample, where that is refused.
            WorkerError: a worker ended.
        """
        if self.opened is None:
            self.opened = self._open()
        try:
            made = next(self.opened)
        # torch notices a death by itself, or fails to fetch a batch that the dead still held
        except (RuntimeError, OSError, EOFError) as error:
            worker = self._dead_worker() if self.workers and not isinstance(error, PocketvlmError) else None
            if worker is None:
                raise
            raise self._death(worker) from error
        if made.error is not None:
            self.close()
            kind, sentence = made.error
            raise BadSampleError(sentence, reason="refused") if kind == "sample" else UsageError(sentence)
        self.positions[made.worker] = made.position
        self.next = (made.worker + 1) % self.readers
        self.tally.add(made.tally)
        self.tally.check(self.settings.max_bad_share)
        return made

    def close(self) -> None:
        """End the workers; the next batch would start them again where the last one ended."""
        if self.opened is not None and self.workers:
            opened: Any = self.opened
            opened._shutdown_workers()
        self.opened = None

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the last batch that was given out, as plain JSON types."""
        return {
            "schema": _STATE_SCHEMA,
            **self._identity(),
            "next": self.next,
            "positions": [[position.turn, position.drawn] for position in self.positions],
            "tally": self.tally.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            IntegrityError: the state belongs to another stream; the sentence names what differs.
        """
        if state.get("schema") != _STATE_SCHEMA:
            raise IntegrityError(
                f"the position of the data was saved under schema {state.get('schema')} and this release reads "
                f"{_STATE_SCHEMA}, so samples would be repeated or missed; finish that run with the release "
                "that began it"
            )
        own = self._identity()
        differ = [f"{key} {state.get(key)!r} then and {own[key]!r} now" for key in own if state.get(key) != own[key]]
        if differ:
            raise IntegrityError(
                f"the position of the data was saved with other settings ({'; '.join(differ)}), so samples would be "
                "repeated or missed; continue with those, or start anew with --overwrite"
            )
        self.close()
        self.next = int(state["next"])
        self.positions = [Position(int(turn), int(drawn)) for turn, drawn in state["positions"]]
        self.tally = Tally.from_dict(state["tally"], self.settings.on_bad_sample)

    def _identity(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "shards": f"{len(settings.shards)} ({digest_shards(settings.shards)[:16]})",
            "order": settings.order,
            "buffer": settings.buffer,
            "seed": settings.seed,
            "rank": self.rank,
            "ranks": self.ranks,
            # 0 and 1 workers read alike
            "workers": self.readers,
        }

    def _open(self) -> Iterator[Made]:
        if not self.workers:
            return iter(_Workers(self, self._status))
        self._first = self.next
        self._status.share_memory_()
        loader: DataLoader[Made] = DataLoader(
            _Workers(self, self._status),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_AHEAD,
            persistent_workers=True,
            pin_memory=self.pin,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context(),
        )
        return iter(loader)

    def _dead_worker(self) -> int | None:
        """Which worker process is gone."""
        opened: Any = self.opened
        for _ in range(50):  # the system may take a moment to say so
            for place, process in enumerate(opened._workers):
                if not process.is_alive():
                    return (self._first + place) % self.readers
            time.sleep(0.1)
        return None

    def _death(self, worker: int) -> WorkerError:
        pid, turn = (int(number) for number in self._status[worker])
        row = ShardOrder(
            len(self.settings.shards),
            slot=worker * self.ranks + self.rank,
            slots=self.readers * self.ranks,
            order=self.settings.order,
            seed=self.settings.seed,
        )
        what = f"(process {pid}) of rank {self.rank} ended while it read shard"
        what = f"{what} {self.settings.shards[row.shard(turn)[1]].place}" if pid else "ended before it read anything"
        return WorkerError(
            f"data worker {worker} {what}, so no batch comes from it; look for a lack of memory or of shared memory "
            "(/dev/shm), or train with data.stream.workers=0 to see its error, and continue with --resume"
        )


def start_server() -> None:
    """Begin to start the process that workers come from: its imports take seconds, in which a run loads its models."""
    if sys.platform == "linux":
        _context()
        if threading.current_thread() is not threading.main_thread():  # which alone may change handlers
            forkserver.ensure_running()
            return
        # a signal to the whole group (torchrun, Slurm, a terminal) is for the run, which saves and ends it
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGTERM, before)


def _start_worker(_: int) -> None:
    # each worker is one of many; threads of its own would only fight for cores
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "setsid"):  # a run that waits for a batch shall not lose it to a signal that asks it to save
        os.setsid()
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    # torch's workers watch the server process instead, which lives as long as they do: a killed run would leave both
    run = multiprocessing.parent_process()
    assert run is not None, "a worker was started by somebody"
    run.join()
    os._exit(1)


def _context() -> Any:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # imported once, by the server, and not once by each worker
    context.set_forkserver_preload([__name__])
    return context
