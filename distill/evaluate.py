"""Score any pair of towers on any data by one code path: a teacher, a student in torch, or a shipped bundle.

The headline is retrieval with both towers the model's own. Pairings of the model's pictures with the teacher's
texts (and the reverse) are reported beside it under "mixed" and never replace it. Flags (`tags["flag"] == "1"`)
are scored apart: they are neither queries nor candidates of the headline. Per-query results are kept, so that
runs can be pooled and compared pair by pair later (`distill.metrics.paired_bootstrap`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.sample import Sample
from pocketvlm.distill import metrics
from pocketvlm.edge.errors import BadSampleError, UsageError

SCHEMA = "1.0"
METRICS = ("retrieval", "zeroshot", "neighbours", "mixed")
TEMPLATES = ("{}", "a picture of {}", "an icon of {}")
TAGS = ("style", "category")
KS = (1, 5, 10)
TOP = 5

Array = NDArray[Any]


class Encoder(Protocol):
    """What is scored: `edge.model.EdgeModel` fits as it is; `encoders` wraps students and teachers.

    embed_image: decoded uint8 [H, W, 3] arrays -> float32 [N, D]. embed_text: strings -> float32 [N, D].
    """

    def embed_image(self, x: Any, /) -> Array: ...

    def embed_text(self, x: Any, /) -> Array: ...


@dataclass(frozen=True)
class Questions:
    """What a data set asks: pictures, the texts of each language, and which belong together.

    samples: the pictures, flags included. texts: every text that any part needs, each once.
    left_out: what was left out of the data before, counted by reason.
    """

    name: str
    samples: tuple[Sample, ...]
    language: str
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    texts: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: Iterable[Sample], *, name: str = "data", templates: Sequence[str] = TEMPLATES) -> Questions:
        """Collect them; the headline language is English where there is any, else the most frequent one."""
        pictures = tuple(samples)
        for template in templates:
            if "{}" not in template:
                raise UsageError(
                    f"prompt template {template!r} has no {{}} for the label, so every class would get the same "
                    "text; write for instance 'a picture of {}'"
                )
        counts: dict[str, int] = {}
        for sample in pictures:
            for caption in sample.captions:
                counts[caption.language] = counts.get(caption.language, 0) + 1
        languages = tuple(sorted(counts, key=lambda tag: (tag != "en", -counts[tag], tag)))
        labels = tuple(sorted({s.label for s in pictures if s.label and not is_flag(s)}))
        texts = dict.fromkeys(c.text for s in pictures for c in s.captions)
        if len(labels) > 1:
            texts |= dict.fromkeys(_prompt(template, label) for label in labels for template in templates)
        return cls(name, pictures, languages[0] if languages else "", languages, labels, tuple(templates), tuple(texts))


@dataclass
class Embedded:
    """One model's answers. images: float32 [N, D] for `uids`. texts: float32 [M, D] for `Questions.texts`.

    bad: pictures that could not be decoded, (uid, reason)."""

    name: str
    space_id: str
    uids: list[str]
    images: Array
    texts: Array
    bad: list[tuple[str, str]] = field(default_factory=list)


def _prompt(template: str, label: str) -> str:
    # not str.format: a label or a template may hold other braces
    return template.replace("{}", label)


def is_flag(sample: Sample) -> bool:
    return sample.tags.get("flag") == "1"


def embed_questions(encoder: Encoder, questions: Questions, *, name: str, batch_size: int = 64) -> Embedded:
    """Run both towers over everything that is asked; pictures that cannot be decoded are left out and listed."""
    from pocketvlm.edge.preprocess import decode_image

    uids: list[str] = []
    bad: list[tuple[str, str]] = []
    rows: list[Array] = []
    for start in range(0, len(questions.samples), batch_size):
        pixels = []
        for sample in questions.samples[start : start + batch_size]:
            try:
                pixels.append(decode_image(sample.image.read()))
                uids.append(sample.uid)
            except BadSampleError as error:
                bad.append((sample.uid, error.reason))
        if pixels:
            rows.append(np.asarray(encoder.embed_image(pixels), np.float32))
    if not rows:
        raise UsageError(
            f"no picture of {questions.name} could be decoded ({len(bad)} tried), so there is nothing to score; "
            "check the image paths of the data"
        )
    texts = [
        np.asarray(encoder.embed_text(list(questions.texts[start : start + batch_size])), np.float32)
        for start in range(0, len(questions.texts), batch_size)
    ]
    images = np.concatenate(rows)
    return Embedded(
        name=name,
        space_id=_space_id(encoder),
        uids=uids,
        images=images,
        texts=np.concatenate(texts) if texts else np.zeros((0, images.shape[1]), np.float32),
        bad=bad,
    )


def _space_id(encoder: Encoder) -> str:
    contract = getattr(encoder, "contract", None)
    return str(getattr(encoder, "space_id", "") or getattr(contract, "space_id", ""))


@dataclass
class Evaluation:
    """Results. values: JSON tree. queries: per-query arrays ("model/image_to_text/rank", ...; see docs)."""

    values: dict[str, Any] = field(repr=False)
    queries: dict[str, Array] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return self.values

    def save(self, folder: Path, *, stem: str = "eval") -> Path:
        """Write `eval.json` and `eval_queries.npz` into `folder`; returns the JSON file."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stem}.json"
        path.write_text(json.dumps(self.values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        np.savez_compressed(folder / f"{stem}_queries.npz", **self.queries)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, folder: Path, *, stem: str = "eval") -> Evaluation:
        """Read what `save` wrote."""
        try:
            values = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
            with np.load(folder / f"{stem}_queries.npz", allow_pickle=False) as arrays:
                return cls(values, {key: arrays[key] for key in arrays.files})
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{folder} holds no readable {stem}.json with {stem}_queries.npz ({error}); "
                "run the evaluation again, or name the folder of a finished run"
            ) from error

    def hits(self, direction: str = "image_to_text", k: int = 5, side: str = "model") -> Array:
        """float64 [Q]: 1 where a match was among the first k; what `paired_bootstrap` takes."""
        return (self.queries[f"{side}/{direction}/rank"] <= k).astype(np.float64)

    def table(self) -> Any:
        """A rich table: one row per metric; model, teacher and retention side by side."""
        from rich.table import Table

        teacher = self.values.get("teacher")
        title = f"{self.values['model_name']} on {self.values['data']['name']}"
        table = Table(title=title, caption=_caption(self.values))
        table.add_column("part")
        table.add_column("metric")
        table.add_column("model", justify="right")
        if teacher:
            table.add_column("teacher", justify="right")
            table.add_column("retention", justify="right")
        for part, metric, own, other, kept in rows_of(self.values):
            cells = [part, metric, own]
            table.add_row(*([*cells, other, kept] if teacher else cells))
        return table


def rows_of(values: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """(part, metric, model, teacher, retention) as text, for tables on a terminal and in the report."""
    rows = []
    teacher, kept = values.get("teacher") or {}, values.get("retention") or {}
    for part in ("image_to_text", "text_to_image", "zero_shot"):
        own = values["model"].get(part)
        if not own:
            continue
        for metric in [key for key in own if key.startswith(("R@", "top-")) or key in ("MAP", "median_rank")]:
            other = teacher.get(part, {}).get(metric)
            share = kept.get(part, {}).get(metric)
            rows.append(
                (part.replace("_", " "), metric, _show(metric, own[metric]), _show(metric, other), _percent(share))
            )
    return rows


def _show(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if metric == "median_rank" else f"{100 * value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _caption(values: dict[str, Any]) -> str:
    own = values["model"].get("image_to_text") or values["model"].get("zero_shot") or {}
    candidates = int(own.get("gallery", 0))
    said = f"per cent; {int(own.get('queries', 0))} pictures, {candidates} candidates, ties against the model"
    gone = left_out(values)
    return f"{said}; left out: {gone}" if gone else said


def left_out(values: dict[str, Any]) -> str:
    """What was not scored and why ("2 too-long-text, 1 undecodable"), empty where nothing was left out."""
    # earlier files have no count of what the readers left out
    return _listed(Counter(values["data"].get("left_out", {})) + Counter(values["data"]["bad_reasons"]))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def evaluate_model(
    model: Encoder,
    data: Any,
    *,
    teacher: Encoder | None = None,
    name: str = "model",
    teacher_name: str = "teacher",
    metrics_wanted: Sequence[str] = METRICS,
    templates: Sequence[str] = TEMPLATES,
    tags: Sequence[str] = TAGS,
    batch_size: int = 64,
) -> Evaluation:
    """Embed `data` (a DataSource or samples) by `model` and, where given, `teacher`; then score.

    Raises:
        UsageError: no picture could be read, or nothing can be asked of the data (no captions and no labels).
    """
    questions = questions_of(data, templates=templates)
    own = embed_questions(model, questions, name=name, batch_size=batch_size)
    other = None
    if teacher is not None:
        other = embed_questions(teacher, questions, name=teacher_name, batch_size=batch_size)
    return score(questions, own, other, metrics_wanted=metrics_wanted, tags=tags)


def evaluate_path(model: str | Path, data: Any, **options: Any) -> Evaluation:
    """Score a run folder, a student folder or a bundle; see `distill.encoders.evaluate_path` for the options."""
    # encoders imports torch and this module; scoring a bundle's saved embeddings needs neither
    from pocketvlm.distill import encoders

    return encoders.evaluate_path(model, data, **options)


def questions_of(data: Any, *, templates: Sequence[str] = TEMPLATES) -> Questions:
    samples = data.samples if hasattr(data, "samples") else data
    questions = Questions.of(samples, name=getattr(data, "name", "data"), templates=templates)
    return replace(questions, left_out=dict(data.report.counts)) if hasattr(data, "report") else questions


def score(
    questions: Questions,
    model: Embedded,
    teacher: Embedded | None = None,
    *,
    metrics_wanted: Sequence[str] = METRICS,
    tags: Sequence[str] = TAGS,
) -> Evaluation:
    """Score embeddings that exist already; see `evaluate_model`."""
    board = _Board(questions, model, teacher)
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "model_name": model.name,
        "teacher_name": teacher.name if teacher else None,
        "data": {
            "name": questions.name,
            "pictures": len(board.headline),
            "flags": len(board.flags),
            "bad": len(model.bad),
            "bad_reasons": dict(Counter(reason for _, reason in model.bad)),
            "left_out": dict(sorted(questions.left_out.items())),
            "language": questions.language,
        },
        "model": board.part("model", model, model, headline=True, wanted=metrics_wanted),
    }
    if not values["model"]:
        gone = f" (left out: {_listed(questions.left_out)})" if questions.left_out else ""
        raise UsageError(
            f"{questions.name} has neither captions nor two different labels{gone}, so there is nothing to score; "
            "give data with captions, or with a label column"
        )
    if teacher is not None:
        values["teacher"] = board.part("teacher", teacher, teacher, headline=True, wanted=metrics_wanted)
        values["retention"] = {
            key: metrics.retention(values["model"][key], values["teacher"][key]) for key in values["model"]
        }
        if "neighbours" in metrics_wanted:
            values["neighbours"] = board.neighbours()
        if "mixed" in metrics_wanted and "retrieval" in metrics_wanted:
            values["mixed"] = board.mixed(metrics_wanted)
    if "retrieval" in metrics_wanted and questions.language:
        values["by_tag"] = board.by_tag(tags)
        values["by_language"] = board.by_language()
        values["flags"] = board.score_flags()
    return Evaluation(values, board.queries)


class _Board:
    """The score sheet of one evaluation: which rows take part, and the per-query results as they come."""

    def __init__(self, questions: Questions, model: Embedded, teacher: Embedded | None) -> None:
        self.questions, self.model, self.teacher = questions, model, teacher
        self.text_row = {text: row for row, text in enumerate(questions.texts)}
        readable = set(model.uids) & set(teacher.uids if teacher else model.uids)
        kept = [sample for sample in questions.samples if sample.uid in readable]
        self.headline = [sample for sample in kept if not is_flag(sample)]
        self.flags = [sample for sample in kept if is_flag(sample)]
        self.queries: dict[str, Array] = {}

    def _images(self, embedded: Embedded, samples: Sequence[Sample]) -> Array:
        row = {uid: index for index, uid in enumerate(embedded.uids)}
        return embedded.images[[row[sample.uid] for sample in samples]]

    def _texts(self, embedded: Embedded, texts: Sequence[str]) -> Array:
        return embedded.texts[[self.text_row[text] for text in texts]]

    def pairs(self, samples: Sequence[Sample], language: str) -> tuple[list[Sample], list[str], list[list[int]]]:
        """Pictures with a text in `language`, its distinct texts, and each picture's text indices."""
        pictures, links = [], []
        index: dict[str, int] = {}
        for sample in samples:
            own = dict.fromkeys(c.text for c in sample.captions if c.language == language)
            if own:
                pictures.append(sample)
                links.append([index.setdefault(text, len(index)) for text in own])
        return pictures, list(index), links

    def retrieve(
        self, images: Embedded, texts: Embedded, samples: Sequence[Sample], language: str, side: str = ""
    ) -> dict[str, dict[str, float]]:
        pictures, gallery, links = self.pairs(samples, language)
        if not pictures:
            return {}
        back: list[list[int]] = [[] for _ in gallery]
        for picture, indices in enumerate(links):
            for index in indices:
                back[index].append(picture)
        x, t = self._images(images, pictures), self._texts(texts, gallery)
        forward, reverse = metrics.retrieval(x, t, links), metrics.retrieval(t, x, back)
        if side:
            self.queries["image_to_text/uid"] = np.array([sample.uid for sample in pictures])
            self.queries["text_to_image/text"] = np.array(gallery)
            for direction, result in (("image_to_text", forward), ("text_to_image", reverse)):
                self.queries[f"{side}/{direction}/rank"] = result.rank
                self.queries[f"{side}/{direction}/ap"] = result.ap
            self.queries[f"{side}/image_to_text/top"] = _top(x, t)
        return {"image_to_text": forward.summary(KS), "text_to_image": reverse.summary(KS)}

    def classify(self, images: Embedded, texts: Embedded, side: str) -> dict[str, float]:
        labels, templates = self.questions.labels, self.questions.templates
        samples = [sample for sample in self.headline if sample.label]
        if len(labels) < 2 or not samples:
            return {}
        classes = np.mean(
            [metrics.normalize(self._texts(texts, [_prompt(t, label) for label in labels])) for t in templates], axis=0
        )
        index = {label: place for place, label in enumerate(labels)}
        result = metrics.retrieval(
            self._images(images, samples), classes, [[index[str(sample.label)]] for sample in samples]
        )
        self.queries["zero_shot/uid"] = np.array([sample.uid for sample in samples])
        self.queries[f"{side}/zero_shot/rank"] = result.rank
        values = result.summary((1, 5))
        return {"top-1": values["R@1"], "top-5": values["R@5"]} | {key: values[key] for key in ("queries", "gallery")}

    def part(
        self, side: str, images: Embedded, texts: Embedded, *, headline: bool, wanted: Sequence[str]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if "retrieval" in wanted:
            values |= self.retrieve(images, texts, self.headline, self.questions.language, side if headline else "")
        if "zeroshot" in wanted and (zero_shot := self.classify(images, texts, side)):
            values["zero_shot"] = zero_shot
        return values

    def neighbours(self, k: int = 10) -> dict[str, float]:
        """Mean share of each item's k nearest others on which model and teacher agree, in 0..1."""
        assert self.teacher is not None
        values = {}
        if len(self.headline) > 1:
            per_image = metrics.neighbour_overlap(
                self._images(self.model, self.headline), self._images(self.teacher, self.headline), k=k
            )
            values[f"images@{k}"] = float(per_image.mean())
        texts = self.pairs(self.headline, self.questions.language)[1]
        if len(texts) > 1:
            per_text = metrics.neighbour_overlap(self._texts(self.model, texts), self._texts(self.teacher, texts), k=k)
            values[f"texts@{k}"] = float(per_text.mean())
        return values

    def mixed(self, wanted: Sequence[str]) -> dict[str, Any] | None:
        """Retrieval across models; only where both embed into one space of one width."""
        assert self.teacher is not None
        model, teacher = self.model, self.teacher
        if not model.space_id or model.space_id != teacher.space_id or model.images.shape[1] != teacher.texts.shape[1]:
            return None
        return {
            "model_image_teacher_text": self.part(
                "model_image_teacher_text", model, teacher, headline=True, wanted=wanted
            ),
            "teacher_image_model_text": self.part(
                "teacher_image_model_text", teacher, model, headline=True, wanted=wanted
            ),
        }

    def _sides(self) -> list[tuple[str, Embedded]]:
        return [("model", self.model)] + ([("teacher", self.teacher)] if self.teacher else [])

    def by_tag(self, tags: Sequence[str]) -> dict[str, Any]:
        """Headline results of the pictures that carry each value of a tag; the gallery stays whole."""
        samples = {sample.uid: sample for sample in self.headline}
        uids = self.queries.get("image_to_text/uid", np.array([], str))
        found: dict[str, Any] = {}
        for tag in tags:
            carried = np.array([samples[str(uid)].tags.get(tag, "") for uid in uids])
            values = sorted(set(carried.tolist()) - {""})
            if len(values) < 2:
                continue
            found[tag] = {}
            for value in values:
                rows = carried == value
                found[tag][value] = {
                    side: metrics.QueryResults(
                        self.queries[f"{side}/image_to_text/rank"][rows],
                        self.queries[f"{side}/image_to_text/ap"][rows],
                        len(self.queries["text_to_image/text"]),
                    ).summary(KS)
                    for side, _ in self._sides()
                }
        return found

    def by_language(self) -> dict[str, Any]:
        """Retrieval among the texts of each further language."""
        found = {}
        for language in self.questions.languages:
            if language == self.questions.language:
                continue
            sides = {side: self.retrieve(e, e, self.headline, language) for side, e in self._sides()}
            if sides["model"]:
                found[language] = sides
        return found

    def score_flags(self) -> dict[str, Any] | None:
        if not self.flags:
            return None
        sides = {side: self.retrieve(e, e, self.flags, self.questions.language) for side, e in self._sides()}
        return sides if sides["model"] else None


def _top(images: Array, texts: Array, *, chunk: int = 1024) -> Array:
    """int64 [Q, min(TOP, M)]: the gallery indices that score highest, equal scores by index."""
    x, t = metrics.normalize(images), metrics.normalize(texts)
    k = min(TOP, len(t))
    found = [
        np.argsort(-np.round(x[start : start + chunk] @ t.T, 9), axis=1, kind="stable")[:, :k]
        for start in range(0, len(x), chunk)
    ]
    return np.concatenate(found).astype(np.int64)
