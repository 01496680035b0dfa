"""Samples out of tar shards, one after the other, from any position and without an index.

The archives are read by `tarfile` in its stream mode and not by the library `webdataset`: its readers skip what they
cannot read without saying of which shard, take an archive that was cut between two members for a whole one, and have
no position to continue from. Here nothing is unpacked, links and members that lead out are never followed, and a
position is (turn, drawn): which shard of this reader's own list, and how many of its samples were taken.

The shuffle buffer is emptied at the end of each shard. What a reader gives after a position therefore depends on that
shard and its successors alone, and continuing reads again no more than the part of one shard that lies before it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np

from pocketvlm.data.readers.common import IMAGE_SUFFIXES, Collector
from pocketvlm.data.readers.webdataset import LONGEST_TEXT, TEXTS, described, is_safe, key_of
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ImageRef, Sample
from pocketvlm.data.shards import Shard, ShardBytes, ShardError, ShardOrder, open_shard
from pocketvlm.data.splits import stable_hash
from pocketvlm.edge.errors import BadSampleError, UsageError

# before so many were read, a share says little
ENOUGH_SAMPLES, ENOUGH_SHARDS = 200, 20
# no picture is larger; a header that says so is damaged, or means harm
_LARGEST_MEMBER = 1 << 28
_BLOCK = 1 << 18

Parts = dict[str, bytes]


@dataclass(frozen=True)
class Position:
    """Where a reader is: at its shard number `turn` (`ShardOrder.shard`), of which `drawn` samples were taken."""

    turn: int = 0
    drawn: int = 0


BEGINNING = Position()


@dataclass
class Tally:
    """What was read, and how much of it was of no use.

    samples, shards: all, also the bad ones. report: reasons; it also counts captions and members that were left out.
    """

    samples: int = 0
    bad_samples: int = 0
    shards: int = 0
    bad_shards: int = 0
    report: BadSampleReport = field(default_factory=BadSampleReport)

    def add(self, other: Tally) -> None:
        """Count what `other` counted too."""
        self.samples += other.samples
        self.bad_samples += other.bad_samples
        self.shards += other.shards
        self.bad_shards += other.bad_shards
        self.report.merge(other.report)

    def check(self, max_bad_share: float) -> None:
        """Stop when too much is of no use.

        Raises:
            UsageError: more than `max_bad_share` of at least 200 samples, or of at least 20 shards; or nothing at all
                came out of 20 shards.
        """
        for what, bad, count, enough in (
            ("samples", self.bad_samples, self.samples, ENOUGH_SAMPLES),
            ("shards", self.bad_shards, self.shards, ENOUGH_SHARDS),
        ):
            if count >= enough and (bad > max_bad_share * count or bad == count):
                reasons = ", ".join(f"{number} x {reason}" for reason, number in self.report.counts.most_common(4))
                first = next(iter(self.report.examples[self.report.counts.most_common(1)[0][0]]))
                raise UsageError(
                    f"{bad} of {count} {what} were of no use ({reasons}; first {first}) and {max_bad_share:.1%} is "
                    "allowed, so the student would not learn from the data that was meant; repair the shards, or "
                    "raise data.stream.max_bad_share"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        counted = {name: getattr(self, name) for name in ("samples", "bad_samples", "shards", "bad_shards")}
        return counted | {"left_out": self.report.to_dict()}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], on_bad_sample: str = "skip") -> Tally:
        """Inverse of `to_dict`."""
        numbers = {name: int(number) for name, number in value.items() if name != "left_out"}
        found = replace(cls(report=BadSampleReport(on_bad_sample)), **cast(Any, numbers))
        found.report.counts.update(value["left_out"]["counts"])
        found.report.examples.update({reason: list(places) for reason, places in value["left_out"]["examples"].items()})
        return found


@dataclass(frozen=True)
class Drawn:
    """One sample taken: `position` is the one after it; number: of the shard in the row of all readers
    (`ShardOrder.number`); sample: None where it was of no use, which is counted."""

    position: Position
    epoch: int
    number: int
    sample: Sample | None


class SampleStream:
    """The endless row of samples of one reader.

    Args:
        shards, order: what is read, and when. buffer: samples among which the next one is drawn (0 or 1: as they lie);
            they are held encoded. start: where to begin.
        captions: "required" counts a picture without one as bad ("no-caption"); "optional" keeps it, unlabelled.
        language: BCP-47 tag of captions that carry none. on_bad_sample: "refuse" raises at the first bad sample.
        max_bad_share: see `Tally.check`, asked after each shard; a row of shards without a sample would have no end.

    `tally` holds what was counted since `start` or the last `take_tally`; whoever decodes adds what cannot be decoded
    (`refuse`).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        order: ShardOrder,
        *,
        buffer: int = 0,
        start: Position = BEGINNING,
        captions: Literal["required", "optional"] = "required",
        language: str = "en",
        on_bad_sample: str = "skip",
        max_bad_share: float = 1.0,
    ) -> None:
        self.max_bad_share = max_bad_share
        self.shards, self.order, self.buffer, self.start = shards, order, buffer, start
        self.captions, self.language, self.on_bad_sample = captions, language, on_bad_sample
        self.tally = Tally(report=BadSampleReport(on_bad_sample))
        self._taken = Tally()
        self._again: Tally | None = None
        self._end = 0

    def take_tally(self) -> Tally:
        """What was counted since the last call, or since `start`."""
        taken, self.tally = self.tally, Tally(report=BadSampleReport(self.on_bad_sample))
        self._taken.add(taken)
        return taken

    def check(self) -> None:
        """As `Tally.check`, of all since `start`."""
        together = Tally()
        together.add(self._taken)
        together.add(self.tally)
        together.check(self.max_bad_share)

    def __iter__(self) -> Iterator[Drawn]:
        """Raises BadSampleError at the first bad sample, where `on_bad_sample` is "refuse", and what `check` raises."""
        turn, skip = self.start.turn, self.start.drawn
        while True:
            yield from self._one_shard(turn, skip)
            self.check()
            turn, skip = turn + 1, 0

    def once(self) -> Iterator[Sample]:
        """The usable samples of every shard once, in order, whatever the reader's order is; for a look at the data."""
        for shard in self.shards:
            for key, parts in self._groups(shard):
                sample = self._sample(shard, key, parts)
                if sample is not None:
                    yield sample

    def refuse(self, error: BadSampleError, where: str) -> None:
        """Count a sample whose picture cannot be used; raises like `BadSampleReport.add`."""
        self.tally.bad_samples += 1
        self.tally.report.add_error(error, where)

    def _one_shard(self, turn: int, skip: int) -> Iterator[Drawn]:
        epoch, index = self.order.shard(turn)
        shard, number = self.shards[index], self.order.number(turn)
        drawn = 0
        # what is read again was counted when it was read first
        self._again = Tally() if skip else None
        rng = np.random.Generator(np.random.PCG64(stable_hash(f"samples/{self.order.seed}/{number}")))
        for drawn, (key, parts) in enumerate(_shuffled(self._groups(shard), self.buffer, rng), 1):
            if drawn > skip:
                self.tally.samples += 1
                yield Drawn(Position(turn, drawn), epoch, number, self._sample(shard, key, parts))
            elif drawn == skip:
                self._again = None
        if drawn < skip:
            self._again = None
            why = f"shard {shard.name} has {drawn} samples now and {skip} of it were already taken"
            self._left(shard, "changed-shard", why)

    def _sample(self, shard: Shard, key: str, parts: Parts) -> Sample | None:
        where = f"{shard.place}:{key}"
        picture = next((data for suffix, data in parts.items() if suffix in IMAGE_SUFFIXES), None)
        report, reason, why = self.tally.report, "no-image-member", "the key has no picture among its files"
        if picture is not None:
            try:
                texts = {suffix: data.decode("utf-8-sig") for suffix, data in parts.items() if suffix in TEXTS}
                found, label, language = described(texts)
                captions = Collector(shard.name, report, language=self.language).captions(found, where, language)
                if captions or (captions == () and self.captions == "optional"):
                    return Sample(f"{shard.name}/{key}", ImageRef(data=picture), captions, label)
                if captions is None:  # each was counted
                    self.tally.bad_samples += 1
                    return None
                reason, why = "no-caption", "the picture has no caption, and data.stream.captions is 'required'"
            except ValueError as error:
                if isinstance(error, BadSampleError):
                    raise
                reason, why = "unreadable-text", f"its text cannot be read ({error})"
        self.tally.bad_samples += 1
        report.add(reason, where, why)
        return None

    def _groups(self, shard: Shard) -> Iterator[tuple[str, Parts]]:
        """Key and members of each sample as they lie in the shard; a shard that breaks off is counted and left."""
        count = 0
        try:
            with open_shard(shard) as source:
                try:
                    for key, parts in self._keys(source, shard):
                        count += 1
                        yield key, parts
                except tarfile.TarError as error:
                    raise ShardError(f"the archive is damaged ({error})", "truncated-archive") from error
                source.finish(self._end)
            problem = None if count else ("empty-shard", "it holds no sample")
        except ShardError as error:
            problem = (error.reason, str(error))
        if problem is None:
            self._told.shards += 1
        else:
            self._left(shard, problem[0], f"shard {shard.name}: {problem[1]}")

    def _left(self, shard: Shard, reason: str, why: str) -> None:
        told = self._told
        told.shards += 1
        told.bad_shards += 1
        told.report.add(reason, shard.place, why)

    @property
    def _told(self) -> Tally:
        return self.tally if self._again is None else self._again

    def _keys(self, source: ShardBytes, shard: Shard) -> Iterator[tuple[str, Parts]]:
        """Key and members of each sample: neighbours of one key are one; a key that comes back later is left out."""
        known: set[str] = set()
        key, parts = "", Parts()
        for name, data in self._members(source, shard):
            named = key_of(name)
            if named is None:
                continue
            if named[0] != key:
                if parts:
                    yield key, parts
                key, parts = named[0], Parts()
                if key in known:
                    self._told.report.note("duplicate-key", f"{shard.place}:{name}")
                    key = ""  # each of its members comes here, and is counted
                    continue
                known.add(key)
            if named[1] in parts:
                self._told.report.note("duplicate-member", f"{shard.place}:{name}")
            else:
                parts[named[1]] = data
        if parts:
            yield key, parts

    def _members(self, source: ShardBytes, shard: Shard) -> Iterator[tuple[str, bytes]]:
        """Name and bytes of every member that is read."""
        # tarfile wants a whole file object and calls read alone
        with tarfile.open(fileobj=cast(Any, source), mode="r|", bufsize=_BLOCK) as archive:
            for member in archive:
                cast(Any, archive).members = []  # they would be kept to the shard's end
                suffix = (key_of(member.name) or ("", ""))[1]
                limit = LONGEST_TEXT if suffix in TEXTS else _LARGEST_MEMBER
                if member.isdir() or not (suffix in IMAGE_SUFFIXES or suffix in TEXTS):
                    continue
                if not is_safe(member):
                    self._told.report.note("unsafe-member", f"{shard.place}:{member.name}")
                elif member.size > limit:
                    self._told.report.note("too-large-member", f"{shard.place}:{member.name}")
                elif (file := archive.extractfile(member)) is not None:
                    data = file.read()
                    if len(data) < member.size:
                        raise tarfile.ReadError(f"{member.name} has {len(data)} of {member.size} bytes")
                    yield member.name, data
            self._end = archive.offset


def _shuffled(items: Iterator[tuple[str, Parts]], size: int, rng: np.random.Generator) -> Iterator[tuple[str, Parts]]:
    """The items, each drawn from the next `size` of them; the rest at the end in random order."""
    held: list[tuple[str, Parts]] = []
    if size < 2:
        yield from items
        return
    for item in items:
        if len(held) < size:
            held.append(item)
            continue
        place = int(rng.integers(size))
        drawn, held[place] = held[place], item
        yield drawn
    for place in rng.permutation(len(held)):
        yield held[place]
