"""A run in miniature: the recipe's own trainer over a few pictures, so that its costs are counted and not guessed.

Student, freezing, cut, text batches, masked and momentum forwards and objectives are those of the run. Only what
decides no cost is another: teachers answer with random numbers of their own shapes, texts of a batch are as long as
the longest of a real batch is on average, and the batch is smaller. Towers cost in proportion to it; objectives, which
may compare all pairs, are run again on the same outputs repeated twice and four times.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pocketvlm.data import DataSource, Sample
from pocketvlm.distill import optim
from pocketvlm.distill.batches import Pictures
from pocketvlm.distill.counting import Growth, Seconds, Work, count, timing
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.objectives import Outputs
from pocketvlm.distill.prepare import Prepared, prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.stand_in import TeacherShapes
from pocketvlm.distill.start import TOKENIZER_MAKERS, tokenizer_asked
from pocketvlm.distill.step import Step
from pocketvlm.distill.taps import gray
from pocketvlm.distill.text_pool import text_pool
from pocketvlm.teachers.device import full_float32, pick_device

# pictures of a rehearsal: few are enough to count, and so many that a step takes about a second to time it
COUNTED, TIMED, TIMED_MACS = 32, 128, 2e10
# on a GPU a step over few pictures waits for kernels to be launched, which takes no longer over many
TIMED_CUDA, TIMED_MACS_CUDA = 1024, 2e12
# samples whose captions make the tokenizer
MANY = 50_000


@dataclass(frozen=True)
class Phase:
    """Steps in which the same parts are trained. towers: work of one step but for the objectives, at the rehearsal's
    batch. objectives: theirs. step, objectives_s, feed: what one step took, where it was timed, with its objectives,
    of these alone, and of making its tensors.
    """

    name: str
    steps: int
    pictures: bool
    towers: Work
    objectives: Growth
    step: Seconds | None = None
    objectives_s: Seconds | None = None
    feed: Seconds | None = None


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal found. batch: its pictures; texts: of its text-only batch. scale: how many times as large the
    recipe's batch is. length: tokens of a text, of `context`. forward_picture, forward_caption: of one through the
    student's towers as they are deployed on. lower: of one picture below `train.cut_after_block`.
    weights, gradients, optimizer, average, start: bytes on each device. trained: parameters in the optimizer.
    view_bytes, picture_meta, text_bytes: (bfloat16, float32) bytes of the cache for a view, beside the views of a
    picture, and for a text.
    decode, view: of one picture, of one view of it; update: optimizer and average of one step; where timed.
    """

    batch: int
    scale: float
    length: int
    context: int
    captioned: float
    pool: int
    parameters: int
    trained: int
    forward_picture: Work
    forward_caption: Work
    lower: Work
    phases: tuple[Phase, ...]
    weights: int
    gradients: int
    optimizer: int
    average: int
    start: int
    view_bytes: tuple[float, float]
    picture_meta: float
    text_bytes: tuple[float, float]
    lower_bytes: int
    source_bytes: float
    view_pixels: int
    decode: Seconds | None = None
    view: Seconds | None = None
    lower_s: Seconds | None = None
    update: Seconds | None = None


def rehearse(
    recipe: Recipe, source: DataSource, teachers: Mapping[str, TeacherShapes], folder: Path, *,
    timed: bool, full_texts: bool = False,
) -> Rehearsed:  # fmt: skip
    """Run a few steps of `recipe` over a few of `source`'s pictures, and count what they cost.

    teachers: of each spec of the recipe. folder: for the stand-ins' cache. timed: measure seconds too, on the recipe's
    device and threads. full_texts: texts fill the context (where the data is not at hand).

    Raises:
        as `prepare` and `Trainer`.
    """
    threads = torch.get_num_threads()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    try:
        with full_float32():
            return Stage(recipe, source, teachers, folder, timed, full_texts).play()
    finally:
        torch.set_num_threads(threads)


class Stage:
    """The parts of one rehearsal, as `rehearse` takes them; `play` may be asked again, to time again."""

    def __init__(
        self, recipe: Recipe, source: DataSource, teachers: Mapping[str, TeacherShapes], folder: Path, timed: bool,
        full_texts: bool,
    ) -> None:  # fmt: skip
        self.recipe, self.source, self.folder, self.timed = recipe, source, folder, timed
        folder.mkdir(parents=True, exist_ok=True)
        self.device = pick_device(recipe.train.device)
        self.share = captioned_share(recipe, source)
        most = timed_pictures(recipe, self.device, 0.0) if timed else min(recipe.train.batch_size, COUNTED)
        self._know_all_texts()
        few = dataclasses.replace(source, samples=interleaved(source.samples, most, self.share))
        prepared = prepare(
            self._small(len(few)), Reporter(False), source=few, opener=lambda spec, **_: teachers[spec].stand_in()
        )
        self.context = prepared.student.text_spec.context_length
        self.length = self.context if full_texts else self._usual_length(prepared)
        with torch.no_grad():
            self._forwards(prepared)
        if timed:
            most = timed_pictures(recipe, self.device, self.picture.macs)
        most = min(most, len(prepared.samples))
        self.batch = self._batch(most)
        small = self._small(self.batch)
        with scratch_cache(folder):
            cut_down = dataclasses.replace(prepared, recipe=small, samples=prepared.samples[: self.batch])
            self.trainer = Trainer(cut_down, self.device)
        self.scale = recipe.train.batch_size / self.trainer.order.batch_size
        self.prepared = cut_down

    def _know_all_texts(self) -> None:
        """A tokenizer of the whole data's texts and all of its classes, which a few pictures would not give."""
        recipe, source = self.recipe, self.source
        some = dataclasses.replace(source, samples=source.samples[:MANY])
        texts = text_pool(recipe, some, None)
        self.pool = len(texts)
        origin, size, _ = tokenizer_asked(recipe)
        if origin in TOKENIZER_MAKERS and texts:
            path = self.folder / "tokenizer.json"
            path.write_bytes(TOKENIZER_MAKERS[origin](texts, size))
            recipe = recipe.model_copy(update={"tokenizer": recipe.tokenizer.model_copy(update={"source": str(path)})})
        if recipe.task is not None and not recipe.task.classes:
            labels = tuple(sorted({sample.label for sample in source.samples if sample.label is not None}))
            recipe = recipe.model_copy(update={"task": recipe.task.model_copy(update={"classes": labels})})
        self.recipe = recipe

    def _small(self, pictures: int) -> Recipe:
        recipe = self.recipe
        texts = max(2, round(recipe.train.text_batch * pictures / recipe.train.batch_size))
        train: dict[str, Any] = {"batch_size": pictures, "text_batch": texts if recipe.train.text_batch else 0}
        train["micro_batch"] = None
        changed: dict[str, Any] = {
            "data": recipe.data.model_copy(update={"eval": None}),
            "views": recipe.views.model_copy(update={"count": min(2, recipe.views.count)}),
            "train": recipe.train.model_copy(update=train),
        }
        if recipe.teacher is not None:
            changed["teacher"] = recipe.teacher.model_copy(update={"cache": str(self.folder / "teacher")})
        return recipe.model_copy(update=changed)

    def _batch(self, most: int) -> int:
        """The largest batch whose captions and texts are nearly in the recipe's proportion."""
        train = self.recipe.train
        if most == train.batch_size:
            return most

        def off(n: int) -> float:
            texts = train.text_batch * n / train.batch_size
            return abs(round(self.share * n) / n - self.share) + abs(round(texts) - texts) / max(1.0, texts)

        return min(range(most, max(1, most // 2), -1), key=lambda n: (round(off(n), 3), -n))

    def _usual_length(self, prepared: Prepared) -> int:
        """Tokens of the longest text of a batch, on average over a few batches."""
        rng, train = np.random.Generator(np.random.PCG64(0)), self.recipe.train
        captions = [c.text for s in self.source.samples[:4096] for c in s.captions]
        longest = []
        pools = [(captions, round(self.share * train.batch_size)), (prepared.texts, train.text_batch)]
        counted = []
        for texts, number in pools:
            some = [texts[i] for i in rng.permutation(len(texts))[:4096]]
            lengths = np.minimum(prepared.tokenizer.lengths(some), self.context) if some else np.zeros(0, int)
            counted.append((lengths, number))
        for _ in range(32):
            drawn = [rng.choice(lengths, number) for lengths, number in counted if len(lengths) and number]
            longest.append(max((int(row.max()) for row in drawn), default=1))
        return round(float(np.mean(longest)))

    def _forwards(self, prepared: Prepared) -> None:
        student, cut = prepared.student, self.recipe.train.cut_after_block
        training = student.training
        student.eval()
        ids = torch.ones(1, self.length, dtype=torch.int32)
        self.picture = count(lambda: student.encode_image(gray(student)))
        self.caption = count(lambda: student.encode_text(ids))
        self.lower = count(lambda: student.image_tower.until_block(gray(student), cut)) if cut is not None else Work()
        student.train(training)

    def play(self) -> Rehearsed:
        trainer, student = self.trainer, self.trainer.student
        phases = tuple(self._phase(*phase) for phase in phases_of(self.recipe))
        state = [*student.state_dict().values(), *trainer.objectives.state_dict().values()]
        views, meta, texts = cache_sizes(self.folder / "teacher")
        lower = trainer.feed.lower
        measured: dict[str, Any] = self._seconds() if self.timed else {}
        read = [len(sample.image.read()) for sample in self.prepared.samples[:64]]
        start = [*(trainer.beginning or {}).values()]
        if trainer.beside.original is not None:
            start += [*trainer.beside.original.state_dict().values()]
        return Rehearsed(
            batch=self.batch,
            scale=self.scale,
            length=self.length,
            context=self.context,
            captioned=self.share,
            pool=self.pool,
            parameters=sum(p.numel() for p in student.parameters()),
            trained=sum(p.numel() for p in trainer.parameters),
            forward_picture=self.picture,
            forward_caption=self.caption,
            lower=self.lower,
            phases=phases,
            weights=_bytes(state),
            gradients=_bytes(trainer.parameters),
            # AdamW keeps two moments of each parameter and one step count
            optimizer=2 * _bytes(trainer.parameters) + 4 * len(trainer.parameters),
            average=_bytes(trainer.average.module.state_dict().values()) if trainer.average is not None else 0,
            start=_bytes(start),
            view_bytes=views,
            picture_meta=meta,
            text_bytes=texts,
            lower_bytes=0 if lower is None else lower[0, 0].nbytes,
            source_bytes=sum(read) / len(read),
            view_pixels=3 * student.image_spec.size**2,
            **measured,
        )

    def _phase(self, name: str, step: int, steps: int) -> Phase:
        trainer = self.trainer
        batch = self._lengthened(trainer.feed.make(step))

        def one_step() -> None:
            trainer.step = step
            trainer.one_step(batch)

        with captured(trainer) as calls:
            whole = count(one_step)
        growth = [count(again(calls, s, fixed_bank=isinstance(self.recipe.train.bank, int))) for s in (1, 2, 4)]
        objectives = Growth.through(*growth)
        taken: dict[str, Seconds] = {}
        if self.timed:
            taken["step"] = timing(one_step)
            taken["objectives_s"] = timing(again(calls, 1, fixed_bank=True))
            taken["feed"] = timing(lambda: trainer.feed.make(step))
        towers = whole + growth[0].times(-1)
        return Phase(name, steps, batch.phase == "pairs", towers, objectives, **taken)

    def _lengthened(self, batch: Step) -> Step:
        """With texts of the usual length: padded, or cut where no piece of them is asked for."""
        if batch.ids is None:
            return batch
        ids, pad = batch.ids, self.trainer.student.text_spec.pad_id
        if batch.hidden is None:
            ids = ids[:, : self.length]
        batch.ids = F.pad(ids, (0, max(0, self.length - ids.shape[1])), value=pad)
        return batch

    def _seconds(self) -> dict[str, Seconds]:
        trainer, student, cut = self.trainer, self.trainer.student, self.recipe.train.cut_after_block

        def update() -> None:
            optim.gradient_norm(trainer.parameters, trainer.config.clip_norm)
            trainer.optimizer.step()
            if trainer.average is not None:
                trainer.average.update(student)

        some = self.prepared.samples[:16]
        pictures = Pictures(
            some, student.image_spec, policy=self.prepared.pictures.policy, seed=0,
            source_px=self.recipe.data.source_px, budget=0,
        )  # fmt: skip
        last = min(1, self.recipe.views.count - 1)
        decode = timing(lambda: [pictures.source(i) for i in range(len(some))])
        both = timing(lambda: [pictures.view(i, last) for i in range(len(some))])
        each = 1 / len(some)
        found = {"decode": decode.times(each), "view": (both - decode).times(each), "update": timing(update)}
        if cut is not None:
            student.eval()
            pixels = torch.from_numpy(pictures.batch(range(len(some)), [0] * len(some))).to(self.device)
            with torch.no_grad():
                found["lower_s"] = timing(lambda: student.image_tower.until_block(pixels, cut)).times(1 / len(some))
        return found


def timed_pictures(recipe: Recipe, device: torch.device, macs: float) -> int:
    """How many pictures a timed step has, `macs` each: on a GPU as many as go through the towers at once in the run, so
    that it neither waits where the run does not nor needs memory that the run does not."""
    train, most, work = recipe.train, TIMED, TIMED_MACS
    whole = train.batch_size
    if device.type == "cuda":
        most, work = TIMED_CUDA, TIMED_MACS_CUDA
        whole = min(whole, max(8, train.micro_batch or whole))
    return min(whole, most, max(8, int(work / max(1.0, macs))))


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def captioned_share(recipe: Recipe, source: DataSource) -> float:
    """The share of a batch's pictures that have captions."""
    own = sum(bool(sample.captions) for sample in source.samples) / max(1, len(source))
    asked = recipe.train.captioned_fraction
    return own if asked is None or own in (0.0, 1.0) else asked


def interleaved(samples: Sequence[Sample], number: int, share: float) -> list[Sample]:
    """At most so many samples, drawn without repetition, of which every beginning has the share with captions."""
    rng = np.random.Generator(np.random.PCG64(0))
    order = [samples[i] for i in rng.permutation(len(samples))]
    having, others = (iter([s for s in order if bool(s.captions) is kind]) for kind in (True, False))
    found: list[Sample] = []
    for place in range(number):
        wants = round(share * (place + 1)) > round(share * place)
        sample = next(having if wants else others, None)
        if sample is not None:
            found.append(sample)
    return found


def phases_of(recipe: Recipe) -> list[tuple[str, int, int]]:
    """(name, a step in its middle, steps) of every part of a run in which the same parameters are trained."""
    train = recipe.train
    found = [("text pre-training", 0, train.text_pretrain_steps)] if train.text_pretrain_steps else []
    edges = {0, train.steps, *(s for s in (*train.freeze.values(), *train.freeze_after.values()) if s < train.steps)}
    ordered = sorted(edges)
    for begin, end in itertools.pairwise(ordered):
        name = "main phase" if len(ordered) == 2 else f"steps {begin + 1} to {end}"
        # not its first step, in which `train.balance` measures gradients
        found.append((name, train.text_pretrain_steps + min(begin + 1, end - 1), end - begin))
    return found


@contextmanager
def captured(trainer: Trainer) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(objective, arguments) of every call of an objective inside the `with`."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    hooks = [
        objective.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, dict(kwargs))), with_kwargs=True
        )
        for objective in trainer.objectives
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def again(calls: Sequence[tuple[Any, dict[str, Any]]], times: int, *, fixed_bank: bool) -> Callable[[], None]:
    """The captured objectives on their batch repeated so many times, forward and backward down to the outputs."""
    repeated: list[tuple[Any, dict[str, Any]]] = [
        (objective, {side: _repeated(value, times, fixed_bank) for side, value in kwargs.items()})
        for objective, kwargs in calls
    ]

    def job() -> None:
        total = torch.zeros(())
        for objective, kwargs in repeated:
            total = total.to(kwargs["student"].image.device) + sum(objective(**kwargs).values())
        if total.requires_grad:
            total.backward()

    return job


def _repeated(outputs: Outputs | None, times: int, fixed_bank: bool) -> Outputs | None:
    if outputs is None:
        return None
    rows = len(outputs.image)

    def tiled(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        fixed = value.ndim == 0 or name == "token_table" or (name == "bank" and fixed_bank)
        found = value.detach() if fixed or (name != "bank" and len(value) != rows) else _tile(value, times, name)
        return found.clone().requires_grad_(value.requires_grad)

    found = {field.name: tiled(field.name, getattr(outputs, field.name)) for field in dataclasses.fields(outputs)}
    found["taps"] = {name: tiled(f"tap {name}", value) for name, value in outputs.taps.items()}
    return Outputs(**found)


def _tile(value: Tensor, times: int, name: str) -> Tensor:
    parts = [value.detach()] * times
    if name == "group":
        # captions of another repetition are other captions
        span = int(value.abs().max()) + 1
        parts = [torch.where(value < 0, value - k * span, value + k * span) for k in range(times)]
    return torch.cat(parts)


@contextmanager
def scratch_cache(folder: Path) -> Iterator[None]:
    """Derived data of the few pictures goes into `folder` and not among the user's."""
    before = os.environ.get("POCKETVLM_CACHE")
    os.environ["POCKETVLM_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["POCKETVLM_CACHE"]
        else:
            os.environ["POCKETVLM_CACHE"] = before


def cache_sizes(root: Path) -> tuple[tuple[float, float], float, tuple[float, float]]:
    """What the teacher caches under `root` take on disk, summed over teachers: (bfloat16, float32) bytes of one view;
    bytes of one picture beside its views; (bfloat16, float32) bytes of one text."""
    views, meta, texts = np.zeros(2), 0.0, np.zeros(2)
    seen: set[str] = set()
    for path in sorted(root.glob("*/*.safetensors")):
        kind = f"{path.parent.name.rsplit('-', 2)[0]} {path.name.split('-')[0]}"
        if kind in seen:
            continue  # all shards of a teacher are alike
        seen.add(kind)
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            # of the header only what grows with the rows, as it is written (a string in a JSON file)
            told = sum(len(json.dumps(value)) for value in (handle.metadata() or {}).values())
        of_texts = path.name.startswith("text-")
        first = next(iter(tensors.values()))
        rows, count_views = len(first), 1 if of_texts else first.shape[1]
        own = np.zeros(2)
        for tensor in tensors.values():
            # logits are float16 in either
            either = tensor.is_floating_point() and tensor.dtype != torch.float16
            sizes = (2, 4) if either else (tensor.itemsize, tensor.itemsize)
            own += np.array(sizes) * tensor[0].numel() / count_views
        beside = told / rows
        if of_texts:
            texts += own + beside
        else:
            views, meta = views + own, meta + beside
    return (float(views[0]), float(views[1])), meta, (float(texts[0]), float(texts[1]))
