"""Sections of a recipe that say which texts a student reads, and through which tokenizer."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Keys that do not exist are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
