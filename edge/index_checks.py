"""What an index refuses before it touches its files: another space, another width, no direction, no clear name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketvlm.edge.errors import UsageError
from pocketvlm.edge.index_filter import Metadata, Value, checked_metadata


class Space(Protocol):
    """What knows its embedding space: an `EdgeModel`, by its contract, or a teacher, by its own `space_id`."""

    @property
    def dim(self) -> int: ...


def space_id_of(space: Space | str) -> str:
    """The id itself, or that of a model."""
    known: Any = space
    return known if isinstance(known, str) else getattr(known, "contract", known).space_id


def check_space(space: Space | str, wanted: str, path: Path) -> None:
    """Refuse vectors of another embedding space than the index at `path` holds, with a UsageError."""
    given = space_id_of(space)
    if given != wanted:
        raise UsageError(
            f"vectors of the embedding space {given!r} were given and index {str(path)!r} holds {wanted!r}; their "
            "cosines would mean nothing, so use a model of that space or make another index"
        )


def unit_rows(vectors: ArrayLike, dim: int, what: str) -> NDArray[np.float32]:
    """Normalised float32 [N, dim] of vectors [N, dim] or [dim].

    Raises:
        UsageError: no numbers, another width, NaN, infinity or a zero vector.
    """
    given = np.asarray(vectors)
    if given.dtype.kind not in "fiu" and given.size:
        raise UsageError(f"{what} of dtype {given.dtype} was given and numbers are expected; embed with the model")
    rows = given.astype(np.float32).reshape(0, dim) if not given.size else np.atleast_2d(given.astype(np.float32))
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise UsageError(
            f"{what} of shape {given.shape} was given and [N, {dim}] is expected; it has no cosine with the index's "
            f"rows, so embed with a model of {dim} numbers (EdgeModel.load(..., dim=...))"
        )
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 1e-12)))
    if len(bad):
        problem = "is zero" if norms[bad[0]] <= 1e-12 else "holds NaN or infinity"
        raise UsageError(
            f"{what} {bad[0]} ({len(bad):,} of {len(rows):,}) {problem} and a direction is expected; it has no cosine "
            "with anything, so look at what made it"
        )
    return np.asarray(rows / norms[:, None], np.float32)


def checked_names(
    keys: str | Iterable[str], metadata: Metadata | Sequence[Metadata] | None, rows: int
) -> tuple[list[str], list[dict[str, Value]]]:
    """Keys and metadata, one of each for every row.

    Raises:
        UsageError: other numbers of them, a key twice or that cannot be stored, unfit metadata.
    """
    several = [keys] if isinstance(keys, str) else list(keys)
    each: Sequence[Metadata] = [{}] * len(several) if metadata is None else []
    if metadata is not None:
        each = [metadata] if isinstance(metadata, Mapping) else list(metadata)
    if not len(several) == rows == len(each):
        raise UsageError(
            f"{len(several):,} keys were given with {rows:,} vectors and {len(each):,} metadata; whose is whose is "
            "unclear, so give one of each for every row"
        )
    seen: set[str] = set()
    for key in several:
        # half of a surrogate pair, as in file names that are no UTF-8, has no UTF-8 of its own
        if not isinstance(key, str) or any("\ud800" <= letter <= "\udfff" for letter in key):
            raise UsageError(f"the key {key!r} was given and text is expected; it could not be stored, so use str(...)")
        if key in seen:
            raise UsageError(
                f"key {key!r} is given more than once in one call; one of its vectors would be lost, so keep one"
            )
        seen.add(key)
    return several, [checked_metadata(facts) for facts in each]
