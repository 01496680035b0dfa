"""Training and scoring of generative models on scenes: batches against pixels, learning above chance, honest scores."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from vlm_toys import made_pictures

from pocketvlm.data.scene_questions import Question, ask_about
from pocketvlm.data.scenes import Scene, SceneTable
from pocketvlm.data.text_metrics import chrf, cider_d
from pocketvlm.distill.vlm.batches import Composer, SceneStream, batches, drawn_scenes
from pocketvlm.distill.vlm.evaluate import Asked, answer_scenes, evaluate_vlm, scores, table
from pocketvlm.distill.vlm.train import VlmTraining, train_vlm
from pocketvlm.distill.vlm.words import load_word_vectors, save_word_vectors, start_from_words
from pocketvlm.edge.errors import UsageError
from pocketvlm.students.vlm import build_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig

SIDE = 48
PICTURES = made_pictures()
TOKENIZER = train_vlm_tokenizer(
    [text for i in range(200) for q in ask_about(PICTURES, 0, i, 8)[1] for text in (q.text, q.answer)], 700
)
CONFIG = VlmConfig.model_validate(
    {
        "name": "tiny",
        "vision": {"backbone": "test_efficientnet", "size": SIDE, "levels": [3]},
        "connector_hidden": 48,
        "decoder": {"width": 48, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 96, "context_length": 160},
    }
)


def _stream(batch: int, seed: int = 0, variants: int = 2) -> SceneStream:
    return SceneStream(PICTURES, TOKENIZER, batch=batch, questions=6, length=120, variants=variants, seed=seed)


def _composer(variants: int = 2) -> Composer:
    return Composer(SceneTable.build(PICTURES, SIDE, variants=variants), torch.device("cpu"))


def test_scenes_composed_from_the_tables_are_those_of_numpy() -> None:
    made = SceneTable.build(PICTURES, SIDE, variants=1)
    scenes = sorted((ask_about(PICTURES, 3, index, 1)[0] for index in range(40)), key=lambda scene: scene.grid)
    found = Composer(made, torch.device("cpu"))(drawn_scenes(scenes, len(PICTURES), 1, None))
    assert found.dtype == torch.uint8
    assert {scene.grid for scene in scenes} == {1, 2, 3}
    for row, scene in zip(found, scenes):
        assert (row.numpy() == made.compose(scene)).all()


def test_batches_are_the_same_with_and_without_workers_and_belong_to_their_pictures() -> None:
    alone = list(itertools.islice(batches(_stream(5), 0, torch.device("cpu")), 3))
    helped = list(itertools.islice(batches(_stream(5), 2, torch.device("cpu")), 3))
    for (drawn, rows), (other_drawn, other_rows) in zip(alone, helped):
        assert all(torch.equal(one, two) for one, two in zip((*drawn.cells, *rows), (*other_drawn.cells, *other_rows)))
    # the questions of a row are about the scene of that row, also after the scenes were sorted
    drawn, rows = alone[0]
    asked = sorted((ask_about(PICTURES, 0, index, 6) for index in range(5)), key=lambda pair: pair[0].grid)
    tokenizer = _stream(1)
    tokenizer.__iter__().__next__()
    for row, (_, questions) in enumerate(asked):
        first = tokenizer._ids(questions[0].text)
        assert rows.ids[row, 1 : 1 + len(first)].tolist() == first


def test_a_model_learns_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to far above the best constant answer, on single pictures, which is what a minute of CPU allows."""
    monkeypatch.setattr(
        "pocketvlm.data.scene_questions.draw_scene",
        lambda pictures, rng: Scene(1, (rng.randrange(len(pictures)),)),
    )
    model = build_vlm(CONFIG, TOKENIZER, seed=0)
    stream = SceneStream(PICTURES, TOKENIZER, batch=12, questions=3, length=48, variants=2, seed=0)
    training = VlmTraining(steps=150, rate=3e-3, vision_rate=1.0, word_rate=1.0, warmup=10, log_every=20)
    history = train_vlm(model, batches(stream, 0, torch.device("cpu")), _composer(), training)
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]
    found = evaluate_vlm(model, PICTURES, scenes=60)["types"]
    for name in ("colour", "kind"):
        assert found[name]["accuracy"] > found[name]["majority"] + 0.4, (name, found[name])


def test_a_trunk_at_rate_zero_stands_still_and_batch_norms_keep_their_statistics() -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_vlm(model, batches(_stream(2), 0, torch.device("cpu")), _composer(), VlmTraining(steps=3, warmup=1))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("vision.") for name in moved)
    assert {"connector.first.weight", "decoder.embed_tokens.weight", "decoder.norm.weight"} <= moved
    assert all(weight.requires_grad for weight in model.parameters())
    train_vlm(
        model, batches(_stream(2), 0, torch.device("cpu")), _composer(), VlmTraining(steps=3, warmup=1, vision_rate=1.0)
    )
    assert any(
        name.startswith("vision.") and not torch.equal(value, before[name])
        for name, value in model.state_dict().items()
    )


def test_equal_runs_by_steps_give_equal_weights() -> None:
    models = [build_vlm(CONFIG, TOKENIZER, seed=0) for _ in range(2)]
    for model in models:
        train_vlm(model, batches(_stream(3), 0, torch.device("cpu")), _composer(), VlmTraining(steps=3))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_half_precision_trains_and_what_was_trained_answers() -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0)
    training = VlmTraining(steps=3, warmup=1, bfloat16=True, log_every=3)
    (row,) = train_vlm(model, batches(_stream(3), 0, torch.device("cpu")), _composer(), training)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert 0 < row["loss"] < 20
    pixels = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate(pixels, ["What is this?", "Count the pictures."])) == 2


def test_training_ends_by_time_and_refuses_to_have_no_end() -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0)
    training = VlmTraining(seconds=0.5, log_every=1)
    history = train_vlm(model, batches(_stream(2), 0, torch.device("cpu")), _composer(), training)
    assert history
    assert history[-1]["rate"] < history[0]["rate"] * 10
    with pytest.raises(UsageError, match="would never end"):
        VlmTraining()
    with torch.no_grad():
        model.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(UsageError, match="the loss is nan"):
        train_vlm(model, batches(_stream(2), 0, torch.device("cpu")), _composer(), VlmTraining(steps=1, log_every=1))


def test_answers_come_back_to_their_own_questions() -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0).eval()
    made = SceneTable.build(PICTURES, SIDE)
    scenes, asked = answer_scenes(model, PICTURES, made, scenes=7, questions=3, batch=4)
    assert len(scenes) == 7
    assert [row.scene for row in asked] == sorted(row.scene for row in asked)
    for row in asked[::3]:
        pixels = torch.from_numpy(made.compose(scenes[row.scene]))[None]
        limit = 64 if row.question.type.endswith("caption") else 16
        assert model.generate(pixels, [row.question.text], max_new_tokens=limit)[0].startswith(row.answer[:20])


def test_scores_count_by_type_and_show_what_guessing_gives() -> None:
    def row(kind: str, answer: str, said: str, scene: int = 0) -> Asked:
        return Asked(scene, Question(kind, "?", answer), said)

    scenes = [Scene(2, (0, 1, -1, -1))]
    asked = [
        row("exists-name", "yes", "Yes."),
        row("exists-name", "no", "yes"),
        row("exists-name", "no", "yes"),
        row("count", "3", "three"),
        row(
            "scene-caption",
            "top left: thing a; top right: thing b",
            "top left: thing a; top right: cat; x: thing b",
        ),
    ]
    found = scores(PICTURES, scenes, asked)
    assert found["types"]["exists-name"] == {
        "n": 3,
        "accuracy": pytest.approx(1 / 3),
        "majority": pytest.approx(2 / 3),
        "yes": 1.0,
    }
    assert (found["accuracy"], found["mean"], found["questions"]) == (0.5, pytest.approx(2 / 3), 5)
    assert found["captions"] == {
        "recall": 0.5,
        "precision": pytest.approx(1 / 3),
        "hallucinated": pytest.approx(1 / 3),
        "chrf": pytest.approx(
            chrf(["top left thing a top right cat x thing b"], ["top left thing a top right thing b"])
        ),
        # in a set of one picture every word is common
        "cider_d": 0.0,
    }
    assert 50 < found["captions"]["chrf"] < 100
    both = scores(PICTURES, scenes, [*asked, row("caption", "a red thing c", "A red thing d.")])["captions"]
    said = ["top left thing a top right cat x thing b", "red thing d"]
    assert both["cider_d"] == pytest.approx(cider_d(said, [["top left thing a top right thing b"], ["red thing c"]]))
    assert 0 < both["cider_d"] < 10
    lines: list[str] = []
    table({"test": found}, lines.append)
    assert any(line.startswith("exists-name") and "0.333 (0.667)     3" in line for line in lines)


def test_words_start_at_their_vectors_turned_and_scaled(tmp_path: Path) -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0)
    size = model.tokenizer.vocab_size
    vectors = torch.zeros(size, 20)
    known = torch.arange(300, 340)
    drawn = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    vectors[known] = torch.nn.functional.normalize(drawn, dim=1)
    save_word_vectors(vectors, tmp_path / "w.safetensors")
    read = load_word_vectors(tmp_path / "w.safetensors")
    torch.testing.assert_close(read, vectors, rtol=1e-3, atol=1e-3)
    before = model.decoder.embed_tokens.weight.detach().clone()
    assert start_from_words(model, read) == 40
    after = model.decoder.embed_tokens.weight.detach()
    assert torch.equal(after[340:], before[340:])
    torch.testing.assert_close(after[known] @ after[known].T, vectors[known] @ vectors[known].T, rtol=0, atol=3e-3)
    with pytest.raises(UsageError, match="make them from this very tokenizer"):
        start_from_words(model, read[:-1])
    # more axes than the decoder has: still of unit length
    assert start_from_words(model, torch.randn(size, 64)) == size
    assert model.decoder.embed_tokens.weight.norm(dim=1).allclose(torch.tensor(1.0), rtol=1e-4)


def test_scores_are_plain_json() -> None:
    model = build_vlm(CONFIG, TOKENIZER, seed=0).eval()
    assert json.loads(json.dumps(evaluate_vlm(model, PICTURES, scenes=3)))["questions"] > 3
