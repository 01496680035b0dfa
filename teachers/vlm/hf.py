"""Generative teachers from Hugging Face transformers: whatever `AutoModelForImageTextToText` loads as a decoder.

Tested families: LLaVA, Qwen2-VL, Idefics3 (and SmolVLM, whose first release is one), PaliGemma, Gemma 3. Texts are cut
into tokens one at a time and padded here, on the right for reading and on the left for answering, so that neither
depends on what else is in the batch. A model that sees an answer before it has to predict it is refused at loading.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pocketvlm.edge.errors import UsageError, require, unknown_name
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.files import tensors_sha256
from pocketvlm.teachers.hf import explain
from pocketvlm.teachers.hub import network
from pocketvlm.teachers.vlm.base import Pair, Scored, check_asked, vocabulary_id
from pocketvlm.teachers.vlm.prompt import Wording

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# what a processor gives for each token, which is padded here; anything else is about pictures
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
_FILES = "config.json, safetensors weights, preprocessor_config.json and tokenizer.json"
# the largest difference of logits that may come from sums in another order, relative to their spread
_SAME = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


class HfVlm:
    """A frozen image-text-to-text model; `load_hf_vlm` builds it. The protocol is `teachers.vlm.VlmTeacher`.

    batch: pairs to a forward pass. dtype: of weights and activations; what comes out is float32.
    """

    def __init__(
        self, model: Any, processor: Any, wording: Wording, *, name: str, device: torch.device, batch: int
    ) -> None:
        self._model: Any = model.to(device).eval().requires_grad_(False)
        self._processor, self.wording, self.name, self.device, self.batch = processor, wording, name, device, batch
        config: Any = model.config
        text = config.get_text_config()
        self._kind = config.model_type
        head = self._model.get_output_embeddings().weight
        self.dtype: torch.dtype = head.dtype
        self.vocab_size, self.width = int(head.shape[0]), int(text.hidden_size)
        self._cap = getattr(text, "final_logit_softcapping", None)
        image_id = _image_id(config)
        assert image_id is not None, "load_hf_vlm checked that pictures have a token"
        self._image_id = image_id
        self._markers = sorted({"<image>", wording.marker, processor.image_token})
        tokenizer = processor.tokenizer
        self._pad = next(int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        stops = [wording.end, tokenizer.eos_token_id, getattr(model.generation_config, "eos_token_id", None)]
        self._stops = sorted({stop for found in stops for stop in _as_list(found)})
        taken = inspect.signature(model.forward).parameters
        self._keeps = "logits_to_keep" in taken
        # some tokenizers give what the model does not take
        self._per_token = [key for key in _PER_TOKEN if key in taken]
        self.vocabulary = vocabulary_id(tokenizer.get_vocab())
        facts = [wording.prompt("What?"), self.vocabulary, processor.image_processor.to_dict(), str(self.dtype)]
        weights = tensors_sha256(model.state_dict())
        self.fingerprint = hashlib.sha256(
            json.dumps([weights, *facts], sort_keys=True, default=str).encode()
        ).hexdigest()
        self.licences: tuple[tuple[str, str, str], ...] = (
            (f"teacher weights {name.rpartition('/')[2]}", "see the model card", ""),
        )

    @torch.no_grad()
    def answer(self, pixels: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 32) -> list[str]:
        """One greedy answer for each picture and prompt, without special tokens and space around it.

        Args:
            pixels: uint8 [N, H, W, 3] (RGB), of any size that the processor takes. prompts: questions alone.

        Raises:
            UsageError: as `check_asked`.
        """
        check_asked(pixels, prompts, self._markers)
        decode = self._processor.tokenizer.decode
        return [
            decode(ids, skip_special_tokens=True).strip()
            for part in self._parts(len(prompts))
            for ids in self._generate(pixels[part], prompts[part], max_new_tokens)
        ]

    def _generate(self, pixels: Tensor, prompts: Sequence[str], limit: int) -> list[list[int]]:
        """Greedy tokens of each answer, without the one that ends it."""
        rows, inputs = self._inputs(pixels, prompts)
        longest = max(len(row["input_ids"]) for row in rows)
        for key in rows[0]:
            inputs[key] = self._padded(rows, key, longest, left=True)
        with full_float32():
            found = self._model.generate(
                **inputs,
                max_new_tokens=limit,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._stops,
                pad_token_id=self._pad,
            )
        answers = []
        for ids in found[:, longest:].tolist():
            end = next((place for place, number in enumerate(ids) if number in self._stops), len(ids))
            answers.append(ids[:end])
        return answers

    @torch.no_grad()
    def read(self, pixels: Tensor, pairs: Sequence[Pair]) -> list[Scored]:
        """Logits, hidden states and visual tokens for given answers.

        Args:
            pixels: uint8 [N, H, W, 3] (RGB). pairs: N questions with their answers.

        Raises:
            UsageError: as `check_asked`, an empty answer, or a processor that left out the picture.
        """
        check_asked(pixels, [question for question, _ in pairs], self._markers)
        found: list[Scored] = []
        for part in self._parts(len(pairs)):
            answers = [self.wording.answer(question, answer) for question, answer in pairs[part]]
            found += self._read(pixels[part], [question for question, _ in pairs[part]], answers)
        return found

    def _read(
        self, pixels: Tensor, questions: Sequence[str], answers: Sequence[tuple[list[int], tuple[int, ...]]]
    ) -> list[Scored]:
        """answers: tokens and ends of each (`Wording.answer`)."""
        rows, inputs = self._inputs(pixels, questions)
        starts = [len(row["input_ids"]) for row in rows]
        for row, (ids, _) in zip(rows, answers):
            # the last token of an answer is only ever predicted
            for key in row:
                more = ids[:-1] if key == "input_ids" else [int(key == "attention_mask")] * (len(ids) - 1)
                row[key] = row[key] + more
        longest = max(len(row["input_ids"]) for row in rows)
        for key in rows[0]:
            inputs[key] = self._padded(rows, key, longest, left=False)
        if self._kind == "paligemma":
            # left to itself it lets the whole text see itself, answers included
            inputs["attention_mask"] = self._prefix_mask(inputs["attention_mask"], starts)
        first = min(starts) - 1
        keep = {"logits_to_keep": longest - first} if self._keeps else {}
        with full_float32():
            out = self._model(**inputs, **keep, output_hidden_states=True, use_cache=False)
        logits = out.logits if self._keeps else out.logits[:, first:]
        scored = []
        for place, (ids, ends) in enumerate(answers):
            length = starts[place] + len(ids) - 1
            seen = inputs["input_ids"][place, :length].eq(self._image_id)
            if not seen.any():
                raise UsageError(
                    f"the processor of {self.name!r} left no place for the picture in {questions[place][:60]!r}; the "
                    "answer would be about the words alone, so use a template that holds it"
                )
            begin = starts[place] - 1 - first
            scored.append(
                Scored(
                    ids=torch.tensor(ids, device=self.device),
                    ends=ends,
                    logits=logits[place, begin : begin + len(ids)].float(),
                    hidden=out.hidden_states[-1][place, :length].float(),
                    visual=seen.nonzero()[:, 0],
                )
            )
        return scored

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., W] to logits [..., V] in float32; gradients pass through to `hidden`."""
        logits = self._model.get_output_embeddings()(hidden.to(self.dtype)).float()
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _inputs(self, pixels: Tensor, questions: Sequence[str]) -> tuple[list[dict[str, list[int]]], dict[str, Tensor]]:
        """What the processor gives for each token of each prompt, and its tensors of all pictures."""
        rows, pictures = [], []
        for row, question in zip(pixels.cpu().numpy(), questions):
            prompt = self.wording.prompt(question)
            # a picture and not an array, whose first axis could be taken for its colours
            made = self._processor(
                images=[Image.fromarray(row)],
                text=[prompt],
                return_tensors="pt",
                add_special_tokens=self.wording.special(prompt),
            )
            rows.append({key: made[key][0].tolist() for key in self._per_token if key in made})
            pictures.append({key: value for key, value in made.items() if key not in _PER_TOKEN})
        joined = {key: torch.cat([picture[key] for picture in pictures]).to(self.device) for key in pictures[0]}
        return rows, {
            key: value.to(self.dtype) if value.is_floating_point() else value for key, value in joined.items()
        }

    def _prefix_mask(self, kept: Tensor, starts: Sequence[int]) -> Tensor:
        """What is added to attention scores [N, 1, L, L]: prompts are seen by all, what follows by what comes after."""
        place = torch.arange(kept.shape[1], device=self.device)
        begun = place[None] < torch.tensor(starts, device=self.device)[:, None]
        visible = (begun[:, None] | (place[:, None] >= place)) & kept.bool()[:, None]
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill(~visible, lowest)[:, None]

    def _padded(self, rows: list[dict[str, list[int]]], key: str, length: int, *, left: bool) -> Tensor:
        filler = self._pad if key == "input_ids" else 0
        made = []
        for row in rows:
            padding = [filler] * (length - len(row[key]))
            made.append(padding + row[key] if left else row[key] + padding)
        return torch.tensor(made, device=self.device)

    def _parts(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.batch) for start in range(0, count, self.batch))


def load_hf_vlm(
    target: str,
    *,
    template: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    batch: int = 8,
    allow_download: bool = False,
    trust_remote_code: bool = False,
) -> HfVlm:
    """Load an image-text-to-text model from a folder or hub id, from safetensors alone.

    Args:
        target: a folder that `save_pretrained` of model and processor wrote, or a hub id ORG/NAME.
        template: wording that takes the place of the chat template; holds <image>, {question} and {answer} once each.
        dtype: "float32", "bfloat16" or "float16". batch: pairs to a forward pass.
        allow_download: permit the network for a hub id. trust_remote_code: run Python code that comes with it.

    Raises:
        MissingExtraError: transformers is not installed. UnknownNameError: no such dtype or device.
        UsageError: missing files or weights, a model of another kind, no chat template, or one that sees its answers.
    """
    transformers = require("transformers", "hf")
    spec = f"hf-vlm:{target}"
    if dtype not in DTYPES:
        raise unknown_name("dtype of a teacher", dtype, DTYPES)
    if batch < 1:
        raise UsageError(f"{batch} pairs to a forward pass were asked of teacher {spec!r}; give 1 or more")
    where = pick_device(device)
    if not Path(target).is_dir() and (target.count("/") != 1 or target.startswith((".", "/", "~"))):
        raise UsageError(f"{spec!r} is neither a folder here nor a hub id ORG/NAME; check the path")
    options: dict[str, Any] = {"local_files_only": not allow_download, "trust_remote_code": trust_remote_code}
    try:
        with network(allow_download):
            config = transformers.AutoConfig.from_pretrained(target, **options)
            _check_kind(config, spec)
            processor = transformers.AutoProcessor.from_pretrained(target, **options)
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                target, torch_dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **options
            )
    except UsageError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and hub errors alike
        raise UsageError(explain(spec, target, error, allow_download, _FILES)) from error
    if report["missing_keys"]:
        raise UsageError(
            f"{spec!r} lacks {len(report['missing_keys'])} weights (first {sorted(report['missing_keys'])[0]!r}), "
            "which would stay random; use the folder that `save_pretrained` wrote"
        )
    wording = Wording(processor, config.model_type, template, spec)
    teacher = HfVlm(model, processor, wording, name=spec, device=where, batch=batch)
    _refuse_surprises(teacher)
    return teacher


def _check_kind(config: Any, spec: str) -> None:
    if not hasattr(config, "vision_config"):
        raise UsageError(
            f"{spec!r} is of type {config.model_type!r}, which reads no pictures; as a teacher of texts it is named "
            "hf-text:FOLDER, and a generative teacher is LLaVA-, Qwen-VL-, SmolVLM- or PaliGemma-like"
        )
    if _image_id(config) is None or getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{spec!r} is of type {config.model_type!r}, which does not put a picture's tokens before a text that it "
            "continues; visual tokens and answers would not be found, so use a LLaVA-, Qwen-VL-, SmolVLM- or "
            "PaliGemma-like model, or its answers recorded as JSON Lines"
        )


def _image_id(config: Any) -> int | None:
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def _refuse_surprises(teacher: HfVlm) -> None:
    """What is predicted must not depend on what comes after it, and must follow from the hidden states.

    Raises:
        UsageError: it depends on it, for two answers that begin alike, or padding changes what is read, or the last
        hidden states are not those that the head reads.
    """
    grey = torch.full((2, 64, 64, 3), 128, dtype=torch.uint8)
    short, long = "yes", "yes, it is yes and no and yes"
    one = teacher.read(grey[:1], [("Is it?", short)])[0]
    two, other = teacher.read(grey, [("Is it?", long), ("Is it?", short)])
    # the end of the short answer is predicted where the long one goes on
    both = next((i for i, (a, b) in enumerate(zip(one.ids.tolist(), two.ids.tolist())) if a != b), 0) + 1
    allowed = _SAME[teacher.dtype] * float(one.logits.std() + 1e-6)
    if float((teacher.head(one.answer_hidden) - one.logits).abs().max()) > allowed:
        raise UsageError(
            f"{teacher.name!r} does more between its last hidden states and its logits than its output layer, so "
            "hidden states would not be those of its answers; ask it as a black box and record its answers"
        )
    for found in (two.logits[:both], other.logits[:both]):
        if not torch.isfinite(found).all() or float((found - one.logits[:both]).abs().max()) > allowed:
            raise UsageError(
                f"{teacher.name!r} predicts other next tokens when a longer answer follows or stands beside; it would "
                "teach what it was told, so ask it as a black box and record its answers"
            )


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [int(value)]
