"""The web demo in headless Chromium beside Python's onnxruntime on the same files: agreement, time, first load.

python -m benchmarks.web BUNDLE [BUNDLE ...]     # node and chromium, and `npm ci && npm run build` in mobile_demo/web
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results_folder import RESULTS, machine, write, write_between
from pocketvlm.edge import EdgeModel
from pocketvlm.edge.preprocess import decode_image

WEB = Path(__file__).resolve().parents[1] / "mobile_demo" / "web"
TEMPLATES = ("{}", "a picture of {}")
TOP = 5


def expectations(
    bundle: Path, pictures: Sequence[Path], labels: Sequence[str], queries: Sequence[str], precisions: Sequence[str]
) -> dict[str, Any]:
    """What Python's onnxruntime makes of the same pictures and texts: embeddings, best label, five best pictures."""
    names = [path.name for path in pictures]
    found = {}
    for precision in precisions:
        model = EdgeModel.load(bundle, "onnxruntime", precision)
        # one at a time, as the page does: a dynamic int8 graph takes its scale from the whole batch
        images = np.concatenate([model.embed_image(path) for path in pictures])
        texts = np.concatenate([model.embed_text(text) for text in queries])
        prompts = np.stack([np.concatenate([model.embed_text(t.format(label)) for t in TEMPLATES]) for label in labels])
        rows = prompts.mean(axis=1)
        best = (images @ rows.T / np.linalg.norm(rows, axis=1)).argmax(axis=1)
        order = np.argsort(-(texts @ images.T), axis=1, kind="stable")[:, :TOP]
        found[precision] = {
            "images": np.round(images.astype(float), 7).tolist(),
            "texts": np.round(texts.astype(float), 7).tolist(),
            "top_labels": [labels[i] for i in best],
            "top_five": [[names[i] for i in row] for row in order],
        }
    return {
        "labels": list(labels),
        "templates": list(TEMPLATES),
        "pictures": names,
        "queries": list(queries),
        "precisions": found,
    }


def measure(bundle: Path, work: Path, count: int) -> dict[str, Any]:
    """One bundle: agreement on `count` pictures of the test pool and 100 queries, time, bytes."""
    pictures, names = _pictures(work / "pictures", count)
    labels = names[:12]
    queries = [text for name in names for text in (name, f"a picture of {name}")][:100]
    expected = work / "expected.json"
    found = expectations(bundle, pictures, labels, queries, _precisions(bundle))
    _photographs(pictures, work / "pictures")
    expected.write_text(json.dumps(found | {"decoders": _decoded(pictures[:20], work / "pictures")}))
    out = work / "result.json"
    subprocess.run(
        ["node", "scripts/bench.mjs", "--bundle", str(bundle.resolve()), "--pictures", str(work / "pictures"),
         "--expected", str(expected), "--out", str(out)], cwd=WEB, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _precisions(bundle: Path) -> list[str]:
    raw = json.loads((bundle / "bundle.json").read_text())
    return [v["precision"] for v in raw["variants"] if v["target"] == "onnx" and v["precision"] in ("fp32", "int8")]


def _pictures(folder: Path, count: int) -> tuple[list[Path], list[str]]:
    """Files of the built-in set's test pool that no student of fold 0 has seen, with their names."""
    from pocketvlm.data import open_data

    samples = [s for s in open_data("openmoji?pool=test&fold=0&flags=exclude").samples if s.captions][:count]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, sample in enumerate(samples):
        data = sample.image.read()
        kind = "webp" if data[8:12] == b"WEBP" else "png"
        path = folder / f"{i:03d}.{kind}"
        path.write_bytes(data)
        paths.append(path)
    return paths, [sample.captions[0].text for sample in samples]


def _photographs(pictures: Sequence[Path], folder: Path) -> None:
    """A frame as a camera gives it (480 x 480, what is cut from 640 x 480) and a JPEG of 12 million pixels."""
    sheet = Image.new("RGB", (4000, 3000))
    for i in range(48):
        picture = Image.open(pictures[i % len(pictures)]).convert("RGB").resize((500, 500))
        sheet.paste(picture, (500 * (i % 8), 500 * (i // 8)))
    sheet.save(folder / "photo.jpg", quality=90)
    sheet.resize((640, 480)).crop((80, 0, 560, 480)).save(folder / "camera.png")


def _decoded(pictures: Sequence[Path], folder: Path) -> list[dict[str, str]]:
    """The same pictures in formats that a browser decodes itself, each with what Python decodes it to."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "JPEG 4:2:0, quality 75": ("jpg", {"quality": 75, "subsampling": 2}),
        "JPEG 4:4:4, quality 95": ("jpg", {"quality": 95, "subsampling": 0}),
        "JPEG progressive": ("jpg", {"quality": 85, "progressive": True}),
        "WebP lossy": ("webp", {"quality": 80}),
        "WebP lossless": ("webp", {"lossless": True}),
        "WebP lossless, half transparent": ("webp", {"lossless": True, "exact": True}),
    }
    rows = []
    rng = np.random.default_rng(0)
    for number, (kind, (suffix, options)) in enumerate(kinds.items()):
        for i, path in enumerate(pictures):
            image = Image.open(path).convert("RGB").resize((200, 150))
            if "transparent" in kind:
                image.putalpha(Image.fromarray(rng.integers(0, 256, (150, 200), np.uint8)))
            name = f"decode-{number}-{i}.{suffix}"
            image.save(folder / name, **options)
            (folder / f"{name}.raw").write_bytes(decode_image(folder / name).tobytes())
            rows.append({"kind": kind, "name": name, "raw": f"{name}.raw", "background": "rgb(255 255 255)"})
    return rows


def table(result: dict[str, Any]) -> str:
    """The numbers of `web.json` for the README."""
    models, about = result["models"], result["machine"]
    first = next(iter(models.values()))
    columns = [_column(model) for model in models.values()]
    decoders = first["decoders_beside_pillow_grey_levels"].items()
    return "\n".join(
        [
            f"{first['browser']}, headless, {about['cpus']} cores at a load average of {about['load_average'][0]:.0f} "
            "([result](../../benchmarks/results/web.json), `python -m benchmarks.web BUNDLE …`). Medians in "
            "milliseconds on two threads, decoding and resizing included; megabytes as sent with brotli.",
            "",
            "| int8, WASM | " + " | ".join(models) + " |",
            "|---|" + "---:|" * len(models),
            *(f"| {title} | " + " | ".join(column[title] for column in columns) + " |" for title in columns[0]),
            "",
            "Largest difference in grey levels between this browser's decoder and Pillow's, 20 pictures each: "
            + ", ".join(f"{kind}: {row['most']:.0f}" for kind, row in decoders)
            + ".",
            "",
        ]
    )


def _column(model: dict[str, Any]) -> dict[str, str]:
    load, agreed = model["first_load"], model["agreement"]
    single, int8 = (row for row in model["timing"] if row["precision"] == "int8")
    cells = {
        "first load until pictures can be indexed, MB": f"{load['ready_bytes'] / 1e6:.1f}",
        "with the text tower, everything for offline, MB": f"{load['all_bytes'] / 1e6:.1f}",
    }
    for title, key in (
        ("a picture of 224 × 224", "picture"),
        ("a camera frame of 480 × 480", "camera_frame_480"),
        ("a JPEG of 12 megapixels", "photo_12_megapixels"),
    ):
        whole, alone = int8[f"{key}_all_ms_median"], int8[f"{key}_model_ms_median"]
        cells[f"{title}, ms (the model alone)"] = f"{whole:.0f} ({alone:.0f})"
    cells["a picture, one thread: CPU time of the page, ms"] = f"{single['picture_cpu_ms_mean']:.0f}"
    for precision in ("fp32", "int8"):
        found = agreed[precision]
        cells[f"{precision}: 1 − cosine to Python, worst of 100 pictures and 100 texts"] = f"{_worst(found):.1g}"
        cells[f"{precision}: top-5 overlap with Python, mean of 100 queries"] = f"{found['mean_top5_overlap']:.2f}"
        cells[f"{precision}: same best label of 12"] = f"{found['same_top_label']} of {found['pictures']}"
    return cells


def _worst(agreed: dict[str, float]) -> float:
    return 1 - min(agreed["worst_image_cosine"], agreed["worst_text_cosine"])


def main() -> None:
    """Measure every bundle given and write `benchmarks/results/web.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = {}
    for bundle in arguments.bundles:
        name = json.loads((bundle / "bundle.json").read_text())["contract"]["name"]
        with tempfile.TemporaryDirectory() as work:
            found[name] = measure(bundle, Path(work), arguments.pictures)
    result = {"machine": machine(), "models": found}
    write("web.json", result, arguments.out)
    if arguments.out == RESULTS:
        write_between(WEB / "README.md", "numbers", table(result))


if __name__ == "__main__":
    main()
