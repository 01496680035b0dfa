"""What a data set asks of a model, and a model's answers as embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketvlm.data.sample import HardNegative, Sample
from pocketvlm.edge.errors import BadSampleError, UsageError

TEMPLATES = ("{}", "a picture of {}", "an icon of {}")

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

    samples: the pictures, flags included. texts: every text that any part needs, each once. negatives: (uid, hard
    negative) of the pictures that have one, flags left out. left_out: what was left out of the data before, counted
    by reason.
    """

    name: str
    samples: tuple[Sample, ...]
    language: str
    languages: tuple[str, ...]
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    texts: tuple[str, ...]
    negatives: tuple[tuple[str, HardNegative], ...] = ()
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
        negatives = tuple((s.uid, negative) for s in pictures if not is_flag(s) for negative in s.hard_negatives)
        texts = dict.fromkeys(c.text for s in pictures for c in s.captions)
        if len(labels) > 1:
            texts |= dict.fromkeys(prompt(template, label) for label in labels for template in templates)
        texts |= dict.fromkeys(text for _, negative in negatives for text in (negative.caption, negative.text))
        language = languages[0] if languages else ""
        return cls(name, pictures, language, languages, labels, tuple(templates), tuple(texts), negatives)


class ClassScores:
    """A classifier behind the interface of an encoder, so that it is scored like a zero-shot one.

    A picture's embedding is its logits, moved above 0, and a prompt's is 1 at its label's place: their cosine ranks the
    labels as the logits do. It reads no other text, so captions are no question to it (`only_labels`).
    logits: decoded pictures -> [N, K]. labels: the K names.
    """

    space_id = ""

    def __init__(self, logits: Callable[[Any], Array], labels: Sequence[str]) -> None:
        self.logits, self.labels = logits, tuple(labels)

    def embed_image(self, x: Any, /) -> Array:
        found = np.asarray(self.logits(x), np.float32)
        return found - found.min(axis=1, keepdims=True) + 1

    def embed_text(self, x: Any, /) -> Array:
        raise UsageError("a classifier reads no text, so there is nothing to embed; score it on data with labels")

    def prompts(self, questions: Questions) -> Array:
        """float32 [M, K] for `questions.texts`; all 0 for what is no prompt.

        Raises:
            UsageError: a label that the classifier does not know.
        """
        strange = sorted(set(questions.labels) - set(self.labels))
        if strange:
            raise UsageError(
                f"{questions.name} has pictures of {strange[0]!r} and the classifier knows {', '.join(self.labels)}, "
                "so no answer to them could be right; leave these pictures out, or train with that class"
            )
        rows = np.zeros((len(questions.texts), len(self.labels)), np.float32)
        place = {text: row for row, text in enumerate(questions.texts)}
        for label in questions.labels if len(questions.labels) > 1 else ():
            for template in questions.templates:
                rows[place[prompt(template, label)], self.labels.index(label)] = 1
        return rows


def only_labels(source: Any) -> Any:
    """A DataSource whose samples have neither captions nor hard negatives."""
    return replace(source, samples=[replace(sample, captions=(), hard_negatives=()) for sample in source.samples])


@dataclass
class Embedded:
    """One model's answers. images: float32 [N, D] for `uids`. texts: float32 [M, D] for `Questions.texts`.

    bad: pictures that could not be decoded, (uid, reason). logit_scale: what the model multiplies a cosine by before
    a softmax; None where it names none."""

    name: str
    space_id: str
    uids: list[str]
    images: Array
    texts: Array
    bad: list[tuple[str, str]] = field(default_factory=list)
    logit_scale: float | None = None


def prompt(template: str, label: str) -> str:
    # not str.format: a label or a template may hold other braces
    return template.replace("{}", label)


def is_flag(sample: Sample) -> bool:
    return sample.tags.get("flag") == "1"


def questions_of(data: Any, *, templates: Sequence[str] = TEMPLATES) -> Questions:
    """The questions of a DataSource or of samples; templates that the data brings along go before `templates`."""
    samples = data.samples if hasattr(data, "samples") else data
    templates = getattr(data, "templates", ()) or templates
    questions = Questions.of(samples, name=getattr(data, "name", "data"), templates=templates)
    return replace(questions, left_out=dict(data.report.counts)) if hasattr(data, "report") else questions


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
    if isinstance(encoder, ClassScores):
        texts = [encoder.prompts(questions)]
    else:
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
        logit_scale=_logit_scale(encoder),
    )


def _space_id(encoder: Encoder) -> str:
    contract = getattr(encoder, "contract", None)
    return str(getattr(encoder, "space_id", "") or getattr(contract, "space_id", ""))


def _logit_scale(encoder: Encoder) -> float | None:
    """Of the encoder itself, or of what it wraps: a bundle's contract, a student or a teacher."""
    for holder in (encoder, *(getattr(encoder, name, None) for name in ("contract", "student", "teacher"))):
        scale = getattr(holder, "logit_scale", None)
        if scale is not None:
            return float(scale.detach() if hasattr(scale, "detach") else scale)
    return None
