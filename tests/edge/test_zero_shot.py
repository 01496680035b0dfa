"""`ZeroShotClassifier`: the same verdicts as `EdgeModel.classify`, calibrated, taught by examples, able to abstain."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest

from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.edge.model import EdgeModel
from pocketvlm.edge.zero_shot import _SCORES, ZeroShotClassifier

LABELS = ["red", "green", "blue"]


class Toy:
    """Pictures are their embeddings; labels point along axes. scale: how sure the model is of itself."""

    def __init__(self, scale: float = 40.0, dim: int = 6, space: str = "toy") -> None:
        self.contract: Any = SimpleNamespace(kind="dual", name="toy", space_id=space, logit_scale=scale, logit_bias=0.0)
        self.dim = dim

    def embed_image(self, images: Any, *, batch_size: int = 32) -> np.ndarray:
        return np.asarray(list(images), np.float32).reshape(-1, self.dim)

    def embed_labels(self, labels: Any, templates: Any = ("{}",)) -> np.ndarray:
        return np.eye(self.dim, dtype=np.float32)[: len(labels)]


def examples(count: int, noise: float, seed: int = 0, shift: float = 0.0) -> tuple[np.ndarray, list[str]]:
    """Rows near their label's axis; `shift` turns all of them towards an axis that belongs to no label."""
    generator = np.random.default_rng(seed)
    targets = np.arange(count) % len(LABELS)
    rows = np.eye(6)[targets] + noise * generator.normal(size=(count, 6))
    rows[:, 5] += shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), [LABELS[t] for t in targets]


def test_it_says_what_the_model_says(bundle_folder: Path) -> None:
    model = EdgeModel.load(bundle_folder)
    picture = np.full((8, 8, 3), (200, 30, 40), np.uint8)
    theirs = model.classify([picture], LABELS, "a picture of {}")[0]
    ours = ZeroShotClassifier(model, LABELS, "a picture of {}").classify([picture])[0]
    assert ours.label == theirs.label == "red"
    assert ours.scores == pytest.approx(theirs.scores, abs=1e-6)


def test_a_temperature_makes_shares_honest_and_changes_no_verdict() -> None:
    rows, labels = examples(600, 0.8)
    classifier = ZeroShotClassifier(Toy(scale=40.0), LABELS)
    before = [verdict.label for verdict in classifier.classify(rows)]
    found = classifier.calibrate(rows[:300], labels[:300])
    assert [verdict.label for verdict in classifier.classify(rows)] == before
    assert found.temperature > 2
    assert found.examples == 300
    assert found.nll[1] < found.nll[0]
    assert found.error[1] < found.error[0] / 2
    # brute force: no temperature on a grid does better
    logits = 40.0 * rows[:300] @ np.eye(6)[:3].T
    targets = np.array([LABELS.index(label) for label in labels[:300]])
    for temperature in np.geomspace(0.1, 100, 400):
        scaled = logits / temperature
        log_shares = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
        assert -log_shares[np.arange(300), targets].mean() > found.nll[1] - 1e-6
    # on pictures that it was not fitted on, a probability is about how often it is right
    verdicts = classifier.classify(rows[300:])
    assert np.mean([v.probability for v in verdicts]) == pytest.approx(
        np.mean([v.label == label for v, label in zip(verdicts, labels[300:])]), abs=0.06
    )


def test_below_the_threshold_nothing_is_named() -> None:
    even = np.ones((1, 6)) / np.sqrt(6)
    sure = np.eye(6)[:1]
    classifier = ZeroShotClassifier(Toy(), LABELS, threshold=0.5)
    unsure, named = classifier.classify(np.concatenate([even, sure]))
    assert (unsure.label, named.label) == ("", "red")
    assert unsure.probability == pytest.approx(1 / 3)
    assert list(named.scores) == LABELS


@pytest.mark.parametrize("method", ["means", "cache"])
def test_examples_teach_what_texts_do_not_say(method: Any) -> None:
    """The labels' texts point the wrong way round; eight examples of each put it right."""

    class Turned(Toy):
        def embed_labels(self, labels: Any, templates: Any = ("{}",)) -> np.ndarray:
            axes = np.eye(self.dim, dtype=np.float32)[: len(labels)]
            return 0.1 * axes[::-1] + np.eye(self.dim, dtype=np.float32)[5]

    rows, labels = examples(24, 0.2)
    test, truth = examples(300, 0.2, seed=1)
    classifier = ZeroShotClassifier(Turned(scale=10.0), LABELS)

    def accuracy() -> float:
        return float(np.mean([v.label == label for v, label in zip(classifier.classify(test), truth)]))

    assert accuracy() < 0.5
    found = classifier.learn(rows, labels, method)
    assert found.weight > 0
    assert found.examples == dict.fromkeys(LABELS, 8)
    assert found.accuracy[1] > 0.9 > found.accuracy[0]
    assert accuracy() > 0.9
    again = ZeroShotClassifier(Turned(scale=10.0), LABELS)
    assert again.learn(rows, labels, method) == found


def test_means_are_gaussian_classes_of_one_covariance() -> None:
    """Against the definition, written out: differences of log-densities with the shrunken covariance."""
    rows, labels = examples(30, 0.5)
    targets = np.array([LABELS.index(label) for label in labels])
    means = [rows[targets == k].mean(0) for k in range(3)]
    scatter = sum(np.outer(r - means[t], r - means[t]) for r, t in zip(rows, targets))
    spread = (scatter + np.trace(scatter) / (len(rows) - 1) * np.eye(6)) / 6
    asked = examples(5, 0.5, seed=3)[0]
    score = _SCORES["means"](rows, targets, 3, asked, 0.0)
    for row, got in zip(asked, score):
        density = [-0.5 * (row - m) @ np.linalg.solve(spread, row - m) for m in means]
        assert np.diff(got) == pytest.approx(np.diff(density), rel=1e-6, abs=1e-9)


def test_examples_that_do_not_help_change_nothing() -> None:
    rows, labels = examples(60, 0.05)
    classifier = ZeroShotClassifier(Toy(), LABELS)
    found = classifier.learn(rows, labels)
    assert found.weight == 0
    assert found.accuracy == (1.0, 1.0)
    assert classifier._head is None


def changed(path: Path, out: Path, change: dict[str, Any] | str) -> Path:
    """The file with other facts in it."""
    with ZipFile(path) as file, ZipFile(out, "w") as other:
        for name in file.namelist():
            data = file.read(name)
            if name == "classifier.json":
                data = (change if isinstance(change, str) else json.dumps(json.loads(data) | change)).encode()
            other.writestr(name, data)
    return out


def test_it_is_kept_and_read_back_for_its_own_space_only(tmp_path: Path) -> None:
    rows, labels = examples(60, 0.6, shift=1.0)
    classifier = ZeroShotClassifier(Toy(), LABELS, threshold=0.4)
    classifier.learn(rows, labels, "cache")
    classifier.calibrate(*examples(60, 0.6, seed=2, shift=1.0))
    path = classifier.save(tmp_path / "mine.classifier")
    back = ZeroShotClassifier.load(Toy(), path)
    asked = examples(20, 0.6, seed=5)[0]
    assert back.probabilities(asked) == pytest.approx(classifier.probabilities(asked), abs=1e-5)
    assert (back.threshold, back.temperature) == (classifier.threshold, classifier.temperature)
    with pytest.raises(UsageError, match="its examples mean nothing there"):
        ZeroShotClassifier.load(Toy(space="other"), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    with pytest.raises(IntegrityError, match="cut short or changed"):
        ZeroShotClassifier.load(Toy(), path)
    path.write_bytes(whole)
    for change, told in (
        ({"labels": None}, "lacks or garbles a field"),
        ({"head": {"method": "none", "weight": 1, "sharpness": 1}}, "lacks or garbles a field"),
        ({"head": None}, "lacks or garbles a field"),
        ({"temperature": "warm"}, "lacks or garbles a field"),
        ({"labels": LABELS[:2]}, "a target that is no label"),
        ("[]", "cut short or changed"),
    ):
        with pytest.raises(IntegrityError, match=told):
            ZeroShotClassifier.load(Toy(), changed(path, tmp_path / "changed.classifier", change))
    with ZipFile(tmp_path / "bomb.classifier", "w", ZIP_DEFLATED) as bomb, bomb.open("rows.npy", "w") as sink:
        for _ in range(1025):
            sink.write(bytes(1 << 20))
    with pytest.raises(IntegrityError, match="would unpack to"):
        ZeroShotClassifier.load(Toy(), tmp_path / "bomb.classifier")
    with pytest.raises(UsageError, match="is no file"):
        ZeroShotClassifier.load(Toy(), tmp_path / "nowhere")


def test_what_cannot_work_is_refused() -> None:
    rows, labels = examples(12, 0.2)
    classifier = ZeroShotClassifier(Toy(), LABELS)
    with pytest.raises(UsageError, match="no probability"):
        ZeroShotClassifier(Toy(), LABELS, threshold=1.5)
    with pytest.raises(UsageError, match="at least two are expected"):
        ZeroShotClassifier(Toy(), ["red"])
    with pytest.raises(UsageError, match="12 pictures were given with 11 labels"):
        classifier.calibrate(rows, labels[:-1])
    with pytest.raises(UsageError, match="at least 10 are needed"):
        classifier.calibrate(rows[:9], labels[:9])
    with pytest.raises(UnknownNameError, match="did you mean 'green'"):
        classifier.calibrate(rows, [*labels[:-1], "grene"])
    with pytest.raises(UsageError, match="no example was given of"):
        classifier.learn(rows[:2], labels[:2], "means")
    with pytest.raises(UnknownNameError, match="few-shot method"):
        classifier.learn(rows, labels, "gradients")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="of another model"):
        classifier.probabilities(np.zeros((2, 5)))
    closed = Toy()
    closed.contract.kind = "classifier"
    with pytest.raises(UsageError, match="labels of its own"):
        ZeroShotClassifier(closed, LABELS)
