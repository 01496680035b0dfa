"""Users' conversations as training batches: rows against the template, pictures from disk, nothing lost in silence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.data.conversations import read_conversations
from pocketvlm.data.report import BadSampleReport
from pocketvlm.data.sample import ImageRef, Sample, Turn
from pocketvlm.distill.vlm.batches import batches
from pocketvlm.distill.vlm.conversations import (
    ConversationStream,
    fitting,
    pixels_of,
    talk_of,
    talk_rows,
    vlm_image_spec,
)
from pocketvlm.distill.vlm.train import VlmTraining, train_vlm
from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.students.vlm import Vlm, build_vlm, train_vlm_tokenizer
from pocketvlm.students.vlm.config import VlmConfig
from pocketvlm.students.vlm.model import rows_of
from pocketvlm.students.vlm.tokenizer import ASSISTANT, EOS, USER
from pocketvlm.teachers.vlm import recorded_answers

SIDE = 48
TOKENIZER = train_vlm_tokenizer(["what colour is it? red green blue", "is it big? yes no"] * 4, 420)
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}


@pytest.fixture
def model() -> Vlm:
    decoder = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 64, "context_length": 64}
    vision = {"backbone": "test_efficientnet", "size": SIDE}
    values = {"name": "tiny", "vision": vision, "connector_hidden": 32, "decoder": decoder}
    return build_vlm(VlmConfig.model_validate(values), TOKENIZER, seed=0)


def _file(folder: Path, *rows: tuple[str, list[str]]) -> Path:
    lines = []
    for name, texts in rows:
        picture = np.full((30, 50, 3), COLOURS[name], np.uint8)
        Image.fromarray(picture).save(folder / f"{name}.png")
        texts = [f"<image>\n{texts[0]}", *texts[1:]]
        said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
        lines.append(json.dumps({"id": name, "image": f"{name}.png", "conversations": said}))
    path = folder / "talks.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def _colours(folder: Path, *more: str) -> list[Sample]:
    rows = [(name, ["What colour is it?", name, "Is it big?", "yes", *more]) for name in COLOURS]
    return read_conversations(_file(folder, *rows), BadSampleReport("refuse"))


def test_every_answer_of_a_conversation_is_learnt_after_all_before_it(model: Vlm) -> None:
    tokenizer = model.tokenizer
    turns = [Turn("user", "What?"), Turn("assistant", "Red"), Turn("user", "Big?"), Turn("assistant", "yes no")]
    talk = talk_of(turns, tokenizer)
    rows = talk_rows([talk, talk[:1]], 40)
    encode = tokenizer.encode
    whole = [
        USER,
        *encode("What?"),
        ASSISTANT,
        *encode("Red"),
        EOS,
        USER,
        *encode("Big?"),
        ASSISTANT,
        *encode("yes no"),
        EOS,
    ]
    assert rows.ids[0, : len(whole) - 1].tolist() == whole[:-1]
    assert rows.targets.tolist() == [*encode("Red"), EOS, *encode("yes no"), EOS, *encode("Red"), EOS]
    # what is predicted stands one place after where it is predicted from
    flat = rows.ids.flatten()
    for place, target in zip(rows.places.tolist(), rows.targets.tolist()):
        row, within = divmod(place, 40)
        end = len(whole) if row == 0 else len(talk[0][0]) + len(talk[0][1])
        assert (target == EOS and within + 1 == end - 1) or int(flat[place + 1]) == target
    assert rows.positions[0, : len(whole) - 1].tolist() == list(range(len(whole) - 1))
    assert set(rows.turns[0].tolist()) == {0, -1}
    # one turn is what the rows of scenes hold
    single = rows_of([talk[:1]], 40)
    for one, two in zip(talk_rows([talk[:1]], 40), single):
        assert torch.equal(one, two)


def test_a_later_answer_sees_the_earlier_turns(model: Vlm) -> None:
    model.eval()
    pixels = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)

    def last(first: str) -> torch.Tensor:
        turns = [Turn("user", "What?"), Turn("assistant", first), Turn("user", "Big?"), Turn("assistant", "no")]
        with torch.no_grad():
            return model(pixels, talk_rows([talk_of(turns, model.tokenizer)], 40))[-1]

    assert not torch.allclose(last("red"), last("green"), atol=1e-5)


def test_a_system_message_stands_before_the_first_question(model: Vlm) -> None:
    turns = [Turn("system", "Be short."), Turn("user", "What?"), Turn("assistant", "Red")]
    (question, _), *rest = talk_of(turns, model.tokenizer)
    assert not rest
    assert question == model.tokenizer.question("Be short.\nWhat?")


def test_pictures_and_rows_of_a_batch_belong_together(tmp_path: Path, model: Vlm) -> None:
    samples = _colours(tmp_path)
    stream = ConversationStream(samples, model, BadSampleReport("refuse"), batch=2, seed=1)
    assert len(stream) == 3
    shown = []
    for pixels, rows in itertools.islice(iter(stream), 6):
        assert pixels.shape == (2, SIDE, SIDE, 3)
        assert pixels.dtype == torch.uint8
        answers = rows.targets.tolist()
        for row in pixels:
            name = min(COLOURS, key=lambda n: np.abs(row[SIDE // 2, SIDE // 2].numpy().astype(int) - COLOURS[n]).sum())
            expected = model.tokenizer.answer(name)
            assert answers[: len(expected)] == expected
            answers = answers[len(expected) + len(model.tokenizer.answer("yes")) :]
            shown.append(name)
            spec = vlm_image_spec(SIDE)
            assert (row.numpy() == load_image((tmp_path / f"{name}.png").read_bytes(), spec)).all()
    assert all(sorted(shown[start : start + 3]) == sorted(COLOURS) for start in range(0, 12, 3))
    assert shown[:3] != shown[3:6] or shown[3:6] != shown[6:9]
    again = list(itertools.islice(batches(stream, 2, torch.device("cpu")), 3))
    alone = list(itertools.islice(batches(stream, 0, torch.device("cpu")), 3))
    for (one, rows), (two, others) in zip(again, alone):
        assert torch.equal(one, two)
        assert all(torch.equal(a, b) for a, b in zip(rows, others))


def test_the_loop_learns_from_them(tmp_path: Path, model: Vlm) -> None:
    stream = ConversationStream(_colours(tmp_path), model, BadSampleReport("refuse"), batch=3)
    training = VlmTraining(steps=60, rate=3e-3, vision_rate=1.0, word_rate=1.0, warmup=5, log_every=20)
    history = train_vlm(model, batches(stream, 0, torch.device("cpu")), pixels_of, training)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    pixels, _ = stream.make(0)
    assert set(model.generate(pixels, ["What colour is it?"] * 3)) <= {*COLOURS, "yes"}


def test_recorded_answers_are_such_conversations_too(tmp_path: Path, model: Vlm) -> None:
    lines = [{"id": f"{name}.png", "question": "What colour?", "answer": name} for name in COLOURS]
    (tmp_path / "said.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    _colours(tmp_path)
    pictures = [Sample(f"set/{name}.png", ImageRef(path=tmp_path / f"{name}.png")) for name in COLOURS]
    samples = recorded_answers(tmp_path / "said.jsonl", pictures, BadSampleReport("refuse"))
    _, rows = ConversationStream(samples, model, BadSampleReport("refuse"), batch=3).make(0)
    assert sorted(rows.targets.tolist()) == sorted(token for name in COLOURS for token in model.tokenizer.answer(name))


def test_what_does_not_fit_into_a_row_is_counted(tmp_path: Path, model: Vlm) -> None:
    samples = _colours(tmp_path, "And " * 40 + "?", "no")
    report = BadSampleReport()
    stream = ConversationStream(samples, model, report, batch=1)
    assert report.counts == {"turns-cut": 3}
    assert all(len(talk) == 2 for talk in stream.talks)
    report = BadSampleReport()
    long = _colours(tmp_path)[:2]
    shorter = [
        long[0],
        Sample(long[1].uid, long[1].image, conversation=(Turn("user", "z" * 90), Turn("assistant", "y"))),
    ]
    assert len(ConversationStream(shorter, model, report, batch=1)) == 1
    assert report.counts == {"too-long-text": 1}
    with pytest.raises(BadSampleError, match="but a row holds"):
        ConversationStream(shorter, model, BadSampleReport("refuse"), batch=1)
    with pytest.raises(UsageError, match="1 x too-long-text"):
        ConversationStream(shorter[1:], model, BadSampleReport(), batch=1)
    with pytest.raises(UsageError, match="no longer rows"):
        ConversationStream(long, model, BadSampleReport(), batch=1, length=1000)
    with pytest.raises(UsageError, match="its end would be lost"):
        talk_rows([stream.talks[0]], 4)
    assert fitting(stream.talks[0], 4) == []


def test_conversations_that_are_none_are_refused(model: Vlm) -> None:
    for turns in (
        [],
        [Turn("user", "a")],
        [Turn("assistant", "a"), Turn("user", "b")],
        [Turn("user", "a"), Turn("assistant", "b"), Turn("assistant", "c"), Turn("user", "d")],
    ):
        with pytest.raises(UsageError, match="questions and answers by turns"):
            talk_of(turns, model.tokenizer)
    for text in (" ", "see <image>"):
        with pytest.raises(UsageError, match="take the marker out"):
            talk_of([Turn("user", "a"), Turn("assistant", text)], model.tokenizer)


def test_a_picture_that_is_gone_is_named(tmp_path: Path, model: Vlm) -> None:
    stream = ConversationStream(_colours(tmp_path), model, BadSampleReport("refuse"), batch=3)
    (tmp_path / "green.png").unlink()
    with pytest.raises(BadSampleError, match=r"green"):
        stream.make(0)
