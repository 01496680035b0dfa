"""Generative students on the tower of a distilled CLIP student: the same features, no folder afterwards, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.export.vlm.bundle import export_vlm
from pocketvlm.students import Student, build_student, load_student, save_student, train_tokenizer
from pocketvlm.students.vlm import (
    Vlm,
    build_vlm,
    load_vlm,
    load_vlm_config,
    on_student_tower,
    save_vlm,
    train_vlm_tokenizer,
)
from pocketvlm.students.vlm.config import VlmConfig, parse_vlm_config

TEXTS = ["What is this?", "a small naïve dolphin", "top left: bus; top right: taxi"]
TOKENIZER = train_vlm_tokenizer(TEXTS, 500)
CLIP_TOKENIZER = train_tokenizer(TEXTS, 80)
SIDE = 48
# unlike every default of timm
NORMALISED = {"image.mean": [0.1, 0.4, 0.6], "image.std": [0.3, 0.2, 0.5]}
VALUES: dict[str, Any] = {
    "name": "tiny",
    "connector_hidden": 16,
    "decoder": {"width": 32, "layers": 1, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 48},
    "licences": [["scenes", "MIT", "nobody"]],
}


def clip(backbone: str = "test_efficientnet", **changes: Any) -> Student:
    text = {"text.width": 16, "text.layers": 1, "text.context_length": 10}
    student = build_student(
        f"timm:{backbone}",
        embed_dim=12,
        tokenizer_json=CLIP_TOKENIZER,
        seed=4,
        overrides={"image.size": SIDE, **NORMALISED, **text, "licences": [["seen", "CC0", "them"]], **changes},
    )
    with torch.no_grad():  # statistics that a fresh trunk would not have
        for name, value in student.image_tower.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(generator=torch.Generator().manual_seed(len(name)))
    return student.eval()


def config(folder: Path, **vision: Any) -> VlmConfig:
    return parse_vlm_config(VALUES | {"vision": {"weights": f"student:{folder}", **vision}}, source="test")


def pixels(count: int = 2, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_student(clip(), tmp_path / "run" / "student")


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [("test_efficientnet", {}), ("test_vit", {"depth": 2, "class_token": False, "global_pool": "avg"})],
)
def test_the_features_are_those_of_the_students_trunk(tmp_path: Path, backbone: str, arguments: dict[str, Any]) -> None:
    student = clip(backbone, **{"image.backbone_args": arguments})
    folder = save_student(student, tmp_path / "clip")
    model = build_vlm(config(folder), TOKENIZER, seed=1).double().eval()
    expected = student.double().encode_image(pixels(), taps=["tokens"]).taps["tokens"]
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    found = model.vision(pixels())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 1e-2
    assert (model.config.vision.backbone, model.config.vision.size) == (backbone, SIDE)
    assert model.config.vision.mean == (0.1, 0.4, 0.6)
    assert model.config.vision.origin == load_student(folder).contract.model_id
    # what is not the student's depends on the seed as ever
    other = build_vlm(config(folder), TOKENIZER, seed=2)
    assert not torch.equal(other.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight.float())


def test_the_saved_model_needs_the_student_no_more(folder: Path, tmp_path: Path) -> None:
    model = build_vlm(config(folder, levels=[2]), TOKENIZER, seed=1).eval()
    assert model.config.licences == (("scenes", "MIT", "nobody"), ("seen", "CC0", "them"))
    saved = save_vlm(model, tmp_path / "vlm")
    asked = (pixels(), ["what is this?", "bus"])
    said = model.generate(*asked, max_new_tokens=6)
    # an unchanged folder builds the same tower again, and another student in its place is noticed
    again = build_vlm(model.config, TOKENIZER, seed=1).eval()
    assert torch.equal(again.vision(pixels()), model.vision(pixels()))
    shutil.rmtree(folder.parent)
    loaded = load_vlm(saved)
    assert loaded.config == model.config
    assert torch.equal(loaded.vision(pixels()), model.vision(pixels()))
    assert loaded.generate(*asked, max_new_tokens=6) == said
    save_student(clip(**{"text.layers": 0}), folder)
    with pytest.raises(UsageError, match=r"vision\.origin is"):
        build_vlm(model.config, TOKENIZER)


def test_the_bundle_sees_as_the_student_saw(folder: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = build_vlm(config(folder), TOKENIZER, seed=1).eval()
    saved = save_vlm(model, tmp_path / "vlm")
    shutil.rmtree(folder.parent)
    bundle = export_vlm(saved, tmp_path / "bundle", ["onnx"], ["fp32"])
    written = json.loads((bundle / "bundle.json").read_text())
    np.testing.assert_allclose(written["contract"]["image"]["mean"], (0.1, 0.4, 0.6), atol=1e-6)
    assert "them" in {row["attribution"] for row in written["licences"]}
    session = onnxruntime.InferenceSession(bundle / "onnx" / "picture-fp32.onnx")
    (found,) = session.run(None, {"pixels": pixels(1).numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model.picture(pixels(1)).numpy(), atol=1e-4)


def test_a_named_size_takes_the_tower_and_keeps_its_pixels(folder: Path, tmp_path: Path) -> None:
    # the run that holds the student will do, as everywhere
    changed = on_student_tower(load_vlm_config("vlm-5m"), f"student:{folder.parent}")
    small = build_vlm(changed, TOKENIZER)
    assert (small.config.vision.backbone, small.config.vision.size) == ("test_efficientnet", 192)
    assert small.config.vision.levels == (2, 3)
    assert small.vision(pixels(1, 192)).shape == (1, 36, small.vision.width)
    counted = build_vlm(changed, TOKENIZER, device="meta")
    assert sum(weight.numel() for weight in counted.parameters()) == sum(w.numel() for w in small.parameters())
    # positions of a transformer are those of one size
    fixed = save_student(clip("test_vit"), tmp_path / "vit")
    assert on_student_tower(load_vlm_config("vlm-5m"), f"student:{fixed}").vision.size == SIDE
    with pytest.raises(UnknownNameError, match="student:FOLDER"):
        on_student_tower(changed, str(folder))


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"backbone": "test_resnet"}, "vision.backbone is 'test_resnet', the student's 'test_efficientnet'"),
        ({"mean": [0.5, 0.5, 0.5]}, "vision.mean is"),
        ({"std": [0.5, 0.5, 0.5]}, "vision.std is"),
        ({"backbone_args": {"depth": 3}}, "vision.backbone_args is"),
        ({"levels": [9]}, "gives no maps"),
    ],
)
def test_a_tower_that_the_configuration_does_not_describe_is_refused(
    folder: Path, vision: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build_vlm(config(folder, **vision), TOKENIZER)
    # what is named and right is accepted
    build_vlm(config(folder, backbone="test_efficientnet", mean=[0.1, 0.4, 0.6]), TOKENIZER)


def test_towers_that_cannot_be_built_again_are_refused(tmp_path: Path) -> None:
    block = {"heads": 1, "hidden": 32}
    arguments = {"depth": 2, "class_token": False, "global_pool": "avg"}
    pruned = clip("test_vit", **{"image.backbone_args": arguments, "image.blocks": [block]})
    with pytest.raises(UsageError, match="is pruned"):
        build_vlm(config(save_student(pruned, tmp_path / "pruned")), TOKENIZER)
    whole = save_student(clip("test_vit"), tmp_path / "whole")
    with pytest.raises(UsageError, match=r"does not fit vision\.size 96 .*pos_embed"):
        build_vlm(config(whole, size=96), TOKENIZER)


def test_a_folder_without_a_whole_student_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no student\.json"):
        build_vlm(config(tmp_path / "nowhere"), TOKENIZER)
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="was changed or cut off"):
        build_vlm(config(folder), TOKENIZER)
    weights.unlink()
    with pytest.raises(IntegrityError, match="lacks weights"):
        build_vlm(config(folder), TOKENIZER)


def test_a_tower_needs_a_name_and_an_origin_a_student() -> None:
    with pytest.raises(UsageError, match=r"vision\.backbone is missing"):
        parse_vlm_config(VALUES | {"vision": {}}, source="test")
    plain = {"backbone": "test_resnet", "weights": "none"}
    with pytest.raises(UsageError, match=r"vision\.origin says"):
        parse_vlm_config(VALUES | {"vision": plain | {"origin": "someone"}}, source="test")
    # what is saved of other towers reads as it did
    assert "origin" not in parse_vlm_config(VALUES | {"vision": plain}, source="test").model_dump()["vision"]


def test_the_folder_is_not_read_where_weights_follow(folder: Path) -> None:
    built = build_vlm(config(folder), TOKENIZER).config
    shutil.rmtree(folder)
    assert isinstance(build_vlm(built, TOKENIZER, load_weights=False), Vlm)
