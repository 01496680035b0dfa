"""The graph over an index's rows (HNSW, Malkov and Yashunin 2018, arXiv:1603.09320, by usearch): a cache on disk.

It holds int8 copies of the rows, keyed by row number, and is read where it lies (memory-mapped).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from usearch.index import Index

from pocketvlm.edge.index_cache import BrokenCacheError, Progress, publish, vouched
from pocketvlm.edge.index_store import Store, to_int8

CONNECTIVITY, EXPANSION = 16, 128
_MOST = 32_768  # nodes that it is asked for before all rows are compared


class Graph:
    """An opened graph. Not to be called by two threads at once."""

    def __init__(self, store: Store, facts: dict[str, Any], *, whole: bool = False) -> None:
        """Raises BrokenCacheError where the file is not what was written."""
        path = vouched(store, facts, whole=whole)
        self.rows: int = facts["rows"]
        self._nodes = _empty(store.dim)
        try:
            self._nodes.view(str(path))
        except Exception as error:  # of several types, depending on usearch's version
            raise BrokenCacheError(f"usearch cannot read it ({error})") from error
        if len(self._nodes) != facts["nodes"]:
            raise BrokenCacheError(f"it has {len(self._nodes):,} nodes instead of {facts['nodes']:,}")

    def pick(self, query: NDArray[np.float32], wanted: int, mask: NDArray[np.bool_]) -> NDArray[np.int64] | None:
        """`wanted` or more rows near the query where `mask` [rows] holds; None where comparing all rows is better."""
        passing = int(np.count_nonzero(mask))
        enough = min(wanted, passing)
        # of the nodes that are found, as many as among all pass the mask, unless it has to do with the query
        ask = int(wanted * max(1.0, 1.2 * self.rows / max(1, passing)))
        code = to_int8(query[None])[1][0]
        while ask <= max(wanted, _MOST):
            found = self._nodes.search(code, min(ask, len(self._nodes)), threads=1).keys.astype(np.int64)
            found = found[mask[found]]
            # a few nodes of a graph cannot be reached from the others
            if len(found) >= enough or (ask >= len(self._nodes) and len(found) >= 0.99 * enough):
                return found
            ask *= 4
        return None


def build_graph(store: Store, old: dict[str, Any] | None, threads: int, progress: Progress | None) -> None:
    """Make the graph of all committed rows and publish it; `old` is extended, or None begins anew."""
    state = store.state()
    graph = _empty(store.dim)
    first = 0
    if old is not None:
        graph.load(str(store.folder / old["file"]))
        first = old["rows"]
    dead = np.zeros(state.rows, bool)
    dead[state.dead] = True
    for at, codes in store.int8_blocks(first, state.rows):
        live = np.flatnonzero(~dead[at : at + len(codes)])
        if len(live):
            graph.add((live + at).astype(np.uint64), codes[live], copy=True, threads=threads)
        if progress is not None:
            progress(at + len(codes) - first, state.rows - first)
    name = f"cache-{state.generation + 1}.usearch"
    part = store.folder / f"{name}.part"
    graph.save(str(part))
    publish(store, part, name, {"rows": state.rows, "nodes": len(graph)})


def _empty(dim: int) -> Index:
    return Index(
        ndim=dim,
        metric="cos",
        dtype="i8",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION,
        expansion_search=64,
        enable_key_lookups=False,
    )
