"""Existing dual encoders: the exported file equals the upstream library's own forward, and odd models are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError
from pocketvlm.export import foreign
from pocketvlm.export.foreign import from_teacher, load_foreign
from pocketvlm.export.source import Exportable, open_source
from pocketvlm.export.targets import get_target
from pocketvlm.export.targets.base import Towers
from pocketvlm.export.targets.onnx import run_file
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.hf import joint

SIZE, LENGTH = 32, 16
TEXTS = ["a photo of a cat", "two dogs!", "naïve café", "the quick brown fox " * 12]
KINDS = ("open_clip", "open_clip_custom", "hf_clip", "hf_siglip")


@dataclass
class Foreign:
    """spec: as a user writes it. image, text: upstream's own forward, normalised."""

    spec: str
    image: Callable[[torch.Tensor], torch.Tensor]
    text: Callable[[list[str]], torch.Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def randomise(model: Any) -> Any:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def save_open_clip(folder: Path, kind: str) -> Foreign:
    import open_clip

    config: dict[str, Any] = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    if kind == "open_clip_custom":
        config |= {"custom_text": True, "init_logit_bias": -10}
        config["text_cfg"] |= {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    path = folder / f"pocketvlm_export_{kind}.json"
    path.write_text(json.dumps(config))
    if open_clip.get_model_config(path.stem) is None:
        open_clip.add_model_config(path)
    model = randomise(open_clip.create_model(path.stem))
    weights = folder / "weights.pt"
    torch.save(model.state_dict(), weights)
    tokenizer = open_clip.get_tokenizer(path.stem)
    return Foreign(
        f"open_clip:{path}@{weights}",
        lambda x: model.encode_image(x, normalize=True),
        lambda texts: model.encode_text(tokenizer(texts), normalize=True),
        open_clip.OPENAI_DATASET_MEAN,
        open_clip.OPENAI_DATASET_STD,
    )


def fast_tokenizer(pad: str, eos: str, bos: str | None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = list(dict.fromkeys([pad, "<unk>", *([bos] if bos else []), eos]))
    raw.train_from_iterator(
        TEXTS * 9,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # CLIP finds the end of the text by its id
    ids = [(token, raw.token_to_id(token)) for token in special]
    raw.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if bos else f"$A {eos}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        unk_token="<unk>",
        padding_side="right",
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"] if bos else ["input_ids"],
    )


def save_hf(folder: Path, kind: str) -> Foreign:
    import transformers

    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": SIZE, "patch_size": 16}
    if kind == "hf_clip":
        # CLIP pads with its end token: a mask made from the padding id would hide the token it pools
        tokenizer = fast_tokenizer("<end>", "<end>", "<start>")
        text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
        text |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model = randomise(transformers.CLIPModel(config))
        processor: Any = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE)
    else:
        tokenizer = fast_tokenizer("<pad>", "<eos>", None)
        text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, "projection_size": 16}
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = randomise(transformers.SiglipModel(config))
        processor = transformers.SiglipImageProcessor(size={"height": SIZE, "width": SIZE})
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)

    def encode_texts(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        batch = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        return F.normalize(joint(model.get_text_features(**batch)), dim=-1)

    return Foreign(
        f"hf:{folder}",
        lambda x: F.normalize(joint(model.get_image_features(pixel_values=x)), dim=-1),
        encode_texts,
        tuple(processor.image_mean),
        tuple(processor.image_std),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Foreign, Exportable]]:
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        upstream = save_open_clip(folder, kind) if kind.startswith("open_clip") else save_hf(folder, kind)
        found[kind] = upstream, load_foreign(upstream.spec)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_exported_onnx_equals_upstream(models: Any, kind: str, tmp_path: Path) -> None:
    upstream, model = models[kind]
    variant = get_target("onnx").lower(model.towers, precision="fp32", folder=tmp_path, calibration=None)
    pixels = np.random.default_rng(3).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (upstream.mean, upstream.std))
    with torch.no_grad():
        image = upstream.image((planes - mean) / std).numpy()
        text = upstream.text(TEXTS).numpy()
    found = run_file(tmp_path / variant.files["image"], pixels, "image")
    np.testing.assert_allclose(found, image, atol=1e-5)
    ids = model.tokenizer().encode(TEXTS)
    np.testing.assert_allclose(run_file(tmp_path / variant.files["text"], ids, "text"), text, atol=1e-5)
    assert np.abs(image[0] - image[1]).max() > 1e-3, "the inputs make a difference"
    assert np.abs(text[0] - text[1]).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_contract_says_where_it_comes_from_without_paths(models: Any, kind: str) -> None:
    upstream, model = models[kind]
    contract = model.towers.contract
    assert contract.kind == "dual"
    assert contract.image.size == SIZE
    assert contract.text.context_length == LENGTH
    assert contract.logit_bias == pytest.approx(-10 if kind == "open_clip_custom" else contract.logit_bias)
    assert model.provenance["distilled"] is False
    folder = str(Path(upstream.spec.partition(":")[2]).parent)
    assert folder not in json.dumps([contract.to_dict(), model.provenance, model.licences])


def test_each_tower_ships_its_own_weights_only(models: Any, tmp_path: Path) -> None:
    for kind in ("open_clip", "hf_clip"):
        _, model = models[kind]
        towers = model.towers
        vision = {tuple(p.shape) for p in towers.image.parameters()}
        variant = get_target("onnx").lower(
            Towers(None, towers.text, towers.contract), precision="fp32", folder=tmp_path / kind, calibration=None
        )
        graph = onnx.load(str(tmp_path / kind / variant.files["text"])).graph
        assert not any("visual" in entry.name or "vision" in entry.name for entry in graph.initializer)
        assert any(len(shape) == 4 for shape in vision), "the image tower has patch convolutions to look for"
        assert not any(len(entry.dims) == 4 and entry.dims[1] == 3 for entry in graph.initializer)


def test_fused_attention_reaches_coreml(models: Any, tmp_path: Path) -> None:
    """open_clip's `nn.MultiheadAttention` traces to one operator that the converter lacks."""
    _, model = models["open_clip"]
    only = Towers(model.towers.image, None, model.towers.contract)
    before = torch.backends.mha.get_fastpath_enabled()
    variant = get_target("coreml").lower(only, precision="fp16", folder=tmp_path, calibration=None)
    assert "softmax" in variant.notes["image"]["kinds"]
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_open_source_takes_a_foreign_spec(models: Any) -> None:
    upstream, model = models["hf_siglip"]
    assert open_source(upstream.spec).towers.contract == model.towers.contract


def test_a_tower_that_differs_from_upstream_is_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, _ = models["hf_clip"]
    monkeypatch.setattr(
        foreign._HfImage, "forward", lambda self, x: self.projection(x.mean((2, 3)).repeat(1, 6)[:, :16])
    )
    with pytest.raises(IntegrityError, match="image tower cut out of"):
        load_foreign(upstream.spec)


@pytest.mark.parametrize("kind", ["open_clip", "hf_clip", "hf_siglip"])
def test_the_callers_teacher_stays_as_it_was(models: Any, kind: str) -> None:
    upstream, model = models[kind]
    teacher: Any = load_teacher(upstream.spec)
    configs = [part.config for part in teacher.model.modules() if hasattr(part, "config")]
    before = [config._attn_implementation for config in configs]
    assert from_teacher(teacher).towers.contract == model.towers.contract
    assert [config._attn_implementation for config in configs] == before
    assert ("eager" in before) is False
    own = {id(parameter) for parameter in teacher.model.parameters()}
    found = from_teacher(teacher).towers
    for tower in (found.image, found.text):
        assert not own & {id(parameter) for parameter in tower.parameters()}  # type: ignore[union-attr]


def test_unknown_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'open_clip'"):
        load_foreign("open_clp:ViT-B-32@laion")
    with pytest.raises(UsageError, match="not a folder"):
        open_source(tmp_path / "nothing")
