"""`teacher.logits`: what a cache keeps of a teacher's distribution over a list of texts, and a run that learns it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distill_toys import DIM, NAMES, ToyTeacher, toy_recipe
from objective_toys import B, N, build, outputs, total
from stream_toys import write_world

from pocketvlm.cli import main
from pocketvlm.distill.accumulate import joined, parts_of
from pocketvlm.distill.cache_check import show, verify
from pocketvlm.distill.cache_teacher import cache_teacher
from pocketvlm.distill.loop import Trainer, distill_run
from pocketvlm.distill.objectives import objective_needs
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers.base import TeacherOutput

CPU, SILENT = torch.device("cpu"), Reporter(False)
pytestmark = pytest.mark.usefixtures("toy_teacher")
BANK = {"name": "bank", "options": {"target": "top-logits"}}
# colours that no picture has are among the texts; the last line is no text
TEXTS = [f"{name} thing" for name in ("red", "blue", "mauve", "teal", "cream", "gold", "puce")]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*TEXTS, ""]))
    return path


def recipe_of(world: Path, cache: Path, texts: Path, **changes: Any) -> dict[str, Any]:
    value = toy_recipe(world, cache, objectives=[{"name": "feature", "options": {"text": 0}}, BANK], **changes)
    value["data"] = {"train": f"{world}?check=none"}
    value["train"] |= {"steps": 3, "text_batch": 0}
    value["teacher"] |= {"logits": {"texts": str(texts), "top": 3}}
    return value


# ------------------------------------------------------------------------------------------------------ the objective


def test_all_but_one_give_the_whole_divergence_and_fewer_a_part_of_it() -> None:
    """Of the raw definition: what is put together can only lose divergence, and one text alone loses none."""
    student, teacher = outputs(1), outputs(2)
    whole = float(total(build("bank"), student, teacher))
    shares = (
        float(teacher.logit_scale)
        * torch.nn.functional.normalize(teacher.image, dim=1)
        @ torch.nn.functional.normalize(teacher.bank, dim=1).T
    ).softmax(dim=1)
    order, values = shares.argsort(dim=1, descending=True), []
    for top in range(1, N):
        kept = shares.gather(1, order[:, :top])
        teacher.top_ids = order[:, :top]
        teacher.top_logits = torch.cat([kept, 1 - kept.sum(dim=1, keepdim=True)], dim=1).log()
        values.append(float(total(build("bank", target="top-logits"), student, teacher)))
    assert values == sorted(values)
    assert values[0] < 0.9 * whole
    assert values[-1] == pytest.approx(whole, rel=1e-10)


def test_rounded_shares_are_made_a_distribution_again() -> None:
    """A share that float16 rounded up does not push the student away from its teacher."""
    teacher = outputs(2)
    off = dataclasses.replace(teacher, top_logits=teacher.top_logits + 0.01)
    student = outputs(2, grad=True)
    total(build("bank", target="top-logits"), student, off).backward()
    assert float(student.image.grad.abs().max()) < 1e-12


def test_what_the_objective_cannot_learn_from_is_refused() -> None:
    assert objective_needs("bank", {"target": "top-logits"}).logits
    assert not objective_needs("bank").logits
    with pytest.raises(UsageError, match="a teacher without top logits"):
        total(build("bank", target="top-logits"), outputs(1), dataclasses.replace(outputs(2), top_ids=None))
    other = dataclasses.replace(outputs(2), top_ids=torch.full((B, 3), N))
    with pytest.raises(UsageError, match=f"top logits of text {N} and a bank of {N}"):
        total(build("bank", target="top-logits"), outputs(1), other)
    with pytest.raises(UsageError, match=r"teacher_temperature 0\.1 and learns from top logits"):
        build("bank", target="top-logits", teacher_temperature=0.1)


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_run_is_taught_the_cached_views_logits(world: Path, texts: Path, tmp_path: Path) -> None:
    trainer = Trainer(prepare(load_recipe(recipe_of(world, tmp_path / "own", texts)), SILENT), CPU)
    batch = trainer.feed.make(0)
    plan = trainer.order.plan(0)
    assert max(plan.views) > 0, "some view is not the plain one"
    teacher = ToyTeacher()
    _, taught = trainer.feed.forward(trainer.student, batch)["pairs"]
    assert taught is not None
    assert taught.top_logits.shape == (8, 4)
    anchors = teacher.encode_texts(TEXTS).embedding
    torch.testing.assert_close(taught.bank, anchors)
    for row in range(8):
        shares = (teacher.logit_scale * batch.teacher_image[row] @ anchors.T).softmax(dim=0)
        order = shares.argsort(descending=True)[:3]
        assert taught.top_ids[row].tolist() == order.tolist()
        wanted = [*shares[order].tolist(), float(1 - shares[order].sum())]
        assert taught.top_logits[row].exp().tolist() == pytest.approx(wanted, rel=5e-3, abs=1e-4)
    before = trainer.one_step(batch)
    assert before["loss/bank"] > 0
    assert trainer.student.image_tower.projection.first.weight.grad.abs().max() > 0


def test_parts_of_a_step_keep_their_own_logits(world: Path, texts: Path, tmp_path: Path) -> None:
    trainer = Trainer(prepare(load_recipe(recipe_of(world, tmp_path / "own", texts)), SILENT), CPU)
    batch = trainer.feed.make(0)
    trainer.student.eval()
    found = joined([trainer.feed.forward(trainer.student, part) for part in parts_of(batch, 3)], fixed_bank=True)
    _, taught = found["pairs"]
    assert taught is not None
    assert torch.equal(taught.top_logits, batch.teacher_logits)
    assert torch.equal(taught.top_ids, batch.teacher_ids)
    assert taught.bank.shape == (len(TEXTS), DIM)


def test_a_made_cache_trains_alike_killed_or_not_and_is_verified(
    world: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = load_recipe(recipe_of(world, tmp_path / "own", texts)), tmp_path / "made"
    alone = distill_run(recipe, tmp_path / "alone", progress=False)
    capsys.readouterr()
    assert cache_teacher(recipe, out, dtype="float32", report=Reporter())
    # 16 numbers of four bytes, nine of four, three logits and their rest of two, three places of two
    assert "114 bytes a view (16 numbers, the 3 largest logits of 7 texts in float32)" in capsys.readouterr().err
    rows = {row.what: row for row in verify(out, samples=20, report=SILENT)}
    assert rows["logits"].holds
    assert rows["logits"].cosine > 0.999999
    assert show(out)[0]["logits"] == "the 3 largest over 7 texts"
    kept = recipe.updated([f"teacher.cache={out}"])
    again = distill_run(kept, tmp_path / "kept", progress=False)
    assert again.final_loss == alone.final_loss

    real, steps = Trainer.one_step, []

    def killed(self: Trainer, batch: Any) -> dict[str, Any]:
        steps.append(self.step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Trainer, "one_step", killed)
    short = kept.updated(["checkpoint.every=1"])
    with pytest.raises(KeyboardInterrupt):
        distill_run(short, tmp_path / "cut", progress=False)
    assert distill_run(short, tmp_path / "cut", resume=True, progress=False).final_loss == alone.final_loss

    def other(self: ToyTeacher, texts: list[str]) -> TeacherOutput:
        return TeacherOutput(ToyTeacher._out(self, torch.rand(len(texts), 3)).embedding)

    # the texts mean something else now, and so do the logits of pictures that are seen as before
    monkeypatch.setattr(ToyTeacher, "encode_texts", other)
    rows = {row.what: row for row in verify(out, samples=20, report=SILENT)}
    assert rows["image"].holds
    assert not rows["logits"].holds


def refused(world: Path, texts: Path, tmp_path: Path, change: str) -> str:
    recipe = load_recipe(recipe_of(world, tmp_path / "own", texts))
    cache_teacher(recipe, tmp_path / "made", report=SILENT)
    if change == "reorder":
        texts.write_text("\n".join(reversed(TEXTS)))
        change = "name=x"
    elif change == "shorter":
        texts.write_text("\n".join(TEXTS[1:]))
        change = "name=x"
    with pytest.raises(IntegrityError) as stop:
        prepare(recipe.updated([f"teacher.cache={tmp_path / 'made'}", change]), SILENT)
    return str(stop.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("teacher.logits.top=2", "has top_logits 3 but 2 was expected"),
        ("reorder", "has texts of the logits '"),
        ("shorter", "has number of texts of the logits 7 but 6 was expected"),
    ],
)
def test_a_cache_of_other_logits_is_refused_and_named(
    world: Path, texts: Path, tmp_path: Path, change: str, named: str
) -> None:
    assert named in refused(world, texts, tmp_path, change)


def test_a_cache_without_logits_is_refused_and_one_with_them_serves_other_recipes(
    world: Path, texts: Path, tmp_path: Path
) -> None:
    value = recipe_of(world, tmp_path / "own", texts)
    plain = load_recipe(value, ["teacher.logits=null", "objectives=[{name: crd}]"])
    cache_teacher(plain, tmp_path / "plain", report=SILENT)
    with pytest.raises(IntegrityError, match=r"keeps no logits, which teacher\.logits asks for"):
        prepare(load_recipe(value, [f"teacher.cache={tmp_path / 'plain'}"]), SILENT)
    embeddings = [f"teacher.spec=embeddings:{tmp_path / 'plain' / '0-toy'}", "views.count=1"]
    with pytest.raises(IntegrityError, match="keeps no logits"):
        prepare(load_recipe(value, embeddings), SILENT)
    cache_teacher(load_recipe(value), tmp_path / "with", report=SILENT)
    assert prepare(plain.updated([f"teacher.cache={tmp_path / 'with'}"]), SILENT).bank == ()


def test_a_stream_reads_them_shard_by_shard(texts: Path, tmp_path: Path) -> None:
    value = recipe_of(Path("x"), tmp_path / "none", texts)
    value["data"] = {"stream": {"shards": str(write_world(tmp_path / "cc")), "buffer": 3, "workers": 0, "draft": False}}
    with pytest.raises(UsageError, match=r"a stream's teacher answers each batch as it comes"):
        prepare(load_recipe(value), SILENT)
    cache_teacher(load_recipe(value), tmp_path / "made", dtype="float32", report=SILENT)
    trainer = Trainer(prepare(load_recipe(value, [f"teacher.cache={tmp_path / 'made'}"]), SILENT), CPU)
    anchors = ToyTeacher().encode_texts(TEXTS).embedding
    assert torch.equal(trainer.feed.bank, anchors)
    for step in range(4):
        batch = trainer.feed.make(step)
        assert batch.teacher_image is not None
        assert batch.teacher_ids is not None
        wanted = (ToyTeacher.logit_scale * batch.teacher_image @ anchors.T).topk(3, dim=1).indices
        assert torch.equal(batch.teacher_ids, wanted)
        assert trainer.one_step(batch)["loss/bank"] > 0


# ------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["teacher.logits=null"], "names no texts for them; set it"),
        (["objectives=[{name: crd}]"], "teacher.logits is set and no objective reads the teacher's top logits"),
        (["teacher.spec=[toy, toy-other]"], "scores pictures and teacher.spec names 2"),
        (["train.bank=5"], "train.bank is 5 and teacher.logits names a bank too"),
        (
            ["objectives.bank.batch=texts", "train.text_batch=4", "data.words.size=50"],
            "scored, which a text-only batch",
        ),
        (["teacher.logits.top=0"], "'teacher.logits.top' is 0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    world: Path, texts: Path, tmp_path: Path, changes: list[str], sentence: str
) -> None:
    with pytest.raises(UsageError) as stop:
        load_recipe(recipe_of(world, tmp_path / "own", texts), changes)
    assert sentence in str(stop.value)


def test_a_file_that_is_no_list_of_texts_is_refused(world: Path, texts: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(world, tmp_path / "own", texts))
    with pytest.raises(UsageError, match=r"teacher\.logits\.texts .*none\.txt cannot be read"):
        prepare(recipe.updated([f"teacher.logits.texts={tmp_path / 'none.txt'}"]), SILENT)
    with pytest.raises(UsageError, match=r"teacher\.logits of .*texts\.txt: the 7 largest .* over 7 texts"):
        prepare(recipe.updated(["teacher.logits.top=7"]), SILENT)
    texts.write_text(f"{NAMES[0]}\n{NAMES[1]}\n{NAMES[0]}\n")
    with pytest.raises(UsageError, match=f"have '{NAMES[0]}' twice"):
        prepare(recipe, SILENT)


def test_a_resumed_run_with_other_texts_is_refused(
    world: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_of(world, tmp_path / "own", texts)))
    distill_run(load_recipe(path), tmp_path / "run", progress=False)
    texts.write_text("\n".join([*TEXTS[1:], TEXTS[0]]))
    with pytest.raises(SystemExit):
        main(["distill", str(path), "--out", str(tmp_path / "run"), "--resume"])
    lines = capsys.readouterr().err.splitlines()
    told = f"resuming {tmp_path / 'run'} after step 3 of 3; making its data and teacher ready"
    assert told in lines
    # said before anything takes its time
    assert lines.index(told) < min(place for place, line in enumerate(lines) if "reading pictures" in line)
    assert "other data, texts, tokenizer or teacher" in lines[-1]


def test_the_plan_counts_their_bytes(
    world: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    value = recipe_of(world, tmp_path / "own", texts)
    plain = load_recipe(value, ["teacher.logits=null", "objectives=[{name: feature, options: {text: 0}}]"])
    found = []
    for recipe in (value, plain.to_dict()):
        path.write_text(yaml.safe_dump(recipe))
        main(["plan", str(path), "--device", "cpu", "--samples", "1000", "--json"])
        found.append(json.loads(capsys.readouterr().out)["disk"]["cache_bytes_per_view"])
    assert found[0] - found[1] == pytest.approx(14, abs=3)
