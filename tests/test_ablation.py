"""`benchmarks.ablation`: its runs are those of `distill_run`, it resumes, and its page is the committed result."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import ablation, ablation_arms, ablation_runs, ablation_summary
from benchmarks.ablation_arms import ARMS, BASE, BEST, CANDIDATES, MOVING, PROTOCOLS, arm_named, recipe_of, run_digest
from benchmarks.ablation_moving import MOVED, moving_jobs, moving_of, moving_section
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.objectives import list_objectives
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.taps import asked_taps
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import save_student

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "ablation"
SILENT = Reporter(False)


def _toys() -> Any:
    """The toy world of the distillation tests, which is a plain module beside them."""
    path = Path(__file__).parent / "distill" / "distill_toys.py"
    spec = importlib.util.spec_from_file_location("ablation_toys", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a recipe over the toy world; what it does not name is the same every time."""
    toys = _toys()
    toys.use_toy_teacher(monkeypatch)
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    world = toys.make_world(tmp_path / "world")
    student = {"name": "mnv4-035", "overrides": toys.TINY_STUDENT, "fit_projection": 0.1, "fit_to": "captions"}

    def make(*overrides: str, **sections: Any) -> Recipe:
        value = toys.toy_recipe(world, tmp_path / "teacher", **({"student": student} | sections))
        return load_recipe(value, overrides)

    return make


def test_a_run_over_shared_inputs_is_the_run_of_its_recipe(toy: Any, tmp_path: Path) -> None:
    """Another arm and seed, over inputs and a start that were made for other runs: the same ranks and loss."""
    shared = prepare(toy("train.seed=5"), SILENT)
    wanted = toy(
        "train.seed=1", "train.text_batch=0",
        objectives=[{"name": "clip"}, {"name": "crd", "weight": 0.3}, {"name": "rafa", "weight": 0.01}],
    )  # fmt: skip
    alone = distill_run(wanted, tmp_path / "run", progress=False)
    assert alone.evaluation is not None
    device = torch.device("cpu")
    started = ablation_runs.Trainer(shared.with_recipe(wanted), device)
    started.start()
    for _ in range(2):  # the second shows that a run leaves its start and the shared inputs alone
        own = shared.with_recipe(wanted, copy.deepcopy(started.student))
        found = ablation_runs.train_and_score(own, device)
        assert found["final_loss"] == alone.final_loss
        for direction, ranks in found["ranks"].items():
            assert ranks == alone.evaluation.queries[f"model/{direction}/rank"].tolist()


def test_an_arm_without_a_teacher_takes_none_from_shared_inputs(toy: Any, tmp_path: Path) -> None:
    shared = prepare(toy(), SILENT)
    wanted = toy("student.embed_dim=16", "train.text_batch=0", teacher=None, objectives=[{"name": "clip"}])
    own = shared.with_recipe(wanted)
    assert own.teacher is own.images is own.words is own.teacher_answers is None
    assert own.digest == prepare(wanted, SILENT).digest != shared.digest
    alone = distill_run(wanted, tmp_path / "run", progress=False)
    trainer = ablation_runs.Trainer(own, torch.device("cpu"))
    trainer.start()
    assert ablation_runs.train_and_score(own, torch.device("cpu"))["final_loss"] == alone.final_loss


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("views.count=2", "views"),
        ("data.words.size=61", "data"),
        ("teacher.cache_dtype=bfloat16", "teacher"),
        ("tokenizer.vocab_size=200", "tokenizer"),
    ],
)
def test_other_inputs_are_refused(toy: Any, change: str, named: str) -> None:
    with pytest.raises(UsageError, match=rf"other inputs \(.*{named}\)"):
        prepare(toy(), SILENT).with_recipe(toy(change))


def test_the_tokenizer_is_made_once(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = prepare(toy("train.seed=5"), SILENT)
    monkeypatch.setattr("pocketvlm.distill.start.train_tokenizer", None)
    assert shared.with_recipe(toy("train.seed=1")).student.tokenizer_json == shared.tokenizer_json


def test_texts_that_no_teacher_answered_are_refused(toy: Any) -> None:
    objectives = [{"name": "crd"}]
    shared = prepare(toy("train.text_batch=0", objectives=objectives), SILENT)
    with pytest.raises(UsageError, match="texts of the teacher"):
        shared.with_recipe(toy())


def test_the_start_towards_captions_needs_no_teacher(toy: Any) -> None:
    """With a teacher and without one the projection starts in the same place; towards the teacher it does not."""
    found = {}
    for name, overrides, sections in (
        ("taught", (), {}),
        ("alone", ("student.embed_dim=16", "train.text_batch=0"), {"teacher": None, "objectives": [{"name": "clip"}]}),
        ("teacher", ("student.fit_to=teacher",), {}),
    ):
        trainer = ablation_runs.Trainer(prepare(toy(*overrides, **sections), SILENT), torch.device("cpu"))
        trainer.start()
        state = trainer.student.image_tower.projection.state_dict()
        found[name] = torch.cat([value.flatten().float() for value in state.values()])
    assert torch.equal(found["taught"], found["alone"])
    assert not torch.allclose(found["taught"], found["teacher"])


def test_weights_follow_the_gradients(toy: Any) -> None:
    """A weight that is r |g_base| / |g_own| gives a gradient of r times the base's."""
    objectives = [{"name": "clip"}, {"name": "crd", "weight": 2.0}]
    shared = prepare(toy("train.text_batch=0", objectives=objectives), SILENT)
    before = ablation_runs.gradient_norms(shared, torch.device("cpu"))
    assert before["base"] > 0
    assert before["own"] > 0
    objectives[1]["weight"] *= 3 * before["base"] / before["own"]
    after = ablation_runs.gradient_norms(
        shared.with_recipe(toy("train.text_batch=0", objectives=objectives)), torch.device("cpu")
    )
    assert after["own"] == pytest.approx(3 * after["base"], rel=1e-3)
    assert after["base"] == pytest.approx(before["base"], rel=1e-4)


def test_a_loss_that_reaches_nothing_that_trains_has_no_gradient(toy: Any) -> None:
    """Pooled features come before the projection, so `hint` teaches a frozen trunk nothing; the average of a student
    is the student at the first step, so `momentum` starts with as large a gradient as other losses."""
    for name, rate, reached in (("hint", 0, False), ("hint", 1, True), ("momentum", 0, True)):
        recipe = toy(
            "train.text_batch=0", f"train.lr_scale={{image_tower.trunk: {rate}}}", "train.ema_decay=0.9",
            objectives=[{"name": "clip"}, {"name": name}],
        )  # fmt: skip
        norms = ablation_runs.gradient_norms(prepare(recipe, SILENT), torch.device("cpu"))
        assert norms["base"] > 0
        assert (norms["own"] > 0) == reached


def test_every_objective_that_a_recipe_can_use_is_in_an_arm() -> None:
    """An objective that is added has an arm, in the ablation or with a trunk that moves, or a reason here."""
    used = {spec["name"] for arm in (*ARMS, *MOVING) for spec in arm.objectives} | {"clip"}
    apart = {
        "matryoshka-2d": "makes a smaller student, not a better one",
        "dho": "its student is a classifier",
    }
    assert set(list_objectives()) - used == apart.keys()
    assert all(arm_named(arm.name) is arm for arm in (*ARMS, *MOVING))


@pytest.mark.parametrize("arm", MOVING, ids=lambda arm: arm.name)
def test_arms_on_a_moving_trunk_differ_in_their_losses_alone(arm: ablation_arms.Arm) -> None:
    base, own = (recipe_of(one, "few", 0, 1, 1.0, MOVED) for one in (BASE, arm))
    for part in ("data", "views", "eval", "student"):
        assert getattr(own, part) == getattr(base, part)
    assert own.train.model_dump(exclude={"bank"}) == base.train.model_dump(exclude={"bank"})
    assert [spec.name for spec in own.objectives][:1] == ["clip"]
    assert own.train.lr_scale["image_tower.trunk"] == load_recipe("best").train.lr_scale["image_tower.trunk"] == 3


def test_a_pack_for_a_moving_trunk_keeps_token_maps_and_is_another(tmp_path: Path) -> None:
    """Runs of the stage read the pack whose teacher cache has maps; the other stages' packs are as they were."""
    still = ablation_runs.job_of("screen", BASE, "few", 0, 0, 1.0, None)
    moving = next(iter(moving_jobs(["few"], [0])))
    assert asked_taps(recipe_of(moving.reads, "few", 0, 0)).teacher == ("tokens",)
    paths = [ablation_runs.pack_path(tmp_path, 0, "few", job.reads) for job in (still, moving)]
    assert paths[0] == ablation_runs.pack_path(tmp_path, 0, "few")
    assert paths[0] != paths[1]
    read = {tap for arm in MOVING for tap in asked_taps(recipe_of(arm, "few", 0, 0)).teacher}
    assert read == {"tokens"}


@pytest.mark.parametrize("name", ["masked-language", "region-self"])
def test_a_loss_with_a_forward_of_its_own_has_a_gradient(toy: Any, tmp_path: Path, name: str) -> None:
    save_student(prepare(toy(), SILENT).student, tmp_path / "start")
    start = f"student.init={tmp_path / 'start'}"
    recipe = toy("train.text_batch=0", start, objectives=[{"name": "clip"}, {"name": name}])
    norms = ablation_runs.gradient_norms(prepare(recipe, SILENT), torch.device("cpu"))
    assert norms["base"] > 0
    assert norms["own"] > 0


def test_the_section_of_the_moving_trunk_pools_seeds_and_says_what_is_apart(tmp_path: Path) -> None:
    gains = {"clip": 0, "token-gram": 8, "hint": -8, "region-self": 0}
    results = ablation.Results(tmp_path, "moving")
    for job in moving_jobs(["few"], [0, 1]):
        if job.arm in gains and not (job.arm == "region-self" and job.seed):
            results.keep(_row(job, gain=gains[job.arm]))
    stale = ablation_runs.job_of("moving", arm_named("feature"), "few", 0, 0, 1.0, None)
    results.keep(_row(stale, gain=8))
    found = moving_of(ablation.read_rows(results.path))
    arms = found["few"]["arms"]
    assert list(found) == ["few"]
    assert [(name, arms[name]["runs"]) for name in gains] == [
        (name, 1 if name == "region-self" else 2) for name in gains
    ]
    assert arms.keys() == gains.keys()
    assert arms["token-gram"]["both"]["difference"] == 40.0
    text = " ".join("\n".join(moving_section(found)).split())
    assert "| `token-gram` | relations of places (`rdist`) | 1 | 90.0 | 90.0 | +40.0 (" in text
    assert "Of the first seeds alone: `region-self` 1 runs. Not run: `feature`" in text
    assert "outside the interval: `token-gram` (few). Below it: `hint` (few). The others" in text
    assert "Of 3 comparisons" in text


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_arms_differ_in_their_losses_alone(arm: ablation_arms.Arm) -> None:
    base, own = recipe_of(BASE, "few", 2, 1), recipe_of(arm, "few", 2, 1)
    assert own.data == base.data
    assert own.views == base.views
    assert own.eval == base.eval
    changed = {"bank", "text_batch"}  # texts beside the pictures; nothing that the base reads
    # two arms say that they differ, to see how much of a gain is the training's
    changed |= {"clip-slow": {"lr"}, "clip-long": {"steps", "lr_scale"}}.get(arm.name, set())
    assert own.train.model_dump(exclude=changed) == base.train.model_dump(exclude=changed)
    start = {"student.fit_to=teacher", "student.fit_text_projection=0.01"} & set(arm.changes)
    assert (own.student == base.student) == (not start)
    assert ("clip" in [spec.name for spec in own.objectives]) == (not arm.replaces)


def test_a_digest_is_of_what_is_done() -> None:
    recipe = recipe_of(arm_named("crd"), "few", 1, 0, 0.5)
    same = ablation_arms.started_at(recipe, "here", "there", "cuda")
    assert run_digest(recipe, 0) != run_digest(recipe_of(arm_named("crd"), "few", 1, 0, 0.6), 0)
    assert run_digest(recipe, 0) != run_digest(recipe_of(arm_named("crd"), "all", 1, 0, 0.5), 0)
    assert same.train.device == "cuda"
    job = ablation_runs.job_of("final", arm_named("crd"), "few", 1, 0, 1.0, 0.5)
    assert job.digest == run_digest(recipe, 0, False)
    screened = ablation_runs.job_of("screen", arm_named("crd"), "few", 1, 0, 0.5, None)
    assert screened.digest != job.digest


def test_published_weights_stay_in_a_sum() -> None:
    specs = {spec.name: spec.weight for spec in recipe_of(arm_named("clip-kd"), "few", 0, 0, 0.5).objectives}
    assert specs == {"clip": 1.0, "feature": 2.6, "icl": 0.5, "crd": 0.5}


# --- result files


def test_a_line_that_a_kill_cut_short_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "final.jsonl"
    ablation.append_row(path, {"digest": "a"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"digest":"b","ra')
    assert ablation.read_rows(path) == [{"digest": "a"}]
    assert path.read_bytes() == whole
    ablation.append_row(path, {"digest": "c"})
    assert [row["digest"] for row in ablation.read_rows(path)] == ["a", "c"]


def _row(job: Any, *, gain: int = 0) -> dict[str, Any]:
    """A made-up result: the better the arm, the more queries are answered."""
    ranks = [1 if place < 40 + 4 * gain else 9 for place in range(80)]
    concepts = [f"c{place // 2}" for place in range(80)]
    row = dataclasses.asdict(job) | {"scale": 1.5, "device": "toy", "final_loss": 1.0, "seconds": {}, "objectives": []}
    row |= {"ranks": dict.fromkeys(ablation_runs.DIRECTIONS, ranks), "queries": f"q{job.fold}", "step_ms": 10 + gain}
    return row | {"concepts": dict.fromkeys(ablation_runs.DIRECTIONS, concepts)}


def test_what_is_finished_is_not_repeated_and_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Here(ablation.ProcessPoolExecutor):  # type: ignore[misc]
        """Runs in this process; a worker of the command would train."""

        def submit(self, fn: Any, job: Any) -> Any:  # type: ignore[override]
            made.append(job.arm)
            future: Any = ablation.Future()
            if job.arm == "icl" and made.count("icl") == 1:
                future.set_exception(RuntimeError("out of memory"))
            else:
                future.set_result(_row(job, gain=int(job.ratio)))
            return future

    monkeypatch.setattr(ablation, "ProcessPoolExecutor", Here)
    arms = [BASE, arm_named("crd"), arm_named("icl")]
    jobs = [*ablation.screen_jobs(arms, ["few"])]
    assert len(jobs) == 7
    with pytest.raises(SystemExit, match=r"1 runs failed: screen few icl f0 s0: RuntimeError\('out of memory'\)"):
        ablation.run_all(jobs, ablation.Results(tmp_path, "screen"), tmp_path, "cpu", 2, float("inf"))
    assert len(made) == 7
    assert not ablation.run_all(jobs, ablation.Results(tmp_path, "screen"), tmp_path, "cpu", 2, deadline=0)
    assert len(made) == 7
    assert ablation.run_all(jobs, ablation.Results(tmp_path, "screen"), tmp_path, "cpu", 2, float("inf"))
    assert made[7:] == ["icl"]
    rows = ablation.read_rows(tmp_path / "screen.jsonl")
    assert [row["id"] for row in rows if "id" in row] == ["machine-0", "q0", "machine-1"]
    finals = [*ablation.final_jobs(arms, ["few"], [1, 2], [0], ablation.Results(tmp_path, "screen"))]
    assert {(job.arm, job.ratio) for job in finals} == {("clip", 1.0), ("crd", 3.0), ("icl", 3.0)}
    assert len(finals) == 6


def test_workers_stay_with_their_pack() -> None:
    jobs = [ablation_runs.job_of("final", BASE, "few", fold, seed, 1.0, None) for fold in (1, 2) for seed in (0, 1, 2)]
    waiting, at = list(jobs), [None, None]
    order: list[list[int]] = [[], []]
    for turn in range(6):
        place = turn % 2
        job = ablation._next(waiting, at, place)
        at[place] = job.group
        order[place].append(job.fold)
    assert sorted(order) == [[1, 1, 1], [2, 2, 2]]


def test_the_summary_pools_and_compares(tmp_path: Path) -> None:
    gains = {"clip": 0, "feature": 6, "icl": 4, "crd": -2, "clip-kd": 5}
    results = ablation.Results(tmp_path, "final")
    for name, gain in gains.items():
        for fold in (1, 2):
            results.keep(_row(ablation_runs.job_of("final", arm_named(name), "few", fold, 0, 1.0, 1.5), gain=gain))
    lonely = ablation_runs.job_of("final", arm_named("rkd"), "few", 1, 0, 1.0, 1.5)
    results.keep(_row(lonely))
    ablation_summary.summarise(tmp_path)
    part = json.loads((tmp_path / "summary.json").read_text())["protocols"]["few"]
    assert part["incomplete"] == ["rkd"]
    assert part["arms"]["clip"]["image_to_text"] == {"R@5": 50.0, "difference": 0.0, "low": 0.0, "high": 0.0}
    feature = part["arms"]["feature"]
    assert feature["image_to_text"]["R@5"] == 80.0
    assert feature["image_to_text"]["low"] < feature["image_to_text"]["difference"] == 30.0
    assert feature["step_cost"] == 1.6
    agreed = {row["statement"]: row["agrees"] for row in part["published"]}
    assert agreed == {
        "feature > 0": "yes", "icl > 0": "yes", "crd > 0": "no", "clip-kd > 0": "yes",
        "clip-kd > feature": "undecided", "feature > icl": "yes", "icl > crd": "yes",
    }  # fmt: skip
    page = (tmp_path / "ablation.md").read_text()
    assert "| `feature` | FD of CLIP-KD | 1 | 80.0 | +30.0" in page
    assert re.search(r"\| crd > 0 \| \+1.40 \| -10.00 \(-\d+.\d+ to -\d+.\d+\) \| \*\*no\*\* \|", page)
    assert (tmp_path / "ablation.svg").read_text().startswith("<svg")


def test_candidates_are_searched_on_one_fold_and_reported_on_the_others(tmp_path: Path) -> None:
    best, other = arm_named(BEST), next(arm for arm in CANDIDATES if arm.name != BEST)
    searched, finals = ablation.Results(tmp_path, "search"), ablation.Results(tmp_path, "final")
    jobs = [job for job in ablation.search_jobs(["few"], [0, 1]) if job.arm in (best.name, other.name)]
    assert {job.fold for job in jobs} == {ablation.TUNED_ON}
    for job in jobs:
        searched.keep(_row(job, gain=4 if job.arm == BEST else 0))
    stale = dataclasses.replace(jobs[0], digest="of another definition", seed=2)
    searched.keep(_row(stale, gain=-10))
    for fold in (1, 2):
        answered = {direction: [1, 1, 1, 9] for direction in ablation_runs.DIRECTIONS}
        ablation.append_row(tmp_path / "teacher.jsonl", {"fold": fold, "ranks": answered})
    asked = [*ablation.final_jobs([BASE, best], ["few"], [1, 2], [0], ablation.Results(tmp_path, "screen"))]
    assert [job.arm for job in asked] == [BEST] * 2  # the base was not screened
    for job in [*asked, *(ablation_runs.job_of("final", BASE, "few", fold, 0, 1.0, 1.0) for fold in (1, 2))]:
        finals.keep(_row(job, gain=5 if job.arm == BEST else 0))
    ablation_summary.summarise(tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["search"][BEST]["few"] == {"image_to_text": 70.0, "text_to_image": 70.0, "seeds": [0, 1]}
    part = found["protocols"]["few"]
    assert part["teacher"] == {"image_to_text": 75.0, "text_to_image": 75.0}
    assert part["arms"][BEST]["image_to_text"]["kept"] == 100.0
    assert part["arms"]["clip"]["image_to_text"]["kept"] == 66.7
    page = (tmp_path / "ablation.md").read_text()
    assert f"| **`best`** ({BEST}) | " in page
    assert f"| `{other.name}` | 50.0 | 50.0 | – | – |" in page
    assert "The teacher's own R@5: 75.0 picture → text" in page


@pytest.mark.parametrize("name", ["text-to-concept", "openmoji-whole"])
def test_what_starts_at_the_teachers_solution_has_both_projections_fitted(name: str) -> None:
    student = ablation_arms.recipe_of(arm_named(name), "few", 0, 0).student
    assert student.fit_to == "teacher"
    assert student.fit_projection
    assert student.fit_text_projection


def test_without_finals_the_page_is_the_screening(tmp_path: Path) -> None:
    """Each arm at its best r; what was skipped or not run is named; finals take the page over."""
    screened, skipped = ablation.Results(tmp_path, "screen"), arm_named("hint")
    for job in ablation.screen_jobs([BASE, arm_named("feature"), arm_named("crd"), skipped], ["few"]):
        row = _row(
            job,
            gain={"feature": {0.3: 2, 1.0: 6, 3.0: 4}, "crd": dict.fromkeys((0.3, 1.0, 3.0), -2)}.get(job.arm, {}).get(
                job.ratio, 0
            ),
        )
        if job.arm == "hint":
            row = {key: row[key] for key in row if key not in ("ranks", "queries", "concepts", "step_ms")}
            row |= {"scale": None, "skipped": ablation_runs.NO_GRADIENT}
        screened.keep(row)
    tuned = ablation.Results(tmp_path, "tune")
    for job in list(ablation.tune_jobs(["few"]))[:2]:
        tuned.keep(_row(job, gain=len(job.tuned)))
    ablation_summary.summarise(tmp_path)
    page = (tmp_path / "ablation.md").read_text()
    assert "This is screening, not a result" in page
    assert "| `feature` | FD of CLIP-KD | 1 | 80.0 | 80.0 | +30.0 (" in page
    assert "| `crd` | CRD of CLIP-KD | 0.3 | 40.0 | 40.0 | -10.0 (" in page
    assert f"| – | – | – | skipped: {ablation_runs.NO_GRADIENT} |" in page
    assert "Not screened yet: `clip-long`" in page
    assert re.search(r"\| crd > 0 \| \+1.40 \| -10.00 \(-\d+.\d+ to -\d+.\d+\) \| \*\*no\*\* \|", page)
    assert "| as used | 55.6 | 50.0 |" in page
    assert "| lr 3e-05 | 60.0 | 55.0 |" in page
    assert (tmp_path / "ablation.svg").read_text().startswith("<svg")
    finals = [*ablation.final_jobs([BASE, skipped], ["few"], [1], [0], screened)]
    assert [job.arm for job in finals] == ["clip"]
    ablation.Results(tmp_path, "final").keep(_row(finals[0]))
    ablation_summary.summarise(tmp_path)
    page = (tmp_path / "ablation.md").read_text()
    assert "This is screening" not in page
    assert "| as used | 55.6 | 50.0 |" in page


def test_a_student_that_diverged_counts_as_one_that_finds_nothing(tmp_path: Path) -> None:
    results = ablation.Results(tmp_path, "final")
    for name in ("clip", "crd"):
        job = ablation_runs.job_of("final", arm_named(name), "few", 1, 0, 1.0, 1.5)
        row = _row(job)
        if name == "crd":
            row = {key: row[key] for key in row if key not in ("ranks", "queries", "concepts", "step_ms")}
            row["diverged"] = "the loss is not finite"
            assert ablation.quality(row) == 0
        results.keep(row)
    found = ablation_summary.summary_of(tmp_path)["protocols"]["few"]["arms"]["crd"]
    assert (found["image_to_text"]["R@5"], found["diverged"], found["step_cost"]) == (0.0, 1, None)


def test_the_page_is_the_committed_result() -> None:
    """Without committed results the page says so, and has no number of any."""
    page = ablation_summary.DOC.read_text(encoding="utf-8")
    path = RESULTS / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"protocols": {}}
    assert page == ablation_summary.page(found)
    if not (found["protocols"] or found.get("screening")):
        assert ablation_summary.NO_RESULTS in page
        assert "| `clip` |" not in page
        return
    assert found["sha256"] == {s: ablation_summary.digest_of(RESULTS / f"{s}.jsonl") for s in ablation_summary.STAGES}
    assert ("This is screening" in page) == (not found["protocols"])
    assert ablation_summary.PLOT.read_text(encoding="utf-8") == ablation_summary.plot(found)
    rows = [row for row in ablation.read_rows(RESULTS / "final.jsonl") if "digest" in row]
    for protocol, part in found["protocols"].items():
        base = [row for row in rows if (row["protocol"], row["arm"]) == (protocol, BASE.name)]
        hits = np.concatenate([np.array(row["ranks"]["image_to_text"]) <= 5 for row in base])
        assert part["arms"][BASE.name]["image_to_text"]["R@5"] == round(100 * float(hits.mean()), 2)
        assert protocol in PROTOCOLS


def test_the_recipe_that_was_found_holds_its_floors() -> None:
    """Against the student without a teacher, over pooled folds and three seeds, in both directions."""
    found = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))["protocols"]
    for protocol, points in (("few", 12), ("all", 3)):
        best = found[protocol]["arms"][BEST]
        assert best["runs"] >= 12
        for direction in ablation_runs.DIRECTIONS:
            row = best[direction]
            assert row["difference"] >= points
            assert row["low"] > 0
            assert row["kept"] >= 80
            assert row["R@5"] >= 22


def test_the_recipe_best_is_the_one_that_was_found() -> None:
    shipped, found = load_recipe("best"), recipe_of(arm_named(BEST), "few", 0, 0)
    apart = {"text_pretrain_steps", "precision", "threads", "seed"}
    assert shipped.train.model_dump(exclude=apart) == found.train.model_dump(exclude=apart)
    key = lambda spec: (spec["batch"], spec["name"])  # noqa: E731
    ours, theirs = ([spec.model_dump() for spec in recipe.objectives] for recipe in (shipped, found))
    assert sorted(ours, key=key) == sorted(theirs, key=key)
    assert (shipped.views, shipped.student.name) == (found.views, found.student.name)


def test_the_readme_has_the_committed_numbers() -> None:
    found = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))["protocols"]
    readme = (ablation_summary.ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- ablation:begin -->")[2].partition("<!-- ablation:end -->")[0]
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\| ([\d.]+) \((\d+) %\) \| ([\d.]+) \((\d+) %\) \|$", table, re.M)
    assert len(rows) == 7
    for name, *shown in rows:
        wanted = []
        for protocol in ("few", "all"):
            row = found[protocol]["arms"][BEST if name == "best" else name]
            for key, digits in (("R@5", 1), ("kept", 0)):
                wanted.append(f"{np.mean([row[d][key] for d in ablation_runs.DIRECTIONS]):.{digits}f}")
        assert shown == wanted, name


def test_an_unknown_arm_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'feature'"):
        ablation_arms.chosen(["featur"])
    assert [arm.name for arm in ablation_arms.chosen(["crd"])] == ["clip", "crd"]
