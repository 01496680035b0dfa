"""Score any pair of towers on any data by one code path: a teacher, a student in torch, or a shipped bundle.

The headline is retrieval with both towers the model's own. Pairings of the model's pictures with the teacher's
texts (and the reverse) are reported beside it under "mixed" and never replace it. Flags (`tags["flag"] == "1"`)
are scored apart: they are neither queries nor candidates of the headline. Per-query results are kept, so that
runs can be pooled and compared pair by pair later (`distill.metrics.paired_bootstrap`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketvlm.data.hard_negatives import with_hard_negatives
from pocketvlm.data.source import DataSource
from pocketvlm.distill import metrics
from pocketvlm.distill.asymmetric import rows_of_asymmetric, score_asymmetric
from pocketvlm.distill.board import DEFAULT_METRICS, METRICS, Board, check_metrics
from pocketvlm.distill.questions import (
    TEMPLATES,
    Array,
    Embedded,
    Encoder,
    Questions,
    embed_questions,
    is_flag,
    questions_of,
)
from pocketvlm.edge.errors import UsageError

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "TEMPLATES",
    "Array",
    "Embedded",
    "Encoder",
    "Evaluation",
    "Questions",
    "check_metrics",
    "embed_questions",
    "evaluate_model",
    "evaluate_path",
    "gap_text",
    "is_flag",
    "left_out",
    "listed",
    "questions_of",
    "rows_of",
    "score",
    "show",
]

SCHEMA = "1.1"
TAGS = ("style", "category")


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
        """A rich table: one row per metric; model, teacher, retention and the paired interval side by side."""
        from rich.table import Table

        teacher = self.values.get("teacher")
        title = f"{self.values['model_name']} on {self.values['data']['name']}"
        table = Table(title=title, caption=_caption(self.values))
        table.add_column("part")
        table.add_column("metric")
        table.add_column("model", justify="right")
        if teacher:
            table.add_column(self.values.get("beside", "teacher"), justify="right")
            table.add_column("retention", justify="right")
            table.add_column("difference (95 %)", justify="right")
        for part, metric, own, *others in rows_of(self.values):
            table.add_row(part, metric, own, *(others if teacher else []))
        return table


_COUNTS = ("median_rank", "mean_rank_variance")
_NUMBERS = ("skewness", "distance", "pair_cosine")
_SHOWN = ("R@", "top-", "MAP", "ECE", "unreached", *_COUNTS, *_NUMBERS)


def rows_of(values: dict[str, Any]) -> list[tuple[str, str, str, str, str, str]]:
    """(part, metric, model, teacher, retention, difference) as text, for tables on a terminal and in the report."""
    rows = []
    teacher, kept, gaps = (values.get(key) or {} for key in ("teacher", "retention", "difference"))
    for part, metric, value in listed(values):
        other = teacher.get(part, {}).get(metric)
        share = kept.get(part, {}).get(metric)
        gap = gap_text(metric, gaps.get(part, {}).get(metric))
        row = (part.replace("_", " "), metric.replace("_", " "), show(metric, value))
        rows.append((*row, show(metric, other), _percent(share), gap))
    for part in ("neighbours", "divergence"):
        for what, value in (values.get(part) or {}).items():
            if isinstance(value, float) and what != "temperature":
                shown_as = show("distance" if part == "divergence" else what, value)
                rows.append((part, f"{what}, nats" if part == "divergence" else what, shown_as, "–", "–", "–"))
    return rows + rows_of_asymmetric(values.get("asymmetric"))


def listed(values: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(part, metric, value) of the model's own numbers that tables show."""
    for part, own in values["model"].items():
        for metric, value in own.items():
            shown = f"{metric}_pictures" in own if part == "hard_negatives" else any(mark in metric for mark in _SHOWN)
            if shown and isinstance(value, float) and not metric.endswith("equal_mass"):
                yield part, metric, value


def _unit(metric: str) -> tuple[float, str]:
    """(factor, format) by which a metric is shown: shares in per cent, the rest as they are."""
    if any(mark in metric for mark in _COUNTS):
        return 1, ".0f"
    return (1, ".3f") if any(mark in metric for mark in _NUMBERS) else (100, ".1f")


def show(metric: str, value: float | None) -> str:
    """A number as text, in the unit in which `metric` is shown; a dash for None."""
    factor, form = _unit(metric)
    return "–" if value is None else format(factor * value, form)


def gap_text(metric: str, interval: Mapping[str, float] | None) -> str:
    """A difference with its interval as text, in the unit in which `metric` is shown."""
    if interval is None:
        return "–"
    factor, form = _unit(metric)
    middle, low, high = (format(factor * interval[key], f"+{form}") for key in ("difference", "low", "high"))
    return f"{middle} ({low} to {high})"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _caption(values: dict[str, Any]) -> str:
    own = values["model"].get("image_to_text") or values["model"].get("zero_shot") or {}
    candidates = int(own.get("gallery", 0))
    said = f"per cent; {values['data']['pictures']} pictures"
    if own:
        said = f"per cent; {int(own['queries'])} pictures, {candidates} candidates, ties against the model"
    gone = left_out(values)
    lines = [f"{said}; left out: {gone}" if gone else said]
    lines += [f"not scored: {name.replace('_', ' ')}: {why}" for name, why in values.get("not_scored", {}).items()]
    return "\n".join(lines)


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
    metrics_wanted: Sequence[str] = DEFAULT_METRICS,
    templates: Sequence[str] = TEMPLATES,
    tags: Sequence[str] = TAGS,
    batch_size: int = 64,
) -> Evaluation:
    """Embed `data` (a DataSource or samples) by `model` and, where given, `teacher`; then score.

    metrics_wanted: members of METRICS, or "all". Hard negatives are made from the captions where they are wanted and
    the data brings none; those that it brings are always scored.

    Raises:
        UsageError: no picture could be read, or nothing can be asked of the data (no captions and no labels).
        UnknownNameError: no such metric.
    """
    wanted = check_metrics(metrics_wanted)
    if "hard_negatives" in wanted:
        data = with_hard_negatives(data if isinstance(data, DataSource) else DataSource("data", list(data)))
    questions = questions_of(data, templates=templates)
    own = embed_questions(model, questions, name=name, batch_size=batch_size)
    other = None
    if teacher is not None:
        other = embed_questions(teacher, questions, name=teacher_name, batch_size=batch_size)
    return score(questions, own, other, metrics_wanted=wanted, tags=tags)


def evaluate_path(model: str | Path, data: Any, **options: Any) -> Evaluation:
    """Score a run folder, a student folder or a bundle; see `distill.encoders.evaluate_path` for the options."""
    # encoders imports torch and this module; scoring a bundle's saved embeddings needs neither
    from pocketvlm.distill import encoders

    return encoders.evaluate_path(model, data, **options)


def score(
    questions: Questions,
    model: Embedded,
    teacher: Embedded | None = None,
    *,
    metrics_wanted: Sequence[str] = DEFAULT_METRICS,
    tags: Sequence[str] = TAGS,
) -> Evaluation:
    """Score embeddings that exist already; see `evaluate_model`.

    Raises:
        UsageError: nothing can be asked of the data. UnknownNameError: no such metric.
    """
    wanted = check_metrics(metrics_wanted)
    board = Board(questions, model, teacher)
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
        "model": board.part("model", model, model, wanted),
    }
    if "divergence" in wanted and teacher is None:
        board.not_scored["divergence"] = "there is no teacher to diverge from"
    across = score_asymmetric(board) if "asymmetric" in wanted else None
    if "robustness" in wanted and "retrieval" not in wanted:
        board.not_scored["robustness"] = "it is made of recall, and the metric retrieval was not asked for"
    if not values["model"] and not across and board.not_scored:
        why = "; ".join(f"{name}: {reason}" for name, reason in board.not_scored.items())
        raise UsageError(
            f"nothing of {', '.join(wanted)} can be scored on {questions.name} ({why}); ask for other metrics, such as "
            "retrieval, or give data that has what they need"
        )
    if not values["model"] and not across:
        gone = f" (left out: {_listed(questions.left_out)})" if questions.left_out else ""
        raise UsageError(
            f"{questions.name} has neither captions nor two different labels{gone}, so there is nothing to score; "
            "give data with captions, or with a label column"
        )
    if teacher is not None:
        values["teacher"] = board.part("teacher", teacher, teacher, wanted)
        if "neighbours" in wanted:
            values["neighbours"] = board.neighbours()
        if "divergence" in wanted:
            values["divergence"] = board.divergence()
        if "mixed" in wanted and "retrieval" in wanted:
            values["mixed"] = board.mixed(wanted)
    if across:
        values["asymmetric"] = across
    if "retrieval" in wanted and questions.language:
        values["by_tag"] = board.by_tag(tags)
        values["by_language"] = board.by_language()
        values["flags"] = board.score_flags()
        if "robustness" in wanted:
            for side in ("model", "teacher") if teacher else ("model",):
                if found := board.robustness(values["by_tag"], side):
                    values[side]["robustness"] = found
    if teacher is not None:
        values["retention"] = {
            key: metrics.retention(values["model"][key], values["teacher"].get(key, {})) for key in values["model"]
        }
        intervals = board.differences()
        values["difference"] = {part: found for part, found in intervals.items() if part in values["model"]}
    values["not_scored"] = board.not_scored
    board.keep_units()
    return Evaluation(values, board.queries)
