"""Few labels: the same small student from labels alone, and from labels and what the talking teacher says.

    python -m benchmarks.talking_teacher --stage prepare --words runs/talking-words    # vectors of words
    python -m benchmarks.few_label --words runs/talking-words --work runs/few-label
    python -m benchmarks.few_label ... --trial     # decides sizes on held-out pictures of the student's own pool

Fold 0. The student's pool has pictures of some 646 things; a tenth of their concepts keep their labels (names, kind,
main colour: everything that a question's answer needs). Test scenes are of the test pool, whose concepts neither the
student nor the teacher has seen. Arms, with the same student, start, steps and batch:

    labels     cross-entropy on scenes of the labelled pictures
    distilled  a part of each batch from those, the rest from scenes of all pictures of the pool, of which the teacher
               has told what it takes them for; the answers follow from what it said, its distributions are kept once

The teacher is by default what the built-in one said, which is shipped; --teacher FOLDER takes the teacher itself, with
--plan.taught, --plan.labelled, --plan.top and --plan.relation as wanted. Further arms leave parts out. The vision trunk
has ImageNet weights and stands still, so its outputs are kept in half precision. Every run is a folder under --work
that goes on where it was killed; when all asked for are done, the result is written to benchmarks/results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

from benchmarks.results_folder import RESULTS, machine, write_text
from pocketvlm.data.exact_match import exact_match
from pocketvlm.data.openmoji import licences as data_licences
from pocketvlm.data.scene_questions import CAPTIONS, TYPES
from pocketvlm.data.scenes import PictureSet, picture_set
from pocketvlm.data.splits import pool_of
from pocketvlm.distill.vlm.evaluate import Asked, scores
from pocketvlm.distill.vlm.features import Features, trunk_features, without_trunk
from pocketvlm.distill.vlm.kept_teacher import SHIPPED, KeptTeacher
from pocketvlm.distill.vlm.list_answers import list_answers
from pocketvlm.distill.vlm.pseudo import subset
from pocketvlm.distill.vlm.recipe import VlmRecipe, load_vlm_recipe
from pocketvlm.distill.vlm.run import Sources, sources_of, train_student
from pocketvlm.distill.vlm.scene_list import SceneList, composer_of
from pocketvlm.distill.vlm.teachers import BuiltinVlm, open_vlm_teacher
from pocketvlm.distill.vlm.words import load_word_vectors, start_from_words
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm_config, save_vlm
from pocketvlm.teachers.device import describe_device, pick_device
from pocketvlm.teachers.lit import weights_licences

FOLD, LABELS = 0, 0.1
STUDENT = "vlm-8m"
# the stream of `evaluate.answer_scenes`
_TEST = 1_000_003
ROUNDS = 2000
FACTS, SAID = "facts.json", "said.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every run of a protocol shares. steps: of all stages together. relation: weight of that term, which what is
    shipped of the built-in teacher does not hold."""

    steps: int = 3000
    batch: int = 16
    rate: float = 6e-3
    taught: int = 2000
    labelled: int = 800
    questions: int = 8
    test_scenes: int = 500
    share: float = 0.25
    layers: int = 3
    width: int = 96
    connector: int = 192
    bfloat16: bool = True
    top: int = 8
    relation: float = 0.0


_PLAN = Plan()


def recipe_of(arm: str, seed: int, plan: Plan) -> VlmRecipe:
    """The stages of an arm, all of `plan.steps` steps."""
    whole = {"answer": 1.0, "response": 1.0, "relation": plan.relation}
    half, tenth = plan.steps // 2, plan.steps // 10

    def stage(name: str, steps: int, labelled: float, weights: dict[str, Any], rate: float = plan.rate) -> Any:
        return {
            "name": name, "steps": steps, "labelled": labelled, "weights": weights, "rate": rate,
            "batch": plan.batch, "warmup": min(60, steps // 5),
        }  # fmt: skip

    answers, share = {"answer": 1.0}, plan.share
    lower = plan.rate / 2
    arms: dict[str, list[Any]] = {
        "labels": [stage("supervised", plan.steps, 1.0, answers)],
        "distilled": [stage("distilled", plan.steps, share, whole)],
        "answers": [stage("distilled", plan.steps, share, answers)],
        "no-relation": [stage("distilled", plan.steps, share, {"answer": 1.0, "response": 1.0})],
        "response": [stage("distilled", plan.steps, share, {"answer": 0.0, "response": 1.0})],
        "reverse": [stage("distilled", plan.steps, share, whole | {"direction": "reverse"})],
        "js": [stage("distilled", plan.steps, share, whole | {"direction": "js"})],
        "dpt-sft": [
            stage("pretrain", plan.steps - 2 * tenth, share, whole),
            stage("supervised", 2 * tenth, 1.0, answers, lower),
        ],
        "pt-sft-dft": [
            stage("pretrain", half, share, answers),
            stage("supervised", tenth, 1.0, answers, lower),
            stage("finetune", plan.steps - half - tenth, share, whole, lower),
        ],
        "dpt-sft-dft": [
            stage("pretrain", half, share, whole),
            stage("supervised", tenth, 1.0, answers, lower),
            stage("finetune", plan.steps - half - tenth, share, whole, lower),
        ],
    }
    return load_vlm_recipe(
        {
            "name": f"few-label-{arm}",
            "data": {
                "scenes": plan.taught,
                "labelled_scenes": plan.labelled,
                "questions": plan.questions,
                "captions": LABELS,
            },
            "teacher": {"top": plan.top},
            "stages": arms[arm],
            "optim": {"bfloat16": plan.bfloat16, "seed": seed, "every": 200},
        }
    )


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Everything that all runs read. test: scenes that score, with the pictures' true labels."""

    start: Vlm
    sources: Sources
    test: SceneList
    test_seen: Features
    facts: dict[str, Any]


def student_of(plan: Plan, words: Path, tokenizer: bytes, seed: int, device: torch.device) -> Vlm:
    """The start of a run: equal for all arms of a seed."""
    changes = {
        "decoder.layers": plan.layers,
        "decoder.width": plan.width,
        "decoder.hidden": 3 * plan.width,
        "connector_hidden": plan.connector,
    }
    config = load_vlm_config(STUDENT, changes)
    config = config.model_copy(update={"licences": (*weights_licences(), *data_licences())})
    model = build_vlm(config, tokenizer, seed=seed)
    start_from_words(model, load_word_vectors(words / "words.safetensors"), seed=seed)
    return model.to(device)


def pools(trial: bool) -> tuple[PictureSet, PictureSet]:
    """Pictures to learn from and to be scored on. In a trial both are of the student's pool: what the next fold would
    test is held out."""
    pictures = picture_set("student", FOLD)
    if not trial:
        return pictures, picture_set("test", FOLD)
    held = [n for n, p in enumerate(pictures.pictures) if pool_of(p.group, FOLD + 1) == "test"]
    rest = sorted(set(range(len(pictures))) - set(held))
    return subset(pictures, rest), subset(pictures, held)


def scored_list(plan: Plan, shown: PictureSet, tokenizer: bytes) -> SceneList:
    """The scenes that every run is scored on."""
    return SceneList.draw(shown, tokenizer, scenes=plan.test_scenes, questions=4, seed=_TEST)


def prepare(
    plan: Plan, teacher_spec: str | Path, words: Path, work: Path, trial: bool, device: torch.device
) -> Prepared:
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:7.0f} s  {line}", flush=True)

    teacher = open_vlm_teacher(teacher_spec, device=device)
    assert isinstance(teacher, BuiltinVlm | KeptTeacher), "the kit's own, whose tokenizer the student shares"
    if isinstance(teacher, BuiltinVlm) and plan.bfloat16:
        teacher.model.to(torch.bfloat16)
    tokens = teacher.model.tokenizer.json if isinstance(teacher, BuiltinVlm) else teacher.tokenizer_json
    start = student_of(plan, words, tokens, 0, device)
    pictures, shown = pools(trial)
    sources = sources_of(recipe_of("distilled", 0, plan), teacher, start, pictures, work, say)
    say(json.dumps(sources.facts))
    test = scored_list(plan, shown, tokens)
    seen = trunk_features(
        start,
        test,
        composer_of(shown, start.config.vision.size, device=device),
        work / "features",
        bfloat16=plan.bfloat16,
        say=say,
    )
    facts = sources.facts | {
        "test_pictures": len(shown),
        "parameters": sum(weight.numel() for weight in start.parameters()),
    }
    write_text(work / FACTS, json.dumps(facts) + "\n")
    return Prepared(start, sources, test, seen, facts)


def said_of(path: Path, plan: Plan) -> dict[str, Any]:
    """A finished run of this plan.

    Raises:
        IntegrityError: it is of another one.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("plan") != dataclasses.asdict(plan):
        raise IntegrityError(
            f"{path.parent.name} in {str(path.parent.parent)!r} was run under another plan than is asked for now, and "
            "would be reported under this one; name another --work"
        )
    return found


def run_one(arm: str, seed: int, plan: Plan, made: Prepared, words: Path, work: Path) -> dict[str, Any]:
    """Train, answer the test scenes and keep both; what is there already is read."""
    folder = work / f"{arm}-s{seed}"
    path = folder / SAID
    recipe = recipe_of(arm, seed, plan)
    if path.is_file():
        return said_of(path, plan)
    model = student_of(plan, words, made.start.tokenizer.json, seed, made.start.device)
    began = time.monotonic()
    load = os.getloadavg()[0]

    def say(row: dict[str, Any]) -> None:
        print(json.dumps({"arm": arm, "seed": seed, "seconds": round(time.monotonic() - began), **row}), flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    history = train_student(model, recipe, made.sources, folder, resume=True, say=say)
    trained = time.monotonic() - began
    with without_trunk(model):
        asked = list_answers(model, made.test, made.test_seen)
    save_vlm(model, folder / "student", overwrite=True)
    result = {
        "arm": arm, "seed": seed, "seconds": round(trained, 1), "device": describe_device(model.device),
        "load_average": [load, os.getloadavg()[0]],
        "plan": dataclasses.asdict(plan), "history": history, "said": [row.answer for row in asked],
    }  # fmt: skip
    write_text(path, json.dumps(result) + "\n")
    found = scores(made.test.pictures, [entry.scene for entry in made.test.entries], asked)
    told = {key: round(100 * found[key], 2) for key in ("accuracy", "mean")}
    print(json.dumps({"arm": arm, "seed": seed, "seconds": round(time.monotonic() - began), **told}), flush=True)
    return result


def asked_of(test: SceneList, said: Sequence[str]) -> list[Asked]:
    pairs = [(index, question) for index, entry in enumerate(test.entries) for question in entry.questions]
    return [Asked(index, question, answer) for (index, question), answer in zip(pairs, said, strict=True)]


class Mix:
    """The mix of a list of answered questions under resampling of scenes or of concepts.

    "questions": share of right answers over all questions; "types": mean over the types' shares. Captions are left out.
    """

    names = ("questions", "types")

    def __init__(self, test: SceneList) -> None:
        self.kinds = [name for name in TYPES if name not in CAPTIONS]
        self.pairs = [(i, q) for i, entry in enumerate(test.entries) for q in entry.questions]
        self.scenes = len(test)
        groups = [[test.pictures.pictures[n].group for _, n in entry.scene.placed] for entry in test.entries]
        self.groups = sorted({group for found in groups for group in found})
        number = {group: place for place, group in enumerate(self.groups)}
        self.shown = np.zeros((len(self.groups), self.scenes))
        for scene, found in enumerate(groups):
            for group in found:
                self.shown[number[group], scene] += 1 / len(found)

    def counts(self, said: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Right answers and questions, [scenes, types] each."""
        right = np.zeros((self.scenes, len(self.kinds)))
        asked = np.zeros_like(right)
        for (scene, question), answer in zip(self.pairs, said, strict=True):
            if question.type in self.kinds:
                place = self.kinds.index(question.type)
                asked[scene, place] += 1
                right[scene, place] += exact_match(answer, question.answer)
        return right, asked

    def values(self, said: Sequence[str], weights: np.ndarray) -> np.ndarray:
        """[draws, 2] for weights of scenes [draws, scenes], in points."""
        right, asked = self.counts(said)
        r, n = weights @ right, weights @ asked
        share = np.divide(r, n, out=np.full_like(r, np.nan), where=n > 0)
        return 100 * np.stack([r.sum(1) / n.sum(1), np.nanmean(share, axis=1)], axis=1)

    def draws(self, by: str, rounds: int) -> np.ndarray:
        """Weights of scenes: multinomial counts of them, or, of concepts, exponential weights (the Bayesian bootstrap),
        of which a scene has the mean of those it shows."""
        rng = np.random.default_rng(0)
        if by == "scenes":
            return rng.multinomial(self.scenes, np.full(self.scenes, 1 / self.scenes), size=rounds).astype(float)
        return rng.exponential(size=(rounds, len(self.groups))) @ self.shown


def interval(values: np.ndarray) -> list[float]:
    return [round(float(value), 2) for value in np.percentile(values, (2.5, 97.5))]


def summary(test: SceneList, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every arm's mix with its intervals over the seeds there are, and the paired difference to labels alone."""
    mix = Mix(test)
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    whole = np.ones((1, mix.scenes))
    weights = {by: mix.draws(by, ROUNDS) for by in ("scenes", "concepts")}
    values: dict[str, dict[str, np.ndarray]] = {}
    result: dict[str, Any] = {}
    for arm in arms:
        own = [run for run in runs if run["arm"] == arm]
        each = [mix.values(run["said"], whole)[0] for run in own]
        values[arm] = {by: np.mean([mix.values(run["said"], w) for run in own], axis=0) for by, w in weights.items()}
        result[arm] = {"seeds": [run["seed"] for run in own]}
        for place, name in enumerate(Mix.names):
            result[arm][name] = {
                "mean": round(float(np.mean([value[place] for value in each])), 2),
                "by_seed": [round(float(value[place]), 2) for value in each],
                **{f"interval_over_{by}": interval(found[:, place]) for by, found in values[arm].items()},
            }
    for arm in arms:
        if arm == "labels" or "labels" not in arms:
            continue
        same = [s for s in result[arm]["seeds"] if s in result["labels"]["seeds"]]
        chosen = {a: [r for r in runs if r["arm"] == a and r["seed"] in same] for a in (arm, "labels")}
        result[arm]["gain_over_labels"] = {"seeds": same}
        for place, name in enumerate(Mix.names):
            row: dict[str, Any] = {}
            for by, w in (("point", whole), *weights.items()):
                ours, theirs = (np.mean([mix.values(r["said"], w) for r in chosen[a]], axis=0) for a in (arm, "labels"))
                gap = (ours - theirs)[:, place]
                row["points" if by == "point" else f"interval_over_{by}"] = (
                    round(float(gap[0]), 2) if by == "point" else interval(gap)
                )
            result[arm]["gain_over_labels"][name] = row
    return result


def by_type(test: SceneList, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by type of question, mean over seeds, with the most common answer's share; captions' scores."""
    scenes = [entry.scene for entry in test.entries]
    found: dict[str, Any] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        scored = [scores(test.pictures, scenes, asked_of(test, r["said"])) for r in runs if r["arm"] == arm]
        types = {
            name: {
                "n": scored[0]["types"][name]["n"],
                "majority": round(scored[0]["types"][name]["majority"], 4),
                "accuracy": round(float(np.mean([one["types"][name]["accuracy"] for one in scored])), 4),
            }
            | (
                {"yes": round(float(np.mean([one["types"][name]["yes"] for one in scored])), 4)}
                if "yes" in scored[0]["types"][name]
                else {}
            )
            for name in scored[0]["types"]
        }
        captions = {
            key: round(float(np.mean([one["captions"][key] for one in scored])), 4) for key in scored[0]["captions"]
        }
        found[arm] = {"types": types, "captions": captions}
    return found


def result_of(plan: Plan, test: SceneList, facts: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is written."""
    return {
        "plan": dataclasses.asdict(plan),
        "fold": FOLD,
        "labels": LABELS,
        "student": STUDENT,
        "prepared": facts,
        "test": {"scenes": len(test), "questions": sum(len(entry.questions) for entry in test.entries)},
        "arms": summary(test, runs),
        "by_type": by_type(test, runs),
        "runs": [
            {key: run.get(key) for key in ("arm", "seed", "seconds", "device", "load_average")}
            | {"history": run["history"][::2]}
            for run in runs
        ],
        "machine": machine(),
    }


def main(
    teacher: Annotated[str, tyro.conf.arg(help="As of `pocketvlm vlm distill`.")] = SHIPPED,
    words: Annotated[Path, tyro.conf.arg(help="Of benchmarks.talking_teacher --stage prepare.")] = Path(
        "runs/talking-words"
    ),
    work: Path = Path("runs/few-label"),
    arms: tuple[str, ...] = ("labels", "distilled"),
    seeds: tuple[int, ...] = (0, 1, 2),
    extra: Annotated[tuple[str, ...], tyro.conf.arg(help="Arms of the first seed only.")] = (),
    trial: Annotated[bool, tyro.conf.arg(help="Score on held-out pictures of the student's pool instead.")] = False,
    plan: Plan = _PLAN,
    device: str = "auto",
    only_prepare: Annotated[bool, tyro.conf.arg(help="Let the teacher answer, and stop.")] = False,
    name: str = "few_label.json",
) -> None:
    """Prepare, run what is missing, and write the result after every run; nothing is prepared where all are done."""
    torch.set_num_threads(1)
    folder = work / "trial" if trial else work
    jobs = [(arm, seed) for seed in seeds for arm in arms] + [(arm, seeds[0]) for arm in extra]
    made: Prepared | None = None
    if not all((folder / f"{arm}-s{seed}" / SAID).is_file() for arm, seed in jobs):
        made = prepare(plan, teacher, words, work, trial, pick_device(device))
    if only_prepare:
        return
    test = scored_list(plan, pools(trial)[1], (words / "tokenizer.json").read_bytes()) if made is None else made.test
    runs: list[dict[str, Any]] = []
    result: dict[str, Any] = {"arms": {}}
    for place, (arm, seed) in enumerate(jobs):
        path = folder / f"{arm}-s{seed}" / SAID
        known = path.is_file()
        if known:
            runs.append(said_of(path, plan))
        else:
            assert made is not None, "prepared above"
            runs.append(run_one(arm, seed, plan, made, words, folder))
        if known and place + 1 < len(jobs):
            continue
        facts = json.loads((work / FACTS).read_text(encoding="utf-8"))
        result = result_of(plan, test, facts, runs)
        write_text((folder if trial else RESULTS) / name, json.dumps(result, indent=1) + "\n")
    for arm, row in result["arms"].items():
        print(arm, json.dumps(row))


if __name__ == "__main__":
    tyro.cli(main)
