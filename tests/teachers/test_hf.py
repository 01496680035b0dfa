"""The Hugging Face adapter against transformers itself, on tiny random models saved by `save_pretrained`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pocketvlm.edge.errors import MissingExtraError, UnknownNameError, UsageError
from pocketvlm.edge.preprocess import load_image
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import Teacher
from pocketvlm.teachers.clip_tokenizer import build_clip_tokenizer
from pocketvlm.teachers.hf import HfTeacher, image_spec
from pocketvlm.teachers.hub import network

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXTS = ["a photo of a cat", "It's a DOG!", "日本語", "long " * 60, "Café, naïve?"]
CORPUS = [*TEXTS, "the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20


def _randomise(model: torch.nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def save_clip(folder: Path) -> Path:
    data, _ = build_clip_tokenizer(context_length=20)
    vocab = json.loads(data)["model"]["vocab"]
    merges = json.loads(data)["model"]["merges"]
    vocab = {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(k, k): v for k, v in vocab.items()
    }
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges))
    tokenizer = transformers.CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    text = {**TOWER, "vocab_size": 49408, "max_position_embeddings": 20, "eos_token_id": 49407, "bos_token_id": 49406}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    _randomise(transformers.CLIPModel(config)).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_siglip(folder: Path, *, two: bool) -> Path:
    folder.mkdir()
    if two:
        tokenizer: Any = _gemma_tokenizer()
    else:
        (folder / "corpus.txt").write_text("\n".join(CORPUS), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"),
            model_prefix=str(folder / "spiece"),
            vocab_size=80,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            minloglevel=9,
        )
        tokenizer = transformers.SiglipTokenizer(
            str(folder / "spiece.model"), pad_token="<pad>", model_max_length=20, model_input_names=["input_ids"]
        )
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    _randomise(transformers.SiglipModel(config)).save_pretrained(folder)
    resample = Image.Resampling.BILINEAR if two else Image.Resampling.BICUBIC
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, resample=resample).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _gemma_tokenizer() -> Any:
    """SigLIP 2's kind: byte-level fallback BPE over "▁"-joined words, end token appended, padded on the right."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Replace("▁", " ")
    raw.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"], show_progress=False),
    )
    return transformers.GemmaTokenizerFast(
        tokenizer_object=raw,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=20,
        model_input_names=["input_ids"],
    )


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        "clip": save_clip(root / "clip"),
        "siglip": save_siglip(root / "siglip", two=False),
        "siglip2": save_siglip(root / "siglip2", two=True),
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@pytest.mark.usefixtures("horizontal_first")
def test_equals_upstream_from_picture_and_string(
    checkpoints: dict[str, Path], kind: str, picture_maker: Callable[..., Image.Image]
) -> None:
    folder = checkpoints[kind]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    teacher = load_teacher(f"hf:{folder}")
    assert isinstance(teacher, HfTeacher)
    assert isinstance(teacher, Teacher)
    pictures = [
        picture_maker(1, 50, 46),
        picture_maker(2, 32, 92),
        picture_maker(3, 640, 480),
        picture_maker(4, 12, 18),
    ]
    with torch.no_grad():
        inputs = processor(images=pictures, return_tensors="pt")
        out = model(
            **inputs, **tokenizer(TEXTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
        )
    pixels = torch.from_numpy(np.stack([load_image(p, teacher.image) for p in pictures]))
    images, texts = teacher.encode_images(pixels), teacher.encode_texts(TEXTS)
    assert (images.embedding - out.image_embeds).abs().max() < 1e-5
    assert (texts.embedding - out.text_embeds).abs().max() < 1e-5
    logits = teacher.logit_scale * images.embedding @ texts.embedding.T + teacher.logit_bias
    assert (logits - out.logits_per_image).abs().max() < 1e-4
    assert teacher.dim == (24 if kind == "clip" else 32)
    assert images.features is not None
    assert images.features.shape == (4, 32)
    # the patches of the last layer: CLIP's without the class token, SigLIP has none
    with_tokens = teacher.encode_image_tokens(pixels)
    assert torch.equal(with_tokens.embedding, images.embedding)
    hidden = out.vision_model_output.last_hidden_state
    assert with_tokens.taps["tokens"].shape == (4, 16, 32)
    assert (with_tokens.taps["tokens"] - hidden[:, -16:]).abs().max() < 1e-4
    # rows differ, or the comparison above would prove little
    assert (images.embedding[0] - images.embedding[1]).abs().max() > 1e-3
    assert (texts.embedding[0] - texts.embedding[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
@pytest.mark.parametrize("size", [(32, 32), (40, 34), (34, 40), (200, 32), (32, 100), (10, 15), (64, 96)])
@pytest.mark.usefixtures("horizontal_first")
def test_preprocessing_equals_upstream(
    checkpoints: dict[str, Path], kind: str, size: tuple[int, int], picture_maker: Callable[..., Image.Image]
) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(checkpoints[kind], use_fast=False)
    spec = image_spec(processor.to_dict(), kind)
    picture = picture_maker(sum(size), *size)
    expected = processor(images=picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = (load_image(picture, spec) / 255.0 - np.array(spec.mean)) / np.array(spec.std)
    assert np.abs(ours - expected).max() < 1e-5


def test_the_odd_centre_crop_follows_openai_not_the_slow_processor(picture_maker: Callable[..., Image.Image]) -> None:
    """The stated difference: 35 to 32 leaves 3; torchvision and we cut 2 on the left, the slow one cuts 1."""
    import torchvision.transforms.functional as tv

    picture = picture_maker(5, 35, 32)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    ours = load_image(picture, image_spec(processor.to_dict(), "x"))
    assert np.array_equal(ours, np.asarray(tv.center_crop(picture, [32, 32])))
    slow = processor(images=picture, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(slow.transpose(1, 2, 0), np.asarray(picture)[:, 1:33])


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
def test_the_tokenizer_travels(checkpoints: dict[str, Path], kind: str) -> None:
    teacher = load_teacher(f"hf:{checkpoints[kind]}")
    assert isinstance(teacher, HfTeacher)
    tokenizer = Tokenizer.from_str(teacher.tokenizer_json().decode())
    assert [e.ids for e in tokenizer.encode_batch(TEXTS)] == teacher.tokenize(TEXTS).tolist()
    assert teacher.text.context_length == 20


def test_a_tokenizer_that_is_python_code_does_not_travel(checkpoints: dict[str, Path]) -> None:
    teacher = load_teacher(f"hf:{checkpoints['siglip']}")
    assert isinstance(teacher, HfTeacher)
    with pytest.raises(UsageError, match="only as Python code"):
        teacher.tokenizer_json()


def test_fingerprint_follows_weights_preprocessing_and_tokenizer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    first = load_teacher(f"hf:{checkpoints['siglip2']}").fingerprint
    assert load_teacher(f"hf:{checkpoints['siglip2']}").fingerprint == first
    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["siglip2"], copy)
    assert load_teacher(f"hf:{copy}").fingerprint == first
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 3}))
    second = load_teacher(f"hf:{copy}").fingerprint
    assert second != first
    text = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(text.replace('"▁"', '"_"', 1))
    assert load_teacher(f"hf:{copy}").fingerprint not in (first, second)


def test_mistakes(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="neither a folder here nor a hub id"):
        load_teacher("hf:./nowhere")
    with pytest.raises(UsageError, match="pass --allow-download"):
        load_teacher("hf:openai/clip-vit-base-patch32")
    with pytest.raises(UsageError, match=r"config\.json, weights"):
        load_teacher(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnknownNameError, match="dual-encoder model type of transformers 'bert'"):
        load_teacher(f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(UsageError, match="NaFlex"):
        load_teacher(f"hf:{tmp_path}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pocketvlm\[hf\]"):
        load_teacher(f"hf:{checkpoints['clip']}")


def test_missing_weights_are_not_left_random(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["clip"], copy)
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights \(first 'visual_projection.weight'\)"):
        load_teacher(f"hf:{copy}")


def test_remote_code_needs_the_flag(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint that brings its own model class: refused, and its code not run, unless asked for."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(checkpoints["clip"], copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "pv_custom", "auto_map": {"AutoConfig": "custom.C", "AutoModel": "custom.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "ran"
    (copy / "custom.py").write_text(
        "from pathlib import Path\nfrom transformers import CLIPConfig, CLIPModel\n"
        f"Path({str(marker)!r}).touch()\n"
        "class C(CLIPConfig):\n    model_type = 'pv_custom'\n"
        "class M(CLIPModel):\n    config_class = C\n"
    )
    with pytest.raises(UsageError):
        load_teacher(f"hf:{copy}")
    assert not marker.exists()
    os.environ.setdefault("HF_MODULES_CACHE", str(tmp_path / "modules"))
    teacher = load_teacher(f"hf:{copy}", trust_remote_code=True)
    assert marker.exists()
    same = load_teacher(f"hf:{checkpoints['clip']}")
    assert torch.equal(teacher.encode_texts(TEXTS).embedding, same.encode_texts(TEXTS).embedding)


@pytest.mark.parametrize(
    "change",
    [
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 1},
        {"size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    ],
)
def test_preprocessing_without_an_equal_is_refused(change: dict[str, Any]) -> None:
    base = transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).to_dict()
    with pytest.raises(UsageError, match="cannot express"):
        image_spec({**base, **change}, "x")


def test_offline_inside_and_restored_outside() -> None:
    import huggingface_hub.constants as constants

    before = (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE"))
    with network(False):
        assert constants.HF_HUB_OFFLINE
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert (constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")) == before
    with network(True):
        assert before[0] == constants.HF_HUB_OFFLINE
