"""Typed configurations of generative students: one small YAML file per named size, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pocketvlm.edge.errors import UsageError, unknown_name

# what `vision.weights` begins with where the tower is a saved CLIP student's
STUDENT = "student:"
_FOLDER = Path(__file__).resolve().parent / "configs"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(_Strict):
    """Vision tower. backbone: a timm model. size: pixels of the square input.

    weights: as `students.config.ImageConfig.weights`, or "student:FOLDER", the image tower of a saved CLIP student:
    backbone, backbone_args, mean and std are its own then, size too where none is given (`students.vlm.tower`).
    levels: inner outputs (timm's `forward_intermediates`) that are averaged to the places of the last map and put
    before it, since small things are lost at the last stride.
    mean, std: per channel in units of 0..1; None takes those of the timm configuration.
    origin: model id of that CLIP student, written when the tower is built, after which the folder is not needed.
    """

    backbone: str = ""
    size: int = Field(default=192, ge=16, le=1024)
    weights: str = "none"
    levels: tuple[int, ...] = ()
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    backbone_args: dict[str, Any] = {}
    origin: str | None = None

    @model_validator(mode="after")
    def _is_named(self) -> VisionConfig:
        borrowed = self.weights.startswith(STUDENT)
        if not borrowed and not self.backbone:
            raise ValueError(
                f"vision.backbone is missing, so there is no tower; name a timm model, or give vision.weights "
                f"'{STUDENT}FOLDER' for the tower of a CLIP student"
            )
        if not borrowed and self.origin is not None:
            raise ValueError(
                f"vision.origin says that the tower is of student {self.origin!r} but vision.weights is "
                f"{self.weights!r}; the record would be wrong, so leave vision.origin out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_empty_origin(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # digests of models without one stay as they were, and older releases read them
        return {key: value for key, value in handler(self).items() if key != "origin" or value is not None}


class DecoderConfig(_Strict):
    """A Llama-type decoder. width, layers, heads, kv_heads (grouped queries), hidden (of the gated MLP).

    context_length: places of the key-value cache: the beginning, the picture's tokens, the text.
    vocab_size: to train a tokenizer to; a built decoder has the vocabulary of the tokenizer it is given.
    rope_theta: base of the rotary positions. norm_eps: of the root-mean-square norms.
    """

    width: int = Field(ge=16)
    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    hidden: int = Field(ge=16)
    context_length: int = Field(default=160, ge=16, le=8192)
    vocab_size: int = Field(default=8192, ge=300)
    rope_theta: float = Field(default=10_000.0, gt=1)
    norm_eps: float = Field(default=1e-5, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> DecoderConfig:
        if self.width % self.heads or (self.width // self.heads) % 2 or self.heads % self.kv_heads:
            raise ValueError(
                f"decoder width {self.width}, heads {self.heads} and kv_heads {self.kv_heads} do not go together; the "
                "width of a head must be whole and even for rotary positions and every key head serve as many queries, "
                "so choose heads that divide the width and kv_heads that divide the heads"
            )
        return self


class Reduction(_Strict):
    """Fewer visual tokens than the connector gives (docs/visual-tokens.md).

    method: before the decoder "top" (highest scores), "rows" (whole rows of them), "even" (a coarser grid of places),
    "merge" (PiToMe), "pool" (means of cells) or "connector" (asks the connector itself for fewer); inside it "pyramid"
    (PyramidDrop) or "aim" (AIM: merged before, dropped inside).
    keep: visual tokens that stay; of "pyramid" behind its last stage, of "aim" after merging.
    score: of "top" and "rows": "cls" (FasterVLM), "cls-layers" (VTC-CLS), "received" (FoPru-style), "distinct".
    positions: "kept" lets tokens and text have the rotary positions that they have without reduction, "renumbered"
    takes the places that are left out of the count.
    schedule: of "pyramid" and "aim", visual tokens in each decoder layer, in place of the one that follows from `keep`.
    """

    method: Literal["top", "rows", "even", "merge", "pool", "connector", "pyramid", "aim"]
    keep: int = Field(ge=1)
    score: Literal["cls", "cls-layers", "received", "distinct"] = "distinct"
    positions: Literal["kept", "renumbered"] = "kept"
    schedule: tuple[int, ...] | None = None

    @property
    def scored(self) -> bool:
        """Whether tokens are chosen by a score of the vision tower."""
        return self.method in ("top", "rows")

    @property
    def inside(self) -> bool:
        """Whether tokens are dropped between layers of the decoder."""
        return self.method in ("pyramid", "aim")


class VlmConfig(_Strict):
    """A whole generative student.

    connector: "mlp", "nested" (the MLP, pooled to a random scale in training), "tokenpacker", "mqt" or "fusion"
    (`students.vlm.connectors`). connector_hidden: units of its MLP, and width of its attention.
    connector_tokens: of "tokenpacker" (default: a quarter of the tower's), most of "mqt" (default: as many as the tower
    gives) and of "fusion" (default: 1). connector_heads: of the first two. connector_layers: pre-fusion blocks.
    connector_drawn: numbers of tokens that training draws from, of "nested" and "mqt"; all they can give where empty.
    reduction: of the visual tokens, or all of them.
    """

    name: str
    description: str = ""
    vision: VisionConfig
    connector: Literal["mlp", "nested", "tokenpacker", "mqt", "fusion"] = "mlp"
    connector_hidden: int = Field(ge=8)
    connector_tokens: int | None = Field(default=None, ge=1)
    connector_heads: int = Field(default=8, ge=1)
    connector_layers: int = Field(default=2, ge=1)
    connector_drawn: tuple[int, ...] = ()
    reduction: Reduction | None = None
    decoder: DecoderConfig
    licences: tuple[tuple[str, str, str], ...] = ()


def vlm_names() -> list[str]:
    """Names of the shipped sizes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_vlm_config(name: str, overrides: Mapping[str, Any] | None = None) -> VlmConfig:
    """The configuration called `name` (a shipped size, or a path to a .yaml file), checked at once.

    overrides: dotted keys and the values that replace the file's, such as {"decoder.layers": 2}.

    Raises:
        UnknownNameError: no such size (nearest names suggested).
        UsageError: an unknown key or a wrong value; one sentence for each mistake.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise unknown_name("generative student", name, [*vlm_names(), "FILE.yaml"])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise UsageError(f"student file {path.name} does not hold a mapping of keys; see docs/vlm.md for one")
    for key, value in (overrides or {}).items():
        *outer, last = key.split(".")
        place = values
        for part in outer:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"override {key!r} goes below {part!r}, which is a plain value; give {part!r} itself")
        place[last] = value
    return parse_vlm_config(values, source=f"student {name!r}")


def parse_vlm_config(values: Mapping[str, Any], *, source: str) -> VlmConfig:
    """Check plain values; `source` names them in messages.

    Raises:
        UsageError: every mistake of `values`.
    """
    try:
        return VlmConfig.model_validate(dict(values))
    except ValidationError as error:
        mistakes = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "value_error":
                mistakes.append(str(item["ctx"]["error"]))
            elif item["type"] == "extra_forbidden":
                mistakes.append(str(unknown_name("key of a generative student", where, _keys())))
            else:
                mistakes.append(f"{where} is {item['input']!r}, but {item['msg'][0].lower()}{item['msg'][1:]}")
        raise UsageError(f"{source} cannot be built: " + "; ".join(mistakes)) from error


def _keys() -> list[str]:
    inner: dict[str, type[BaseModel]] = {"vision": VisionConfig, "reduction": Reduction, "decoder": DecoderConfig}
    found = [name for name in VlmConfig.model_fields if name not in inner]
    return [*found, *(f"{name}.{key}" for name, model in inner.items() for key in model.model_fields)]
