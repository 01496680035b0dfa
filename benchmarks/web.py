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

from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.edge import EdgeModel

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
    expected.write_text(json.dumps(expectations(bundle, pictures, labels, queries, _precisions(bundle))))
    out = work / "result.json"
    subprocess.run(
        ["node", "scripts/bench.mjs", "--bundle", str(bundle.resolve()), "--pictures", str(work / "pictures"),
         "--expected", str(expected), "--out", str(out)], cwd=WEB, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(out.read_text())
    return found


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
    write("web.json", {"machine": machine(), "models": found}, arguments.out)


if __name__ == "__main__":
    main()
