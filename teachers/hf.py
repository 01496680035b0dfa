"""Teachers from Hugging Face transformers: CLIP, SigLIP and fixed-resolution SigLIP 2.

    hf:FOLDER        a folder made by `save_pretrained` (config.json, weights, preprocessor_config.json, tokenizer)
    hf:ORG/NAME      a hub id; read from the local cache, or downloaded with allow_download

Fixed-resolution SigLIP 2 checkpoints carry model_type "siglip" and are loaded as such; the variable-resolution
("NaFlex") ones take patch lists instead of a picture and are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketvlm.edge.contract import ImageSpec, TextSpec
from pocketvlm.edge.errors import UsageError, require, unknown_name
from pocketvlm.teachers.device import pick_device
from pocketvlm.teachers.dual import DualEncoderTeacher
from pocketvlm.teachers.hub import ASK, network
from pocketvlm.teachers.open_clip import fast_tokenizer_json

_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_FILTERS = {2: "bilinear", 3: "bicubic"}


class HfTeacher(DualEncoderTeacher):
    """A frozen transformers CLIP or SigLIP; `load_hf` builds it. tokenizer: transformers' own."""

    def __init__(self, model: nn.Module, tokenizer: Any, context_length: int, **kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        super().__init__(model, **kwargs)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, context_length], padded to the full context as both families were trained."""
        return self._batch(texts)["input_ids"]

    def _batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        # token types mean nothing to these models, and their forward does not take them
        return {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}

    def _image_outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        model: Any = self.model
        if not hasattr(model, "vision_model"):
            return joint(model.get_image_features(pixel_values=pixels)), None
        return self._image_tokens(pixels)[:2]

    def _image_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        model: Any = self.model
        if not hasattr(model, "vision_model"):
            return joint(model.get_image_features(pixel_values=pixels)), None, None
        out = model.vision_model(pixel_values=pixels)
        pooled, tokens = out.pooler_output, out.last_hidden_state
        # CLIP's first token is the class token; SigLIP has none, and its attention pooling ends in the joint space
        projected = hasattr(model, "visual_projection")
        embedding = model.visual_projection(pooled) if projected else pooled
        return embedding, pooled, tokens[:, 1:] if projected else tokens

    def _text_outputs(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        model: Any = self.model
        batch = {key: value.to(self.device) for key, value in self._batch(texts).items()}
        if not hasattr(model, "text_model"):
            return joint(model.get_text_features(**batch)), None
        pooled = model.text_model(**batch).pooler_output
        return (model.text_projection(pooled) if hasattr(model, "text_projection") else pooled), pooled

    def _build_text(self) -> tuple[bytes, TextSpec]:
        if not getattr(self.tokenizer, "is_fast", False):
            raise UsageError(
                f"the tokenizer of {self.name} exists only as Python code ({type(self.tokenizer).__name__}), which a "
                "phone cannot run; use a checkpoint that ships tokenizer.json, or export with baked-in labels"
            )
        return fast_tokenizer_json(self.tokenizer, self.context_length)


def load_hf(
    target: str,
    *,
    device: str | torch.device = "cpu",
    allow_download: bool = False,
    trust_remote_code: bool = False,
) -> HfTeacher:
    """Load a CLIP or SigLIP folder or hub id, in float32.

    trust_remote_code: run Python code that comes with the checkpoint, for model types that transformers lacks;
    off unless asked for.

    Raises:
        MissingExtraError: transformers is not installed.
        UsageError: missing files, a model type that is not a dual encoder, or preprocessing that an `ImageSpec`
        cannot express, or files that would need the network.
    """
    transformers = require("transformers", "hf")
    torch_device = pick_device(device)
    if not Path(target).is_dir() and (target.count("/") != 1 or target.startswith((".", "/", "~"))):
        raise UsageError(f"'hf:{target}' is neither a folder here nor a hub id ORG/NAME; check the path")
    options: dict[str, Any] = {"local_files_only": not allow_download, "trust_remote_code": trust_remote_code}
    try:
        with network(allow_download):
            config = transformers.AutoConfig.from_pretrained(target, **options)
            model_class = _model_class(transformers, config, target, trust_remote_code)
            model, report = model_class.from_pretrained(
                target, torch_dtype=torch.float32, output_loading_info=True, **options
            )
            processor = transformers.AutoImageProcessor.from_pretrained(target, use_fast=False, **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(target, **options)
    except UsageError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError and hub errors alike
        files = "config.json, weights, preprocessor_config.json and tokenizer files"
        raise UsageError(explain(f"hf:{target}", target, error, allow_download, files)) from error
    if report["missing_keys"]:
        raise UsageError(
            f"'hf:{target}' lacks {len(report['missing_keys'])} weights (first {sorted(report['missing_keys'])[0]!r}), "
            "which would stay random; use the folder that `save_pretrained` wrote"
        )
    image = image_spec(processor.to_dict(), target)
    text_config = config.text_config
    bias = getattr(model, "logit_bias", None)
    return HfTeacher(
        model,
        tokenizer,
        int(text_config.max_position_embeddings),
        name=f"hf:{target}",
        image=image,
        dim=_width(model, image),
        logit_scale=math.exp(float(model.logit_scale.detach())),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        licences=((f"teacher weights hf:{Path(target).name}", "see the model card", ""),),
        device=torch_device,
    )


def joint(output: Any) -> Tensor:
    """The joint embeddings [B, D] that `get_image_features` and `get_text_features` answer with.

    A tensor up to transformers 4, from 5 on an output whose `pooler_output` they are.
    """
    return output if isinstance(output, Tensor) else output.pooler_output


def image_spec(config: dict[str, Any], name: str) -> ImageSpec:
    """A `preprocessor_config.json` (CLIP or SigLIP image processor) as an `ImageSpec`.

    Known difference: transformers drops the alpha channel of transparent pictures, the contract paints it white.
    CLIP's slow processor cuts the centre at floor((n - size) / 2), the contract (like torchvision, OpenAI's own
    code and the fast processor) rounds half to even: one pixel apart for some odd remainders.

    Raises:
        UsageError: steps that `ImageSpec` does not have.
    """

    def refuse(what: str) -> UsageError:
        return UsageError(
            f"'hf:{name}' preprocesses pictures in a way that the contract cannot express ({what}); "
            "use a checkpoint with square, bilinear or bicubic resizing to 0..1"
        )

    if not config.get("do_resize", True) or not config.get("do_rescale", True) or not config.get("do_normalize", True):
        raise refuse("a step is switched off")
    if abs(float(config.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9:
        raise refuse(f"rescale_factor {config['rescale_factor']}")
    if config.get("resample") not in _FILTERS:
        raise refuse(f"resample {config.get('resample')}")
    size = config["size"]
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    if "shortest_edge" in size:
        cut = crop or {}
        if not cut or cut["height"] != cut["width"] or cut["height"] > size["shortest_edge"]:
            raise refuse(f"size {size} with crop {crop}")
        side, fraction, mode = int(cut["height"]), cut["height"] / size["shortest_edge"], "crop"
    else:
        if size.get("height") != size.get("width") or (crop and crop["height"] != size["height"]):
            raise refuse(f"size {size} with crop {crop}")
        side, fraction, mode = int(size["height"]), 1.0, "squash"
    mean, std = config["image_mean"], config["image_std"]
    return ImageSpec(
        size=side,
        resize=mode,  # type: ignore[arg-type]
        filter=_FILTERS[config["resample"]],  # type: ignore[arg-type]
        crop_fraction=fraction,
        mean=tuple(float(v) for v in mean),  # type: ignore[arg-type]
        std=tuple(float(v) for v in std),  # type: ignore[arg-type]
    )


def _model_class(transformers: Any, config: Any, target: str, trusted: bool) -> Any:
    kind = config.model_type
    if kind in _MODELS:
        return getattr(transformers, _MODELS[kind])
    if kind == "siglip2":
        raise UsageError(
            f"'hf:{target}' is a variable-resolution (NaFlex) SigLIP 2, which takes patch lists instead of a square "
            "picture; use a fixed-resolution checkpoint such as siglip2-base-patch16-224"
        )
    if trusted and hasattr(config, "auto_map"):
        return transformers.AutoModel
    raise unknown_name("dual-encoder model type of transformers", str(kind), _MODELS)


def explain(spec: str, target: str, error: Exception, allow_download: bool, files: str) -> str:
    """Why transformers could not load `target`; files: what is expected in a folder."""
    first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if Path(target).is_dir():
        present = sorted(p.name for p in Path(target).iterdir())[:8]
        config = Path(target) / "config.json"
        kind = ""
        if config.is_file():
            kind = f", model type {json.loads(config.read_text(encoding='utf-8')).get('model_type')!r}"
        return f"{spec!r} cannot be loaded ({first}); the folder holds {present}{kind}, and {files} are expected"
    hint = "check the id and the connection" if allow_download else f"{ASK}, or give a folder"
    return f"{spec!r} is not on this machine and nothing is downloaded unasked ({first}); {hint}"


@torch.no_grad()
def _width(model: Any, image: ImageSpec) -> int:
    pixels = torch.zeros(1, 3, image.size, image.size)
    return int(joint(model.eval().get_image_features(pixel_values=pixels)).shape[-1])
