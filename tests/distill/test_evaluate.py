"""Evaluation: what is asked, what is apart, what is saved, and one code path for every kind of model."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_toys import DIM, ToyTeacher, colour
from PIL import Image
from rich.console import Console

from pocketvlm.data import open_data
from pocketvlm.data.sample import Caption, ImageRef, Sample
from pocketvlm.distill.encoders import TeacherEncoder
from pocketvlm.distill.evaluate import Embedded, Evaluation, Questions, evaluate_model, score
from pocketvlm.edge.errors import UsageError


class Oracle:
    """Knows the colour of every picture and name; `wrong` names are answered with another one."""

    space_id = "colours"

    def __init__(self, wrong: tuple[str, ...] = ()) -> None:
        self.wrong = wrong

    def embed_image(self, x: Any, /) -> np.ndarray[Any, Any]:
        return np.stack([image.reshape(-1, 3).mean(0) / 255 - 0.5 for image in x]).astype(np.float32)

    def embed_text(self, x: Any, /) -> np.ndarray[Any, Any]:
        rows = [colour("wrong" if t.split()[-1] in self.wrong else t.split()[-1]) - 0.5 for t in x]
        return np.stack(rows).astype(np.float32)


def picture(name: str) -> ImageRef:
    from io import BytesIO

    buffer = BytesIO()
    Image.new("RGB", (4, 4), tuple(int(v * 255) for v in colour(name))).save(buffer, "PNG")
    return ImageRef(data=buffer.getvalue())


def sample(name: str, *captions: Caption, **more: Any) -> Sample:
    return Sample(name, picture(name), captions or (Caption(name),), label=name, **more)


NAMES = [f"n{i}" for i in range(12)]


def test_a_model_that_knows_gets_everything_and_mistakes_are_counted() -> None:
    samples = [sample(name) for name in NAMES]
    right = evaluate_model(Oracle(), samples)
    assert right.values["model"]["image_to_text"]["R@1"] == 1.0
    assert right.values["model"]["zero_shot"]["top-1"] == 1.0
    partly = evaluate_model(Oracle(wrong=("n1", "n2", "n3")), samples)
    assert partly.values["model"]["image_to_text"]["R@1"] == pytest.approx(9 / 12)
    assert partly.hits("image_to_text", 1).sum() == 9


def test_flags_are_neither_queries_nor_candidates_of_the_headline() -> None:
    samples = [sample(name) for name in NAMES] + [sample(f"f{i}", tags={"flag": "1"}) for i in range(5)]
    found = evaluate_model(Oracle(), samples)
    assert found.values["data"]["pictures"] == 12
    assert found.values["model"]["image_to_text"]["gallery"] == 12
    assert found.values["model"]["zero_shot"]["gallery"] == 12
    assert found.values["flags"]["model"]["image_to_text"]["queries"] == 5
    assert set(found.queries["image_to_text/uid"].tolist()) == set(NAMES)


def test_pictures_that_share_a_name_are_all_right_answers() -> None:
    twice = [Sample("a1", picture("n0"), (Caption("n0"),)), Sample("a2", picture("n0"), (Caption("n0"),))]
    found = evaluate_model(Oracle(), [*twice, *(sample(name) for name in NAMES[1:])])
    assert found.values["model"]["image_to_text"]["gallery"] == 12
    assert found.values["model"]["text_to_image"]["R@1"] == 1.0
    assert found.values["model"]["text_to_image"]["MAP"] == 1.0


def test_several_captions_are_several_right_answers() -> None:
    samples = [sample(name, Caption(name), Caption(f"other {name}")) for name in NAMES]
    found = evaluate_model(Oracle(wrong=()), samples)
    assert found.values["model"]["image_to_text"]["gallery"] == 24
    assert found.values["model"]["image_to_text"]["R@1"] == 1.0
    assert found.values["model"]["image_to_text"]["MAP"] == 1.0


def test_tags_and_languages_are_scored_one_by_one() -> None:
    samples = [
        sample(
            name, Caption(name), Caption(f"de {name}", language="de"), tags={"style": "ab"[i % 2], "category": "all"}
        )
        for i, name in enumerate(NAMES)
    ]
    found = evaluate_model(Oracle(wrong=("n0", "n2")), samples)
    assert found.values["by_tag"].keys() == {"style"}
    assert found.values["by_tag"]["style"]["a"]["model"]["R@1"] == pytest.approx(4 / 6)
    assert found.values["by_tag"]["style"]["b"]["model"]["R@1"] == 1.0
    assert found.values["by_tag"]["style"]["a"]["model"]["gallery"] == 12
    assert found.values["data"]["language"] == "en"
    assert found.values["by_language"]["de"]["model"]["image_to_text"]["queries"] == 12


def test_retention_neighbours_and_mixed_pairings_against_a_teacher() -> None:
    samples = [sample(name) for name in NAMES]
    found = evaluate_model(Oracle(wrong=("n1", "n2", "n3")), samples, teacher=Oracle(), teacher_name="oracle")
    assert found.values["retention"]["image_to_text"]["R@1"] == pytest.approx(0.75)
    assert found.values["neighbours"]["images@10"] == 1.0
    assert found.values["neighbours"]["texts@10"] < 1.0
    mixed = found.values["mixed"]
    assert mixed["model_image_teacher_text"]["image_to_text"]["R@1"] == 1.0
    assert mixed["teacher_image_model_text"]["image_to_text"]["R@1"] == pytest.approx(0.75)
    other = Oracle()
    other.space_id = "elsewhere"
    assert evaluate_model(other, samples, teacher=Oracle()).values["mixed"] is None


def test_unreadable_pictures_are_left_out_and_counted() -> None:
    broken = Sample("bad", ImageRef(data=b"\xff\xd8\xff\xe0 no"), (Caption("bad"),))
    found = evaluate_model(Oracle(), [*(sample(name) for name in NAMES), broken])
    assert found.values["data"]["bad"] == 1
    assert sum(found.values["data"]["bad_reasons"].values()) == 1
    assert found.values["model"]["image_to_text"]["gallery"] == 12
    with pytest.raises(UsageError, match=r"no picture of data could be decoded \(1 tried\)"):
        evaluate_model(Oracle(), [broken])


def test_a_model_that_answers_all_alike_scores_nothing() -> None:
    samples = [sample(name) for name in NAMES]
    questions = Questions.of(samples)
    same = Embedded("flat", "", [s.uid for s in samples], np.ones((12, 3)), np.ones((len(questions.texts), 3)))
    values = score(questions, same).values["model"]
    assert values["image_to_text"]["R@10"] == 0.0
    assert values["zero_shot"]["top-5"] == 0.0
    same.images[3] = np.nan
    with pytest.raises(UsageError, match="1 of 12 query embeddings are not finite"):
        score(questions, same)


def test_prompt_templates_are_averaged_and_checked() -> None:
    samples = [sample(name) for name in NAMES]
    texts = Questions.of(samples, templates=("{}", "a picture of {}")).texts
    assert "a picture of n3" in texts
    with pytest.raises(UsageError, match=r"prompt template 'picture' has no \{\}"):
        evaluate_model(Oracle(), samples, templates=("picture",))


def test_a_template_or_a_label_may_hold_other_braces() -> None:
    samples = [Sample(name, picture(name), label=name + "{y}") for name in NAMES]
    assert "a {} {x}".replace("{}", "n3{y}") in Questions.of(samples, templates=("a {} {x}",)).texts
    found = evaluate_model(Oracle(), samples, templates=("{} {x}",))
    assert found.values["model"]["zero_shot"]["gallery"] == 12


def test_data_without_captions_or_labels_cannot_be_scored() -> None:
    with pytest.raises(UsageError, match="neither captions nor two different labels"):
        evaluate_model(Oracle(), [Sample(name, picture(name)) for name in NAMES])
    only_labels = [Sample(name, picture(name), label=name) for name in NAMES]
    assert evaluate_model(Oracle(), only_labels).values["model"].keys() == {"zero_shot"}


def test_results_survive_the_disk_and_the_table_prints(tmp_path: Path) -> None:
    found = evaluate_model(Oracle(wrong=("n1",)), [sample(name) for name in NAMES], teacher=Oracle())
    found.save(tmp_path)
    again = Evaluation.load(tmp_path)
    assert again.values == found.values
    assert again.queries.keys() == found.queries.keys()
    assert np.array_equal(again.hits(), found.hits())
    out = StringIO()
    Console(file=out, width=120).print(found.table())
    assert "retention" in out.getvalue()
    with pytest.raises(UsageError, match=r"no readable eval\.json"):
        Evaluation.load(tmp_path / "elsewhere")


def test_a_real_teacher_goes_through_its_own_preprocessing(world: Path) -> None:
    teacher = ToyTeacher()
    found = evaluate_model(TeacherEncoder(teacher), open_data(str(world)), name="toy")
    assert found.values["model"]["image_to_text"]["R@1"] == 1.0
    assert TeacherEncoder(teacher).embed_text(["red"]).shape == (1, DIM)
