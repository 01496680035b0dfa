"""The comparison that the README's claims come from: protocols x arms x folds x seeds, pooled.

    python -m benchmarks.protocols

Protocols: the student pool has no captions (unlabelled), captions for 10 % (few), or all of them. Arms: no-teacher,
distilled (teacher `openmoji-lit`), control (teacher `ingredients`: the same two public models without the trained map).
Every arm has the same initial weights, pictures, views, batch size and steps; each starts its text tower from one that
learned from words only (recipe `openmoji-text`, made once per seed, no caption of the data set among the words).

Each finished run is one JSON file under benchmarks/results/protocols. A run whose file exists is repeated only if its
recipe has changed since, so the command continues where it stopped. The pooled summary is
benchmarks/results/protocols.json. Two single-threaded processes on two cores take about half an hour.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.results_folder import RESULTS, machine, recipe_digest, write
from pocketvlm.data.openmoji import openmoji_samples
from pocketvlm.data.openmoji_groups import base_concept
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.distill.recipe import load_recipe

CAPTIONS = {"unlabelled": 0.0, "few": 0.1, "all": 1.0}
ARMS = {"unlabelled": ("distilled", "control"), "few": ("distilled", "no-teacher", "control")}
ARMS["all"] = ARMS["few"]
DIRECTIONS = ("image_to_text", "text_to_image")
TEXT = "openmoji-text"


def text_start(work: Path, seed: int) -> Path:
    """The text tower of this seed, trained on words; made once for a recipe."""
    changes = [f"train.seed={seed}", "train.threads=1"]
    folder = work / f"text-s{seed}-{recipe_digest(TEXT, changes)}"
    if not (folder / "eval.json").is_file():
        distill_run(load_recipe(TEXT, changes), folder, overwrite=True, progress=False)
    return folder / "student"


def recipe_of(protocol: str, arm: str, fold: int, seed: int) -> tuple[str, list[str]]:
    """Recipe and changes of one run, but for what it starts from."""
    changes = [
        f"data.train=openmoji?pool=student&fold={fold}&captions={CAPTIONS[protocol]}&flags=exclude",
        f"data.eval=openmoji?pool=test&fold={fold}&flags=exclude",
        f"train.seed={seed}",
        "train.threads=1",
        "student.init_parts=[text_tower]",
    ]
    if arm == "no-teacher":
        return "openmoji-no-teacher", changes
    changes.append("train.text_pretrain_steps=0")
    # the control's own evidence is weak, so it gets the caption weight that served it best in a trial
    changes += ["teacher.spec=ingredients", "teacher.caption_mix=8"] if arm == "control" else []
    changes += [f"teacher.spec=openmoji-lit?fold={fold}"] if arm == "distilled" else []
    return "openmoji", changes


def digest_of(protocol: str, arm: str, fold: int, seed: int) -> str:
    """What the result file of a run must carry to be still good."""
    text = recipe_digest(TEXT, [f"train.seed={seed}", "train.threads=1"])
    return recipe_digest(*recipe_of(protocol, arm, fold, seed), starts=(text,))


def run_folder(protocol: str, arm: str, fold: int, seed: int, work: Path) -> Path:
    """Where a run is trained; another recipe has another folder."""
    return work / f"{protocol}-{arm}-f{fold}-s{seed}-{digest_of(protocol, arm, fold, seed)}"


def run_one(protocol: str, arm: str, fold: int, seed: int, work: Path) -> Path:
    """Train and score one student, and write its ranks; returns the run's folder."""
    name, folder = f"{protocol}-{arm}-f{fold}-s{seed}", run_folder(protocol, arm, fold, seed, work)
    start = text_start(work, seed)
    recipe, changes = recipe_of(protocol, arm, fold, seed)
    begin = [f"student.init={start}", f"tokenizer.source={start / 'tokenizer.json'}"]
    result = distill_run(load_recipe(recipe, [*changes, *begin]), folder, overwrite=True, progress=False)
    assert result.evaluation is not None
    values, queries = result.evaluation.values, result.evaluation.queries
    row: dict[str, Any] = {"protocol": protocol, "arm": arm, "fold": fold, "seed": seed}
    row |= {"digest": digest_of(protocol, arm, fold, seed), "recipe": recipe, "changes": changes}
    row |= {"seconds": round(result.seconds, 1), "machine": machine()}
    row["uids"] = [str(uid) for uid in queries["image_to_text/uid"]]
    row["texts"] = [str(text) for text in queries["text_to_image/text"]]
    row["ranks"] = {d: queries[f"model/{d}/rank"].astype(int).tolist() for d in DIRECTIONS}
    if arm == "distilled":
        row["teacher_ranks"] = {d: queries[f"teacher/{d}/rank"].astype(int).tolist() for d in DIRECTIONS}
        row["mixed_R@5"] = {k: v["image_to_text"]["R@5"] for k, v in values["mixed"].items()}
    write(f"protocols/{name}.json", row)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{name}: R@5 {100 * np.mean(np.array(row['ranks']['image_to_text']) <= 5):.1f}", flush=True)
    return folder


def done(protocol: str, arm: str, fold: int, seed: int) -> dict[str, Any] | None:
    """The result of a run if it is there and still of this recipe."""
    path = RESULTS / "protocols" / f"{protocol}-{arm}-f{fold}-s{seed}.json"
    row = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return row if row and row["digest"] == digest_of(protocol, arm, fold, seed) else None


def _one_fold(job: tuple[int, int, tuple[str, ...], Path]) -> None:
    seed, fold, protocols, work = job
    for protocol in protocols:
        for arm in ARMS[protocol]:
            if done(protocol, arm, fold, seed) is None:
                run_one(protocol, arm, fold, seed, work)


def summary(folds: tuple[int, ...], seeds: tuple[int, ...]) -> dict[str, Any]:
    """Pooled recalls of every arm, and distilled minus each other arm with a paired bootstrap over base concepts.

    Raises:
        SystemExit: a run is missing or of an older recipe; a pool without it would be another experiment.
    """
    groups = {sample.uid: sample.group for sample in openmoji_samples()}
    out: dict[str, Any] = {"folds": folds, "seeds": seeds, "protocols": {}}
    for protocol, arms in ARMS.items():
        rows = {arm: [done(protocol, arm, fold, seed) for fold in folds for seed in seeds] for arm in arms}
        if missing := [arm for arm in arms if None in rows[arm]]:
            raise SystemExit(f"{protocol}: runs of {', '.join(missing)} are missing, so nothing was pooled")
        out["protocols"][protocol] = found = {"arms": {arm: _recalls(rows[arm], "ranks") for arm in arms}}
        found["arms"]["teacher"] = teacher = _recalls(rows["distilled"], "teacher_ranks")
        own = found["arms"]["distilled"]
        found["kept_of_teacher_percent"] = {d: round(100 * own[d]["R@5"] / teacher[d]["R@5"], 1) for d in DIRECTIONS}
        found["mixed_R@5"] = {
            pair: round(100 * float(np.mean([row["mixed_R@5"][pair] for row in rows["distilled"]])), 2)
            for pair in rows["distilled"][0]["mixed_R@5"]
        }
        concepts = {
            "image_to_text": [groups[uid] for row in rows["distilled"] for uid in row["uids"]],
            "text_to_image": [base_concept(text) for row in rows["distilled"] for text in row["texts"]],
        }
        found["distilled_minus"] = {
            arm: {d: _difference(rows["distilled"], rows[arm], d, concepts[d]) for d in DIRECTIONS}
            for arm in arms
            if arm != "distilled"
        }
        out["answers"] = {d: len(names) for d, names in concepts.items()}
        out["concepts"] = {d: len(set(names)) for d, names in concepts.items()}
    return out | {"runs": sum(len(arms) for arms in ARMS.values()) * len(folds) * len(seeds)}


def _hits(rows: list[Any], direction: str, k: int, which: str = "ranks") -> Any:
    return np.concatenate([np.array(row[which][direction]) <= k for row in rows]).astype(float)


def _recalls(rows: list[Any], which: str) -> dict[str, dict[str, float]]:
    return {
        d: {f"R@{k}": round(100 * float(_hits(rows, d, k, which).mean()), 2) for k in (1, 5, 10)} for d in DIRECTIONS
    }


def _difference(ours: list[Any], theirs: list[Any], direction: str, concepts: list[str]) -> dict[str, Any]:
    """In points of R@5, with the 95 % interval; all seeds and pictures of one base concept are resampled together."""
    for key in ("uids", "texts"):
        assert [row[key] for row in ours] == [row[key] for row in theirs], "the arms answered the same queries"
    interval = paired_bootstrap(_hits(ours, direction, 5), _hits(theirs, direction, 5), clusters=concepts).to_dict()
    return {key: round(100 * float(interval[key]), 2) for key in ("difference", "low", "high")}


def main(
    work: Path = Path("runs/protocols"),
    folds: tuple[int, ...] = (0, 1, 2, 3, 4),
    seeds: tuple[int, ...] = (0, 1, 2),
    processes: Annotated[int, tyro.conf.arg(help="Single-threaded runs at a time.")] = 2,
    summarise_only: Annotated[bool, tyro.conf.arg(help="Only pool the result files that exist.")] = False,
) -> None:
    """Run what is missing, then pool."""
    work = work.resolve()
    if not summarise_only:
        for seed in seeds:
            text_start(work, seed)
        # neighbours in this order are of different folds, so that two processes never fill the same cache
        jobs = [(seed, fold, tuple(ARMS), work) for seed in seeds for fold in folds]
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_one_fold, jobs))
    found = summary(folds, seeds) | {"machine": machine()}
    print(json.dumps(found["protocols"], indent=1))
    print(write("protocols.json", found))


if __name__ == "__main__":
    tyro.cli(main)
