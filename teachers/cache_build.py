"""Building a teacher cache (`teachers.cache`): alone, or many processes over one folder, each with its share of shards.

Which pictures lie in a shard, and in which batches the teacher sees them, depends on the request alone. So the files
have the same bytes however many processes made them and however often they were killed. Pictures are decoded, and
finished shards written, by threads while the teacher works.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pocketvlm.data.augment import VIEW_NUMBERS, AugmentPolicy, ViewParams, apply_view, view_params
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import BadSampleError, IntegrityError
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.teachers.base import Teacher, TeacherOutput, TextTeacher, TokenTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import (
    DTYPES,
    SCHEMA_VERSION,
    CacheInfo,
    check_version,
    digest_names,
    read_meta,
    refuse_difference,
    save_json,
    write_manifest,
    write_shard,
)
from pocketvlm.teachers.cache_request import Cost, check_request, describe
from pocketvlm.teachers.files import Progress, remove_leftovers, sha256_file
from pocketvlm.teachers.tokens import on_grid
from pocketvlm.teachers.top_logits import TopLogits, id_dtype, largest, log_shares, text_rows

# batches that are decoded ahead of the teacher
_AHEAD = 2
# threads that decode, where there are so many cores
DECODERS = 4
_TEXTS = 4096

# its views [K, S, S, 3] uint8, the same packed, and the sha256 of its bytes; or why it cannot be decoded
Loaded = tuple[np.ndarray, list[tuple[int, ...]], str] | BadSampleError


@dataclass(frozen=True)
class _Job:
    """One shard. uids, words: what it will hold, where that is known before its data shard `data` is opened."""

    file: str
    open: Callable[[], tuple[Sequence[Sample], Sequence[str]]]
    pictures: bool
    uids: tuple[str, ...] | None = None
    words: tuple[str, ...] | None = None
    data: str = ""


@dataclass
class _Rows:
    """What a shard holds so far."""

    outputs: list[TeacherOutput] = field(default_factory=list)
    uids: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    views: list[list[tuple[int, ...]]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


_Batch = tuple[_Job, Sequence[Sample], "list[Future[Loaded]]", "list[str] | None"]


class CacheBuild:
    """A cache to be made: `cost` says what it will take, `run` makes it, or this process's share of it."""

    def __init__(
        self,
        teacher: Teacher,
        samples: Sequence[Sample],
        texts: Sequence[str],
        folder: str | Path,
        *,
        views: int = 1,
        policy: AugmentPolicy | None = None,
        seed: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        batch_size: int = 32,
        shard_size: int = 512,
        token_grid: int = 0,
        features: bool = True,
        on_bad_sample: Literal["refuse", "skip"] = "refuse",
        data_shards: Mapping[str, Callable[[], Sequence[Sample]]] | None = None,
        logits: TopLogits | None = None,
    ) -> None:
        """Arguments as in `build_cache`.

        data_shards: in place of `samples`, name -> the samples of one data shard, opened when their turn comes; each
        becomes one shard of the cache, with its captions in it (`TeacherCache.of_shard`), or of a teacher of texts
        alone with nothing else in it.
        """
        self.teacher, self.folder, self.on_bad_sample = teacher, Path(folder), on_bad_sample
        self.logits, self._anchors = logits, torch.zeros(0)
        texts = list(dict.fromkeys([*texts, *(logits.texts if logits is not None else ())]))
        shards, blind = dict(data_shards or {}), isinstance(teacher, TextTeacher)
        check_request([s.uid for s in samples], texts, shards, views, policy, dtype)
        # one view needs no policy, and two caches of plain pictures are the same cache
        self.policy = policy if views > 1 else None
        self.batch_size, self.samples, self.texts = batch_size, samples, texts
        self.info = describe(
            teacher,
            views=views,
            policy=self.policy,
            seed=seed,
            dtype=dtype,
            size=shard_size,
            grid=token_grid,
            features=features,
            pictures=bool(samples or (shards and not blind)),
            samples=digest_names([s.uid for s in samples] if not shards else ["data shards", *shards]),
            texts=digest_names(texts),
            any_text=bool(texts or shards),
            logits=logits,
        )
        self.jobs = [*_by_data(shards, blind)] if shards else [*_slices(samples, shard_size)]
        self.jobs += _text_slices(texts, max(shard_size, _TEXTS))

    def cost(self) -> Cost:
        """What the pictures and texts that are known will take; those of data shards are known when they are opened."""
        return Cost.of(self.info, [s.uid for s in self.samples], self.texts)

    def run(self, progress: Progress | None = None, *, rank: int = 0, world: int = 1) -> TeacherCache | None:
        """Make the shards rank, rank + world, ... that are not there; who then finds all of them writes `cache.json`.

        Returns the cache, or None while other processes still have shards to make. A finished cache is opened.

        Raises:
            IntegrityError: `folder` was begun with something else; the message names what differs.
            BadSampleError: an image cannot be decoded and `on_bad_sample` is "refuse".
            CacheWriteError: a full disk; what was made before is kept.
        """
        folder, info = self.folder, self.info
        if (folder / "cache.json").exists():
            cache = TeacherCache.open(folder)
            refuse_difference(folder, cache.info.to_dict(), info.to_dict())
            # left by a process that ended after it had named the manifest
            (folder / "build.json").unlink(missing_ok=True)
            return cache
        self._begin()
        own = self.jobs[rank::world]
        tell = _Teller(progress, own)
        todo = []
        for job in own:
            if self._complete(job):
                tell.skip(job)
            else:
                todo.append(job)
        self._make(todo, tell)
        return self._finish()

    def _begin(self) -> None:
        """Refuse a folder that was begun with something else, and mark it as begun with this."""
        folder, plan = self.folder, {**self.info.to_dict(), "batch_size": self.batch_size}
        # another process that builds the same cache removes the file when it is done
        with contextlib.suppress(FileNotFoundError):
            text = (folder / "build.json").read_text(encoding="utf-8")
            try:
                started = json.loads(text)
            except ValueError as error:
                raise IntegrityError(f"{folder}/build.json is not JSON ({error}); delete the folder") from error
            check_version(folder, started)
            found = {**CacheInfo.from_dict(started["info"]).to_dict(), "batch_size": started["batch_size"]}
            refuse_difference(folder, found, plan)
        save_json(
            folder / "build.json",
            {"schema_version": SCHEMA_VERSION, "info": self.info.to_dict(), "batch_size": self.batch_size},
        )
        remove_leftovers(folder)

    def _complete(self, job: _Job) -> bool:
        """Whether this shard is there (shards are written atomically, so existing means whole)."""
        path = self.folder / job.file
        if not path.exists():
            return False
        try:
            meta = read_meta(path)
        except IntegrityError:
            return False
        if job.data:
            return meta.get("data") == job.data
        if job.uids is not None:
            names = set(meta.get("uids", ())) | set(meta.get("skipped", {}))
            return names == set(job.uids)
        return meta.get("texts") == list(job.words or ())

    def _finish(self) -> TeacherCache | None:
        if not all(self._complete(job) for job in self.jobs):
            return None
        skipped: dict[str, str] = {}
        shards, text_shards = [], []
        for job in self.jobs:
            path = self.folder / job.file
            meta = read_meta(path)
            row: dict[str, Any] = {"file": job.file, "sha256": sha256_file(path)}
            if job.pictures:
                skipped |= meta["skipped"]
                row["count"] = len(meta["uids"])
                if job.data:
                    row |= {"data": job.data, "texts": len(meta["texts"])}
                shards.append(row)
            else:
                text_shards.append({**row, "count": len(meta["texts"])})
        write_manifest(self.folder, self.info, shards=shards, text_shards=text_shards, skipped=skipped)
        (self.folder / "build.json").unlink(missing_ok=True)
        # the hashes were taken a moment ago
        return TeacherCache.open(self.folder, verify=False)

    def _make(self, jobs: Sequence[_Job], tell: _Teller) -> None:
        """All shards of `jobs`, one after the other; the next batches are decoded while the teacher works."""
        if self.logits is not None and any(job.pictures for job in jobs):
            self._anchors = text_rows(self.teacher, self.logits.texts)
        workers = min(DECODERS, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers, "decode") as pool, ThreadPoolExecutor(1, "write") as writer:
            waiting: deque[tuple[_Job, Sequence[Sample], list[Future[Loaded]], list[str] | None]] = deque()
            batches = self._batches(jobs)
            rows, written = _Rows(), None
            try:
                while True:
                    while len(waiting) <= _AHEAD and (batch := next(batches, None)) is not None:
                        job, group, words = batch
                        waiting.append((job, group, [pool.submit(self._load, s) for s in group], words))
                    if not waiting:
                        break
                    job, group, loading, words = waiting.popleft()
                    self._encode(group, [one.result() for one in loading], rows)
                    tell.pictures(job, len(group))
                    if words is None:
                        continue
                    tensors, meta = self._shard(job, rows, words, tell)
                    rows = _Rows()
                    if written is not None:
                        written.result()
                    written = writer.submit(write_shard, self.folder / job.file, tensors, meta)
                    tell.done(job)
            finally:
                for _, _, loading, _ in waiting:
                    for one in loading:
                        one.cancel()
            if written is not None:
                written.result()

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[tuple[_Job, Sequence[Sample], list[str] | None]]:
        """(shard, its next pictures, its texts with the last of its batches)."""
        # whole images per batch, so that a batch holds at most about batch_size pictures
        step = max(1, self.batch_size // self.info.views)
        for job in jobs:
            samples, words = job.open()
            starts = range(0, max(1, len(samples)), step)
            for start in starts:
                yield job, samples[start : start + step], list(words) if start == starts[-1] else None

    def _load(self, sample: Sample) -> Loaded:
        spec, info = self.teacher.image, self.info
        try:
            data = sample.image.read()
            pixels = decode_image(data, background=spec.background)
            stack, drawn = [resize_image(pixels, spec)], [ViewParams(identity=True)]
            if self.policy is not None:
                for view in range(1, info.views):
                    drawn.append(view_params(sample.uid, view, info.seed, self.policy))
                    stack.append(apply_view(pixels, drawn[-1], spec.size, spec.background))
        except BadSampleError as error:
            return error
        return np.stack(stack), [one.packed() for one in drawn], hashlib.sha256(data).hexdigest()

    def _encode(self, group: Sequence[Sample], loaded: Sequence[Loaded], rows: _Rows) -> None:
        good = []
        for sample, item in zip(group, loaded):
            if isinstance(item, BadSampleError):
                if self.on_bad_sample == "refuse":
                    raise item
                rows.skipped[sample.uid] = item.reason
                continue
            pixels, drawn, digest = item
            good.append(pixels)
            rows.uids.append(sample.uid)
            rows.views.append(drawn)
            rows.hashes.append(digest)
        if good:
            rows.outputs.append(self._encoded(torch.from_numpy(np.concatenate(good))))

    def _encoded(self, pixels: Tensor) -> TeacherOutput:
        teacher, info, taps = self.teacher, self.info, {}
        if info.token_grid:
            assert isinstance(teacher, TokenTeacher), "token_shape asked before"
            output = teacher.encode_image_tokens(pixels)
            # at once in the stored form: a shard's maps in full would be the largest thing in memory
            taps["tokens"] = on_grid(output.taps["tokens"].float(), info.token_grid).to(DTYPES[info.dtype])
        else:
            output = teacher.encode_images(pixels)
        if info.top_logits:
            shares = log_shares(output.embedding, self._anchors, teacher.logit_scale)
            taps["logits"], taps["logit_ids"] = largest(shares, info.top_logits)
        return _to_cpu(TeacherOutput(output.embedding, output.features, taps), teacher.name)

    def _shard(
        self, job: _Job, rows: _Rows, words: Sequence[str], tell: _Teller
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        info = self.info
        tensors: dict[str, Tensor] = {}
        meta: dict[str, Any] = {}
        if job.pictures:
            tensors = _stack(rows.outputs, info, "image", info.dim, info.feature_dim)
            tensors = {key: value.view(len(rows.uids), info.views, *value.shape[1:]) for key, value in tensors.items()}
            if self.policy is not None:
                kept = torch.tensor(rows.views, dtype=torch.int32)
                tensors["views"] = kept.view(len(rows.uids), info.views, VIEW_NUMBERS)
            meta = {"uids": rows.uids, "bytes_sha256": rows.hashes, "skipped": rows.skipped}
        if job.data or not job.pictures:
            outputs, step = [], self.batch_size * 8
            for start in range(0, len(words), step):
                outputs.append(_to_cpu(self.teacher.encode_texts(words[start : start + step]), self.teacher.name))
                tell.texts(job, min(start + step, len(words)))
            found = _stack(outputs, info, "text", info.dim, info.text_feature_dim)
            if job.data and "features" in found:
                found["text_features"] = found.pop("features")
            tensors |= found
            meta["texts"] = list(words)
        if job.data:
            meta["data"] = job.data
        return tensors, meta


def build_cache(
    teacher: Teacher,
    samples: Sequence[Sample],
    texts: Sequence[str],
    folder: str | Path,
    *,
    progress: Progress | None = None,
    **how: Any,
) -> TeacherCache:
    """Run `teacher` over every view of every image and every distinct text, once, into `folder`.

    how: the options of `CacheBuild`:
    views: K; view 0 is plain preprocessing, views 1..K-1 are drawn by `data.augment.view_params(uid, view, seed,
    policy)`, so a student can replay them at its own size. dtype: storage only; the teacher computes in float32.
    token_grid: keep the last image tokens too, averaged to this many places in a row (0: none; see `token_bytes`).
    logits: keep of each view the largest logits over a list of texts, which are kept as texts too (`top_logits`).
    features: keep the pooled features where the teacher has them.
    on_bad_sample: "skip" leaves undecodable images out and lists them in `TeacherCache.skipped`.
    progress: called as (done, total, "teacher images" | "teacher texts").

    A finished cache of the same teacher and inputs is opened and returned; an unfinished one is continued.

    Raises:
        UsageError: nothing to cache, a duplicate uid, more views without a policy, or tokens that the teacher lacks.
        IntegrityError: `folder` was begun with something else; the message names what differs.
        BadSampleError: an image cannot be decoded and `on_bad_sample` is "refuse".
        CacheWriteError: the disk is full or not writable.
    """
    cache = CacheBuild(teacher, samples, texts, folder, **how).run(progress)
    if cache is None:
        raise IntegrityError(
            f"shards of the cache {folder} that were just made are gone or changed, so somebody else writes there; "
            "start again, or give every run a folder of its own"
        )
    return cache


class _Teller:
    """Progress over this process's shards, in pictures and texts, or in shards where their sizes are not known."""

    def __init__(self, progress: Progress | None, jobs: Sequence[_Job]) -> None:
        self._tell = progress or (lambda done, total, what: None)
        self._by_data = any(job.data for job in jobs)
        self._total = {
            "teacher images": sum(len(job.uids or ()) for job in jobs),
            "teacher texts": sum(len(job.words or ()) for job in jobs if not job.pictures),
            "data shards": len(jobs),
        }
        self._done = dict.fromkeys(self._total, 0)

    def pictures(self, job: _Job, count: int) -> None:
        if job.pictures and not job.data:
            self._add("teacher images", count)

    def texts(self, job: _Job, done: int) -> None:
        if not job.pictures and done < len(job.words or ()):
            self._tell(self._done["teacher texts"] + done, self._total["teacher texts"], "teacher texts")

    def done(self, job: _Job) -> None:
        if self._by_data:
            self._add("data shards", 1)
        elif not job.pictures:
            self._add("teacher texts", len(job.words or ()))

    def skip(self, job: _Job) -> None:
        self.pictures(job, len(job.uids or ()))
        self.done(job)

    def _add(self, what: str, count: int) -> None:
        self._done[what] += count
        self._tell(self._done[what], self._total[what], what)


def _slices(samples: Sequence[Sample], size: int) -> Iterator[_Job]:
    for number, start in enumerate(range(0, len(samples), size)):
        part = samples[start : start + size]
        uids = tuple(s.uid for s in part)
        yield _Job(f"shard-{number:05d}.safetensors", lambda part=part: (part, ()), True, uids=uids)  # type: ignore[misc]


def _text_slices(texts: Sequence[str], size: int) -> Iterator[_Job]:
    for number, start in enumerate(range(0, len(texts), size)):
        block = tuple(texts[start : start + size])
        yield _Job(f"text-{number:05d}.safetensors", lambda block=block: ((), block), False, words=block)  # type: ignore[misc]


def _by_data(shards: Mapping[str, Callable[[], Sequence[Sample]]], blind: bool) -> Iterator[_Job]:
    for number, (name, load) in enumerate(shards.items()):
        yield _Job(f"shard-{number:05d}.safetensors", lambda load=load: _with_texts(load(), blind), True, data=name)  # type: ignore[misc]


def _with_texts(samples: Sequence[Sample], blind: bool) -> tuple[Sequence[Sample], Sequence[str]]:
    """A shard's pictures and captions; of a teacher without an image tower the captions alone."""
    texts = list(dict.fromkeys(caption.text for sample in samples for caption in sample.captions))
    return () if blind else samples, texts


def _to_cpu(output: TeacherOutput, name: str) -> TeacherOutput:
    embedding = output.embedding.float().cpu()
    features = None if output.features is None else output.features.float().cpu()
    taps = {key: value.cpu() for key, value in output.taps.items()}
    if not all(bool(torch.isfinite(part).all()) for part in (embedding, features, *taps.values()) if part is not None):
        raise IntegrityError(
            f"teacher {name!r} gave a non-finite output, which would poison every student made from the cache; "
            "check its weights and run it in float32"
        )
    return TeacherOutput(embedding, features, taps)


def _stack(rows: list[TeacherOutput], info: CacheInfo, key: str, dim: int, feature_dim: int) -> dict[str, Tensor]:
    dtype = DTYPES[info.dtype]
    # a shard of which every picture was skipped still has its (empty) tensors
    out = {key: torch.cat([torch.zeros(0, dim), *(r.embedding for r in rows)])}
    if feature_dim:
        features = [r.features for r in rows if r.features is not None]
        out["features"] = torch.cat([torch.zeros(0, feature_dim), *features])
    if info.token_grid and key == "image":
        empty = torch.zeros(0, info.token_grid**2, info.token_dim, dtype=dtype)
        out["tokens"] = torch.cat([empty, *(r.taps["tokens"] for r in rows)])
    out = {k: v.to(dtype) for k, v in out.items()}
    if info.top_logits and key == "image":
        top, ids = info.top_logits, id_dtype(info.logit_count)
        kept = [torch.zeros(0, top + 1, dtype=torch.float16), *(r.taps["logits"] for r in rows)]
        which = [torch.zeros(0, top, dtype=torch.int64), *(r.taps["logit_ids"] for r in rows)]
        out |= {"logits": torch.cat(kept), "logit_ids": torch.cat(which).to(ids)}
    return out
