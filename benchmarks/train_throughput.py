"""Training throughput beside open_clip: the same student, shard, batch, threads and precision, in turn.

    python -m benchmarks.train_throughput

Data: one WebDataset shard of JPEG pictures (the built-in drawings, enlarged to 512 x 512, quality 90) with one caption
each, made by this script. Student: `mnv4-050` at 224 px with CLIP's vocabulary and context of 77, the very same module
with the very same start in all arms; for open_clip it is put in the place of the model that `open_clip_train.main`
builds, and all else there is open_clip's own code (one data worker; its training transform; its loss, AdamW and loop).
Teacher: ViT-B-32 of open_clip with random weights, which cost what trained ones cost. float32, one thread, batch 64, no
moving average (open_clip has none), gradients clipped to 1.

Arms: "ours" and "open_clip" train with the contrastive loss alone. "ours online" and "open_clip online" add the
distillation loss of open_clip (the softmax of similarities, each model at its own scale: our `affinity`), and the
teacher sees every picture once: ours answers into a fresh cache and is read back in the same run; open_clip's runs in
the loop. "ours cached" has `clip`, `feature`, `crd` and `icl` over teacher outputs that were stored before.

Each arm trains N and then 2N samples, each sample once, in processes of their own, forked from one that has loaded the
libraries (N is a quarter for the two arms that run the teacher). CPU seconds (of the process and of those it started)
and wall seconds of a sample are the difference of the two over N, so that start-up, model building, checkpoints and
ends drop out. All arms take a turn in each round, and the medians over rounds are given. Views: ours draws crops of 90
to 100 % of the area as open_clip's transform does, and where the teacher must see a picture once only, the plain view.

The result, benchmarks/results/train_throughput.json, is written after each round with the machine and its load.
About an hour on one idle core.
"""

from __future__ import annotations

import functools
import gc
import io
import os
import shutil
import statistics
import sys
import tarfile
import time
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Any

import open_clip
import open_clip_train.data as their_data
import open_clip_train.main as theirs
import torch
import tyro
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from benchmarks.results_folder import machine, write
from pocketvlm.data import open_data
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.students import Student, build_student, load_student, save_student
from pocketvlm.teachers.clip_tokenizer import build_clip_tokenizer

PIXELS, QUALITY, SIZE, BATCH, CONTEXT, END = 512, 90, 224, 64, 77, 49407
TEACHER, DIM = "ViT-B-32", 512
CROPS = {"scale": [0.9, 1.0], "ratio": [0.75, 1.3333], "flip": 0.0, "rotate": 0.0}
CROPS |= {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "ours": [{"name": "clip"}],
    "ours online": [{"name": "clip"}, {"name": "affinity", "options": {"logit_scale": None}}],
    "ours cached": [{"name": "clip"}, {"name": "feature"}, {"name": "crd"}, {"name": "icl"}],
}
ARMS = ("ours", "open_clip", "ours cached", "ours online", "open_clip online")
# a teacher's forward outweighs what a start varies by, so that fewer samples do
SHARE = {"ours online": 4, "open_clip online": 4}
# (what is divided, by what, floor or ceiling)
RATIOS = {
    "cached step over a step without a teacher": ("ours cached", "ours", "at most", 1.05),
    "open_clip over ours, without a teacher": ("open_clip", "ours", "at least", 1.3),
    "open_clip online over ours online": ("open_clip online", "ours online", "at least", 1.2),
    "open_clip online over ours cached": ("open_clip online", "ours cached", "at least", 3.5),
}


# ------------------------------------------------------------------------------------------------ what all arms share


def make_inputs(work: Path, count: int) -> None:
    """Shard of `count` samples, student and teacher under `work`."""
    source = open_data("openmoji")
    shard = work / "shard" / "000000.tar"
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for index in range(count):
            sample = source[index % len(source)]
            drawn = Image.open(io.BytesIO(sample.image.read())).convert("RGBA")
            paper = Image.new("RGBA", drawn.size, "white")
            paper.alpha_composite(drawn)
            picture = io.BytesIO()
            large = paper.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            large.save(picture, "JPEG", quality=QUALITY)
            for suffix, data in (("jpg", picture.getvalue()), ("txt", sample.captions[0].text.encode())):
                member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    tokenizer, _ = build_clip_tokenizer(context_length=CONTEXT)
    text = {"context_length": CONTEXT, "end_id": END, "pool": "eot"}
    overrides = {"image": {"size": SIZE}, "text": text}
    student = build_student("mnv4-050", embed_dim=DIM, tokenizer_json=tokenizer, seed=0, overrides=overrides)
    save_student(student, work / "student", overwrite=True)
    torch.manual_seed(0)
    torch.save(open_clip.create_model(TEACHER).state_dict(), work / "teacher.pt")


# ------------------------------------------------------------------------------------------------ ours


def our_data(work: Path, samples: int) -> dict[str, Any]:
    """The recipe's section `data`."""
    return {"train": f"wds:{work / 'shard'}?limit={samples}&check=quick"}


def train_ours(arm: str, samples: int, work: Path, out: Path) -> None:
    online = arm == "ours online"
    recipe: dict[str, Any] = {
        "name": "throughput",
        "data": our_data(work, samples),
        "views": {"count": 1} if online else {"count": 2, "policy": CROPS},
        "student": {"name": "init", "init": str(work / "student")},
        "objectives": OBJECTIVES[arm],
        "train": {
            "steps": samples // BATCH,
            "batch_size": BATCH,
            "ema_decay": 0,
            "warmup_steps": 0,
            "threads": 1,
            "device": "cpu",
        },
    }
    if arm != "ours":
        cache = out / "teacher" if online else work / "cached"
        recipe["teacher"] = {"spec": f"open_clip:{TEACHER}@{work / 'teacher.pt'}", "cache": str(cache)}
    distill_run(load_recipe(recipe), out / "run", progress=False)


# ------------------------------------------------------------------------------------------------ open_clip


class AsTheirs(nn.Module):
    """Our student as open_clip's loop calls a model: standardised pixels and ids to unit embeddings."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.image_tower, self.text_tower = student.image_tower, student.text_tower
        self.image_tower.standardised = lambda pixels: pixels  # type: ignore[method-assign]
        self.logit_scale = nn.Parameter(student.log_scale.detach().clone())

    def forward(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": nn.functional.normalize(self.image_tower(image)[0], dim=-1),
            "text_features": nn.functional.normalize(self.text_tower(text)[0], dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }


def train_theirs(arm: str, samples: int, work: Path, out: Path) -> None:
    """`open_clip_train.main` on our student; "RN50" stands for the tokenizer and context that it shares with this."""

    def build(name: str, pretrained: str | None = None, **options: Any) -> tuple[Any, Any, Any]:
        if name == TEACHER:
            return real(name, pretrained, **options)
        student = load_student(work / "student")
        spec = student.image_spec
        cfg = PreprocessCfg(size=SIZE, mean=spec.mean, std=spec.std)
        return (
            AsTheirs(student).train(),
            image_transform_v2(cfg, is_train=True),
            image_transform_v2(cfg, is_train=False),
        )

    real, theirs.create_model_and_transforms = theirs.create_model_and_transforms, build
    # webdataset 1 marks the end of a shard by an empty sample, which open_clip 3.3 does not expect
    their_data.tar_file_expander = functools.partial(their_data.tar_file_expander, eof_value=None)
    arguments = {
        "model": "RN50", "train-data": work / "shard" / "000000.tar", "dataset-type": "webdataset",
        "train-num-samples": samples, "batch-size": BATCH, "epochs": 1, "workers": 1, "precision": "fp32",
        "device": "cpu", "logs": out, "name": "run", "lr": 1e-3, "wd": 0.05, "warmup": 50, "grad-clip-norm": 1.0,
    }  # fmt: skip
    if arm == "open_clip online":
        arguments |= {"distill-model": TEACHER, "distill-pretrained": work / "teacher.pt"}
    theirs.main([part for key, value in arguments.items() for part in (f"--{key}", str(value))])


# ------------------------------------------------------------------------------------------------ measuring


def _child(job: str, samples: int, work: Path, out: Path) -> None:
    torch.set_num_threads(1)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job == "inputs":
        make_inputs(work, samples)
    elif job.startswith("ours"):
        train_ours(job, samples, work, out)
    else:
        train_theirs(job, samples, work, out)
    gc.collect()  # data workers are waited for, and so counted, when their loader goes


def spent() -> float:
    """CPU seconds of all children that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(job: str, samples: int, work: Path) -> tuple[float, float]:
    """(CPU, wall) seconds of one job in a forked process and all that it starts."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    # forked, so that no run loads libraries; this process itself never computes with torch
    process = get_context("fork").Process(target=_child, args=(job, samples, work, out))
    cpu, wall = spent(), time.perf_counter()
    process.start()
    process.join()
    found = spent() - cpu, time.perf_counter() - wall
    if process.exitcode != 0:
        sys.exit(f"{job} failed: {out.with_suffix('.log').read_text()[-3000:]}")
    return found


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, and each floor's ratio of CPU seconds: of the medians, and the range over rounds."""
    arms = {
        arm: {
            "cpu_s_per_sample": round(statistics.median(r[arm]["cpu_s"] for r in rounds), 5),
            "samples_per_wall_s": round(1 / statistics.median(r[arm]["wall_s"] for r in rounds), 2),
        }
        for arm in rounds[0]
    }
    ratios = {}
    for name, (over, under, kind, floor) in RATIOS.items():
        if over in arms and under in arms:
            each = sorted(r[over]["cpu_s"] / r[under]["cpu_s"] for r in rounds)
            value = statistics.median(each)
            ratios[name] = {
                "median": round(value, 3), "lowest": round(each[0], 3), "highest": round(each[-1], 3), kind: floor,
                "holds": value <= floor if kind == "at most" else value >= floor,
            }  # fmt: skip
    return {"arms": arms, "ratios": ratios}


def main(
    samples: int = 1024, rounds: int = 5, arms: tuple[str, ...] = ARMS, work: Path = Path("runs/throughput")
) -> None:
    """samples: N, a multiple of 256. work: for inputs, which are made where they are missing, and runs."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    ready = work / f"ready-{samples}"
    if not ready.exists():
        run("inputs", 2 * samples, work)
        for count in (samples, 2 * samples):
            run("ours cached", count, work)  # stores the teacher's outputs, and is not measured
        ready.touch()
    found: list[dict[str, dict[str, float]]] = []
    loads: list[tuple[float, ...]] = [os.getloadavg()]
    for number in range(rounds):
        row = {}
        # every other round in the reverse order, so that a drift of the machine's speed favours nobody
        for arm in arms if number % 2 == 0 else arms[::-1]:
            count = samples // SHARE.get(arm, 1)
            short, long = run(arm, count, work), run(arm, 2 * count, work)
            row[arm] = {"cpu_s": (long[0] - short[0]) / count, "wall_s": (long[1] - short[1]) / count}
            print(number + 1, arm, {key: round(value, 4) for key, value in row[arm].items()}, flush=True)
        found.append(row)
        loads.append(os.getloadavg())
        write("train_throughput.json", report(samples, found, loads))


def report(samples: int, rounds: list[dict[str, dict[str, float]]], loads: list[tuple[float, ...]]) -> dict[str, Any]:
    return {
        "command": f"python -m benchmarks.train_throughput --samples {samples} --rounds {len(rounds)}",
        "machine": machine(),
        "load_average_before_and_after_each_round": [[round(value, 2) for value in load] for load in loads],
        "open_clip": open_clip.__version__,
        "student": f"mnv4-050 at {SIZE} px, CLIP tokens, context {CONTEXT}",
        "teacher": f"open_clip {TEACHER} at 224 px, random weights",
        "pictures": f"{PIXELS} x {PIXELS} JPEG, quality {QUALITY}",
        "batch": BATCH, "threads": 1, "precision": "fp32",
        "samples": {arm: [samples // SHARE.get(arm, 1), 2 * samples // SHARE.get(arm, 1)] for arm in rounds[0]},
        **summary(rounds), "rounds": rounds,
    }  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
