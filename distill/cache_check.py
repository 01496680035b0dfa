"""`pocketvlm cache show` and `cache verify`: what a folder of teacher outputs holds, and if its teacher says so."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketvlm.data import open_data
from pocketvlm.data.augment import apply_view
from pocketvlm.data.sample import Sample
from pocketvlm.data.shards import list_shards
from pocketvlm.distill.made_cache import MadeCaches, check_logits
from pocketvlm.distill.plan_table import size
from pocketvlm.distill.progress import Reporter, Stages
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.student_teacher import open_teacher
from pocketvlm.distill.text_pool import asked_logits
from pocketvlm.edge.errors import IntegrityError, UsageError, counted
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.teachers.base import Teacher, TeacherOutput, TokenTeacher
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import refuse_difference
from pocketvlm.teachers.tokens import on_grid
from pocketvlm.teachers.top_logits import agreement, log_shares, text_rows

# bfloat16 keeps 8 bits: a vector rounded to it has a cosine of 0.999998 or more to itself, so that what falls below
# this is another answer and no rounding (tests/distill/test_cache_teacher.py measures it)
LEAST_COSINE = 0.9999
_BATCH = 32


@dataclass(frozen=True)
class Compared:
    """One kind of output ("image", "features", "tokens", "logits", "text", "text_features") of one cache against its
    teacher.

    cosine: the lowest; of logits, between the square roots of the shares. worst: its uid and view, or text.
    """

    teacher: str
    what: str
    rows: int
    cosine: float
    worst: str

    @property
    def holds(self) -> bool:
        return self.cosine >= LEAST_COSINE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {"output": self.what, "rows": self.rows, "least_cosine": round(self.cosine, 7), "worst": self.worst}
        return {"teacher": self.teacher, **values, "verdict": "holds" if self.holds else f"below {LEAST_COSINE}"}


def verify(
    folder: str | Path,
    *,
    samples: int = 64,
    seed: int = 0,
    recipe: Recipe | None = None,
    device: str = "auto",
    allow_download: bool = False,
    trust_remote_code: bool = False,
    report: Reporter | None = None,
) -> list[Compared]:
    """Hash every shard; then ask the teachers again about `samples` pictures, one view of each, and as many texts.

    Which ones is drawn by `seed`; a view is drawn by the parameters that lie beside it. Teachers and data are those
    that the folder names, or those of `recipe`.

    Raises:
        IntegrityError: a shard's bytes differ, the teacher is another one, or a picture is gone or has other bytes.
        UsageError: no finished cache there, or one that names no data and no recipe was given.
    """
    report, made = report or Reporter(), MadeCaches.need(folder)
    caches = [TeacherCache.open(made.path(member)) for member in made.members]
    for cache in caches:
        report.line(f"{cache.folder}: {size(cache.check())} hash to what cache.json says")
    if recipe is None and made.recipe is None:
        raise UsageError(
            f"{folder} does not say from which data it was made, so nothing can be computed again; name the recipe by "
            "--recipe"
        )
    recipe = recipe or load_recipe(made.recipe or {})
    if recipe.teacher is None or len(recipe.teacher.specs) != len(caches):
        raise UsageError(
            f"the recipe names {len(recipe.teacher.specs) if recipe.teacher else 0} teacher(s) and {folder} holds the "
            f"outputs of {len(caches)}; give the recipe that it was made with"
        )
    drawn = [np.random.default_rng(seed) for _ in caches]
    asked = [_some(cache.uids, samples, rng) for cache, rng in zip(caches, drawn)]
    by_uid = _samples(recipe, {uid for uids in asked for uid in uids}, report)
    found: list[Compared] = []
    for cache, spec, uids, rng in zip(caches, recipe.teacher.specs, asked, drawn):
        with Stages(report, "teacher") as progress:
            teacher = open_teacher(
                spec, device=device, allow_download=allow_download, trust_remote_code=trust_remote_code,
                progress=progress,
            )  # fmt: skip
        wanted: dict[str, Any] = {"fingerprint": teacher.fingerprint}
        if len(cache):
            wanted["image"] = json.loads(json.dumps(dataclasses.asdict(teacher.image)))
        refuse_difference(cache.folder, cache.info.to_dict(), wanted)
        logits = asked_logits(recipe) if cache.info.top_logits else None
        check_logits(cache, logits)
        anchors = None if logits is None else text_rows(teacher, logits.texts)
        found += _pictures(cache, teacher, by_uid, uids, rng, anchors)
        found += _texts(cache, teacher, _some(cache.texts, samples, rng))
    return found


def show(folder: str | Path) -> list[dict[str, Any]]:
    """One row for each cache in the folder; an unfinished one says so.

    Raises:
        UsageError: no cache there.
    """
    made = MadeCaches.need(folder)
    return [_row(made, member) for member in made.members]


def _row(made: MadeCaches, member: dict[str, str]) -> dict[str, Any]:
    path = made.path(member)
    data = {"data": _data(made.recipe), "views": made.recipe["views"]} if made.recipe is not None else {}
    try:
        cache = TeacherCache.open(path)
    except UsageError:
        there = sum(1 for _ in path.glob("*.safetensors"))
        return {
            "folder": member["folder"],
            "teacher": member["name"],
            "state": f"unfinished, {counted(there, 'shard')}",
            **data,
        }
    info = cache.info
    images = sum((path / file).stat().st_size for file in cache.files)
    texts = sum((path / file).stat().st_size for file in cache.text_files if file not in cache.files)
    views = len(cache) * info.views
    return {
        "folder": member["folder"],
        "teacher": info.name,
        "state": "finished",
        "fingerprint": info.fingerprint,
        "pictures": len(cache),
        "views": info.views,
        "seed": info.seed,
        "policy": info.policy,
        "texts": len(cache.texts),
        "dtype": info.dtype,
        "numbers": {"embedding": info.dim, "features": info.feature_dim, "tokens": info.token_grid**2 * info.token_dim},
        **({"logits": f"the {info.top_logits} largest over {info.logit_count:,} texts"} if info.top_logits else {}),
        "shards": len(cache.files) + sum(file not in cache.files for file in cache.text_files),
        "megabytes": round((images + texts) / 1e6, 3),
        # whole shards: with names, hashes, and of a cache by shards the captions that lie there
        **({"bytes_per_view": round(images / views, 1)} if views else {}),
        **({"bytes_per_text": round(texts / len(cache.texts), 1)} if texts else {}),
        "skipped": dict(Counter(cache.skipped.values())),
        "data": _data(made.recipe) if made.recipe is not None else None,
        "licences": [list(row) for row in info.licences],
    }


def _data(recipe: dict[str, Any]) -> Any:
    stream = recipe["data"].get("stream")
    return recipe["data"].get("train") if stream is None else stream["shards"]


def _samples(recipe: Recipe, uids: set[str], report: Reporter) -> dict[str, Sample]:
    """The pictures of these uids; of a stream only the shards that they lie in are read."""
    if recipe.data.stream is not None:
        from pocketvlm.distill.stream_feed import samples_of_shard

        shards = [
            s for s in list_shards(recipe.data.stream.shards) if any(uid.startswith(f"{s.name}/") for uid in uids)
        ]
        rows = (sample for shard in shards for sample in samples_of_shard(recipe, shard))
        return {sample.uid: sample for sample in rows if sample.uid in uids}
    with Stages(report, "data") as progress:
        source = open_data(recipe.data.train, on_bad_sample=recipe.data.on_bad_sample, progress=progress)
    return {sample.uid: sample for sample in source if sample.uid in uids}


def _some(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    chosen = sorted(rng.permutation(len(names))[:count].tolist())
    return [names[place] for place in chosen]


def _pictures(
    cache: TeacherCache,
    teacher: Teacher,
    by_uid: dict[str, Sample],
    uids: Sequence[str],
    rng: np.random.Generator,
    anchors: Tensor | None,
) -> Iterator[Compared]:
    absent = [uid for uid in uids if uid not in by_uid]
    if absent:
        raise IntegrityError(
            f"{len(absent)} of {len(uids)} pictures drawn from the cache {cache.folder} are not in the data (first "
            f"{absent[0]!r}), so it was made from other data; give the recipe that it was made with"
        )
    if changed := cache.changed([by_uid[uid] for uid in uids]):
        raise IntegrityError(
            f"picture {changed[0]!r} and {len(changed) - 1} others of {len(uids)} have other bytes than when the cache "
            f"{cache.folder} was made, so their teacher would say something else; make the cache anew"
        )
    views = [int(rng.integers(cache.info.views)) for _ in uids]
    told: dict[str, list[Tensor]] = {}
    names = [f"{uid} view {view}" for uid, view in zip(uids, views)]
    for start in range(0, len(uids), _BATCH):
        part = zip(uids[start : start + _BATCH], views[start : start + _BATCH])
        pixels = np.stack([_shown(cache, teacher, by_uid[uid], view) for uid, view in part])
        for what, rows in _answers(cache, teacher, torch.from_numpy(pixels), anchors).items():
            told.setdefault(what, []).append(rows)
    for what, parts in told.items():
        if what == "logits":
            yield _least(cache, what, agreement(*cache.logits(uids, views), torch.cat(parts)), names)
        else:
            yield _compared(cache, what, torch.cat(parts), getattr(cache, what)(uids, views), names)


def _shown(cache: TeacherCache, teacher: Teacher, sample: Sample, view: int) -> np.ndarray:
    spec, params = teacher.image, cache.view(sample.uid, view)
    pixels = decode_image(sample.image.read(), background=spec.background)
    if params.identity:
        return resize_image(pixels, spec)
    return apply_view(pixels, params, spec.size, spec.background)


def _answers(cache: TeacherCache, teacher: Teacher, pixels: Tensor, anchors: Tensor | None) -> dict[str, Tensor]:
    info, found = cache.info, {}
    if info.token_grid:
        assert isinstance(teacher, TokenTeacher), "the fingerprint is that of the teacher that gave tokens"
        output: TeacherOutput = teacher.encode_image_tokens(pixels)
        found["tokens"] = on_grid(output.taps["tokens"].float(), info.token_grid)
    else:
        output = teacher.encode_images(pixels)
    if info.feature_dim and output.features is not None:
        found["features"] = output.features
    if anchors is not None:
        found["logits"] = log_shares(output.embedding, anchors, teacher.logit_scale).cpu()
    return {"image": output.embedding, **found}


def _texts(cache: TeacherCache, teacher: Teacher, texts: Sequence[str]) -> Iterator[Compared]:
    if not texts:
        return
    output = teacher.encode_texts(texts)
    yield _compared(cache, "text", output.embedding, cache.text(texts), [repr(text) for text in texts])
    if cache.info.text_feature_dim and output.features is not None:
        kept = cache.text_features(texts)
        yield _compared(cache, "text_features", output.features, kept, [repr(text) for text in texts])


def _compared(cache: TeacherCache, what: str, told: Tensor, kept: Tensor, names: Sequence[str]) -> Compared:
    cosine = torch.cosine_similarity(told.double().cpu().flatten(1), kept.double().flatten(1), dim=1)
    return _least(cache, what, cosine, names)


def _least(cache: TeacherCache, what: str, cosine: Tensor, names: Sequence[str]) -> Compared:
    lowest = int(cosine.argmin())
    return Compared(cache.info.name, what, len(names), float(cosine[lowest]), names[lowest])
