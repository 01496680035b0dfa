"""Generative teachers of transformers against transformers itself, on tiny random models of five families."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from hf_vlm_toys import FAMILIES, drop_chat_template, save_toy

from pocketvlm.edge.errors import UnknownNameError, UsageError
from pocketvlm.teachers.vlm import HfVlm, VlmTeacher, load_hf_vlm, vocabulary_id
from pocketvlm.teachers.vlm import hf as hf_module

PAIRS = [
    ("What is at the top left?", "A red dog"),
    ("Is it?", "no"),
    ("What are the things in the picture, and which is the Löwe?", "Ein Bär und zwei 犬, yes"),
]


def _pictures(count: int = 3, side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlm")
    return {family: save_toy(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def teachers(toys: dict[str, Path]) -> dict[str, HfVlm]:
    return {family: load_hf_vlm(str(folder)) for family, folder in toys.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_is_what_the_model_says(teachers: dict[str, HfVlm], toys: dict[str, Path], family: str) -> None:
    """Its own forward pass over a text that transformers' processor made whole, one pair at a time."""
    teacher, pictures = teachers[family], _pictures()
    assert isinstance(teacher, VlmTeacher)
    model = transformers.AutoModelForImageTextToText.from_pretrained(toys[family]).eval()
    processor = transformers.AutoProcessor.from_pretrained(toys[family])
    for row, (question, answer), found in zip(pictures, PAIRS, teacher.read(pictures, PAIRS)):
        picture = Image.fromarray(row.numpy())
        inputs: dict[str, Any]
        if family == "paligemma":
            # the processor's own way to training examples, with its masks
            inputs = dict(processor(images=picture, text=f"<image>{question}", suffix=answer, return_tensors="pt"))
        else:
            asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            said = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
            text = processor.apply_chat_template([*asked, *said], tokenize=False)
            begins = text.startswith(str(processor.tokenizer.bos_token))
            inputs = dict(processor(images=[picture], text=[text], return_tensors="pt", add_special_tokens=not begins))
            if family != "gemma3":
                inputs.pop("token_type_ids", None)
        whole = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
        count = len(found.ids)
        end = max(i for i in range(count, len(whole) + 1) if whole[i - count : i] == found.ids.tolist())
        torch.testing.assert_close(found.logits, out.logits[0, end - count - 1 : end - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.hidden, out.hidden_states[-1][0, : end - 1], rtol=1e-4, atol=1e-4)
        assert processor.tokenizer.decode(found.ids[:-1]).strip() == answer
        assert found.visual.tolist() == [i for i, n in enumerate(whole) if n == model.config.image_token_id]
        assert len(found.visual) == 4
        assert found.visual_hidden.shape == (4, 32)
        assert len(found.question_hidden) + len(found.answer_hidden) == len(found.hidden)
        torch.testing.assert_close(teacher.head(found.answer_hidden), found.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_with_padding_is_the_same_as_one_at_a_time(teachers: dict[str, HfVlm], family: str) -> None:
    teacher, pictures = teachers[family], _pictures()
    together = teacher.read(pictures, PAIRS)
    for place, pair in enumerate(PAIRS):
        alone = teacher.read(pictures[place : place + 1], [pair])[0]
        assert torch.equal(alone.ids, together[place].ids)
        torch.testing.assert_close(alone.logits, together[place].logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.hidden, together[place].hidden, rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.visual, together[place].visual)
    asked = [question for question, _ in PAIRS]
    answers = teacher.answer(pictures, asked, max_new_tokens=6)
    assert answers == [teacher.answer(pictures[i : i + 1], [asked[i]], max_new_tokens=6)[0] for i in range(3)]
    assert len(set(answers)) > 1
    # pictures matter, and belong to their own questions
    other = teacher.read(pictures.flip(0), PAIRS)
    assert not torch.allclose(other[0].logits, together[0].logits, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_answers_is_what_it_finds_likeliest(teachers: dict[str, HfVlm], family: str) -> None:
    """Greedy tokens of generation against the reader, token by token: neither sees what it has to predict."""
    teacher, pictures = teachers[family], _pictures()
    questions = [question for question, _ in PAIRS]
    said = teacher._generate(pictures, questions, 6)
    assert max(map(len, said)) >= 4
    given = [([*ids, teacher.wording.end], tuple(range(len(ids) + 1))) for ids in said]
    for ids, found in zip(said, teacher._read(pictures, questions, given)):
        assert found.logits.argmax(-1)[: len(ids)].tolist() == ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_count_whole_characters(teachers: dict[str, HfVlm], family: str) -> None:
    teacher = teachers[family]
    tokenizer = teacher._processor.tokenizer
    for question, answer in [*PAIRS, ("What?", "犬犬 und 犬"), ("What?", "Löwe")]:
        ids, ends = teacher.wording.answer(question, answer)
        assert ends[-1] == len(answer) + 1
        assert list(ends) == sorted(ends)
        assert len(ends) == len(ids)
        for count, end in enumerate(ends[:-1], start=1):
            written = tokenizer.decode(ids[:count]).lstrip()
            if "\ufffd" not in written:
                assert written in (answer[:end], answer[:end].rstrip()), (family, ids, ends)


def test_spaces_before_an_answer_belong_to_it_and_a_begin_comes_once(teachers: dict[str, HfVlm]) -> None:
    llava, idefics = teachers["llava"], teachers["idefics3"]
    assert llava.wording.prompt("Is it?").endswith("ASSISTANT:")
    first = llava._processor.tokenizer.convert_ids_to_tokens(llava.wording.answer("Is it?", "no")[0][0])
    assert first.startswith("▁")
    for teacher in (llava, idefics):
        rows, _ = teacher._inputs(_pictures(1), ["Is it?"])
        begin = teacher._processor.tokenizer.bos_token_id
        assert rows[0]["input_ids"].count(begin) == 1
        assert rows[0]["input_ids"][0] == begin


def test_a_template_of_the_user_takes_the_place_of_a_missing_one(toys: dict[str, Path], tmp_path: Path) -> None:
    folder = drop_chat_template(save_toy("llava", tmp_path / "bare"))
    with pytest.raises(UsageError, match="without a chat template"):
        load_hf_vlm(str(folder))
    for template in ("<image>{question}", "<image>{answer} {question}", "<image>{question}{question}{answer}"):
        with pytest.raises(UsageError, match="once each, the answer behind both"):
            load_hf_vlm(str(folder), template=template)
    given = load_hf_vlm(str(folder), template="USER: <image>\n{question} ASSISTANT: {answer}</s>")
    own = load_hf_vlm(str(toys["llava"]))
    one, two = given.read(_pictures(1), PAIRS[:1])[0], own.read(_pictures(1), PAIRS[:1])[0]
    assert one.ids.tolist() == two.ids.tolist()
    torch.testing.assert_close(one.logits, two.logits)
    assert given.vocabulary == own.vocabulary
    turn = "<bos><start_of_turn>user\n<image>{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n"
    both = [load_hf_vlm(str(toys["gemma3"]), template=text) for text in (turn, None)]
    one, two = (teacher.read(_pictures(1), PAIRS[:1])[0] for teacher in both)
    torch.testing.assert_close(one.logits, two.logits)
    # without an end in the template, that of the tokenizer
    bare = load_hf_vlm(str(folder), template="USER: <image>\n{question} ASSISTANT: {answer}")
    assert bare.wording.end == own.wording.end


def test_who_sees_the_answer_is_refused(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """PaliGemma in transformers looks ahead unless told not to."""
    real = hf_module.HfVlm.__init__

    def forgetful(self: HfVlm, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self._kind = "anything"

    monkeypatch.setattr(hf_module.HfVlm, "__init__", forgetful)
    with pytest.raises(UsageError, match="teach what it was told"):
        load_hf_vlm(str(toys["paligemma"]))


def test_hidden_states_that_its_head_does_not_read_are_refused(
    toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfVlm, "head", lambda self, hidden: self._model.get_output_embeddings()(hidden * 1.5))
    with pytest.raises(UsageError, match="between its last hidden states and its logits"):
        load_hf_vlm(str(toys["llava"]))


def test_an_answer_is_found_behind_what_the_template_writes_before_it(toys: dict[str, Path]) -> None:
    """An answer of one letter that the template has, too."""
    template = "USER: <image>\n{question} ASSISTANT: {answer}</s>"
    wording = load_hf_vlm(str(toys["llava"]), template=template.replace("{answer}", "no note: {answer}")).wording
    prompt, rest = wording._texts("Is it?", "n")
    assert (prompt[-8:], rest) == ("no note:", " n</s>")
    chat = load_hf_vlm(str(toys["llava"])).wording
    chat._processor.chat_template = chat._processor.chat_template.replace(
        "{{ part['text'] }}", "no: {{ part['text'] }}"
    )
    later = type(chat)(chat._processor, "llava", None, "x")
    ids, ends = later.answer("Is it?", "n")
    assert ends == (*[0] * (len(ends) - 2), 1, 2)
    assert len(ids) == len(ends) > 3


def test_half_precision_and_small_batches(toys: dict[str, Path], teachers: dict[str, HfVlm]) -> None:
    half = load_hf_vlm(str(toys["idefics3"]), dtype="bfloat16", batch=2)
    found, wanted = half.read(_pictures(), PAIRS), teachers["idefics3"].read(_pictures(), PAIRS)
    for one, two in zip(found, wanted):
        assert one.logits.dtype == one.hidden.dtype == torch.float32
        torch.testing.assert_close(one.logits, two.logits, rtol=0.1, atol=0.3)
    assert half.fingerprint != teachers["idefics3"].fingerprint
    assert half.vocabulary == teachers["idefics3"].vocabulary
    assert len({teacher.vocabulary for teacher in teachers.values()}) == len(FAMILIES)


def test_the_head_passes_gradients_to_hidden_states_alone(teachers: dict[str, HfVlm]) -> None:
    hidden = torch.randn(3, 32, requires_grad=True)
    teachers["llava"].head(hidden).sum().backward()
    assert hidden.grad is not None
    assert all(not weight.requires_grad for weight in teachers["llava"]._model.parameters())


def test_what_does_not_belong_together_is_refused(teachers: dict[str, HfVlm]) -> None:
    teacher = teachers["llava"]
    with pytest.raises(UsageError, match="2 questions were given for 3 pictures"):
        teacher.answer(_pictures(), ["a", "b"])
    with pytest.raises(UsageError, match="a question is empty"):
        teacher.answer(_pictures(1), [" "])
    for name, marker in (("llava", "<image>"), ("qwen2_vl", "<|image_pad|>"), ("gemma3", "<start_of_image>")):
        with pytest.raises(UsageError, match="would stand there twice"):
            teachers[name].answer(_pictures(1), [f"{marker} What?"])
    with pytest.raises(UsageError, match=r"uint8 \[N, H, W, 3\]"):
        teacher.answer(_pictures(1).float(), ["What?"])
    with pytest.raises(UsageError, match="the answer to 'What\\?' is empty"):
        teacher.read(_pictures(1), [("What?", " ")])


def test_what_cannot_be_loaded_says_why(toys: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder here nor a hub id"):
        load_hf_vlm("nowhere")
    with pytest.raises(UsageError, match="nothing is downloaded unasked"):
        load_hf_vlm("somebody/something")
    with pytest.raises(UnknownNameError, match="bfloat16"):
        load_hf_vlm(str(toys["llava"]), dtype="bfloat")
    with pytest.raises(UsageError, match="0 pairs to a forward pass"):
        load_hf_vlm(str(toys["llava"]), batch=0)
    transformers.LlamaConfig(hidden_size=8).save_pretrained(tmp_path / "text")
    with pytest.raises(UsageError, match="which reads no pictures"):
        load_hf_vlm(str(tmp_path / "text"))
    transformers.CLIPConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(UsageError, match="does not put a picture's tokens before a text"):
        load_hf_vlm(str(tmp_path / "clip"))
    transformers.LlavaConfig().save_pretrained(tmp_path / "empty")
    with pytest.raises(UsageError, match="safetensors weights"):
        load_hf_vlm(str(tmp_path / "empty"))


def test_a_vocabulary_is_known_by_every_token_and_number() -> None:
    assert vocabulary_id({"a": 0, "b": 1}) == vocabulary_id({"b": 1, "a": 0})
    assert vocabulary_id({"a": 0, "b": 1}) != vocabulary_id({"a": 1, "b": 0})
