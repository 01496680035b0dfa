"""The web app: built from its lock file and tried in headless Chromium, on a bundle that is exported here.

POCKETVLM_WEB_BUNDLE names another bundle to try it on, a trained one for instance.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.web import WEB, expectations

pytestmark = pytest.mark.web
ROOT = Path(__file__).resolve().parents[2]


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(*command: str, **environment: str) -> None:
    found = subprocess.run(
        command, cwd=WEB, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert found.returncode == 0, f"{' '.join(command)}\n{found.stdout[-6000:]}\n{found.stderr[-3000:]}"


def _export(folder: Path, toy: Any) -> Path:
    from pocketvlm.export.bundle import export_bundle

    return export_bundle(toy.toy_student(), folder, ["onnx:fp32", "onnx:int8"], calibration_data=toy.toy_data())


def _toy_pictures(folder: Path, toy: Any) -> tuple[list[Path], list[str]]:
    folder.mkdir()
    samples = toy.toy_data().samples
    paths = [folder / f"{i:02d}.png" for i in range(len(samples))]
    for path, sample in zip(paths, samples, strict=True):
        path.write_bytes(sample.image.read())
    return paths, [sample.label for sample in samples]


def _asked(folder: Path, bundle: Path, cases: Any) -> Path:
    """A minute model that answers, beside the bundle at fp32 and at int8, and what Python says with it."""
    from pocketvlm.export.vlm.bundle import export_vlm
    from pocketvlm.mobile import prepare
    from pocketvlm.students.vlm import save_vlm

    toy = _module("toy_vlm", ROOT / "tests" / "export" / "toy_vlm.py")
    save_vlm(toy.toy_vlm(context_length=112), folder / "talker")
    made = {name: export_vlm(folder / "talker", folder / f"vlm-{name}", ["onnx"], [name]) for name in ("fp32", "int8")}
    bundles = {name: str(prepare("web", bundle, folder / f"web-{name}", vlm=vlm).folder) for name, vlm in made.items()}
    written = folder / "asked.json"
    written.write_text(json.dumps({"bundles": bundles, **cases.asked(made["fp32"], folder / "asked")}))
    return written


def test_the_app_builds_and_does_what_it_says_in_chromium(tmp_path: Path) -> None:
    # a missing tool fails: an app that was not tried has not passed
    assert shutil.which("npm"), "npm is missing, so the web app cannot be built; install Node.js 20.19 or newer"
    toy = _module("toy_parity", ROOT / "tests" / "export" / "toy_parity.py")
    cases = _module("web_cases", Path(__file__).with_name("web_cases.py"))
    given = os.environ.get("POCKETVLM_WEB_BUNDLE")
    bundle = Path(given).resolve() if given else _export(tmp_path / "bundle", toy)
    written = tmp_path / "cases.json"
    written.write_text(json.dumps(cases.cases(cases.tokenizers_of(bundle))))
    pictures, names = _toy_pictures(tmp_path / "pictures", toy)
    queries = [text for name in names for text in (name, f"a picture of a {name}", f"two {name}s")][:100]
    asked = _asked(tmp_path, bundle, cases)
    expected = tmp_path / "expected.json"
    expected.write_text(json.dumps(expectations(bundle, pictures, names[:8], queries, ["fp32", "int8"])))

    _run("npm", "ci")
    _run("npm", "run", "build")
    report = tmp_path / "report.json"
    _run(
        "npx", "vitest", "run", "--reporter=json", f"--outputFile={report}",
        WEB_BUNDLE=str(bundle), PYTHON_CASES=str(written), EXPECTED=str(expected), ASKED=str(asked),
    )  # fmt: skip
    counts = json.loads(report.read_text())
    assert counts["numPassedTests"] == counts["numTotalTests"] >= 45, counts


def test_the_app_asks_nobody_else() -> None:
    named = [path for path in (WEB / "src").rglob("*") if path.suffix in (".ts", ".css")]
    named += [WEB / "index.html", *(WEB / "public").glob("*.webmanifest")]
    assert len(named) > 20
    for path in named:
        found = set(re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8")))
        assert found <= {"http://www.w3.org/2000/svg"}, path


def test_its_packages_come_from_the_users_own_registry() -> None:
    lock = json.loads((WEB / "package-lock.json").read_text())
    assert not [name for name, entry in lock["packages"].items() if "resolved" in entry]
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)
