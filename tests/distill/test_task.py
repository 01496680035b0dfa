"""A task from labels to a bundle: who may learn which label, a run, its score, what ships, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_toys import TINY_STUDENT, ToyTeacher, colour, toy_recipe
from PIL import Image

from pocketvlm.data import open_data
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.distill.batches import Order
from pocketvlm.distill.evaluate import evaluate_path
from pocketvlm.distill.feed import Feed
from pocketvlm.distill.labels import task_labels
from pocketvlm.distill.loop import distill_run
from pocketvlm.distill.prepare import prepare
from pocketvlm.distill.progress import Reporter
from pocketvlm.distill.questions import ClassScores, Questions, embed_questions
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import UsageError
from pocketvlm.students import Classes, load_student

COLOURS = ("blue", "green", "red", "yellow")
SHADES = {"blue": (40, 60, 220), "green": (40, 190, 60), "red": (220, 40, 40), "yellow": (230, 220, 40)}


def make_classes(folder: Path, *, labelled: int, pictures: int = 6) -> str:
    """Pictures in shades of four colours, the first `labelled` of each with its label; a data spec."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(len(folder.name)), []
    for name in COLOURS:
        for index in range(pictures):
            pixels = np.clip(np.array(SHADES[name]) + rng.normal(0, 12, 3) + rng.normal(0, 5, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}{index}.png")
            row: dict[str, Any] = {"image": f"{name}{index}.png"}
            rows.append(row | ({"label": name, "caption": f"{name} thing"} if index < labelled else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{folder / 'rows.jsonl'}?check=none"


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("classes")
    return {"train": make_classes(folder / "train", labelled=4), "test": make_classes(folder / "held", labelled=6)}


def task_recipe(classes: dict[str, str], cache: Path, **changes: Any) -> dict[str, Any]:
    value = toy_recipe(Path("unused"), cache)
    value |= {"data": {"train": classes["train"], "eval": classes["test"]}, "views": {"count": 2}, "task": {}}
    value["student"] = {"name": "mnv4-035", "overrides": TINY_STUDENT}
    value["objectives"] = [{"name": "dho"}]
    value["train"] = {
        "steps": 40, "batch_size": 12, "captioned_fraction": 0.5, "lr": 0.01, "lr_scale": {"text_tower": 0},
        "warmup_steps": 2, "threads": 1, "ema_decay": 0.5, "log_every": 20, "hold_statistics": ["image_tower"],
    }  # fmt: skip
    return value | changes


# ------------------------------------------------------------------------------------------------ labels


def labelled(counts: dict[str, int]) -> list[Sample]:
    return [Sample(f"{name}/{i}", ImageRef(data=b""), label=name) for name, n in counts.items() for i in range(n)]


def test_held_out_labels_are_rounded_down_and_never_trained_on() -> None:
    samples = [*labelled({"a": 1, "b": 4, "c": 9}), Sample("free", ImageRef(data=b""))]
    found = task_labels(Classes(("a", "b", "c")), samples, 0.25)
    assert [sum(label == place for label in found.held) for place in range(3)] == [0, 1, 2]
    assert [sum(label == place for label in found.train) for place in range(3)] == [1, 3, 7]
    assert all(min(pair) == -1 for pair in zip(found.train, found.held)), "no label serves twice"
    assert (found.train[-1], found.held[-1]) == (-1, -1)
    turned = task_labels(Classes(("a", "b", "c")), samples[::-1], 0.25)
    assert turned.held[::-1] == found.held, "the order of the data decides nothing"
    assert not any(label >= 0 for label in task_labels(Classes(("a", "b", "c")), samples, 0.0).held)


def test_labelled_rows_are_drawn_by_label_not_by_caption() -> None:
    captions = (Caption("x"),)
    samples = [Sample(f"{i}", ImageRef(data=b""), captions=captions if i % 2 else ()) for i in range(12)]
    marked = [i < 3 for i in range(12)]
    order = Order(samples, batch_size=4, views=1, seed=0, captioned_fraction=0.5, marked=marked)
    for step in range(5):
        assert sum(row < 3 for row in order.plan(step).rows) == 2


def test_the_teacher_classifies_by_the_mean_of_its_prompts(
    classes: dict[str, str], toy_teacher: None, teacher_cache: Path
) -> None:
    changes = {"eval": {"templates": ["{}", "{} thing", "red {}"]}}
    prepared = prepare(load_recipe(task_recipe(classes, teacher_cache, **changes)), Reporter(False))
    order = Order(prepared.samples, batch_size=24, views=2, seed=0)
    feed = Feed(prepared, order, torch.device("cpu"))
    batch = feed.make(0)
    student, teacher = feed.forward(prepared.student, batch)["pairs"]
    assert teacher is not None
    assert teacher.class_logits is not None
    toy = ToyTeacher()
    for row, place in enumerate(order.plan(0).rows[:5]):
        picture = teacher.image[row] / teacher.image[row].norm()
        for column, name in enumerate(COLOURS):
            # "red NAME" begins with red, which is what the toy reads
            vectors = [(torch.from_numpy(colour(word)).float() - 0.5) @ toy.joint for word in (name, name, "red")]
            mean = torch.stack([vector / vector.norm() for vector in vectors]).mean(dim=0)
            wanted = toy.logit_scale * float(picture @ (mean / mean.norm()))
            assert float(teacher.class_logits[row, column]) == pytest.approx(wanted, abs=1e-4)
        label = prepared.samples[place].label
        task = prepared.task
        assert task is not None
        known = COLOURS.index(label) if label is not None and task.held[place] < 0 else -1
        assert int(student.label[row]) == known  # type: ignore[index]


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(classes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from distill_toys import use_toy_teacher

    with pytest.MonkeyPatch.context() as patch:
        use_toy_teacher(patch)
        out = tmp_path_factory.mktemp("run") / "task"
        recipe = load_recipe(task_recipe(classes, tmp_path_factory.mktemp("cache"), task={"mix": "logits"}))
        distill_run(recipe, out, progress=False)
    return out


def test_a_run_gives_a_scored_classifier(run: Path) -> None:
    values = json.loads((run / "eval.json").read_text())
    assert values["model"]["zero_shot"]["gallery"] == 4
    assert values["model"]["zero_shot"]["top-1"] > 0.6  # chance is 0.25; the pictures are plain colours
    assert set(values["teacher"]) == {"zero_shot"}
    assert "top-1" in values["difference"]["zero_shot"]
    student = load_student(run)
    assert student.contract.labels == COLOURS
    assert student.heads is not None
    assert student.heads.label_head.weight.abs().max() > 0
    assert student.heads.taught_head.weight.abs().max() > 0


def test_the_bundle_answers_as_the_student_without_torch(run: Path, classes: dict[str, str], tmp_path: Path) -> None:
    from pocketvlm.edge import EdgeModel
    from pocketvlm.edge.conformance import check_conformance
    from pocketvlm.export.bundle import export_bundle

    bundle = export_bundle(run, tmp_path / "bundle", targets=("onnx:fp32",))
    assert all(stage.passed for stage in check_conformance(bundle))
    model = EdgeModel.load(bundle)
    assert (model.contract.kind, model.contract.labels, model.tokenizer) == ("classifier", COLOURS, None)
    student = load_student(run)
    picture = Image.fromarray(np.full((32, 32, 3), SHADES["red"], np.uint8))
    found = model.classify(picture)[0]
    pixels = torch.from_numpy(np.asarray(picture)[None].copy())
    with torch.no_grad():
        wanted = student.heads.mixed(student.encode_image(pixels).features).softmax(dim=1)[0]  # type: ignore[union-attr]
    for name, probability in zip(COLOURS, wanted.tolist()):
        assert found.scores[name] == pytest.approx(probability, abs=1e-5)  # float32 through a small tower
    scores = [evaluate_path(where, classes["test"]).queries["model/zero_shot/rank"] for where in (run, bundle)]
    assert scores[0].tolist() == scores[1].tolist()
    with pytest.raises(UsageError, match="trained for its own labels"):
        model.classify(picture, ["red", "blue"])
    with pytest.raises(UsageError, match="no text tower"):
        model.embed_text("red")


def test_a_reference_of_a_classifier_is_refused(run: Path, tmp_path: Path) -> None:
    from pocketvlm.export.subject import open_subject

    with pytest.raises(UsageError, match="of kind 'classifier'; a reference needs both towers"):
        open_subject(run)


def test_scores_of_a_classifier_rank_as_its_logits() -> None:
    logits = np.array([[3.0, -1.0, -50.0], [-400.0, -399.0, -400.5]], np.float32)
    samples = [Sample(f"{i}", _one_pixel(), label=label) for i, label in enumerate(("a", "c"))]
    questions = Questions.of(samples, templates=("{}", "an {}"))
    embedded = embed_questions(ClassScores(lambda x: logits, ("a", "b", "c")), questions, name="toy")
    cosine = embedded.images @ embedded.texts.T
    place = {text: column for column, text in enumerate(questions.texts)}
    for row in range(2):
        assert np.argsort(-cosine[row, [place["a"], place["c"]]]).tolist() == np.argsort(-logits[row, [0, 2]]).tolist()
    assert cosine[:, place["a"]].tolist() == cosine[:, place["an a"]].tolist()
    with pytest.raises(UsageError, match="pictures of 'c' and the classifier knows a, b"):
        embed_questions(ClassScores(lambda x: logits[:, :2], ("a", "b")), questions, name="toy")


def _one_pixel() -> ImageRef:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="PNG")
    return ImageRef(data=buffer.getvalue())


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": None}, "learns classes and the recipe has none"),
        ({"objectives": [{"name": "feature"}]}, "no objective 'dho' to train its heads"),
        ({"objectives": [{"name": "dho", "batch": "texts"}]}, "classifies pictures, which a text-only batch has not"),
        ({"task": {"classes": ["blue"]}}, "at least two classes, each named once"),
        ({"task": {"classes": ["blue", "blue"]}}, "at least two classes, each named once"),
        ({"task": {"mix": "logits", "temperature": 2}}, "mixes at 1"),
        ({"teacher": None}, "learns from a teacher and the recipe has none"),
    ],
)
def test_mistakes_in_the_recipe(changes: dict[str, Any], words: str, classes: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        load_recipe(task_recipe(classes, tmp_path, **changes))


def test_mistakes_in_the_data(classes: dict[str, str], toy_teacher: None, tmp_path: Path) -> None:
    none = make_classes(tmp_path / "none", labelled=0, pictures=1)
    single = tmp_path / "single.jsonl"
    rows = [{"image": f"none/{name}0.png", "label": "thing"} for name in COLOURS]
    single.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for train, task, words in (
        (none, {}, "none of the 4 pictures of rows has one"),
        (f"{single}?check=none", {}, r"the classes \['thing'\] and a classifier needs at least two"),
        (classes["train"], {"classes": ["blue", "red"]}, "labelled 'green', which is not in task.classes"),
    ):
        recipe = load_recipe(task_recipe({**classes, "train": train}, tmp_path / "cache", task=task))
        with pytest.raises(UsageError, match=words):
            prepare(recipe, Reporter(False))


def test_labels_are_not_needed_where_none_are_learned(
    classes: dict[str, str], toy_teacher: None, tmp_path: Path
) -> None:
    changes = {"objectives": [{"name": "dho", "options": {"label_weight": 0}}], "task": {"classes": list(COLOURS)}}
    none = make_classes(tmp_path / "none", labelled=0, pictures=1)
    prepared = prepare(load_recipe(task_recipe({**classes, "train": none}, tmp_path, **changes)), Reporter(False))
    assert prepared.task is not None
    assert set(prepared.task.train) == {-1}


def test_a_saved_student_of_other_classes_is_refused(
    run: Path, classes: dict[str, str], toy_teacher: None, tmp_path: Path
) -> None:
    """Its heads would name pictures by the wrong class; the same classes are taken."""
    saved = {"student": {"name": "init", "init": str(run / "student")}, "tokenizer": {}}

    def recipe(*labels: str) -> Any:
        return load_recipe(task_recipe(classes, tmp_path, task={"classes": labels}, **saved))

    with pytest.raises(UsageError, match="its heads would name pictures wrongly"):
        prepare(recipe(*reversed(COLOURS)), Reporter(False))
    ready = prepare(recipe(*COLOURS), Reporter(False))
    # runs over the same inputs find the saved tokenizer again
    assert ready.with_recipe(recipe(*COLOURS)).student.tokenizer_json == ready.tokenizer_json


def test_embeddings_on_disk_must_hold_the_class_prompts(
    classes: dict[str, str], toy_teacher: None, tmp_path: Path
) -> None:
    """What a teacher without a text tower comes down to: nothing to classify by."""
    from pocketvlm.teachers.precomputed import import_embeddings

    source = open_data(classes["train"])
    uids, texts = [sample.uid for sample in source], source.captions()
    rng = np.random.default_rng(0)
    found = [rng.normal(size=(len(names), 8)).astype(np.float32) for names in (uids, texts)]
    import_embeddings(tmp_path / "disk", image=found[0], uids=uids, text=found[1], texts=texts)
    changes = {"teacher": {"spec": f"embeddings:{tmp_path / 'disk'}"}, "views": {"count": 1}}
    with pytest.raises(UsageError, match=r"training texts \(first 'blue'\) are not among the embeddings on disk"):
        prepare(load_recipe(task_recipe(classes, tmp_path, **changes)), Reporter(False))


# ------------------------------------------------------------------------------------------------ the committed result


def test_the_table_of_the_docs_is_the_committed_result() -> None:
    from benchmarks.task_student import summary, table

    root = Path(__file__).resolve().parents[2]
    result = json.loads((root / "benchmarks" / "results" / "task_student.json").read_text(encoding="utf-8"))
    assert summary(result["rows"]) == result["summary"]
    docs = (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert f"<!-- task:begin -->\n{table(result['summary'])}\n<!-- task:end -->" in docs
