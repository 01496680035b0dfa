"""A million real sentences in an `EmbeddingIndex`: query time, recall, load time, memory, size (docs/search.md).

    python -m benchmarks.index_corpus BUNDLE --cache DIR
    python -m benchmarks.index --cache DIR

The first makes the embeddings (`benchmarks.index_corpus`), the second the indexes under DIR, those that are there
already excepted, with two threads, and then measures each in a process of its own, on one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index_corpus import load_rows
from pocketvlm.edge.index import EmbeddingIndex

DIM, K, SPACE = 256, 10, "benchmark"
DTYPES = ("f16", "binary")  # --dtypes takes f32 and int8 too, whose graphs are built like that of f16
FLOORS = {"p50_ms": 3.0, "recall": 0.95, "load_s": 0.5, "binary_mb": 64.0}
# the last digit of a row's number, and its last three: filters that a tenth and a thousandth of the rows pass
FILTERS = {"a tenth": {"tens": 3}, "a thousandth": {"thousands": 3}}


def main() -> None:
    """Build, measure, write the result and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES))
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--measure", help="in this process, printing JSON: what the parent process runs")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.cache, args.measure)))
        return
    if not (args.cache / "truth.npz").is_file():
        write_truth(args.cache)
    for dtype in args.dtypes:
        build(args.cache, dtype)
    if args.build_only:
        return
    from benchmarks.results_folder import RESULTS, machine, write, write_between

    command = [sys.executable, "-m", "benchmarks.index", "--cache", str(args.cache), "--measure"]
    rows = []
    for dtype in args.dtypes:
        load = os.getloadavg()[0]
        done = subprocess.run([*command, dtype], capture_output=True, text=True, check=True)
        facts = json.loads(done.stdout) | json.loads((args.cache / f"{dtype}.json").read_text())
        rows.append(facts | {"load_average": round(load, 1)})
        print(rows[-1], flush=True)
    result = {"machine": machine(), "floors": FLOORS, "k": K, "indexes": rows}
    write("index.json", result)
    page = RESULTS.parents[1] / "docs" / "search.md"
    write_between(page, "index", table(rows))


def write_truth(cache: Path) -> None:
    """True neighbours of the queries by float32 cosine, of all rows and of those that pass each filter."""
    gallery, queries = load_rows(cache, DIM)
    np.save(cache / "gallery.npy", gallery)
    np.save(cache / "queries.npy", queries)
    rows = np.arange(len(gallery))
    groups = {"all": rows >= 0, "a tenth": rows % 10 == 3, "a thousandth": rows % 1000 == 3}
    found: dict[str, list[Any]] = {name: [] for name in groups}
    for at in range(0, len(queries), 100):
        scores = queries[at : at + 100] @ gallery.T
        for name, mask in groups.items():
            some = scores[:, mask]
            found[name].append(np.flatnonzero(mask)[np.argpartition(-some, K, axis=1)[:, :K]])
    np.savez(cache / "truth.npz", **{name: np.concatenate(parts) for name, parts in found.items()})


def build(cache: Path, dtype: str) -> None:
    """Make the index of a dtype, unless it is there."""
    done = cache / f"{dtype}.json"
    if done.is_file():
        return
    gallery = np.load(cache / "gallery.npy", mmap_mode="r")
    began = time.perf_counter()
    with EmbeddingIndex.create(cache / f"{dtype}.index", SPACE, DIM, dtype=dtype) as index:  # type: ignore[arg-type]
        for at in range(0, len(gallery), 65_536):
            numbers = range(at, min(at + 65_536, len(gallery)))
            facts = [{"tens": n % 10, "thousands": n % 1000} for n in numbers]
            index.add([f"s{n}" for n in numbers], gallery[at : at + 65_536], facts, space=SPACE)
        added, cpu = time.perf_counter(), time.process_time()
        index.save(threads=2, progress=lambda rows, of: print(f"{dtype}: {rows:,} of {of:,}", flush=True))
        facts_of = {
            "add_s": added - began,
            "save_s": time.perf_counter() - added,
            "save_cpu_s": time.process_time() - cpu,
        }
    sizes = {path.name: path.stat().st_size for path in sorted((cache / f"{dtype}.index").iterdir())}
    done.write_text(json.dumps({key: round(value, 1) for key, value in facts_of.items()} | {"bytes": sizes}))


def measure(cache: Path, dtype: str) -> dict[str, Any]:
    """Load, query one by one and filtered, and how much memory that took; files are put out of the page cache first."""
    import pocketvlm.edge.index_binary
    import pocketvlm.edge.index_graph  # noqa: F401  (their import belongs to the baseline)

    queries, truth = np.load(cache / "queries.npy"), np.load(cache / "truth.npz")
    folder = cache / f"{dtype}.index"
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    queries[:10] @ queries[:10].T  # the linear algebra library takes its buffers
    base = memory()
    began = time.perf_counter()
    index = EmbeddingIndex.load(folder)
    loaded = time.perf_counter()
    index.search(queries[0], K, space=SPACE)
    cold = {"load_s": loaded - began, "first_query_s": time.perf_counter() - loaded}
    index.close()
    began = time.perf_counter()
    index = EmbeddingIndex.load(folder)
    facts: dict[str, Any] = {"dtype": dtype, "rows": len(index), "dim": index.dim, "queries": len(queries)}
    facts["load_s"] = time.perf_counter() - began
    facts["cold"] = cold | {"first_pass": run(index, queries, truth["all"], None)}
    facts |= run(index, queries, truth["all"], None)
    facts["resident_mb"] = {key: round((value - base[key]) / 2**20, 1) for key, value in memory().items()}
    facts["filtered"] = {name: run(index, queries[:200], truth[name], where) for name, where in FILTERS.items()}
    facts["candidates"] = {}
    for count in (64, 128, 256) if dtype != "binary" else (250, 1000):
        facts["candidates"][count] = run(index, queries[:200], truth["all"], None, candidates=count)
    facts["exact_cpu_ms"] = run(index, queries[:5], truth["all"], None, exact=True)["cpu_p50_ms"]
    index.close()
    return facts


def run(index: EmbeddingIndex, queries: Any, truth: Any, where: Any, **options: Any) -> dict[str, float]:
    """Times of single queries in ms, by the clock and of the processor, and the share of true neighbours found."""
    times, busy, right = [], [], 0
    for query, wanted in zip(queries, truth):
        began, work = time.perf_counter(), time.thread_time()
        hits = index.search(query, K, space=SPACE, where=where, **options)[0]
        times.append(1e3 * (time.perf_counter() - began))
        busy.append(1e3 * (time.thread_time() - work))
        right += len({f"s{row}" for row in wanted} & {hit.key for hit in hits})
    p50, p95 = np.percentile(times, (50, 95))
    return {
        "p50_ms": round(float(p50), 2),
        "p95_ms": round(float(p95), 2),
        "cpu_p50_ms": round(float(np.median(busy)), 2),
        "recall": round(right / len(queries) / K, 4),
    }


def memory() -> dict[str, int]:
    """Resident bytes of this process: all, its own (anonymous), and pages of files that it has mapped."""
    names = {"VmRSS": "all", "RssAnon": "anonymous", "RssFile": "mapped"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[words[0].rstrip(":")]: 1024 * int(words[1]) for words in lines if words[0].rstrip(":") in names}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the measured indexes."""
    lines = [
        "| dtype | p50 ms | p95 ms | p50 of processor ms | recall@10 | load s | cold: load, first query s, p50 ms "
        "| resident MB (own + mapped) | on disk MB | save s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cold, kept = row["cold"], row["resident_mb"]
        held = f"{kept['all']} ({kept['anonymous']} + {kept['mapped']})"
        lines.append(
            f"| {row['dtype']} | {row['p50_ms']} | {row['p95_ms']} | {row['cpu_p50_ms']} | {row['recall']:.3f} "
            f"| {row['load_s']:.3f} "
            f"| {cold['load_s']:.2f}, {cold['first_query_s']:.2f}, {cold['first_pass']['p50_ms']} | {held} "
            f"| {sum(row['bytes'].values()) / 1e6:,.0f} | {row['save_s']:,.0f} |"
        )
    lines += [
        "",
        "| dtype | candidates: recall@10, processor ms | filter: a tenth pass | a thousandth pass |",
        "|---|---|---|---|",
    ]
    for row in rows:
        tried = "; ".join(f"{n}: {one['recall']:.3f}, {one['cpu_p50_ms']}" for n, one in row["candidates"].items())
        kept = [f"{one['recall']:.3f}, {one['cpu_p50_ms']}" for one in row["filtered"].values()]
        lines.append(f"| {row['dtype']} | {tried} | {kept[0]} | {kept[1]} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
