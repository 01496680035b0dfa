"""`truncated` and the tap of an exit: the smaller student inside a student."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pocketvlm.edge.errors import UsageError
from pocketvlm.students import build_student, deploy_text, load_student, save_student, train_tokenizer, truncated

EXITS = [[1, 6], [1, 12], [2, 8]]
TINY = {
    "image.size": 32, "text.width": 16, "text.heads": 2, "text.layers": 3, "text.context_length": 10, "dims": [4],
    "exits": EXITS,
}  # fmt: skip
IDS = torch.tensor([[2, 5, 9, 3, 0, 0, 0, 0, 0, 0], [2, 7, 3, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer(["a red apple", "banana on a table", "grinning face"], 60)


def student_of(tokenizer: bytes, **changes: object):
    return build_student("mnv4-035", embed_dim=12, tokenizer_json=tokenizer, overrides=TINY | changes).double().eval()


VARIANTS = [{}, {"text.pool": "eot", "text.attention": "causal"}, {"text.block": "bert"}]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS, ids=["mean", "causal-eot", "bert"])
def test_an_exit_is_what_the_truncated_tower_gives(tokenizer, options):
    """By a tower that really has fewer layers; whatever padding was cut; and the last exit is the whole tower."""
    student = student_of(tokenizer, **options)
    for ids in (IDS, IDS[:, :4]):
        seen = student.encode_text(ids, taps=["exit.1", "exit.3", "tokens"])
        assert torch.equal(seen.taps["exit.3"], seen.embedding)
        assert torch.equal(seen.taps["tokens"], student.encode_text(ids, taps=["tokens"]).taps["tokens"])
        for m in (6, 12):
            small = truncated(student, text_layers=1, dim=m)
            assert torch.allclose(small.encode_text(ids).embedding, seen.taps["exit.1"][:, :m], atol=1e-12)
    assert not student.text_tower._forward_hooks
    assert not student.text_tower.blocks[0]._forward_hooks


@torch.no_grad()
def test_a_truncated_student_is_smaller_in_the_same_space_and_saved(tokenizer, tmp_path):
    student = student_of(tokenizer)
    small = truncated(student, text_layers=2, dim=8)
    assert len(small.text_tower.blocks) == small.config.text.layers == 2
    assert small.contract.space_id == student.contract.space_id
    assert small.contract.embed_dim == 8
    assert small.config.exits == ((1, 6),)
    assert small.config.dims == ()
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert torch.allclose(small.encode_image(pixels).embedding, student.encode_image(pixels).embedding[:, :8])
    again = load_student(save_student(small, tmp_path / "small"))
    assert again.contract.to_dict() == small.contract.to_dict()
    wanted = F.normalize(small.encode_text(IDS).embedding, dim=-1)
    assert torch.allclose(deploy_text(again)(IDS), wanted, atol=1e-12)
    assert len(student.text_tower.blocks) == 3
    half = truncated(student, dim=4)
    assert half.config.text.layers == 3
    assert truncated(truncated(student, text_layers=1, dim=12), dim=6).embed_dim == 6


def test_what_nobody_trained_is_refused(tokenizer):
    student = student_of(tokenizer)
    for options in ({"text_layers": 2, "dim": 6}, {"text_layers": 1, "dim": 4}, {"dim": 6}, {"text_layers": 2}):
        with pytest.raises(UsageError, match=r"take one of 1 x 6, 1 x 12, 2 x 8, 3 x 4, 3 x 12"):
            truncated(student, **options)
    with pytest.raises(UsageError, match="promises the smaller students \\[\\[1, 14\\]\\]"):
        student_of(tokenizer, exits=[[1, 14]])
    with pytest.raises(UsageError, match="layers from 1 to the text tower's 3"):
        student_of(tokenizer, exits=[[4, 6]])
    with pytest.raises(UsageError, match="an exit after 4 layers"):
        student.encode_text(IDS, taps=["exit.4"])
    with pytest.raises(UsageError, match="early exits are for the text tower"):
        student.encode_image(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), taps=["exit.1"])
