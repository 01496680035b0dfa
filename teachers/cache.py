"""The teacher cache: a teacher's outputs on disk, so that a student never waits for its teacher.

A folder holds `cache.json` (who made it, from what, and the sha256 of every other file) and shards in the
safetensors format:

    shard-00000.safetensors   image [n, K, D], features [n, K, F] (if the teacher has them),
                              tokens [n, K, G G, W] (if asked for: the last image tokens on a grid of G x G places),
                              logits [n, K, T + 1] float16 and logit_ids [n, K, T] (if asked for: the T largest shares
                              of a list of texts and that of all others, see `top_logits`),
                              views [n, K, 9] int32 (if K > 1: `ViewParams.packed` of each view that was shown)
    text-00000.safetensors    text [m, D], features [m, G] (if the teacher has them)

Row order is in each shard's own metadata (uids or texts), so a shard explains itself. K counts the replayable
views of an image (`data.augment`); view 0 is the teacher's plain preprocessing. Precomputed embeddings are this
format with one view. `cache.json` is written last: a folder without it is an unfinished build, which
`cache_build.build_cache` continues; the finished files are the same bytes as those of an uninterrupted build.

A cache of streamed data has one shard for each data shard, which `cache.json` names; text [m, D] and text_features
[m, G] of that shard's captions lie in it too, so that whoever reads a data shard needs this one file (`of_shard`).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pocketvlm.data.augment import AugmentPolicy, ViewParams, view_params
from pocketvlm.data.sample import Sample
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.teachers.cache_format import CacheInfo, check_shard, check_version, read_meta, refuse_difference

# of so many views of a shard the drawn parameters are compared with the kept ones when it is first read
_COMPARED = 64


class TeacherCache:
    """A finished cache, read lazily: opening it reads `cache.json`, and a shard is mapped into memory on first use.

    Before a shard's first row is given, its sha256 is compared with `cache.json`, and the views that this release
    draws with those that were shown to the teacher. Every reader raises IntegrityError where either differs, or where
    a row that is asked for is not finite, and names its picture or text.

    info: what it was made from. skipped: uid to reason, for images that could not be decoded when it was built.
    """

    def __init__(self, folder: Path, info: CacheInfo, manifest: dict[str, Any], *, verify: bool = True) -> None:
        self.folder = folder
        self.info = info
        self.skipped: dict[str, str] = manifest["skipped"]
        self._manifest = manifest
        self._shards = {row["file"]: row for row in manifest["shards"]}
        self._files = list(self._shards)
        alone = {row["file"]: row for row in manifest["text_shards"]}
        self._text_files = [*alone, *(row["file"] for row in manifest["shards"] if row.get("texts"))]
        self._digests = {name: row["sha256"] for name, row in [*self._shards.items(), *alone.items()]}
        self._verify = verify
        self._open: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def open(
        cls, folder: str | Path, *, expect_fingerprint: str | None = None, verify: bool = True, **expect: Any
    ) -> TeacherCache:
        """Open a finished cache.

        expect_fingerprint: the teacher's fingerprint. expect: further `CacheInfo` fields that must match
        (`views=4, seed=0, policy={...}`). verify: hash every shard before its first row is given.

        Raises:
            UsageError: no cache there, or an unfinished one. VersionError: written under another schema.
            IntegrityError: an expected field differs; the message names it.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "cache.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            state = "holds an unfinished build" if (folder / "build.json").exists() else "is not a teacher cache"
            raise UsageError(
                f"{folder} {state} (no cache.json); finish it with what began it (`pocketvlm cache-teacher`, "
                "`build_cache`) before reading"
            ) from None
        except ValueError as error:
            raise IntegrityError(f"{folder}/cache.json is not JSON ({error}); delete the folder, rebuild it") from error
        check_version(folder, manifest)
        info = CacheInfo.from_dict(manifest["info"])
        if expect_fingerprint is not None:
            expect = {"fingerprint": expect_fingerprint, **expect}
        refuse_difference(folder, info.to_dict(), json.loads(json.dumps(expect)))
        return cls(folder, info, manifest, verify=verify)

    def of_shard(self, name: str) -> TeacherCache:
        """The rows of one data shard alone, for who reads that shard: nothing of the others is opened.

        Raises:
            UsageError: the cache was not made by data shards, or has none of that name.
        """
        rows = self._by_data.get(name, [])
        if not rows:
            kept = f"{len(self._by_data)} others" if self._by_data else "no shards named by data"
            raise UsageError(
                f"data shard {name!r} is not in the cache {self.folder} (it holds {kept}), so its pictures have no "
                "teacher; run `pocketvlm cache-teacher` over the same data"
            )
        one = {**self._manifest, "shards": rows, "text_shards": []}
        return TeacherCache(self.folder, self.info, one, verify=self._verify)

    @functools.cached_property
    def data_shards(self) -> tuple[str, ...]:
        """Names of the data shards that it was made from, in order; empty where it was made from a list."""
        return tuple(self._by_data)

    @functools.cached_property
    def _by_data(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._manifest["shards"]:
            if "data" in row:
                found.setdefault(row["data"], []).append(row)
        return found

    @functools.cached_property
    def _metas(self) -> dict[str, dict[str, Any]]:
        return {file: read_meta(self.folder / file) for file in dict.fromkeys([*self._files, *self._text_files])}

    @functools.cached_property
    def _rows(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(self._files):
            found.update({uid: (number, row) for row, uid in enumerate(self._metas[file]["uids"])})
        return found

    @functools.cached_property
    def _text_rows(self) -> dict[str, tuple[int, int]]:
        return self._rows_of_texts(self._text_files, self._metas.__getitem__)

    @functools.cached_property
    def _listed_texts(self) -> dict[str, tuple[int, int]]:
        """Of the shards that hold nothing but texts: those that a run over data shards asks about at its beginning."""
        alone = [file for file in self._text_files if file not in self._shards]
        return self._rows_of_texts(alone, lambda file: read_meta(self.folder / file))

    def _rows_of_texts(self, files: Sequence[str], meta: Callable[[str], dict[str, Any]]) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for number, file in enumerate(files):
            for row, text in enumerate(meta(file)["texts"]):
                found.setdefault(text, (number, row))
        return found

    def _find_text(self, text: str) -> tuple[int, int] | None:
        listed = self._listed_texts.get(text)
        return listed if listed is not None else self._text_rows.get(text)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shards with pictures."""
        return tuple(self._files)

    @property
    def text_files(self) -> tuple[str, ...]:
        """Names of the shards with texts, some of which hold pictures too."""
        return tuple(self._text_files)

    @property
    def uids(self) -> tuple[str, ...]:
        """Images in storage order."""
        return tuple(self._rows)

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts in storage order, each once."""
        return tuple(self._text_rows)

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

    def logits(self, uids: Sequence[str], views: int | Sequence[int] = 0) -> tuple[Tensor, Tensor]:
        """[B, T + 1] float32 logarithms of the T largest shares of a list of texts, falling, and of the sum of all
        others; [B, T] int64, the places of these texts in the list (`top_logits.largest`).

        Raises:
            UsageError: none are kept here.
        """
        if not self.info.top_logits:
            raise UsageError(
                f"{self.folder} keeps embeddings of {self.info.name!r} and no logits; leave objectives on its top "
                "logits out of the recipe, or build a cache with them"
            )
        return self._gather("logits", uids, views), self._gather("logit_ids", uids, views).long()

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

    def view(self, uid: str, view: int) -> ViewParams:
        """What the teacher was shown, as it was written down; an older cache draws it again.

        Raises:
            UsageError: no such image or view.
        """
        self._checked_views([view])
        shard, row = self._place(uid)
        kept = self._shard(self._files[shard]).get("views")
        if kept is not None:
            return ViewParams.unpacked(kept[row, view].tolist())
        return view_params(uid, view, self.info.seed, self._policy)

    def check(self) -> int:
        """Hash every shard now; returns how many bytes that were.

        Raises:
            IntegrityError: a shard is missing or its bytes differ.
        """
        for file, digest in self._digests.items():
            check_shard(self.folder / file, digest)
        return sum((self.folder / file).stat().st_size for file in self._digests)

    def changed(self, samples: Sequence[Sample]) -> list[str]:
        """uids whose encoded image bytes are no longer those that the cache was made from (reads all images)."""
        kept: dict[str, str] = {}
        for file in self._files if samples else ():
            kept.update(zip(self._metas[file]["uids"], self._metas[file]["bytes_sha256"]))
        return [s.uid for s in samples if kept.get(s.uid) and hashlib.sha256(s.image.read()).hexdigest() != kept[s.uid]]

    def load(self) -> TeacherCache:
        """Read every shard now, so that the cache can be pickled and used where its folder is not."""
        for file in self._metas:
            self._shard(file)
        return self

    def __contains__(self, uid: str) -> bool:
        return uid in self._rows

    def missing_texts(self, texts: Sequence[str]) -> list[str]:
        """Those of `texts` that it does not hold."""
        return [text for text in texts if self._find_text(text) is None]

    def __len__(self) -> int:
        return sum(row["count"] for row in self._shards.values())

    def _gather(self, key: str, uids: Sequence[str], views: int | Sequence[int]) -> Tensor:
        wanted = [views] * len(uids) if isinstance(views, int) else list(views)
        if len(wanted) != len(uids):
            raise UsageError(f"{len(uids)} uids came with {len(wanted)} view numbers; give one view, or one per uid")
        self._checked_views(wanted)
        rows = []
        for uid, view in zip(uids, wanted):
            shard, row = self._place(uid)
            rows.append(self._shard(self._files[shard])[key][row, view])
        info = self.info
        empty = {"image": (info.dim,), "features": (info.feature_dim,), "tokens": (info.token_grid**2, info.token_dim)}
        empty |= {"logits": (info.top_logits + 1,), "logit_ids": (info.top_logits,)}
        # float32 counts 2^24 texts exactly
        return _finite(torch.stack(rows).float(), uids) if rows else torch.zeros(0, *empty[key])

    def _gather_text(self, key: str, texts: Sequence[str]) -> Tensor:
        rows = []
        for text in texts:
            place = self._find_text(text)
            if place is None:
                raise self._absent(f"text {text!r}", len(self._text_rows), None)
            number, row = place
            shard = self._shard(self._text_files[number])
            # beside pictures the texts' features have a name of their own
            rows.append(shard["text_features" if key == "features" and "image" in shard else key][row])
        width = self.info.dim if key == "text" else self.info.text_feature_dim
        return _finite(torch.stack(rows).float(), texts) if rows else torch.zeros(0, width)

    def _place(self, uid: str) -> tuple[int, int]:
        if uid not in self._rows:
            raise self._absent(f"image {uid!r}", len(self._rows), self.skipped.get(uid))
        return self._rows[uid]

    def _checked_views(self, wanted: Sequence[int]) -> None:
        if wanted and not (min(wanted) >= 0 and max(wanted) < self.info.views):
            raise UsageError(
                f"view {max(wanted, key=abs)} was asked for, but {self.folder} holds views 0 to {self.info.views - 1}; "
                "rebuild the cache with more views or draw fewer"
            )

    def _absent(self, what: str, count: int, reason: str | None) -> UsageError:
        if self._verify:
            self.check()  # a name that a flipped bit changed is absent too
        why = f"it was left out when the cache was built: {reason}" if reason else f"it holds {count} others"
        return UsageError(f"{what} is not in the cache {self.folder} ({why}); rebuild the cache with it included")

    def _shard(self, file: str) -> dict[str, Tensor]:
        if file not in self._open:
            if self._verify:
                check_shard(self.folder / file, self._digests[file])
            with safe_open(self.folder / file, framework="pt") as handle:
                found = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            if self._verify and "views" in found:
                self._check_drawn(file, found["views"])
            self._open[file] = found
        return self._open[file]

    @property
    def _policy(self) -> AugmentPolicy:
        kept = {key: value for key, value in (self.info.policy or {}).items() if key != "view_version"}
        return AugmentPolicy.from_dict(kept)

    def _check_drawn(self, file: str, kept: Tensor) -> None:
        """The student is shown what this release draws: it must be what the teacher was shown."""
        uids, count = self._metas[file]["uids"], kept.shape[1]
        for turn, row in enumerate(range(0, len(uids), max(1, len(uids) // _COMPARED))):
            view = 1 + turn % (count - 1)  # view 0 is not drawn
            shown = ViewParams.unpacked(kept[row, view].tolist())
            drawn = view_params(uids[row], view, self.info.seed, self._policy)
            if shown != drawn:
                name = next(k for k, v in vars(shown).items() if v != getattr(drawn, k))
                raise IntegrityError(
                    f"cache {self.folder} was made from other views than this release draws: view {view} of "
                    f"{uids[row]!r} had {name} {getattr(shown, name)!r} and would have {getattr(drawn, name)!r}, so "
                    "the student would be shown other pictures than its teacher; use the release that made the cache, "
                    "or make it anew"
                )


def _finite(rows: Tensor, names: Sequence[str]) -> Tensor:
    if not bool(torch.isfinite(rows).all()):
        bad = names[int((~torch.isfinite(rows.flatten(1)).all(dim=1)).nonzero()[0])]
        raise IntegrityError(
            f"the teacher's output for {bad!r} is not finite, and one such target turns every weight of a student into "
            "nothing; drop that row from the embeddings, or delete the teacher's cache and run the teacher in float32"
        )
    return rows
