"""The further metrics: asked for by name, scored for both sides, with intervals, or said to be absent."""

from __future__ import annotations

from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_toys import colour, make_world, toy_recipe
from PIL import Image
from rich.console import Console

from pocketvlm.data.sample import Caption, HardNegative, ImageRef, Sample
from pocketvlm.distill import metrics
from pocketvlm.distill.evaluate import METRICS, Embedded, Evaluation, Questions, evaluate_model, rows_of, score
from pocketvlm.distill.recipe import load_recipe
from pocketvlm.edge.errors import UnknownNameError, UsageError

COUNT = 60
WIDTH = 24


def blank() -> ImageRef:
    buffer = BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def sample(i: int, **more: Any) -> Sample:
    captions = (Caption(f"thing {i}"), Caption(f"ding {i}", "de"), Caption(f"chose {i}", "fr"))
    tags = {"style": ("ink", "oil", "rare")[0 if i < 25 else 1 if i < 55 else 2]}
    return Sample(f"u{i}", blank(), captions, label=f"thing {i}", group=f"g{i // 2}", tags=tags, **more)


def world(noise: float = 1.5, seed: int = 0, **more: Any) -> tuple[Questions, Embedded, Embedded]:
    """Pictures and texts in three languages, ever noisier; a teacher, and a model that sees twice as much noise."""
    questions = Questions.of([sample(i, **more) for i in range(COUNT)], name="toy", templates=("{}",))
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(COUNT, WIDTH))
    sides = []
    for times in (1.0, 2.0):
        extra = {"thing": 0.3, "ding": 0.5, "chose": 0.9}
        texts = np.stack(
            [
                truth[int(text.split()[1])] + extra[text.split()[0]] * times * noise * rng.normal(size=WIDTH)
                for text in questions.texts
            ]
        )
        images = truth + 0.3 * times * noise * rng.normal(size=truth.shape)
        uids = [s.uid for s in questions.samples]
        sides.append(Embedded(f"times {times}", "toy", uids, images, texts, logit_scale=20.0))
    return questions, sides[1], sides[0]


def test_only_what_is_asked_for_is_scored() -> None:
    questions, model, teacher = world()
    plain = score(questions, model, teacher).values
    assert plain["model"].keys() == {"image_to_text", "text_to_image", "zero_shot"}
    assert "divergence" not in plain
    for name in METRICS:
        found = score(questions, model, teacher, metrics_wanted=(*("retrieval",), name)).values
        new = (found["model"].keys() | found.keys()) - (plain["model"].keys() | plain.keys())
        assert new == ({name} - {"retrieval", "zeroshot", "neighbours", "mixed", "hard_negatives"}), name
    assert score(questions, model, teacher, metrics_wanted=("hubness",)).values["model"].keys() == {"hubness"}
    with pytest.raises(UnknownNameError, match=r"unknown metric 'hubnes'; did you mean 'hubness' or"):
        score(questions, model, metrics_wanted=("hubnes",))
    with pytest.raises(UsageError, match=r"nothing of robustness, divergence can be scored on toy \(diverg"):
        score(questions, model, metrics_wanted=("robustness", "divergence"))


def test_a_recipe_names_metrics_and_a_misspelt_one_is_suggested(tmp_path: Path) -> None:
    value = toy_recipe(make_world(tmp_path / "world"), tmp_path / "cache")
    assert load_recipe(value, ["eval.metrics=[retrieval, hubness]"]).eval.metrics == ("retrieval", "hubness")
    with pytest.raises(UsageError, match=r"eval\.metrics: unknown metric 'calibraton'; did you mean 'calibration'\?"):
        load_recipe(value, ["eval.metrics=[retrieval, calibraton]"])


def test_values_are_those_of_the_definitions() -> None:
    questions, model, teacher = world()
    found = score(questions, model, teacher, metrics_wanted=("all",))
    own = found.values["model"]
    x = model.images / np.linalg.norm(model.images, axis=1, keepdims=True)
    place = {text: row for row, text in enumerate(questions.texts)}
    t = model.texts[[place[f"thing {i}"] for i in range(COUNT)]]
    t = t / np.linalg.norm(t, axis=1, keepdims=True)
    scores = x @ t.T
    counts = np.zeros(COUNT)
    for row in scores:
        counts[np.argsort(-row)[:10]] += 1
    assert own["hubness"]["image_to_text_skewness"] == pytest.approx(
        ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3
    )
    assert own["hubness"]["image_to_text_unreached"] == pytest.approx((counts == 0).mean())
    assert own["modality_gap"]["distance"] == pytest.approx(np.linalg.norm(x.mean(0) - t.mean(0)))
    assert own["modality_gap"]["pair_cosine"] == pytest.approx(np.diag(scores).mean())
    sure = np.exp(20 * scores).max(1) / np.exp(20 * scores).sum(1)
    assert found.queries["model/image_to_text/confidence"] == pytest.approx(sure)
    ranks = np.stack([1 + (scores > np.diag(scores)[:, None]).sum(1)])[0]
    assert found.queries["model/image_to_text/rank"].tolist() == ranks.tolist()
    assert own["calibration"]["zero_shot_ECE"] == pytest.approx(own["calibration"]["image_to_text_ECE"])
    languages = own["languages"]
    assert languages["by_language"].keys() == {"en", "de", "fr"}
    assert languages["worst"] == "fr"
    assert languages["worst_R@5"] == languages["by_language"]["fr"] == found.values["by_language"]["fr"]["model"][
        "image_to_text"
    ]["R@5"]  # fmt: skip
    assert languages["by_language"]["en"] == own["image_to_text"]["R@5"]
    by_hand = found.queries["model/languages/rank"].astype(float)
    assert languages["mean_rank_variance"] == pytest.approx(
        np.mean([sum((r - row.mean()) ** 2 for r in row) / 3 for row in by_hand])
    )
    assert by_hand[:, 0].tolist() == ranks.tolist()
    robust = own["robustness"]
    shares = [np.mean(ranks[:25] <= 5), np.mean(ranks[25:55] <= 5)]  # "rare" has too few pictures to count
    assert robust["style_worst_R@5"] == pytest.approx(min(shares))
    assert robust["style_mean_R@5"] == pytest.approx(np.mean(shares))
    assert robust["style_worst"] == ("ink", "oil")[int(np.argmin(shares))]
    assert found.values["divergence"]["direction"] == "KL(teacher || model)"
    assert found.queries["divergence/images"].shape == (COUNT,)
    assert found.values["not_scored"].keys() == {"hard_negatives"}


def test_differences_are_paired_and_resample_whole_concepts() -> None:
    questions, model, teacher = world(noise=2.5)
    found = score(questions, model, teacher, metrics_wanted=("all",))
    gaps = found.values["difference"]
    a, b = (found.queries[f"{side}/image_to_text/rank"] <= 5 for side in ("model", "teacher"))
    expected = metrics.paired_bootstrap(a, b, clusters=[i // 2 for i in range(COUNT)], resamples=2000)
    got = gaps["image_to_text"]["R@5"]
    assert got["clusters"] == COUNT // 2
    # the ids are numbered in another order, so the same resamples draw other concepts
    assert got["difference"] == pytest.approx(expected.difference) == pytest.approx(a.mean() - b.mean())
    assert got["low"] == pytest.approx(expected.low, abs=0.03)
    assert got["high"] == pytest.approx(expected.high, abs=0.03)
    assert got["low"] < got["difference"] < got["high"]
    for part, metric in (
        *(("text_to_image", "MAP"), ("zero_shot", "top-1"), ("languages", "mean_R@5")),
        *(("hubness", "image_to_text_skewness"), ("modality_gap", "distance")),
        *(("calibration", "zero_shot_ECE"), ("languages", "mean_rank_variance")),
    ):  # fmt: skip
        sides = found.values["model"][part][metric], found.values["teacher"][part][metric]
        assert gaps[part][metric]["difference"] == pytest.approx(sides[0] - sides[1]), (part, metric)
        assert gaps[part][metric]["low"] <= gaps[part][metric]["high"]
    assert found.values["by_tag"]["style"]["ink"]["difference"]["R@5"]["queries"] == 25
    assert found.values["by_language"]["de"]["difference"]["R@5"]["queries"] == COUNT
    same = score(questions, teacher, teacher, metrics_wanted=("all",)).values["difference"]
    assert all(gap["low"] == gap["high"] == 0 for part in same.values() for gap in part.values())


def test_given_hard_negatives_are_scored_by_kind_and_ties_are_wrong() -> None:
    samples = []
    for i in range(50):
        told = [HardNegative(f"thing {i}", f"thing {(i + 1) % 50}", "replace_object")]
        told += [HardNegative(f"thing {i}", f"swapped {i}", "swap_object")] if i < 30 else []
        told += [HardNegative(f"thing {i}", f"copy of {i}", "copy")] if i < 20 else []
        told += [HardNegative(f"thing {i}", f"rare {i}", "rare")] if i < 3 else []
        samples.append(Sample(f"u{i}", blank(), (Caption(f"thing {i}"),), hard_negatives=tuple(told)))
    flag = Sample("f", blank(), (Caption("flag"),), tags={"flag": "1"}, hard_negatives=told_twice())
    questions = Questions.of([*samples, flag])
    assert "other flag" not in questions.texts
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 8))

    def text(words: str) -> Any:
        kind, number = words.split()[0], words.split()[-1]
        if words == "flag":
            return np.ones(8)
        if kind == "swapped" and int(number) % 3 == 0:
            return images[int(number)]  # nearer to the picture than its caption is
        return truth[int(number)] * (1 if kind in ("thing", "copy") else -1)

    images = truth + 0.3 * rng.normal(size=truth.shape)
    texts = np.stack([text(words) for words in questions.texts])
    noisy = np.stack([text(w) + (0.05 if w.startswith("thing") else 0) for w in questions.texts])
    images = np.concatenate([images, np.ones((1, 8))])
    model = Embedded("m", "", [s.uid for s in questions.samples], images, texts)
    found = score(questions, model, Embedded("t", "", model.uids, images, noisy))
    own = found.values["model"]["hard_negatives"]
    assert own["replace_object"] == 1.0
    assert own["copy"] == 0.0
    assert own["swap_object"] == pytest.approx(20 / 30)
    assert own["swap_object_pictures"] == 30
    assert "rare" not in own
    assert found.values["not_scored"] == {"hard_negatives/rare": "3 pictures, fewer than 20"}
    assert found.values["difference"]["hard_negatives"]["swap_object"]["queries"] == 30
    rows = {(part, metric): value for part, metric, value, *_ in rows_of(found.values)}
    assert rows["hard negatives", "swap object"] == "66.7"
    assert ("hard negatives", "swap object pictures") not in rows
    assert found.queries["model/hard_negatives/right"].sum() == 50 + 20 + 0 + 3


def told_twice() -> tuple[HardNegative, ...]:
    return (HardNegative("flag", "other flag", "replace_object"),)


class Painter:
    """Knows colours by name; a bag of words: the order says nothing to it."""

    space_id, logit_scale = "colours", 10.0

    def embed_image(self, x: Any, /) -> Any:
        return np.stack([image.reshape(-1, 3).mean(0) / 255 - 0.5 for image in x]).astype(np.float32)

    def embed_text(self, x: Any, /) -> Any:
        return np.stack([np.mean([colour(w) - 0.5 for w in text.split()], axis=0) for text in x]).astype(np.float32)


def test_hard_negatives_are_made_where_the_metric_wants_them() -> None:
    words = ("red", "green", "blue", "white", "black", "yellow")
    samples = []
    for i in range(24):
        buffer = BytesIO()
        pixels = tuple(int(v * 255) for v in colour(words[i % 6]))
        Image.new("RGB", (4, 4), pixels).save(buffer, "PNG")
        samples.append(Sample(f"u{i}", ImageRef(data=buffer.getvalue()), (Caption(f"{words[i % 6]}"),)))
    found = evaluate_model(Painter(), samples, metrics_wanted=("retrieval", "hard_negatives", "calibration"))
    assert found.values["model"]["hard_negatives"] == {
        "queries": 24.0,
        "replace_attribute_pictures": 24.0,
        "replace_attribute": 1.0,
    }
    assert found.values["model"]["calibration"]["logit_scale"] == 10.0
    assert "hard_negatives" not in evaluate_model(Painter(), samples).values["model"]


def test_what_cannot_be_scored_is_said_and_everything_survives_the_disk(tmp_path: Path) -> None:
    questions, model, teacher = world()
    model.logit_scale = None
    found = score(questions, model, teacher, metrics_wanted=("all",))
    assert found.values["not_scored"]["calibration"] == "times 2.0 names no logit scale"
    assert "calibration" not in found.values["model"]
    assert "calibration" not in found.values["difference"]
    found.save(tmp_path)
    again = Evaluation.load(tmp_path)
    assert again.values == found.values
    out = StringIO()
    Console(file=out, width=160).print(found.table())
    for expected in ("difference (95 %)", "image to text skewness", "worst R@5", "mean rank variance", "images, nats",
                     "not scored: calibration: times 2.0 names no logit scale"):  # fmt: skip
        assert expected in out.getvalue()


# ------------------------------------------------------------------------------------------------ across models


def test_every_mix_of_query_and_gallery_is_ranked_by_hand() -> None:
    questions, model, teacher = world()
    found = score(questions, model, teacher, metrics_wanted=("retrieval", "asymmetric"))
    across, place = found.values["asymmetric"], {text: row for row, text in enumerate(questions.texts)}
    sides = {}
    for name, side in (("model", model), ("teacher", teacher)):
        texts = side.texts[[place[f"thing {i}"] for i in range(COUNT)]]
        sides[name] = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (side.images, texts)]
    for query, gallery in (("model", "teacher"), ("teacher", "model"), ("model", "model"), ("teacher", "teacher")):
        way = f"{query}_query_{gallery}_gallery"
        (qx, qt), (gx, gt) = sides[query], sides[gallery]
        ranks: dict[str, list[int]] = {"image_to_text": [], "text_to_image": [], "image_to_image": []}
        for i in range(COUNT):
            ranks["image_to_text"].append(1 + sum(float(qx[i] @ gt[j] > qx[i] @ gt[i]) for j in range(COUNT)))
            ranks["text_to_image"].append(1 + sum(float(qt[i] @ gx[j] > qt[i] @ gx[i]) for j in range(COUNT)))
            other = i + 1 if i % 2 == 0 else i - 1  # groups are pairs; its own picture is not in the gallery
            rivals = [j for j in range(COUNT) if j not in (i, other)]
            ranks["image_to_image"].append(1 + sum(float(qx[i] @ gx[j] > qx[i] @ gx[other]) for j in rivals))
        for direction, wanted in ranks.items():
            assert found.queries[f"asymmetric/{way}/{direction}/rank"].tolist() == wanted, (way, direction)
            assert across[way][direction]["R@5"] == pytest.approx(np.mean(np.array(wanted) <= 5))
    assert across["model_query_model_gallery"]["image_to_text"] == found.values["model"]["image_to_text"]
    mixed = across["model_query_teacher_gallery"]
    for side in ("model", "teacher"):
        gap = mixed["difference"]["text_to_image"][f"to_{side}"]
        alone = across[f"{side}_query_{side}_gallery"]["text_to_image"]["R@5"]
        assert gap["difference"] == pytest.approx(mixed["text_to_image"]["R@5"] - alone)
        assert gap["low"] <= gap["difference"] <= gap["high"]
    assert "difference" not in across["model_query_model_gallery"]
    shown = [row for row in rows_of(found.values) if row[0] == "model query, teacher gallery"]
    assert [row[1] for row in shown] == ["image to text R@5", "text to image R@5", "image to image R@5"]
    assert shown[0][2] == f"{100 * mixed['image_to_text']['R@5']:.1f}"


def test_across_spaces_and_without_company_there_is_nothing_to_search() -> None:
    questions, model, teacher = world()
    alone = score(questions, model, metrics_wanted=("retrieval", "asymmetric")).values
    assert alone["not_scored"]["asymmetric"] == "there is no teacher whose gallery could be searched"
    assert "asymmetric" not in alone
    narrow = Embedded("narrow", "toy", model.uids, model.images[:, :8], model.texts[:, :8])
    elsewhere = Embedded("elsewhere", "other", model.uids, model.images, model.texts)
    for other in (narrow, elsewhere):
        with pytest.raises(UsageError, match="embed into different spaces, so a cosine between them means nothing"):
            score(questions, other, teacher, metrics_wanted=("asymmetric",))
    lonely = Questions.of([Sample(f"u{i}", blank(), (Caption(f"thing {i}"),)) for i in range(COUNT)], name="toy")
    embedded = [
        Embedded(side.name, "toy", side.uids, side.images, side.images[: len(lonely.texts)])
        for side in (model, teacher)
    ]
    found = score(lonely, *embedded, metrics_wanted=("asymmetric",)).values
    assert found["asymmetric"]["model_query_teacher_gallery"].keys() == {"image_to_text", "text_to_image", "difference"}
    assert "fewer than 20 pictures" in found["not_scored"]["asymmetric/image_to_image"]
