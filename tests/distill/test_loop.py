"""The loop on a world that is learned in seconds: it learns, resumes after a kill, and refuses what cannot work."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import make_world, toy_recipe

from pocketvlm.distill import checkpoint
from pocketvlm.distill.environment import describe_environment, without_folders
from pocketvlm.distill.loop import DivergedError, Trainer, distill_run
from pocketvlm.distill.objectives import Objective
from pocketvlm.distill.objectives.blocks import Similarity
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.recipe import Recipe, load_recipe
from pocketvlm.distill.run_folder import read_metrics
from pocketvlm.edge.errors import BadSampleError, IntegrityError, UsageError
from pocketvlm.students import load_student

Make = Callable[..., Recipe]
SILENT = Reporter(False)


@pytest.fixture
def recipe(world: Path, teacher_cache: Path, toy_teacher: None) -> Make:
    def make(*overrides: str, **sections: Any) -> Recipe:
        return load_recipe(toy_recipe(world, teacher_cache, **sections), overrides)

    return make


def test_a_run_leaves_a_folder_that_explains_itself(recipe: Make, tmp_path: Path) -> None:
    result = distill_run(recipe("eval.every=3"), tmp_path / "run", progress=False)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "student", "eval.json", "eval_queries.npz",
        "report.html",
    }  # fmt: skip
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 4, 8]
    assert {"loss/crd", "loss/bank", "loss/hint", "loss/feature_image", "loss/feature_image@texts"} <= trained[0].keys()
    assert {"lr", "grad_norm", "samples_per_s", "data_wait_s", "logit_scale"} <= trained[0].keys()
    assert trained[-1]["loss"] == result.final_loss
    assert trained[-1]["loss"] == pytest.approx(
        sum(v for k, v in trained[-1].items() if k.startswith("loss/")), rel=1e-5
    )
    assert any("eval/image_to_text/R@5" in row for row in rows)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["recipe_sha256"] == recipe("eval.every=3").digest()
    assert environment["teacher"]["name"] == "toy"
    student = load_student(result.student)
    assert student.embed_dim == 16
    assert student.contract.space_id.startswith("toy-")
    assert result.evaluation is not None
    assert result.evaluation.values["teacher"]["image_to_text"]["R@1"] == 1.0
    assert "toy teacher" in (tmp_path / "run" / "report.html").read_text()


def test_the_student_learns_what_the_teacher_knows(recipe: Make, tmp_path: Path) -> None:
    """40 pictures by chance: R@5 is 12.5 %."""
    quick = ("train.steps=60", "train.batch_size=20", "train.lr=3e-3", "train.ema_decay=0.9", "checkpoint.every=60")
    result = distill_run(recipe(*quick, "views.count=1"), tmp_path / "run", progress=False)
    assert result.evaluation is not None
    assert result.evaluation.values["model"]["image_to_text"]["R@5"] > 0.5
    assert result.evaluation.values["neighbours"]["texts@10"] > 0.5


def test_two_runs_of_one_recipe_are_equal_and_another_seed_is_not(recipe: Make, tmp_path: Path) -> None:
    first = distill_run(recipe(), tmp_path / "a", progress=False)
    again = distill_run(recipe(), tmp_path / "b", progress=False)
    other = distill_run(recipe("train.seed=1"), tmp_path / "c", progress=False)
    assert first.final_loss == again.final_loss != other.final_loss
    assert load_student(first.student).contract == load_student(again.student).contract


def test_prefixes_and_orders_are_trained_and_promised(recipe: Make, tmp_path: Path) -> None:
    """Projectors of every prefix, terms by width, the contract's dims, and a resume to the same loss."""
    objectives = [
        {"name": "matryoshka", "options": {"inner": {"name": "icl"}, "dims": [4, 16]}},
        {"name": "order", "options": {"of": ["image", "text-to-image"], "neighbours": 3}},
        {"name": "rankclip", "weight": 0.06, "schedule": "warmup", "schedule_steps": 4},
        {"name": "correlation-congruence", "batch": "texts"},
    ]
    wanted = recipe("student.overrides.dims=[4]", objectives=objectives)
    result = distill_run(wanted, tmp_path / "run", progress=False)
    row = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert {f"loss/{name}" for name in (
        "icl_4", "icl_16", "order_image", "order_text-to-image", "rankclip_cross", "rankclip_within",
        "correlation-congruence_image@texts",
    )} <= row.keys()  # fmt: skip
    assert load_student(result.student).contract.dims == (4, 16)
    for path in (tmp_path / "run" / "checkpoints").glob("step-00000008*"):
        path.unlink()
    again = distill_run(wanted, tmp_path / "run", resume=True, progress=False)
    assert again.final_loss == result.final_loss


def test_a_prefix_beyond_the_embedding_stops_before_the_first_step(recipe: Make, tmp_path: Path) -> None:
    """The teacher's width, 16, is known only after it was loaded."""
    wide = [{"name": "matryoshka", "options": {"dims": [4, 32]}}]
    with pytest.raises(UsageError, match="to 16, the student's width"):
        distill_run(recipe(objectives=wide), tmp_path / "a", progress=False)
    with pytest.raises(UsageError, match="prefix of 32 numbers"):
        distill_run(recipe("student.overrides.dims=[32]", objectives=wide), tmp_path / "b", progress=False)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from distill_toys import use_toy_teacher
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.recipe import load_recipe
use_toy_teacher()
result = distill_run(load_recipe(sys.argv[2]), sys.argv[3], resume="resume" in sys.argv)
print("final", repr(result.final_loss))
"""


def child(recipe_file: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(recipe_file), str(out), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def final_loss(process: subprocess.Popen[str]) -> float:
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return float(out.split("final")[1])


def test_a_killed_run_resumes_to_the_same_loss(recipe: Make, tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process; dropout makes the random state matter."""
    changed = recipe("train.steps=24", "train.log_every=1", "student.overrides.text.dropout=0.2")
    file = tmp_path / "recipe.yaml"
    file.write_text(changed.to_yaml())
    # first, so that the teacher's answers are cached and nothing but the loop below watches the victim
    whole = distill_run(changed, tmp_path / "whole", progress=False)
    victim = child(file, tmp_path / "killed")
    log = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    # past a checkpoint, and between two of them
    while not (log.exists() and len(log.read_text().splitlines()) >= 10):
        assert victim.poll() is None, victim.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.communicate()
    left = checkpoint.latest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert left is not None
    assert 8 <= int(left.stem.split("-")[1]) < 24
    resumed = final_loss(child(file, tmp_path / "killed", "resume"))
    assert resumed == pytest.approx(whole.final_loss, abs=1e-6)
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole"))
    assert [row["step"] for row in ours] == [*range(1, 25), 24]
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    same = [load_student(tmp_path / name).contract.model_id for name in ("killed", "whole")]
    assert same[0] == same[1]


def test_the_number_of_threads_is_the_callers_again(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen = []

    def step(self: Trainer, batch: Any) -> Any:
        seen.append(torch.get_num_threads())
        raise DivergedError("stop")

    try:
        distill_run(recipe("train.steps=2"), tmp_path / "run", progress=False)
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(Trainer, "one_step", step)
        with pytest.raises(DivergedError, match="stop"):
            distill_run(recipe(), tmp_path / "failed", progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_float32_means_float32_in_training_and_scoring(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch lets cuDNN use TF32 unless told otherwise; the caller's setting is back afterwards."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    seen = []
    for name in ("one_step", "evaluate"):
        inner = getattr(Trainer, name)

        def watched(self: Trainer, *given: Any, inner: Any = inner) -> Any:
            seen.extend(flag.allow_tf32 for flag in flags)
            return inner(self, *given)

        monkeypatch.setattr(Trainer, name, watched)
    try:
        for flag in flags:
            flag.allow_tf32 = True
        distill_run(recipe("train.steps=2"), tmp_path / "run", progress=False)
        after = [flag.allow_tf32 for flag in flags]
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value
    assert seen == [False] * 6
    assert after == [True, True]


def test_no_folder_of_the_machine_is_recorded(
    recipe: Make, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "/a/bin/pocketvlm",
        "distill",
        "quick",
        f"data.train={world}?check=none",
        f'data.words.exclude=["{world}"]',
    ]
    monkeypatch.setattr(sys, "argv", given)
    recorded = describe_environment(teacher={"name": f"hf:{world}"})
    assert recorded["command"] == (
        'pocketvlm distill quick data.train=world.jsonl?check=none data.words.exclude=["world.jsonl"]'
    )
    assert recorded["teacher"]["name"] == "hf:world.jsonl"
    assert str(world.parent) not in json.dumps(recorded)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b=c/x.jsonl?images=/a/b/p&check=none", "x.jsonl?images=p&check=none"),
        ("open_clip:/a/c.json@/a/d/w.pt", "open_clip:c.json@w.pt"),
        ("student.init=/a/run/", "student.init=run/"),
        (["/a b/c", {"exclude": "['/a/b', /c/d]"}], ["c", {"exclude": "['b', d]"}]),
        ("https://host/a/b", "https://host/a/b"),
        ("runs/mine and/or a / b", "runs/mine and/or a / b"),
        (3, 3),
        ("/", "/"),
    ],
)
def test_paths_lose_their_folders(given: Any, expected: Any) -> None:
    assert without_folders(given) == expected


def test_objectives_that_change_during_training_are_told_where_it_is(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(Objective, "at", lambda self, step, progress: told.append((step, progress)))
    changed = recipe("train.text_pretrain_steps=2", "train.steps=3", "train.warmup_steps=0")
    trainer = Trainer(prepare(changed, SILENT), torch.device("cpu"))
    for step in range(5):
        trainer.one_step(trainer.feed.make(step))
    count = sum(step == 0 for step, _ in told)  # those that have no rule of their own
    assert told[::count] == told[count - 1 :: count] == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.5), (4, 1.0)]


def test_a_recipe_says_how_large_a_similarity_matrix_is_held(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: list[bool] = []
    make = Similarity.whole

    def counted(self: Similarity, rows: slice = slice(None)) -> torch.Tensor:
        whole.append(rows == slice(None))
        return make(self, rows)

    monkeypatch.setattr(Similarity, "whole", counted)
    losses = {}
    for size in (64, 0):
        arm = recipe("objectives=[{name: clip}, {name: crd}]", f"train.similarity_mib={size}")
        trainer = Trainer(prepare(arm, SILENT), torch.device("cpu"))
        whole.clear()
        losses[size] = trainer.one_step(trainer.feed.make(0))
        assert whole
        assert all(whole) == (size == 64)
    for name in ("loss/clip", "loss/crd", "grad_norm"):
        assert losses[0][name] == pytest.approx(losses[64][name], rel=1e-4)


def test_objectives_that_change_during_training_resume_where_they_were(recipe: Make) -> None:
    """Random points and softness are functions of the step: nothing of them is in a checkpoint, and nothing is lost."""
    names = "{name: rafa}, {name: soft-negatives, options: {softness: 0.9}}, {name: afd}, {name: siglip}"
    changed = recipe(f"objectives=[{names}]", "train.steps=6")

    def trainer() -> Trainer:
        return Trainer(prepare(changed, SILENT), torch.device("cpu"))

    whole, resumed = trainer(), trainer()
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(whole.state())
        whole.one_step(whole.feed.make(step))
    resumed.restore(state, Path("checkpoint"))
    for step in range(3, 6):
        resumed.one_step(resumed.feed.make(step))
    assert resumed.last == whole.last


def test_a_full_disk_stops_the_run_and_the_run_goes_on_later(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distill_run(recipe(), tmp_path / "whole", progress=False)
    real = checkpoint._write_and_sync

    def full(path: Path, data: Any) -> None:
        if "step-00000008.pt" in path.name:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "_write_and_sync", full)
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"the disk is full; step-00000004\.pt is intact"):
        distill_run(recipe(), tmp_path / "run", progress=False)
    monkeypatch.undo()
    from distill_toys import use_toy_teacher

    use_toy_teacher(monkeypatch)
    assert distill_run(recipe(), tmp_path / "run", resume=True, progress=False).final_loss == whole.final_loss


def test_a_folder_that_is_not_empty_is_refused(recipe: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UsageError, match=r"is not empty.*--overwrite to replace it, or --resume"):
        distill_run(recipe(), out, progress=False)
    with pytest.raises(UsageError, match=r"no recipe\.yaml, so it is not a run and --overwrite does not delete it"):
        distill_run(recipe(), out, overwrite=True, progress=False)
    with pytest.raises(UsageError, match="there is no run to resume"):
        distill_run(recipe(), out, resume=True, progress=False)
    assert (out / "thesis.txt").exists()


def test_resuming_needs_the_same_recipe_and_the_same_data(recipe: Make, tmp_path: Path) -> None:
    distill_run(recipe(), tmp_path / "run", progress=False)
    with pytest.raises(UsageError, match=r"another recipe \(differs in train\.lr\)"):
        distill_run(recipe("train.lr=0.5"), tmp_path / "run", resume=True, progress=False)
    found = checkpoint.latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None
    trainer = Trainer(prepare(recipe(), SILENT), torch.device("cpu"))
    state = checkpoint.load_checkpoint(found)
    state["inputs"] = "other"
    with pytest.raises(IntegrityError, match="made with another data, texts, tokenizer or teacher"):
        trainer.restore(state, found)
    distill_run(recipe("train.lr=0.5"), tmp_path / "run", overwrite=True, progress=False)


def test_a_loss_that_is_no_number_stops_with_its_name(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"not finite at step \d+"):
        distill_run(recipe("train.lr=1e30", "train.clip_norm=0"), tmp_path / "run", progress=False)
    trainer = Trainer(prepare(recipe("train.max_skipped=0"), SILENT), torch.device("cpu"))
    batch = trainer.feed.make(0)
    assert batch.teacher_image is not None
    batch.teacher_image[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"the loss is not finite at step 1 \(in .*crd"):
        trainer.one_step(batch)


def test_an_arm_without_a_teacher_runs_and_keeps_its_own_space(recipe: Make, tmp_path: Path) -> None:
    arm = recipe(
        "student.embed_dim=24", "train.text_batch=0", teacher=None, objectives=[{"name": "clip"}], views={"count": 3}
    )
    result = distill_run(arm, tmp_path / "run", progress=False)
    student = load_student(result.student)
    assert student.embed_dim == 24
    assert student.contract.space_id == student.contract.model_id
    assert result.evaluation is not None
    assert "teacher" not in result.evaluation.values


def test_unlabelled_pictures_are_learned_from_but_not_by_contrast(toy_teacher: None, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", captioned=0.0)
    value = toy_recipe(world, tmp_path / "cache")
    value["data"]["eval"] = None
    result = distill_run(
        load_recipe(value, ["objectives=[{name: feature}, {name: bank}]"]), tmp_path / "a", progress=False
    )
    assert result.evaluation is None
    with pytest.raises(UsageError, match=r"crd learn from picture-caption pairs and none of the 40 pictures"):
        distill_run(load_recipe(value), tmp_path / "b", progress=False)


def test_widths_that_differ_are_refused(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"student\.embed_dim is 24 but teacher 'toy' embeds into 16 dimensions"):
        distill_run(recipe("student.embed_dim=24"), tmp_path / "run", progress=False)


def test_bad_samples_are_skipped_and_counted_or_refused(toy_teacher: None, tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", broken=True)
    with open(world, "a") as file:
        file.write(json.dumps({"image": "red.png", "caption": "a " + "very " * 30 + "long text", "uid": "long"}) + "\n")
    value = toy_recipe(world, tmp_path / "cache")
    prepared = prepare(load_recipe(value), SILENT)
    assert prepared.source.report.counts["too-long-text"] == 1
    assert sum(prepared.source.report.counts.values()) == 2
    assert len(prepared.samples) == 41
    assert not next(s for s in prepared.samples if s.uid.endswith("long")).captions
    with pytest.raises(BadSampleError):
        prepare(load_recipe(value, ["data.on_bad_sample=refuse"]), SILENT)


def test_the_text_tower_can_be_trained_first(recipe: Make) -> None:
    trainer = Trainer(prepare(recipe("train.text_pretrain_steps=3"), SILENT), torch.device("cpu"))
    assert trainer.total == 11
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    row = trainer.one_step(trainer.feed.make(0))
    assert row["phase"] == "texts"
    assert {key for key in row if key.startswith("loss/")} == {"loss/feature_image@texts"}
    changed = {
        name.split(".")[0]
        for name, value in trainer.student.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"text_tower"}
    assert trainer.feed.make(3).phase == "pairs"


def test_frozen_parts_stand_still_and_rates_differ(recipe: Make) -> None:
    changed = recipe("train.freeze={image_tower.trunk: 2}", "train.lr_scale={text_tower: 0, image_tower: 0.1}")
    trainer = Trainer(prepare(changed, SILENT), torch.device("cpu"))
    assert sorted({group["lr_scale"] for group in trainer.optimizer.param_groups}) == [0.1, 1.0]
    for step in range(3):
        before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
        trainer.one_step(trainer.feed.make(step))
        moved = [name for name, value in trainer.student.state_dict().items() if not torch.equal(value, before[name])]
        assert not [name for name in moved if name.startswith("text_tower")]
        assert any(name.startswith("image_tower.projection") for name in moved)
        assert any(name.startswith("image_tower.trunk") for name in moved) == (step >= 2)


def test_a_wrong_prefix_is_answered_with_the_nearest(recipe: Make) -> None:
    with pytest.raises(UsageError, match="unknown parameter prefix 'image_towr'; did you mean 'image_tower'"):
        Trainer(prepare(recipe("train.lr_scale={image_towr: 0.1}"), SILENT), torch.device("cpu"))


def test_a_student_can_start_from_another(recipe: Make, tmp_path: Path) -> None:
    first = distill_run(recipe(), tmp_path / "first", progress=False)
    text_only = recipe(f"student.init={first.student}", "student.init_parts=[text_tower]", "train.seed=5")
    student = prepare(text_only, SILENT).student
    saved = load_student(first.student).state_dict()
    own = student.state_dict()
    assert torch.equal(own["text_tower.token.weight"], saved["text_tower.token.weight"])
    assert not torch.equal(own["image_tower.projection.first.weight"], saved["image_tower.projection.first.weight"])
    with pytest.raises(UsageError, match="does not fit the student of this recipe"):
        prepare(recipe(f"student.init={first.student}", "student.overrides.text.width=48"), SILENT)
    with pytest.raises(UsageError, match="reads its text through another tokenizer"):
        prepare(recipe(f"student.init={first.student}", "data.words.size=50", "tokenizer.vocab_size=200"), SILENT)


def test_a_fixed_bank_in_the_teachers_embedding(recipe: Make) -> None:
    trainer = Trainer(prepare(recipe("train.bank=25"), SILENT), torch.device("cpu"))
    outputs = trainer.feed.forward(trainer.student, trainer.feed.make(0))
    student, teacher = outputs["pairs"]
    assert teacher is not None
    assert student.bank is not None
    assert student.bank is teacher.bank
    assert student.bank.shape == (25, 16)
    assert not student.bank.requires_grad


def test_what_lies_below_the_cut_is_computed_once_and_never_moves(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "cache"))
    changes = ["train.cut_after_block=1", "student.overrides.image.levels=[1, 3]"]
    prepared = prepare(recipe(*changes), SILENT)
    given = {name: value.clone() for name, value in prepared.student.image_tower.state_dict().items()}
    trainer = Trainer(prepared, torch.device("cpu"))
    pictures, student = trainer.prepared.pictures, trainer.student
    for name, value in student.image_tower.state_dict().items():
        assert torch.equal(value, given[name]), f"{name} moved before the first step"
    student.eval()
    whole = student.encode_image(torch.from_numpy(pictures.batch([0, 5], [1, 2])))
    cut = trainer.feed._image(student, trainer.feed._below([0, 5], [1, 2]))
    # the kept outputs are float16
    assert torch.allclose(whole.features, cut.features, atol=2e-2 * float(whole.features.detach().abs().max()))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer.one_step(trainer.feed.make(0))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("image_tower.trunk.blocks.2") for name in moved)
    assert not [n for n in moved if n.startswith(("image_tower.trunk.conv_stem", "image_tower.trunk.blocks.0"))]
    kept = list((tmp_path / "cache" / "lower").iterdir())
    assert len(kept) == 1
    stamp = kept[0].stat().st_mtime_ns
    Trainer(
        prepare(recipe(*changes, "objectives=[{name: feature}]", "train.text_batch=0"), SILENT), torch.device("cpu")
    )
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache" / "lower").iterdir()] == [stamp]


def test_a_projection_that_starts_at_its_ridge_solution_starts_low(recipe: Make) -> None:
    only = "objectives=[{name: feature, options: {distance: cosine, text: 0}}]"
    norm = "student.overrides.image.projection={norm: batch}"
    losses = {}
    for name, extra in {"random": [], "ridge": ["student.fit_projection=0.1", "student.fit_views=2"]}.items():
        held = "train.hold_statistics=[image_tower]"
        trainer = Trainer(prepare(recipe(only, norm, held, *extra), SILENT), torch.device("cpu"))
        if extra:
            trainer.start()
        losses[name] = trainer.one_step(trainer.feed.make(0))["loss"]
    assert losses["random"] > 0.7
    assert losses["ridge"] < 0.3


def test_the_text_projection_can_start_at_its_ridge_solution_too(recipe: Make) -> None:
    only = "objectives=[{name: feature, batch: texts, options: {distance: cosine, text: 0}}]"
    losses = []
    for extra in ([], ["student.fit_text_projection=0.01"]):
        trainer = Trainer(prepare(recipe(only, *extra), SILENT), torch.device("cpu"))
        trainer.start()
        losses.append(trainer.one_step(trainer.feed.make(0))["loss"])
    assert losses[0] > 0.7
    # 32 random features explain about half of what the names mean
    assert losses[1] < 0.7 * losses[0]


def test_targets_move_towards_captions_and_the_mean_of_views(recipe: Make) -> None:
    trainer = Trainer(prepare(recipe("teacher.smooth=1", "teacher.caption_mix=1000"), SILENT), torch.device("cpu"))
    cache = trainer.prepared.images
    assert cache is not None
    uids = [sample.uid for sample in trainer.prepared.samples[:2]]
    mixed = trainer.feed.targets([0, 1], [1, 2], [None, "red thing"])
    mean = torch.stack([cache.image(uids, view) for view in range(3)]).mean(dim=0)
    assert torch.allclose(mixed[0], torch.nn.functional.normalize(mean[0], dim=0), atol=1e-6)
    assert torch.allclose(mixed[1], cache.text(["red thing"])[0], atol=2e-3)


def test_embeddings_on_disk_are_a_teacher(world: Path, tmp_path: Path) -> None:
    from distill_toys import ToyTeacher

    from pocketvlm.data import open_data
    from pocketvlm.distill.evaluate import questions_of
    from pocketvlm.teachers.cache_build import build_cache

    source = open_data(str(world))
    build_cache(ToyTeacher(), source.samples, questions_of(source).texts, tmp_path / "embeddings")
    value = toy_recipe(world, tmp_path / "cache")
    value["teacher"] = {"spec": f"embeddings:{tmp_path / 'embeddings'}"}
    with pytest.raises(UsageError, match=r"views\.count is 3 but the embeddings on disk hold 1 view"):
        prepare(load_recipe(value), SILENT)
    value["views"] = {"count": 1}
    with pytest.raises(UsageError, match=r"training texts \(first '.*'\) are not among the embeddings on disk"):
        prepare(load_recipe(value), SILENT)
    plain = "objectives=[{name: feature}, {name: crd}, {name: hint}]"
    recipe = load_recipe(value, ["data.words=null", "train.text_batch=0", plain])
    result = distill_run(recipe, tmp_path / "run", progress=False)
    assert result.evaluation is not None
    assert result.evaluation.values["teacher"]["image_to_text"]["R@1"] == 1.0


def test_what_a_run_left_is_scored_by_its_path(recipe: Make, world: Path, tmp_path: Path) -> None:
    from pocketvlm.distill.evaluate import evaluate_path

    result = distill_run(recipe(), tmp_path / "run", progress=False)
    assert result.evaluation is not None
    again = evaluate_path(tmp_path / "run", str(world), teacher="toy", device="cpu")
    assert again.values["model"] == result.evaluation.values["model"]
    assert again.values["retention"] == result.evaluation.values["retention"]
    with pytest.raises(UsageError, match=r"neither bundle\.json nor student\.json"):
        evaluate_path(tmp_path, str(world))
    itself = evaluate_path(
        tmp_path / "run", str(world), against=tmp_path / "run", device="cpu", metrics_wanted=("all",)
    )
    assert itself.values["beside"] == "against mnv4-035"
    assert itself.values["teacher"] == itself.values["model"]
    assert itself.values["model"]["calibration"]["logit_scale"] > 0
    assert all(gap["low"] == gap["high"] == 0 for part in itself.values["difference"].values() for gap in part.values())
    with pytest.raises(UsageError, match="one column for either"):
        evaluate_path(tmp_path / "run", str(world), teacher="toy", against=tmp_path / "run")
