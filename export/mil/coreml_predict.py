"""Run a bundle's conformance cases through Core ML on a Mac and write what it answered.

    pip install "coremltools>=9,<10" numpy Pillow
    python coreml_predict.py [BUNDLE] [--out coreml-results.json] [--compute-units ALL]

BUNDLE is the folder that holds bundle.json; left out, the one above this file. Needs macOS and nothing of pocketvlm.
`pocketvlm parity BUNDLE --reference REFERENCE --coreml-results coreml-results.json` judges the file on any system.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SCHEMA = "1.0"
UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
# ArrayFeatureType.ArrayDataType of Core ML's Model.proto
DTYPES: dict[int, Any] = {65552: np.float16, 65568: np.float32, 65600: np.float64, 131104: np.int32}

# (path of a package, compute units) -> a function from one row, uint8 [S, S, 3] or int32 [L], to the embedding
Open = Callable[[Path, str], Callable[[Any], Any]]


def open_package(path: Path, units: str) -> Callable[[Any], Any]:
    """Core ML itself; exists on macOS only."""
    import coremltools

    model = coremltools.models.MLModel(str(path), compute_units=getattr(coremltools.ComputeUnit, units))
    description = model.get_spec().description
    entry, output = description.input[0], description.output[0].name

    def predict(row: Any) -> Any:
        if entry.type.WhichOneof("Type") == "imageType":
            value: Any = Image.fromarray(row)
        else:
            value = row[None].astype(DTYPES[entry.type.multiArrayType.dataType])
        return model.predict({entry.name: value})[output]

    return predict


def cases(bundle: Path, tower: str, vectors: dict[str, Any], size: int) -> list[tuple[str, Any]]:
    """(name, input) of the recorded pixels or ids; of some pictures only a hash is recorded."""
    if tower == "text":
        return [(case["name"], np.array(case["ids"], np.int32)) for case in vectors["texts"]]
    rows = []
    for case in vectors["images"]:
        if "pixels_file" not in case:
            continue
        data = (bundle / case["pixels_file"]).read_bytes()
        if hashlib.sha256(data).hexdigest() != case["pixels_sha256"]:
            raise SystemExit(f"{case['pixels_file']} is not what was exported; copy the whole bundle again")
        rows.append((case["name"], np.frombuffer(data, np.uint8).reshape(size, size, 3)))
    return rows


def digests(bundle: Path, package: str) -> dict[str, str]:
    """File in a package -> sha256, with paths as bundle.json has them."""
    files = sorted(path for path in (bundle / package).rglob("*") if path.is_file())
    return {path.relative_to(bundle).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(bundle: Path, units: str, open_model: Open = open_package) -> dict[str, Any]:
    """Every Core ML variant of the bundle; a case that fails is written with its error, and the others go on."""
    manifest = json.loads((bundle / "bundle.json").read_text("utf-8"))
    vectors_file = bundle / manifest["conformance"]
    vectors = json.loads(vectors_file.read_text("utf-8"))
    size = (manifest["contract"].get("image") or {}).get("size", 0)
    results = []
    for variant in manifest["variants"]:
        if variant["target"] != "coreml":
            continue
        entry: dict[str, Any] = {"precision": variant["precision"], "dim": variant["dim"], "files": {}, "towers": {}}
        for tower, package in variant["files"].items():
            entry["files"] |= digests(bundle, package)
            rows: list[dict[str, Any]] = []
            try:
                predict = open_model(bundle / package, units)
                for name, value in cases(bundle, tower, vectors, size):
                    started = time.perf_counter()
                    found = np.asarray(predict(value), np.float64).reshape(-1)
                    spent = 1e3 * (time.perf_counter() - started)
                    # JSON has no NaN
                    numbers = [float(f"{v:.9g}") if np.isfinite(v) else None for v in found]
                    rows.append({"name": name, "embedding": numbers, "ms": round(spent, 3)})
            except Exception as error:  # Core ML raises bare RuntimeErrors
                entry.setdefault("errors", {})[tower] = f"{type(error).__name__}: {error}"
            entry["towers"][tower] = rows
            print(f"{variant['precision']} {tower}: {len(rows)} cases", file=sys.stderr)
        results.append(entry)
    return {
        "kind": "coreml-results",
        "schema": SCHEMA,
        "model_id": manifest["contract"]["model_id"],
        "vectors_sha256": hashlib.sha256(vectors_file.read_bytes()).hexdigest(),
        "compute_units": units,
        "machine": {"system": f"macOS {platform.mac_ver()[0]} {platform.machine()}"},
        "variants": results,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--out", type=Path, default=Path("coreml-results.json"))
    parser.add_argument("--compute-units", choices=UNITS, default="ALL")
    given = parser.parse_args(arguments)
    if platform.system() != "Darwin":
        raise SystemExit(f"Core ML predicts on macOS only and this system is {platform.system()}; run this on a Mac")
    result = run(given.bundle, given.compute_units)
    given.out.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    failed = [entry for entry in result["variants"] if "errors" in entry]
    print(f"{given.out}: {len(result['variants'])} variants, {len(failed)} with errors", file=sys.stderr)
    if failed or not result["variants"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
