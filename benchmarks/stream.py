"""What a stream costs: the first batch of a continued run at 1,000 shards, and what draft decoding saves and changes.

    python -m benchmarks.stream --out benchmarks/results/stream.json

Shards are small and local, made in a temporary folder; pictures are noise with the spectrum of photographs. Times are
wall seconds (first batch, worker processes included) and processor seconds (decoding).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pocketvlm.data.augment import AugmentPolicy, view_params
from pocketvlm.data.near import decoded_views
from pocketvlm.data.shards import list_shards
from pocketvlm.distill.environment import describe_environment
from pocketvlm.distill.stream import StreamLoader, StreamSettings
from pocketvlm.edge.contract import ImageSpec, TextSpec

SHARDS, SAMPLES, BATCH, STUDENT = 1000, 64, 32, 96
PICTURES, VIEWS, QUALITY = 12, 4, 90
SIZES = ((640, 480), (1024, 768), (1021, 769))


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG of noise with amplitude 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    planes = []
    for _ in range(3):
        plane = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / np.maximum(frequency, 1)).real
        planes.append(128 + 45 * plane / plane.std())
    buffer = io.BytesIO()
    pixels = np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "jpeg", quality=QUALITY)
    return buffer.getvalue()


def write_shards(folder: Path) -> None:
    """SHARDS tars of SAMPLES pictures with captions."""
    pictures = [photo(128, 96, seed) for seed in range(8)]
    for number in range(SHARDS):
        with tarfile.open(folder / f"s-{number:04}.tar", "w") as archive:
            for index in range(SAMPLES):
                for suffix, data in (("jpg", pictures[index % 8]), ("txt", f"thing {index}".encode())):
                    info = tarfile.TarInfo(f"{number:04}{index:03}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def resumed(folder: Path) -> list[dict[str, Any]]:
    """Seconds from nothing (listing included) to the first batch after a position in the middle of shard 500."""
    # workers import this file too, and need no models
    from pocketvlm.students import train_tokenizer

    tokenizer = train_tokenizer([f"thing {index}" for index in range(SAMPLES)], 300)
    size = len(json.loads(tokenizer)["model"]["vocab"])
    text = TextSpec(context_length=16, vocab_size=size, tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest())
    rows: list[dict[str, Any]] = []
    for workers in (0, 2):
        for round_ in range(4):
            began = time.monotonic()
            settings = StreamSettings(
                shards=list_shards(str(folder)),
                batch_size=BATCH,
                specs=(ImageSpec(size=STUDENT),),
                tokenizer_json=tokenizer,
                text_spec=text,
            )
            loader = StreamLoader(settings, workers=workers)
            state = loader.state_dict()
            turn = 500 // loader.readers
            loader.load_state_dict({**state, "positions": [[turn, SAMPLES // 2]] * loader.readers})
            next(loader)
            seconds = time.monotonic() - began
            loader.close()
            # the first start of a worker in a process starts the server too
            rows.append({"workers": workers, "server_started": bool(workers and not round_), "seconds": seconds})
    return rows


def decoding() -> list[dict[str, Any]]:
    """Whole and draft decoding of the same views."""
    spec, rows = ImageSpec(size=STUDENT), []
    for width, height in SIZES:
        pictures = [photo(width, height, seed) for seed in range(PICTURES)]
        views = [view_params("picture", view, 0, AugmentPolicy()) for view in range(VIEWS)]
        seconds: dict[bool, list[float]] = {False: [], True: []}
        differences = []
        for data in pictures:
            for params in views:
                made = {}
                for draft in (False, True):
                    began = time.process_time()
                    (made[draft],) = decoded_views(data, params, [spec], draft=draft)
                    seconds[draft].append(time.process_time() - began)
                differences.append(float(np.abs(made[True].astype(int) - made[False].astype(int)).mean()))
        rows.append(
            {
                "jpeg": [width, height],
                "quality": QUALITY,
                "view": STUDENT,
                "views": len(differences),
                "cpu_ms_whole": 1000 * statistics.median(seconds[False]),
                "cpu_ms_draft": 1000 * statistics.median(seconds[True]),
                "mean_difference_of_255": statistics.mean(differences),
                "largest_mean_difference_of_a_view": max(differences),
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stream.json"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cc"
        folder.mkdir()
        write_shards(folder)
        first = resumed(folder)
    result = {
        "shards": SHARDS,
        "samples_per_shard": SAMPLES,
        "batch": BATCH,
        "first_batch_after_resume": first,
        "decoding": decoding(),
        "load_average": os.getloadavg()[0],
        "environment": describe_environment(),
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))


if __name__ == "__main__":
    main()
