"""`EdgeModel`: a bundle, ready to embed and classify. Needs numpy, Pillow, tokenizers and one runtime; no torch."""

from __future__ import annotations

import importlib.util
import platform
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketvlm.edge.backends import Backend, default_threads, open_backend, target_of
from pocketvlm.edge.bundle import Bundle, BundleVariant
from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.preprocess import ImageSource
from pocketvlm.edge.reading import each_image, pixel_batches
from pocketvlm.edge.tokenizer import Tokenizer

BackendName = Literal["auto", "onnxruntime", "executorch", "coreml"]
_REMEMBERED_LABEL_SETS = 8


@dataclass(frozen=True)
class Classification:
    """The verdict for one image.

    label: the most probable one. probability: its share. scores: label -> probability, largest first, summing to 1.
    """

    label: str
    probability: float
    scores: dict[str, float]

    def top(self, k: int) -> list[tuple[str, float]]:
        """The k most probable labels with their probabilities."""
        return list(self.scores.items())[:k]


class EdgeModel:
    """Embeds images and texts with a bundle's towers. Make one with `EdgeModel.load`; safe to share among threads.

    contract: what the model expects and promises. bundle: where it came from. variant: which files run.
    backend: the runtime that runs them (`backend.name`, `backend.threads`). dim: width of the embeddings; below
    `graph_dim`, the width that the files give, embeddings are cut to their first `dim` numbers and normalised again.
    tokenizer: None where the model has no text tower.
    """

    def __init__(self, bundle: Bundle, variant: BundleVariant, backend: Backend, dim: int | None = None) -> None:
        self.bundle = bundle
        self.contract: ModelContract = bundle.contract
        self.variant = variant
        self.backend = backend
        self.graph_dim = variant.dim or bundle.contract.embed_dim
        self.dim = dim or self.graph_dim
        self.tokenizer: Tokenizer | None = None
        if bundle.contract.text is not None:
            if not bundle.raw.get("tokenizer"):
                raise IntegrityError(
                    "bundle.json names no tokenizer and the model has a text tower; no text could be encoded, "
                    "so export the bundle again"
                )
            self.tokenizer = Tokenizer(bundle.path(bundle.raw["tokenizer"]), bundle.contract.text)
        self._labels: dict[tuple[tuple[str, ...], tuple[str, ...]], NDArray[np.float32]] = {}
        self._labels_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"EdgeModel({self.contract.name}, {self.backend.name} {self.variant.precision}, dim {self.dim})"

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle,
        backend: BackendName = "auto",
        precision: str = "auto",
        threads: int | None = None,
        *,
        dim: int | None = None,
        verify: bool = True,
    ) -> EdgeModel:
        """Open a bundle folder or zip with one runtime.

        Args:
            bundle: what `pocketvlm export` wrote, or an opened `Bundle`.
            backend: "auto" takes the first that the bundle has files for and this machine can run:
                onnxruntime, executorch, coreml.
            precision: "fp32", "int8" or another that the bundle has; "auto" takes the most faithful that there is.
            threads: for one call of the runtime; None means up to 4.
            dim: width of the embeddings, one of `contract.dims`; None means all that there is. A file of this width
                is taken where the bundle has one, else the first `dim` numbers, normalised again. Galleries must be
                embedded at the same width.
            verify: check every file's hash first.

        Raises:
            UsageError, UnknownNameError, VersionError, IntegrityError: see `Bundle.load`, `Bundle.variant` and
                `open_backend`; also for a kind of model that this release cannot run.
            MissingExtraError: the runtime that was asked for is not installed.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle, verify=verify)
        if opened.contract.kind not in ("dual", "image-labels", "classifier"):
            raise UsageError(
                f"this bundle holds a {opened.contract.kind!r} model and this release runs embeddings and classifiers "
                "only; its outputs would be misread, so use a release that knows this kind"
            )
        target = _pick_target(opened) if backend == "auto" else target_of(backend)
        own_file = _check_dim(opened, target, precision, dim)
        variant = opened.variant(target, precision, dim if own_file else None)
        return cls(opened, variant, open_backend(target, opened.folder, variant, threads), dim)

    def embed_image(
        self, images: ImageSource | Iterable[ImageSource], *, batch_size: int = 32, workers: int | None = None
    ) -> NDArray[np.float32]:
        """Embeddings of images, of length 1 (L2-normalised); of a classifier, its logits over `contract.labels`.

        Args:
            images: one image (path, encoded bytes, PIL image, uint8 array [H, W], [H, W, 3] or [H, W, 4]), several of
                them as a list or any iterator, or one uint8 array [N, H, W, C]. Preprocessing is the contract's. An
                iterator is read batch by batch to its end; for one without an end see `stream_images`.
            batch_size: how many are run together; memory grows with it.
            workers: threads that decode and resize while the model runs; None means one for each processor, up to 4,
                and 1 decodes in the calling thread. The result is the same.

        Returns:
            float32 [N, D]; a single image gives [1, D].

        Raises:
            BadSampleError, UsageError: see `edge.preprocess.decode_image`; the model has no image tower.
        """
        return self._joined(self._image_rows(images, batch_size, workers))

    def stream_images(
        self, images: Iterable[ImageSource], *, batch_size: int = 32, workers: int | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """As `embed_image`, one embedding [D] at a time and in order, while `images` is being read.

        Holds at most two batches; an iterator may be endless. With two or more workers one batch is read ahead, so for
        frames of a camera take `batch_size=1, workers=1`: each is answered before the next one is asked for.

        Raises:
            BadSampleError, UsageError: as `embed_image`, when the first picture of a bad one's batch is asked for.
        """
        for rows in self._image_rows(images, batch_size, workers):
            yield from rows

    def embed_text(self, texts: str | Iterable[str], *, batch_size: int = 64) -> NDArray[np.float32]:
        """Embeddings of strings, of length 1 (L2-normalised); text past the context is cut.

        Args:
            texts: a string, or several as a list or any iterator with an end.
            batch_size: how many are encoded and run together.

        Returns:
            float32 [N, D]; a single string gives [1, D].

        Raises:
            BadSampleError: see `edge.tokenizer.Tokenizer.encode`.
            UsageError: the model has no text tower.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise _no_tower(self.contract, "text")
        return self._joined(
            self._checked(self.backend.run_text(tokenizer.encode(chunk)), len(chunk))
            for chunk in _chunks([texts] if isinstance(texts, str) else list(texts), batch_size)
        )

    def embed_pixels(self, pixels: NDArray[np.uint8], *, batch_size: int = 32) -> NDArray[np.float32]:
        """As `embed_image`, from pixels that are preprocessed already: uint8 [N, S, S, 3]."""
        size = self.contract.image.size if self.contract.image else 0
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (size, size, 3):
            raise UsageError(
                f"pixels of dtype {pixels.dtype} and shape {pixels.shape} were given and uint8 [N, {size}, {size}, 3] "
                "is expected; the graph cannot take them, so preprocess with edge.preprocess.load_image"
            )
        return self._joined(
            self._checked(self.backend.run_image(chunk), len(chunk)) for chunk in _chunks(pixels, batch_size)
        )

    def embed_ids(self, ids: NDArray[np.int32], *, batch_size: int = 64) -> NDArray[np.float32]:
        """As `embed_text`, from ids that are encoded already: int32 [N, context_length]."""
        length = self.contract.text.context_length if self.contract.text else 0
        if ids.dtype != np.int32 or ids.ndim != 2 or ids.shape[1] != length:
            raise UsageError(
                f"ids of dtype {ids.dtype} and shape {ids.shape} were given and int32 [N, {length}] is expected; "
                "the graph cannot take them, so encode with edge.tokenizer.Tokenizer"
            )
        return self._joined(
            self._checked(self.backend.run_text(chunk), len(chunk)) for chunk in _chunks(ids, batch_size)
        )

    def embed_labels(self, labels: Sequence[str], templates: str | Sequence[str] = ("{}",)) -> NDArray[np.float32]:
        """One embedding per label: the normalised mean of its normalised prompt embeddings, float32 [N, D].

        Raises:
            UsageError: no label or template, a label twice, or a template without "{}".
        """
        templates = (templates,) if isinstance(templates, str) else tuple(templates)
        labels = _check_labels(labels)
        if not templates or any("{}" not in template for template in templates):
            raise UsageError(
                f"templates {list(templates)} were given and each needs '{{}}' where the label goes; "
                "every label would look the same, so write for instance 'a picture of {}'"
            )
        key = (labels, templates)
        with self._labels_lock:
            known = self._labels.get(key)
        if known is not None:
            return known
        # not str.format: a label or a template may hold other braces
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        each = _normalize(self.embed_text(prompts)).reshape(len(labels), len(templates), -1)
        embeddings = _normalize(each.mean(axis=1))
        embeddings.setflags(write=False)
        with self._labels_lock:
            self._labels[key] = embeddings
            while len(self._labels) > _REMEMBERED_LABEL_SETS:
                self._labels.pop(next(iter(self._labels)))
        return embeddings

    def classify(
        self,
        images: ImageSource | Iterable[ImageSource],
        labels: Sequence[str] | None = None,
        templates: str | Sequence[str] = ("{}",),
        *,
        batch_size: int = 32,
    ) -> list[Classification]:
        """Zero-shot classification: softmax over `logit_scale * cosine(image, label)`; or a classifier's own.

        Each label is put into each template; the prompts' normalised embeddings are averaged and normalised
        again. Label embeddings are remembered, so calling this once per camera frame is fine.

        Args:
            images: as for `embed_image`.
            labels: at least one, all different. None for a classifier, which has its own (`contract.labels`).
            templates: prompts with "{}" where the label goes; by default the bare label, as on the command line.

        Returns:
            One `Classification` per image, in order. Probabilities are relative to `labels`: they sum to 1 even
            where none fits.

        Raises:
            UsageError: see `embed_labels`; labels given to a classifier, or none to another model.
            BadSampleError: see `embed_image` and `embed_text`.
        """
        if (self.contract.kind == "classifier") != (labels is None):
            wrong = "has no labels of its own" if labels is None else "was trained for its own labels"
            raise UsageError(
                f"{self.contract.name!r} is a {self.contract.kind!r} model and {wrong}, so labels={labels!r} cannot be "
                "classified by; give labels to a dual encoder and none to a classifier"
            )
        if labels is None:
            labels, logits = self.contract.labels, self.embed_image(images, batch_size=batch_size).astype(np.float64)
        else:
            label_embeddings = self.embed_labels(labels, templates)
            cosine = self.similarity(self.embed_image(images, batch_size=batch_size), label_embeddings)
            logits = self.contract.logit_scale * cosine.astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        shares /= shares.sum(axis=1, keepdims=True)
        verdicts = []
        for row in shares:
            order = np.argsort(-row, kind="stable")
            scores = {labels[i]: float(row[i]) for i in order}
            verdicts.append(Classification(labels[order[0]], float(row[order[0]]), scores))
        return verdicts

    def similarity(self, a: ArrayLike, b: ArrayLike) -> NDArray[np.float32]:
        """Cosine of every row of `a` [N, D] (or [D]) with every row of `b` [M, D] (or [D]): float32 [N, M].

        Raises:
            UsageError: the widths differ.
        """
        left, right = (np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b))
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
            raise UsageError(
                f"embeddings of shapes {left.shape} and {right.shape} were given and equal widths are expected; "
                "they have no cosine, so compare embeddings of one model"
            )
        return _normalize(left) @ _normalize(right).T

    def _image_rows(
        self, images: ImageSource | Iterable[ImageSource], batch_size: int, workers: int | None
    ) -> Iterator[NDArray[np.float32]]:
        spec = self.contract.image
        if spec is None:
            raise _no_tower(self.contract, "image")
        if workers is not None and workers < 1:
            raise UsageError(f"workers is {workers} and at least 1 is expected; nothing would be decoded")
        _check_batch_size(batch_size)
        given = each_image(images)
        for pixels in pixel_batches(given, spec, batch_size, default_threads() if workers is None else workers):
            yield self._checked(self.backend.run_image(pixels), len(pixels))

    def _checked(self, embeddings: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """What the graph gave, as it is promised."""
        if embeddings.shape != (count, self.graph_dim):
            raise IntegrityError(
                f"the {self.backend.name} graph gave embeddings of shape {embeddings.shape} for {count} inputs "
                f"and the contract promises width {self.graph_dim}; they belong to another model, so export it again"
            )
        if not np.isfinite(embeddings).all():
            raise IntegrityError(
                f"the {self.backend.name} {self.variant.precision} graph gave NaN or infinity; no result from it can "
                "be trusted, so use another precision and check the bundle with 'pocketvlm parity'"
            )
        if self.dim < self.graph_dim:
            return _normalize(embeddings[:, : self.dim])
        as_they_are = self.contract.normalized or self.contract.kind == "classifier"
        return embeddings if as_they_are else _normalize(embeddings)

    def _joined(self, parts: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        rows = list(parts)
        if len(rows) == 1:
            return rows[0]
        return np.concatenate(rows) if rows else np.zeros((0, self.dim), np.float32)


def _pick_target(bundle: Bundle) -> str:
    present = {variant.target for variant in bundle.variants}
    runnable = {
        "onnx": True,
        "executorch": importlib.util.find_spec("executorch") is not None,
        "coreml": platform.system() == "Darwin",
    }
    known = [target for target in runnable if target in present]
    if not known:
        raise UsageError(
            f"the bundle has variants for {sorted(present) or 'nothing'} and this release runs {', '.join(runnable)}; "
            "there is nothing to load, so export it with one of them"
        )
    # where none can run, opening the first one explains what is missing
    return next((target for target in known if runnable[target]), known[0])


def _check_dim(bundle: Bundle, target: str, precision: str, dim: int | None) -> bool:
    """Whether the bundle has a file of width `dim` for this target and precision.

    Raises:
        UsageError: a width that the contract does not promise and no file has.
    """
    full = bundle.contract.embed_dim
    of_target = [variant for variant in bundle.variants if variant.target == target]
    files = {v.dim or full for v in of_target if precision in ("auto", v.precision)}
    widest = max(files, default=full)
    usable = sorted(files | {width for width in bundle.contract.dims if width <= widest})
    if dim is not None and dim not in usable:
        nearest = sorted(sorted(usable, key=lambda width: abs(width - dim))[:2])
        raise UsageError(
            f"embeddings of width {dim} were asked for and this bundle's {target} model gives {usable}; another prefix "
            f"was never trained to be used alone, so take {' or '.join(map(str, nearest))}"
        )
    return dim in files


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size} and at least 1 is expected; nothing would run")


def _chunks(inputs: Any, batch_size: int) -> Iterator[Any]:
    _check_batch_size(batch_size)
    return (inputs[at : at + batch_size] for at in range(0, len(inputs), batch_size))


def _check_labels(labels: Sequence[str]) -> tuple[str, ...]:
    if isinstance(labels, str):
        raise UsageError(f"labels is the string {labels!r} and a list is expected; give [{labels!r}, ...]")
    if len(labels) == 0:
        raise UsageError("no label was given and at least one is expected; there is nothing to choose from")
    twice = sorted({label for label in labels if list(labels).count(label) > 1})
    if twice:
        raise UsageError(f"labels {twice} are given more than once; they would share their probability, so keep one")
    return tuple(labels)


def _no_tower(contract: ModelContract, tower: str) -> UsageError:
    return UsageError(
        f"model {contract.name!r} has no {tower} tower in this bundle; it cannot embed {tower}s, "
        "so use a bundle that was exported with one"
    )


def _normalize(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    norm = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return embeddings / np.maximum(norm, np.float32(1e-12))
