"""The web demo's screen that answers, in headless Chromium: size, time, and whether its answers are Python's.

python -m benchmarks.web_ask BUNDLE VLM_BUNDLE     # node and chromium, and `npm run build` in mobile_demo/web
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.results_folder import RESULTS, machine, write, write_between
from benchmarks.web import WEB
from pocketvlm.edge.vlm import EdgeVLM
from pocketvlm.mobile import prepare

DESCRIBE = "Describe the picture."


def measure(bundle: Path, vlm: Path, work: Path, count: int) -> dict[str, Any]:
    """Two questions about each of `count` scenes of the test pool and a description.

    Args:
        vlm: of kind "vlm", with onnx fp32 (the standard) and what `pocketvlm mobile prepare web` takes of it.
    """
    prepared = prepare("web", bundle, work / "bundle", vlm=vlm).folder
    precise = EdgeVLM.load(vlm, "onnxruntime", "fp32")
    model = EdgeVLM.load(prepared / "vlm", "onnxruntime")
    (work / "pictures").mkdir()
    expected = []
    for picture, question in _questions(work / "pictures", count):
        path = work / "pictures" / picture
        answers = {"ids": model.generate(path, question).ids, "fp32_ids": precise.generate(path, question).ids}
        expected.append({"picture": picture, "question": question, **answers})
    (work / "expected.json").write_text(json.dumps(expected))
    subprocess.run(
        ["node", "scripts/ask.mjs", "--bundle", str(prepared.resolve()), "--pictures", str(work / "pictures"),
         "--expected", str(work / "expected.json"), "--out", str(work / "result.json")], cwd=WEB, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((work / "result.json").read_text())
    return {"model": model.contract.name, "precision": model.variant.precision, **found}


def _questions(folder: Path, count: int) -> list[tuple[str, str]]:
    from pocketvlm.data.scene_questions import ask_about
    from pocketvlm.data.scenes import SceneTable, picture_set

    pictures = picture_set("test", fold=0)
    table = SceneTable.build(pictures, 384)
    found = []
    for index in range(count):
        scene, questions = ask_about(pictures, seed=1, index=index, count=2)
        name = f"{index:03d}.png"
        Image.fromarray(table.compose(scene)).save(folder / name)
        found += [(name, text) for text in (*(q.text for q in questions), DESCRIBE)]
    return found


def table(result: dict[str, Any]) -> str:
    """The numbers of `web_ask.json` for the README."""
    about, found = result["machine"], result["asked"]
    return (
        f"Questions: `{found['model']}` at {found['precision']}, {found['browser']}, headless, {found['threads']} "
        f"threads on {about['cpus']} cores at a load average of {about['load_average'][0]:.0f} "
        "([result](../../benchmarks/results/web_ask.json), `python -m benchmarks.web_ask BUNDLE VLM_BUNDLE`): "
        f"{found['bytes_on_first_visit'] / 1e6:.1f} MB fetched when the screen is first opened (uncompressed), "
        f"{found['open_ms'] / 1e3:.1f} s until it can answer, then {found['first_token_ms_median']:.0f} ms to the "
        f"first token (picture of 384 × 384, decoding included) and {found['tokens_per_second_median']:.0f} tokens/s, "
        f"medians of {found['answers']} answers about scenes of the test pool; {found['same_as_python_fp32']} of them "
        f"are word for word Python's at fp32, {found['same_as_python']} Python's at {found['precision']}.\n"
    )


def main() -> None:
    """Measure and write `benchmarks/results/web_ask.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("vlm", type=Path)
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(arguments.bundle, arguments.vlm, Path(work), arguments.scenes)
    result = {"machine": machine(), "asked": found}
    write("web_ask.json", result, arguments.out)
    if arguments.out == RESULTS:
        write_between(WEB / "README.md", "asked", table(result))


if __name__ == "__main__":
    main()
