"""What the sections of a recipe are made of, and those of a task, of texts and of the tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A frozen part of a recipe that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskSection(Section):
    """A student that tells a fixed list of classes apart, by two heads (`students.task`), and ships as a classifier.

    classes: their names; empty: the labels of the training data. validation: the share of each class's labels, rounded
    down, that no head learns and that chooses `share` and `temperature`, which can also be given; the pictures are
    learned from as unlabelled ones. mix: what is mixed, the
    heads' "probabilities" or their "logits" (at temperature 1; one linear layer remains).
    """

    classes: tuple[str, ...] = ()
    mix: Literal["probabilities", "logits"] = "probabilities"
    share: Fraction | None = None
    temperature: Positive | None = None
    validation: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.25


class LogitsSection(Section):
    """texts: a UTF-8 file with one text a line (class prompts, words); empty lines are passed over. top: how many of
    the largest of the teacher's logits over these are kept for each view, beside the share of all others."""

    texts: str
    top: Count = 32


class StreamSection(Section):
    """Tar shards in the WebDataset layout, read one after the other (`data.stream`), in place of `data.train`.

    shards: a path, brace or glob pattern, folder, text file of names, http(s) URL, or "pipe:COMMAND", or several.
    order: of the shards in each epoch; "resampled" draws them with replacement. buffer: samples of one shard among
    which the next is drawn. workers: processes that decode (0: none). captions: whether a picture without one is bad.
    language: BCP-47 tag of captions that carry none. max_bad_share: of samples, and of shards, past which a run stops.
    draft: decode a JPEG near the size that is wanted (`data.near`). probe: samples at the beginning that are looked at
    before training; the tokenizer and the pool of texts are made from their captions.
    """

    shards: str | tuple[str, ...]
    order: Literal["shuffled", "sequential", "resampled"] = "shuffled"
    buffer: CountOrZero = 1000
    workers: CountOrZero = 2
    captions: Literal["required", "optional"] = "required"
    language: str = "en"
    max_bad_share: Fraction = 0.05
    draft: bool = True
    probe: Count = 2000


class WordsSection(Section):
    """Generic texts for text distillation and for the tokenizer (`data.wordlist.word_list`).

    name: a word list. size: how many entries are asked for. exclude: data specs whose captions are removed
    from the list; the captions of `data.eval` always are.
    """

    name: str = "wordfreq-en"
    size: Count = 20_000
    exclude: tuple[str, ...] = ()


class ParallelSection(Section):
    """Texts in other languages beside their English (`data.parallel.parallel_texts`), for text-only batches.

    sources, languages, per_language, strict: as there; captions of `data.eval` and of the data specs in `exclude` are
    withheld. The teacher reads the English of each, also of captions in other languages.
    """

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    languages: tuple[str, ...] = ()
    per_language: Count | None = 20_000
    exclude: tuple[str, ...] = ()
    strict: bool = True


class TokenizerSection(Section):
    """source: "texts" trains a tokenizer on the training captions and words; "minilm-l6" prunes MiniLM's to the pieces
    that these use (for a student with text.weights minilm-l6); else a `tokenizer.json` file.

    vocab_size: of a trained or pruned one; null takes the student's configuration.
    added_pieces: learnt from the texts of `data.parallel` beside these, at most so many; their embeddings start from
    aligned translations (`students.languages`).
    """

    source: str = "texts"
    vocab_size: Annotated[int, Field(ge=64)] | None = None
    added_pieces: CountOrZero = 0
