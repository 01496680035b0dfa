"""Stages of a generative student: terms against loops, what moves, resuming to the same numbers, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vlm_toys import OTHER_TOKENIZER, PICTURES, SIDE, made_list, tiny

from pocketvlm.distill.checkpoint import latest_checkpoint, step_of
from pocketvlm.distill.vlm.answer_cache import kept_answers
from pocketvlm.distill.vlm.features import trunk_features, without_trunk
from pocketvlm.distill.vlm.on_policy import sampled_answers, sampled_rows
from pocketvlm.distill.vlm.recipe import VlmRecipe, load_vlm_recipe, vlm_recipe_names
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.distill.vlm.stages import Live, Source, StageRun, chosen_scenes, joined_rows, stage_terms
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.students.vlm.tokenizer import EOS

ALL = {"answer": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}


def _recipe(*stages: dict[str, Any], **changes: Any) -> VlmRecipe:
    return load_vlm_recipe(
        {
            "teacher": {"top": 5, "places": True},
            "stages": [{"batch": 4, "warmup": 2, "steps": 3} | stage for stage in stages],
            "optim": {"every": 2, "log_every": 3},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Source, Source, Live]]:
    folder = tmp_path_factory.mktemp("kept")
    teacher, student = tiny(3, width=64), tiny()
    composer = composer_of(PICTURES, SIDE, variants=2)
    true, heard = made_list(6), made_list(10, seed=1)
    kept = [trunk_features(student, scenes, composer, folder) for scenes in (true, heard)]
    answers = kept_answers(folder / "answers", heard, top=5, teacher=teacher, composer=composer, places=True)
    return lambda: (
        Source(true, kept[0], composer), Source(heard, kept[1], composer, answers), Live(teacher, composer)
    )  # fmt: skip


def _run(made: Any, recipe: VlmRecipe, folder: Path, *, resume: bool = False, live: bool = False) -> tuple[Any, Any]:
    model = tiny()
    true, heard, teacher = made()
    with without_trunk(model):
        history = StageRun(model, recipe, true, heard, folder, live=teacher if live else None).run(resume=resume)
    return model.state_dict(), history


def _loop_kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_terms_are_those_of_a_loop(sources: Any) -> None:
    """In float64, from logits and hidden states read out of the model token by token."""
    true, heard, _ = sources()
    model = tiny().double()
    weights = _recipe({"name": "a", "weights": ALL}).stages[0].weights
    lists = [(heard.scenes, [3, 7]), (true.scenes, [2])]
    rows = joined_rows(lists)
    taught = heard.answers.of([3, 7])
    with without_trunk(model):
        seen = torch.cat([heard.seen([3, 7]), true.seen([2])])
        terms = stage_terms(model, weights, seen, rows, taught)
        hidden = model.hidden(seen, rows)
        logits = model.decoder.logits(hidden)
    width, prefix = rows.ids.shape[1], model.prefix
    shares = logits.softmax(dim=-1)
    loss, response, taught_tokens = 0.0, 0.0, len(taught.ids)
    for number, (place, target) in enumerate(zip(rows.places.tolist(), rows.targets.tolist())):
        row, column = divmod(place, width)
        own = shares[row, prefix + column].tolist()
        loss -= math.log(own[target]) / len(rows.targets)
        if number < taught_tokens:
            ids, p = taught.ids[number].tolist(), taught.logs[number].double().exp().tolist()
            response += _loop_kl(p, [own[i] for i in ids] + [1 - sum(own[i] for i in ids)]) / taught_tokens
    visual = relation = 0.0
    assert taught.place_ids is not None
    assert taught.place_logs is not None
    assert taught.relations is not None
    for picture in range(2):
        for place in range(prefix - 1):
            own = shares[picture, 1 + place].tolist()
            ids, p = (
                taught.place_ids[picture, place].tolist(),
                taught.place_logs[picture, place].double().exp().tolist(),
            )
            visual += _loop_kl(p, [own[i] for i in ids] + [1 - sum(own[i] for i in ids)]) / (2 * (prefix - 1))
        grams = []
        for tokens in (hidden[picture, 1:prefix].tolist(), taught.relations[picture].tolist()):
            grams.append([sum(a * b for a, b in zip(one, two)) for one in tokens for two in tokens])
        dot = sum(a * b for a, b in zip(*grams))
        relation += (1 - dot / math.sqrt(sum(a * a for a in grams[0]) * sum(b * b for b in grams[1]))) / 2
    for name, wanted in (("answer", loss), ("response", response), ("visual", visual), ("relation", relation)):
        assert float(terms[name].detach()) == pytest.approx(wanted, rel=1e-6), name


def test_joined_rows_are_the_lists_rows_below_each_other(sources: Any) -> None:
    true, heard, _ = sources()
    rows = joined_rows([(heard.scenes, [3]), (true.scenes, [2, 4])])
    parts = [heard.scenes.rows([3]), true.scenes.rows([2, 4])]
    assert rows.targets.tolist() == [token for part in parts for token in part.targets.tolist()]
    model = tiny()
    composer = composer_of(PICTURES, SIDE, variants=2)
    seen = [heard.scenes.pixels([3], composer), true.scenes.pixels([2, 4], composer)]
    apart = torch.cat([model(pixels, part) for pixels, part in zip(seen, parts)])
    torch.testing.assert_close(model(torch.cat(seen), rows), apart, rtol=1e-4, atol=1e-4)


def test_every_scene_of_an_epoch_is_chosen_once_and_steps_do_not_depend_on_others() -> None:
    epoch = [n for step in range(5) for n in chosen_scenes(10, 4, step, 0, "a")]
    assert sorted(epoch[:10]) == sorted(epoch[10:]) == list(range(10))
    assert epoch[:10] != epoch[10:]
    assert chosen_scenes(10, 4, 3, 0, "a") == epoch[12:16]
    assert chosen_scenes(10, 4, 3, 1, "a") != epoch[12:16] != chosen_scenes(10, 4, 3, 0, "b")
    assert len(chosen_scenes(3, 8, 1, 0, "a")) == 8


def test_only_the_named_parts_move(sources: Any, tmp_path: Path) -> None:
    before = tiny().state_dict()
    after, history = _run(sources, _recipe({"name": "a", "train": ["connector"], "weights": ALL}), tmp_path / "a")
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"connector"}
    assert set(history[-1]) == {"stage", "step", "steps_per_second", "answer", "response", "visual", "relation"}
    model = tiny()
    true, heard, _ = sources()
    pixels = [Source(s.scenes, None, s.composer, s.answers) for s in (true, heard)]
    recipe = _recipe({"name": "a", "train": ["vision", "decoder"], "weights": ALL})
    StageRun(model, recipe, *pixels, tmp_path / "b").run()
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"vision", "decoder"}
    with without_trunk(tiny()) as bare, pytest.raises(UsageError, match="take vision out of train"):
        StageRun(bare, recipe, *pixels, tmp_path / "c")


def test_a_distilled_stage_comes_nearer_to_the_teacher(sources: Any, tmp_path: Path) -> None:
    stage = {"name": "a", "steps": 40, "rate": 5e-3, "labelled": 0.0, "weights": ALL | {"answer": 0.0}}
    _, history = _run(sources, _recipe(stage, optim={"log_every": 10, "every": 100}), tmp_path)
    for name in ("response", "visual", "relation"):
        assert history[-1][name] < 0.9 * history[0][name], name


def test_half_precision_trains_from_both_lists_and_keeps_weights_whole(sources: Any, tmp_path: Path) -> None:
    recipe = _recipe({"name": "a", "weights": ALL, "labelled": 0.5}, optim={"bfloat16": True})
    after, history = _run(sources, recipe, tmp_path)
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    whole, exact = _run(sources, _recipe({"name": "a", "weights": ALL, "labelled": 0.5}), tmp_path / "exact")
    for name in ("answer", "response", "visual", "relation"):
        assert history[-1][name] == pytest.approx(exact[-1][name], rel=0.05), name
    assert whole.keys() == after.keys()


_STAGES = (
    {"name": "one", "weights": ALL, "labelled": 0.5, "steps": 5},
    {"name": "two", "weights": ALL | {"direction": "reverse"}, "labelled": 0.5, "steps": 5, "on_policy": 0.5},
)


def _numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in history]


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 9])
def test_a_stopped_run_goes_on_to_the_same_numbers(
    stop: int, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(*_STAGES)
    whole, history = _run(sources, recipe, tmp_path / "whole", live=True)
    assert any("on_policy" in row for row in history)
    steps = 0
    step = torch.optim.AdamW.step

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > stop:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        _run(sources, recipe, tmp_path / "cut", live=True)
    monkeypatch.undo()
    resumed, told = _run(sources, recipe, tmp_path / "cut", resume=True, live=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert _numbers(told) == _numbers(history)
    assert _numbers(json.loads((tmp_path / "cut" / "history.json").read_text())) == _numbers(history)
    # what is finished is not trained again
    again, _ = _run(sources, recipe, tmp_path / "cut", resume=True, live=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


_VICTIM = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from vlm_toys import PICTURES, SIDE, made_list, tiny
from pocketvlm.distill.vlm.recipe import load_vlm_recipe
from pocketvlm.distill.vlm.scene_list import composer_of
from pocketvlm.distill.vlm.stages import Source, StageRun
scenes = made_list(6)
recipe = load_vlm_recipe({{
    "stages": [{{"name": "a", "steps": 6, "batch": 4, "labelled": 1.0, "train": ["connector", "decoder", "vision"]}}],
    "optim": {{"every": 2, "log_every": 3}},
}})
step, done = torch.optim.AdamW.step, 0
def dying(self, *args, **kwargs):
    global done
    done += 1
    if done > int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
torch.optim.AdamW.step = dying
source = Source(scenes, composer=composer_of(PICTURES, SIDE, variants=2))
for folder in map(Path, sys.argv[2:]):
    model = tiny()
    StageRun(model, recipe, source, None, folder).run(resume=True)
    torch.save(model.state_dict(), folder / "end.pt")
"""


def test_a_killed_process_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    """SIGKILL of a real process between two checkpoints; another comes to the end of that run and of a whole one."""
    code = _VICTIM.format(tests=str(Path(__file__).parent))
    folders = [str(tmp_path / name) for name in ("cut", "whole")]
    for allowed, wanted, runs in ((3, -signal.SIGKILL, folders[:1]), (99, 0, folders)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(allowed), *runs],
            env=dict(os.environ), capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == wanted, done.stderr
        if allowed == 3:
            left = latest_checkpoint(tmp_path / "cut" / "checkpoints")
            assert left is not None
            assert step_of(left) == 2
    cut, whole = (torch.load(Path(folder) / "end.pt", weights_only=True) for folder in folders)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_run_is_not_mixed_with_another(sources: Any, tmp_path: Path) -> None:
    _run(sources, _recipe({"name": "a"}), tmp_path)
    with pytest.raises(UsageError, match="resume it, or choose another folder"):
        _run(sources, _recipe({"name": "a"}), tmp_path)
    with pytest.raises(IntegrityError, match="made with another recipe"):
        _run(sources, _recipe({"name": "a", "rate": 5e-3}), tmp_path, resume=True)
    with pytest.raises(IntegrityError, match="another data, texts, tokenizer or teacher"):
        _run(lambda: (sources()[1], *sources()[1:]), _recipe({"name": "a"}), tmp_path, resume=True)


def test_stages_that_cannot_be_run_are_refused(sources: Any, tmp_path: Path) -> None:
    true, heard, live = sources()
    model = tiny()
    stage = _recipe({"name": "a", "weights": ALL})
    with pytest.raises(UsageError, match="no teacher is given"):
        StageRun(model, stage, true, None, tmp_path)
    with pytest.raises(UsageError, match="no answers of it were kept"):
        StageRun(model, stage, true, Source(heard.scenes, heard.features), tmp_path)
    policy = _recipe({"name": "a", "weights": {"response": 1.0}, "on_policy": 0.5})
    with pytest.raises(UsageError, match="only kept answers are given"):
        StageRun(model, policy, true, heard, tmp_path)
    stranger = Live(tiny(3, tokenizer=OTHER_TOKENIZER), live.composer)
    with pytest.raises(UsageError, match="whose tokenizer is not the student's"):
        StageRun(model, policy, true, heard, tmp_path, live=stranger)
    with pytest.raises(UsageError, match="neither kept features nor a composer"):
        Source(true.scenes).seen([0])
    assert heard.answers is not None
    bare = heard.answers.of([0])._replace(place_ids=None)
    with without_trunk(model), pytest.raises(UsageError, match="kept without the picture's places"):
        stage_terms(model, stage.stages[0].weights, heard.seen([0]), heard.scenes.rows([0]), bare)
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with without_trunk(model), pytest.raises(UsageError, match="lower the rate"):
        StageRun(model, _recipe({"name": "a", "labelled": 1.0}), true, None, tmp_path).run()


def test_drawn_answers_come_from_the_student(sources: Any) -> None:
    true, _, _ = sources()
    model = tiny()
    talks = [entry.talks for entry in (true.scenes.entries[i] for i in (1, 4))]
    with without_trunk(model):
        seen = true.seen([1, 4])
        questions = [(n, question) for n, found in enumerate(talks) for question, _ in found]
        options = {"longest": 6, "temperature": 1.0}
        drawn = sampled_answers(model, seen, questions, seed=5, **options)  # type: ignore[arg-type]
        assert drawn == sampled_answers(model, seen, questions, seed=5, **options)  # type: ignore[arg-type]
        assert drawn != sampled_answers(model, seen, questions, seed=6, **options)  # type: ignore[arg-type]
        assert all(len(row) <= 6 and EOS not in row[:-1] for row in drawn)
        # nearly without temperature it is what `generate` says
        sure = sampled_answers(model, seen, questions, longest=6, temperature=1e-6, seed=0)
        prompts = [q.text for i in (1, 4) for q in true.scenes.entries[i].questions]
        said = model.generate(seen[[n for n, _ in questions]], prompts, max_new_tokens=6)
        assert [model.tokenizer.decode(row) for row in sure] == said
        rows = sampled_rows(model, seen, talks, temperature=1.0, seed=5, longest=6)
    assert rows.targets.tolist() == [token for row in drawn for token in row]


def test_the_seed_of_drawing_reaches_the_answers(sources: Any) -> None:
    """Frequencies of a first token against the softmax, three standard errors wide."""
    true, _, _ = sources()
    model = tiny()
    question = true.scenes.entries[1].talks[0][0]
    with without_trunk(model):
        seen = true.seen([1])
        drawn = sampled_answers(model, seen, [(0, question)] * 2000, longest=1, temperature=0.3, seed=0)
        rows = true.scenes.rows([1])
        first = model(seen, rows)[0]
    shares = (first / 0.3).softmax(dim=0)
    token = int(shares.argmax())
    wanted = float(shares[token].detach())
    found = sum(row[0] == token for row in drawn) / len(drawn)
    assert abs(found - wanted) < 3 * math.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-3


def test_recipes_are_strict_and_the_shipped_ones_hold() -> None:
    for name in vlm_recipe_names():
        recipe = load_vlm_recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert load_vlm_recipe(recipe.model_dump(mode="json")).digest() == recipe.digest()
    assert load_vlm_recipe("llava-kd", ["stages.pretrain.steps=7"]).stages[0].steps == 7
    assert load_vlm_recipe("llava-kd").steps == sum(stage.steps for stage in load_vlm_recipe("llava-kd").stages)
    assert load_vlm_recipe("llava-kd", ["name=x"]).digest() == load_vlm_recipe("llava-kd").digest()
    with pytest.raises(UnknownNameError, match="llava-kd"):
        load_vlm_recipe("llava")
    with pytest.raises(UsageError, match=r"stages\.0\.labeled.*stages\.0\.labelled"):
        load_vlm_recipe({"stages": [{"name": "a", "steps": 1, "labeled": 0.5}]})
    with pytest.raises(UsageError, match=r"'stages\.0\.steps' is missing"):
        load_vlm_recipe({"stages": [{"name": "a"}]})
    with pytest.raises(UsageError, match=r"'stages\.0\.steps' is 0, but input should be"):
        load_vlm_recipe({"stages": [{"name": "a", "steps": 0}]})
    for stage, message in (
        ({"labelled": 1.0, "weights": {"response": 1.0}}, "which then teach nothing"),
        ({"on_policy": 0.5}, "which the teacher judges by weights.response"),
        ({"weights": {"visual": 1.0}}, "nothing was kept of the picture's places"),
    ):
        with pytest.raises(UsageError, match=message):
            load_vlm_recipe({"stages": [{"name": "a", "steps": 1, **stage}]})
    with pytest.raises(UsageError, match="do not all have names of their own"):
        load_vlm_recipe({"stages": [{"name": "a", "steps": 1}] * 2})


def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recipe no.yaml cannot be read"):
        load_vlm_recipe(str(tmp_path / "no.yaml"))
    for text, message in (("a: [", "is not valid YAML"), ("- 1", "holds no sections")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UsageError, match=message):
            load_vlm_recipe(str(tmp_path / "r.yaml"))
