"""Precomputed embeddings as a teacher: a black box that answers only for what it was asked before.

    embeddings:FOLDER      a teacher cache (teachers/cache.py) with one view, or several

`import_embeddings` turns .npy arrays, from any model behind any API, into such a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketvlm.edge.contract import ImageSpec, identity
from pocketvlm.edge.errors import UsageError
from pocketvlm.teachers.base import TeacherOutput
from pocketvlm.teachers.cache import TeacherCache
from pocketvlm.teachers.cache_format import CacheInfo, digest_names, write_manifest, write_shard
from pocketvlm.teachers.files import make_fingerprint, tensors_sha256


class PrecomputedTeacher:
    """A finished cache behind the `Teacher` protocol. cache: look image rows up by uid there."""

    def __init__(self, cache: TeacherCache, name: str) -> None:
        info = cache.info
        self.cache = cache
        self.name = name
        self.fingerprint = info.fingerprint
        self.space_id = info.space_id
        self.dim = info.dim
        self.logit_scale = info.logit_scale
        self.logit_bias = info.logit_bias
        # an unknown preprocessing: the pixels were seen by somebody else
        self.image = info.image or ImageSpec(size=224)
        self.licences = info.licences

    def encode_images(self, pixels: Tensor) -> TeacherOutput:
        """Always refused: there is no model, only rows.

        Raises:
            UsageError: says to look rows up by uid.
        """
        raise UsageError(
            f"{self.name} holds precomputed embeddings and cannot embed new pictures; look its rows up by uid "
            "(`teacher.cache.image(uids)`), or name a teacher with weights"
        )

    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """Known texts only, by the exact string: embedding [N, D], features [N, G] where the cache has them.

        Raises:
            UsageError: a text that the folder does not hold.
        """
        features = self.cache.text_features(texts) if self.cache.info.text_feature_dim else None
        return TeacherOutput(self.cache.text(texts), features)


def load_precomputed(folder: str | Path) -> PrecomputedTeacher:
    """Open `embeddings:FOLDER`; errors as in `TeacherCache.open`."""
    return PrecomputedTeacher(TeacherCache.open(folder), f"embeddings:{folder}")


def import_embeddings(
    folder: str | Path,
    *,
    image: np.ndarray | str | Path,
    uids: Sequence[str] | str | Path,
    text: np.ndarray | str | Path | None = None,
    texts: Sequence[str] | str | Path | None = None,
    name: str = "embeddings",
    logit_scale: float = 100.0,
    logit_bias: float = 0.0,
    image_spec: ImageSpec | None = None,
    licences: tuple[tuple[str, str, str], ...] = (),
    overwrite: bool = False,
) -> TeacherCache:
    """Write arrays into `folder` as a one-view teacher cache.

    image: [N, D] array or .npy file, any float type; text: [M, D] likewise, or None. Rows are scaled to unit
    length. uids / texts: the rows' names, or a UTF-8 text file with one a line. logit_scale: the multiplier of the
    cosine under which the embeddings were trained (CLIP's is 100).

    Raises:
        UsageError: counts or widths that do not match, duplicate names, rows that are zero or not finite, pickled
        arrays, or a folder that already holds a cache (without `overwrite`).
    """
    folder = Path(folder)
    if (folder / "cache.json").exists() and not overwrite:
        raise UsageError(
            f"{folder} already holds embeddings, which would be lost; pass overwrite=True or another folder"
        )
    if (text is None) != (texts is None):
        raise UsageError("text embeddings and their texts come together, but only one was given; give both or neither")
    rows, names = _array(image, "image"), _names(uids)
    words, phrases = (
        (torch.zeros(0, rows.shape[1]), []) if text is None or texts is None else (_array(text, "text"), _names(texts))
    )
    for what, array, labels in (("image", rows, names), ("text", words, phrases)):
        if len(array) != len(labels):
            raise UsageError(f"{len(array)} {what} embeddings came with {len(labels)} names; give one name per row")
        if len(set(labels)) != len(labels):
            raise UsageError(
                f"some names of the {what} embeddings occur twice, so rows would be lost; make them unique"
            )
    if rows.shape[1] != words.shape[1]:
        raise UsageError(
            f"image embeddings have width {rows.shape[1]} and text embeddings {words.shape[1]}, so no cosine between "
            "them exists; give both from one joint space"
        )
    fingerprint = make_fingerprint(
        weights=tensors_sha256({"image": rows, "text": words}),
        image=image_spec or ImageSpec(size=224),
        tokenizer=digest_names(phrases),
        extra={"uids": digest_names(names), "logit_scale": logit_scale, "logit_bias": logit_bias},
    )
    info = CacheInfo(
        name=name,
        fingerprint=fingerprint,
        space_id=identity(name, fingerprint),
        dim=rows.shape[1],
        feature_dim=0,
        text_feature_dim=0,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        image=image_spec,
        views=1,
        policy=None,
        seed=0,
        dtype="float32",
        shard_size=max(1, len(names)),
        samples=digest_names(names),
        texts=digest_names(phrases),
        licences=licences,
    )
    # without its manifest the folder is no cache: a kill in between leaves nothing half-true
    (folder / "cache.json").unlink(missing_ok=True)
    meta = {"uids": names, "bytes_sha256": [""] * len(names), "skipped": {}}
    digest = write_shard(folder / "shard-00000.safetensors", {"image": rows[:, None]}, meta)
    shards = [{"file": "shard-00000.safetensors", "sha256": digest, "count": len(names)}]
    text_shards = []
    if phrases:
        digest = write_shard(folder / "text-00000.safetensors", {"text": words}, {"texts": phrases})
        text_shards.append({"file": "text-00000.safetensors", "sha256": digest, "count": len(phrases)})
    write_manifest(folder, info, shards=shards, text_shards=text_shards, skipped={})
    return TeacherCache.open(folder)


def _array(source: np.ndarray | str | Path, what: str) -> Tensor:
    if isinstance(source, np.ndarray):
        array = source
    else:
        try:
            array = np.load(source, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{what} embeddings cannot be read from {source} ({error}); give a .npy of floats"
            ) from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UsageError(
            f"{what} embeddings of shape {array.shape} and type {array.dtype} were given and floats [rows, width] "
            "are expected; save one row per name"
        )
    rows = torch.from_numpy(np.array(array, np.float32))
    norms = rows.norm(dim=-1)
    bad = ~torch.isfinite(norms) | (norms == 0)
    if bool(bad.any()):
        raise UsageError(
            f"{what} embedding {int(bad.nonzero()[0])} is zero or not finite, so it has no direction to learn from; "
            "drop the row and its name"
        )
    return F.normalize(rows, dim=-1)


def _names(source: Sequence[str] | str | Path) -> list[str]:
    if isinstance(source, (str, Path)):
        try:
            return Path(source).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"the names file {source} cannot be read ({error}); give one name per line") from error
    return list(source)
