"""Whole runs over a stream of toy shards: without, with a live and with a cached teacher, killed and continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import TINY_STUDENT, ToyTeacher
from stream_toys import SAMPLES, SHARDS, write_shard, write_world

from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.shards import ShardOrder, list_shards
from pocketvlm.data.stream import SampleStream
from pocketvlm.distill.cache_check import show, verify
from pocketvlm.distill.cache_teacher import cache_teacher
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.ranks import Ranks
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.distill.stream_feed import StreamFeed
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.students import save_student
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_build import build_cache

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("tars") / "cc")


def stream_recipe(shards: Path, **changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "name": "toy-stream",
        "data": {"stream": {"shards": str(shards), "buffer": 3, "workers": 0, "draft": False}},
        "views": {"count": 3},
        "teacher": {"spec": "toy"},
        "student": {"name": "mnv4-035", "overrides": TINY_STUDENT},
        "objectives": [
            {"name": "feature", "options": {"distance": "cosine"}},
            {"name": "hint", "weight": 0.1},
            {"name": "crd"},
            {"name": "clip", "weight": 0.5},
        ],
        "train": {"steps": 6, "batch_size": 6, "warmup_steps": 2, "log_every": 2, "threads": 1},
        "checkpoint": {"every": 3},
    }
    return value | changes


def trainer_of(recipe: dict[str, Any]) -> Trainer:
    return Trainer(prepare(load_recipe(recipe), Reporter(False)), CPU)


MEASURED = {"data_wait_share", "rss_mb"}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What a run computed; not what it took."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: value for k, value in row.items() if not k.endswith("_s") and k not in MEASURED} for row in rows]


class Killed(Exception):
    pass


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_to_the_same_weights(
    tmp_path: Path, shards: Path, toy_teacher: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    value = stream_recipe(shards)
    value["data"]["stream"]["workers"] = workers
    recipe = load_recipe(value)
    whole = distill_run(recipe, tmp_path / "whole", progress=False)
    assert whole.steps == 6
    step = Trainer.one_step

    def dies(self: Trainer, batch: Any) -> Any:
        if self.step == 4:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(Trainer, "one_step", dies)
    with pytest.raises(Killed):
        distill_run(recipe, tmp_path / "killed", progress=False)
    monkeypatch.setattr(Trainer, "one_step", step)
    again = distill_run(recipe, tmp_path / "killed", resume=True, progress=False)
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert again.final_loss == whole.final_loss
    saved = [torch.load(one, weights_only=True) for one in sorted(tmp_path.glob("*/checkpoints/step-00000006.pt"))]
    assert all(torch.equal(saved[0]["student"][name], saved[1]["student"][name]) for name in saved[0]["student"])
    assert saved[0]["data"] == saved[1]["data"]
    if workers:
        other = load_recipe(value, ["data.stream.workers=1"])
        trainer = Trainer(prepare(other, Reporter(False)), CPU)
        with pytest.raises(IntegrityError, match="workers 2 then and 1 now"):
            trainer.feed.load_state_dict(saved[0]["data"][0])


def test_a_live_teacher_sees_the_view_at_its_own_size(shards: Path, toy_teacher: None) -> None:
    several = {"spec": ["toy", "toy-other", "toy-text"]}
    trainer = trainer_of(stream_recipe(shards, teacher=several, objectives=[{"name": "crd"}, {"name": "clip"}]))
    feed = trainer.feed
    assert isinstance(feed, StreamFeed)
    taken: list[Any] = []
    over = feed._over
    feed._over = lambda made, step: taken.append(made) or over(made, step)  # type: ignore[method-assign,func-returns-value]
    batch = feed.make(0)
    (made,) = taken
    assert [tuple(pixels.shape) for pixels in made.pixels] == [(6, 32, 32, 3), (6, 16, 16, 3), (6, 8, 8, 3)]
    assert torch.equal(batch.pixels, made.pixels[0])
    assert batch.teacher_image is not None
    teacher = ToyTeacher()
    assert torch.equal(batch.teacher_image[:, :16], teacher.encode_images(made.pixels[1]).embedding)
    assert torch.equal(batch.teacher_image[:, 26:], torch.zeros(6, 6)), "a teacher of texts says nothing of pictures"
    assert batch.teacher_captions is not None
    assert torch.equal(batch.teacher_captions[:, :16], teacher.encode_texts(made.captions).embedding)
    trainer.one_step(batch)


def test_a_picture_twice_in_a_batch_is_taught_each_of_its_views(shards: Path, toy_teacher: None) -> None:
    value = stream_recipe(shards)
    value["data"]["stream"]["order"] = "resampled"
    value["train"]["batch_size"] = 12
    feed = trainer_of(value).feed
    taken: list[Any] = []
    over = feed._over  # type: ignore[attr-defined]
    feed._over = lambda made, step: taken.append(made) or over(made, step)  # type: ignore[attr-defined,func-returns-value]
    twice = 0
    for step in range(6):
        batch, made = feed.make(step), taken[-1]
        twice += len(set(zip(made.uids, made.views))) - len(set(made.uids))
        found = ToyTeacher().encode_images(made.pixels[1])
        assert torch.equal(batch.teacher_image, found.embedding)
        assert torch.equal(batch.teacher_features, found.features)
    assert twice, "some picture came in two views"


def test_a_cached_teacher_answers_like_the_live_one(tmp_path: Path, shards: Path, toy_teacher: None) -> None:
    found = list_shards(str(shards))
    stream = SampleStream(found, ShardOrder(len(found), slot=0, slots=1, order="sequential", seed=0))
    samples = list(stream.once())
    assert len(samples) == SHARDS * SAMPLES
    texts = [caption.text for sample in samples for caption in sample.captions]
    build_cache(ToyTeacher(), samples, texts, tmp_path / "cache", views=3, policy=AugmentPolicy(), seed=0)
    live = trainer_of(stream_recipe(shards))
    cached = trainer_of(stream_recipe(shards, teacher={"spec": "toy", "cache": str(tmp_path / "cache")}))
    for step in range(3):
        a, b = live.feed.make(step), cached.feed.make(step)
        assert torch.equal(a.ids, b.ids)
        for name in ("teacher_image", "teacher_features", "teacher_captions", "teacher_caption_features"):
            # rows of other batches: float32 rounding
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-6)
    assert len(cached.feed.source.settings.specs) == 1, "nobody decodes for a teacher that has answered"
    other = stream_recipe(shards, teacher={"spec": "toy", "cache": str(tmp_path / "cache")}, views={"count": 4})
    with pytest.raises(IntegrityError, match="has views 3 but 4 was expected"):
        trainer_of(other)


def test_a_teacher_of_texts_alone_is_kept_by_shards_too(
    tmp_path: Path, shards: Path, toy_teacher: None, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {"spec": ["toy", "toy-text"]}
    objectives = [{"name": "crd"}, {"name": "gram", "teacher": 1, "options": {"of": "text"}}]
    value = stream_recipe(shards, teacher=several, objectives=objectives)
    made = tmp_path / "made"
    assert cache_teacher(load_recipe(value), made, dtype="float32", report=Reporter(True))
    told = capsys.readouterr().err
    assert (
        f"teacher toy-text: 24 bytes a caption (6 numbers in float32) and its text, of all captions of {SHARDS} "
        in told
    )
    cache = TeacherCache.open(made / "1-toy-text")
    assert len(cache) == 0
    assert len(cache.of_shard(cache.data_shards[0]).texts) == SAMPLES
    assert [(row.teacher, row.what) for row in verify(made, samples=5, report=Reporter(False))] == [
        ("toy", "image"), ("toy", "text"), ("toy-text", "text"),
    ]  # fmt: skip
    live = trainer_of(value)
    cached = trainer_of(stream_recipe(shards, teacher=several | {"cache": str(made)}, objectives=objectives))
    capsys.readouterr()
    assert all(isinstance(one, TeacherCache) for one in cached.prepared.stream.answers)
    for step in range(4):
        a, b = live.feed.make(step), cached.feed.make(step)
        for name in ("teacher_image", "teacher_captions"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-6)
    assert a.teacher_captions is not None
    assert a.teacher_captions.shape[1] == 16 + 6
    assert live.one_step(a)["loss"] == pytest.approx(cached.one_step(b)["loss"], rel=1e-4)


def test_a_cache_by_shards_serves_a_stream_and_is_checked(
    tmp_path: Path, shards: Path, toy_teacher: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_teacher(load_recipe(stream_recipe(shards)), tmp_path / "made", dtype="float32", report=Reporter(True))
    assert all(one.holds for one in verify(tmp_path / "made", samples=9, report=Reporter(False)))
    told = capsys.readouterr().err
    assert f"every picture of {SHARDS} data shards, and their captions\n" in told
    assert "how many is not known yet" in told
    assert "0.0 MB" not in told
    assert show(tmp_path / "made")[0]["data"] == str(shards)
    assert "bytes_per_text" not in show(tmp_path / "made")[0], "captions lie with their pictures"
    live = trainer_of(stream_recipe(shards))
    cached = trainer_of(stream_recipe(shards, teacher={"spec": "toy", "cache": str(tmp_path / "made")}))
    for step in range(8):
        a, b = live.feed.make(step), cached.feed.make(step)
        for name in ("teacher_image", "teacher_captions"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-6)
    assert isinstance(cached.feed, StreamFeed)
    assert 0 < len(cached.feed._shard_caches) < SHARDS, "what no worker reads any more is closed"


def test_masked_views_regions_and_texts_come_with_a_stream(tmp_path: Path, shards: Path, toy_teacher: None) -> None:
    save_student(trainer_of(stream_recipe(shards)).student, tmp_path / "start")
    objectives = [
        {"name": "clip"},
        {"name": "masked-feature"},
        {"name": "region-self"},
        {"name": "feature", "batch": "texts", "options": {"text": 0}},
    ]
    value = stream_recipe(shards, objectives=objectives)
    value["data"]["words"] = {"name": "wordfreq-en", "size": 60}
    value["train"] |= {"text_batch": 8, "text_pretrain_steps": 1}
    value["student"] = value["student"] | {"init": str(tmp_path / "start"), "init_parts": ["image_tower"]}
    trainer = trainer_of(value)
    trainer.start()
    for step in range(3):
        batch = trainer.feed.make(step)
        row = trainer.one_step(batch)
        assert batch.phase == ("pairs" if step else "texts")
    assert batch.masked is not None
    assert batch.cells is not None
    assert batch.teacher_texts is not None
    terms = {name for name in row if name.startswith("loss/")}
    assert len(terms) >= 4, "each of the four objectives had its part"


def test_a_run_without_teacher_or_captions_says_what_is_wrong(tmp_path: Path, shards: Path) -> None:
    alone = stream_recipe(shards, teacher=None, objectives=[{"name": "clip"}])
    trainer = trainer_of(alone)
    assert trainer.one_step(trainer.feed.make(0))["loss"] > 0
    write_shard(tmp_path / "none" / "s.tar", [("a.jpg", b"\xff\xd8\xff"), ("b.jpg", b"\xff\xd8\xff")])
    with pytest.raises(UsageError, match=r"data set 'none' is empty: all of it was left out \(2 x no-caption\)"):
        trainer_of(stream_recipe(tmp_path / "none", teacher=None, objectives=[{"name": "clip"}]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {}}, "data has neither train nor stream"),
        ({"data": {"train": "openmoji", "stream": {"shards": "x"}}}, "data has train and stream.*keep one"),
        ({"task": {}}, "task needs every sample before the first step"),
        ({"train": {"captioned_fraction": 0.5}}, "train.captioned_fraction needs every sample"),
        ({"student": {"name": "mnv4-035", "fit_projection": 1.0}}, "student.fit_projection needs every sample"),
        ({"teacher": {"spec": "toy", "axes": "principal"}}, "teacher.axes: principal needs every sample"),
    ],
)
def test_recipes_that_a_stream_cannot_serve_are_refused(shards: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        load_recipe(stream_recipe(shards, **changes))


def test_a_live_teacher_has_no_mean_of_views_and_a_batch_no_odd_part(shards: Path, toy_teacher: None) -> None:
    with pytest.raises(UsageError, match=r"teacher\.smooth is 0\.5 and toy answers each batch as it comes"):
        trainer_of(stream_recipe(shards, teacher={"spec": "toy", "smooth": 0.5}))
    trainer = trainer_of(stream_recipe(shards))
    with pytest.raises(UsageError, match=r"train\.batch_size is 6 and the run has 4 ranks"):
        StreamFeed(trainer.prepared, trainer.order, CPU, Ranks(0, 4))
    parts = [StreamFeed(trainer.prepared, trainer.order, CPU, Ranks(rank, 2)).make(0) for rank in (0, 1)]
    assert [part.size for part in parts] == [3, 3]
    assert not {*parts[0].group.tolist()} & {*parts[1].group.tolist()}
    position = trainer.feed.state_dict(0)
    with pytest.raises(IntegrityError, match=r"made by 2 ranks.*and this run has 1"):
        trainer.restore(trainer.state([position, position]), Path("step.pt"))
