"""A classifier over labels that were never trained for: calibrated, taught by a few examples, able to say "none"."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.contract import ModelContract
from pocketvlm.edge.errors import IntegrityError, PocketvlmError, UsageError, VersionError, unknown_name
from pocketvlm.edge.model import Classification
from pocketvlm.edge.preprocess import ImageSource

SCHEMA = "1.0"
Method = Literal["means", "cache"]
Rows = NDArray[np.float64]

# how much the examples weigh beside the texts; 0 leaves them out
_WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# how fast an example's say falls with its distance (Tip-Adapter's beta)
_SHARPNESS = (1.0, 3.0, 10.0, 30.0)
_FOLDS = 5
_LARGEST = 1 << 30  # bytes of a classifier file, unpacked


class Embeds(Protocol):
    """What is needed of an `EdgeModel`."""

    contract: ModelContract
    dim: int

    def embed_image(
        self, images: ImageSource | Iterable[ImageSource], *, batch_size: int = 32
    ) -> NDArray[np.float32]: ...

    def embed_labels(self, labels: Sequence[str], templates: str | Sequence[str] = ("{}",)) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class CalibrationResult:
    """temperature: what logits are divided by. examples: how many it was fitted on. nll, error: mean negative
    log-likelihood, and expected calibration error in 10 bins, before and after, on those very examples."""

    temperature: float
    examples: int
    nll: tuple[float, float]
    error: tuple[float, float]


@dataclass(frozen=True)
class FewShotResult:
    """method, weight, sharpness: what was chosen, by cross-validation over the examples. examples: of each label.
    accuracy: of the texts alone and of both, on examples that the fold had not seen. weight 0: the texts alone were
    best, and nothing changed."""

    method: Method
    weight: float
    sharpness: float | None
    examples: dict[str, int]
    accuracy: tuple[float, float]


@dataclass(frozen=True)
class _Head:
    """What examples add to the logits of the texts: `weight` times the score of `method`."""

    method: Method
    weight: float
    sharpness: float
    rows: Rows
    targets: NDArray[np.int64]

    def __call__(self, rows: Rows, classes: int) -> Rows:
        return self.weight * _SCORES[self.method](self.rows, self.targets, classes, rows, self.sharpness)


class ZeroShotClassifier:
    """Names pictures by the nearest of some labels, whose embeddings are made once.

    Probabilities are a softmax over (logit_scale * cosine + logit_bias + what examples add) / temperature. The scale
    was learned to tell batches of captions apart, so its probabilities are too sure or not sure enough: `calibrate`.

    model: an `EdgeModel`, or anything with its `embed_image` and `embed_labels`. labels: at least two. threshold: below
    this probability the verdict's label is "" (none of these); 0 never abstains.

    Raises:
        UsageError: labels or templates as `EdgeModel.embed_labels`; fewer than two labels; a threshold outside 0..1; a
            model whose contract is no dual encoder's.
    """

    def __init__(
        self,
        model: Embeds,
        labels: Sequence[str],
        templates: str | Sequence[str] = ("{}",),
        *,
        threshold: float = 0.0,
    ) -> None:
        if model.contract.kind == "classifier":
            raise UsageError(
                f"{model.contract.name!r} is a classifier with labels of its own, and labels were given; it has no "
                "text tower to embed them, so call its classify() or use a dual encoder"
            )
        if not isinstance(labels, str) and len(labels) < 2:
            raise UsageError(
                f"{len(labels)} labels were given and at least two are expected; with one, every picture would be it "
                "for certain, so add what it could be instead"
            )
        self._text = model.embed_labels(labels, templates).astype(np.float64)
        self.model = model
        self.labels = tuple(labels)
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        self.temperature = 1.0
        self.threshold = _checked_threshold(threshold)
        self._head: _Head | None = None

    def set_threshold(self, threshold: float) -> None:
        """Abstain below this probability from now on.

        Raises:
            UsageError: it is no probability.
        """
        self.threshold = _checked_threshold(threshold)

    def classify(self, images: ImageSource | Iterable[ImageSource], *, batch_size: int = 32) -> list[Classification]:
        """One verdict per image, in order; its label is "" where no probability reaches `threshold`."""
        return self.classify_embeddings(self.model.embed_image(images, batch_size=batch_size))

    def classify_embeddings(self, rows: NDArray[Any]) -> list[Classification]:
        """The same for embeddings [N, D] that are there already, for instance those of an index."""
        verdicts = []
        for row in self.probabilities(rows):
            order = np.argsort(-row, kind="stable")
            best = float(row[order[0]])
            label = self.labels[order[0]] if best >= self.threshold else ""
            verdicts.append(Classification(label, best, {self.labels[i]: float(row[i]) for i in order}))
        return verdicts

    def probabilities(self, rows: NDArray[Any]) -> Rows:
        """float64 [N, labels], each row summing to 1, of embeddings [N, D]."""
        return _softmax(self._logits(self._checked_rows(rows)) / self.temperature)

    def calibrate(self, images: Iterable[ImageSource], labels: Sequence[str]) -> CalibrationResult:
        """Fit the temperature to labelled pictures, which examples of `learn` must not be among (temperature scaling,
        Guo et al. 2017, arXiv:1706.04599). The order of the labels does not change, so accuracy stays.

        Raises:
            UsageError: fewer than ten pictures, another number of labels, a label that is not one of ours.
        """
        rows, targets = self._examples(images, labels, at_least=10, purpose="to calibrate with")
        logits = self._logits(rows)
        # the loss is convex in the inverse temperature, so a golden-section search of its logarithm finds it
        temperature = float(np.exp(_least(lambda log: _nll(logits / np.exp(log), targets), np.log(1e-2), np.log(1e2))))
        before, after = logits, logits / temperature
        self.temperature = temperature
        return CalibrationResult(
            temperature,
            len(rows),
            (_nll(before, targets), _nll(after, targets)),
            (_calibration_error(before, targets), _calibration_error(after, targets)),
        )

    def learn(self, images: Iterable[ImageSource], labels: Sequence[str], method: Method = "means") -> FewShotResult:
        """Add what labelled pictures say to what the labels' texts say, in closed form.

        "means": Gaussian classes with their own means and one covariance (Wang et al. 2024, arXiv:2402.04087, equations
        4 to 6: its inverse by shrinkage, D ((N - 1) S + tr(S) I)^-1). "cache": each example votes for its label by
        exp(-sharpness (1 - cosine)) (Tip-Adapter, Zhang et al. 2022, arXiv:2111.03930, equation 3). Ours: the weight
        (and sharpness) are those that name held-out examples best, in up to five folds; ties go to the smallest weight,
        and 0 leaves the texts alone. Labels without an example keep their texts only with "cache"; "means" refuses.
        Called again, it starts anew. The temperature is left as it is, so calibrate afterwards.

        Raises:
            UsageError: as `calibrate`, with at least two pictures; a label without an example for "means".
            UnknownNameError: no such method.
        """
        if method not in _SCORES:
            raise unknown_name("few-shot method", method, _SCORES)
        rows, targets = self._examples(images, labels, at_least=2, purpose="to learn from")
        counts = np.bincount(targets, minlength=len(self.labels))
        if method == "means" and counts.min() == 0:
            missing = [label for label, count in zip(self.labels, counts) if not count]
            raise UsageError(
                f"no example was given of {missing[:3]} and 'means' needs one of every label; it would never be named, "
                "so add examples or use method='cache'"
            )
        self._head = None
        text = self._logits(rows)
        folds = _folds(targets)
        best: tuple[float, float, float] = (-1.0, 0.0, 0.0)
        alone = float((text.argmax(1) == targets).mean())
        for sharpness in _SHARPNESS if method == "cache" else (0.0,):
            scores = _held_out(method, rows, targets, len(self.labels), folds, sharpness)
            for weight in _WEIGHTS:
                right = float(((text + weight * scores).argmax(1) == targets).mean())
                if right > best[0]:
                    best = (right, weight, sharpness)
        accuracy, weight, sharpness = best
        if weight:
            self._head = _Head(method, weight, sharpness, rows, targets)
        return FewShotResult(
            method,
            weight,
            sharpness if method == "cache" else None,
            {label: int(count) for label, count in zip(self.labels, counts)},
            (alone, accuracy),
        )

    def save(self, path: str | Path) -> Path:
        """Write labels, temperature, threshold and what was learned into one file; the model is not in it."""
        path = Path(path)
        facts: dict[str, Any] = {
            "schema": SCHEMA,
            "space_id": self.model.contract.space_id,
            "dim": self.model.dim,
            "labels": list(self.labels),
            "templates": list(self.templates),
            "temperature": self.temperature,
            "threshold": self.threshold,
        }
        arrays: dict[str, NDArray[Any]] = {}
        if self._head is not None:
            facts["head"] = {
                "method": self._head.method,
                "weight": self._head.weight,
                "sharpness": self._head.sharpness,
            }
            arrays = {"rows": self._head.rows.astype(np.float32), "targets": self._head.targets}
        part = path.with_name(path.name + ".part")
        with ZipFile(part, "w", ZIP_STORED) as file:
            file.writestr("classifier.json", json.dumps(facts, indent=1, ensure_ascii=False))
            for name, array in arrays.items():
                buffer = BytesIO()
                np.save(buffer, array, allow_pickle=False)
                file.writestr(f"{name}.npy", buffer.getvalue())
        part.replace(path)
        return path

    @classmethod
    def load(cls, model: Embeds, path: str | Path) -> ZeroShotClassifier:
        """Read what `save` wrote, for a model of the same embedding space.

        Raises:
            UsageError: no such file, or it was made with another embedding space or width.
            IntegrityError: the file is damaged. VersionError: written by a later release.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"{str(path)!r} is no file, so there is no classifier to load; give one that save() wrote")
        try:
            with ZipFile(path) as file:
                _check_size(file)
                facts = json.loads(file.read("classifier.json"))
                arrays = {
                    name: np.load(BytesIO(file.read(f"{name}.npy")), allow_pickle=False)
                    for name in (("rows", "targets") if "head" in facts else ())
                }
            major = int(str(facts["schema"]).split(".")[0])
        except (BadZipFile, KeyError, TypeError, ValueError, OSError, EOFError, RuntimeError, zlib.error) as error:
            raise IntegrityError(
                f"classifier file {path.name!r} cannot be read ({error}); it was cut short or changed, so make it again"
            ) from error
        if major != int(SCHEMA.split(".")[0]):
            raise VersionError(
                f"classifier file {path.name!r} has schema {facts['schema']} and this release reads {SCHEMA}; its "
                "fields could be misread, so use the release that wrote it"
            )
        try:
            return cls._restored(model, path, facts, arrays)
        except PocketvlmError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"classifier file {path.name!r} lacks or garbles a field ({type(error).__name__}: {error}); it was "
                "changed, so make it again"
            ) from error

    @classmethod
    def _restored(
        cls, model: Embeds, path: Path, facts: dict[str, Any], arrays: dict[str, NDArray[Any]]
    ) -> ZeroShotClassifier:
        ours = (model.contract.space_id, model.dim)
        if (facts["space_id"], facts["dim"]) != ours:
            raise UsageError(
                f"classifier file {path.name!r} was made for embeddings of {facts['space_id']!r} with {facts['dim']} "
                f"numbers and this model gives {ours[0]!r} with {ours[1]}; its examples mean nothing there, so make it "
                "again with this model"
            )
        found = cls(model, facts["labels"], facts["templates"], threshold=facts["threshold"])
        found.temperature = float(facts["temperature"])
        if "head" in facts:
            head, rows, targets = facts["head"], arrays["rows"], arrays["targets"]
            if rows.shape != (len(targets), model.dim) or targets.ndim != 1 or head["method"] not in _SCORES:
                raise ValueError(f"examples of shape {rows.shape} for targets of {targets.shape}, {head['method']!r}")
            if targets.dtype.kind != "i" or not ((targets >= 0) & (targets < len(found.labels))).all():
                raise ValueError("a target that is no label")
            found._head = _Head(
                cast("Method", head["method"]),
                float(head["weight"]),
                float(head["sharpness"]),
                rows.astype(np.float64),
                targets,
            )
        return found

    def _logits(self, rows: Rows) -> Rows:
        contract = self.model.contract
        logits = contract.logit_scale * rows @ self._text.T + contract.logit_bias
        return logits if self._head is None else logits + self._head(rows, len(self.labels))

    def _examples(
        self, images: Iterable[ImageSource], labels: Sequence[str], *, at_least: int, purpose: str
    ) -> tuple[Rows, NDArray[np.int64]]:
        rows = self._checked_rows(self.model.embed_image(images))
        labels = list(labels)
        if len(rows) != len(labels):
            raise UsageError(
                f"{len(rows)} pictures were given with {len(labels)} labels; they could not be told whose is whose, so "
                "give one label for each"
            )
        if len(rows) < at_least:
            raise UsageError(
                f"{len(rows)} labelled pictures were given {purpose} and at least {at_least} are needed; fewer would "
                "fit chance, so add some"
            )
        for label in labels:
            if label not in self.labels:
                raise unknown_name("label of an example", label, self.labels)
        return rows, np.array([self.labels.index(label) for label in labels], np.int64)

    def _checked_rows(self, rows: NDArray[Any]) -> Rows:
        if rows.ndim != 2 or rows.shape[1] != self._text.shape[1]:
            raise UsageError(
                f"embeddings of shape {rows.shape} were given and [N, {self._text.shape[1]}] is expected; they are of "
                "another model, so embed the pictures with this one"
            )
        return rows.astype(np.float64)


def _check_size(file: ZipFile) -> None:
    size = sum(member.file_size for member in file.infolist())
    if size > _LARGEST:
        raise ValueError(f"it would unpack to {size:,} bytes and at most {_LARGEST:,} are read")


def _checked_threshold(threshold: float) -> float:
    if not 0 <= threshold <= 1:
        raise UsageError(
            f"threshold {threshold:g} is no probability; every or no picture would be named, so use 0 to 1"
        )
    return float(threshold)


def _means(rows: Rows, targets: NDArray[np.int64], classes: int, asked: Rows, _: float) -> Rows:
    """Log-densities of Gaussian classes with one covariance, but for what all classes share; equal priors."""
    means = np.stack(
        [rows[targets == k].mean(0) if (targets == k).any() else np.zeros(rows.shape[1]) for k in range(classes)]
    )
    centred = rows - means[targets]
    count, width = rows.shape
    covariance = centred.T @ centred / max(1, count - 1)
    inverse = width * np.linalg.inv((count - 1) * covariance + max(np.trace(covariance), 1e-12) * np.eye(width))
    weights = means @ inverse
    return asked @ weights.T - 0.5 * np.einsum("kd,kd->k", weights, means)


def _cache(rows: Rows, targets: NDArray[np.int64], classes: int, asked: Rows, sharpness: float) -> Rows:
    votes = np.exp(-sharpness * (1 - asked @ rows.T))
    scores = np.zeros((len(asked), classes))
    for column, target in enumerate(targets):
        scores[:, target] += votes[:, column]
    return scores


_SCORES: dict[str, Callable[[Rows, NDArray[np.int64], int, Rows, float], Rows]] = {"means": _means, "cache": _cache}


def _folds(targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """A fold for each example, every label spread over them, so that a label with two examples is always seen once."""
    order = np.empty(len(targets), np.int64)
    for label in np.unique(targets):
        places = np.flatnonzero(targets == label)
        order[places] = np.arange(len(places))
    return order % min(_FOLDS, max(2, int(order.max()) + 1))


def _held_out(
    method: Method, rows: Rows, targets: NDArray[np.int64], classes: int, folds: NDArray[np.int64], sharpness: float
) -> Rows:
    """The score of every example by a head made of the other folds."""
    scores = np.zeros((len(rows), classes))
    for fold in np.unique(folds):
        out = folds == fold
        scores[out] = _SCORES[method](rows[~out], targets[~out], classes, rows[out], sharpness)
    return scores


def _softmax(logits: Rows) -> Rows:
    shares: Rows = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    return shares / shares.sum(axis=1, keepdims=True)


def _nll(logits: Rows, targets: NDArray[np.int64]) -> float:
    peak = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - peak).sum(axis=1)) + peak[:, 0]
    return float((total - logits[np.arange(len(targets)), targets]).mean())


def _calibration_error(logits: Rows, targets: NDArray[np.int64], bins: int = 10) -> float:
    shares = _softmax(logits)
    sure, right = shares.max(1), shares.argmax(1) == targets
    place = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [abs(sure[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in np.unique(place)]
    return float(sum(gaps))


def _least(loss: Callable[[float], float], low: float, high: float, steps: int = 60) -> float:
    """Where a function of one dip is least, by golden section."""
    ratio = (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    for _ in range(steps):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return (low + high) / 2
