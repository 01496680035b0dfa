"""Teachers of texts alone: sentence encoders and language models, whose relations between texts a student can learn.

    minilm                                    built in: all-MiniLM-L6-v2
    hf-text:FOLDER_OR_ID[?pooling=...&...]    any encoder or decoder of transformers' `AutoModel`

Options of `hf-text`: pooling=mean (default; over all tokens of the text), last (its last token, as decoders are pooled)
or first (the class token of BERT-like encoders); layer=N, the hidden states to pool, 0 the embeddings, -1 the last ones
(default: what the model gives, after its final norm); prompt, into which each text is put at {}, such as
prompt=query:+{}. Take what the model's card says. Special tokens are those that the tokenizer adds by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketvlm.edge.contract import identity
from pocketvlm.edge.errors import UsageError, require, unknown_name
from pocketvlm.teachers.base import TeacherOutput, TextTeacher
from pocketvlm.teachers.device import full_float32, pick_device
from pocketvlm.teachers.dual import PROBES
from pocketvlm.teachers.files import make_fingerprint, tensors_sha256
from pocketvlm.teachers.hf import explain
from pocketvlm.teachers.hub import network
from pocketvlm.teachers.lit import weights_licences
from pocketvlm.teachers.minilm import MiniLM, check_text

MAX_TOKENS = 256
POOLINGS = ("mean", "last", "first")
_BATCH = 32


class MiniLMTeacher(TextTeacher):
    """all-MiniLM-L6-v2 as it comes; embedding [N, 384], its own unit vectors."""

    name = "minilm"
    dim = 384

    def __init__(self, model: MiniLM, device: torch.device) -> None:
        self._model = model.to(device)
        weights, tokenizer = model.sha256
        self.fingerprint = make_fingerprint(weights=weights, image=self.image, tokenizer=tokenizer)
        self.space_id = identity(self.name, self.fingerprint)
        self.licences = weights_licences()[1:]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """Texts past 64 tokens are cut.

        Raises:
            BadSampleError: a text is empty or not a string.
        """
        with full_float32():
            return TeacherOutput(self._model.embed(texts))


class HfTextTeacher(TextTeacher):
    """A frozen transformers model, pooled over each text's own tokens; `load_hf_text` builds it.

    limit: tokens after which a text is cut. layer: of the hidden states, or None for the model's own output.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        limit: int,
        pooling: str,
        layer: int | None,
        prompt: str,
        device: torch.device,
    ) -> None:
        self._model: Any = model.to(device).eval().requires_grad_(False)
        config: Any = model.config
        config.use_cache = False  # keys and values of a decoder are for generating
        self._tokenizer, self.limit, self.device, self.name = tokenizer, limit, device, name
        self.pooling, self.layer, self.prompt = pooling, layer, prompt
        self.dim = int(config.hidden_size)
        probes = [torch.tensor(ids, dtype=torch.int64) for ids in self._ids(PROBES)]
        self.fingerprint = make_fingerprint(
            weights=tensors_sha256(model.state_dict()),
            image=self.image,
            tokenizer=tensors_sha256({f"{place:02d}": ids for place, ids in enumerate(probes)}),
            extra={"pooling": pooling, "layer": layer, "prompt": hashlib.sha256(prompt.encode()).hexdigest()},
        )
        self.space_id = identity("hf-text", self.fingerprint)
        self.licences: tuple[tuple[str, str, str], ...] = (
            (f"teacher weights {name.partition('?')[0].rpartition('/')[2]}", "see the model card", ""),
        )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        given = [self.prompt.replace("{}", text) for text in texts]
        return self._tokenizer(given, truncation=True, max_length=self.limit)["input_ids"]

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> TeacherOutput:
        """embedding [N, hidden]: pooled and scaled to unit length; texts past the context are cut.

        Raises:
            BadSampleError: a text is empty or not a string.
        """
        for text in texts:
            check_text(text)
        ids = self._ids(texts)
        out = torch.zeros(len(ids), self.dim, device=self.device)
        # alike lengths together: padding costs as much as words
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            with full_float32():
                out[rows] = self._pooled([ids[row] for row in rows])
        return TeacherOutput(F.normalize(out, dim=-1))

    def _pooled(self, ids: list[list[int]]) -> Tensor:
        """[N, hidden] of N token lists, padded on the right: what a causal model sees of a text does not change."""
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        longest, pad = int(lengths.max()), self._tokenizer.pad_token_id or 0
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=self.device)
        keep = torch.arange(longest, device=self.device)[None] < lengths[:, None]
        found = self._model(input_ids=padded, attention_mask=keep.long(), output_hidden_states=self.layer is not None)
        states = (found.last_hidden_state if self.layer is None else found.hidden_states[self.layer]).float()
        if self.pooling == "first":
            return states[:, 0]
        if self.pooling == "last":
            return states[torch.arange(len(ids), device=self.device), lengths - 1]
        weights = keep.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def load_minilm(device: str | torch.device = "cpu") -> MiniLMTeacher:
    """The built-in sentence encoder.

    Raises:
        MissingExtraError: the packages of the extra `demo` are not installed.
    """
    return MiniLMTeacher(MiniLM.load(), pick_device(device))


def load_hf_text(
    target: str,
    *,
    pooling: str = "mean",
    layer: str | None = None,
    prompt: str = "{}",
    device: str | torch.device = "cpu",
    allow_download: bool = False,
    trust_remote_code: bool = False,
) -> HfTextTeacher:
    """Load a text encoder or a decoder language model from a folder or hub id, in float32, from safetensors alone.

    pooling, layer, prompt: see the module's docstring. trust_remote_code: run Python code that comes with it.

    Raises:
        MissingExtraError: transformers is not installed. UnknownNameError: no such pooling.
        UsageError: missing files, a model that is none of texts alone, a layer that it lacks, a prompt without {}.
    """
    transformers = require("transformers", "hf")
    spec = f"hf-text:{target}"
    if pooling not in POOLINGS:
        raise unknown_name("pooling", pooling, POOLINGS)
    if prompt.count("{}") != 1:
        raise UsageError(
            f"the prompt {prompt!r} of teacher {spec!r} must hold {{}} once, where the text goes; all texts would be "
            "one, so write it like query: {}"
        )
    if not Path(target).is_dir() and (target.count("/") != 1 or target.startswith((".", "/", "~"))):
        raise UsageError(f"{spec!r} is neither a folder here nor a hub id ORG/NAME; check the path")
    options: dict[str, Any] = {"local_files_only": not allow_download, "trust_remote_code": trust_remote_code}
    try:
        with network(allow_download):
            config = transformers.AutoConfig.from_pretrained(target, **options)
            _check_kind(config, spec)
            model, report = transformers.AutoModel.from_pretrained(
                target, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(target, **options)
    except UsageError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and hub errors alike
        files = "config.json, safetensors weights and tokenizer files"
        raise UsageError(explain(spec, target, error, allow_download, files)) from error
    # a masked language model is saved without the pooler, which is not read here
    if absent := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise UsageError(
            f"{spec!r} lacks {len(absent)} weights (first {absent[0]!r}), which would stay random; use the folder that "
            "`save_pretrained` wrote"
        )
    number = None if layer is None else _layer(layer, int(config.num_hidden_layers), spec)
    asked = {"pooling": pooling, "layer": number, "prompt": prompt}
    given = {key: value for key, value in asked.items() if value not in ("mean", None, "{}")}
    context = getattr(config, "max_position_embeddings", None) or MAX_TOKENS
    return HfTextTeacher(
        model,
        tokenizer,
        name=spec + ("?" + "&".join(f"{key}={value}" for key, value in given.items()) if given else ""),
        limit=min(MAX_TOKENS, int(context), int(tokenizer.model_max_length)),
        pooling=pooling,
        layer=number,
        prompt=prompt,
        device=pick_device(device),
    )


def _check_kind(config: Any, spec: str) -> None:
    if hasattr(config, "vision_config"):
        raise UsageError(
            f"{spec!r} is of type {config.model_type!r}, which reads pictures too, and a model of texts alone is "
            "expected; a CLIP or SigLIP is named hf:FOLDER"
        )
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
        raise UsageError(
            f"{spec!r} is of type {config.model_type!r}, and an encoder or a decoder is expected; it has no one "
            "sequence of hidden states to pool, so use a BERT- or Llama-like model"
        )


def _layer(value: str, layers: int, spec: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = layers + 1
    if not -layers - 1 <= number <= layers:
        raise UsageError(
            f"layer {value!r} was asked of teacher {spec!r}, which has hidden states 0 (embeddings) to {layers}, so "
            f"there is nothing to pool; give a number from {-layers - 1} to {layers}, or leave it out"
        )
    return number
