"""Upstream's and the kit's own encoders answer on a GPU as on the CPU: 1e-4, float32 with TF32 off."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pocketvlm.data.augment import AugmentPolicy
from pocketvlm.data.sample import Sample
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.efficientnet import Lite2
from pocketvlm.teachers.lit import joined, lite2_outputs
from pocketvlm.teachers.minilm import MiniLM

pytestmark = pytest.mark.cuda

TEXTS = ["a photo of a cat", "It's a DOG!", "日本語", "long " * 60]


def _beside(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def saved(kind: str, folder: Path) -> str:
    family, _, which = kind.partition("-")
    if family == "hf":
        maker = _beside("test_hf")
        made = maker.save_clip(folder / "m") if which == "clip" else maker.save_siglip(folder / "m", two=False)
        return f"hf:{made}"
    config, weights = _beside("test_open_clip").save_model(folder, which)
    return f"open_clip:{config}@{weights}"


@pytest.mark.parametrize("kind", ["hf-clip", "hf-siglip", "open_clip-clip", "open_clip-custom", "open_clip-timm"])
def test_a_teacher_embeds_alike_on_both_devices(
    kind: str, tmp_path: Path, picture_maker: Callable[..., Image.Image]
) -> None:
    spec = saved(kind, tmp_path)
    own, other = load_teacher(spec), load_teacher(spec, device="cuda")
    assert (other.fingerprint, other.space_id, other.logit_scale) == (own.fingerprint, own.space_id, own.logit_scale)
    pixels = torch.from_numpy(np.stack([load_image(picture_maker(seed, 50, 47), own.image) for seed in range(4)]))
    for ours, theirs in (
        (other.encode_images(pixels), own.encode_images(pixels)),
        (other.encode_texts(TEXTS), own.encode_texts(TEXTS)),
    ):
        assert ours.embedding.is_cuda
        torch.testing.assert_close(ours.embedding.cpu(), theirs.embedding, rtol=0, atol=1e-4)
        if theirs.features is not None:
            assert ours.features is not None
            scale = float(theirs.features.abs().max())
            torch.testing.assert_close(ours.features.cpu(), theirs.features, rtol=0, atol=1e-4 * max(scale, 1.0))


def test_a_cache_made_on_a_gpu_serves_the_cpu(tmp_path: Path, samples: list[Sample]) -> None:
    spec = saved("open_clip-clip", tmp_path)
    caches = [
        build_cache(
            load_teacher(spec, device=device),
            samples,
            ["red", "green"],
            tmp_path / device,
            views=2,
            policy=AugmentPolicy(),
            dtype="float32",
        )
        for device in ("cpu", "cuda")
    ]
    uids = [sample.uid for sample in samples]
    for view in (0, 1):
        torch.testing.assert_close(caches[1].image(uids, view), caches[0].image(uids, view), rtol=0, atol=1e-4)
    torch.testing.assert_close(caches[1].text(["red", "green"]), caches[0].text(["red", "green"]), rtol=0, atol=1e-4)


def test_the_built_in_teachers_networks_answer_alike(picture_maker: Callable[..., Image.Image]) -> None:
    network, words = Lite2.load(), MiniLM.load()
    pixels = torch.from_numpy(np.stack([np.asarray(picture_maker(seed, 160, 160)) for seed in range(4)]))
    wanted = joined(lite2_outputs(network, pixels, "float32")), words.embed(TEXTS)
    found = joined(lite2_outputs(network.to("cuda"), pixels, "float32")), words.to("cuda").embed(TEXTS)
    for ours, theirs in zip(found, wanted):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4 * max(float(theirs.abs().max()), 1.0))
    half = joined(lite2_outputs(network, pixels, "bfloat16"))
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.cpu(), wanted[0]).min() > 0.99
