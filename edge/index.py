"""`EmbeddingIndex`: embeddings kept on disk and searched by cosine. Needs numpy, usearch and sqlite; no torch.

    index = EmbeddingIndex.create("photos.index", model)
    index.add(["a.jpg", "b.jpg"], model.embed_image(["a.jpg", "b.jpg"]), [{"year": 2024}, {"year": 2025}], space=model)
    index.search(model.embed_text("a red boat"), k=5, space=model, where={"year": {">=": 2025}})

What a kill can and cannot do to it: `edge.index_store`. docs/search.md has the numbers.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketvlm.edge.errors import UsageError, unknown_name
from pocketvlm.edge.index_checks import Space, check_space, checked_names, space_id_of, unit_rows
from pocketvlm.edge.index_filter import Metadata, Value, Where, where_sql
from pocketvlm.edge.index_store import BLOCK, DATABASE, State, Store

if TYPE_CHECKING:
    from pocketvlm.edge.index_binary import Codes
    from pocketvlm.edge.index_cache import Progress
    from pocketvlm.edge.index_folder import SyncProgress, SyncReport
    from pocketvlm.edge.index_graph import Graph
    from pocketvlm.edge.model import EdgeModel

Dtype = Literal["f32", "f16", "int8", "binary"]
Rows = NDArray[np.float32]
Numbers = NDArray[np.int64]

DTYPES = ("f32", "f16", "int8", "binary")
CACHE_FROM = 10_000  # rows; fewer are compared one by one, also where a filter leaves fewer
TAIL = 2_000  # rows newer than graph or codes for which `save` does not write these again
_CANDIDATES, _BINARY_CANDIDATES = 160, 500
_DEAD_SHARE = 0.2  # of the rows; above it `save` writes the others anew
_QUERIES = 256  # compared with all rows at once


@dataclass(frozen=True)
class Hit:
    """One row that was found. score: cosine with the query, -1 to 1. metadata: as it was added."""

    key: str
    score: float
    metadata: dict[str, Value]


class EmbeddingIndex:
    """A folder of embeddings of one space. Make one with `create` or `load`; close it, or use it in a `with`.

    One object may be shared among threads (its calls take turns), one folder among processes: many that search and, at
    a time, one that writes. A search sees all that was committed when it began.

    path: its folder. space_id: what `contract.space_id` of a model must be. dim: numbers of an embedding. dtype:
    "f32", "f16", "int8" (a scale for each row), or "binary": signs are compared first, and int8 rows on disk score the
    nearest.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._cache: Graph | Codes | None = None
        self._cache_of: str | None = None  # the file that was opened, or found broken
        self._masks: dict[Any, tuple[NDArray[np.bool_], int]] = {}
        self._masks_of = -1
        self.path = store.folder
        self.space_id = store.space_id
        self.dim = store.dim
        self.dtype = store.dtype

    def __repr__(self) -> str:
        return f"EmbeddingIndex({str(self.path)!r}, {self.space_id}, {self.dtype} of dim {self.dim})"

    @classmethod
    def create(
        cls, path: str | Path, space: Space | str, dim: int | None = None, *, dtype: Dtype = "f16"
    ) -> EmbeddingIndex:
        """Make an empty index in a new or empty folder.

        Args:
            space: the model whose embeddings it will hold, or a space id.
            dim: needed with a space id; a model has its own.

        Raises:
            UsageError: the folder is not empty, no dim, another dim than the model's. UnknownNameError: no such dtype.
        """
        folder = Path(path)
        if dtype not in DTYPES:
            raise unknown_name("dtype of an index", dtype, DTYPES)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"{str(folder)!r} is there and not an empty folder, and a new index needs one of its own; what lies "
                "there would be mixed up with it, so open it with EmbeddingIndex.load or name another"
            )
        space_id, width = space_id_of(space), dim if isinstance(space, str) else dim or space.dim
        if width is None or width < 1 or (not isinstance(space, str) and width != space.dim):
            expected = "its width is expected" if isinstance(space, str) else f"the model gives {space.dim} numbers"
            raise UsageError(
                f"dim={dim} was given for embeddings of {space_id!r} and {expected}; no row would fit, so give that"
            )
        return cls(Store.create(folder, space_id, width, dtype))

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> EmbeddingIndex:
        """Open an index for searching and writing; takes milliseconds, as files are mapped and not read.

        Args:
            verify: read and check every byte first. Without it, lengths are checked, and the graph at 256 places.

        Raises:
            UsageError: there is none. IntegrityError: a file is cut short or changed. VersionError: of a later release.
        """
        store = Store(Path(path))
        try:
            index = cls(store)
            with store.snapshot() as state:
                index._current_cache(state)
            if verify:
                index.verify()
        except BaseException:
            store.close()
            raise
        return index

    def close(self) -> None:
        """Let go of its files; it cannot be used afterwards."""
        with self._lock:
            self._cache = None
            self._store.close()

    def __enter__(self) -> EmbeddingIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        with self._lock, self._store.snapshot() as state:
            return state.live

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return isinstance(key, str) and bool(self._store.rows_of([key]))

    def keys(self) -> Iterator[str]:
        """All keys, in the order in which they were added."""
        with self._lock, self._store.snapshot():
            found = self._store.db.execute("SELECT key FROM rows ORDER BY row").fetchall()
        return (key for (key,) in found)

    def get(self, keys: Sequence[str]) -> Rows:
        """The embeddings of these keys as they are stored: float32 [N, dim].

        Raises:
            UsageError: a key that is not there.
        """
        with self._lock, self._store.snapshot():
            found = self._found(keys)
            return self._store.rows_at(np.array([found[key][0] for key in keys], np.int64))

    # --- changing -------------------------------------------------------------------------------------------

    def add(
        self,
        keys: str | Iterable[str],
        vectors: ArrayLike,
        metadata: Metadata | Sequence[Metadata] | None = None,
        *,
        space: Space | str,
        replace: bool = False,
    ) -> None:
        """Add rows; when this returns they are on disk, and after a kill either all of them are there or none.

        Rows are found at once; many new ones make searches slower until `save`. One call of many rows is much faster
        than many calls.

        Args:
            keys: N different strings. vectors: [N, dim] (or [dim] for one key), normalised here.
            metadata: one mapping for each key; see `edge.index_filter` for what it holds and how it is searched.
            space: the model that made the vectors, or its space id.
            replace: take the place of keys that are there; else they are refused.

        Raises:
            UsageError: another space or width, NaN, a zero vector, a key twice or there already, unfit metadata; or
                another process is writing.
        """
        check_space(space, self.space_id, self.path)
        rows = unit_rows(vectors, self.dim, "vector")
        several, facts = checked_names(keys, metadata, len(rows))
        with self._lock, self._store.writing():
            there = self._store.rows_of(several)
            if there and not replace:
                first = next(key for key in several if key in there)
                raise UsageError(
                    f"key {first!r} ({len(there):,} of {len(several):,} keys) is in the index already and new ones are "
                    "expected; its embedding would be lost, so leave it out or pass replace=True"
                )
            if several:
                with self._store.transaction():
                    self._store.kill(list(there.values()))
                    self._append(several, rows, facts)

    def remove(self, keys: str | Iterable[str], *, missing_ok: bool = False) -> int:
        """Remove rows, all of them or none; how many. Their numbers stay on disk until `save` or `save(compact=True)`.

        Raises:
            UsageError: a key that is not there, unless `missing_ok`; or another process is writing.
        """
        several = [keys] if isinstance(keys, str) else list(dict.fromkeys(keys))
        with self._lock, self._store.writing():
            found = self._store.rows_of(several) if missing_ok else self._found(several)
            if found:
                with self._store.transaction():
                    self._store.kill(list(found.values()))
        return len(found)

    def save(self, *, compact: bool | None = None, threads: int = 0, progress: Progress | None = None) -> None:
        """Make searching fast again: bring graph or codes up to date, and write the rows anew without the removed ones.

        What `add` and `remove` did is safe without it.

        Args:
            compact: None leaves removed rows until they are a fifth of all; True wipes them; False never.
            threads: of the graph's building; 0 for all cores. progress: called with rows done and all rows.

        Raises:
            UsageError: another process is writing. IntegrityError: as `load`.
        """
        with self._lock, self._store.writing():
            state = self._store.state()
            allowed = 0 if compact else _DEAD_SHARE * state.rows
            if compact is not False and len(state.dead) > allowed:
                self._cache, self._cache_of = None, None
                self._store.rewrite()
                state = self._store.state()
            if state.live < CACHE_FROM:
                return
            usable = self._current_cache(state) is not None
            if usable and state.cache is not None and state.rows - state.cache["rows"] <= TAIL:
                return
            old = state.cache if usable else None
            if self.dtype == "binary":
                from pocketvlm.edge.index_binary import build_codes

                build_codes(self._store, old, progress)
            else:
                from pocketvlm.edge.index_graph import build_graph

                build_graph(self._store, old, threads, progress)

    def sync_folder(
        self, folder: str | Path, model: EdgeModel, *, progress: SyncProgress | None = None, batch_size: int = 32
    ) -> SyncReport:
        """Bring the index up to date with the pictures under a folder; see `edge.index_folder.sync_folder`."""
        from pocketvlm.edge.index_folder import sync_folder

        return sync_folder(self, Path(folder), model, progress=progress, batch_size=batch_size)

    @property
    def model(self) -> dict[str, Any] | None:
        """What `remember_model` was told, so that a later process can load it again."""
        with self._lock:
            return self._store.fact("model")

    def remember_model(self, facts: Mapping[str, Any]) -> None:
        """Keep JSON values that say how to load the model, for instance the arguments of `EdgeModel.load`."""
        with self._lock:
            if self._store.fact("model") != dict(facts):
                with self._store.writing(), self._store.transaction():
                    self._store.set_fact("model", dict(facts))

    @property
    def folder(self) -> Path | None:
        """The folder that `sync_folder` brought the rows from."""
        with self._lock:
            found = self._store.fact("root")
        return None if found is None else Path(found)

    def verify(self) -> None:
        """Read every byte and compare it with its checksum; a damaged graph is only warned of.

        Raises:
            IntegrityError: rows or database are damaged.
        """
        with self._lock, self._store.snapshot() as state:
            self._store.verify()
            self._cache_of = None
            self._current_cache(state, whole=True)

    # --- searching ------------------------------------------------------------------------------------------

    def search(
        self,
        vectors: ArrayLike,
        k: int = 10,
        *,
        space: Space | str,
        where: Where | None = None,
        exact: bool = False,
        candidates: int | None = None,
    ) -> list[list[Hit]]:
        """The `k` nearest rows to each query by cosine, best first; all rows where there are fewer.

        Args:
            vectors: queries [N, dim] (or [dim] for one). A student's may search a gallery that its teacher embedded:
                they have one space id.
            where: a filter over metadata (`edge.index_filter`). As many as `k` are found wherever so many pass it.
            exact: compare with every row. Without it that is done below 10,000 rows; above, the graph (or, of dtype
                "binary", signs) picks `candidates`, and those are compared.
            candidates: at least `k`; more find more of the true neighbours and take longer. Default: 160, of dtype
                "binary" 500.

        Returns:
            One list for each query.

        Raises:
            UsageError: another space or width, NaN, k below 1, an unfit filter. IntegrityError: a file was cut short.
        """
        if k < 1:
            raise UsageError(f"k={k} was given and at least 1 is expected; nothing could be found")
        check_space(space, self.space_id, self.path)
        queries = unit_rows(vectors, self.dim, "query")
        with self._lock, self._store.snapshot() as state:
            mask, passing = self._mask(state, where)
            wanted = max(k, candidates or (_BINARY_CANDIDATES if self.dtype == "binary" else _CANDIDATES))
            cache = None if exact or passing < CACHE_FROM else self._current_cache(state)
            if cache is None:
                found = self._exact(queries, k, mask, passing)
            else:
                found = [self._approximate(query, k, wanted, cache, state, mask, passing) for query in queries]
            named = self._store.keys_of(sorted({int(row) for rows, _ in found for row in rows}))
        return [
            [Hit(named[row][0], float(score), json.loads(named[row][1])) for row, score in zip(rows.tolist(), scores)]
            for rows, scores in found
        ]

    def _exact(self, queries: Rows, k: int, mask: NDArray[np.bool_], passing: int) -> list[tuple[Numbers, Rows]]:
        found: list[tuple[Numbers, Rows]] = []
        for at in range(0, len(queries), _QUERIES):
            some = queries[at : at + _QUERIES]
            best: list[tuple[Numbers, Rows]] = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(some)
            for part, rows in self._rows_of(mask, passing):
                for place, scores in enumerate(some @ rows.T):
                    numbers, values = _top(part, scores, k)
                    best[place] = _top(np.append(best[place][0], numbers), np.append(best[place][1], values), k)
            found += best
        return found

    def _rows_of(self, mask: NDArray[np.bool_], passing: int) -> Iterator[tuple[Numbers, Rows]]:
        """The rows where the mask holds, with their numbers, a few thousand at a time."""
        if 8 * passing < len(mask):
            numbers = np.flatnonzero(mask)
            for at in range(0, passing, BLOCK):
                yield numbers[at : at + BLOCK], self._store.rows_at(numbers[at : at + BLOCK])
            return
        for first, rows in self._store.blocks():
            live = np.flatnonzero(mask[first : first + len(rows)])
            yield live + first, rows if len(live) == len(rows) else rows[live]

    def _approximate(
        self,
        query: Rows,
        k: int,
        wanted: int,
        cache: Graph | Codes,
        state: State,
        mask: NDArray[np.bool_],
        passing: int,
    ) -> tuple[Numbers, Rows]:
        numbers = cache.pick(query, wanted, mask[: cache.rows])
        if numbers is None:
            return self._exact(query[None], k, mask, passing)[0]
        scores = self._store.rows_at(numbers) @ query
        for first, rows in self._store.blocks(cache.rows, state.rows):
            live = np.flatnonzero(mask[first : first + len(rows)])
            numbers, scores = np.append(numbers, live + first), np.append(scores, rows[live] @ query)
        return _top(numbers, scores, k)

    def _mask(self, state: State, where: Where | None) -> tuple[NDArray[np.bool_], int]:
        """Which rows live and pass the filter, and how many; the last filters are remembered until a row changes."""
        if self._masks_of != state.generation:
            self._masks.clear()
            self._masks_of = state.generation
        sql, values = where_sql(where or {})
        name = (sql, *((type(value), value) for value in values))
        if name not in self._masks:
            mask = np.zeros(state.rows, bool)
            if where:
                passing = self._store.db.execute(f"SELECT row FROM rows WHERE {sql}", values)
                mask[np.fromiter((row for (row,) in passing), np.int64)] = True
            else:
                mask[:] = True
                mask[state.dead] = False
            if len(self._masks) == 4:
                self._masks.pop(next(iter(self._masks)))
            self._masks[name] = (mask, int(np.count_nonzero(mask)))
        return self._masks[name]

    def _current_cache(self, state: State, *, whole: bool = False) -> Graph | Codes | None:
        """The graph or codes that this state names, opened once; None where there are none or they are damaged."""
        name = None if state.cache is None else state.cache["file"]
        if name != self._cache_of:
            self._cache = None
            if state.cache is not None:
                from pocketvlm.edge.index_cache import BrokenCacheError

                try:
                    self._cache = self._open_cache(state.cache, whole)
                except BrokenCacheError as error:
                    warnings.warn(
                        f"{name!r} of index {str(self.path)!r} is not used: {error}; nothing is lost, but searches "
                        "compare with every row until save() makes it again",
                        stacklevel=4,
                    )
            self._cache_of = name
        return self._cache

    def _open_cache(self, facts: dict[str, Any], whole: bool) -> Graph | Codes:
        if self.dtype == "binary":
            from pocketvlm.edge.index_binary import Codes

            return Codes(self._store, facts, whole=whole)
        from pocketvlm.edge.index_graph import Graph

        return Graph(self._store, facts, whole=whole)

    def _found(self, keys: Sequence[str]) -> dict[str, tuple[int, str]]:
        found = self._store.rows_of(list(keys))
        missing = [key for key in keys if key not in found]
        if missing:
            raise UsageError(
                f"key {missing[0]!r} ({len(missing):,} of {len(keys):,} keys) is not in index {str(self.path)!r}; "
                "nothing was done, so leave it out"
            )
        return found

    def _append(self, keys: Sequence[str], rows: Rows, metadata: Sequence[dict[str, Value]]) -> None:
        """Write and name normalised rows, inside a transaction."""
        for at in range(0, len(rows), BLOCK):
            some = rows[at : at + BLOCK]
            first = self._store.append(some)
            self._store.insert(first, keys[at : at + BLOCK], metadata[at : at + BLOCK])


def holds_index(folder: Path) -> bool:
    """Whether there is an index in this folder."""
    return (folder / DATABASE).is_file()


def _top(numbers: Numbers, scores: Rows, k: int) -> tuple[Numbers, Rows]:
    """The k best of scored rows, best first, equals in the order of their numbers."""
    if len(scores) > 4 * k:
        # all that equal the k-th stay, so that which of them is taken does not depend on the partition
        keep = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
        numbers, scores = numbers[keep], scores[keep]
    order = np.lexsort((numbers, -scores))[:k]
    return numbers[order], scores[order]
