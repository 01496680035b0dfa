"""One elastic student against a student trained for each width: recall by the numbers of an embedding that are kept.

    python -m benchmarks.elastic --stage all

The elastic student is trained once, with the losses summed over the prefixes of `DIMS` (`matryoshka`). It is compared,
at each width, with students of that very width, trained for it alone with the same losses, data, start and steps, and
with the cut embeddings of a student trained at full width alone. The losses are those that screened best beside the
base in `benchmarks.ablation`, `clip` and `feature`, at the weight chosen there on fold 0; fold 0 is not used here.

A student of width d needs a teacher of width d, and there are several: its first d numbers (`prefix`), its first d
principal axes (`principal`; found on what the teacher says to the training pictures and texts), or all of them behind
a learned projector (`projector`). All are trained; the comparison takes, at each width, the one that turned out best
on the reported queries themselves, which flatters the separately trained students.

`starbucks` is trained to be left after the first of its two text layers as well (`matryoshka-2d`), against students
with one text layer from the start.

Further arms are trained towards the teacher's own space for asymmetric search (student queries, teacher gallery).

Stages: prepare (the packs and starts of `benchmarks.ablation` and the teacher's answers, under --work; needs the extra
`demo`), run, summary (benchmarks/results/elastic.json, from the lines of benchmarks/results/elastic/runs.jsonl), all.
A run whose digest is there is not repeated. A second machine needs the tree, torch, timm, pydantic, tyro, and --work.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from benchmarks.ablation import FOLDS, SEEDS, Results, run_all
from benchmarks.ablation_arms import PROTOCOLS, Arm, recipe_of, run_digest
from benchmarks.ablation_runs import Job, open_pack, start_folder
from benchmarks.results_folder import RESULTS
from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.data.splits import group_of
from pocketvlm.distill.asymmetric import WAYS, score_asymmetric
from pocketvlm.distill.axes import axes_of, turned
from pocketvlm.distill.batches import prefetch
from pocketvlm.distill.board import Board
from pocketvlm.distill.encoders import StudentEncoder
from pocketvlm.distill.loop import Trainer
from pocketvlm.distill.prepare import Prepared
from pocketvlm.distill.questions import Embedded, embed_questions
from pocketvlm.distill.recipe import Recipe
from pocketvlm.edge.errors import unknown_name
from pocketvlm.students import Student, change_axes, load_student, truncated
from pocketvlm.teachers.device import describe_device, pick_device

Stage = Literal["prepare", "run", "summary", "all"]
DIMS = (32, 64, 96, 128, 192, 256, 384)
FULL = DIMS[-1]
FEATURE = {"few": 13.0, "all": 12.1}
"""Weight of `feature` beside `clip`, r = 3: benchmarks.ablation chose it on fold 0 with few captions; with all of them
it chose r = 0.3 (1.21) after these runs had begun."""
REDUCTIONS = ("prefix", "principal", "projector")
LAYERS = 2
"""Of the text tower of every start."""
EXIT_DIMS = (64, 128, 384)
PAIRS = ((1, 64), (1, 128), (1, 384), (2, 64), (2, 128))
"""Smaller students that `starbucks` trains, as (text layers, numbers)."""
ACROSS = ("image_to_text", "text_to_image", "image_to_image")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Elastic:
    """An arm. width: of the student. axes: its coordinates, the teacher's "own" or "principal" ones. teacher: how wide
    the teacher is for it. nested: of which losses there is one on each prefix. more: further losses. layers: of the
    text tower, from the start. exits: whether both losses are on smaller students inside it too, `PAIRS`."""

    name: str
    what: str
    width: int = FULL
    axes: Literal["own", "principal"] = "own"
    teacher: int = FULL
    nested: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    layers: int = LAYERS
    exits: bool = False

    def objectives(self, protocol: str) -> tuple[Row, ...]:
        specs: list[Row] = []
        for name, weight in (("clip", 1.0), ("feature", FEATURE[protocol]), *((name, 1.0) for name in self.more)):
            if self.exits:
                # the KL does not depend on the inner loss, so one of them has it
                options = {"inner": {"name": name}, "pairs": [[*pair] for pair in PAIRS]}
                options |= {} if name == "clip" else {"kl": 0}
                specs.append({"name": "matryoshka-2d", "weight": weight, "options": options})
            elif name in self.nested:
                specs.append(
                    {"name": "matryoshka", "weight": weight, "options": {"inner": {"name": name}, "dims": [*DIMS]}}
                )
            else:
                specs.append({"name": name, "weight": weight})
        return tuple(specs)


def _separate(width: int, reduction: str) -> Elastic:
    axes: Literal["own", "principal"] = "own" if reduction == "prefix" else "principal"
    teacher = FULL if reduction == "projector" else width
    return Elastic(f"{reduction}-{width}", f"trained at {width} alone, teacher's {reduction}", width, axes, teacher)


ARMS: tuple[Elastic, ...] = (
    Elastic("plain", "trained at full width alone"),
    Elastic("mrl", "elastic, the teacher's own axes", nested=("clip", "feature")),
    Elastic("mrl-principal", "elastic, the teacher's principal axes", axes="principal", nested=("clip", "feature")),
    *(_separate(width, reduction) for reduction in REDUCTIONS for width in DIMS[:-1]),
    Elastic("starbucks", "layers and numbers, Starbucks-style, principal axes", axes="principal", exits=True),
    *(
        Elastic(f"one-layer-{m}", f"one text layer from the start, {m} numbers", m, "principal", m, layers=1)
        for m in EXIT_DIMS
    ),
    Elastic("icl", "for asymmetric search: student queries against teacher keys (ICL)", more=("icl",)),
    Elastic("cross-kd", "for asymmetric search: the teacher's distribution over its keys", more=("cross-kd",)),
)
TURNED = "principal"
"""Suffix of the views of a run in which the finished student was turned to the principal axes before it was cut."""


def arm_named(name: str) -> Elastic:
    known = {arm.name: arm for arm in ARMS}
    if name not in known:
        raise unknown_name("arm", name, known)
    return known[name]


def recipe_for(arm: Elastic, protocol: str, fold: int, seed: int) -> Recipe:
    """What a run does, but for its start, its device, and the coordinates of its teacher."""
    recipe = recipe_of(Arm(arm.name, arm.what, arm.objectives(protocol), replaces=True), protocol, fold, seed)
    return recipe.updated([f"student.embed_dim={arm.width}"])


def job_of(arm: Elastic, protocol: str, fold: int, seed: int) -> Job:
    recipe = recipe_for(arm, protocol, fold, seed)
    facts = ["elastic", arm.axes, arm.teacher, *([f"{arm.layers} layers"] if arm.layers != LAYERS else [])]
    digest = run_digest(recipe, seed, *facts)
    return Job("elastic", arm.name, protocol, fold, seed, 1.0, None, digest)


def jobs_of(
    arms: Sequence[Elastic], protocols: Sequence[str], folds: Sequence[int], seeds: Sequence[int]
) -> Iterator[Job]:
    for protocol in protocols:
        for arm in arms:
            for seed in seeds:
                for fold in folds:
                    yield job_of(arm, protocol, fold, seed)


# --- one run


class Bench:
    """What a worker keeps between runs: one open pack, the teacher's answers, and the principal axes."""

    def __init__(self, work: Path, device: str) -> None:
        self.work, self.device = work, pick_device(device)
        self.group: tuple[int, str] | None = None

    def open(self, job: Job) -> None:
        if self.group == job.group:
            return
        self.prepared = open_pack(self.work, job.fold, job.protocol)
        self.answers = read_answers(self.work, job.fold)
        self.axes = axes_of(self.prepared)
        self.group = job.group

    def ready(self, arm: Elastic, job: Job) -> Prepared:
        """The inputs of a run: the teacher and the student that it starts from in the arm's coordinates and widths."""
        self.open(job)
        recipe = recipe_for(arm, job.protocol, job.fold, job.seed)
        student, axes = load_student(start_folder(self.work, job.seed)), self.axes
        if arm.axes == "own":
            axes = torch.eye(FULL)
        if (arm.axes, arm.width) != ("own", FULL):
            student = change_axes(student, axes[:, : arm.width])
        if arm.layers != LAYERS:
            student = left_early(student, arm.layers)
        # the pack's teacher is FULL wide until it is turned and cut
        found = self.prepared.with_recipe(recipe.updated(["student.embed_dim=null"]), student)
        found = dataclasses.replace(found, recipe=recipe)
        return found if (arm.axes, arm.teacher) == ("own", FULL) else turned(found, axes[:, : arm.teacher])

    def run(self, job: Job) -> Row:
        arm = arm_named(job.arm)
        began = time.perf_counter()
        prepared = self.ready(arm, job)
        trainer = Trainer(prepared, self.device)
        trainer.start()
        steps = []
        for batch in prefetch(trainer.feed.make, range(trainer.total)):
            before = time.perf_counter()
            trainer.one_step(batch)
            steps.append(time.perf_counter() - before)
        trained = time.perf_counter()
        with trainer.averaged():
            found = self.scores(arm, trainer.student)
        spent = {"train": round(trained - began, 3), "evaluate": round(time.perf_counter() - trained, 3)}
        row = {key: value for key, value in dataclasses.asdict(job).items() if key not in ("ratio", "scale", "tuned")}
        return row | found | {
            "final_loss": trainer.last.get("loss"),
            "device": describe_device(self.device),
            "step_ms": round(1000 * float(np.median(steps)), 3),
            "seconds": spent,
        }  # fmt: skip

    def scores(self, arm: Elastic, student: Student) -> Row:
        """hits: for each view and direction, a string of one digit a query, "1" where a match was among five."""
        questions = self.prepared.questions
        assert questions is not None, "the pack has evaluation data"
        own = embed_questions(StudentEncoder(student, device=self.device), questions, name=arm.name)
        views = {str(m): cut(own, m) for m in DIMS if m == arm.width or (arm.width == FULL and m < FULL)}
        if arm.name == "plain":
            for m in DIMS:
                views[f"{m}@{TURNED}"] = cut(own, m, self.axes)
        if arm.name in ("plain", "starbucks"):
            early = StudentEncoder(left_early(student, 1), device=self.device)
            texts = [early.embed_text(questions.texts[at : at + 64]) for at in range(0, len(questions.texts), 64)]
            left = dataclasses.replace(own, texts=np.concatenate(texts))
            axes = self.axes if arm.axes == "own" else None
            views |= {f"1x{m}": cut(left, m, axes) for m in EXIT_DIMS}
        hits: Row = {}
        for name, one in views.items():
            found = Board(questions, one, None).search(one, one, questions.samples, questions.language)
            assert found is not None, "the evaluation data has captions"
            hits[name] = {"image_to_text": _digits(found.forward.rank), "text_to_image": _digits(found.reverse.rank)}
        if arm.width == FULL and arm.axes == "own":
            across = Board(questions, *(dataclasses.replace(side, space_id="one") for side in (own, self.answers)))
            assert score_asymmetric(across), "student and teacher share a space"
            for name in (f"{way}/{direction}" for way in WAYS for direction in ACROSS):
                way, direction = name.split("/")
                hits.setdefault(way, {})[direction] = _digits(across.queries[f"asymmetric/{name}/rank"])
        uids = [sample.uid for sample in found.pictures]
        groups = {sample.uid: group_of(sample) for sample in questions.samples}
        several = Counter(groups.values())
        concepts = {
            "image_to_text": [groups[uid] for uid in uids],
            "text_to_image": [base_concept(text) for text in found.gallery],
            # these find the other pictures of their group
            "image_to_image": [group for group in groups.values() if several[group] > 1],
        }
        asked = hashlib.sha256(json.dumps([uids, found.gallery]).encode()).hexdigest()[:16]
        return {"hits": hits, "queries": asked, "concepts": concepts}


def left_early(student: Student, layers: int) -> Student:
    """The student without its later text layers, whether it promises that or not."""
    whole = copy.copy(student)
    whole.config = student.config.model_copy(update={"exits": ((layers, student.embed_dim),)})
    return truncated(whole, text_layers=layers)


def _digits(ranks: Any) -> str:
    return "".join("1" if rank <= 5 else "0" for rank in ranks)


def cut(embedded: Embedded, width: int, axes: Any = None) -> Embedded:
    """The first `width` numbers, after a turn to `axes` [D, D] where given."""
    turn = np.eye(embedded.images.shape[1]) if axes is None else axes.double().numpy()
    images, texts = (rows.astype(np.float64) @ turn[:, :width] for rows in (embedded.images, embedded.texts))
    return dataclasses.replace(embedded, images=images, texts=texts)


# --- the teacher's answers


def answers_path(work: Path, fold: int) -> Path:
    return work / f"answers-f{fold}.npz"


def make_answers(work: Path, fold: int) -> None:
    """What the teacher of a fold says to the test pictures and texts, in one file."""
    from pocketvlm.data import cache_dir
    from pocketvlm.distill.answers import teacher_answers
    from pocketvlm.teachers import load_teacher

    path = answers_path(work, fold)
    if path.is_file():
        return
    prepared = open_pack(work, fold, "few")
    assert prepared.questions is not None, "the pack has evaluation data"
    assert prepared.recipe.teacher is not None, "the pack has a teacher"
    teacher = load_teacher(prepared.recipe.teacher.spec)
    found = teacher_answers(teacher, prepared.questions, cache_dir() / "teacher", batch_size=64)
    part = path.with_suffix(".part.npz")
    np.savez(part, uids=np.array(found.uids, np.str_), images=found.images, texts=found.texts)
    part.replace(path)


def read_answers(work: Path, fold: int) -> Embedded:
    with np.load(answers_path(work, fold), allow_pickle=False) as found:
        return Embedded("teacher", "", [str(uid) for uid in found["uids"]], found["images"], found["texts"])


# --- the command

_BENCH: Bench | None = None


def enter(work: Path, device: str) -> None:
    """In a worker process, before its first run."""
    global _BENCH
    torch.set_num_threads(1)
    _BENCH = Bench(work, device)


def run_in_worker(job: Job) -> Row:
    assert _BENCH is not None, "the pool was made with `enter`"
    return _BENCH.run(job)


def tell(row: Row, done: int, left: int, seconds: float) -> None:
    shares = []
    for view, hits in row["hits"].items():
        shares.append(
            f"{view} " + "/".join(f"{100 * np.mean([c == '1' for c in found]):.1f}" for found in hits.values())
        )
    what = f"{row['protocol']} {row['arm']} f{row['fold']} s{row['seed']}"
    print(f"{what}: R@5 {', '.join(shares)} | {done} done, {left} left, {seconds:.0f} s", flush=True)


def main(
    stage: Stage = "all",
    arms: Annotated[tuple[str, ...], tyro.conf.arg(help="Only these.")] = (),
    protocols: tuple[Literal["few", "all"], ...] = tuple(PROTOCOLS),  # type: ignore[assignment]
    folds: tuple[int, ...] = FOLDS,
    seeds: tuple[int, ...] = SEEDS,
    device: str = "auto",
    processes: Annotated[int, tyro.conf.arg(help="Single-threaded runs at a time.")] = 2,
    limit_seconds: Annotated[float, tyro.conf.arg(help="Begin no run after so many seconds.")] = float("inf"),
    work: Annotated[Path, tyro.conf.arg(help="Starts, packs and answers.")] = Path("runs/ablation"),
    out: Annotated[Path, tyro.conf.arg(help="Folder of runs.jsonl.")] = RESULTS / "elastic",
) -> None:
    """Run what is missing of a stage."""
    deadline = time.monotonic() + limit_seconds
    work = work.resolve()
    wanted = [arm_named(name) for name in arms] or [*ARMS]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # of the workers, which begin afresh
    if stage in ("prepare", "all"):
        from benchmarks.ablation import prepare_all

        prepare_all(work, folds, seeds, protocols, processes)
        for fold in folds:
            make_answers(work, fold)
    if stage in ("run", "all"):
        jobs = [*jobs_of(wanted, protocols, folds, seeds)]
        how = (enter, run_in_worker, tell)
        run_all(jobs, Results(out, "runs"), work, device, processes, deadline, how)
    if stage in ("summary", "all"):
        from benchmarks.elastic_summary import summarise

        summarise(out)


if __name__ == "__main__":
    tyro.cli(main)
