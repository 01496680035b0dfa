"""Check a runtime against the vectors that a bundle carries; the Python counterpart of the ones on phones.

Format of `conformance/vectors.json` (paths are relative to the bundle folder, numbers are JSON numbers)::

    {"schema": "1.0",
     "images": [{"name": ..., "bytes_file": encoded image, "pixels_file": raw uint8 [S, S, 3] as decoded and resized,
                 "pixels_sha256": ..., "embedding": [D floats of the reference]}],
     "texts": [{"text": ..., "ids": [L ints], "embedding": [D floats of the reference]}],
     "tolerance": {"fp32": largest 1 - cosine, "fp16": ..., "int8": ...}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.bundle import Bundle, check_schema_version
from pocketvlm.edge.errors import IntegrityError, PocketvlmError
from pocketvlm.edge.model import BackendName, EdgeModel
from pocketvlm.edge.preprocess import load_image

VECTORS_SCHEMA = "1.0"

# largest 1 - cosine where the vectors state none: the starting budgets of the parity check (its 99th percentile where
# it has one, else twice its mean)
DEFAULT_TOLERANCE = {
    "fp32": 1e-6, "fp16": 1e-4, "w8": 0.002, "palette8": 0.002, "mixed": 0.02, "int8": 0.02,
    "w8a8-dynamic": 0.02, "w8a8-static": 0.02, "palette6": 0.02, "w4": 0.06, "palette4": 0.06,
}  # fmt: skip


@dataclass(frozen=True)
class StageResult:
    """One stage over all cases.

    stage: "S0 pixels", "S1 ids" (exact), "S3 image graph", "S3 text graph" (from recorded pixels and ids),
    "S4 image", "S4 text" (from bytes and strings). worst: for S0 the largest difference in grey levels, for S1 the
    largest number of differing ids, else the largest 1 - cosine; NaN where a case broke. budget: what is allowed.
    failures: one line per failed case. A stage without cases has failed.
    """

    stage: str
    passed: bool
    cases: int
    worst: float
    budget: float
    failures: tuple[str, ...] = ()


def check_conformance(
    bundle: str | Path | Bundle,
    backend: BackendName = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> list[StageResult]:
    """Run every conformance vector of a bundle through one runtime, stage by stage.

    A failing case is a result, not an exception; a missing or malformed vector file is an exception.

    Returns:
        The stages that the model and the variant have, in order.

    Raises:
        IntegrityError: there are no vectors or they are malformed.
        PocketvlmError: the bundle or the runtime cannot be loaded, see `EdgeModel.load`.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    vectors = opened.conformance()
    check_schema_version(vectors.get("schema"), "conformance vectors", VECTORS_SCHEMA)
    model = EdgeModel.load(opened, backend, precision, threads)
    try:
        return _Runner(model, vectors).run()
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"the conformance vectors lack or garble a field ({type(error).__name__}: {error}); "
            "nothing can be compared, so export the bundle again"
        ) from error


class _Runner:
    def __init__(self, model: EdgeModel, vectors: dict[str, Any]) -> None:
        self.model = model
        self.images: list[dict[str, Any]] = vectors.get("images", [])
        self.texts: list[dict[str, Any]] = vectors.get("texts", [])
        precision = model.variant.precision
        stated = vectors.get("tolerance") or {}
        self.budget = float(stated.get(precision, DEFAULT_TOLERANCE.get(precision, DEFAULT_TOLERANCE["int8"])))

    def run(self) -> list[StageResult]:
        contract, files = self.model.contract, self.model.variant.files
        stages = []
        if contract.image is not None:
            stages.append(_stage("S0 pixels", self.images, self._pixels, 0.0))
        if contract.text is not None:
            stages.append(_stage("S1 ids", self.texts, self._ids, 0.0))
        if "image" in files:
            stages.append(_stage("S3 image graph", self.images, self._image_graph, self.budget))
        if "text" in files:
            stages.append(_stage("S3 text graph", self.texts, self._text_graph, self.budget))
        if "image" in files:
            stages.append(_stage("S4 image", self.images, self._image_end_to_end, self.budget))
        if "text" in files:
            stages.append(_stage("S4 text", self.texts, self._text_end_to_end, self.budget))
        return stages

    def _recorded_pixels(self, case: dict[str, Any]) -> NDArray[np.uint8]:
        data = self._file(case["pixels_file"]).read_bytes()
        size = self.model.contract.image.size if self.model.contract.image else 0
        if hashlib.sha256(data).hexdigest() != case["pixels_sha256"] or len(data) != size * size * 3:
            raise IntegrityError(
                f"{case['pixels_file']} is not the recorded uint8 [{size}, {size}, 3]; "
                "there is nothing to compare with, so export the bundle again"
            )
        return np.frombuffer(data, np.uint8).reshape(size, size, 3)

    def _pixels(self, case: dict[str, Any]) -> float:
        assert self.model.contract.image is not None
        found = load_image(self._file(case["bytes_file"]).read_bytes(), self.model.contract.image)
        return float(np.abs(found.astype(np.int32) - self._recorded_pixels(case)).max())

    def _ids(self, case: dict[str, Any]) -> float:
        assert self.model.tokenizer is not None
        found = self.model.tokenizer.encode([case["text"]])[0].tolist()
        return float(sum(a != b for a, b in zip(found, case["ids"])) + abs(len(found) - len(case["ids"])))

    def _image_graph(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_pixels(self._recorded_pixels(case)[None]))

    def _text_graph(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_ids(np.array([case["ids"]], np.int32)))

    def _image_end_to_end(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_image(self._file(case["bytes_file"]).read_bytes()))

    def _text_end_to_end(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_text(case["text"]))

    def _distance(self, case: dict[str, Any], found: NDArray[np.float32]) -> float:
        """1 - cosine in float64; a variant with a narrower embedding is compared with that prefix.

        Logits mean something by their length too: |a - b|^2 / (2 |a| |b|), which is 1 - cosine at equal lengths.
        """
        expected = np.array(case["embedding"], np.float64)[: self.model.dim]
        row = found[0].astype(np.float64)
        if expected.shape != row.shape:
            raise IntegrityError(
                f"the recorded embedding has width {len(expected)} and the model gives {len(row)}; "
                "they cannot be compared, so export the bundle again"
            )
        lengths = np.linalg.norm(expected) * np.linalg.norm(row)
        if self.model.contract.kind == "classifier":
            return float(np.square(expected - row).sum() / (2 * lengths))
        return float(1.0 - expected @ row / lengths)

    def _file(self, name: str) -> Path:
        bundle = self.model.bundle
        beside = PurePosixPath(bundle.raw["conformance"]).parent / name
        return bundle.path(name if name in bundle.raw["files"] else beside.as_posix())


def _stage(
    name: str, cases: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], float], budget: float
) -> StageResult:
    values, failures = [], []
    for index, case in enumerate(cases):
        label = repr(case.get("name", case.get("text", index)))
        try:
            value = measure(case)
            if not value <= budget:  # also true for NaN
                failures.append(f"{label}: {value:.3g} exceeds {budget:.3g}")
        except PocketvlmError as error:
            value = float("nan")
            failures.append(f"{label}: {error}")
        values.append(value)
    if not cases:
        failures.append("there is no case for this stage, so nothing was shown")
    worst = float("nan") if not values or np.isnan(values).any() else max(values)
    return StageResult(name, not failures, len(cases), worst, budget, tuple(failures))
