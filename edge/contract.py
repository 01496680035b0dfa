"""What a model expects and promises, as data: the part of a model that every runtime must agree on.

Written with dataclasses only, so that it travels as JSON and loads without torch. Python, JavaScript,
Swift and Kotlin read the same fields; `docs/preprocessing.md` gives the arithmetic behind each one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pocketvlm.edge.errors import UsageError, unknown_name

Kind = Literal["dual", "image-labels", "classifier", "generative"]
Resize = Literal["crop", "squash", "pad"]
Filter = Literal["bilinear", "bicubic"]

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Image bytes to the uint8 pixels that a graph takes; everything after that is inside the graph.

    decode (`decode="v1"`): first frame; EXIF orientation applied; alpha composited on `background`;
    gray, palette and CMYK to RGB; 16-bit to 8-bit by (v * 255 + 32767) // 65535.
    resize: "crop" scales the shorter side to `round(size / crop_fraction)`, the longer side to
    `int(short_target * long / short)`, then cuts the centre with offset `round_half_even((n - size) / 2)`;
    "squash" scales both sides to `size`; "pad" scales the longer side to `size` and centres on `background`.
    filter: the antialiased 8-bit fixed-point resampling of docs/preprocessing.md (bit-exact by definition).

    `mean` and `std` (per RGB channel, in units of 0..1) are applied inside the graph, after division by 255.
    """

    size: int
    resize: Resize = "crop"
    filter: Filter = "bilinear"
    crop_fraction: float = 1.0
    background: tuple[int, int, int] = (255, 255, 255)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    decode: str = "v1"

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop_fraction <= 1:
            raise UsageError(
                f"image size {self.size} with crop_fraction {self.crop_fraction} gives no pixels; "
                "use size >= 1 and 0 < crop_fraction <= 1"
            )


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """Strings to the int32 ids that a graph takes: [batch, context_length], padded on the right with `pad_id`.

    Text past the context is cut by the tokenizer so that its closing special token is kept. The graph
    derives its attention mask from `ids != pad_id`; there is no second input.
    """

    context_length: int
    vocab_size: int
    pad_id: int = 0
    family: Literal["wordpiece", "bpe", "unigram"] = "wordpiece"
    tokenizer: str = "tokenizer.json"
    tokenizer_sha256: str = ""
    languages: tuple[str, ...] = ("en",)


@dataclass(frozen=True, kw_only=True)
class ModelContract:
    """Inputs, outputs and identity of a model.

    kind: "dual" has both towers; "image-labels" has an image tower and baked-in label embeddings;
    "classifier" has an image tower and logits over `labels`; "generative" belongs to a later schema.
    embed_dim: width of the embedding. dims: widths at which a prefix of the embedding, normalised again,
    may be used (always contains embed_dim; more than one only for Matryoshka-trained models).
    logit_scale / logit_bias: logits = logit_scale * cosine + logit_bias (logit_scale is not a logarithm).
    space_id: names the coordinate system of the embeddings. Equal ids mean that vectors may be compared.
    A model trained to reproduce a teacher's embeddings carries the teacher's id, so that its queries may
    search a gallery that the teacher embedded; any other model carries an id made from its own weights.
    model_id: names the weights; two models never share it.
    """

    kind: Kind
    name: str
    model_id: str
    space_id: str
    embed_dim: int
    dims: tuple[int, ...]
    image: ImageSpec | None
    text: TextSpec | None
    logit_scale: float
    logit_bias: float = 0.0
    normalized: bool = True
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.embed_dim not in self.dims:
            raise UsageError(
                f"contract dims {self.dims} leave out embed_dim {self.embed_dim}; add it, "
                "or every runtime would refuse the full embedding"
            )
        if self.kind == "dual" and (self.image is None or self.text is None):
            raise UsageError("a 'dual' contract needs both an image and a text spec; use 'image-labels' otherwise")
        if self.kind == "classifier" and (self.image is None or len(self.labels) != self.embed_dim):
            raise UsageError(
                f"a 'classifier' contract has {len(self.labels)} labels for {self.embed_dim} logits and an image spec "
                f"of {self.image}; a logit would have no name, so give one label for each and an image spec"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, field for field."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ModelContract:
        """Inverse of `to_dict`; an unknown field is refused, because it would change what the model means."""
        value = dict(value)
        for key, spec in (("image", ImageSpec), ("text", TextSpec)):
            if value.get(key) is not None:
                value[key] = _build(spec, value[key])
        return _build(cls, value)

    def digest(self) -> str:
        """sha256 of the canonical JSON; equal contracts have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def identity(name: str, weights_sha256: str) -> str:
    """`space_id` or `model_id` for weights with this digest: the name, then 16 hex digits."""
    return f"{name}-{weights_sha256[:16]}"


def _build(cls: type[_T], value: dict[str, Any]) -> _T:
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise unknown_name(f"{cls.__name__} field", key, fields)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in value.items()})
