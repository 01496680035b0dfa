"""The model behind the Kotlin runner's `--encoder`: pixels or ids in, an embedding out, big-endian (see Main.kt)."""

from __future__ import annotations

import sys

import numpy as np

from pocketvlm.edge.model import EdgeModel


def main(bundle: str, backend: str, precision: str) -> None:
    model = EdgeModel.load(bundle, backend, precision)  # type: ignore[arg-type]
    assert model.contract.image
    assert model.contract.text
    size, length = model.contract.image.size, model.contract.text.context_length
    read, write = sys.stdin.buffer, sys.stdout.buffer
    while tower := read.read(1):
        if tower == b"P":
            row = model.embed_pixels(np.frombuffer(read.read(size * size * 3), np.uint8).reshape(1, size, size, 3))
        else:
            row = model.embed_ids(np.frombuffer(read.read(length * 4), ">i4").astype(np.int32)[None])
        write.write(row[0].astype(">f4").tobytes())
        write.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
