"""Teachers of texts alone, against transformers itself, one text at a time and without padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from pocketvlm.edge.errors import BadSampleError, UsageError
from pocketvlm.teachers import load_teacher
from pocketvlm.teachers.base import Teacher, TextTeacher
from pocketvlm.teachers.cache_build import build_cache
from pocketvlm.teachers.minilm import MiniLM

from .conftest import make_samples

TEXTS = ["a red fox", "the quick brown fox jumps over the lazy dog", "dog", "word " * 40, "a dog and a fox"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"max_position_embeddings": 24}


def _tokenizer(folder: Path, *, ends: bool) -> int:
    """Words, with or without [CLS] and [SEP] around them; the second kind has no padding token, as GPT's."""
    raw = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    raw.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    if ends:
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]"} if ends else {"unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **named).save_pretrained(folder)
    return raw.get_vocab_size()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("hf-text"), {}
    for name in ("bert", "llama", "gpt2"):
        folder = root / name
        vocabulary = _tokenizer(folder, ends=name == "bert")
        torch.manual_seed(0)
        if name == "bert":
            # as checkpoints of masked language models are: with a head, and without the pooler
            model: Any = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=vocabulary, **SMALL))
        elif name == "llama":
            config = transformers.LlamaConfig(vocab_size=vocabulary, num_key_value_heads=1, **SMALL)
            model = transformers.LlamaForCausalLM(config)
        else:
            model = transformers.GPT2Model(
                transformers.GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=3, n_head=2, n_positions=24)
            )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        found[name] = folder
    return found


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_embeddings_are_the_models_own(folders: dict[str, Path], name: str, pooling: str) -> None:
    teacher = load_teacher(f"hf-text:{folders[name]}?pooling={pooling}")
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, TextTeacher)
    model = transformers.AutoModel.from_pretrained(folders[name]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    found = teacher.encode_texts(TEXTS).embedding
    assert found.shape == (5, teacher.dim) == (5, 16)
    for text, row in zip(TEXTS, found):
        ids = tokenizer(text)["input_ids"]
        ids = ids if len(ids) <= 24 else [*ids[: 23 if name == "bert" else 24], *([3] if name == "bert" else [])]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        wanted = {"mean": states.sum(0) / len(ids), "last": states[len(ids) - 1], "first": states[0]}[pooling]
        torch.testing.assert_close(row, wanted / wanted.norm(), rtol=1e-4, atol=1e-5)


def test_a_layer_and_a_prompt(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    teacher = load_teacher(f"hf-text:{folder}?layer=-2&prompt=the+dog+{{}}&pooling=last")
    assert teacher.name == f"hf-text:{folder}?pooling=last&layer=-2&prompt=the dog {{}}"
    ids = transformers.AutoTokenizer.from_pretrained(folder)("the dog a red fox")["input_ids"]
    with torch.no_grad():
        out = transformers.AutoModel.from_pretrained(folder)(torch.tensor([ids]), output_hidden_states=True)
    wanted = out.hidden_states[2][0, -1]
    torch.testing.assert_close(teacher.encode_texts(["a red fox"]).embedding[0], wanted / wanted.norm())
    specs = ["", "?pooling=last", "?layer=1", "?layer=2", "?prompt=a+{}"]
    assert len({load_teacher(f"hf-text:{folder}{spec}").fingerprint for spec in specs}) == 5


def test_the_built_in_sentence_encoder() -> None:
    teacher = load_teacher("minilm")
    assert torch.equal(teacher.encode_texts(TEXTS).embedding, MiniLM.load().embed(TEXTS))
    with pytest.raises(BadSampleError, match="empty text"):
        teacher.encode_texts(["a", " "])


def test_pictures_are_refused_and_texts_are_cached(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(f"hf-text:{folders['bert']}")
    cache = build_cache(teacher, [], TEXTS, tmp_path / "cache")
    assert (cache.info.dim, cache.info.feature_dim, len(cache)) == (16, 0, 0)
    torch.testing.assert_close(cache.text(TEXTS[:2]), teacher.encode_texts(TEXTS[:2]).embedding)
    with pytest.raises(UsageError, match="which reads texts only, so there is nothing to compare"):
        build_cache(teacher, make_samples(2), TEXTS, tmp_path / "other")


def test_mistakes_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    llama = folders["llama"]
    with pytest.raises(UsageError, match=r"layer '4' was asked .* hidden states 0 \(embeddings\) to 3"):
        load_teacher(f"hf-text:{llama}?layer=4")
    with pytest.raises(UsageError, match="layer 'last' was asked"):
        load_teacher(f"hf-text:{llama}?layer=last")
    with pytest.raises(UsageError, match=r"must hold \{\} once, where the text goes"):
        load_teacher(f"hf-text:{llama}?prompt=query")
    with pytest.raises(UsageError, match="is not on this machine and nothing is downloaded unasked"):
        load_teacher("hf-text:nobody/nothing")
    clip = transformers.CLIPConfig().to_dict() | {"architectures": ["CLIPModel"]}
    t5 = transformers.T5Config().to_dict()
    for value, words in ((clip, "which reads pictures too"), (t5, "an encoder or a decoder is expected")):
        folder = tmp_path / value["model_type"]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(value, default=str))
        with pytest.raises(UsageError, match=words):
            load_teacher(f"hf-text:{folder}")


def test_weights_that_lack_or_are_pickled_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folders["gpt2"], copy)
    state = load_file(copy / "model.safetensors")
    del state["ln_f.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights \(first 'ln_f.weight'\)"):
        load_teacher(f"hf-text:{copy}")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors weights and tokenizer files are expected"):
        load_teacher(f"hf-text:{copy}")


def test_code_of_a_checkpoint_needs_the_flag(folders: dict[str, Path], tmp_path: Path) -> None:
    copy, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(folders["llama"], copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "pv_text", "auto_map": {"AutoConfig": "custom.C", "AutoModel": "custom.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "custom.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(UsageError):
        load_teacher(f"hf-text:{copy}")
    assert not marker.exists()
