"""Check a runtime against the vectors that a bundle carries; docs/conformance.md is the format and the rules in words.

`conformance/vectors.json` (paths are relative to the bundle folder; fields with ? may be absent)::

    {"schema": "1.1",
     "images": [{"name": ..., "note": ..., "bytes_file": encoded picture, "lossy": whether decoders may differ,
                 "decoded": {"height": H, "width": W, "sha256": ..., "file"?: raw uint8 [H, W, 3], upright, RGB},
                 "pixels_sha256": ..., "pixels_file"?: raw uint8 [S, S, 3], "embedding": [D floats of the reference]}],
     "texts": [{"name": ..., "text": ..., "ids": [L ints], "embedding": [D floats of the reference]}],
     "refused_images": [{"name": ..., "note": ..., "bytes_file": ..., "reason": ...}],
     "refused_texts": [{"name": ..., "note": ..., "text": ..., "reason": ...}],
     "retrieval": null or {"k": ..., "images": [names], "texts": [names], "margin": {precision: cosine},
                           "text_to_image": [{"query": name, "order": [all names, best first], "scores": [cosines]}],
                           "image_to_text": [the same the other way]},
     "tolerance": {"fp32": largest 1 - cosine, "fp16": ..., "int8": ...}}

Schema 1.0 had neither `decoded`, `lossy`, refusals nor retrieval, and every case had a `pixels_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketvlm.edge.bundle import Bundle, check_schema_version
from pocketvlm.edge.errors import BadSampleError, IntegrityError, PocketvlmError
from pocketvlm.edge.model import BackendName, EdgeModel
from pocketvlm.edge.preprocess import decode_image, load_image, resize_image

VECTORS_SCHEMA = "1.1"

# largest 1 - cosine where the vectors state none: the starting budgets of the parity check (its 99th percentile where
# it has one, else twice its mean)
DEFAULT_TOLERANCE = {
    "fp32": 1e-6, "fp16": 1e-4, "w8": 0.002, "palette8": 0.002, "mixed": 0.02, "int8": 0.02,
    "w8a8-dynamic": 0.02, "w8a8-static": 0.02, "palette6": 0.02, "w4": 0.06, "palette4": 0.06,
}  # fmt: skip
# mean difference in grey levels that another decoder of lossy pictures may have from the recorded one: a few for
# another inverse transform or chroma filter; a picture turned, mirrored or of inverted ink is tens away
LOSSY_MEAN = 8.0


@dataclass(frozen=True)
class StageResult:
    """One stage over all cases; the stages are those of docs/conformance.md.

    worst: S0 the largest difference in grey levels, S1 the largest number of differing ids, S3 and S4 the largest
    1 - cosine, S5 the largest loss in reference score; NaN where a case broke, or differs from a recorded hash. budget:
    what is allowed. failures: one line per failed case. notes: what is told and not judged. A stage without cases has
    failed.
    """

    stage: str
    passed: bool
    cases: int
    worst: float
    budget: float
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def first_failing(stages: Sequence[StageResult]) -> StageResult | None:
    """The earliest stage that failed; later ones build on it, so it is where to look."""
    return next((stage for stage in stages if not stage.passed), None)


def check_conformance(
    bundle: str | Path | Bundle,
    backend: BackendName = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> list[StageResult]:
    """Run every conformance vector of a bundle through one runtime, stage by stage.

    A failing case is a result, not an exception; a missing or malformed vector file is an exception.

    Returns:
        The stages that the model and the variant have, in order; of vectors of schema 1.0 those that they cover.

    Raises:
        IntegrityError: there are no vectors or they are malformed.
        VersionError: the vectors are newer than this release.
        PocketvlmError: the bundle or the runtime cannot be loaded, see `EdgeModel.load`.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    vectors = opened.conformance()
    check_schema_version(vectors.get("schema"), "conformance vectors", VECTORS_SCHEMA)
    model = EdgeModel.load(opened, backend, precision, threads)
    try:
        return _Runner(model, vectors).run()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, PocketvlmError):
            raise
        raise IntegrityError(
            f"the conformance vectors lack or garble a field ({type(error).__name__}: {error}); "
            "nothing can be compared, so export the bundle again"
        ) from error


class _Runner:
    def __init__(self, model: EdgeModel, vectors: dict[str, Any]) -> None:
        self.model = model
        self.images: list[dict[str, Any]] = vectors.get("images", [])
        self.texts: list[dict[str, Any]] = vectors.get("texts", [])
        self.vectors = vectors
        self.complete = vectors["schema"] != "1.0"
        self.precision = model.variant.precision
        self.budget = self._stated(vectors.get("tolerance"))
        self.notes: list[str] = []
        self.rows: dict[tuple[str, str], NDArray[np.float64]] = {}

    def run(self) -> list[StageResult]:
        contract, files = self.model.contract, self.model.variant.files
        stages = []
        with_pixels = [case for case in self.images if not self.complete or "pixels_file" in case]
        if contract.image is not None:
            if self.complete:
                with_decoded = [case for case in self.images if "file" in case["decoded"]]
                stages.append(self._stage("S0 decode", self.images, self._decode, 0.0))
                # without a lossy picture there is nothing that the next stage would not show
                if with_decoded or not self.images:
                    stages.append(self._stage("S0 resize", with_decoded, self._resize, 0.0))
            stages.append(self._stage("S0 pixels", self.images, self._pixels, 0.0))
            if self.complete:
                stages.append(self._stage("S0 refused", self.vectors["refused_images"], self._refused_image, 0.0))
        if contract.text is not None:
            stages.append(self._stage("S1 ids", self.texts, self._ids, 0.0))
            if self.complete:
                stages.append(self._stage("S1 refused", self.vectors["refused_texts"], self._refused_text, 0.0))
        if "image" in files:
            stages.append(self._stage("S3 image graph", with_pixels, self._image_graph, self.budget))
        if "text" in files:
            stages.append(self._stage("S3 text graph", self.texts, self._text_graph, self.budget))
        if "image" in files:
            stages.append(self._stage("S4 image", self.images, self._image_end_to_end, self.budget))
        if "text" in files:
            stages.append(self._stage("S4 text", self.texts, self._text_end_to_end, self.budget))
        if self.complete and "image" in files and "text" in files:
            stages.append(self._retrieval())
        return stages

    def _stated(self, by_precision: dict[str, Any] | None) -> float:
        default = DEFAULT_TOLERANCE.get(self.precision, DEFAULT_TOLERANCE["int8"])
        return float((by_precision or {}).get(self.precision, default))

    # --- S0, S1: exact ----------------------------------------------------------------------------------------------

    def _decode(self, case: dict[str, Any]) -> float:
        found = self._own_decoding(case)
        stated = case["decoded"]
        if found.shape != (stated["height"], stated["width"], 3):
            raise IntegrityError(
                f"it decodes to {found.shape[1]} x {found.shape[0]} pixels and {stated['width']} x {stated['height']} "
                "are recorded; orientation or frame is read otherwise, so look there"
            )
        if hashlib.sha256(found.tobytes()).hexdigest() == stated["sha256"]:
            return 0.0
        if not case["lossy"]:
            # what differs by how much is for the next stage to say, whose pixels are recorded
            return float("nan")
        difference = np.abs(found.astype(np.int32) - self._recorded_decoding(case))
        told = (
            f"{case['name']}: decoded otherwise, mean {difference.mean():.2f}, at most {difference.max()} grey levels"
        )
        self.notes.append(told)
        if difference.mean() > LOSSY_MEAN:
            raise IntegrityError(f"mean {difference.mean():.1f} grey levels away, more than {LOSSY_MEAN:g}")
        return 0.0

    def _resize(self, case: dict[str, Any]) -> float:
        assert self.model.contract.image is not None
        return self._against_pixels(case, resize_image(self._recorded_decoding(case), self.model.contract.image))

    def _pixels(self, case: dict[str, Any]) -> float:
        assert self.model.contract.image is not None
        return self._against_pixels(case, load_image(self._source(case), self.model.contract.image))

    def _against_pixels(self, case: dict[str, Any], found: NDArray[np.uint8]) -> float:
        if "pixels_file" in case:
            return float(np.abs(found.astype(np.int32) - self._recorded_pixels(case)).max())
        return 0.0 if hashlib.sha256(found.tobytes()).hexdigest() == case["pixels_sha256"] else float("nan")

    def _refused_image(self, case: dict[str, Any]) -> float:
        return _must_refuse(lambda: self._own_decoding(case), case)

    def _ids(self, case: dict[str, Any]) -> float:
        assert self.model.tokenizer is not None
        found = self.model.tokenizer.encode([case["text"]])[0].tolist()
        return float(sum(a != b for a, b in zip(found, case["ids"])) + abs(len(found) - len(case["ids"])))

    def _refused_text(self, case: dict[str, Any]) -> float:
        assert self.model.tokenizer is not None
        return _must_refuse(partial(self.model.tokenizer.encode, [case["text"]]), case)

    # --- S3, S4: within a tolerance ---------------------------------------------------------------------------------

    def _image_graph(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_pixels(self._recorded_pixels(case)[None]))

    def _text_graph(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_ids(np.array([case["ids"]], np.int32)))

    def _image_end_to_end(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_image(self._source(case)), keep="image")

    def _text_end_to_end(self, case: dict[str, Any]) -> float:
        return self._distance(case, self.model.embed_text(case["text"]), keep="text")

    def _distance(self, case: dict[str, Any], found: NDArray[np.float32], keep: str = "") -> float:
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
        if keep and "name" in case:
            self.rows[keep, case["name"]] = row
        lengths = np.linalg.norm(expected) * np.linalg.norm(row)
        if self.model.contract.kind == "classifier":
            return float(np.square(expected - row).sum() / (2 * lengths))
        return float(1.0 - expected @ row / lengths)

    # --- S5: the task -----------------------------------------------------------------------------------------------

    def _retrieval(self) -> StageResult:
        task = self.vectors["retrieval"]
        margin = float(task["margin"].get(self.precision, task["margin"]["int8"])) if task else 0.0
        queries = [
            {"name": f"{row['query']} ({way})", "row": row, "towers": towers}
            for way, towers in (("text to image", ("text", "image")), ("image to text", ("image", "text")))
            for row in (task or {}).get(way.replace(" ", "_"), [])
        ]
        return self._stage("S5 retrieval", queries, lambda query: self._rank(task["k"], query), margin)

    def _rank(self, k: int, query: dict[str, Any]) -> float:
        """What the found top k loses in reference score, at its worst place."""
        asked, (tower, gallery) = query["row"], query["towers"]
        names = asked["order"]
        try:
            found = np.array([self.rows[tower, asked["query"]] @ self.rows[gallery, name] for name in names])
        except KeyError as error:
            raise IntegrityError(f"{error.args[0][1]!r} has no embedding, as its case broke") from error
        best = np.argsort(-found, kind="stable")[:k]
        scores = np.array(asked["scores"], np.float64)
        if self.model.dim < len(self.images[0]["embedding"]):  # recorded scores are of the full width
            scores = self._prefix_scores(tower, asked["query"], gallery, names)
        return float(np.max(np.sort(scores)[::-1][: len(best)] - scores[best]))

    def _prefix_scores(self, tower: str, query: str, gallery: str, names: Sequence[str]) -> NDArray[np.float64]:
        cases = {"image": self.images, "text": self.texts}
        rows = {}
        for part in (tower, gallery):
            for case in cases[part]:
                row = np.array(case["embedding"][: self.model.dim], np.float64)
                rows[part, case.get("name")] = row / np.linalg.norm(row)
        return np.array([rows[tower, query] @ rows[gallery, name] for name in names])

    # --- files ------------------------------------------------------------------------------------------------------

    def _source(self, case: dict[str, Any]) -> bytes | NDArray[np.uint8]:
        """The encoded bytes; of a lossy picture that is decoded otherwise here, the recorded decoding."""
        data = self._file(case["bytes_file"]).read_bytes()
        if (
            case.get("lossy")
            and hashlib.sha256(self._own_decoding(case).tobytes()).hexdigest() != case["decoded"]["sha256"]
        ):
            return self._recorded_decoding(case)
        return data

    def _own_decoding(self, case: dict[str, Any]) -> NDArray[np.uint8]:
        assert self.model.contract.image is not None
        data = self._file(case["bytes_file"]).read_bytes()
        return decode_image(data, background=self.model.contract.image.background)

    def _recorded_decoding(self, case: dict[str, Any]) -> NDArray[np.uint8]:
        stated = case["decoded"]
        return self._raw(stated["file"], stated["sha256"], (stated["height"], stated["width"], 3))

    def _recorded_pixels(self, case: dict[str, Any]) -> NDArray[np.uint8]:
        size = self.model.contract.image.size if self.model.contract.image else 0
        return self._raw(case["pixels_file"], case["pixels_sha256"], (size, size, 3))

    def _raw(self, name: str, sha256: str, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        data = self._file(name).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256 or len(data) != shape[0] * shape[1] * shape[2]:
            raise IntegrityError(
                f"{name} is not the recorded uint8 {list(shape)}; "
                "there is nothing to compare with, so export the bundle again"
            )
        return np.frombuffer(data, np.uint8).reshape(shape)

    def _file(self, name: str) -> Path:
        bundle = self.model.bundle
        beside = PurePosixPath(bundle.raw["conformance"]).parent / name
        return bundle.path(name if name in bundle.raw["files"] else beside.as_posix())

    def _stage(
        self, name: str, cases: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], float], budget: float
    ) -> StageResult:
        values, failures = [], []
        self.notes.clear()
        for index, case in enumerate(cases):
            label = repr(case.get("name", case.get("text", index)))
            try:
                value = measure(case)
                if not value <= budget:  # also true for NaN
                    failures.append(f"{label}: {_shown(value, budget)}")
            except PocketvlmError as error:
                value = float("nan")
                failures.append(f"{label}: {error}")
            values.append(value)
        if not cases:
            failures.append("there is no case for this stage, so nothing was shown")
        worst = float("nan") if not values or np.isnan(values).any() else max(values)
        return StageResult(name, not failures, len(cases), worst, budget, tuple(failures), tuple(self.notes))


def _shown(value: float, budget: float) -> str:
    return "differs from what is recorded" if np.isnan(value) else f"{value:.3g} exceeds {budget:.3g}"


def _must_refuse(take: Callable[[], object], case: dict[str, Any]) -> float:
    try:
        take()
    except BadSampleError as error:
        if error.reason == case["reason"]:
            return 0.0
        raise IntegrityError(f"it is refused as {error.reason!r} and {case['reason']!r} is recorded") from error
    raise IntegrityError(f"it is taken and must be refused as {case['reason']!r}: {case['note']}")
