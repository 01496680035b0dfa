"""Tiny image-text-to-text models of five families with tokenizers made here, saved as `save_pretrained` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "What is at the top left of the picture?",
    "A red dog and two cats are here.",
    "Ein Bär, ein Vogel – und ein Löwe!",
    "日本語の犬",
    "USER: ASSISTANT: User: Assistant: yes no it is and",
] * 20
FAMILIES = ("llava", "qwen2_vl", "idefics3", "paligemma", "gemma3")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IDEFICS_CHAT = (
    "<s>{% for message in messages %}{{ message['role'] | capitalize }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


GEMMA_CHAT = (
    "<bos>{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def save_toy(family: str, folder: Path) -> Path:
    """A random model of a family with its processor, in a new folder."""
    folder.mkdir(parents=True)
    made = {"llava": _llava, "qwen2_vl": _qwen, "idefics3": _idefics, "paligemma": _paligemma, "gemma3": _gemma}
    processor, config = made[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for name, weight in model.named_parameters():
            # large enough that answers differ
            words = family == "qwen2_vl" and "embed_tokens" in name
            torch.nn.init.normal_(weight, std=1.0 if words else 0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def drop_chat_template(folder: Path) -> Path:
    """The same checkpoint without a chat template."""
    (folder / "chat_template.jinja").unlink()
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text())
        values.pop("chat_template", None)
        path.write_text(json.dumps(values))
    return folder


def _spaced(*special: str) -> Any:
    """Llama's kind: "▁" before words, bytes for what is not known."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # pieces begin with a space or have none, as SentencePiece's
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", "</s>", "<pad>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    # the Japanese letters are left to bytes
    learnt = [text for text in TEXTS if text.isascii() or "Bär" in text]
    raw.train_from_iterator(learnt, trainers.BpeTrainer(vocab_size=480, special_tokens=names, show_progress=False))
    return raw


def _llava() -> tuple[Any, Any]:
    tokenizer = transformers.LlamaTokenizerFast(
        tokenizer_object=_spaced("<image>"), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    return processor, config


def _qwen() -> tuple[Any, Any]:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(TEXTS, trainer)
    tokenizer = transformers.Qwen2TokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    special = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    number = tokenizer.convert_tokens_to_ids
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    text = {**TEXT, "vocab_size": len(tokenizer), "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
        chat_template=QWEN_CHAT,
    )
    return processor, config


def _idefics() -> tuple[Any, Any]:
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    raw = _spaced(*special)
    # a begin of its own, beside that of the chat template
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    processor = transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=False
        ),
        tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_CHAT,
    )
    config = transformers.Idefics3Config(
        vision_config={**TOWER, "image_size": 28, "patch_size": 7},
        text_config={**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return processor, config


def _unspaced(*special: str) -> Any:
    """Gemma's kind: no space before the first word."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=460, special_tokens=names, show_progress=False))
    return raw


def _gemma() -> tuple[Any, Any]:
    special = ["<start_of_image>", "<image_soft_token>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"]
    names = dict(zip(("boi_token", "image_token", "eoi_token"), special))
    tokenizer = transformers.GemmaTokenizerFast(tokenizer_object=_unspaced(*special), extra_special_tokens=names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[3:]})
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA_CHAT, image_seq_length=4)
    number = tokenizer.convert_tokens_to_ids
    config = transformers.Gemma3Config(
        vision_config={**TOWER, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        text_config={**TEXT, "vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 64},
        mm_tokens_per_image=4,
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
        image_token_index=number("<image_soft_token>"),
    )
    return processor, config


def _paligemma() -> tuple[Any, Any]:
    tokenizer = transformers.GemmaTokenizerFast(tokenizer_object=_unspaced())
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={
            **TOWER,
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(tokenizer), "head_dim": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    return processor, config
