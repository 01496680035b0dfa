"""Is this teacher any good on *your* data? Scored beside chance and a baseline that a child would call cheating.

The baseline looks at colours only: ridge regression from a colour histogram and an 8 x 8 thumbnail to hashed letter
n-grams of the captions, trained on half of the captioned groups. Teacher and baseline are then compared on the other
half, query by query. A teacher that does not beat it knows nothing about this data that a student should learn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.data.splits import group_of, stable_hash
from pocketvlm.distill import metrics
from pocketvlm.distill.answers import teacher_answers
from pocketvlm.distill.encoders import TeacherEncoder, read_by
from pocketvlm.distill.evaluate import Evaluation, embed_questions, is_flag, left_out, questions_of, score
from pocketvlm.edge.errors import BadSampleError, UsageError

Array = NDArray[np.float64]

_BUCKETS = 512
_SIDE = 8


@dataclass(frozen=True)
class TeacherCheck:
    """What was found. baseline / interval: None where the data are too few to fit a baseline (fewer than 20 captioned).

    worse_than_baseline: the teacher is not better than chance, or not better than the baseline.
    """

    teacher: str
    evaluation: Evaluation = field(repr=False)
    k: int
    score: float
    chance: float
    baseline: float | None
    teacher_on_same: float | None
    interval: metrics.Interval | None
    queries: int
    worse_than_baseline: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "teacher": self.teacher,
            "k": self.k,
            "image_to_text_recall": self.score,
            "chance": self.chance,
            "held_out": {
                "queries": self.queries,
                "teacher": self.teacher_on_same,
                "baseline": self.baseline,
                "difference": self.interval.to_dict() if self.interval else None,
            },
            "worse_than_baseline": self.worse_than_baseline,
            "verdict": self.verdict,
            "evaluation": self.evaluation.to_dict(),
        }

    def table(self) -> Any:
        """A rich table with the verdict as its caption."""
        from rich.table import Table

        gone = left_out(self.evaluation.values)
        caption = self.verdict + (f" Left out: {gone}." if gone else "")
        table = Table(title=f"{self.teacher}: pictures to texts, R@{self.k}", caption=caption)
        table.add_column("who")
        table.add_column("all pictures", justify="right")
        table.add_column(f"held-out half ({self.queries})", justify="right")
        table.add_row("teacher", _percent(self.score), _percent(self.teacher_on_same))
        table.add_row("colours only (baseline)", "–", _percent(self.baseline))
        table.add_row("chance", _percent(self.chance), "")
        own = self.evaluation.values["model"]
        table.add_row("teacher, texts to pictures", _percent(own["text_to_image"][f"R@{self.k}"]), "")
        if "zero_shot" in own:
            table.add_row("teacher, zero-shot top-1", _percent(own["zero_shot"]["top-1"]), "")
        return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def check_teacher(
    teacher: Any, data: Any, *, k: int = 5, batch_size: int = 32, seed: int = 0, answers: Path | None = None
) -> TeacherCheck:
    """Score `teacher` on a DataSource (or samples) against chance and a colour baseline.

    Captions of a DataSource that the teacher's text tower would cut are left out and counted, where it tells
    (`encoders.read_by`). answers: a folder in which the teacher's embeddings are kept (`answers.teacher_answers`);
    runs that are scored on the same data with the same folder as `teacher.cache` have them at once.

    Raises:
        UsageError: fewer than two captioned pictures, or as many candidates as `k`.
    """
    encoder = TeacherEncoder(teacher)
    questions = questions_of(read_by(encoder, data) if isinstance(data, DataSource) else data)
    captioned = [s for s in questions.samples if _texts(s, questions.language) and not is_flag(s)]
    candidates = len(dict.fromkeys(t for s in captioned for t in _texts(s, questions.language)))
    if len(captioned) < 2 or candidates < 2:
        raise UsageError(
            f"{questions.name} has {len(captioned)} captioned pictures with {candidates} different texts, so there is "
            "nothing to choose between; give data with captions of at least two kinds"
        )
    while k > 1 and k >= candidates / 2:
        k = {5: 3, 3: 1}.get(k, 1)
    if answers is None:
        embedded = embed_questions(encoder, questions, name=teacher.name, batch_size=batch_size)
    else:
        embedded = teacher_answers(teacher, questions, answers, batch_size=batch_size)
    evaluation = score(questions, embedded)
    own = evaluation.values["model"]["image_to_text"]
    recall = own.get(f"R@{k}", float((evaluation.queries["model/image_to_text/rank"] <= k).mean()))
    evaluation.values["model"]["image_to_text"][f"R@{k}"] = recall
    backward = evaluation.queries["model/text_to_image/rank"]
    evaluation.values["model"]["text_to_image"].setdefault(f"R@{k}", float((backward <= k).mean()))
    hits = evaluation.hits("image_to_text", k)
    chance = _chance(captioned, questions.language, candidates, k)
    lucky = metrics.paired_bootstrap(hits, np.full(len(hits), chance), seed=seed)

    kept = {uid: row for row, uid in enumerate(evaluation.queries["image_to_text/uid"].tolist())}
    readable = [sample for sample in captioned if sample.uid in kept]
    fitted = _baseline(readable, questions.language, k)
    baseline = same = interval = None
    held: list[Sample] = []
    if fitted is not None:
        held, base_hits = fitted
        rows = [embedded.uids.index(sample.uid) for sample in held]
        gallery, links = _links(held, questions.language)
        places = [questions.texts.index(text) for text in gallery]
        ranks = metrics.retrieval(embedded.images[rows], embedded.texts[places], links)
        own_hits = ranks.hits(k).astype(float)
        baseline, same = float(base_hits.mean()), float(own_hits.mean())
        interval = metrics.paired_bootstrap(own_hits, base_hits, seed=seed)
    verdict, worse = _verdict(teacher.name, questions.name, k, recall, chance, lucky, interval)
    return TeacherCheck(
        teacher=teacher.name,
        evaluation=evaluation,
        k=k,
        score=recall,
        chance=chance,
        baseline=baseline,
        teacher_on_same=same,
        interval=interval,
        queries=len(held),
        worse_than_baseline=worse,
        verdict=verdict,
    )


def _verdict(
    name: str,
    data: str,
    k: int,
    recall: float,
    chance: float,
    lucky: metrics.Interval,
    interval: metrics.Interval | None,
) -> tuple[str, bool]:
    if lucky.lower_bound <= 0:
        return (
            f"{name} is no better than chance on {data} (R@{k} {_percent(recall)} against {_percent(chance)}): "
            "a student would learn noise from it, so do not use it here."
        ), True
    if interval is None:
        return (
            f"{name} is better than chance on {data} ({_percent(recall)} against {_percent(chance)}); there are too "
            "few captioned pictures for a fair baseline."
        ), False
    low, high = 100 * interval.low, 100 * interval.high
    gap = f"{100 * interval.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}"
    if interval.high < 0:
        return f"{name} is worse than looking at colours only on {data} ({gap}): do not use it here.", True
    if interval.lower_bound <= 0:
        return (
            f"{name} is not shown to be better than looking at colours only on {data} ({gap}): use another teacher, or "
            "more captioned pictures to decide it."
        ), True
    return f"{name} beats chance and looking at colours only on {data} ({gap}): worth learning from.", False


def _chance(samples: Sequence[Sample], language: str, candidates: int, k: int) -> float:
    """Expected R@k of a random order of the texts, exact also for pictures with several captions."""
    total = 0.0
    for sample in samples:
        wrong = candidates - len(dict.fromkeys(_texts(sample, language)))
        miss = 1.0
        for drawn in range(min(k, candidates)):
            miss *= max(0, wrong - drawn) / (candidates - drawn)
        total += 1 - miss
    return total / len(samples)


def _texts(sample: Sample, language: str) -> list[str]:
    return [caption.text for caption in sample.captions if caption.language == language]


def _links(samples: Sequence[Sample], language: str) -> tuple[list[str], list[list[int]]]:
    index: dict[str, int] = {}
    links = [[index.setdefault(t, len(index)) for t in dict.fromkeys(_texts(s, language))] for s in samples]
    return list(index), links


def _baseline(samples: Sequence[Sample], language: str, k: int) -> tuple[list[Sample], Array] | None:
    """(held-out samples, hits of the colour baseline on them), or None where either half would be too small."""
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        halves[stable_hash(f"teacher-check:{group_of(sample)}") % 2].append(sample)
    fit, held = halves
    gallery, links = _links(held, language)
    if min(len(fit), len(held)) < 10 or len(gallery) <= k:
        return None
    x = np.stack([_colours(sample) for sample in fit])
    y = metrics.normalize(np.stack([_letters(_texts(sample, language)[0]) for sample in fit]))
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / deviation
    centre = y.mean(0)
    # the dual form: as many unknowns as pictures, not as features
    kernel = x @ x.T
    strength = np.trace(kernel) / len(kernel)
    weights = x.T @ np.linalg.solve(kernel + strength * np.eye(len(kernel)), y - centre)
    guess = (np.stack([_colours(sample) for sample in held]) - mean) / deviation @ weights
    texts = metrics.normalize(np.stack([_letters(text) for text in gallery])) - centre
    return held, metrics.retrieval(guess, texts, links).hits(k).astype(np.float64)


def _colours(sample: Sample) -> Array:
    """64 colour bins (4 per channel, jointly) and the pixels of an 8 x 8 thumbnail, in 0..1."""
    from pocketvlm.edge.preprocess import decode_image

    try:
        pixels = decode_image(sample.image.read())
    except BadSampleError as error:
        raise UsageError(f"picture {sample.uid} could be read a moment ago and now cannot ({error.reason})") from error
    small = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BOX)
    bins = np.asarray(small, np.int64).reshape(-1, 3) // 64
    histogram = np.bincount(bins @ np.array([16, 4, 1]), minlength=64) / len(bins)
    thumbnail = np.asarray(small.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float64).ravel() / 255
    return np.concatenate([histogram, thumbnail])


def _letters(text: str) -> Array:
    """Counts of hashed words and letter 3-grams, [512]; what two texts share in spelling."""
    counts = np.zeros(_BUCKETS)
    words = text.casefold().split()
    for piece in [*words, *(f"^{word}$"[i : i + 3] for word in words for i in range(len(word)))]:
        counts[int.from_bytes(hashlib.sha256(piece.encode()).digest()[:4], "big") % _BUCKETS] += 1
    return np.sqrt(counts)
