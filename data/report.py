"""What could not be used, counted by reason, so that no picture or text disappears in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pocketvlm.edge.errors import BadSampleError, UsageError, unknown_name

_EXAMPLES = 5
ON_BAD_SAMPLE = ("skip", "refuse")


@dataclass
class BadSampleReport:
    """Counts by reason, with the first few places of each.

    on_bad_sample: "skip" counts and goes on; "refuse" raises at the first bad sample.
    """

    on_bad_sample: str = "skip"
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_bad_sample not in ON_BAD_SAMPLE:
            raise unknown_name("value of on_bad_sample", self.on_bad_sample, ON_BAD_SAMPLE)

    @property
    def total(self) -> int:
        """How many samples, captions or archive members were left out."""
        return sum(self.counts.values())

    def add(self, reason: str, where: str, message: str | None = None) -> None:
        """Count one bad sample.

        Args:
            reason: short stable key, such as "missing-file", "truncated-image", "empty-text", "too-long-text".
            where: file, line or member, for people.
            message: one sentence for the refusal; made from reason and place when absent.

        Raises:
            BadSampleError: on_bad_sample is "refuse".
        """
        if self.on_bad_sample == "refuse":
            text = message or f"bad sample ({reason})"
            raise BadSampleError(f"{where}: {text}; repair it, or pass --on-bad-sample skip", reason=reason)
        self.note(reason, where)

    def add_error(self, error: BadSampleError, where: str) -> None:
        """Count a bad sample that a reader or a decoder refused; raises like `add`."""
        self.add(error.reason, where, str(error))

    def note(self, reason: str, where: str) -> None:
        """Count something that is left out on purpose (an unsafe archive member, say); never raises."""
        self.counts[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(where)

    def merge(self, other: BadSampleReport) -> None:
        """Add the counts and examples of another report; never raises."""
        self.counts.update(other.counts)
        for reason, places in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine.extend(places[: _EXAMPLES - len(mine)])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: {"total", "counts": {reason: n}, "examples": {reason: [where]}}."""
        return {
            "total": self.total,
            "counts": dict(sorted(self.counts.items())),
            "examples": {reason: list(places) for reason, places in sorted(self.examples.items())},
        }

    def table(self) -> str:
        """One line per reason, most frequent first; empty when nothing was bad."""
        width = max((len(reason) for reason in self.counts), default=0)
        lines = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"{reason:<{width}}  {count:>7}  e.g. {self.examples[reason][0]}")
        return "\n".join(lines)

    def refuse_empty(self, name: str, kept: int) -> None:
        """Stop when nothing is left.

        Raises:
            UsageError: `kept` is 0; the sentence says what was left out.
        """
        if kept:
            return
        found = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
        because = f"all of it was left out ({found})" if found else "it holds no sample that matches"
        raise UsageError(
            f"data set {name!r} is empty: {because}; nothing can be trained or scored on it, "
            "so check the path, the columns and the filters"
        )
