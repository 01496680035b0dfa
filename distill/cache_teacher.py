"""`pocketvlm cache-teacher`: the outputs of a recipe's teachers, made once by as many processes as there are.

    DIR/teacher-cache.json        the recipe and its teachers
    DIR/0-openmoji-lit-fold-0/    one cache for each teacher (`teachers.cache`): views of all pictures, captions, texts

Each process makes every W-th shard of its own rank (RANK and WORLD_SIZE, as torchrun sets them); nothing passes between
them but the files. `teacher.cache: DIR` lets a run use the result.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pocketvlm.data import open_data
from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.check import check_mode
from pocketvlm.data.readers.common import Collector
from pocketvlm.data.readers.webdataset import find_shards, read_webdataset
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Sample
from pocketvlm.data.shards import list_shards
from pocketvlm.data.spec import parse_spec
from pocketvlm.distill.answers import slug
from pocketvlm.distill.labels import task_classes, task_labels
from pocketvlm.distill.made_cache import MANIFEST, MadeCaches, features_read
from pocketvlm.distill.plan_table import size
from pocketvlm.distill.prepare import wants_texts
from pocketvlm.distill.progress import Reporter, Stages
from pocketvlm.distill.questions import only_labels
from pocketvlm.distill.recipe import Recipe
from pocketvlm.distill.run_folder import differences
from pocketvlm.distill.stream_feed import probe, samples_of_shard
from pocketvlm.distill.student_teacher import open_teachers
from pocketvlm.distill.taps import asked_taps
from pocketvlm.distill.text_pool import asked_logits, english_of, text_pool, with_parallel
from pocketvlm.edge.errors import IntegrityError, UsageError, counted
from pocketvlm.teachers.base import TextTeacher
from pocketvlm.teachers.cache_build import CacheBuild
from pocketvlm.teachers.cache_format import DTYPES, SCHEMA_VERSION, save_json
from pocketvlm.teachers.precomputed import PrecomputedTeacher
from pocketvlm.teachers.tokens import token_shape

# what of a recipe decides the contents of its caches
_DECIDING = ("data", "views", "teacher", "task")


@dataclass(frozen=True)
class Share:
    """This process among those that make one folder."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_environment(cls) -> Share:
        """From RANK and WORLD_SIZE; alone where they are not set.

        Raises:
            UsageError: they are no ranks.
        """
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
            raise UsageError(
                f"RANK is {rank!r} and WORLD_SIZE {world!r}, by which no share of the shards is this process's; start "
                "it by torchrun, or unset both"
            )
        return cls(int(rank), int(world))


def cache_teacher(
    recipe: Recipe,
    out: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    shard_size: int = 512,
    by_shard: bool = False,
    share: Share = Share(),
    report: Reporter | None = None,
) -> bool:
    """Make the caches that the recipe's run will read, or this process's share of them; True when they are finished.

    The pooled features and token maps are kept where an objective of the recipe reads them, and the largest logits over
    the texts of `teacher.logits`. by_shard: one shard for
    each tar of `data.train`, opened when its turn comes, with its captions in it (always so with `data.stream`); the
    texts that the recipe names besides (words, class prompts, parallel texts) lie in shards of their own.

    Raises:
        UsageError: a recipe without a teacher that could be asked, or data that is not in shards.
        IntegrityError: `out` was begun with something else. CacheWriteError: a full disk; what was made is kept.
    """
    out, report = Path(out), report or Reporter()
    by_shard = by_shard or recipe.data.stream is not None
    if recipe.teacher is None:
        raise UsageError(f"recipe {recipe.name!r} has no teacher, so there is nothing to keep; add 'teacher'")
    samples, texts = ([], _other_texts(recipe)) if by_shard else _inputs(recipe, report)
    shards = _tars(recipe) if by_shard else None
    logits = asked_logits(recipe)
    teachers, _ = open_teachers(recipe, report)
    tokens, builds = bool(asked_taps(recipe).teacher), []
    for place, teacher in enumerate(teachers):
        if isinstance(teacher, PrecomputedTeacher):
            raise UsageError(
                f"teacher {teacher.name!r} is a cache already and sees no pictures; name it in the recipe as it is"
            )
        blind = isinstance(teacher, TextTeacher)
        grid = token_shape(teacher, recipe.teacher.token_grid)[0] if tokens and not blind else 0
        builds.append(
            CacheBuild(
                teacher,
                () if blind else samples,
                texts,
                out / f"{place}-{slug(teacher.name)}",
                views=1 if blind else recipe.views.count,
                policy=AugmentPolicy.from_dict(recipe.views.policy),
                seed=recipe.views.seed,
                dtype=dtype,
                batch_size=recipe.teacher.batch_size,
                shard_size=shard_size,
                token_grid=grid,
                features=bool(features_read(recipe)),
                on_bad_sample=recipe.data.on_bad_sample,
                data_shards=shards,
                logits=None if blind else logits,
            )
        )
    _tell_cost(builds, out, report, shards)
    _write_manifest(recipe, out, builds)
    finished = True
    for build in builds:
        with Stages(report, f"teacher: {build.teacher.name}") as progress:
            cache = build.run(progress, rank=share.rank, world=share.world)
        finished = finished and cache is not None
        if cache is not None and cache.skipped:
            gone = counted(len(cache.skipped), "picture")
            report.line(f"left out by {build.teacher.name}: {gone} that cannot be decoded")
    return finished


def _inputs(recipe: Recipe, report: Reporter) -> tuple[Sequence[Sample], list[str]]:
    """Pictures, and all texts that a run may ask its teacher about: those that its student cannot read among them."""
    with Stages(report, "data") as progress:
        bad = recipe.data.on_bad_sample
        source = open_data(recipe.data.train, on_bad_sample=bad, progress=progress)
        held_out = open_data(recipe.data.eval, on_bad_sample=bad, progress=progress) if recipe.data.eval else None
    source = source.weighed(recipe.data.caption_weights)
    classes = task_classes(recipe, source.samples, source.name, source.templates or recipe.eval.templates)
    if classes is not None and held_out is not None:
        held_out = only_labels(held_out)
    prompts: list[str] = []
    if classes is not None and recipe.task is not None:
        rows = task_labels(classes, source.samples, recipe.task.validation).prompts
        prompts = [text for row in rows for text in row]
    known = english_of(recipe, source.samples)
    captions = [known.get(c.text, c.text) for sample in source.samples for c in sample.captions]
    pool: list[str] = []
    if wants_texts(recipe):
        pool = text_pool(recipe, source, held_out, classes)
        if recipe.data.parallel is not None:
            _, pool = with_parallel(recipe, source, held_out, pool)
    return source.samples, list(dict.fromkeys([*prompts, *captions, *pool]))


def _tars(recipe: Recipe) -> dict[str, Callable[[], Sequence[Sample]]]:
    if recipe.data.stream is not None:
        return {
            shard.name: partial(samples_of_shard, recipe, shard) for shard in list_shards(recipe.data.stream.shards)
        }
    spec = parse_spec(recipe.data.train)
    if spec.kind != "wds" or any(key in spec.options for key in ("pool", "limit", "shots")):
        raise UsageError(
            f"data.train is {recipe.data.train!r} and a cache by shards reads whole tars, so there is no shard to name "
            "it by; give shards such as 'wds:shards/{000..003}.tar' without pool, limit and shots, or leave out "
            "--by-shard"
        )
    # named as the beginning of their samples' uids
    names = {tar: f"{tar.absolute().parent.name}/{tar.stem}" for tar in find_shards(spec.path)}
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        raise UsageError(
            f"two shards are called {twice[0]!r}, so uids would occur twice; give every shard a name of its own"
        )
    return {name: partial(_read_tar, tar, recipe.data.on_bad_sample, spec.options) for tar, name in names.items()}


def _read_tar(tar: Path, on_bad_sample: str, options: Mapping[str, str]) -> Sequence[Sample]:
    collector = Collector(
        tar.absolute().parent.name,
        BadSampleReport(on_bad_sample),
        check=check_mode(options.get("check", "quick")),
        language=options.get("caption_language", "en"),
    )
    read_webdataset([tar], collector)
    return collector.samples


def _other_texts(recipe: Recipe) -> list[str]:
    """What a run over shards asks its teacher besides their captions."""
    if recipe.data.parallel is not None or recipe.task is not None:
        raise UsageError(
            "a cache by shards was asked for with data.parallel or a task, which need all captions and labels at once; "
            "leave out --by-shard"
        )
    if recipe.data.stream is not None and wants_texts(recipe):
        held_out = open_data(recipe.data.eval) if recipe.data.eval else None
        return text_pool(recipe, probe(recipe, list_shards(recipe.data.stream.shards)), held_out)
    words = recipe.data.words
    if words is None or not wants_texts(recipe):
        return []
    from pocketvlm.data.wordlist import word_list

    withheld = set(open_data(recipe.data.eval).captions()) if recipe.data.eval else set()
    for spec in words.exclude:
        withheld |= set(open_data(spec).captions())
    return list(word_list(words.name, size=words.size, exclude=withheld))


def _tell_cost(builds: Sequence[CacheBuild], out: Path, report: Reporter, shards: Any) -> None:
    total = 0
    for build in builds:
        cost, info = build.cost(), build.info
        parts = [f"{info.dim} numbers"]
        parts += [f"{info.feature_dim} of features"] if info.feature_dim else []
        parts += [f"{info.token_grid} x {info.token_grid} x {info.token_dim} of tokens"] if info.token_grid else []
        parts += [f"the {info.top_logits} largest logits of {info.logit_count:,} texts"] if info.top_logits else []
        what = f"teacher {build.teacher.name}: {cost.view:,} bytes a view ({', '.join(parts)} in {info.dtype})"
        if shards and isinstance(build.teacher, TextTeacher):
            each = info.dim + info.text_feature_dim
            what = (
                f"teacher {build.teacher.name}: {each * DTYPES[info.dtype].itemsize:,} bytes a caption ({each} numbers "
            )
            what += f"in {info.dtype}) and its text, of all captions of {counted(len(shards), 'data shard')}"
        elif shards:
            what += f" x {counted(info.views, 'view')} of every picture of {counted(len(shards), 'data shard')}"
            what += ", and their captions"
        elif build.samples:
            what += f" x {counted(cost.pictures, 'picture')} x {counted(info.views, 'view')} = "
            what += f"{size(cost.images)} with their names"
        # of shards the captions are not known yet, and often there is no other text
        texts = f"; {counted(cost.texts, 'text')} {size(cost.words)}" if cost.texts or not shards else ""
        report.line(what + texts)
        total += cost.total
    if shards:
        known = f"{counted(len(shards), 'shard')}, how many is not known yet, in {out}"
        report.line(f"in all so much for each picture of the {known}")
    else:
        report.line(f"in all {size(total)} in {out}")


def _write_manifest(recipe: Recipe, out: Path, builds: Sequence[CacheBuild]) -> None:
    rows = []
    assert recipe.teacher is not None, "checked at the beginning"
    for spec, build in zip(recipe.teacher.specs, builds):
        teacher = build.teacher
        rows.append(
            {"spec": spec, "name": teacher.name, "fingerprint": teacher.fingerprint, "folder": build.folder.name}
        )
    value: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "teacher-caches",
        "made_by": f"pocketvlm {metadata.version('pocketvlm')}",
        "recipe": recipe.to_dict(),
        "teachers": rows,
    }
    found = MadeCaches.find(out)
    if found is None:
        save_json(out / MANIFEST, value)
        return
    before = {key: (found.recipe or {}).get(key) for key in _DECIDING}
    asked = {key: value["recipe"][key] for key in _DECIDING}
    for part in (before["teacher"], asked["teacher"]):
        # neither decides what the teacher says
        for key in ("cache", "cache_dtype", "smooth", "caption_mix", "axes", "allow_download", "trust_remote_code"):
            (part or {}).pop(key, None)
    if differ := sorted(differences(before, asked)):
        raise IntegrityError(
            f"{out} was begun by `pocketvlm cache-teacher` with another recipe (differs in {', '.join(differ)}), so "
            "its caches would mix two; name another folder, or delete this one"
        )
