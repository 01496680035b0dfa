"""`pocketvlm vlm distill --data` on a handful of coloured pictures: what is learnt, counted and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from pocketvlm.cli import main
from pocketvlm.distill.checkpoint import latest_checkpoint
from pocketvlm.distill.vlm.own_data import distill_own
from pocketvlm.distill.vlm.recipe import load_vlm_recipe
from pocketvlm.edge.errors import IntegrityError
from pocketvlm.students.vlm import load_vlm

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
_SMALL = ("stages.0.steps=2", "stages.0.batch=3")


def _talk(name: str, *turns: str, picture: str = "") -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(turns)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return {"id": name, "image": picture or f"{name}.png", "conversations": said}


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversation about each colour, and five rows that are none. Read only."""
    folder = tmp_path_factory.mktemp("data") / "mine"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (50, 30), colour).save(folder / f"{name}.png")
    whole = (folder / "red.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[:40] + bytes(20) + whole[60:])
    rows = [_talk(name, "What colour is it?", name, "Is it big?", "yes") for name in COLOURS]
    bad = [
        _talk("gone", "What?", "it"),
        _talk("red", "What?", " "),
        _talk("broken", "What?", "it"),
        {"id": "none", "image": "red.png"},
    ]
    lines = [json.dumps(row).encode() for row in (*rows, *bad)]
    (folder / "talks.jsonl").write_bytes(b"\n".join([*lines, "Löwe".encode("latin-1")]))
    return folder / "talks.jsonl"


@pytest.fixture(scope="module")
def size(tmp_path_factory: pytest.TempPathFactory, vlm_toys: Any) -> Path:
    """The file of a student of a few thousand weights."""
    config = vlm_toys.tiny().config.model_dump(mode="json")
    config["decoder"]["vocab_size"] = 420
    path = tmp_path_factory.mktemp("size") / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def trained(talks: Path, size: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt the conversations. Read only."""
    run = tmp_path_factory.mktemp("trained") / "run"
    changes = ["stages.0.steps=60", "stages.0.batch=3", "stages.0.rate=3e-3", "stages.0.word_rate=1"]
    changes += ["stages.0.train=[connector,decoder,vision]", "stages.0.vision_rate=1", "stages.0.warmup=5"]
    options = ["--data", str(talks), "--student", str(size), "--workers", "0", "--device", "cpu", "--out", str(run)]
    main(["vlm", "distill", *changes, "optim.log_every=20", *options])
    return run


def _facts(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_conversations_are_learnt_and_the_student_is_shipped(
    talks: Path, size: Path, trained: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    found = _facts(trained)
    assert found["conversations"] == 3
    assert found["left_out"]["counts"] == {
        "missing-file": 1, "empty-answer": 1, "truncated-image": 1, "no-conversation": 1, "not-utf8-text": 1
    }  # fmt: skip
    assert found["teacher"] is None
    history = json.loads((trained / "history.json").read_text())
    assert [row["step"] for row in history] == [20, 40, 60]
    assert history[-1]["loss"] < 0.2
    again: list[Any] = ["--data", talks, "--student", size, "--out", trained]
    assert "is not empty" in cli("vlm", "distill", *again).sentence()
    bundle = tmp_path / "bundle"
    command = ("vlm", "export", trained / "student", "--out", bundle, "--targets", "onnx", "--precisions", "fp32")
    assert cli(*command).code == 0
    for name in COLOURS:
        said = cli("vlm", "ask", bundle, talks.parent / f"{name}.png", "What colour is it?", "--json")
        assert json.loads(said.out)["text"] == name


def test_a_bad_row_can_be_refused(talks: Path, size: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    options: list[Any] = [*_SMALL, "--data", talks, "--student", size, "--out", tmp_path / "run"]
    found = cli("vlm", "distill", *options, "--on-bad-sample", "refuse").sentence()
    assert "pass --on-bad-sample skip" in found
    assert not (tmp_path / "run").exists()


def test_recorded_answers_are_joined_with_the_pictures_of_their_ids(
    talks: Path, size: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    good = [{"id": f"{name}.png", "question": "What colour?", "answer": name} for name in COLOURS]
    bad = [good[0] | {"id": "nobody.png"}, good[1] | {"answer": "  "}, good[2], {"id": "red.png"}]
    bad.append(good[0] | {"question": "What \ud83d?"})
    path = tmp_path / "said.jsonl"
    lines = [json.dumps(row).encode() for row in (*good, *bad)] + [b"not json", "Löwe".encode("latin-1")]
    path.write_bytes(b"\n".join(lines))
    run = tmp_path / "run"
    options: list[Any] = [*_SMALL, "--data", f"images:{talks.parent}", "--student", size, "--workers", 0, "--out", run]
    done = cli("vlm", "distill", *options, "--teacher", f"recorded:{path}")
    assert done.code == 0, done.err
    found = _facts(run)
    assert found["conversations"] == 3
    assert found["left_out"]["counts"] == {
        "truncated-image": 1, "unknown-id": 1, "empty-answer": 1, "duplicate-id": 1, "missing-field": 1,
        "not-unicode": 1, "invalid-json": 1, "not-utf8-text": 1,
    }  # fmt: skip
    for reason in found["left_out"]["counts"]:
        assert reason in done.out
    assert ["answers that another model gave", "see the terms of that model", ""] in [
        list(row) for row in load_vlm(run / "student").config.licences
    ]
    path.write_text(json.dumps(good[0] | {"id": "nobody.png"}))
    again = [*options, "--teacher", f"recorded:{path}", "--overwrite"]
    assert "1 x unknown-id" in cli("vlm", "distill", *again).sentence()
    (talks.parent.parent / "red.jsonl").write_text(json.dumps({"image": "mine/red.png"}))
    again[again.index("--data") + 1] = talks.parent.parent / "red.jsonl"
    assert "belongs to none of 1 pictures" in cli("vlm", "distill", *again, "--on-bad-sample", "refuse").sentence()
    assert "names no file" in cli("vlm", "distill", *options, "--teacher", "recorded:nothing.jsonl").sentence()


def test_a_hugging_face_model_is_asked_once_and_its_probabilities_are_compared(
    talks: Path, size: Path, hf_vlm: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    run, pictures = tmp_path / "run", f"images:{talks.parent}"
    options: list[Any] = [*_SMALL, "--data", pictures, "--student", size, "--workers", 0, "--device", "cpu"]
    asked: list[Any] = ["--teacher", f"hf-vlm:{hf_vlm}", "--ask", "What is it?", "Is it <unk>?"]
    done = cli("vlm", "distill", *options, *asked, "--aligned", "0.5", "--out", run)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["What is it?", "Is it <unk>?"] * 3
    assert {row["id"] for row in rows} == {f"mine/{name}.png" for name in COLOURS}
    found = _facts(run)
    said = sum(bool(row["answer"].strip()) for row in rows)
    assert found["conversations"] == said
    assert found["left_out"]["counts"].get("empty-answer", 0) == len(rows) - said
    assert found["aligned"] == 0.5
    assert found["teacher"] == "llava"
    assert any("teacher weights" in row[0] for row in load_vlm(run / "student").config.licences)
    # and never again
    again = cli("vlm", "distill", *options, "--teacher", f"recorded:{run / 'answers.jsonl'}", "--out", tmp_path / "two")
    assert again.code == 0, again.err
    assert _facts(tmp_path / "two")["conversations"] == said
    inside = ["--teacher", f"recorded:{run / 'answers.jsonl'}", "--out", run, "--overwrite"]
    assert "is in it and is read" in cli("vlm", "distill", *options, *inside).sentence()


def test_a_teacher_answers_the_questions_of_conversations(
    talks: Path, size: Path, trained: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    system = _talk("blue", "What colour is it?", "pink")
    system["conversations"].insert(0, {"from": "system", "value": "Is it big?"})
    rows = [_talk(name, "What colour is it?", "pink", "Is it big?", "pink") for name in COLOURS]
    rows += [_talk("red", "What colour is it? " * 60, "pink"), system]
    asked = talks.parent / "asked.jsonl"
    asked.write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    options: list[Any] = [*_SMALL, "--data", asked, "--student", size, "--workers", 0]
    done = cli("vlm", "distill", *options, "--teacher", f"vlm:{trained / 'student'}", "--aligned", 1, "--out", run)
    assert done.code == 0, done.err
    said = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [row["question"] for row in said[:6]] == ["What colour is it?", "Is it big?"] * 3
    assert [row["answer"] for row in said[:6:2]] == list(COLOURS)
    assert said[6]["question"] == "Is it big?\nWhat colour is it?"
    assert _facts(run)["left_out"]["counts"] == {"not-answered": 1, "no-recorded-answer": 1}
    assert "no-recorded-answer" in done.out
    assert "7 conversations were learnt from" in done.out
    theirs = (trained / "student" / "tokenizer.json").read_bytes()
    assert load_vlm(run / "student").tokenizer.json == theirs
    # the answers of the file, and how probable the teacher finds them
    own = [*options, "--teacher", f"vlm:{trained / 'student'}", "--own-answers", "--out", tmp_path / "own"]
    assert "the teacher would teach nothing" in cli("vlm", "distill", *own).sentence()
    done = cli("vlm", "distill", *own, "--aligned", 1)
    assert done.code == 0, done.err
    assert _facts(tmp_path / "own")["left_out"]["counts"] == {"not-read": 1}
    assert _facts(tmp_path / "own")["conversations"] == 7
    assert not (tmp_path / "own" / "answers.jsonl").exists()
    # a student of one's own goes on, with its own tokens
    more: list[Any] = [*_SMALL, "--data", talks, "--student", run / "student", "--workers", 0]
    assert cli("vlm", "distill", *more, "--out", tmp_path / "more").code == 0
    file = trained / "student" / "tokenizer.json"
    assert "which has its own" in cli("vlm", "distill", *more, "--out", tmp_path / "b", "--tokenizer", file).sentence()
    assert cli("vlm", "distill", *options, "--tokenizer", file, "--out", tmp_path / "c").code == 0
    assert load_vlm(tmp_path / "c" / "student").tokenizer.json == theirs


def test_what_does_not_go_together_is_answered_in_a_sentence(
    talks: Path, size: Path, hf_vlm: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    options: list[Any] = ["vlm", "distill", *_SMALL, "--data", talks, "--student", size, "--out", tmp_path / "run"]
    assert "--recipe answers" in cli(*options, "--recipe", "few-label").sentence()
    assert "about the built-in pictures" in cli(*options, "--teacher", "openmoji-talking").sentence()
    assert "without a teacher" in cli(*options, "--ask", "What?").sentence()
    assert "without a teacher" in cli(*options, "--aligned", "1").sentence()
    assert "without a teacher" in cli(*options, "--own-answers").sentence()
    hf = ["--teacher", f"hf-vlm:{hf_vlm}"]
    assert "would unlearn them" in cli(*options, *hf, "--aligned=-1").sentence()
    assert "no UTF-8" in cli(*options, *hf, "--ask", "What \udcff?").sentence()
    assert "is empty or holds <image>" in cli(*options, *hf, "--ask", "<image> what?").sentence()
    assert f"write 'hf-vlm:{hf_vlm}'" in cli(*options, "--teacher", hf_vlm).sentence()
    part = cli(*options[:2], "stages.0.train=[connector]", *options[4:])
    assert "connector and decoder always move" in part.sentence()
    assert "is no file" in cli(*options, "--tokenizer", tmp_path / "nothing.json").sentence()
    assert "does not exist" in cli(*options[:5], tmp_path / "x.jsonl", *options[6:]).sentence()
    assert "which only hf-vlm takes" in cli(*options, "--teacher", "openmoji-talking", "--allow-download").sentence()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "taught"])
def test_a_killed_run_goes_on_to_the_same_weights(
    taught: bool, talks: Path, size: Path, trained: Path, tmp_path: Path
) -> None:
    changes = ("stages.0.steps=7", "stages.0.batch=2", "optim.every=2", "optim.log_every=3")
    teacher = f"vlm:{trained / 'student'}" if taught else None
    options: dict[str, Any] = {"aligned": 1.0 if taught else 0.0, "device": "cpu"}

    def run(out: Path, say: Callable[[str], None], **more: Any) -> list[bytes]:
        recipe = load_vlm_recipe("answers", changes)
        distill_own(str(talks), teacher, str(size), recipe, out, say=say, **(options | more))
        return [path.read_bytes() for path in sorted((out / "student").glob("*.safetensors"))]

    whole = run(tmp_path / "whole", lambda line: None)

    def killed(line: str) -> None:
        if '"step": 6' in line:
            raise KeyboardInterrupt

    part = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        run(part, killed)
    assert latest_checkpoint(part / "checkpoints" / "0-answers") is not None
    with pytest.raises(IntegrityError, match="another max_new_tokens"):
        run(part, lambda line: None, resume=True, max_new_tokens=5)
    if taught:
        # what the teacher wrote is read, not written again
        (part / "answers.jsonl").touch()
        before = (part / "answers.jsonl").stat().st_mtime_ns
    assert whole
    assert run(part, lambda line: None, resume=True) == whole
    if taught:
        assert (part / "answers.jsonl").stat().st_mtime_ns == before
    for name in ("history.json", "run.json"):
        one, two = (json.loads((tmp_path / which / name).read_text()) for which in ("whole", "part"))
        for row in (*one, *two) if name == "history.json" else ():
            del row["seconds"], row["scenes_per_second"]
        assert one == two
