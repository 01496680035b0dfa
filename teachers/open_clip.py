"""Teachers from open_clip: any of its architectures, with weights from a file, a folder or (if allowed) a hub.

    open_clip:ViT-B-32@weights.safetensors      built-in architecture, your weights file (.safetensors, .pt, .bin)
    open_clip:my_model.json@weights.pt          your architecture file
    open_clip:FOLDER                            open_clip_config.json beside its weights
    open_clip:ViT-B-32@laion2b_s34b_b79k        a published tag; needs allow_download unless already cached

This module is pocketvlm.teachers.open_clip; the library is imported by its absolute name.
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
from pocketvlm.edge.errors import MissingExtraError, UsageError, require, unknown_name
from pocketvlm.teachers.clip_tokenizer import build_clip_tokenizer, text_spec
from pocketvlm.teachers.device import pick_device
from pocketvlm.teachers.dual import DualEncoderTeacher, without
from pocketvlm.teachers.hub import ASK, network

_RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


class OpenClipTeacher(DualEncoderTeacher):
    """A frozen open_clip model; `load_open_clip` builds it."""

    def __init__(self, model: nn.Module, tokenizer: Any, **kwargs: Any) -> None:
        self.tokenizer = tokenizer
        super().__init__(model, **kwargs)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """int64 [N, context_length]: open_clip's own tokenizer."""
        return self.tokenizer(list(texts))

    def _image_outputs(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        visual: Any = self.model.visual
        if isinstance(visual._parameters.get("proj"), Tensor):
            features = _first(without(visual, "proj")(pixels))
            return features @ visual.proj, features
        if hasattr(visual, "trunk") and hasattr(visual, "head"):
            features = visual.trunk(pixels)
            if features.ndim == 2:
                return visual.head(features), features
        return self.model.encode_image(pixels), None  # type: ignore[operator]

    def _image_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        visual: Any = self.model.visual
        if isinstance(visual._parameters.get("proj"), Tensor) and hasattr(visual, "output_tokens"):
            twin: Any = without(visual, "proj")
            twin.output_tokens = True
            features, tokens = twin(pixels)
            return features @ visual.proj, features, tokens
        if hasattr(visual, "trunk") and hasattr(visual, "head"):
            trunk = visual.trunk
            last = trunk.forward_features(pixels)
            features = trunk.forward_head(last)
            if features.ndim == 2:
                if last.ndim == 4:
                    channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
                    tokens = last.flatten(1, 2) if channels_last else last.flatten(2).transpose(1, 2)
                else:
                    tokens = last[:, getattr(trunk, "num_prefix_tokens", 0) :]
                return visual.head(features), features, tokens
        return (*self._image_outputs(pixels), None)

    def _text_outputs(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        ids = self.tokenize(texts).to(self.device)
        tower: Any = getattr(self.model, "text", self.model)
        projection = tower._parameters.get("text_projection")
        if isinstance(projection, Tensor):
            twin, ids = _shortened(without(tower, "text_projection"), ids)
            features = twin.encode_text(ids) if tower is self.model else _first(twin(ids))
            return features @ projection, features
        return self.model.encode_text(ids), None  # type: ignore[operator]

    def _build_text(self) -> tuple[bytes, TextSpec]:
        length = int(self.tokenizer.context_length)
        if type(self.tokenizer).__name__ == "SimpleTokenizer":
            mode = self.tokenizer.clean_fn.__name__.removeprefix("_clean_")
            return build_clip_tokenizer(context_length=length, clean=mode)
        inner = self.tokenizer.tokenizer
        if not getattr(inner, "is_fast", False):
            raise UsageError(
                f"the tokenizer of {self.name} exists only as Python code ({type(inner).__name__}), which a phone "
                "cannot run; use a checkpoint that ships tokenizer.json, or export the image tower with baked-in labels"
            )
        return fast_tokenizer_json(inner, length)


def load_open_clip(target: str, *, device: str | torch.device = "cpu", allow_download: bool = False) -> OpenClipTeacher:
    """Load `NAME@weights`, `CONFIG.json@weights` or a folder (see the module's docstring).

    Weights are read without pickle execution (`weights_only=True`). allow_download: let open_clip fetch a tag or
    a tokenizer that is not on this machine.

    Raises:
        MissingExtraError: open_clip is not installed.
        UnknownNameError: no such architecture or tag. UsageError: weights that are missing, do not fit, would need
        the network, or preprocessing that an `ImageSpec` cannot express.
    """
    library = require("open_clip", "open-clip")
    torch_device = pick_device(device)
    name, _, weights = target.partition("@")
    if Path(name).is_dir():
        if weights:
            raise UsageError(f"'open_clip:{target}' names a folder and weights; give the folder alone, it holds both")
        name = f"local-dir:{name}"
    elif name.endswith(".json"):
        name = _register(library, Path(name))
    elif name.startswith("hf-hub:"):
        _refuse_network(allow_download, f"open_clip:{target}", "a folder of its files as open_clip:FOLDER")
    elif name not in library.list_models():
        raise unknown_name("open_clip architecture", name, library.list_models())
    if not weights and ":" not in name:
        raise UsageError(
            f"'open_clip:{target}' names no weights, so the teacher would be random; "
            "write open_clip:NAME@weights.safetensors or open_clip:NAME@TAG"
        )
    if weights and not Path(weights).is_file():
        _check_tag(library, name, weights)
    try:
        with network(allow_download):
            model = library.create_model(
                name, pretrained=weights or None, pretrained_image=False, pretrained_text=False, require_pretrained=True
            )
            tokenizer = library.get_tokenizer(name)
    except ImportError as error:
        raise MissingExtraError(
            f"'open_clip:{target}' needs transformers for its text tower or tokenizer ({error}); "
            "install it with: pip install 'pocketvlm[hf]'"
        ) from error
    except Exception as error:  # open_clip raises RuntimeError, ValueError, OSError and hub errors alike
        hint = "check that the weights belong to this architecture"
        if weights and not Path(weights).is_file() and not allow_download:
            hint = f"the weights are not on this machine, so {ASK} or give a weights file"
        raise UsageError(
            f"'open_clip:{target}' cannot be loaded ({str(error).splitlines()[0][:200]}); {hint}"
        ) from error
    image = image_spec(dict(model.visual.preprocess_cfg))
    bias = getattr(model, "logit_bias", None)
    dim = _probe_width(model, image)
    return OpenClipTeacher(
        model,
        tokenizer,
        name=f"open_clip:{target}",
        image=image,
        dim=dim,
        logit_scale=math.exp(float(model.logit_scale.detach())),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        licences=((f"teacher weights open_clip:{Path(target).name}", "see the source of the weights", ""),),
        device=torch_device,
    )


def image_spec(cfg: dict[str, Any]) -> ImageSpec:
    """open_clip's preprocessing configuration as an `ImageSpec`.

    Raises:
        UsageError: a non-square input or a filter or mode that `ImageSpec` does not have.
    """
    size = cfg["size"]
    if isinstance(size, (tuple, list)):
        if len(set(size)) != 1:
            raise UsageError(
                f"this open_clip model takes {size[0]}x{size[1]} pixels and the contract knows square inputs only; "
                "use a variant with a square input"
            )
        size = size[0]
    interpolation = "bicubic" if cfg["interpolation"] in ("bicubic", "random") else cfg["interpolation"]
    if interpolation not in ("bilinear", "bicubic") or cfg["resize_mode"] not in _RESIZE:
        raise UsageError(
            f"open_clip preprocessing {cfg['interpolation']!r}/{cfg['resize_mode']!r} has no equal in the contract; "
            "use a model with bilinear or bicubic resizing"
        )
    fill = cfg.get("fill_color", 0)
    fill = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    pad = cfg["resize_mode"] == "longest"
    return ImageSpec(
        size=int(size),
        resize=_RESIZE[cfg["resize_mode"]],  # type: ignore[arg-type]
        filter=interpolation,  # type: ignore[arg-type]
        # only padding paints a background; elsewhere it is seen through transparent pixels, and white suits pictures
        background=fill if pad else (255, 255, 255),  # type: ignore[arg-type]
        mean=_three(cfg["mean"]),
        std=_three(cfg["std"]),
    )


def fast_tokenizer_json(tokenizer: Any, context_length: int) -> tuple[bytes, TextSpec]:
    """tokenizer.json and `TextSpec` of a transformers fast tokenizer, cut and padded to `context_length`."""
    from tokenizers import Tokenizer

    pad_id = int(tokenizer.pad_token_id or 0)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(context_length)
    backend.enable_padding(length=context_length, pad_id=pad_id, pad_token=tokenizer.pad_token or "<pad>")
    data = backend.to_str().encode()
    return data, text_spec(data, context_length=context_length, pad_id=pad_id)


def _register(library: Any, path: Path) -> str:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"architecture {path} cannot be read ({error}); give an open_clip model config") from error
    known = library.get_model_config(path.stem)
    if known is not None and known != config:
        raise UsageError(
            f"architecture file {path} is called like open_clip's own {path.stem!r} but differs from it, so one would "
            "shadow the other; rename the file"
        )
    if known is None:
        library.add_model_config(path)
    return path.stem


def _check_tag(library: Any, name: str, weights: str) -> None:
    if Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors", ".npz"):
        raise UsageError(f"weights file {weights!r} does not exist, so there is no teacher to load; check the path")
    tags = library.pretrained.list_pretrained_tags_by_model(name)
    if weights.lower().replace("-", "_") not in [t.lower().replace("-", "_") for t in tags]:
        raise unknown_name(f"weights tag of open_clip {name}", weights, tags or ["(none; give a weights file)"])


def _refuse_network(allowed: bool, what: str, instead: str) -> None:
    if not allowed:
        raise UsageError(f"'{what}' is on a hub and nothing is downloaded unasked; {ASK}, or give {instead}")


def _shortened(twin: Any, ids: Tensor) -> tuple[Any, Tensor]:
    """A tower and ids without the columns after the last end token of these texts.

    Only where the tower is causal and its output is read at the end token, the largest id, as in CLIP: what comes later
    is never looked at. Padding is four fifths of a context of 77, and of the tower's time. twin: of `without`, which
    may be changed.
    """
    mask, position = twin._buffers.get("attn_mask"), twin._parameters.get("positional_embedding")
    pool = getattr(twin, "text_pool_type", getattr(twin, "pool_type", None))
    if mask is None or position is None or pool != "argmax" or getattr(twin, "cls_emb", None) is not None:
        return twin, ids
    length = int(ids.argmax(dim=-1).max()) + 1
    twin.__dict__["_parameters"] = {**twin._parameters, "positional_embedding": position[:length]}
    twin.__dict__["_buffers"] = {**twin._buffers, "attn_mask": mask[:length, :length]}
    return twin, ids[:, :length]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _three(value: Any) -> tuple[float, float, float]:
    r, g, b = (value,) * 3 if isinstance(value, (int, float)) else value
    return float(r), float(g), float(b)


@torch.no_grad()
def _probe_width(model: Any, image: ImageSpec) -> int:
    return int(model.eval().encode_image(torch.zeros(1, 3, image.size, image.size)).shape[-1])
