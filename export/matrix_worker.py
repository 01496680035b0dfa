"""Lower one student to one target at one precision at a time, in a process that may die of it.

`export.matrix` starts `python -m pocketvlm.export.matrix_worker`. See `export.workers` for the protocol.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pocketvlm.edge.contract import ModelContract, TextSpec
from pocketvlm.edge.errors import UsageError
from pocketvlm.export.calibration import open_calibration
from pocketvlm.export.fidelity import run_module
from pocketvlm.export.source import open_source
from pocketvlm.export.targets import Calibration, Precision, Towers, get_target
from pocketvlm.export.targets.onnx import present_towers
from pocketvlm.export.workers import Answer, serve
from pocketvlm.students.build import seeded
from pocketvlm.students.config import load_config
from pocketvlm.students.deploy import DeployTower, fuse_branches
from pocketvlm.students.image import build_image_tower, image_spec
from pocketvlm.students.text import TextTower

CALIBRATION, JUDGED = 64, 32
EMBED_DIM = 384


def start(request: dict[str, Any]) -> tuple[dict[str, Any], Answer]:
    """Build the student, its calibration inputs and what the eager model says of other inputs.

    request: student (a shipped name, or a run or student folder), data (a `--data` source or None), folder (scratch).

    Returns:
        name, weights, float_mb, inputs, and per tower a .npy of inputs and the mean cosine between their embeddings;
        and what lowers one (target, precision).
    """
    torch.set_num_threads(1)
    folder = Path(request["folder"])
    towers, calibration, weights = _open(request["student"], request["data"])
    judged = {
        "image": calibration.pixels[CALIBRATION:] if towers.image is not None else None,
        "text": calibration.ids[CALIBRATION:] if towers.text is not None else None,
    }
    fitted = dataclasses.replace(
        calibration, pixels=calibration.pixels[:CALIBRATION], ids=calibration.ids[:CALIBRATION]
    )
    opened: dict[str, Any] = {"name": towers.contract.name, "weights": weights, "inputs": calibration.description}
    opened |= {"between": {}, "rows": {}, "expected": {}}
    parameters = 0
    for tower, module in present_towers(towers):
        rows = cast("NDArray[Any]", judged[tower])
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
        variant = target.lower(towers, precision=cast(Precision, asked["precision"]), folder=folder, calibration=fitted)
        seconds = time.perf_counter() - wall
        return {
            "variant": dataclasses.asdict(variant),
            "seconds": seconds,
            "processor_seconds": time.process_time() - processor,
        }

    return opened, answer


def _open(student: str, data: str | None) -> tuple[Towers, Calibration, str]:
    if Path(student).is_dir():
        model = open_source(student)
        if data is not None:
            size = CALIBRATION + JUDGED
            calibration, _ = open_calibration(data, model.towers.contract, model.tokenizer(), size=size)
            assert calibration is not None, "a source was given"
            _refuse_few(calibration, data)
            return model.towers, calibration, "given"
        return model.towers, made_up_inputs(model.towers.contract), "given"
    if data is not None:
        raise UsageError(
            f"--data {data!r} was given and student {student!r} is a name, whose random weights have no tokenizer; "
            "its texts could not be encoded, so leave --data out or give a run folder"
        )
    towers = random_towers(student)
    return towers, made_up_inputs(towers.contract), "random"


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
