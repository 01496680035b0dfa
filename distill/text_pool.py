"""The texts of a run's text-only batches, and what the teacher reads in place of texts in other languages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketvlm.data import open_data
from pocketvlm.data.sample import Sample
from pocketvlm.data.source import DataSource
from pocketvlm.distill.recipe import Recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Classes
from pocketvlm.teachers.top_logits import TopLogits


def text_pool(
    recipe: Recipe, source: DataSource, held_out: DataSource | None, classes: Classes | None = None
) -> list[str]:
    """Words without any caption that is scored or withheld, then the captions that the student may see, and classes."""
    captions = list(dict.fromkeys([*source.captions(), *(classes.labels if classes is not None else ())]))
    words = recipe.data.words
    if words is None:
        return captions
    from pocketvlm.data.wordlist import word_list

    withheld = set(held_out.captions()) if held_out is not None else set()
    for spec in words.exclude:
        withheld |= set(open_data(spec).captions())
    return list(dict.fromkeys([*word_list(words.name, size=words.size, exclude=withheld), *captions]))


def with_parallel(
    recipe: Recipe, source: DataSource, held_out: DataSource | None, texts: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The text pool with the parallel texts in front, and what the teacher reads for each."""
    from pocketvlm.data.parallel import parallel_texts

    section = recipe.data.parallel
    assert section is not None, "only a recipe with parallel texts comes here"
    withheld = set(held_out.captions()) if held_out is not None else set()
    for spec in section.exclude:
        withheld |= set(open_data(spec).captions())
    pairs = parallel_texts(
        section.sources,
        languages=section.languages,
        per_language=section.per_language,
        withheld=withheld,
        strict=section.strict,
    )
    known = english_of(recipe, source.samples)
    own = [(text, text) for text in texts if text not in known]
    both = list(dict.fromkeys([*((pair.text, pair.english) for pair in pairs), *known.items(), *own]))
    return [text for text, _ in both], [english for _, english in both]


def english_of(recipe: Recipe, samples: Sequence[Sample]) -> dict[str, str]:
    """Captions in other languages -> the English caption of the first sample that has them, under `data.parallel`."""
    if recipe.data.parallel is None:
        return {}
    found: dict[str, str] = {}
    for sample in samples:
        english = next((caption.text for caption in sample.captions if caption.language == "en"), None)
        if english is not None:
            for caption in sample.captions:
                if caption.language != "en":
                    found.setdefault(caption.text, english)
    for text in {c.text for s in samples for c in s.captions if c.language == "en"}:
        found.pop(text, None)
    return found


def asked_logits(recipe: Recipe) -> TopLogits | None:
    """What `teacher.logits` asks of a teacher with an image tower; None where it asks nothing.

    Raises:
        UsageError: a file that cannot be read, a text given twice, or no fewer entries than texts.
    """
    section = recipe.teacher.logits if recipe.teacher is not None else None
    if section is None:
        return None
    try:
        lines = Path(section.texts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"teacher.logits.texts {section.texts} cannot be read ({error}), so there is nothing to score pictures by; "
            "name a UTF-8 file with one text a line"
        ) from error
    try:
        return TopLogits(tuple(text for line in lines if (text := line.strip())), section.top)
    except UsageError as error:
        raise UsageError(f"teacher.logits of {section.texts}: {error}") from error
