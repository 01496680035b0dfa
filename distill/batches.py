"""Which pictures, views, captions and texts make up step n: a pure function of (seed, n), so that a run resumes
at any step without replaying the ones before, and an order can be checked without training."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.data.sample import Sample
from pocketvlm.data.splits import draw_caption, stable_hash
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """One step's choices. rows: sample indices [B]. views: [B]. captions: the chosen caption of each row or None.
    group: int64 [B], equal for equal captions. words: indices into the text pool [T]."""

    rows: list[int]
    views: list[int]
    captions: list[str | None]
    group: NDArray[np.int64]
    words: list[int]

    def part(self, rows: slice, words: slice) -> Plan:
        """A rank's rows and words of it."""
        mine = self.rows[rows], self.views[rows], self.captions[rows], self.group[rows]
        return Plan(*mine, self.words[words])


class Order:
    """The stateless order of a run.

    An epoch is one permutation of the samples, drawn from (seed, epoch); a last incomplete batch is left out. A
    batch larger than the data set is the data set. With `captioned_fraction`, each batch is made of two
    independent streams, captioned and not, so that few captions are seen often enough. `marked` says of each sample
    whether it counts as captioned there, where that is not what decides (labels of a task).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        batch_size: int,
        views: int,
        seed: int,
        captioned_fraction: float | None = None,
        text_pool: int = 0,
        text_batch: int = 0,
        marked: Sequence[bool] | None = None,
    ) -> None:
        self.samples, self.views, self.seed = samples, views, seed
        self.text_pool, self.text_batch = text_pool, min(text_batch, text_pool)
        everyone = list(range(len(samples)))
        chosen = [bool(sample.captions) for sample in samples] if marked is None else marked
        with_caption = [i for i in everyone if chosen[i]]
        without = [i for i in everyone if not chosen[i]]
        if captioned_fraction is None or not (with_caption and without):
            pool = everyone if captioned_fraction is None else (with_caption or without)
            self.streams = [(pool, min(batch_size, len(pool)))]
        else:
            many = min(round(captioned_fraction * batch_size), len(with_caption))
            few = min(batch_size - round(captioned_fraction * batch_size), len(without))
            self.streams = [(pool, count) for pool, count in ((with_caption, many), (without, few)) if count]
        self.batch_size = sum(count for _, count in self.streams)
        if self.batch_size == 0:
            raise UsageError("no sample is left to train on, so there is nothing to learn from; check data.train")
        # a caption's identity, so that equal captions of different pictures are not pushed apart
        texts = dict.fromkeys(_fold(c.text) for s in samples for c in s.captions)
        self._caption_id = {text: number for number, text in enumerate(texts)}

    def plan(self, step: int) -> Plan:
        """The choices of a 0-based step of the main phase."""
        rows: list[int] = []
        for stream, (pool, count) in enumerate(self.streams):
            rows += [pool[i] for i in self._take(len(pool), count, step, f"pictures{stream}")]
        captions = [self._caption(self.samples[row], step) for row in rows]
        group = [self._caption_id[_fold(text)] if text is not None else -1 - row for row, text in zip(rows, captions)]
        views = [stable_hash(f"view/{self.seed}/{self.samples[row].uid}/{step}") % self.views for row in rows]
        return Plan(rows, views, captions, np.array(group, np.int64), self.words(step))

    def words(self, step: int, phase: str = "words") -> list[int]:
        """Indices into the text pool of a 0-based step; `phase` names an independent stream."""
        if not self.text_batch:
            return []
        return self._take(self.text_pool, self.text_batch, step, phase)

    def _take(self, size: int, count: int, step: int, stream: str) -> list[int]:
        per_epoch = max(1, size // count)
        epoch, place = divmod(step, per_epoch)
        order = self._permutation(size, stable_hash(f"{stream}/{self.seed}/{epoch}"))
        return order[place * count : (place + 1) * count].tolist()

    def _permutation(self, size: int, key: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64(key)).permutation(size)

    def _caption(self, sample: Sample, step: int) -> str | None:
        drawn = draw_caption(sample.captions, f"caption/{self.seed}/{sample.uid}/{step}")
        return None if drawn is None else drawn.text


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())


class Pictures:
    """Decoded pictures and finished views of one size, kept in memory while they fit.

    Each picture is decoded once. Its source stays in memory (shorter side at most `source_px`), and so does each
    finished view, until `budget` bytes are used; past that they are made again on every use, with equal results.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        spec: ImageSpec,
        *,
        policy: Any,
        seed: int,
        source_px: int = 256,
        budget: int = 2 << 30,
    ) -> None:
        self.samples, self.spec, self.policy, self.seed = samples, spec, policy, seed
        self.source_px, self.budget, self.used = source_px, budget, 0
        self._sources: dict[int, Pixels] = {}
        self._views: dict[tuple[int, int, int], Pixels] = {}
        self._lock = threading.Lock()

    def source(self, index: int) -> Pixels:
        """uint8 [H, W, 3], decoded, perhaps reduced.

        Raises:
            BadSampleError: it cannot be decoded.
        """
        found = self._sources.get(index)
        if found is None:
            from pocketvlm.edge.preprocess import decode_image

            found = _reduced(decode_image(self.samples[index].image.read()), self.source_px)
            self._keep(self._sources, index, found)
        return found

    def view(self, index: int, view: int, finer: int = 1) -> Pixels:
        """uint8 [S, S, 3] of one view, or the same view `finer` times as large; view 0 is what evaluation sees."""
        found = self._views.get((index, view, finer))
        if found is None:
            from pocketvlm.data.augment import apply_view, view_params

            params = view_params(self.samples[index].uid, view, self.seed, self.policy)
            spec = self.spec if finer == 1 else replace(self.spec, size=finer * self.spec.size)
            found = apply_view(self.source(index), params, spec.size, spec=spec)
            self._keep(self._views, (index, view, finer), found)
        return found

    def digest(self) -> str:
        """sha256 over the uids and the encoded bytes of all pictures, in order (reads them all)."""
        found = hashlib.sha256()
        for sample in self.samples:
            found.update(f"{sample.uid}|".encode())
            found.update(hashlib.sha256(sample.image.read()).digest())
        return found.hexdigest()

    def batch(self, rows: Sequence[int], views: Sequence[int]) -> Pixels:
        """uint8 [B, S, S, 3]."""
        return np.stack([self.view(row, view) for row, view in zip(rows, views)])

    def _keep(self, store: dict[Any, Pixels], key: Any, value: Pixels) -> None:
        with self._lock:
            if key not in store and self.used + value.nbytes <= self.budget:
                store[key] = value
                self.used += value.nbytes


def _reduced(pixels: Pixels, shorter: int) -> Pixels:
    height, width = pixels.shape[:2]
    if not shorter or min(height, width) <= shorter:
        return pixels
    scale = shorter / min(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def prefetch(make: Callable[[int], Any], steps: range, *, depth: int = 2) -> Generator[Any, None, None]:
    """`make(step)` for each step in order, prepared by one background thread at most `depth` steps ahead."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        waiting: list[Future[Any]] = []
        ahead = iter(steps)
        try:
            for step in ahead:
                waiting.append(pool.submit(make, step))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
