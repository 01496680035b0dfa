"""The control teacher: ConSE over public models, with nothing trained and nothing of the data set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pocketvlm.data.openmoji import openmoji_samples
from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.ingredients import CLASSES, IngredientsTeacher


@pytest.fixture(scope="module")
def teacher() -> IngredientsTeacher:
    loaded = load_teacher("ingredients")
    assert isinstance(loaded, IngredientsTeacher)
    return loaded


@pytest.fixture(scope="module")
def pixels(teacher: IngredientsTeacher) -> torch.Tensor:
    samples = openmoji_samples(flags="exclude")[:3]
    return torch.from_numpy(np.stack([load_image(s.image.read(), teacher.image) for s in samples]))


def test_image_embedding_is_the_weighted_mean_of_class_names(teacher: IngredientsTeacher, pixels: torch.Tensor) -> None:
    logits = teacher._images(teacher._images.normalise(pixels))["logits"].double()
    found = teacher.encode_images(pixels).embedding
    for row in range(len(pixels)):
        weights = torch.exp(logits[row]) / torch.exp(logits[row]).sum()
        expected = torch.zeros(384, dtype=torch.float64)
        for index in torch.argsort(weights, descending=True)[:CLASSES].tolist():
            expected += weights[index] * teacher._classes[index].double()
        expected /= expected.norm()
        torch.testing.assert_close(found[row].double(), expected, atol=1e-5, rtol=0)


def test_its_class_names_lie_where_their_texts_lie(teacher: IngredientsTeacher) -> None:
    texts = teacher.encode_texts(["goldfish", "laptop computer"]).embedding
    classes = torch.nn.functional.normalize(teacher._classes, dim=-1)
    assert (texts @ classes.T)[0].argmax().item() == 1
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2))


def test_it_is_the_same_in_every_fold_and_another_space_than_the_teacher(teacher: IngredientsTeacher) -> None:
    assert teacher.fingerprint == load_teacher("ingredients").fingerprint
    assert teacher.space_id.startswith("ingredients-")
    with pytest.raises(UnknownNameError, match="option of teacher ingredients"):
        load_teacher("ingredients?fold=0")
    with pytest.raises(UsageError, match="takes no folder"):
        load_teacher("ingredients:here")


def test_tokens_are_the_places_of_the_pooled_map(teacher: IngredientsTeacher, pixels: torch.Tensor) -> None:
    plain, found = teacher.encode_images(pixels), teacher.encode_image_tokens(pixels)
    assert not plain.taps
    assert torch.equal(found.embedding, plain.embedding)
    tokens = found.taps["tokens"]
    assert tokens.shape == (3, 25, 1280)
    assert plain.features is not None
    torch.testing.assert_close(tokens.mean(dim=1), plain.features, rtol=1e-4, atol=1e-5)
    chart = teacher._images(teacher._images.normalise(pixels))["map"]
    torch.testing.assert_close(tokens[:, 7], chart[:, :, 1, 2])
