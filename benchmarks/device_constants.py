"""What a device does when it trains, for `pocketvlm plan` (distill/devices.json).

    python -m benchmarks.device_constants                               # one core of this machine
    python -m benchmarks.device_constants --device cuda --out FOLDER    # this machine's GPU

Effective FLOP/s, two for each multiply-accumulate, of forward and backward: convolutions as the image tower of
`mnv4-050` at 128 px has them (depthwise ones among them), and matrix products as a text tower of four layers of width
256 has them, over 32 pieces. The work is counted on the CPU, as a plan counts it. Pictures a second: a JPEG of 256 x
256 pixels, quality 90, decoded, augmented and resized to 128, by one thread, in its CPU time.

On a core: float32, batch 32, CPU time of one thread, so that what else runs counts little. Half a minute. The result is
benchmarks/results/device_constants.json.

On a GPU: bfloat16 autocast, 1,024 rows, the wall clock around work that was waited for, the median of 20 after a second
of warm-up. The floor of a step is that of the loop's whole step over 8 pictures, which waits for kernels to be launched
and not for arithmetic. Beside these constants, and in no plan: other batches, a larger student, and the same
convolutions with cuDNN's search for algorithms or with weights that are stored channels-last. The result is
device_constants_NAME.json, of the GPU's name; a minute.

A test holds that the committed table has the numbers of the committed results.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.made_up_run import OVERRIDES, STUDENT, make_inputs, recipe
from benchmarks.results_folder import RESULTS, machine, write
from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.distill import optim
from pocketvlm.distill.batches import Pictures
from pocketvlm.distill.counting import Seconds, count, timing
from pocketvlm.distill.devices import load_devices
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.stand_in import made_up_pictures
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.students import Student, build_student, train_tokenizer
from pocketvlm.teachers.device import full_float32, pick_device

COUNTED, DECODED, FLOOR_BATCH = 32, 32, 8
# (rows, timed rounds, seconds of warm-up) by device
SETTINGS = {"cpu": (32, 5, 0.0), "cuda": (1024, 20, 1.0)}
OTHER_BATCHES = (256, 4096)
LARGER = "repvit-m0.9"
LARGER_TEXT = {"text.layers": 12, "text.width": 512, "text.heads": 8}


def main(device: Literal["cpu", "cuda"] = "cpu", out: Path = RESULTS) -> None:
    """Measure, and write the result into the folder `out`."""
    # before the first product on a GPU, as a run does it
    place = pick_device(device)
    torch.set_num_threads(1)
    batch, rounds, warm_s = SETTINGS[device]
    with full_float32():
        student = build(STUDENT, OVERRIDES)
        found = rates(student, place, batch, rounds, warm_s)
        found["decode_per_core"] = decode_rate(student.image_spec)
        result: dict[str, Any] = {"command": "python -m benchmarks.device_constants", "machine": machine()}
        result |= {"batch": batch, "precision": str(optim.autocast_dtype("auto", place) or torch.float32)[6:]}
        result["constants"] = found
        name = "device_constants.json"
        if device == "cuda":
            result |= {"command": f"{result['command']} --device cuda", "gpu": gpu_facts()}
            name = f"device_constants_{short_name(result['gpu']['name'])}.json"
            write(name, rounded(result), out)
            found["step_floor_s"] = step_floor(place, rounds, warm_s)
            write(name, rounded(result), out)
            result["beside"] = beside(student, place, rounds, warm_s)
    write(name, rounded(result), out)
    print(json.dumps({key: rounded(result)[key] for key in ("constants", "beside") if key in result}, indent=1))


def build(name: str, overrides: dict[str, Any]) -> Student:
    """In training mode, on the CPU."""
    tokenizer = train_tokenizer(["a made-up text", "and another one"], 64)
    return build_student(name, embed_dim=384, tokenizer_json=tokenizer, overrides=overrides).train()


def rates(student: Student, device: torch.device, batch: int, rounds: int, warm_s: float) -> dict[str, float]:
    """FLOP/s of forward and backward of the image tower ("convolution_flops") and of the text tower ("matrix_flops"),
    as training runs them on `device`: in bfloat16 on a GPU, in float32 on a CPU."""
    size, pieces = student.image_spec.size, student.text_spec.context_length
    pixels = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8)
    ids = torch.randint(1, student.text_spec.vocab_size, (batch, pieces), dtype=torch.int32)
    here, there = copy.deepcopy(student), copy.deepcopy(student).to(device)
    found = {}
    for name, rows in (("convolution_flops", pixels), ("matrix_flops", ids)):
        few = rows[:COUNTED]
        each = count(both_ways(here, few, torch.device("cpu"))).macs / len(few)
        taken = median(both_ways(there, rows.to(device), device), rounds, warm_s)
        found[name] = 2 * each * batch / (taken.cpu_s if device.type == "cpu" else taken.wall_s)
    return found


def both_ways(student: Student, rows: Tensor, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the tower that takes these rows."""
    tower = student.encode_image if rows.ndim == 4 else student.encode_text
    dtype = optim.autocast_dtype("auto", device)

    def job() -> None:
        student.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            embedding = tower(rows).embedding
        embedding.float().square().mean().backward()

    return job


def median(job: Callable[[], object], rounds: int, warm_s: float) -> Seconds:
    """Of `rounds`, each waited for, after `warm_s` seconds of the same: a GPU's clock rises, its libraries load."""
    until = time.perf_counter() + warm_s
    while time.perf_counter() < until:
        timing(job, 1)
    return timing(job, rounds)


def decode_rate(spec: ImageSpec) -> float:
    """Pictures a second of one thread."""
    source = made_up_pictures(DECODED, captioned=0.0, size=256)
    pictures = Pictures(source.samples, spec, policy=AugmentPolicy(), seed=0, budget=0)
    return DECODED / timing(lambda: pictures.batch(range(DECODED), [1] * DECODED), 5).cpu_s


def step_floor(device: torch.device, rounds: int, warm_s: float) -> float:
    """Seconds of the loop's whole step over a few pictures that are there already."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), 2 * FLOOR_BATCH)
        asked = recipe(
            Path(folder), student=STUDENT, overrides=OVERRIDES, batch=FLOOR_BATCH, steps=10_000, device=device.type
        )
        trainer = Trainer(prepare(asked, Reporter(False)), device)
        trainer.start()
        batch = trainer.feed.make(0)
        return median(lambda: trainer.one_step(batch), rounds, warm_s).wall_s


def beside(student: Student, device: torch.device, rounds: int, warm_s: float) -> dict[str, Any]:
    """Rates under other conditions, by what is other."""
    found: dict[str, Any] = {}
    for batch in OTHER_BATCHES:
        found[f"batch {batch}"] = rates(student, device, batch, rounds, warm_s)
    usual = SETTINGS["cuda"][0]
    stored = copy.deepcopy(student).to(memory_format=torch.channels_last)
    found["weights channels-last"] = rates(stored, device, usual, rounds, warm_s)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        found["cudnn.benchmark"] = rates(student, device, usual, rounds, warm_s)
        found["cudnn.benchmark, weights channels-last"] = rates(stored, device, usual, rounds, warm_s)
    finally:
        torch.backends.cudnn.benchmark = before
    larger = build(LARGER, LARGER_TEXT)
    found[f"{LARGER}, text tower of 12 layers, width 512"] = rates(larger, device, usual, rounds, warm_s)
    return found


def gpu_facts() -> dict[str, Any]:
    """What `machine` does not say of the GPU."""
    facts = torch.cuda.get_device_properties(0)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = None
    return {
        "name": facts.name,
        "driver": driver,
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "cores_beside": os.cpu_count(),
    }


def short_name(title: str) -> str:
    """The name in distill/devices.json of a GPU called `title`, or one made of its words."""
    words = re.findall("[a-z0-9]+", title.lower())
    return next((word for word in words if word in load_devices()), "_".join(words))


def rounded(value: Any) -> Any:
    """The same with three significant digits in every float of constants and what stands beside them."""
    parts = {"constants", "beside"}

    def shortened(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: shortened(item) for key, item in part.items()}
        return float(f"{part:.3g}") if isinstance(part, float) else part

    return {key: shortened(item) if key in parts else item for key, item in value.items()}


if __name__ == "__main__":
    tyro.cli(main)
