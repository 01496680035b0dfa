"""Training from a stream (`data.stream` of a recipe): what is made ready, and how its batches become steps.

There is no list of samples. What must be known before the first step (are there captions, what is the tokenizer made
from) is asked of the first `data.stream.probe` samples; all else of each batch as it comes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import threading
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketvlm.data import open_data
from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.data.shards import Shard, ShardOrder, digest_shards, list_shards
from pocketvlm.data.source import DataSource, unfit
from pocketvlm.data.stream import SampleStream
from pocketvlm.distill.batches import Order, Pictures, Plan
from pocketvlm.distill.feed import Feed
from pocketvlm.distill.made_cache import MadeCaches
from pocketvlm.distill.prepare import Prepared, check_captions, digest_of, questions_for, teacher_outputs, together
from pocketvlm.distill.progress import Reporter, Stages
from pocketvlm.distill.ranks import ALONE, Ranks
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.regions import FINER, asked_regions, check_dense
from pocketvlm.distill.sections import StreamSection
from pocketvlm.distill.shares import check_shares
from pocketvlm.distill.start import start_student
from pocketvlm.distill.step import Step
from pocketvlm.distill.stream import Made, StreamLoader, StreamSettings, start_server
from pocketvlm.distill.student_teacher import open_teachers
from pocketvlm.distill.taps import asked_taps, tap_widths
from pocketvlm.distill.text_pool import asked_logits, text_pool
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError, counted
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.students import Student
from pocketvlm.teachers.base import Teacher, TeacherOutput, TextTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import CacheInfo, digest_names
from pocketvlm.teachers.ensemble import Ensemble, joined
from pocketvlm.teachers.tokens import gray, on_grid, token_shape

# positions of so many steps are kept: more than are made ahead
_KEPT = 64


@dataclasses.dataclass(frozen=True)
class StreamSource:
    """What a prepared run streams from. teachers: of the recipe, in its order, each with what answers for it: a cache,
    or the teacher itself ("live")."""

    shards: list[Shard]
    settings: StreamSettings
    answers: tuple[TeacherCache | LiveTeacher | None, ...]


class LiveTeacher:
    """A teacher that answers each batch as it comes. info: the widths of its answers, as of a cache."""

    def __init__(self, teacher: Teacher, grid: int | None, tokens: bool) -> None:
        self.teacher, self.sees = teacher, not isinstance(teacher, TextTeacher)
        self.grid, width = token_shape(teacher, grid) if tokens and self.sees else (0, 0)
        image = teacher.encode_images(gray(teacher)) if self.sees else TeacherOutput(torch.zeros(1, teacher.dim))
        text = teacher.encode_texts(["a"])
        self.info = CacheInfo(
            name=teacher.name,
            fingerprint=teacher.fingerprint,
            space_id=teacher.space_id,
            dim=teacher.dim,
            feature_dim=0 if image.features is None else image.features.shape[-1],
            text_feature_dim=0 if text.features is None else text.features.shape[-1],
            logit_scale=teacher.logit_scale,
            logit_bias=teacher.logit_bias,
            image=teacher.image,
            views=1,
            policy=None,
            seed=0,
            dtype="float32",
            shard_size=1,
            samples=digest_names([]),
            texts=digest_names([]),
            licences=teacher.licences,
            token_grid=self.grid,
            token_dim=width,
        )


class _Answers:
    """What a live teacher says to one batch, with the readers of a `TeacherCache`."""

    def __init__(self, live: LiveTeacher, made: Made, pixels: Tensor | None) -> None:
        self.info, self._live = live.info, live
        # a batch may hold a picture twice, where an epoch ends or shards are drawn with replacement
        self._places = {seen: place for place, seen in enumerate(zip(made.uids, made.views))}
        if pixels is not None:
            tokens = bool(live.grid)
            encode: Any = live.teacher.encode_image_tokens if tokens else live.teacher.encode_images  # type: ignore[attr-defined]
            self._images: TeacherOutput = encode(pixels)
        texts = list(dict.fromkeys(text for text in made.captions if text is not None))
        self._rows = {text: row for row, text in enumerate(texts)}
        self._texts = live.teacher.encode_texts(texts) if texts else TeacherOutput(torch.zeros(0, live.info.dim))

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._of(self._images.embedding, uids, views)

    def features(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._of(self._images.features, uids, views)

    def tokens(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._of(on_grid(self._images.taps["tokens"], self._live.grid), uids, views)

    def text(self, texts: Sequence[str]) -> Tensor:
        return self._texts.embedding.float().cpu()[[self._rows[text] for text in texts]]

    def text_features(self, texts: Sequence[str]) -> Tensor:
        found = self._texts.features
        if found is None:  # no caption in the batch
            return torch.zeros(0, self.info.text_feature_dim)
        return found.float().cpu()[[self._rows[text] for text in texts]]

    def _of(self, rows: Tensor | None, uids: Sequence[str], views: int | Sequence[int]) -> Tensor:
        assert rows is not None, "only what `info` promises is asked for"
        wanted = [views] * len(uids) if isinstance(views, int) else views
        return rows.float().cpu()[[self._places[seen] for seen in zip(uids, wanted)]]


class _FromShards:
    """Rows of a cache that was made by data shards, of which only those of one batch are opened."""

    def __init__(self, cache: TeacherCache, parts: dict[str, TeacherCache], made: Made) -> None:
        self.info = cache.info
        self._of_uid = {uid: parts[shard] for uid, shard in zip(made.uids, made.shards)}
        self._of_text = {text: parts[shard] for text, shard in zip(made.captions, made.shards) if text is not None}

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._pictures("image", uids, views)

    def features(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._pictures("features", uids, views)

    def tokens(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        return self._pictures("tokens", uids, views)

    def text(self, texts: Sequence[str]) -> Tensor:
        return self._texts("text", texts, self.info.dim)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return self._texts("text_features", texts, self.info.text_feature_dim)

    def logits(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> tuple[Tensor, Tensor]:
        wanted = [views] * len(uids) if isinstance(views, int) else list(views)
        kept, ids = zip(*(self._of_uid[uid].logits([uid], [view]) for uid, view in zip(uids, wanted)))
        return torch.cat(kept), torch.cat(ids)

    def _pictures(self, what: str, uids: Sequence[str], views: int | Sequence[int]) -> Tensor:
        wanted = [views] * len(uids) if isinstance(views, int) else list(views)
        return torch.cat([getattr(self._of_uid[uid], what)([uid], [view]) for uid, view in zip(uids, wanted)])

    def _texts(self, what: str, texts: Sequence[str], width: int) -> Tensor:
        rows = [getattr(self._of_text[text], what)([text]) for text in texts]
        return torch.cat(rows) if rows else torch.zeros(0, width)


class _BatchPictures:
    """The views of one batch, in place of `batches.Pictures`."""

    def __init__(self, spec: ImageSpec, pixels: dict[int, np.ndarray[Any, Any]]) -> None:
        self.spec, self._pixels = spec, pixels

    def batch(self, rows: Sequence[int], views: Sequence[int]) -> np.ndarray[Any, Any]:
        whole = self._pixels[1]
        return whole if list(rows) == list(range(len(whole))) else whole[list(rows)]

    def view(self, index: int, view: int, finer: int = 1) -> np.ndarray[Any, Any]:
        return self._pixels[finer][index]


class _Given:
    """An order whose one plan is known."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, step: int) -> Plan:
        return self._plan


class StreamFeed(Feed):
    """A `Feed` whose steps come from a stream. `make` must be called for one step after the other.

    Each rank has its own shards and makes its part of the global batch.
    """

    def __init__(self, prepared: Prepared, order: Order, device: torch.device, ranks: Ranks = ALONE) -> None:
        super().__init__(prepared, order, device, ranks)
        section, size = prepared.recipe.data.stream, prepared.recipe.train.batch_size
        assert section is not None, "only a recipe with a stream comes here"
        if size % ranks.count:
            raise UsageError(
                f"train.batch_size is {size} and the run has {ranks.count} ranks, of which each makes an equal part of "
                f"a batch from its own shards; use a multiple of {ranks.count}"
            )
        # a batch may be larger than the look at the stream's beginning
        order.batch_size = size
        self.source: StreamSource = prepared.stream
        settings = dataclasses.replace(self.source.settings, batch_size=size // ranks.count)
        self.loader = StreamLoader(
            settings, rank=ranks.rank, ranks=ranks.count, workers=section.workers, pin=device.type == "cuda"
        )
        self._shard_caches: dict[tuple[int, str], TeacherCache] = {}
        self._states: dict[int, dict[str, Any]] = {}
        self._begin: dict[str, Any] = self.loader.state_dict()
        self._lock = threading.Lock()

    def make(self, step: int) -> Step:
        """The tensors of a 0-based step of the whole run, from the stream's next batch.

        Raises:
            as `StreamLoader` does.
        """
        if step < self.pretrain:
            return super().make(step)
        with self._lock:
            made = next(self.loader)
            self._states[step + 1] = self.loader.state_dict()
            self._states.pop(step - _KEPT, None)
        return Feed.make(self._over(made, step), step)

    def data(self) -> str:
        """What is trained on, for people."""
        return f"a stream of {counted(len(self.source.shards), 'shard')}"

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """The position of the data after `step` steps."""
        return self._states.get(step, self._begin)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on at such a position.

        Raises:
            IntegrityError: it is of another stream.
        """
        if state is not None:
            self.loader.load_state_dict(state)
            self._begin = state

    def close(self) -> None:
        """End the worker processes, once a batch that is being made is made."""
        with self._lock:
            self.loader.close()

    def _over(self, made: Made, step: int) -> Feed:
        """A feed that knows nothing but this batch."""
        prepared, specs = self.prepared, self.source.settings.specs
        views = dict(zip(specs, made.pixels))
        large = dataclasses.replace(specs[0], size=FINER * specs[0].size)
        pixels = {1: views[specs[0]].numpy()} | ({FINER: views[large].numpy()} if large in views else {})
        answers: list[Any] = []
        for place, one in enumerate(self.source.answers):
            if isinstance(one, LiveTeacher):
                answers.append(_Answers(one, made, views[one.teacher.image] if one.sees else None))
            else:
                answers.append(None if one is None else self._cached(place, one, made))
        found = copy.copy(self)
        found.ranks = ALONE  # the batch is this rank's part already
        found.prepared = dataclasses.replace(
            prepared,
            samples=[Sample(uid, _NOTHING) for uid in made.uids],
            pictures=_BatchPictures(specs[0], pixels),  # type: ignore[arg-type]
            images=joined(prepared.teacher.members, answers) if prepared.teacher is not None else None,
        )
        texts = [text for text in made.captions if text is not None]
        found._ids = {**self._ids, **dict(zip(texts, made.ids.numpy()))}
        rows = list(range(len(made.uids)))
        words = self.order.words(step - self.pretrain)
        words = words[self.ranks.part(len(words))]
        found.order = _Given(Plan(rows, made.views, made.captions, made.group.numpy(), words))  # type: ignore[assignment]
        return found

    def _cached(self, place: int, cache: TeacherCache, made: Made) -> Any:
        """The rows of this batch; of a cache by data shards only the shards that the workers read now stay open."""
        # caches that were made from a list of samples have one index of all
        if not cache.data_shards:
            return cache
        for name in dict.fromkeys(made.shards):
            known = self._shard_caches.pop((place, name), None)
            self._shard_caches[place, name] = cache.of_shard(name) if known is None else known
        most = 2 * self.loader.readers * len(self.source.answers) + len(set(made.shards))
        while len(self._shard_caches) > most:
            del self._shard_caches[next(iter(self._shard_caches))]
        return _FromShards(cache, {name: self._shard_caches[place, name] for name in made.shards}, made)


_NOTHING = ImageRef(data=b"")


def prepare_stream(recipe: Recipe, report: Reporter) -> Prepared:
    """As `prepare`, for a recipe with `data.stream`.

    Raises:
        as `prepare` does.
    """
    section = recipe.data.stream
    assert section is not None, "only a recipe with a stream comes here"
    if section.workers:
        start_server()
    shards = list_shards(section.shards)
    with Stages(report, "data") as progress:
        source = probe(recipe, shards)
        held_out = None
        if recipe.data.eval:
            held_out = open_data(recipe.data.eval, on_bad_sample=recipe.data.on_bad_sample, progress=progress)
    check_captions(recipe, source)
    texts = text_pool(recipe, source, held_out)
    logits = asked_logits(recipe)
    if logits is not None and MadeCaches.find(recipe.teacher.cache if recipe.teacher is not None else None) is None:
        raise UsageError(
            "teacher.logits are read from a cache, and without one a stream's teacher answers each batch as it comes; "
            "make it by `pocketvlm cache-teacher` and name it as teacher.cache, or use a bank with target: embeddings"
        )
    teachers, teacher = open_teachers(recipe, report)
    if teacher is not None:
        check_shares(recipe, teacher)
    student = start_student(recipe, source, texts, texts, teacher)
    tap_widths(student, asked_taps(recipe), None)
    check_dense(recipe, student)
    tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)
    policy = AugmentPolicy.from_dict(recipe.views.policy)
    gone = unfit(tokenizer, texts)
    texts = [text for text in texts if text not in gone]
    source = source.within_context(tokenizer)
    held_out, questions = questions_for(recipe, held_out, tokenizer)
    found = [teacher_outputs(recipe, one, (), texts, questions, policy, report, logits=logits) for one in teachers]
    bank = logits.texts if logits is not None else ()
    answers = tuple(
        cache if cache is not None else _live(recipe, one, report) for one, (cache, _, _) in zip(teachers, found)
    )
    outputs: Any = [(one, words, theirs) for one, (_, words, theirs) in zip(answers, found)]
    images, words, theirs = together(teacher, outputs)
    settings = _settings(recipe, section, shards, student, policy, answers)
    report.line(
        f"stream: {counted(len(shards), 'shard')} ({shards[0].name} … {shards[-1].name}), {section.order}, "
        f"{counted(section.workers, 'worker')}, {'draft' if section.draft else 'whole'} decoding"
    )
    return Prepared(
        recipe=recipe,
        source=source,
        held_out=held_out,
        samples=source.samples,
        texts=texts,
        english=texts,
        tokenizer=tokenizer,
        student=student,
        pictures=Pictures([], student.image_spec, policy=policy, seed=recipe.views.seed),
        teacher=teacher,
        images=images,
        words=words,
        questions=questions,
        teacher_answers=theirs,
        digest=_digest(source, texts, student, teacher, settings, bank),
        pictures_digest="",
        report=report,
        bank=bank,
        stream=StreamSource(shards, settings, answers),
    )


def probe(recipe: Recipe, shards: list[Shard]) -> DataSource:
    """The first `data.stream.probe` samples without their pictures, captions weighed."""
    section = recipe.data.stream
    assert section is not None, "only a recipe with a stream comes here"
    stream = _one_after_the_other(recipe, shards)
    found = islice(stream.once(), section.probe)
    samples = [dataclasses.replace(sample, image=_NOTHING) for sample in found]
    name = shards[0].name.rpartition("/")[0]
    if not samples and stream.tally.report.total:
        stream.tally.bad_samples = stream.tally.samples
    stream.tally.report.refuse_empty(name, len(samples))
    return DataSource(name, samples, stream.tally.report).weighed(recipe.data.caption_weights)


def samples_of_shard(recipe: Recipe, shard: Shard) -> list[Sample]:
    """All that a run may draw from one shard, with its pictures."""
    return list(_one_after_the_other(recipe, [shard]).once())


def _one_after_the_other(recipe: Recipe, shards: list[Shard]) -> SampleStream:
    section = recipe.data.stream
    assert section is not None, "only a recipe with a stream comes here"
    order = ShardOrder(len(shards), slot=0, slots=1, order="sequential", seed=0)
    return SampleStream(
        shards, order, captions=section.captions, language=section.language, on_bad_sample=recipe.data.on_bad_sample
    )


def _live(recipe: Recipe, teacher: Teacher, report: Reporter) -> LiveTeacher:
    """The teacher itself, where no cache was made for the stream."""
    section = recipe.teacher
    assert section is not None, "only a run with a teacher asks for its outputs"
    if section.smooth:
        raise UsageError(
            f"teacher.smooth is {section.smooth} and {teacher.name} answers each batch as it comes, of which it sees "
            "one view of each picture; set it to 0, or make a teacher cache and name it as teacher.cache"
        )
    report.line(f"teacher: {teacher.name} answers each batch as it comes")
    return LiveTeacher(teacher, section.token_grid, bool(asked_taps(recipe).teacher))


def _settings(
    recipe: Recipe,
    section: StreamSection,
    shards: list[Shard],
    student: Student,
    policy: AugmentPolicy,
    answers: Sequence[Any],
) -> StreamSettings:
    specs = [student.image_spec]
    if asked_regions(recipe) is not None:
        specs.append(dataclasses.replace(student.image_spec, size=FINER * student.image_spec.size))
    specs += [one.teacher.image for one in answers if isinstance(one, LiveTeacher) and one.sees]
    return StreamSettings(
        shards=shards,
        batch_size=recipe.train.batch_size,
        specs=tuple(dict.fromkeys(specs)),
        tokenizer_json=student.tokenizer_json,
        text_spec=student.text_spec,
        order=section.order,
        buffer=section.buffer,
        seed=recipe.train.seed,
        views=recipe.views.count,
        policy=policy,
        view_seed=recipe.views.seed,
        caption_weights=recipe.data.caption_weights,
        captions=section.captions,
        language=section.language,
        on_bad_sample=recipe.data.on_bad_sample,
        draft=section.draft,
        max_bad_share=section.max_bad_share,
    )


def _digest(
    source: DataSource,
    texts: list[str],
    student: Student,
    teacher: Ensemble | None,
    settings: StreamSettings,
    bank: Sequence[str],
) -> str:
    """Over what decides a step's arithmetic: the names of the shards stand for their samples."""
    inputs = digest_of(source.samples, texts, texts, student, teacher, bank)
    return hashlib.sha256(json.dumps([inputs, digest_shards(settings.shards)]).encode()).hexdigest()
