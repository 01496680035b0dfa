"""How closely saved Core ML packages of every named student compute the student, by `coreml-mil`, without a Mac.

    python -m benchmarks.coreml_eval                  # every named student, five minutes on one core
    python -m benchmarks.coreml_eval vit-tiny --table # these; print the tables of docs/parity.md afterwards
    python -m benchmarks.coreml_eval --trained runs/named  # runs of benchmarks.named_students, their fold 0

Weights: random from seed 0, or those that the student starts from (EfficientNet-Lite0, MiniLM). Each package is
written, read back from disk and run on 24 OpenMoji pictures and their names, and on the generated cases of
`export.cases` (noise, checkerboards, odd encodings; odd texts). The answers are compared with the unpatched eager
student in float64. Floors, over the real rows of a tower: 100 dB in float32, 50 dB in float16. Kinds: "fp32" and "fp16"
as `export` writes them (iOS 17); "ios18-fp16" has Core ML's attention operation; "w8" are int8 weights and "lut6" even
6-bit palettes on fp16, held to no floor. "eager_half" is no package: torch itself, every layer's result rounded.

Trained runs are written with calibration data, as `export` does, at fp32 and fp16 only.

The result, benchmarks/results/coreml_eval.json, is written after each student, with the machine and its load; students
that are in it already are left alone without --again. --budget-s starts no further student once so many CPU seconds
are spent, and says which were not run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch import nn

from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.data import open_data
from pocketvlm.data.sample import Sample
from pocketvlm.edge.preprocess import load_image
from pocketvlm.edge.tokenizer import Tokenizer
from pocketvlm.export.calibration import open_calibration
from pocketvlm.export.cases import golden_images, nasty_texts
from pocketvlm.export.compare import drift
from pocketvlm.export.mil import NOT_MODELLED, MilBackend
from pocketvlm.export.targets import coreml
from pocketvlm.export.targets.base import Calibration, Towers
from pocketvlm.export.targets.onnx import quiet
from pocketvlm.students import build_student, deploy_image, deploy_text, train_tokenizer
from pocketvlm.students.config import load_config, student_names
from pocketvlm.students.inherit import inherit_tokenizer
from pocketvlm.students.io import load_student

NAME, SEED, DIM, REAL = "coreml_eval.json", 0, 384, 24
FLOORS = {"fp32": 100.0, "fp16": 50.0, "ios18-fp16": 50.0}
KINDS = ("fp32", "fp16", "ios18-fp16", "w8", "lut6")


@functools.cache
def real() -> tuple[Sample, ...]:
    """Pictures with names."""
    return tuple(open_data("openmoji?pool=test&fold=0").samples[:REAL])


def student_of(name: str) -> Any:
    """The named student in eval mode, with a tokenizer of a few hundred pieces of its kind."""
    config = load_config(name)
    names = [sample.captions[0].text for sample in real()]
    texts = [*names, *(case.text for case in nasty_texts(config.text.context_length) if isinstance(case.text, str))]
    # MiniLM's tokenizer keeps its 1,658 single characters
    tokenizer = inherit_tokenizer(texts, 2000) if config.text.weights == "minilm-l6" else train_tokenizer(texts, 400)
    return build_student(name, embed_dim=DIM, tokenizer_json=tokenizer, seed=SEED).eval()


def cases_of(student: Any) -> dict[str, NDArray[Any]]:
    """ "image", "text": real inputs, then generated ones; uint8 [n, S, S, 3] pixels, int32 [m, L] ids."""
    images = [case for case in golden_images(real(), count=REAL) if case.error is None]
    names = [sample.captions[0].text for sample in real()]
    odd = [case.text for case in nasty_texts(student.text_spec.context_length) if case.error is None]
    encode = Tokenizer(student.tokenizer_json, student.text_spec).encode
    return {
        "image": np.stack([load_image(case.data, student.image_spec) for case in images]),
        "text": encode([*names, *(text for text in odd if isinstance(text, str))]),
    }


def exact(student: Any, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float64]]:
    """The unpatched student's unit embeddings in float64."""
    wide = copy.deepcopy(student).double()
    with torch.no_grad():
        found = {
            "image": torch.cat([wide.encode_image(torch.from_numpy(row[None])).embedding for row in rows["image"]]),
            "text": torch.cat([wide.encode_text(torch.from_numpy(row[None])).embedding for row in rows["text"]]),
        }
    return {key: (value / value.norm(dim=-1, keepdim=True)).numpy() for key, value in found.items()}


def eager_half(module: nn.Module, rows: NDArray[Any]) -> NDArray[np.float32]:
    """The same tower in torch, its weights and the result of every layer rounded to float16: no package, no evaluator.
    What it loses is the model's own loss in float16."""
    half = copy.deepcopy(module).float()
    for value in half.parameters():
        value.data = value.data.half().float()
    for layer in half.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _, __, y: y.half().float() if y.is_floating_point() else y)
    with torch.no_grad():
        return torch.cat([half(torch.from_numpy(row[None])) for row in rows]).numpy()


def lower(towers: Towers, kind: str, folder: Path, calibration: Calibration | None) -> dict[str, Path]:
    """Packages of one kind: tower -> path. "w8" and "lut6" are made of the "fp16" ones, which must be there."""
    if kind in ("w8", "lut6"):
        return {tower: compress(folder / f"coreml/{tower}-fp16.mlpackage", kind) for tower in ("image", "text")}
    newer = {"DEPLOYMENT_TARGET": "iOS18", "_SPECIFICATION_VERSION": 9} if kind.startswith("ios18") else {}
    folder = folder / "ios18" if newer else folder
    with patch.multiple(coreml, **newer) if newer else contextlib.nullcontext():
        precision = "fp32" if kind == "fp32" else "fp16"
        written = coreml.CoreMLTarget().lower(towers, precision=precision, folder=folder, calibration=calibration)
    return {tower: folder / relative for tower, relative in written.files.items()}


def compress(path: Path, kind: str) -> Path:
    """coremltools' own data-free compression of a package."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    model = ct.models.MLModel(str(path), skip_model_load=True)
    with quiet(), contextlib.redirect_stderr(io.StringIO()), np.errstate(all="ignore"):
        if kind == "w8":
            config: Any = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
            smaller = cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))
        else:
            config = cto.OpPalettizerConfig(mode="uniform", nbits=6)
            smaller = cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))
    target = path.with_name(f"{path.stem}-{kind}.mlpackage")
    smaller.save(str(target))
    return target


def measure(name: str, run: Path | None = None) -> dict[str, Any]:
    """Every kind of one student, or of a trained run: tower -> dB and what was run, or the sentence of its failure."""
    student = student_of(name) if run is None else load_student(run / "student").eval()
    calibration = None
    if run is not None:
        tokenizer = Tokenizer(student.tokenizer_json, student.text_spec)
        calibration, _ = open_calibration("openmoji?pool=student&fold=0", student.contract, tokenizer)
    towers = Towers(deploy_image(student), deploy_text(student), student.contract)
    rows = cases_of(student)
    right = exact(student, rows)
    halves = {"image": eager_half(towers.image, rows["image"]), "text": eager_half(towers.text, rows["text"])}  # type: ignore[arg-type]
    result: dict[str, Any] = {"eager_half": {tower: judge(right[tower], halves[tower]) for tower in halves}}
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS if run is None else ("fp32", "fp16"):
            started = time.process_time()
            try:
                backend = MilBackend(lower(towers, kind, Path(folder), calibration))
                entry: dict[str, Any] = {
                    "image": judge(right["image"], backend.run_image(rows["image"])),
                    "text": judge(right["text"], backend.run_text(rows["text"])),
                }
                for tower in ("image", "text"):
                    entry[tower]["operations"] = backend.operations(tower)
                    if kind in FLOORS:
                        entry[tower]["meets_floor"] = entry[tower]["sqnr_db"] >= FLOORS[kind]
            except Exception as error:  # converters raise whatever they like; the table shall say so
                entry = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
            result[kind] = entry | {"cpu_s": round(time.process_time() - started, 1)}
            print(name, kind, {k: v if k == "failed" else v["sqnr_db"] for k, v in entry.items()}, flush=True)
    return result


def judge(right: NDArray[np.float64], found: NDArray[np.float32]) -> dict[str, Any]:
    """dB over the real rows and of the worst of them, their worst 1 - cosine, and dB over the generated rows."""
    real, generated = drift(right[:REAL], found[:REAL]), drift(right[REAL:], found[REAL:])
    return {
        "rows": real.rows,
        "sqnr_db": round(real.sqnr_db, 1),
        "worst_row_db": round(real.sqnr_db_min, 1),
        "one_minus_cosine_max": float(f"{real.one_minus_cosine_max:.2g}"),
        "generated_rows": generated.rows,
        "generated_sqnr_db": round(generated.sqnr_db, 1),
    }


def table(students: dict[str, Any], columns: tuple[str, ...]) -> str:
    """dB of picture and text tower, as the rows of docs/parity.md."""
    lines = [f"| student | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, kinds in sorted(students.items()):
        lines.append(f"| `{name}` | {' | '.join(_cell(kinds[kind]) for kind in columns)} |")
    return "\n".join(lines)


def _cell(entry: dict[str, Any]) -> str:
    return "fails" if "failed" in entry else f"{entry['image']['sqnr_db']} / {entry['text']['sqnr_db']}"


def main(
    students: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    budget_s: float = 900.0,
    again: bool = False,
    trained: Path | None = None,
    table_only: Annotated[bool, tyro.conf.arg(name="table")] = False,
) -> None:
    """Measure, and write the result after each student."""
    torch.set_num_threads(1)
    path = RESULTS / NAME
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"students": {}}
    known = result["students"] if trained is None else result.setdefault("trained", {})
    wanted = [] if table_only and not students else list(students or student_names())
    started = time.process_time()
    for name in wanted:
        if name in known and not again:
            continue
        if time.process_time() - started > budget_s:
            print(f"{name}: not run, {budget_s:.0f} CPU seconds are spent")
            continue
        known[name] = measure(name, trained and trained / f"{name}-f0")
        result |= {
            "command": "python -m benchmarks.coreml_eval",
            "seed": SEED,
            "embed_dim": DIM,
            "floors_db": FLOORS,
            "not_modelled": NOT_MODELLED,
            "machine": machine(),
        }
        result["not_run"] = [other for other in student_names() if other not in result["students"]]
        write(NAME, result)
    if table_only:
        print(table(result["students"], (*KINDS, "eager_half")))
        print(table(result.get("trained", {}), ("fp32", "fp16", "eager_half")))


if __name__ == "__main__":
    tyro.cli(main)
