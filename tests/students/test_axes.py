"""`change_axes`: a student's space in other coordinates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pocketvlm.edge.errors import UsageError
from pocketvlm.students import build_student, change_axes, load_student, save_student, train_tokenizer

TINY = {"image.size": 32, "text.width": 16, "text.layers": 1, "text.context_length": 10}


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer(["a red apple", "banana on a table", "grinning face"], 60)


def orthogonal(width: int) -> torch.Tensor:
    draws = torch.randn(width, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.linalg.qr(draws).Q


def embeddings(student):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=draw)
    ids = torch.tensor([[2, 5, 9, 3, 0, 0, 0, 0, 0, 0], [2, 7, 3, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    with torch.no_grad():
        return student.encode_image(pixels).embedding, student.encode_text(ids).embedding


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_embeddings_are_multiplied_and_full_cosines_stay(tokenizer, tmp_path, kind):
    options = TINY | {"image.projection.kind": kind, "text.projection.kind": kind, "text.projection.bias": False}
    student = build_student("mnv4-035", embed_dim=12, tokenizer_json=tokenizer, overrides=options, space_id="t-1")
    student = student.double().eval()
    state = torch.get_rng_state()
    for columns in (12, 5):
        axes = orthogonal(12)[:, :columns]
        changed = change_axes(student, axes)
        for before, after in zip(embeddings(student), embeddings(changed)):
            assert torch.allclose(after, before @ axes, atol=1e-12)
        assert changed.embed_dim == changed.contract.embed_dim == columns
        assert changed.space_id is None
    assert student.space_id == "t-1"
    assert torch.equal(torch.get_rng_state(), state)
    whole = change_axes(student, orthogonal(12))
    cosines = [
        F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        for image, text in map(embeddings, (student, whole))
    ]  # fmt: skip
    assert torch.allclose(*cosines, atol=1e-12)
    again = load_student(save_student(changed, tmp_path / "narrow"))
    assert torch.equal(embeddings(again)[1], embeddings(changed)[1])


def test_axes_that_do_not_fit_are_refused(tokenizer):
    student = build_student("mnv4-035", embed_dim=12, tokenizer_json=tokenizer, overrides=TINY | {"dims": [4, 8]})
    for axes in (torch.eye(11), torch.zeros(12, 13), torch.zeros(12, 0), torch.zeros(12)):
        with pytest.raises(UsageError, match="give \\[12, M\\] with M from 1 to 12"):
            change_axes(student, axes)
    with pytest.raises(UsageError, match="prefixes up to 8 numbers"):
        change_axes(student, torch.eye(12)[:, :6])
