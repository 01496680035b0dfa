"""The comparison that the README's claims must come from: protocols x arms x folds x seeds, pooled.

    python benchmarks/protocols.py --work runs/protocols --folds 0 1 2 3 4 --seeds 0 1 2

Protocols: the student pool has no captions (unlabelled), captions for 10 % (few), or all of them. Arms: no-teacher,
distilled (teacher `openmoji-lit`), control (teacher `ingredients`: the same two public models without the trained map).
Every arm has the same initial weights, pictures, views, batch size and steps. The distilled and the control arm start
their text tower from one that learned from words only (recipe `openmoji-text`, made once per seed).

Each finished run is one JSON file under benchmarks/results/protocols; runs that exist are not repeated, so the command
continues where it stopped. A summary over what exists is written to benchmarks/results/protocols.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from pocketvlm.distill.environment import describe_environment
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.metrics import paired_bootstrap
from pocketvlm.distill.recipe import load_recipe

RESULTS = Path(__file__).resolve().parent / "results"
CAPTIONS = {"unlabelled": 0.0, "few": 0.1, "all": 1.0}
ARMS = {"unlabelled": ("distilled", "control"), "few": ("no-teacher", "distilled", "control")}
ARMS["all"] = ARMS["few"]
DIRECTIONS = ("image_to_text", "text_to_image")


def text_start(work: Path, seed: int) -> Path:
    """The text tower of this seed, trained on words; made once."""
    folder = work / f"text-s{seed}"
    if not (folder / "eval.json").is_file():
        distill_run(load_recipe("openmoji-text", [f"train.seed={seed}"]), folder, overwrite=True, progress=False)
    return folder / "student"


def overrides(protocol: str, arm: str, fold: int, seed: int, work: Path) -> tuple[str, list[str]]:
    """Recipe and changes of one run."""
    changes = [
        f"data.train=openmoji?pool=student&fold={fold}&captions={CAPTIONS[protocol]}&flags=exclude",
        f"data.eval=openmoji?pool=test&fold={fold}&flags=exclude",
        f"train.seed={seed}",
    ]
    if arm == "no-teacher":
        return "openmoji-no-teacher", changes
    start = text_start(work, seed)
    changes += [f"student.init={start}", "student.init_parts=[text_tower]", "train.text_pretrain_steps=0"]
    changes += [f"tokenizer.source={start / 'tokenizer.json'}"]
    # the control's own evidence is weak, so it gets the caption weight that served it best in a trial
    changes += ["teacher.spec=ingredients", "teacher.caption_mix=8"] if arm == "control" else []
    changes += [f"teacher.spec=openmoji-lit?fold={fold}"] if arm == "distilled" else []
    return "openmoji", changes


def run_one(protocol: str, arm: str, fold: int, seed: int, work: Path) -> None:
    """Train and score one student; its ranks go into a result file."""
    path = RESULTS / "protocols" / f"{protocol}-{arm}-f{fold}-s{seed}.json"
    if path.is_file():
        return
    recipe_name, changes = overrides(protocol, arm, fold, seed, work)
    recipe, folder = load_recipe(recipe_name, changes), work / path.stem
    result = distill_run(recipe, folder, overwrite=True, progress=False)
    assert result.evaluation is not None
    values, queries = result.evaluation.values, result.evaluation.queries
    row: dict[str, Any] = {"protocol": protocol, "arm": arm, "fold": fold, "seed": seed, "seconds": result.seconds}
    row["uids"] = [str(uid) for uid in queries["image_to_text/uid"]]
    row["ranks"] = {d: queries[f"model/{d}/rank"].astype(int).tolist() for d in DIRECTIONS}
    if arm == "distilled":
        row["teacher_ranks"] = {d: queries[f"teacher/{d}/rank"].astype(int).tolist() for d in DIRECTIONS}
        row["mixed_R@5"] = {k: v["image_to_text"]["R@5"] for k, v in values["mixed"].items()}
    row["changes"] = [change for change in changes if str(work) not in change]
    row["environment"] = {k: v for k, v in describe_environment().items() if k not in ("command", "started")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{path.stem}: R@5 {100 * np.mean(np.array(row['ranks']['image_to_text']) <= 5):.1f}", flush=True)


def summary() -> dict[str, Any]:
    """Pooled recalls of every arm, and distilled minus each other arm with a paired bootstrap over queries."""
    rows = [json.loads(path.read_text()) for path in sorted((RESULTS / "protocols").glob("*.json"))]
    table = {(r["protocol"], r["arm"], r["fold"], r["seed"]): r for r in rows}
    out: dict[str, Any] = {
        "runs": len(rows),
        "recall_percent": {},
        "distilled_minus": {},
        "kept_of_teacher_percent": {},
    }
    for protocol, arms in ARMS.items():
        for arm in arms:
            mine = [r for key, r in table.items() if key[:2] == (protocol, arm)]
            if not mine:
                continue
            out["recall_percent"][f"{protocol}/{arm}"] = {"runs": len(mine)} | {
                f"{d} R@{k}": round(100 * float(np.mean(_hits(mine, d, k))), 2) for d in DIRECTIONS for k in (1, 5, 10)
            }
            both = [(table[(protocol, "distilled", *k[2:])], r) for k, r in table.items()
                    if k[:2] == (protocol, arm) and (protocol, "distilled", *k[2:]) in table]  # fmt: skip
            if arm == "distilled":
                kept = {d: np.mean(_hits(mine, d, 5)) / np.mean(_hits(mine, d, 5, "teacher_ranks")) for d in DIRECTIONS}
                out["kept_of_teacher_percent"][protocol] = {d: round(100 * float(v), 1) for d, v in kept.items()}
            elif both:
                clusters = [uid for a, _ in both for uid in a["uids"]]
                a, b = _hits([x for x, _ in both], "image_to_text", 5), _hits([y for _, y in both], "image_to_text", 5)
                out["distilled_minus"][f"{protocol}/{arm}"] = paired_bootstrap(a, b, clusters=clusters).to_dict()
    return out


def _hits(rows: list[dict[str, Any]], direction: str, k: int, which: str = "ranks") -> np.ndarray:
    return np.concatenate([np.array(row[which][direction]) <= k for row in rows]).astype(float)


def main(
    work: Path = Path("runs/protocols"),
    folds: tuple[int, ...] = (0, 1, 2, 3, 4),
    seeds: tuple[int, ...] = (0, 1, 2),
    protocols: tuple[str, ...] = ("few", "all", "unlabelled"),
    summarise_only: Annotated[bool, tyro.conf.arg(help="Only pool the result files that exist.")] = False,
) -> None:
    """Run what is missing, then pool."""
    work = work.resolve()
    if not summarise_only:
        for seed in seeds:
            for fold in folds:
                for protocol in protocols:
                    for arm in ARMS[protocol]:
                        run_one(protocol, arm, fold, seed, work)
    found = summary()
    (RESULTS / "protocols.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
