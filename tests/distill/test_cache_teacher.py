"""`pocketvlm cache-teacher`, `cache show`, `cache verify`, and runs that use what they made, by the command line."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from distill_toys import ToyTeacher, make_world, toy_recipe

from pocketvlm.cli import main
from pocketvlm.distill.cache_check import LEAST_COSINE, verify
from pocketvlm.distill.cache_teacher import Share, cache_teacher
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.made_cache import MadeCaches
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.cache import TeacherCache

SILENT = Reporter(False)
pytestmark = pytest.mark.usefixtures("toy_teacher")


class Done(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy_recipe(world, tmp_path / "own")))
    return path


@pytest.fixture
def made(recipe: Path, tmp_path: Path) -> Path:
    cache_teacher(load_recipe(recipe), tmp_path / "made", report=SILENT)
    return tmp_path / "made"


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --------------------------------------------------------------------------------------------------- making and showing


def test_the_cost_is_told_first_and_a_second_call_makes_nothing(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    done = cli("cache-teacher", recipe, "--out", out)
    assert done.code == 0, done.err
    assert done.out == f"cache: {out}\n"
    lines = done.err.splitlines()
    # 16 numbers and 12 features of two bytes, and nine of four
    cost = "teacher toy: 92 bytes a view (16 numbers, 12 of features in bfloat16) x 40 pictures x 3 views"
    (first,) = [place for place, line in enumerate(lines) if line.startswith(cost)]
    assert lines[first + 1].endswith(f"in {out}")
    assert min(place for place, line in enumerate(lines) if "teacher images" in line) > first + 1
    before = contents(out)
    assert cli("cache-teacher", recipe, "--out", out).code == 0
    assert contents(out) == before


def test_an_override_given_twice_is_said_before_anything_else(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("cache-teacher", recipe, "views.seed=1", "views.seed=2", "--out", tmp_path / "made")
    assert done.code == 0
    assert done.err.startswith("views.seed is given 2 times and the last counts ('views.seed=2')")


def test_processes_of_torchrun_make_the_same_bytes(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--shard-size", 7)
    assert cli("cache-teacher", recipe, "--out", tmp_path / "one", *small).code == 0
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        done = cli("cache-teacher", recipe, "--out", tmp_path / "many", *small)
        assert done.code == 0
        last = rank == 1
        assert (f"cache: {tmp_path / 'many'}" in done.out) == last
        assert (f"process {rank} of 3 has made its shards; others are still at theirs" in done.err) != last
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    monkeypatch.setenv("RANK", "3")
    done = cli("cache-teacher", recipe, "--out", tmp_path / "many")
    assert done.code == 2
    assert "RANK is '3' and WORLD_SIZE '3', by which no share" in done.err


def test_an_unfinished_folder_is_shown_and_not_used(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    assert not cache_teacher(load_recipe(recipe), out, shard_size=7, share=Share(0, 2), report=SILENT)
    (row,) = json.loads(cli("cache", "show", out, "--json").out)
    assert row["state"] == "unfinished, 4 shards"
    done = cli("distill", recipe, f"teacher.cache={out}", "--out", tmp_path / "run")
    assert done.code == 2
    assert "holds an unfinished build (no cache.json); finish it" in done.err


def test_show_says_who_made_it_and_what_it_takes(cli: Cli, world: Path, tmp_path: Path) -> None:
    data = make_world(tmp_path / "broken", broken=True)
    value = toy_recipe(world, tmp_path / "own") | {"data": {"train": f"{data}?check=none"}}
    value["train"] |= {"text_batch": 0}
    value["objectives"] = [{"name": "feature"}]
    recipe, out = tmp_path / "r.yaml", tmp_path / "made"
    recipe.write_text(yaml.safe_dump(value))
    assert cli("cache-teacher", recipe, "--out", out, "--shard-size", 64).code == 0
    (row,) = json.loads(cli("cache", "show", out, "--json").out)
    shard = out / "0-toy" / "shard-00000.safetensors"
    assert row["skipped"] == {"truncated-image": 1}
    assert row["bytes_per_view"] == round(shard.stat().st_size / 120, 1)
    # no objective reads features, so none are kept
    assert row["numbers"] == {"embedding": 16, "features": 0, "tokens": 0}
    wanted = {"teacher": "toy", "pictures": 40, "views": 3, "dtype": "bfloat16", "fingerprint": ToyTeacher.fingerprint}
    assert {key: row[key] for key in wanted} == wanted
    said = cli("cache", "show", out).out
    assert "bytes per view" in said
    assert "truncated-image" in said
    done = cli("cache", "show", tmp_path)
    assert done.code == 2
    assert "holds neither teacher-cache.json nor cache.json" in done.err


def test_what_cannot_be_kept_is_refused(recipe: Path, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no teacher, so there is nothing to keep"):
        cache_teacher(load_recipe(recipe, ["teacher=null", "objectives=[{name: clip}]"]), tmp_path / "x", report=SILENT)
    embeddings = load_recipe(recipe, [f"teacher.spec=embeddings:{made / '0-toy'}"])
    with pytest.raises(UsageError, match="is a cache already"):
        cache_teacher(embeddings, tmp_path / "x", report=SILENT)
    with pytest.raises(UsageError, match="a cache by shards reads whole tars"):
        cache_teacher(load_recipe(recipe), tmp_path / "x", by_shard=True, report=SILENT)
    with pytest.raises(
        IntegrityError, match=r"begun .* with another recipe \(differs in teacher\.spec, views\.count\)"
    ):
        cache_teacher(load_recipe(recipe, ["views.count=2", "teacher.spec=toy-other"]), made, report=SILENT)
    with pytest.raises(IntegrityError, match="dtype 'bfloat16' but 'float32'"):
        cache_teacher(load_recipe(recipe), made, dtype="float32", report=SILENT)


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_reads_exactly_what_it_would_have_made(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its teacher then sees no training picture."""
    short = ["data.eval=null", "train.steps=2"]
    alone = distill_run(load_recipe(recipe, short), tmp_path / "alone", progress=False)
    cache_teacher(load_recipe(recipe), tmp_path / "made", dtype="float32", report=SILENT)
    before = contents(tmp_path / "made")

    def never(self: ToyTeacher, pixels: torch.Tensor) -> TeacherOutput:
        raise AssertionError("the teacher was asked")

    monkeypatch.setattr(ToyTeacher, "encode_images", never)
    kept = distill_run(
        load_recipe(recipe, [*short, f"teacher.cache={tmp_path / 'made'}"]), tmp_path / "kept", progress=False
    )
    assert kept.final_loss == alone.final_loss
    assert contents(tmp_path / "made") == before


def test_a_run_may_read_a_part_of_what_is_kept(recipe: Path, made: Path) -> None:
    part = ["views.count=2", "train.text_batch=0", "objectives=[{name: feature}]", "data.words=null"]
    prepared = prepare(load_recipe(recipe, [f"teacher.cache={made}", *part]), SILENT)
    assert prepared.images is not None
    assert prepared.images.info.dtype == "bfloat16"
    one = prepare(load_recipe(recipe, [f"teacher.cache={made / '0-toy'}", *part]), SILENT)
    uids = [sample.uid for sample in prepared.samples]
    assert one.images is not None
    assert torch.equal(one.images.image(uids, 1), prepared.images.image(uids, 1))


def test_several_teachers_lie_in_one_folder(recipe: Path, tmp_path: Path) -> None:
    several = ["teacher.spec=[toy, toy-other, toy-text]", "objectives=[{name: multi-teacher}]"]
    out = tmp_path / "made"
    assert cache_teacher(load_recipe(recipe, several), out, dtype="float32", report=SILENT)
    assert sorted(path.name for path in out.iterdir()) == ["0-toy", "1-toy-other", "2-toy-text", "teacher-cache.json"]
    own = prepare(load_recipe(recipe, several), SILENT)
    kept = prepare(load_recipe(recipe, [*several, f"teacher.cache={out}"]), SILENT)
    uids = [sample.uid for sample in own.samples]
    assert own.images is not None
    assert kept.images is not None
    assert torch.equal(own.images.image(uids, 2), kept.images.image(uids, 2))
    assert torch.equal(own.images.text(own.read(["red thing"])), kept.images.text(["red thing"]))
    assert [row.what for row in verify(out, samples=8, report=SILENT)] == ["image", "text", "image", "text", "text"]


def refused(cli: Cli, recipe: Path, made: Path, *changes: str) -> str:
    done = cli("distill", recipe, f"teacher.cache={made}", *changes, "--out", made.parent / "run")
    assert done.code == 2, done
    assert "Traceback" not in done.err
    assert not (made.parent / "run").exists()
    return done.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("views.count=4", "has views 3 but 4 was expected"),
        ("views.seed=1", "has seed 0 but 1 was expected"),
        ("views.policy={flip: 0.25}", "has policy.flip 0.5 but 0.25 was expected"),
        ("teacher.cache_dtype=float32", "has dtype 'bfloat16' but 'float32' was expected"),
        ("teacher.spec=toy-other", "was expected (also: teacher fingerprint"),
        ("data.train=MORE", "made from other data: 1 of 41 pictures are not in it (first 'world/more'"),
        ("data.train=CHANGED", "made from other pictures: 1 of 40 have other bytes now (first "),
        ("data.train=RENAMED", "texts are not in it (first 'another thing')"),
        ("teacher.token_grid=2", "has token_grid 0 but 2 was expected"),
    ],
)
def test_a_run_refuses_what_was_made_otherwise(cli: Cli, world: Path, tmp_path: Path, change: str, named: str) -> None:
    data = Path(shutil.copytree(world.parent, tmp_path / "data")) / world.name
    recipe, out = tmp_path / "toy.yaml", tmp_path / "made"
    value = toy_recipe(data, tmp_path / "own")
    value["teacher"]["spec"] = "toy-tokens" if "token_grid" in change else "toy"
    recipe.write_text(yaml.safe_dump(value))
    cache_teacher(load_recipe(recipe), out, report=SILENT)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    if "MORE" in change:
        rows.append({"image": rows[0]["image"], "caption": "red thing", "uid": "more"})
    elif "CHANGED" in change:
        shutil.copy(data.parent / rows[1]["image"], data.parent / rows[0]["image"])
    elif "RENAMED" in change:
        rows[3]["caption"] = "another thing"
    if "data.train" in change:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        change = "name=toy"
    changes = [change]
    if "token_grid" in change:
        changes += [
            "objectives=[{name: hint, options: {student_tap: tokens, teacher_tap: tokens}}]",
            "student.overrides.image.size=64",
        ]
    assert named in refused(cli, recipe, out, *changes)


def test_other_weights_and_preprocessing_are_named(
    cli: Cli, recipe: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = ToyTeacher.fingerprint
    monkeypatch.setattr(ToyTeacher, "fingerprint", "0" * 64)
    assert f"has teacher fingerprint {before!r} but '000" in refused(cli, recipe, made)
    monkeypatch.setattr(ToyTeacher, "image", ImageSpec(size=16, filter="bicubic"))
    said = refused(cli, recipe, made)
    assert "has preprocessing.filter 'bilinear' but 'bicubic' was expected (also: teacher fingerprint" in said
    done = cli("cache", "verify", made)
    assert done.code == 1
    assert "has preprocessing.filter 'bilinear' but 'bicubic' was expected" in done.err


def test_features_that_were_not_kept_are_named(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    cache_teacher(load_recipe(recipe, ["objectives=[{name: feature}]"]), tmp_path / "made", report=SILENT)
    said = refused(cli, recipe, tmp_path / "made", "objectives=[{name: hint}]", "train.text_batch=0")
    assert "keeps no pooled features, which hint reads" in said


def test_a_flipped_bit_is_found_by_training_and_by_verify(cli: Cli, recipe: Path, made: Path, tmp_path: Path) -> None:
    path = made / "0-toy" / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 4
    path.write_bytes(bytes(data))
    done = cli("cache", "verify", made)
    assert done.code == 1
    assert "shard-00000.safetensors has sha256" in done.err
    done = cli("distill", recipe, f"teacher.cache={made}", "--out", tmp_path / "run")
    assert done.code == 2
    assert "shard-00000.safetensors has sha256" in done.err.splitlines()[-1]


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify_asks_the_teacher_again(cli: Cli, made: Path) -> None:
    done = cli("cache", "verify", made, "--samples", 20, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)
    assert [(row["output"], row["rows"]) for row in rows] == [
        ("image", 20),
        ("features", 20),
        ("text", 20),
        ("text_features", 20),
    ]
    assert all(row["verdict"] == "holds" for row in rows)


def test_rounding_to_bfloat16_stays_far_above_the_limit() -> None:
    """What `LEAST_COSINE` rests on: random directions, and those whose numbers differ much in size."""
    generator = torch.Generator().manual_seed(0)
    for width in (2, 16, 384, 2912):
        rows = torch.randn(512, width, generator=generator, dtype=torch.float64)
        for spread in (rows, rows**3, rows.exp()):
            unit = torch.nn.functional.normalize(spread.float(), dim=1)
            lowest = torch.cosine_similarity(unit.double(), unit.bfloat16().double(), dim=1).min()
            assert lowest > 0.999992
    assert LEAST_COSINE < 0.99999


@pytest.mark.parametrize("views", [1, 3])
def test_verify_finds_another_answer_and_names_it(
    cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    """The same fingerprint, and one picture's answers turned by a hundredth; and in the views, so is what was shown."""
    made = tmp_path / "made"
    cache_teacher(load_recipe(recipe, [f"views.count={views}"]), made, report=SILENT)
    real = ToyTeacher.encode_images

    def other(self: ToyTeacher, pixels: torch.Tensor) -> TeacherOutput:
        found = real(self, pixels)
        red = pixels.float().mean(dim=(1, 2)).argmax(dim=1) == 0
        embedding = found.embedding.clone()
        embedding[red] += 0.03 * embedding[red].roll(1, dims=1)
        return dataclasses.replace(found, embedding=torch.nn.functional.normalize(embedding, dim=1))

    monkeypatch.setattr(ToyTeacher, "encode_images", other)
    done = cli("cache", "verify", made, "--samples", 40)
    assert done.code == 1
    assert "below 0.9999" in done.out
    assert "the image kept of world/" in done.err
    assert "a student would be taught something else" in done.err


def test_verify_needs_the_data_that_it_was_made_from(cli: Cli, recipe: Path, made: Path, tmp_path: Path) -> None:
    alone = made / "0-toy"
    done = cli("cache", "verify", alone)
    assert done.code == 2
    assert "does not say from which data it was made" in done.err
    assert cli("cache", "verify", alone, "--recipe", recipe, "--samples", 4).code == 0
    other = make_world(tmp_path / "other", pictures=5)
    value = toy_recipe(other, tmp_path / "own")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(value))
    done = cli("cache", "verify", alone, "--recipe", tmp_path / "other.yaml")
    assert done.code == 1
    assert "are not in the data" in done.err
    two = toy_recipe(other, tmp_path / "own")
    two["teacher"]["spec"] = ["toy", "toy-other"]
    two["objectives"] = [{"name": "multi-teacher"}]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    done = cli("cache", "verify", alone, "--recipe", tmp_path / "two.yaml")
    assert done.code == 2
    assert "names 2 teacher(s)" in done.err


# ---------------------------------------------------------------------------------------------------------- data shards


@pytest.fixture
def tars(world: Path, tmp_path: Path) -> Path:
    """Three tars of the toy world's pictures."""
    folder = tmp_path / "tars"
    folder.mkdir()
    rows = [json.loads(line) for line in world.read_text().splitlines()]
    for number in range(3):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as archive:
            for row in rows[number::3]:
                for suffix, data in (
                    ("png", (world.parent / row["image"]).read_bytes()),
                    ("txt", row["caption"].encode()),
                ):
                    member = tarfile.TarInfo(f"{row['label']}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def test_a_cache_by_shards_serves_lists_and_single_shards(cli: Cli, world: Path, tars: Path, tmp_path: Path) -> None:
    value = toy_recipe(world, tmp_path / "own")
    value["data"] = {"train": f"wds:{tars}/{{000..002}}.tar", "words": {"name": "wordfreq-en", "size": 60}}
    recipe, out = tmp_path / "tars.yaml", tmp_path / "made"
    recipe.write_text(yaml.safe_dump(value))
    done = cli("cache-teacher", recipe, "--by-shard", "--out", out)
    assert done.code == 0, done.err
    assert "3 views of every picture of 3 data shards, and their captions" in done.err
    cache = TeacherCache.open(MadeCaches.need(out).path({"folder": "0-toy"}))
    assert cache.data_shards == ("tars/000", "tars/001", "tars/002")
    part = cache.of_shard("tars/001")
    assert {uid.rpartition("/")[0] for uid in part.uids} == {"tars/001"}
    assert [part.text([uid.rpartition("/")[2] + " thing"]).shape for uid in part.uids] == [(1, 16)] * 13
    own = prepare(load_recipe(recipe), SILENT)
    kept = prepare(load_recipe(recipe, [f"teacher.cache={out}"]), SILENT)
    uids = [sample.uid for sample in own.samples]
    assert own.images is not None
    assert kept.images is not None
    assert own.words is not None
    assert kept.words is not None
    assert torch.equal(own.images.image(uids, 2).bfloat16(), kept.images.image(uids, 2).bfloat16())
    assert torch.equal(own.words.text(own.english).bfloat16(), kept.words.text(own.english).bfloat16())
    assert cli("cache", "verify", out, "--samples", 10).code == 0
