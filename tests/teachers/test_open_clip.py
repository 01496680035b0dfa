"""The open_clip adapter against open_clip itself, on tiny random models saved in its real formats."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from pocketvlm.edge.errors import BadSampleError, MissingExtraError, UnknownNameError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.open_clip import OpenClipTeacher, image_spec

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    # SigLIP-like: a separate text tower, pooling without a class token, a bias in the loss
    "custom": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**VISION, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "proj_bias": True, "no_causal_mask": True},
    },
    "timm": {
        "embed_dim": 24,
        "vision_cfg": {"timm_model_name": "test_resnet", "timm_pool": "avg", "image_size": 64},
        "text_cfg": TEXT,
    },
    # OpenAI's own ResNet, whose attention pooling shows no map
    "resnet": {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, "text_cfg": TEXT},
}
TEXTS = ["a photo of a cat", "It's a DOG!", "日本語", "long " * 60, "&amp; “quoted”"]


def save_model(folder: Path, kind: str, suffix: str = ".safetensors") -> tuple[Path, Path]:
    """A random model of this kind: its architecture file and its weights file."""
    torch.manual_seed(0)
    config = folder / f"pocketvlm_test_{kind}.json"
    config.write_text(json.dumps(CONFIGS[kind]))
    if open_clip.get_model_config(config.stem) is None:
        open_clip.add_model_config(config)
    model = open_clip.create_model(config.stem)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.constant_(model.logit_scale, 2.0)
    weights = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    else:
        # as open_clip's training writes it, under a data-parallel wrapper
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, weights)
    return config, weights


def upstream(config: Path, weights: Path) -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem, pretrained=str(weights))
    return model.eval(), preprocess, open_clip.get_tokenizer(config.stem)


@pytest.mark.parametrize(("kind", "suffix"), [("clip", ".safetensors"), ("custom", ".pt"), ("timm", ".safetensors")])
@pytest.mark.usefixtures("horizontal_first")
def test_equals_upstream_from_picture_and_string(
    tmp_path: Path, kind: str, suffix: str, picture_maker: Callable[..., Image.Image]
) -> None:
    config, weights = save_model(tmp_path, kind, suffix)
    model, preprocess, tokenizer = upstream(config, weights)
    teacher = load_teacher(f"open_clip:{config}@{weights}")
    assert isinstance(teacher, OpenClipTeacher)
    assert isinstance(teacher, Teacher)
    assert teacher.dim == 24
    assert teacher.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert teacher.logit_bias == pytest.approx(-10.0 if kind == "custom" else 0.0)
    pictures = [
        picture_maker(1, 50, 47),
        picture_maker(2, 33, 91),
        picture_maker(3, 640, 427),
        picture_maker(4, 12, 20),
    ]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    pixels = torch.from_numpy(np.stack([load_image(p, teacher.image) for p in pictures]))
    found_images, found_texts = teacher.encode_images(pixels), teacher.encode_texts(TEXTS)
    assert (found_images.embedding - images).abs().max() < 1e-5
    assert (found_texts.embedding - texts).abs().max() < 1e-5
    assert found_images.features is not None
    assert found_images.features.shape[1] == (teacher.model.visual.trunk.num_features if kind == "timm" else 32)
    with_tokens = teacher.encode_image_tokens(pixels)
    assert (with_tokens.embedding - images).abs().max() < 1e-5
    tokens = with_tokens.taps["tokens"]
    assert torch.equal(with_tokens.features, found_images.features)
    if kind == "timm":
        # average pooling: the places' mean is the feature
        torch.testing.assert_close(tokens.mean(dim=1), found_images.features, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            last = model.visual.trunk.forward_features(torch.stack([preprocess(p) for p in pictures]))
        torch.testing.assert_close(tokens[:, 1], last[:, :, 0, 1], rtol=1e-4, atol=1e-4)
    else:
        model.visual.output_tokens = True
        with torch.no_grad():
            wanted = model.visual(torch.stack([preprocess(p) for p in pictures]))[1]
        assert tokens.shape == (4, 16, 32)
        assert (tokens - wanted).abs().max() < 1e-4
        assert not teacher.model.visual.output_tokens
    if kind == "clip":
        # the features are what upstream's projection is applied to
        projected = torch.nn.functional.normalize(found_images.features @ model.visual.proj, dim=-1)
        assert (projected - images).abs().max() < 1e-5
        assert found_texts.features is not None
        assert found_texts.features.shape == (len(TEXTS), 32)
        assert not found_images.features.requires_grad
        # outputs may enter a loss: inference tensors could not
        query = torch.ones(1, 24, requires_grad=True)
        (query @ found_images.embedding.T).sum().backward()
        assert query.grad is not None
        # and the model itself was left whole
        assert teacher.model.visual.proj is not None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"resize_mode": "squash", "interpolation": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"resize_mode": "longest", "fill_color": 7},
    ],
)
@pytest.mark.parametrize("size", [(32, 32), (40, 33), (33, 40), (31, 200), (200, 31), (10, 14), (65, 100), (100, 65)])
@pytest.mark.usefixtures("horizontal_first")
def test_preprocessing_equals_upstream(
    change: dict[str, Any], size: tuple[int, int], picture_maker: Callable[..., Image.Image]
) -> None:
    cfg = {
        "size": 32,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        **change,
    }
    spec = image_spec(cfg)
    transform = open_clip.image_transform(
        32,
        is_train=False,
        mean=cfg["mean"],
        std=cfg["std"],
        resize_mode=cfg["resize_mode"],
        interpolation=cfg["interpolation"],
        fill_color=cfg["fill_color"],
    )
    picture = picture_maker(sum(size), *size)
    ours = (
        torch.from_numpy(load_image(picture, spec)).permute(2, 0, 1) / 255 - torch.tensor(spec.mean)[:, None, None]
    ) / (torch.tensor(spec.std)[:, None, None])
    assert (ours - transform(picture)).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(33, 40), (65, 100), (31, 200), (640, 427)])
def test_any_pillow_is_within_one_level(size: tuple[int, int], picture_maker: Callable[..., Image.Image]) -> None:
    """Without the fixture, whatever order this Pillow takes, upstream's pixels are ours or the level beside."""
    from torchvision.transforms import InterpolationMode, Resize

    picture = picture_maker(7, *size)
    cfg = {"size": 32, "interpolation": "bilinear", "resize_mode": "squash", "mean": 0.5, "std": 0.5}
    theirs = np.asarray(Resize((32, 32), InterpolationMode.BILINEAR)(picture)).astype(int)
    assert np.abs(load_image(picture, image_spec(cfg)) - theirs).max() <= 1


def test_a_folder_holds_its_own_preprocessing(tmp_path: Path) -> None:
    config, weights = save_model(tmp_path, "clip")
    folder = tmp_path / "published"
    folder.mkdir()
    weights.rename(folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.4, 0.4, 0.4], "std": [0.3, 0.3, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": json.loads(config.read_text()), "preprocess_cfg": preprocess})
    )
    teacher = load_teacher(f"open_clip:{folder}")
    assert (teacher.image.size, teacher.image.resize, teacher.image.filter) == (32, "squash", "bilinear")
    assert teacher.image.mean == (0.4, 0.4, 0.4)
    with pytest.raises(UsageError, match="give the folder alone"):
        load_teacher(f"open_clip:{folder}@{weights}")


@pytest.mark.parametrize(("kind", "columns"), [("clip", [8, 20]), ("custom", [20, 20])])
def test_a_causal_tower_does_not_read_padding(tmp_path: Path, kind: str, columns: list[int]) -> None:
    """Six pieces between start and end; 60 words fill the context. A tower that pools its last place needs it all."""
    config, weights = save_model(tmp_path, kind, ".safetensors" if kind == "clip" else ".pt")
    model, _, tokenizer = upstream(config, weights)
    teacher = load_teacher(f"open_clip:{config}@{weights}")
    seen: list[int] = []
    tower: Any = getattr(teacher.model, "text", teacher.model)
    tower.transformer.resblocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    short = ["a photo of a black cat", "dog"]
    for texts in (short, TEXTS):
        with torch.no_grad():
            wanted = model.encode_text(tokenizer(texts), normalize=True)
        assert (teacher.encode_texts(texts).embedding - wanted).abs().max() < 1e-5
    assert seen == columns
    assert tower.positional_embedding.shape[0] == 20  # the model itself is as it was


def test_the_tokenizer_travels(tmp_path: Path) -> None:
    config, weights = save_model(tmp_path, "clip")
    teacher = load_teacher(f"open_clip:{config}@{weights}")
    assert isinstance(teacher, OpenClipTeacher)
    tokenizer = Tokenizer.from_str(teacher.tokenizer_json().decode())
    assert [e.ids for e in tokenizer.encode_batch(TEXTS)] == teacher.tokenize(TEXTS).tolist()
    assert (teacher.text.context_length, teacher.text.vocab_size) == (20, 49408)


def test_fingerprint_follows_the_weights(tmp_path: Path) -> None:
    config, weights = save_model(tmp_path, "clip")
    first = load_teacher(f"open_clip:{config}@{weights}")
    _, other = save_model(tmp_path, "clip", ".pt")
    assert load_teacher(f"open_clip:{config}@{other}").fingerprint == first.fingerprint
    state = torch.load(other, weights_only=True)
    state["state_dict"]["module.ln_final.bias"][0] += 1e-3
    torch.save(state, other)
    assert load_teacher(f"open_clip:{config}@{other}").fingerprint != first.fingerprint


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, weights = save_model(tmp_path, "clip")
    cases: list[tuple[str, type[Exception], str]] = [
        ("ViT-B-33@w", UnknownNameError, "did you mean 'ViT-B-32'"),
        ("ViT-B-32", UsageError, "names no weights"),
        ("ViT-B-32@missing.pt", UsageError, "weights file 'missing.pt' does not exist"),
        ("ViT-B-32@laion2b_s34b_b79", UnknownNameError, "laion2b_s34b_b79k"),
        ("ViT-B-32@laion2b_s34b_b79k", UsageError, "pass --allow-download"),
        ("ViT-B-32@openai", UsageError, "pass --allow-download"),
        ("hf-hub:someone/something", UsageError, "nothing is downloaded unasked"),
        (f"ViT-B-32@{weights}", UsageError, "belong to this architecture"),
        (f"{tmp_path / 'absent.json'}@{weights}", UsageError, "cannot be read"),
    ]
    for spec, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_teacher(f"open_clip:{spec}")
    clash = tmp_path / "ViT-B-32.json"
    clash.write_text(config.read_text())
    with pytest.raises(UsageError, match="shadow"):
        load_teacher(f"open_clip:{clash}@{weights}")
    teacher = load_teacher(f"open_clip:{config}@{weights}")
    with pytest.raises(UsageError, match=r"uint8 \[B, 32, 32, 3\]"):
        teacher.encode_images(torch.zeros(1, 3, 32, 32))
    with pytest.raises(BadSampleError, match="empty text"):
        teacher.encode_texts([""])
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[open-clip\]"):
        load_teacher(f"open_clip:{config}@{weights}")


def test_pickles_are_not_run(tmp_path: Path) -> None:
    config, _ = save_model(tmp_path, "clip")
    trap = tmp_path / "trap.pt"
    torch.save({"state_dict": {}, "payload": Path}, trap)
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_teacher(f"open_clip:{config}@{trap}")


@pytest.mark.parametrize(
    ("change", "message"), [({"size": (32, 48)}, "32x48"), ({"interpolation": "nearest"}, "'nearest'")]
)
def test_preprocessing_without_an_equal_is_refused(change: dict[str, Any], message: str) -> None:
    cfg = {"size": 32, "interpolation": "bicubic", "resize_mode": "shortest", "mean": 0.5, "std": 0.5, **change}
    with pytest.raises(UsageError, match=message):
        image_spec(cfg)


def test_a_tower_without_patches_gives_no_tokens(tmp_path: Path) -> None:
    config, weights = save_model(tmp_path, "resnet")
    teacher = load_teacher(f"open_clip:{config}@{weights}")
    assert isinstance(teacher, OpenClipTeacher)
    pixels = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    assert teacher.encode_images(pixels).embedding.shape == (1, 24)
    with pytest.raises(UsageError, match=r"no square grid of patch tokens \(found none\)"):
        teacher.encode_image_tokens(pixels)
    with pytest.raises(UsageError, match="takes uint8"):
        teacher.encode_image_tokens(pixels.float())
