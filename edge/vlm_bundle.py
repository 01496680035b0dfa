"""The bundle of a model that answers in words: its contract as data, and the folder that holds it.

The folder is laid out and verified as any bundle (`edge.bundle`). Files of a variant: "picture" (pixels to the
embeddings before the text) and "decoder" (one step over a key-value cache), and for Core ML "words" (ids to
embeddings).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pocketvlm.edge.bundle import PRECISION_ORDER, BundleFolder, BundleVariant, malformed
from pocketvlm.edge.contract import ImageSpec
from pocketvlm.edge.errors import UsageError, unknown_name

KIND = "vlm"


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is spelled in ids: the picture's places (with `begin` before them, inside the picture's
    graph), then for each turn `user` question `assistant` answer `end`.

    first_text: ids below it are special; no text contains them. marker: may stand once in a prompt, where the picture
    would be written, and is left out of it.
    """

    begin: int
    user: int
    assistant: int
    end: int
    pad: int
    first_text: int
    marker: str = "<image>"


@dataclass(frozen=True, kw_only=True)
class VlmContract:
    """What a model that answers in words expects and promises.

    image: uint8 pixels [1, S, S, 3]; what the graph takes. prefix: places of the cache before the text.
    context_length: places of the cache. layers, kv_heads, head_width: its shape, 2 * layers tensors
    [kv_heads, context_length, head_width] of float32. width: of embeddings. model_id: names the weights.
    tokenizer: the file, whose sha256 is told.
    """

    kind: Literal["vlm"]
    name: str
    model_id: str
    image: ImageSpec
    template: Template
    prefix: int
    context_length: int
    vocab_size: int
    width: int
    layers: int
    kv_heads: int
    head_width: int
    tokenizer: str = "tokenizer.json"
    tokenizer_sha256: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.prefix < self.context_length - 3:
            raise UsageError(
                f"a contract with {self.prefix} places before the text and {self.context_length} in all leaves no room "
                "for a question and an answer; export a model with a larger decoder.context_length"
            )

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Of the keys, and of the values, of one layer."""
        return self.kv_heads, self.context_length, self.head_width

    @property
    def longest_prompt(self) -> int:
        """Ids of a prompt that leave room for one token of an answer."""
        return self.context_length - self.prefix - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, field for field."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> VlmContract:
        """Inverse of `to_dict`; an unknown field is refused, because it would change what the model means."""
        value = dict(value) | {"image": _build(ImageSpec, value["image"])}
        return _build(cls, value | {"template": _build(Template, value["template"])})

    def digest(self) -> str:
        """sha256 of the canonical JSON; equal contracts have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class VlmBundle(BundleFolder):
    """A verified bundle of a model that answers in words. Make one with `VlmBundle.load`."""

    def __init__(self, folder: Path, raw: dict[str, Any], contract: VlmContract) -> None:
        super().__init__(folder, raw)
        self.contract = contract

    def __repr__(self) -> str:
        kinds = ", ".join(f"{v.target} {v.precision}" for v in self.variants)
        return f"VlmBundle({str(self.folder)!r}, {self.contract.name}: {kinds})"

    @classmethod
    def _made(cls, folder: Path, raw: dict[str, Any]) -> Self:
        kind = raw["contract"].get("kind")
        if kind != KIND:
            raise UsageError(
                f"bundle {str(folder)!r} holds a {kind!r} model and one that answers in words ({KIND!r}) is expected; "
                "it cannot be asked, so open it with pocketvlm.edge.EdgeModel"
            )
        loaded = cls(folder, raw, VlmContract.from_dict(raw["contract"]))
        if raw["contract_sha256"] != loaded.contract.digest():
            raise malformed("the contract in bundle.json is not the one that it was exported with")
        for variant in loaded.variants:
            if not {"picture", "decoder"} <= set(variant.files):
                raise malformed(f"the {variant.target} {variant.precision} variant lacks a picture or decoder file")
        return loaded

    def variant(self, target: str, precision: str = "auto") -> BundleVariant:
        """The variant for this target and precision; "auto" takes the most faithful.

        Raises:
            UnknownNameError: no variant has this target, or none of that target this precision.
        """
        found = {v.precision: v for v in self.variants if v.target == target}
        if not found:
            raise unknown_name("target of this bundle", target, {v.target for v in self.variants})
        if precision == "auto":
            return next((found[name] for name in PRECISION_ORDER if name in found), next(iter(found.values())))
        if precision not in found:
            raise unknown_name(f"precision of this bundle's {target} variants", precision, found)
        return found[precision]


def _build(cls: type[Any], value: dict[str, Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(cls)}
    for key in value:
        if key not in fields:
            raise unknown_name(f"{cls.__name__} field", key, fields)
    return cls(**{key: tuple(part) if isinstance(part, list) else part for key, part in value.items()})
