"""A million real sentences and their embeddings, for `benchmarks.index`: distinct lines of text on this machine.

`python -m benchmarks.index_corpus BUNDLE --cache DIR [--roots FOLDER ...]` writes DIR/lines.txt and DIR/rows-*.npy. It
takes about twelve minutes of one idle core and can be stopped and started again.
"""

from __future__ import annotations

import argparse
import os
import random
import site
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pocketvlm.edge import EdgeModel

SUFFIXES = (".py", ".pyi", ".md", ".txt", ".rst", ".h", ".hpp", ".pm", ".pod", ".html")
DECORATION = " \t#*\"'/-;<>|"
_PLAIN = str.maketrans("", "", "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ,.")
SENTENCES, QUERIES, SHARD = 1_000_000, 1_000, 16_384


def lines_of(roots: Iterable[str]) -> Iterator[str]:
    """Lines of five words or more, at least 92 % of whose characters are letters, spaces, commas and full stops."""
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not name.endswith(SUFFIXES) or os.path.islink(path) or os.path.getsize(path) > 4e6:
                    continue
                try:
                    text = Path(path).read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                for line in text.split("\n"):
                    line = line.strip(DECORATION)
                    if (
                        24 <= len(line) <= 160
                        and line.count(" ") > 3
                        and len(line.translate(_PLAIN)) <= 0.08 * len(line)
                    ):
                        yield line


def collect(roots: Iterable[str], file: Path) -> list[str]:
    """The first call writes `file`: distinct lines, shuffled, the queries last; later ones read it."""
    if not file.is_file():
        found = list(dict.fromkeys(lines_of(roots)))
        if len(found) < SENTENCES + QUERIES:
            raise SystemExit(f"{len(found):,} distinct lines and {SENTENCES + QUERIES:,} are needed; name more --roots")
        chosen = random.Random(0).sample(found, SENTENCES + QUERIES)
        part = file.with_suffix(".part")
        part.write_text("\n".join(chosen) + "\n", encoding="utf-8")
        part.replace(file)
    return file.read_text(encoding="utf-8").split("\n")[:-1]


def embed(model: EdgeModel, lines: list[str], folder: Path) -> None:
    """One file of float16 embeddings for each `SHARD` lines; those that are there are left."""
    for at in range(0, len(lines), SHARD):
        file = folder / f"rows-{at:08d}.npy"
        if file.is_file():
            continue
        began = time.perf_counter()
        rows = model.embed_text(lines[at : at + SHARD], batch_size=16)
        part = folder / "part.npy"
        np.save(part, rows.astype(np.float16))
        part.replace(file)
        print(f"{at + len(rows):,} of {len(lines):,}: {len(rows) / (time.perf_counter() - began):.0f}/s", flush=True)


def load_rows(folder: Path, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Gallery and queries, float32 [N, dim], normalised: projected on the strongest directions of the first 131,072.

    The projection is orthogonal and not centred, so it changes cosines as little as any to `dim` numbers can.
    """
    shards = [np.load(file).astype(np.float32) for file in sorted(folder.glob("rows-*.npy"))]
    first = np.concatenate(shards[:8])
    _, axes = np.linalg.eigh(first.T.astype(np.float64) @ first)
    basis = axes[:, ::-1][:, :dim].astype(np.float32)
    rows = np.concatenate([shard @ basis for shard in shards])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:SENTENCES], rows[SENTENCES:]


def main() -> None:
    """Collect and embed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cache", type=Path, required=True)
    installed = [sysconfig.get_path("stdlib"), *site.getsitepackages(), "/usr/share", "/usr/include", "/usr/lib"]
    parser.add_argument("--roots", nargs="*", default=installed)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    lines = collect(args.roots, args.cache / "lines.txt")
    embed(EdgeModel.load(args.bundle, precision="int8", threads=1), lines, args.cache)


if __name__ == "__main__":
    main()
