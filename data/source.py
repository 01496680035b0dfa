"""An opened data set: its samples, what was left out, and the licences that travel with it."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import Caption, Sample
from pocketvlm.data.splits import FOLDS, POOLS, few_shots, group_of, has_caption, in_pool, pool_of
from pocketvlm.edge.errors import BadSampleError, UsageError, unknown_name

if TYPE_CHECKING:
    from pocketvlm.edge.tokenizer import Tokenizer


@dataclass
class DataSource:
    """Samples in a fixed order.

    name: short, for people and file names. samples: uids are unique. report: what was left out and why.
    licences: (what, licence, attribution) rows that travel with anything made from the data. templates: prompts that
    the data brings along for zero-shot classification, each with "{}" for the label.
    """

    name: str
    samples: list[Sample]
    report: BadSampleReport = field(default_factory=BadSampleReport)
    licences: tuple[tuple[str, str, str], ...] = ()
    templates: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def select(
        self,
        *,
        pool: str | None = None,
        fold: int = 0,
        folds: int = FOLDS,
        captions: float = 1.0,
        shots: int | None = None,
        language: str | None = None,
        limit: int | None = None,
    ) -> DataSource:
        """A part of this data set; report and licences are kept.

        Args:
            pool: "teacher", "student" or "test", in rotation `fold` of `folds`; None keeps everything.
            captions: share of the groups that keep captions and label (`has_caption`); the others stay, unlabelled.
            shots: keep captions and label of so many samples of each label (`few_shots`); the others stay, unlabelled.
            language: keep the captions of these BCP-47 tags, separated by commas ("en" matches "en-GB"); "all" keeps
                every one. A sample whose captions all go is left out; unlabelled samples stay.
            limit: the first so many samples.

        Raises:
            UsageError: nothing is left, or a number is out of range.
            UnknownNameError: no such pool, or no caption in a language.
        """
        samples = self.samples if pool is None else in_pool(self.samples, pool, fold, folds)
        if language is not None and language != "all":
            samples = self._in_languages(samples, [tag.strip() for tag in language.split(",")])
        samples = [sample if has_caption(group_of(sample), captions) else _unlabelled(sample) for sample in samples]
        if shots is not None:
            kept = few_shots(samples, shots)
            samples = [sample if sample.uid in kept else _unlabelled(sample) for sample in samples]
        if limit is not None:
            if limit < 1:
                raise UsageError(f"limit {limit} leaves no sample; use at least 1")
            samples = samples[:limit]
        if not samples:
            chosen = {"pool": pool, "fold": pool and fold, "language": language}
            asked = ", ".join(f"{key}={value}" for key, value in chosen.items() if value is not None)
            raise UsageError(
                f"none of the {len(self)} samples of data set {self.name!r} is left with {asked or 'these options'}; "
                "nothing can be trained or scored on it, so widen the choice"
            )
        return dataclasses.replace(self, samples=samples)

    def within_context(self, tokenizer: Tokenizer) -> DataSource:
        """This data set without the captions and hard negatives that a text tower could not read whole.

        The pictures stay.

        `Tokenizer.encode` would cut a long caption at the context, and a model would be taught or scored on a part of
        what it says. Left out and counted, in a report of the new data set: "too-long-text", and what cannot be
        encoded at all ("empty-text", "not-unicode", "unencodable-text").

        Args:
            tokenizer: the text tower's; its spec says how many tokens the context holds.

        Raises:
            BadSampleError: the first such caption, when the data set was opened with on_bad_sample="refuse".
        """
        negatives = dict.fromkeys(negative.text for sample in self.samples for negative in sample.hard_negatives)
        bad = unfit(tokenizer, list(dict.fromkeys([*self.captions(), *negatives])))
        report = BadSampleReport(self.report.on_bad_sample)
        report.merge(self.report)
        samples = []
        for sample in self.samples:
            for text in (*(c.text for c in sample.captions), *(n.text for n in sample.hard_negatives)):
                if text in bad:
                    report.add_error(bad[text], sample.uid)
            kept = tuple(caption for caption in sample.captions if caption.text not in bad)
            told = tuple(negative for negative in sample.hard_negatives if negative.text not in bad)
            samples.append(_with_captions(dataclasses.replace(sample, hard_negatives=told), kept))
        return dataclasses.replace(self, samples=samples, report=report)

    def weighed(self, weights: Mapping[str, float]) -> DataSource:
        """This data set with the weight of each caption multiplied by the one that `weights` has for its source.

        Sources that are not named keep theirs. A weight of 0 takes the captions out; the picture stays.

        Raises:
            UnknownNameError: no caption of a named source. UsageError: a weight below 0 or not finite.
        """
        if not weights:
            return self
        present = {caption.source for sample in self.samples for caption in sample.captions}
        for source, weight in weights.items():
            if source not in present:
                raise unknown_name(f"caption source of data set {self.name!r}", source, present or {"none"})
            if not 0 <= weight < math.inf:
                raise UsageError(
                    f"captions of source {source!r} were given weight {weight!r}, by which nothing can be drawn; give "
                    "0 to leave them out, or a positive number"
                )
        samples = []
        for sample in self.samples:
            heavy = [(caption, caption.weight * weights.get(caption.source, 1.0)) for caption in sample.captions]
            kept = tuple(dataclasses.replace(caption, weight=weight) for caption, weight in heavy if weight)
            samples.append(_with_captions(sample, kept))
        return dataclasses.replace(self, samples=samples)

    def captions(self) -> list[str]:
        """Every distinct caption, in order of first appearance."""
        return list(dict.fromkeys(caption.text for sample in self.samples for caption in sample.captions))

    def summary(self, folds: int = FOLDS) -> dict[str, Any]:
        """Counts for people and reports, as plain JSON types.

        "pools" holds, for each of the `folds` rotations, the number of samples per pool.
        """
        languages = Counter(caption.language for sample in self.samples for caption in sample.captions)
        pools = []
        for fold in range(folds):
            counts = Counter(pool_of(group_of(sample), fold, folds) for sample in self.samples)
            pools.append({str(pool): counts[pool] for pool in POOLS})
        return {
            "name": self.name,
            "samples": len(self.samples),
            "with_captions": sum(bool(sample.captions) for sample in self.samples),
            "captions": sum(languages.values()),
            "distinct_captions": len(self.captions()),
            "languages": dict(languages.most_common()),
            "labels": len({sample.label for sample in self.samples if sample.label is not None}),
            "groups": len({group_of(sample) for sample in self.samples}),
            "flags": sum("flag" in sample.tags for sample in self.samples),
            "conversations": sum(bool(sample.conversation) for sample in self.samples),
            "pools": pools,
            "left_out": self.report.to_dict(),
        }

    def _in_languages(self, samples: list[Sample], wanted: list[str]) -> list[Sample]:
        present = {caption.language for sample in self.samples for caption in sample.captions}
        for tag in wanted:
            if not any(_matches(language, tag) for language in present):
                raise unknown_name(f"language of data set {self.name!r}", tag, present or {"none"})
        kept = []
        for sample in samples:
            captions = tuple(c for c in sample.captions if any(_matches(c.language, tag) for tag in wanted))
            if captions or not sample.captions:
                kept.append(_with_captions(sample, captions))
        return kept


def unfit(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, BadSampleError]:
    """Why each text that the tokenizer's context cannot hold, or that has no tokens, cannot be used."""
    try:
        lengths = tokenizer.lengths(texts)
    except BadSampleError as error:
        if len(texts) == 1:
            return {texts[0]: error}
        return {text: why for each in texts for text, why in unfit(tokenizer, [each]).items()}
    found, context = {}, tokenizer.spec.context_length
    for text, length in zip(texts, lengths):
        begin = f"{text[:40]}…" if len(text) > 40 else text
        if length > context:
            said = f"caption {begin!r} has {length} tokens and the text tower reads {context}, so its end would be lost"
            found[text] = BadSampleError(said, reason="too-long-text")
        elif length == 0:
            said = f"caption {begin!r} has no token in this tokenizer, so its embedding would mean nothing"
            found[text] = BadSampleError(said, reason="empty-text")
    return found


def _matches(language: str, wanted: str) -> bool:
    language, wanted = language.lower(), wanted.lower()
    return language == wanted or language.startswith(wanted + "-")


def _with_captions(sample: Sample, captions: tuple[Caption, ...]) -> Sample:
    """The sample with these captions, and with the hard negatives of these only."""
    if captions == sample.captions:
        return sample
    texts = {caption.text for caption in captions}
    negatives = tuple(negative for negative in sample.hard_negatives if negative.caption in texts)
    return dataclasses.replace(sample, captions=captions, hard_negatives=negatives)


def _unlabelled(sample: Sample) -> Sample:
    return dataclasses.replace(sample, captions=(), label=None, conversation=(), hard_negatives=())
