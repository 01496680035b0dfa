"""The teacher cache: a teacher's outputs on disk, so that a student never waits for its teacher.

A folder holds `cache.json` (who made it, from what, and the sha256 of every other file) and shards in the
safetensors format:

    shard-00000.safetensors   image [n, K, D], features [n, K, F] (if the teacher has them),
                              tokens [n, K, G G, W] (if asked for: the last image tokens on a grid of G x G places)
    text-00000.safetensors    text [m, D], features [m, G] (if the teacher has them)

Row order is in each shard's own metadata (uids or texts), so a shard explains itself. K counts the replayable
views of an image (`data.augment`); view 0 is the teacher's plain preprocessing. Precomputed embeddings are this
format with one view. `cache.json` is written last: a folder without it is an unfinished build, which
`build_cache` continues; the finished files are the same bytes as those of an uninterrupted build.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from pocketvlm.data.augment import VIEW_VERSION, AugmentPolicy, apply_view, view_params
from pocketvlm.data.sample import Sample
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError
from pocketvlm.edge.preprocess import decode_image, resize_image
from pocketvlm.teachers.base import Teacher, TeacherOutput, TextTeacher, TokenTeacher
from pocketvlm.teachers.cache_format import (
    DTYPES,
    SCHEMA_VERSION,
    CacheInfo,
    check_shard,
    check_version,
    digest_names,
    read_meta,
    refuse_difference,
    write_manifest,
    write_shard,
)
from pocketvlm.teachers.files import Progress, sha256_file, write_json
from pocketvlm.teachers.tokens import gray, on_grid, token_shape


class TeacherCache:
    """A finished cache, read lazily: shards are mapped into memory on first use.

    Every reader raises IntegrityError where a row that is asked for is not finite, and names its picture or text.

    info: what it was made from. uids: images in storage order. texts: texts in storage order.
    skipped: uid to reason, for images that could not be decoded when the cache was built.
    """

    def __init__(self, folder: Path, info: CacheInfo, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.info = info
        self.skipped: dict[str, str] = manifest["skipped"]
        self._files = [row["file"] for row in manifest["shards"]]
        self._text_files = [row["file"] for row in manifest["text_shards"]]
        self._open: dict[str, dict[str, Tensor]] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        self._bytes: dict[str, str] = {}
        self._text_rows: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(self._files):
            meta = read_meta(folder / file)
            self._rows.update({uid: (number, row) for row, uid in enumerate(meta["uids"])})
            self._bytes.update(zip(meta["uids"], meta["bytes_sha256"]))
        for number, file in enumerate(self._text_files):
            self._text_rows.update({t: (number, row) for row, t in enumerate(read_meta(folder / file)["texts"])})
        self.uids = tuple(self._rows)
        self.texts = tuple(self._text_rows)

    @classmethod
    def open(
        cls, folder: str | Path, *, expect_fingerprint: str | None = None, verify: bool = True, **expect: Any
    ) -> TeacherCache:
        """Open a finished cache.

        expect_fingerprint: the teacher's fingerprint. expect: further `CacheInfo` fields that must match
        (`views=4, seed=0, policy={...}`). verify: hash every shard (reads the whole cache once).

        Raises:
            UsageError: no cache there, or an unfinished one. VersionError: written under another schema.
            IntegrityError: a shard's bytes differ, or an expected field does; the message names it.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            state = "holds an unfinished build" if (folder / "build.json").exists() else "is not a teacher cache"
            raise UsageError(f"{folder} {state} (no cache.json); finish it with `build_cache` before reading") from None
        except json.JSONDecodeError as error:
            raise IntegrityError(f"{folder}/cache.json is not JSON ({error}); delete the folder, rebuild it") from error
        check_version(folder, manifest)
        if verify:
            for row in [*manifest["shards"], *manifest["text_shards"]]:
                check_shard(folder / row["file"], row["sha256"])
        info = CacheInfo.from_dict(manifest["info"])
        if expect_fingerprint is not None:
            expect = {"fingerprint": expect_fingerprint, **expect}
        refuse_difference(folder, info.to_dict(), json.loads(json.dumps(expect)))
        return cls(folder, info, manifest)

    def image(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, D] float32 image embeddings, L2-normalised; one view number for all, or one per uid."""
        return self._gather("image", uids, views)

    def features(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, F] float32 pooled image features before the joint projection.

        Raises:
            UsageError: the teacher has no such features.
        """
        if not self.info.feature_dim:
            raise UsageError(
                f"teacher {self.info.name!r} gave no pooled features, so {self.folder} holds none; "
                "leave feature objectives out of the recipe or use another teacher"
            )
        return self._gather("features", uids, views)

    def tokens(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> Tensor:
        """[B, G G, W] float32 image tokens, row by row of the grid, not normalised.

        Raises:
            UsageError: none are kept here.
        """
        if not self.info.token_grid:
            raise UsageError(
                f"{self.folder} keeps embeddings of {self.info.name!r} and no token maps; leave objectives on token "
                "maps out of the recipe, or build a cache with tokens"
            )
        return self._gather("tokens", uids, views)

    def text(self, texts: Sequence[str]) -> Tensor:
        """[M, D] float32 text embeddings, L2-normalised, looked up by the exact string."""
        return self._gather_text("text", texts)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """[M, G] float32 pooled text features before the joint projection."""
        if not self.info.text_feature_dim:
            raise UsageError(
                f"teacher {self.info.name!r} gave no pooled text features, so {self.folder} holds none; "
                "leave feature objectives out of the recipe or use another teacher"
            )
        return self._gather_text("features", texts)

    def changed(self, samples: Sequence[Sample]) -> list[str]:
        """uids whose encoded image bytes are no longer those that the cache was made from (reads all images)."""
        return [
            s.uid
            for s in samples
            if self._bytes.get(s.uid) and hashlib.sha256(s.image.read()).hexdigest() != self._bytes[s.uid]
        ]

    def load(self) -> TeacherCache:
        """Read every shard now, so that the cache can be pickled and used where its folder is not."""
        for file in (*self._files, *self._text_files):
            self._shard(file)
        return self

    def __contains__(self, uid: str) -> bool:
        return uid in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def _gather(self, key: str, uids: Sequence[str], views: int | Sequence[int]) -> Tensor:
        wanted = [views] * len(uids) if isinstance(views, int) else list(views)
        if len(wanted) != len(uids):
            raise UsageError(f"{len(uids)} uids came with {len(wanted)} view numbers; give one view, or one per uid")
        if wanted and not (min(wanted) >= 0 and max(wanted) < self.info.views):
            raise UsageError(
                f"view {max(wanted, key=abs)} was asked for, but {self.folder} holds views 0 to {self.info.views - 1}; "
                "rebuild the cache with more views or draw fewer"
            )
        rows = []
        for uid, view in zip(uids, wanted):
            if uid not in self._rows:
                raise UsageError(_absent(f"image {uid!r}", self.folder, len(self._rows), self.skipped.get(uid)))
            shard, row = self._rows[uid]
            rows.append(self._shard(self._files[shard])[key][row, view])
        info = self.info
        empty = {"image": (info.dim,), "features": (info.feature_dim,), "tokens": (info.token_grid**2, info.token_dim)}
        return _finite(torch.stack(rows).float(), uids) if rows else torch.zeros(0, *empty[key])

    def _gather_text(self, key: str, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            if text not in self._text_rows:
                raise UsageError(_absent(f"text {text!r}", self.folder, len(self._text_rows), None))
            shard, row = self._text_rows[text]
            rows.append(self._shard(self._text_files[shard])[key][row])
        width = self.info.dim if key == "text" else self.info.text_feature_dim
        return _finite(torch.stack(rows).float(), texts) if rows else torch.zeros(0, width)

    def _shard(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            with safe_open(self.folder / file, framework="pt") as handle:
                self._open[file] = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        return self._open[file]


def build_cache(
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
    on_bad_sample: Literal["refuse", "skip"] = "refuse",
    progress: Progress | None = None,
) -> TeacherCache:
    """Run `teacher` over every view of every image and every distinct text, once, into `folder`.

    views: K; view 0 is plain preprocessing, views 1..K-1 are drawn by `data.augment.view_params(uid, view, seed,
    policy)`, so a student can replay them at its own size. dtype: storage only; the teacher computes in float32.
    token_grid: keep the last image tokens too, averaged to this many places in a row (0: none; see `token_bytes`).
    on_bad_sample: "skip" leaves undecodable images out and lists them in `TeacherCache.skipped`.
    progress: called as (done, total, "teacher images" | "teacher texts").

    A finished cache of the same teacher and inputs is opened and returned; an unfinished one is continued.

    Raises:
        UsageError: nothing to cache, a duplicate uid, more views without a policy, or tokens that the teacher lacks.
        IntegrityError: `folder` was begun with something else; the message names what differs.
        BadSampleError: an image cannot be decoded and `on_bad_sample` is "refuse".
    """
    folder = Path(folder)
    texts = list(dict.fromkeys(texts))
    uids = [s.uid for s in samples]
    _check_request(uids, texts, views, policy, dtype)
    # one view needs no policy, and two caches of plain pictures are the same cache
    policy = policy if views > 1 else None
    info = _describe(
        teacher, samples, texts, views=views, policy=policy, seed=seed, dtype=dtype, size=shard_size, grid=token_grid
    )
    if (folder / "cache.json").exists():
        cache = TeacherCache.open(folder, verify=True)
        refuse_difference(folder, cache.info.to_dict(), info.to_dict())
        return cache
    plan = {"schema_version": SCHEMA_VERSION, "info": info.to_dict(), "batch_size": batch_size}
    # another process that builds the same cache removes the file when it is done
    with contextlib.suppress(FileNotFoundError):
        started = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        check_version(folder, started)
        refuse_difference(
            folder,
            {**CacheInfo.from_dict(started["info"]).to_dict(), "batch_size": started["batch_size"]},
            {**info.to_dict(), "batch_size": batch_size},
        )
    write_json(folder / "build.json", plan)

    report = progress or (lambda done, total, what: None)
    skipped: dict[str, str] = {}
    shards, text_shards = [], []
    for number, start in enumerate(range(0, len(samples), shard_size)):
        path = folder / f"shard-{number:05d}.safetensors"
        part = samples[start : start + shard_size]
        tell = _offset(report, "teacher images", start, len(samples))
        if not _complete(path, "uids", [s.uid for s in part]):
            _write_image_shard(teacher, part, path, info, policy, batch_size, on_bad_sample, tell)
        tell(len(part))
        meta = read_meta(path)
        skipped |= meta["skipped"]
        shards.append({"file": path.name, "sha256": sha256_file(path), "count": len(meta["uids"])})
    text_size = max(shard_size, 4096)
    for number, start in enumerate(range(0, len(texts), text_size)):
        path = folder / f"text-{number:05d}.safetensors"
        block = texts[start : start + text_size]
        tell = _offset(report, "teacher texts", start, len(texts))
        if not _complete(path, "texts", block):
            _write_text_shard(teacher, block, path, info, batch_size, tell)
        tell(len(block))
        text_shards.append({"file": path.name, "sha256": sha256_file(path), "count": len(block)})
    write_manifest(folder, info, shards=shards, text_shards=text_shards, skipped=skipped)
    (folder / "build.json").unlink(missing_ok=True)
    return TeacherCache.open(folder, verify=False)


def _check_request(uids: list[str], texts: list[str], views: int, policy: AugmentPolicy | None, dtype: str) -> None:
    if not uids and not texts:
        raise UsageError("a teacher cache of no images and no texts was asked for; give at least one of them")
    if len(set(uids)) != len(uids):
        twice = next(u for u in uids if uids.count(u) > 1)
        raise UsageError(f"uid {twice!r} occurs more than once, so one image would overwrite another; make uids unique")
    if views < 1 or (views > 1 and policy is None):
        raise UsageError(
            f"views={views} with policy={policy!r} cannot be drawn; use views=1, or give an AugmentPolicy too"
        )
    if dtype not in DTYPES:
        raise UsageError(f"cache dtype {dtype!r} is not one of {sorted(DTYPES)}; bfloat16 halves the disk space")


def _describe(
    teacher: Teacher,
    samples: Sequence[Sample],
    texts: Sequence[str],
    *,
    views: int,
    policy: AugmentPolicy | None,
    seed: int,
    dtype: Literal["float32", "bfloat16"],
    size: int,
    grid: int,
) -> CacheInfo:
    # widths are asked of the teacher itself, on one gray picture and one word
    blind = isinstance(teacher, TextTeacher) and not samples
    image = TeacherOutput(torch.zeros(1, teacher.dim)) if blind else teacher.encode_images(gray(teacher))
    token_dim = token_shape(teacher, grid)[1] if grid else 0
    text = teacher.encode_texts(["a"]) if texts else None
    if image.embedding.shape[-1] != teacher.dim or (text is not None and text.embedding.shape[-1] != teacher.dim):
        widths = [image.embedding.shape[-1], text.embedding.shape[-1] if text is not None else teacher.dim]
        raise UsageError(
            f"teacher {teacher.name!r} says dim {teacher.dim} but gives image and text widths {widths}; "
            "cosines between them would be meaningless, so fix the teacher's projection"
        )
    info = CacheInfo(
        name=teacher.name,
        fingerprint=teacher.fingerprint,
        space_id=teacher.space_id,
        dim=teacher.dim,
        feature_dim=0 if image.features is None else image.features.shape[-1],
        text_feature_dim=0 if text is None or text.features is None else text.features.shape[-1],
        logit_scale=teacher.logit_scale,
        logit_bias=teacher.logit_bias,
        image=teacher.image,
        views=views,
        policy=None if policy is None else {**policy.to_dict(), "view_version": VIEW_VERSION},
        seed=seed,
        dtype=dtype,
        shard_size=size,
        samples=digest_names([s.uid for s in samples]),
        texts=digest_names(texts),
        licences=teacher.licences,
        token_grid=grid,
        token_dim=token_dim,
    )
    return info


def _write_image_shard(
    teacher: Teacher,
    part: Sequence[Sample],
    path: Path,
    info: CacheInfo,
    policy: AugmentPolicy | None,
    batch_size: int,
    on_bad_sample: str,
    tell: Callable[[int], None],
) -> None:
    rows: list[TeacherOutput] = []
    kept: list[str] = []
    hashes: list[str] = []
    skipped: dict[str, str] = {}
    # whole images per batch, so that a batch holds at most about batch_size pictures
    step = max(1, batch_size // info.views)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for start in range(0, len(part), step):
            group = part[start : start + step]
            loaded = list(pool.map(lambda s: _load_views(s, teacher.image, info, policy), group))
            good = []
            for sample, item in zip(group, loaded):
                if isinstance(item, BadSampleError):
                    if on_bad_sample == "refuse":
                        raise item
                    skipped[sample.uid] = item.reason
                    continue
                good.append(item[0])
                kept.append(sample.uid)
                hashes.append(item[1])
            if good:
                pixels = torch.from_numpy(np.concatenate(good))
                rows.append(_encoded(teacher, pixels, info))
            tell(start + len(group))
    tensors = _stack(rows, info, "image", info.dim, info.feature_dim)
    tensors = {key: value.view(len(kept), info.views, *value.shape[1:]) for key, value in tensors.items()}
    write_shard(path, tensors, {"uids": kept, "bytes_sha256": hashes, "skipped": skipped})


def _write_text_shard(
    teacher: Teacher, block: Sequence[str], path: Path, info: CacheInfo, batch_size: int, tell: Callable[[int], None]
) -> None:
    rows = []
    step = batch_size * 8
    for start in range(0, len(block), step):
        rows.append(_to_cpu(teacher.encode_texts(block[start : start + step]), teacher.name))
        tell(min(start + step, len(block)))
    write_shard(path, _stack(rows, info, "text", info.dim, info.text_feature_dim), {"texts": list(block)})


def _load_views(
    sample: Sample, spec: ImageSpec, info: CacheInfo, policy: AugmentPolicy | None
) -> tuple[np.ndarray, str] | BadSampleError:
    """([K, S, S, 3] uint8, sha256 of the encoded bytes), or the error, which the caller counts in order."""
    try:
        data = sample.image.read()
        pixels = decode_image(data, background=spec.background)
        stack = [resize_image(pixels, spec)]
        if policy is not None:
            for view in range(1, info.views):
                params = view_params(sample.uid, view, info.seed, policy)
                stack.append(apply_view(pixels, params, spec.size, spec.background))
    except BadSampleError as error:
        return error
    return np.stack(stack), hashlib.sha256(data).hexdigest()


def _encoded(teacher: Teacher, pixels: Tensor, info: CacheInfo) -> TeacherOutput:
    if not info.token_grid:
        return _to_cpu(teacher.encode_images(pixels), teacher.name)
    assert isinstance(teacher, TokenTeacher), "token_shape asked before"
    output = teacher.encode_image_tokens(pixels)
    # at once in the stored form: a shard's maps in full would be the largest thing in memory
    tokens = on_grid(output.taps["tokens"].float(), info.token_grid).to(DTYPES[info.dtype])
    return _to_cpu(TeacherOutput(output.embedding, output.features, {"tokens": tokens}), teacher.name)


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
    return {k: v.to(dtype) for k, v in out.items()}


def _complete(path: Path, key: str, expected: list[str]) -> bool:
    """Whether an earlier run finished this shard (shards are written atomically, so existing means whole)."""
    if not path.exists():
        return False
    try:
        meta = read_meta(path)
    except IntegrityError:
        return False
    names = set(meta[key]) | set(meta.get("skipped", {}))
    return [n for n in expected if n in names] == expected and len(names) == len(expected)


def _finite(rows: Tensor, names: Sequence[str]) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        bad = names[int((~torch.isfinite(rows.flatten(1)).all(dim=1)).nonzero()[0])]
        raise IntegrityError(
            f"the teacher's output for {bad!r} is not finite, and one such target turns every weight of a student into "
            "nothing; drop that row from the embeddings, or delete the teacher's cache and run the teacher in float32"
        )
    return rows


def _absent(what: str, folder: Path, count: int, reason: str | None) -> str:
    why = f"it was left out when the cache was built: {reason}" if reason else f"it holds {count} others"
    return f"{what} is not in the cache {folder} ({why}); rebuild the cache with it included"


def _offset(report: Progress, what: str, start: int, total: int) -> Callable[[int], None]:
    return lambda done: report(start + done, total, what)
