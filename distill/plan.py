"""What a run will take, before it is started: work, memory, disk, days and cost, with every assumption named.

Work and memory are counted in a rehearsal of the recipe's own trainer (`distill.rehearsal`). Seconds come from that
rehearsal timed on this machine, or from a device's constants (`distill/devices.json`), each of which says whether it
was measured, is the vendor's, or is assumed.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketvlm.data import DataSource, open_data
from pocketvlm.distill.counting import Seconds, Work
from pocketvlm.distill.devices import Device, Ledger, load_devices
from pocketvlm.distill.prepare import wants_texts
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.rehearsal import Phase, Rehearsed, captioned_share, rehearse
from pocketvlm.distill.sections import StreamSection, WordsSection
from pocketvlm.distill.stand_in import TeacherShapes, made_up_pictures, teacher_shapes
from pocketvlm.distill.student_teacher import open_teacher
from pocketvlm.distill.taps import asked_taps
from pocketvlm.edge.errors import PocketvlmError, UsageError, unknown_name
from pocketvlm.teachers.cache_build import DECODERS

HERE = "here"
# where the data is not at hand
PICTURE_BYTES, PICTURE_SIZE, MADE_UP = 25_000, 256, 128
TEACHER = {"dim": 512, "features": 768, "text_features": 512, "tokens": 49, "token_width": 768}
DAY = 86_400


@dataclass(frozen=True)
class Plan:
    """A planned run. recipe: its name. values: every number, by section, in the units that its key names; what is not
    known is None. assumptions: each with its value and reason."""

    recipe: str
    device: str
    count: int
    values: dict[str, dict[str, Any]]
    assumptions: list[dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "recipe": self.recipe, "device": self.device, "count": self.count, **self.values,
            "assumptions": self.assumptions,
        }  # fmt: skip

    def rows(self) -> list[dict[str, str]]:
        """For people: one row per number."""
        from pocketvlm.distill.plan_table import plan_rows

        return plan_rows(self)


def make_plan(
    recipe: Recipe,
    *,
    samples: float | None = None,
    epochs: float | None = None,
    device: str | Device = HERE,
    count: int = 1,
    price: float | None = None,
) -> Plan:
    """Plan a run of `recipe`.

    samples: pictures of the data (None: what `data.train` has here). epochs: passes over them, in place of
    `train.steps` (None: 1 where samples are given, else `train.steps`). device: "here", timed for some seconds, a name
    of `load_devices`, or constants of another. count: of such devices. price: of one for an hour.

    Raises:
        UsageError: numbers that cannot be, or no data here and no `samples`. UnknownNameError: no such device.
    """
    known: Device | None = None
    if isinstance(device, Device):
        known, device = device, device.name
    elif device != HERE:
        devices = load_devices()
        if device not in devices:
            raise unknown_name("device of a plan", device, [HERE, *devices])
        known = devices[device]
    _check(samples, epochs, count, price)
    ledger = Ledger()
    stream = recipe.data.stream
    source, full_texts, recipe = _data(recipe, samples, ledger)
    total = round(samples) if samples is not None else len(source)
    recipe = _steps(recipe, total, samples is not None, epochs, ledger)
    _precision(recipe, device, ledger)
    if device not in (HERE, "cpu") and recipe.train.precision == "auto":
        # what `auto` means there; a CPU keeps the same bytes for the backward under it
        recipe = _with(recipe, train={"precision": "bf16"})
    if known is not None:
        recipe = _with(recipe, train={"device": "cpu"})
    timed = known is None
    texts = [caption.text for sample in source.samples[:64] for caption in sample.captions][:8]
    specs = recipe.teacher.specs if recipe.teacher is not None else ()
    teachers = {spec: _teacher(recipe, spec, texts, timed, ledger) for spec in specs}
    with tempfile.TemporaryDirectory(prefix="pocketvlm-plan-") as folder:
        found = rehearse(recipe, source, teachers, Path(folder), timed=timed, full_texts=full_texts)
    if source.name == MADE_UP_NAME:
        ledger.assume("bytes of a picture", f"{PICTURE_BYTES:,}", f"assumed: JPEG of {PICTURE_SIZE} px; no data here")
    ledger.assume(
        "tokens of a text", f"{found.length} of {found.context}",
        "assumed: texts fill the context; no data here" if full_texts else "the longest of a batch, over 32 draws",
    )  # fmt: skip
    planner = Planner(recipe, found, teachers, total, count, source, ledger, known, stream)
    values = planner.values(price)
    return Plan(recipe.name, device, count, values, ledger.rows)


MADE_UP_NAME = "made-up pictures"


def _check(samples: float | None, epochs: float | None, count: int, price: float | None) -> None:
    if samples is not None and not (1 <= samples < math.inf):
        raise UsageError(
            f"--samples {samples:g} pictures leave nothing to train on; give how many there will be, such as 1e6"
        )
    if epochs is not None and not (0 < epochs < math.inf):
        raise UsageError(f"--epochs {epochs:g} is no number of passes over the data; give one above 0")
    if count < 1:
        raise UsageError(f"--count {count} devices cannot run anything; give 1 or more")
    if price is not None and not (0 <= price < math.inf):
        raise UsageError(f"--price {price:g} is no price of a device for an hour; give one of 0 or more")


def _with(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)


def _data(recipe: Recipe, samples: float | None, ledger: Ledger) -> tuple[DataSource, bool, Recipe]:
    """(pictures to rehearse on, whether they are made up, the recipe)."""
    stream = recipe.data.stream
    spec = recipe.data.train if stream is None else str(stream.shards)
    what = f"data.train {spec!r}" if stream is None else f"data.stream.shards {spec!r}"
    # a plan reads nothing over a network, and no shards only to count them
    remote = stream is not None or "://" in spec or "pipe:" in spec
    try:
        if remote:
            raise UsageError("a plan reads no stream")
        source = open_data(spec, on_bad_sample="skip")
    except PocketvlmError as error:
        if samples is None:
            raise UsageError(
                f"{what} cannot be opened here ({str(error).rstrip('.')}), so how many pictures there are is not "
                "known; say so with --samples"
            ) from error
    else:
        return source.weighed(recipe.data.caption_weights), False, recipe
    asked = recipe.train.captioned_fraction
    share = 1.0 if asked is None else asked
    ledger.assume("pictures to rehearse on", f"{MADE_UP} made up", f"{what} is not opened here")
    ledger.assume("captions of a picture", f"1 for {100 * share:.0f} %", "assumed; no data here")
    words = recipe.data.words
    kept: dict[str, Any] = {"words": WordsSection() if words is None else words.model_copy(update={"exclude": ()})}
    source = made_up_pictures(MADE_UP, captioned=share, size=PICTURE_SIZE)
    if stream is not None:
        kept |= {"stream": None, "train": MADE_UP_NAME}
    return source, True, _with(recipe, data={**kept, "caption_weights": {}})


def _steps(recipe: Recipe, total: int, asked: bool, epochs: float | None, ledger: Ledger) -> Recipe:
    train = recipe.train
    if total < train.batch_size:
        recipe = _with(recipe, train={"batch_size": total})
        ledger.assume("pictures of a step", f"{total:,}", "a batch larger than the data is the data")
    if epochs is None and not asked:
        return recipe
    passes = 1.0 if epochs is None else epochs
    steps = max(1, math.ceil(passes * total / recipe.train.batch_size))
    ledger.assume(
        "passes over the pictures", f"{passes:g}",
        f"--epochs, in place of train.steps {train.steps:,}"
        if epochs is not None
        else f"--samples was given, so train.steps {train.steps:,} is replaced; --epochs asks for more",
    )  # fmt: skip
    keep = {"steps": steps, "freeze": {k: min(v, steps) for k, v in train.freeze.items()}}
    return _with(recipe, train=keep)


def _precision(recipe: Recipe, device: str, ledger: Ledger) -> None:
    if device not in (HERE, "cpu") and recipe.train.precision == "fp32":
        ledger.assume(
            "precision", "bfloat16 rates", "the device's constants are of bfloat16; train.precision fp32 is slower"
        )


def _teacher(recipe: Recipe, spec: str, texts: list[str], timed: bool, ledger: Ledger) -> TeacherShapes:
    section = recipe.teacher
    assert section is not None, "only a recipe with a teacher comes here"
    tokens = bool(asked_taps(recipe).teacher)
    try:
        teacher = open_teacher(
            spec, device=recipe.train.device, allow_download=section.allow_download,
            trust_remote_code=section.trust_remote_code,
        )  # fmt: skip
        return teacher_shapes(teacher, texts, tokens=tokens, timed=timed)
    except PocketvlmError as error:
        shapes: dict[str, Any] = TEACHER | {"dim": recipe.student.embed_dim or TEACHER["dim"]}
        ledger.assume(
            f"teacher {spec}", "widths " + ", ".join(f"{key} {value}" for key, value in shapes.items()),
            f"assumed, and its work is not counted, as it cannot be opened here: {error}",
        )  # fmt: skip
        return TeacherShapes(spec, **shapes, why=str(error))


class Planner:
    """The numbers of one plan, from what was counted and timed."""

    def __init__(
        self, recipe: Recipe, found: Rehearsed, teachers: dict[str, TeacherShapes], total: int, count: int,
        source: DataSource, ledger: Ledger, device: Device | None, stream: StreamSection | None = None,
    ) -> None:  # fmt: skip
        self.stream = stream
        self.recipe, self.found, self.total, self.count = recipe, found, total, count
        self.teachers, self.source, self.ledger, self.device = list(teachers.values()), source, ledger, device
        self.train, self.views = recipe.train, recipe.views.count
        self.share = captioned_share(recipe, source)
        each = [len(sample.captions) for sample in source.samples]
        # all distinct where the data is larger than what is here
        self.captions = sum(each) / max(1, len(each)) * total
        if total == len(source) and source.name != MADE_UP_NAME:
            self.captions = float(len(source.captions()))
        self.made_up = source.name == MADE_UP_NAME
        self.pool = found.pool - len(source.captions()) + self.captions
        self.cut = self.train.cut_after_block is not None
        own = self.train.batch_size / count
        micro = self.train.micro_batch
        self.parts = 1.0 if micro is None else max(1.0, own / micro)
        if self.parts > 1:
            ledger.assume("train.micro_batch", "4/3 of the towers' work", "each part goes forward twice, backward once")

    def values(self, price: float | None) -> dict[str, dict[str, Any]]:
        run = self._run()
        return {
            "run": run, "work": self._work(), "memory": self._memory(), "disk": self._disk(),
            "time": self._time(run, price),
        }  # fmt: skip

    def _run(self) -> dict[str, Any]:
        seen = self.train.steps * self.train.batch_size
        return {
            "pictures": self.total, "captioned_share": round(self.share, 4), "batch": self.train.batch_size,
            "text_batch": self.train.text_batch, "views": self.views, "steps": self.train.steps,
            "text_pretrain_steps": self.train.text_pretrain_steps, "pictures_seen": seen, "epochs": seen / self.total,
        }  # fmt: skip

    def step_work(self, phase: Phase, devices: int = 1) -> Work:
        """Of one step on each of `devices`: a part of the towers' work, and all of the objectives'."""
        again = 4 / 3 if self.parts > 1 else 1.0
        return phase.towers.times(again * self.found.scale / devices) + phase.objectives.at(self.found.scale)

    def _mean(self, phases: list[Phase]) -> Work:
        steps = sum(phase.steps for phase in phases)
        total = sum((self.step_work(phase).times(phase.steps) for phase in phases), Work())
        return total.times(1 / max(1, steps))

    def _teacher_work(self) -> tuple[Work, Work, bool]:
        """(of a view, of a caption, all teachers together; whether all of it is known)."""
        picture = sum((t.picture for t in self.teachers if t.picture is not None), Work())
        caption = sum((t.caption for t in self.teachers if t.caption is not None), Work())
        return picture, caption, not any(t.why for t in self.teachers)

    def _work(self) -> dict[str, Any]:
        found, batch = self.found, self.train.batch_size
        main = self._mean([phase for phase in found.phases if phase.pictures])
        forward = found.forward_picture.macs + self.share * found.forward_caption.macs
        forward += self.train.text_batch / batch * found.forward_caption.macs
        picture, caption, known = self._teacher_work()
        return {
            "student_picture_macs": found.forward_picture.macs,
            "student_caption_macs": found.forward_caption.macs,
            "train_macs_per_picture": main.macs / batch,
            "train_over_forward": main.macs / batch / forward,
            "step_macs": main.macs,
            "objectives_share": sum(p.objectives.at(found.scale).macs * p.steps for p in found.phases if p.pictures)
            / max(1.0, main.macs * self.train.steps),
            "train_macs": sum(self.step_work(phase).macs * phase.steps for phase in found.phases),
            "teacher_picture_macs": picture.macs if known else None,
            "teacher_caption_macs": caption.macs if known else None,
            "cache_macs": self._cache_work().macs if known else None,
        }  # fmt: skip

    def _cache_work(self) -> Work:
        picture, caption, _ = self._teacher_work()
        return picture.times(self.total * self.views) + caption.times(self._cached_texts())

    def _cached_texts(self) -> float:
        if self.recipe.teacher is None:
            return 0.0
        return self.captions + (self.pool if wants_texts(self.recipe) else 0.0)

    def _memory(self) -> dict[str, Any]:
        found = self.found
        towers = max(phase.towers.saved for phase in found.phases) * found.scale
        pairs = max(phase.objectives.at(found.scale).saved for phase in found.phases)
        fixed = found.weights + found.gradients + found.optimizer + found.average + found.start
        towers /= self.count * self.parts
        total = fixed + towers + pairs
        room = None if self.device is None else self.device.memory_gb * 1e9
        if self.device is not None:
            self.device.told("memory_gb", self.ledger)
        pictures = max((phase.towers.saved for phase in found.phases if phase.pictures), default=0.0)
        return {
            "parameters": found.parameters, "trained_parameters": found.trained, "weights_bytes": found.weights,
            "gradient_bytes": found.gradients, "optimizer_bytes": found.optimizer, "average_bytes": found.average,
            "start_bytes": found.start, "activation_bytes_per_picture": pictures * found.scale / self.train.batch_size,
            "activation_bytes": towers, "objective_bytes": pairs, "device_bytes": total,
            "device_has_bytes": room, "fits": None if room is None else total <= room,
        }  # fmt: skip

    def _disk(self) -> dict[str, Any]:
        found = self.found
        each = PICTURE_BYTES if self.made_up else found.source_bytes
        cached = any(not teacher.stored for teacher in self.teachers)
        sizes = {}
        for place, name in enumerate(("bfloat16", "float32")):
            pictures = self.total * (self.views * found.view_bytes[place] + found.picture_meta)
            sizes[name] = pictures + self._cached_texts() * found.text_bytes[place] if cached else 0.0
        own = (self.recipe.teacher.cache_dtype if self.recipe.teacher is not None else None) or "float32"
        return {
            "data_bytes": self.total * each,
            "cache_bytes_per_view": found.view_bytes[own == "float32"] + found.picture_meta / self.views,
            "cache_bytes_per_text": found.text_bytes[own == "float32"],
            "cache_dtype": own, "cache_bytes": sizes[own], "cache_bytes_bfloat16": sizes["bfloat16"],
            "cache_bytes_float32": sizes["float32"],
            "below_cut_bytes": self.total * self.views * found.lower_bytes,
            "checkpoint_bytes": found.weights + found.optimizer + found.average + found.start,
        }  # fmt: skip

    def _time(self, run: dict[str, Any], price: float | None) -> dict[str, Any]:
        self.ledger.assume(
            "objectives' memory and work", f"as at {self.found.batch}, {2 * self.found.batch}, {4 * self.found.batch}",
            "continued by a parabola; a loss that works in blocks at larger batches takes less memory",
        )  # fmt: skip
        if self.count > 1:
            self.ledger.assume(
                "many devices", "no loss", "assumed: network and waiting cost nothing; no cluster has been run"
            )
            self.ledger.assume(
                "objectives", "whole on every device", "assumed: above 1,024 rows most are shared out and cost less"
            )
        self.ledger.assume(
            "not counted",
            "0 s",
            "opening data, tokenizer, ridge starts, evaluation, checkpoints, networks",
        )
        times = self._here() if self.device is None else self._there(self.device)
        teacher = times["cache_s"]
        total = None if teacher is None else times["training_s"] + teacher + times["prepare_s"]
        # where the teacher's work is not known, what is known is still worth its price
        least = times["training_s"] + (teacher or 0.0) + times["prepare_s"]
        hours = least / 3600 * self.count
        if price is not None:
            self.ledger.assume("price of a device-hour", f"{price:g}", "--price")
        return {
            **times, "total_s": total, "days": least / DAY, "device_hours": hours,
            "whole": total is not None, "cost": None if price is None else hours * price,
        }  # fmt: skip

    def _uses(self) -> tuple[float, bool]:
        """(views that training makes, whether they are then kept in memory)."""
        uses, distinct = float(self.train.steps * self.train.batch_size), float(self.total * self.views)
        decoded = 4 / 3 * 3 * (self.recipe.data.source_px or 512) ** 2
        fits = self.total * (decoded + self.views * self.found.view_pixels) <= self.recipe.data.ram_gb * 2**30
        kept = fits and self.stream is None
        return (distinct * -math.expm1(-uses / distinct) if kept else uses), kept

    def _readers(self, cores: float) -> float:
        """What decodes pictures beside the training of one device."""
        if self.stream is None:
            asked, why = 1, "listed data is made ready by one thread of each device"
        else:
            asked, why = max(1, self.stream.workers), "data.stream.workers of each device"
        if asked > cores:
            why += f"; more than the {cores:g} cores beside it decode no faster"
        self.ledger.assume("threads that decode for training", f"{asked}", why)
        return min(asked, cores)

    def _there(self, device: Device) -> dict[str, Any]:
        """Seconds by a device's constants."""
        found, ledger, count = self.found, self.ledger, self.count
        least = device.step_floor_s
        compute = sum(max(least, device.seconds(self.step_work(p, count), ledger)) * p.steps for p in found.phases)
        rate = device.decode_per_core * count
        for name in ("step_floor_s", "decode_per_core", "cores"):
            device.told(name, ledger)
        makes, kept = self._uses()
        if kept:
            ledger.assume("pictures in memory", "made once", f"they fit into data.ram_gb {self.recipe.data.ram_gb:g}")
        decode = 0.0 if self.cut else makes / (rate * self._readers(device.cores))
        ledger.assume("decoding", "beside the device", "assumed: a step takes the longer of decoding and computing")
        ledger.assume("optimizer and average", "0 s", "assumed: their time is small beside a step's")
        _, _, known = self._teacher_work()
        views = self.total * self.views
        teacher = device.seconds(self._cache_work(), ledger) / count
        cached = any(not t.stored for t in self.teachers)
        if cached:
            ledger.assume("threads that decode for the cache", f"{DECODERS}", "at most, of each device")
        lower = max(views / rate, device.seconds(found.lower.times(views), ledger) / count) if self.cut else 0.0
        picture, caption, _ = self._teacher_work()
        online = picture.times(self.train.batch_size) + caption.times(self.share * self.train.batch_size)
        return {
            "training_s": max(compute, decode), "compute_s": compute, "decode_s": decode,
            "bound": "decoding" if decode > compute else "computing",
            "step_s": max(compute, decode) / max(1, sum(p.steps for p in found.phases)),
            "cache_s": (max(teacher, views / (rate * min(DECODERS, device.cores))) if cached else 0.0)
            if known
            else None,
            "online_teacher_s": device.seconds(online, ledger) / count * self.train.steps if known else None,
            "prepare_s": lower,
        }  # fmt: skip

    def _here(self) -> dict[str, Any]:
        """Seconds by the rehearsal's own, on this machine."""
        found, count = self.found, self.count
        assert found.decode is not None, "a rehearsal here is timed"
        assert found.view is not None, "a rehearsal here is timed"
        assert found.update is not None, "a rehearsal here is timed"
        whole = cpu = 0.0
        steps = []
        for phase in found.phases:
            assert phase.step is not None, "a rehearsal here is timed"
            assert phase.objectives_s is not None, "a rehearsal here is timed"
            assert phase.feed is not None, "a rehearsal here is timed"
            base, grown = phase.objectives.at(1), phase.objectives.at(found.scale)
            pairs = phase.objectives_s.times(grown.macs / base.macs if base.macs else found.scale)
            towers = (phase.step - found.update - phase.objectives_s).times(found.scale / count)
            step, feed = found.update + towers + pairs, phase.feed.times(found.scale / count)
            # the next batch is made beside the step, on another core where there is one
            whole += max(step.wall_s, feed.wall_s) * phase.steps
            cpu += (step.cpu_s + feed.cpu_s) * phase.steps
            steps.append({"phase": phase.name, "steps": phase.steps, "step_s": step.wall_s, "step_cpu_s": step.cpu_s})
        makes, kept = self._uses()
        each = found.view + (Seconds() if kept else found.decode)
        data = Seconds()
        if not self.cut:
            data = each.times(makes / count)
            data = Seconds(data.cpu_s, data.wall_s / self._readers(os.cpu_count() or 1))
        # a stream is decoded as it is trained on
        first = found.decode.times(self.total / count) if self.stream is None else Seconds()
        if self.cut and found.lower_s is not None:
            first = first + (found.view + found.lower_s).times(self.total * self.views / count)
        picture = sum((t.picture_s for t in self.teachers if t.picture_s is not None), Seconds())
        caption = sum((t.caption_s for t in self.teachers if t.caption_s is not None), Seconds())
        cache = Seconds()
        if any(t.picture_s is not None for t in self.teachers):
            cache = found.decode.times(self.total / count)
            cache = cache + (found.view + picture).times(self.total * self.views / count)
        cache = cache + caption.times(self._cached_texts() / count)
        busy = whole / cpu if cpu else 1.0
        self.ledger.assume(
            "seconds", f"batch {found.batch}",
            f"measured on this machine now, median of three steps; in proportion up to {self.train.batch_size}"
            f" pictures; the wall clock was {busy:.1f} times the processor's",
        )  # fmt: skip
        if not self.cut:
            self.ledger.assume(
                "pictures in training", "made once" if kept else "made at every use",
                "a stream keeps none"
                if self.stream is not None
                else f"they {'fit' if kept else 'do not fit'} into data.ram_gb {self.recipe.data.ram_gb:g}",
            )  # fmt: skip
        _, _, known = self._teacher_work()
        online = (picture + caption.times(self.share)).times(self.train.steps * self.train.batch_size / count)
        return {
            "training_s": max(whole, data.wall_s), "training_cpu_s": cpu + data.cpu_s, "steps": steps,
            "compute_s": whole, "decode_s": data.wall_s,
            "bound": "decoding" if data.wall_s > whole else "computing",
            "step_s": whole / max(1, sum(phase.steps for phase in found.phases)),
            "cache_s": cache.wall_s if known else None,
            "online_teacher_s": online.wall_s if known else None,
            "prepare_s": first.wall_s,
        }  # fmt: skip
