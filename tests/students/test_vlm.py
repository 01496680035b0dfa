"""Generative students: the decoder against transformers' Llama, packed rows against rows of their own, the cache
against no cache, and files that are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketvlm.edge.errors import IntegrityError, UnknownNameError, UsageError, VersionError
from pocketvlm.students.vlm import Vlm, build_vlm, load_vlm, load_vlm_config, save_vlm, train_vlm_tokenizer, vlm_names
from pocketvlm.students.vlm.config import DecoderConfig, VlmConfig
from pocketvlm.students.vlm.decoder import Decoder
from pocketvlm.students.vlm.model import rows_of
from pocketvlm.students.vlm.tokenizer import ASSISTANT, BOS, EOS, SPECIAL, USER, VlmTokenizer

TEXTS = ["What is this?", "a small naïve dolphin", "Wo ist die Büroklammer?", "top left: bus; top right: taxi"]
TOKENIZER = train_vlm_tokenizer(TEXTS, 500, words=["dolphin", "bus", "taxi", "what", "is"])
TINY = {
    "name": "tiny",
    "vision": {"backbone": "mobilenetv4_conv_small_035", "size": 64, "levels": [2]},
    "connector_hidden": 16,
    "decoder": {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 48, "context_length": 40},
}


@pytest.fixture(scope="module")
def model() -> Vlm:
    built = build_vlm(VlmConfig.model_validate(TINY), TOKENIZER, seed=3).eval()
    with torch.no_grad():  # larger than at the start, so that positions and masks matter
        for weight in built.decoder.layers.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    return built


def _pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_the_decoder_is_transformers_llama() -> None:
    import transformers

    config = DecoderConfig(width=48, layers=3, heads=6, kv_heads=2, hidden=80, context_length=64, rope_theta=500.0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            rope_theta=500.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            max_position_embeddings=64,
            initializer_range=0.15,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15 + (weight.ndim == 1))
    ours = Decoder(config, 97)
    ours.load_state_dict(theirs.model.state_dict())
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(20).expand(2, -1)
    visible = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        expected = theirs(ids).logits
        found = ours.logits(ours(ours.embed_tokens(ids), positions, visible))
        cached, *cache = ours.step(ours.embed_tokens(ids[:, :13]), positions[:, :13], *ours.empty_cache(2))
        one_by_one = [cached]
        for place in range(13, 20):
            hidden, *cache = ours.step(ours.embed_tokens(ids[:, place : place + 1]), positions[:, place, None], *cache)
            one_by_one.append(hidden)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(torch.cat(one_by_one, 1)), expected, rtol=1e-5, atol=1e-5)


def _talk(question: str, answer: str) -> tuple[list[int], list[int]]:
    tokenizer = VlmTokenizer(TOKENIZER)
    return tokenizer.question(question), tokenizer.answer(answer)


def test_packed_conversations_are_as_conversations_alone(model: Vlm) -> None:
    pixels = _pictures(2)
    talks = [[_talk("What is this?", "bus"), _talk("bus?", "a taxi")], [_talk("dolphin", "is what")]]
    with torch.no_grad():
        packed = model(pixels, rows_of(talks, 24))
        alone = [
            model(pixels[row : row + 1], rows_of([[talk]], 16)) for row, found in enumerate(talks) for talk in found
        ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    # and an answer does depend on the picture
    with torch.no_grad():
        assert (model(_pictures(2, seed=9), rows_of(talks, 24)) - packed).abs().max() > 1e-3


def test_rows_hold_what_the_template_says(model: Vlm) -> None:
    (question, answer), second = _talk("What is this?", "bus"), _talk("taxi?", "is")
    rows = rows_of([[(question, answer), second], [second]], 20)
    assert (question[0], question[-1], answer[-1]) == (USER, ASSISTANT, EOS)
    whole = [*question, *answer[:-1], *second[0], *second[1][:-1]]
    assert rows.ids[0, : len(whole)].tolist() == whole
    assert rows.ids[0, len(whole) :].eq(0).all()
    assert rows.turns[0].tolist() == [0] * len(question + answer[:-1]) + [1] * (len(second[0]) + len(second[1]) - 1) + [
        -1
    ] * (20 - len(whole))
    assert rows.positions[0, len(question) + len(answer) - 1] == 0
    # answers alone are learnt, the first token from <ASSISTANT>
    assert rows.targets.tolist() == [*answer, *second[1], *second[1]]
    assert rows.ids.flatten()[rows.places[0]] == ASSISTANT
    for place, target in zip(rows.places, rows.targets):
        if target != EOS:
            assert rows.ids.flatten()[place + 1] == target
    # what does not fit is left out, but not the first
    assert rows_of([[(question, answer), second]], len(question) + len(answer) - 1).targets.tolist() == answer
    with pytest.raises(UsageError, match="the decoder has places for 35"):
        model.hidden(_pictures(2), rows_of([[second], [second]], 36))
    with pytest.raises(UsageError, match="a row holds 3"):
        rows_of([[(question, answer)]], 3)


def test_the_loss_reaches_every_part(model: Vlm) -> None:
    rows = rows_of([[_talk("What is this?", "bus")]], 12)
    torch.nn.functional.cross_entropy(model(_pictures(1), rows), rows.targets).backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # timm's MobileNet has layers after its pooling, which no place reaches
    without = [name for name in without if "_head" not in name]
    model.zero_grad()
    assert without == []


def test_greedy_answers_are_those_of_the_whole_sequence_again(model: Vlm) -> None:
    pixels = _pictures(3, seed=4)
    prompts = ["What is this?", "<image>\nbus", "is a taxi top left of the dolphin?"]
    found = model.generate(pixels, prompts, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        said: list[int] = []
        for _ in range(6):
            # an answer of one token more asks for the next one
            rows = rows_of([[(model.prompt_ids(prompt), [*said, EOS])]], 30)
            with torch.no_grad():
                token = int(model(pixels[row : row + 1], rows)[-1].argmax())
            if token == EOS:
                break
            said.append(token)
        assert found[row] == model.tokenizer.decode(said)
    assert len(set(found)) > 1
    assert [model.generate(pixels[row, None], [prompts[row]], max_new_tokens=6)[0] for row in range(3)] == found


def test_prompts_that_cannot_be_answered_are_refused(model: Vlm) -> None:
    pixels = _pictures(1)
    for prompts, said in [
        (["<image> a <image>"], "holds <image> 2 times"),
        (["<image> "], "asks nothing"),
        (["bus " * 60], "the cache holds"),
        (["bus", "taxi"], "2 prompts were given for 1 pictures"),
    ]:
        with pytest.raises(UsageError, match=said):
            model.generate(pixels, prompts)
    # as long as the cache allows, and then as much of an answer as there is room for
    longest = "bus " * (40 - model.prefix - 3)
    assert len(model.tokenizer.encode(model.generate(pixels, [longest], max_new_tokens=9)[0])) <= 1


def test_the_tokenizer_spells_everything_and_special_tokens_only_by_the_template() -> None:
    tokenizer = VlmTokenizer(TOKENIZER)
    for text in ("what is this?", "büroklammer; naïve: bus", "日本 🐬"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode('Is "Dolphin"?') == tokenizer.encode("is dolphin?")
    assert len(tokenizer.encode("dolphin bus")) == 2
    assert min(tokenizer.encode(" ".join(SPECIAL))) >= len(SPECIAL)
    assert tokenizer.decode([BOS, *tokenizer.encode("bus"), EOS]) == "bus"
    assert train_vlm_tokenizer(TEXTS, 500, words=["dolphin", "bus", "taxi", "what", "is"]) == TOKENIZER
    for arguments, said in [(([], 500), "no text"), ((TEXTS, 280), "cannot hold")]:
        with pytest.raises(UsageError, match=said):
            train_vlm_tokenizer(*arguments)
    with pytest.raises(UsageError, match=r"not a tokenizer\.json"):
        VlmTokenizer(b"{}")
    other = json.loads(TOKENIZER)
    other["model"]["vocab"][1][0] = "<S>"
    with pytest.raises(UsageError, match="does not begin with"):
        VlmTokenizer(json.dumps(other).encode())


@pytest.mark.parametrize("name", vlm_names())
def test_named_sizes_have_the_size_of_their_name(name: str) -> None:
    config = load_vlm_config(name)
    small = build_vlm(config, TOKENIZER, device="meta")
    rest = (config.decoder.vocab_size - small.tokenizer.vocab_size) * config.decoder.width
    millions = (sum(weight.numel() for weight in small.parameters()) + rest) / 1e6
    assert millions == pytest.approx(float(name.removeprefix("vlm-").removesuffix("m")), rel=0.025)
    assert small.decoder.embed_tokens.weight.is_meta
    # the whole model runs, in shapes
    pixels = torch.zeros(2, config.vision.size, config.vision.size, 3, dtype=torch.uint8, device="meta")
    assert small.picture(pixels).shape == (2, small.prefix, config.decoder.width)


def test_configurations_that_cannot_be_are_refused_in_a_sentence() -> None:
    with pytest.raises(UnknownNameError, match="vlm-3m"):
        load_vlm_config("vlm-3")
    for key, value, said in [
        ("decoder.heads", 5, "do not go together"),
        ("decoder.width", "wide", "decoder.width is 'wide'"),
        ("decoder.wdth", 3, "did you mean 'decoder.width'"),
        ("name.inner", 3, "goes below 'name'"),
        ("vision.levels", [9], "gives no maps"),
        ("vision.backbone_args", {"depth": 3}, "does not take"),
    ]:
        with pytest.raises(UsageError, match=said):
            build_vlm(load_vlm_config("vlm-3m", {key: value}), TOKENIZER)
    with pytest.raises(UsageError, match="leaves no room for text"):
        build_vlm(load_vlm_config("vlm-3m", {"decoder.context_length": 40}), TOKENIZER, device="meta")
    with pytest.raises(UnknownNameError, match="timm model"):
        build_vlm(load_vlm_config("vlm-3m", {"vision.backbone": "mobilenetv9"}), TOKENIZER)


def test_equal_seeds_give_equal_weights_and_leave_the_generator(model: Vlm) -> None:
    config = VlmConfig.model_validate(TINY)
    torch.manual_seed(5)
    first = build_vlm(config, TOKENIZER, seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    second, other = build_vlm(config, TOKENIZER, seed=1), build_vlm(config, TOKENIZER, seed=2)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters()))
    assert all(torch.equal(one, two) for one, two, _ in pairs)
    assert any(not torch.equal(one, three) for one, _, three in pairs)


def test_what_is_saved_is_loaded(model: Vlm, tmp_path: Path) -> None:
    folder = save_vlm(model, tmp_path / "one", file_bytes=60_000)
    assert len(list(folder.glob("weights-*.safetensors"))) > 3
    again = load_vlm(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert again.generate(_pictures(1), ["What is this?"]) == model.generate(_pictures(1), ["What is this?"])
    half = load_vlm(save_vlm(model, tmp_path / "half", dtype=torch.bfloat16))
    assert sum(f.stat().st_size for f in (tmp_path / "half").glob("weights*")) < 0.6 * sum(
        f.stat().st_size for f in folder.glob("weights*")
    )
    weight = "decoder.embed_tokens.weight"
    assert half.state_dict()[weight].dtype == torch.float32
    torch.testing.assert_close(half.state_dict()[weight], model.state_dict()[weight], rtol=2**-8, atol=0)
    with pytest.raises(UsageError, match="is not empty"):
        save_vlm(model, folder)


def test_damaged_files_are_refused(model: Vlm, tmp_path: Path) -> None:
    folder = save_vlm(model, tmp_path / "one")
    with pytest.raises(UsageError, match=r"holds no vlm\.json"):
        load_vlm(tmp_path)
    weights, manifest = folder / "weights-1.safetensors", folder / "vlm.json"
    good, said = weights.read_bytes(), manifest.read_text()
    weights.write_bytes(good[:-1] + b"x")
    with pytest.raises(IntegrityError, match="was changed or cut off"):
        load_vlm(folder)
    weights.unlink()
    with pytest.raises(IntegrityError, match="lacks weights-1"):
        load_vlm(folder)
    weights.write_bytes(good)
    manifest.write_text(said.replace('"hidden": 48', '"hidden": 64'))
    with pytest.raises(IntegrityError, match="do not fit the configuration"):
        load_vlm(folder)
    manifest.write_text(said.replace('"schema_version": "1.0"', '"schema_version": "2.0"'))
    with pytest.raises(VersionError, match="upgrade pocketvlm"):
        load_vlm(folder)
    manifest.write_text("{")
    with pytest.raises(IntegrityError, match="is damaged"):
        load_vlm(folder)
