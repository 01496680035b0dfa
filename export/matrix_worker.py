"""Lower one student to one target at one precision at a time, in a process that may die of it.

`export.matrix` starts `python -m pocketvlm.export.matrix_worker`. See `export.workers` for the protocol.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.contract import ModelContract, TextSpec
from pocketvlm.edge.errors import PocketvlmError, UsageError
from pocketvlm.export.calibration import DEFAULT_SIZE, open_calibration
from pocketvlm.export.fidelity import run_module
from pocketvlm.export.mil import NAME as MIL
from pocketvlm.export.mil import NOT_MODELLED, MilBackend
from pocketvlm.export.reference import task_inputs
from pocketvlm.export.source import open_source
from pocketvlm.export.targets import Calibration, Precision, Towers, get_target
from pocketvlm.export.targets.onnx import present_towers
from pocketvlm.export.unlowered import lowering_error
from pocketvlm.export.workers import Answer, serve
from pocketvlm.students.build import seeded
from pocketvlm.students.config import load_config
from pocketvlm.students.deploy import DeployTower, fuse_branches
from pocketvlm.students.image import build_image_tower, image_spec
from pocketvlm.students.text import TextTower

CALIBRATION, JUDGED = 64, 32
TASK = 512
EMBED_DIM = 384


class Judged(NamedTuple):
    """Inputs that a row is judged on, by tower; positives: of a task, for each picture the rows of its texts."""

    rows: dict[str, NDArray[Any]]
    positives: list[list[int]] | None
    description: str


def start(request: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Build the student, its calibration inputs and what the eager model says of other inputs.

    request: student (a shipped name, or a run or student folder), data and judge (`--data` sources or None), folder
    (scratch).

    Returns:
        name, weights, float_mb, inputs, judged, positives, and per tower a .npy of inputs and the mean cosine between
        their embeddings; and what lowers one (target, precision).
    """
    torch.set_num_threads(1)
    folder = Path(request["folder"])
    towers, fitted, judged, weights = _open(request["student"], request["data"], request.get("judge"))
    opened: dict[str, Any] = {"name": towers.contract.name, "weights": weights, "inputs": fitted.description}
    opened |= {"judged": judged.description, "positives": judged.positives, "between": {}, "rows": {}, "expected": {}}
    parameters = 0
    for tower, module in present_towers(towers):
        rows = judged.rows[tower]
        expected = run_module(module, rows)
        np.save(folder / f"{tower}-rows.npy", rows)
        np.save(folder / f"{tower}-expected.npy", expected)
        opened["rows"][tower] = str(folder / f"{tower}-rows.npy")
        opened["expected"][tower] = str(folder / f"{tower}-expected.npy")
        cosine = expected.astype(np.float64) @ expected.astype(np.float64).T
        opened["between"][tower] = float(cosine[~np.eye(len(cosine), dtype=bool)].mean())
        parameters += sum(parameter.numel() for parameter in module.parameters())
    opened["float_mb"] = 4 * parameters / 1e6

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        wall, processor = time.perf_counter(), time.process_time()
        target = get_target(asked["target"])
        precision = cast(Precision, asked["precision"])
        try:
            variant = target.lower(towers, precision=precision, folder=folder, calibration=fitted)
        except PocketvlmError:
            raise
        except Exception as error:  # converters raise whatever they like
            raise lowering_error(error, f"{target.name} {precision}", towers) from error
        done: dict[str, Any] = {"variant": dataclasses.asdict(variant), "seconds": time.perf_counter() - wall}
        done["processor_seconds"] = time.process_time() - processor
        if asked["target"] == "coreml" and platform.system() != "Darwin":
            done |= _evaluated(folder, variant.files, judged.rows)
        return done

    return opened, answer


def _evaluated(folder: Path, files: dict[str, str], rows: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Core ML packages, read back and computed here: what ran them, what that leaves out, the files of the answers."""
    backend = MilBackend({tower: folder / name for tower, name in files.items()})
    found = {}
    for tower, run in (("image", backend.run_image), ("text", backend.run_text)):
        if tower in files:
            found[tower] = str(folder / f"{tower}-found.npy")
            np.save(found[tower], run(rows[tower]))
    return {"found": found, "runtime": MIL, "not_modelled": NOT_MODELLED, "overflow": backend.overflow}


def _open(student: str, data: str | None, judge: str | None) -> tuple[Towers, Calibration, Judged, str]:
    """Towers, what calibrates, what judges, and whose weights they are."""
    if Path(student).is_dir():
        model = open_source(student)
        contract = model.towers.contract
        if data is None:
            return model.towers, *_split(model.towers, made_up_inputs(contract)), "given"
        tokenizer = model.tokenizer()
        size = CALIBRATION + JUDGED if judge is None else DEFAULT_SIZE
        calibration, _ = open_calibration(data, contract, tokenizer, size=size)
        assert calibration is not None, "a source was given"
        if judge is not None:
            return model.towers, calibration, _task(judge, contract, tokenizer), "given"
        _refuse_few(calibration, data)
        return model.towers, *_split(model.towers, calibration), "given"
    if data is not None:
        raise UsageError(
            f"--data {data!r} was given and student {student!r} is a name, whose random weights have no tokenizer; "
            "its texts could not be encoded, so leave --data out or give a run folder"
        )
    towers = random_towers(student)
    return towers, *_split(towers, made_up_inputs(towers.contract)), "random"


def _split(towers: Towers, inputs: Calibration) -> tuple[Calibration, Judged]:
    """The first rows to calibrate with, the others to judge on."""
    fitted = dataclasses.replace(inputs, pixels=inputs.pixels[:CALIBRATION], ids=inputs.ids[:CALIBRATION])
    every = {"image": inputs.pixels, "text": inputs.ids}
    rows: dict[str, NDArray[Any]] = {tower: every[tower][CALIBRATION:] for tower, _ in present_towers(towers)}
    return fitted, Judged(rows, None, f"the last {JUDGED} of: {inputs.description}")


def _task(judge: str, contract: ModelContract, tokenizer: Any) -> Judged:
    from pocketvlm.data import open_data

    if contract.image is None or contract.text is None:
        raise UsageError(
            f"--judge {judge!r} was given and {contract.name!r} is of kind {contract.kind!r}; a change of R@5 needs a "
            "picture and a text tower, so leave --judge out"
        )
    source = open_data(judge)
    subject: Any = SimpleNamespace(contract=contract, ids=tokenizer.encode)
    task = task_inputs(source.samples, subject, TASK, 0)
    said = f"{source.name}: {len(task['uids'])} pictures, {len(task['texts'])} texts"
    return Judged({"image": task["pixels"], "text": task["ids"]}, task["positives"], said)


def _refuse_few(calibration: Calibration, data: str) -> None:
    rows = min(len(calibration.pixels), len(calibration.ids)) if len(calibration.ids) else len(calibration.pixels)
    if rows <= CALIBRATION:
        raise UsageError(
            f"data {data!r} gives {rows} inputs and {CALIBRATION} calibrate; none would be left to judge on, so give "
            f"{CALIBRATION + JUDGED} or more"
        )


def random_towers(name: str) -> Towers:
    """A shipped student with random weights (seed 0) and the vocabulary that its configuration asks for.

    Batch norms get the statistics of made-up pictures: with those they start from, activations shrink or grow from
    layer to layer as in no trained network, and int8 would be judged on that.
    """
    config = load_config(name)
    text = TextSpec(context_length=config.text.context_length, vocab_size=config.text.vocab_size)
    with seeded(0, "matrix"):
        image_tower = build_image_tower(config.image, EMBED_DIM, load_weights=False)
        text_tower = TextTower(config.text, text, EMBED_DIM)
    contract = ModelContract(
        kind="dual",
        name=config.name,
        model_id=f"{config.name}-random",
        space_id=f"{config.name}-random",
        embed_dim=EMBED_DIM,
        dims=(EMBED_DIM,),
        image=image_spec(config.image),
        text=text,
        logit_scale=10.0,
    )
    _settle(image_tower, made_up_pictures(32, config.image.size, seed=1))
    fuse_branches(image_tower)
    image, words = (DeployTower(tower).eval().requires_grad_(False) for tower in (image_tower, text_tower))
    return Towers(image, words, contract)


@torch.no_grad()
def _settle(tower: nn.Module, pixels: NDArray[np.uint8]) -> None:
    tower.eval()
    norms = [m for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # the mean of all batches
    if norms:
        tower(torch.from_numpy(pixels))
    tower.eval()


def made_up_inputs(contract: ModelContract) -> Calibration:
    """Smooth coloured pictures and random ids, for calibration and, the last of them, to judge on."""
    count = CALIBRATION + JUDGED
    pixels, ids = np.zeros((0, 1, 1, 3), np.uint8), np.zeros((0, 1), np.int32)
    if contract.image is not None:
        pixels = made_up_pictures(count, contract.image.size, seed=0)
    if contract.text is not None:
        rng = np.random.default_rng(0)
        ids = np.full((count, contract.text.context_length), contract.text.pad_id, np.int32)
        for row in ids:
            length = rng.integers(3, len(row))
            words = rng.integers(0, contract.text.vocab_size - 1, length)
            row[:length] = words + (words >= contract.text.pad_id)
    return Calibration(pixels, ids, "made-up smooth pictures and random ids")


def made_up_pictures(count: int, size: int, *, seed: int) -> NDArray[np.uint8]:
    """Sums of two waves in each colour, uint8 [count, size, size, 3]; noise alone would leave activations alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    rows = np.zeros((count, size, size, 3), np.uint8)
    for row in rows:
        for colour in range(3):
            waves = [
                np.sin(2 * np.pi * (a * x + b * y) + phase)
                for a, b, phase in zip(rng.uniform(-6, 6, 2), rng.uniform(-6, 6, 2), rng.uniform(0, 6.28, 2))
            ]
            level = rng.uniform(60, 195) + rng.uniform(10, 60) * (waves[0] + waves[1])
            row[..., colour] = level.clip(0, 255).round()
    return rows


if __name__ == "__main__":
    serve(start)
